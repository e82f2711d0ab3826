"""ONNX graphs as files: split off the weights, make the graph plain, name its axes, write it.

The exporters write the right arithmetic in a roundabout way: sizes that are known are read off tensors again and again,
equal casts follow each other, and constants (the attention scale) are computed from shapes at run time. Engine builders
see through most of that, at the price of time and of fusions missed. `simplify` leaves what depends on the input alone.

Works on graphs whose weights are elsewhere, so that protobuf's 2 GiB limit and copies of gigabytes don't matter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from sdtrt.components import Contract, TensorSpec
from sdtrt.errors import ExportError

Weights = dict[str, npt.NDArray[np.uint8]]

# A protobuf message ends at 2 GiB; the graph itself takes a few megabytes of that.
INLINE_LIMIT_BYTES = 2**31 - 2**26
DATA_ALIGNMENT_BYTES = 4096  # a page, so that readers can map tensors (ONNX's own recommendation)
SMALL_BYTES = 1024  # tensors up to this size stay in the graph: shapes, axes, scalars
FOLD_LIMIT_ELEMENTS = 4096  # the largest constant that folding may make (the timestep's frequencies); never a weight
MAX_ROUNDS = 10

ELEM_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
}
# fmt: off
MOVING = frozenset((
    "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"
))
FOLDABLE = frozenset((
    "Abs", "Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Cos", "Div", "Equal", "Exp", "Expand", "Floor",
    "Gather", "Identity", "Mod", "Mul", "Neg", "Not", "Pow", "Range", "Reciprocal", "Reshape", "Sin", "Slice",
    "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"
))
# fmt: on


def load_split(path: Path) -> tuple[onnx.ModelProto, Weights]:
    """Read a model's graph, and its weights apart from it (mapped from their files where they have files)."""
    model = onnx.load(path, load_external_data=False)
    weights: Weights = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            weights[tensor.name] = _map_external(tensor, path.parent)
        elif tensor.ByteSize() > SMALL_BYTES:
            if not tensor.HasField("raw_data"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
            weights[tensor.name] = np.frombuffer(tensor.raw_data, dtype=np.uint8)
            tensor.ClearField("raw_data")
    return model, weights


def _map_external(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[np.uint8]:
    """The bytes of one external tensor; its reference to the file is dropped."""
    where = {item.key: item.value for item in tensor.external_data}
    offset, length = int(where.get("offset", 0)), where.get("length")
    count = -1 if length is None else int(length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    if count == 0:
        return np.empty(0, dtype=np.uint8)
    mapped = np.memmap(folder / where["location"], dtype=np.uint8, mode="r", offset=offset)
    return mapped if count < 0 else mapped[:count]


def attach(
    model: onnx.ModelProto, weights: Weights, parameters: Mapping[str, tuple[tuple[int, ...], npt.NDArray[np.uint8]]]
) -> None:
    """Turn those inputs of a graph that are parameters (name → shape, bytes) into initializers."""
    inputs = {value.name: value for value in model.graph.input}
    for name, (shape, data) in parameters.items():
        if name not in inputs:
            continue
        tensor = model.graph.initializer.add(name=name, dims=shape, data_type=inputs[name].type.tensor_type.elem_type)
        if data.nbytes > SMALL_BYTES:
            weights[name] = data
        else:
            tensor.raw_data = data.tobytes()
        model.graph.input.remove(inputs[name])


def save(model: onnx.ModelProto, weights: Weights, path: Path, *, inline_bytes: int | None = None) -> None:
    """Write `path`, and `path` + `.data` where it gets too large. Equal models give equal bytes.

    Args:
        inline_bytes: from how many bytes on weights are apart; None for what protobuf's limit asks for.
    """
    total = sum(data.nbytes for data in weights.values()) + model.ByteSize()
    if total < (INLINE_LIMIT_BYTES if inline_bytes is None else inline_bytes):
        for tensor in model.graph.initializer:
            if tensor.name in weights:
                tensor.raw_data = weights[tensor.name].tobytes()
    else:
        _write_external(model, weights, path.with_name(path.name + ".data"))
    path.write_bytes(model.SerializeToString(deterministic=True))


def _write_external(model: onnx.ModelProto, weights: Weights, path: Path) -> None:
    """Write all weights into one file, each at a page's start, and refer to them from the graph."""
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name not in weights:
                continue
            file.write(bytes(-file.tell() % DATA_ALIGNMENT_BYTES))
            offset = file.tell()
            file.write(weights[tensor.name].data)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entries = {"location": path.name, "offset": str(offset), "length": str(weights[tensor.name].nbytes)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)


def apply_contract(model: onnx.ModelProto, contract: Contract, metadata: Mapping[str, str]) -> None:
    """Hold the graph's inputs and outputs against the contract, name their axes, and describe the file.

    Raises:
        ExportError: an input or output is missing, has another name, dtype or rank.
    """
    _apply_tensors("input", model.graph.input, contract.inputs)
    _apply_tensors("output", model.graph.output, contract.outputs)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))


def _apply_tensors(kind: str, values: Iterable[onnx.ValueInfoProto], specs: tuple[TensorSpec, ...]) -> None:
    found = {value.name: value.type.tensor_type for value in values}
    if list(found) != [spec.name for spec in specs]:
        raise ExportError(
            f"the exported graph has {kind}s {list(found)}, not {[spec.name for spec in specs]}",
            hint="this part of the model does not use all of its inputs; use --backend torch for it",
        )
    for spec in specs:
        tensor = found[spec.name]
        if tensor.elem_type != ELEM_TYPES[spec.dtype] or len(tensor.shape.dim) != len(spec.dims):
            name = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise ExportError(
                f"the exported {spec.name} is {name} with {len(tensor.shape.dim)} axes, "
                f"not {spec.dtype} with {len(spec.dims)}",
                hint="report this model as a bug, or use --backend torch for it",
            )
        for axis, dim in enumerate(spec.dims):
            target = tensor.shape.dim[axis]
            target.Clear()
            if isinstance(dim, str):
                target.dim_param = dim
            else:
                target.dim_value = dim


def simplify(model: onnx.ModelProto, weights: Weights) -> None:
    """Fold what does not depend on the inputs, drop what changes nothing, merge equal nodes, strip debug information.

    The result computes the same values bit for bit: only nodes on constants and known sizes are computed ahead.
    Weights that no node takes any more are dropped from `weights` too.
    """
    if model.functions:
        model.CopyFrom(inliner.inline_local_functions(model))
    _strip(model)
    for _ in range(MAX_ROUNDS):
        before = model.graph.SerializeToString(deterministic=True)
        _fold(model, weights)
        _drop_no_ops(model, weights)
        _merge_equal(model.graph)
        _fold_transposes(model.graph, weights)
        _fold_widening(model.graph, weights)
        drop_unused(model.graph, weights)
        if model.graph.SerializeToString(deterministic=True) == before:
            break


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces, paths, module hierarchies and intermediate shapes."""
    graph = model.graph
    del graph.value_info[:]
    del graph.metadata_props[:]
    del graph.quantization_annotation[:]
    model.ClearField("doc_string")
    graph.ClearField("doc_string")
    graph.name = "sdtrt"
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        del item.metadata_props[:]


class Facts:
    """What is known of a graph's tensors ahead of time: types, sizes and values."""

    def __init__(self, model: onnx.ModelProto, weights: Weights) -> None:
        stand_in, bfloat16 = _without_bfloat16(model)
        inferred = onnx.shape_inference.infer_shapes(stand_in, data_prop=True).graph
        self.types: dict[str, int] = {}
        self.dims: dict[str, list[int | None]] = {}
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                narrow = bfloat16 and tensor.elem_type == onnx.TensorProto.FLOAT16
                self.types[value.name] = onnx.TensorProto.BFLOAT16 if narrow else tensor.elem_type
            if tensor.HasField("shape"):
                self.dims[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        self.values: dict[str, npt.NDArray[Any]] = {}
        self.sizes: dict[str, list[int | None]] = {}  # of tensors that hold sizes: their elements, where known
        for tensor in model.graph.initializer:
            self.types[tensor.name] = tensor.data_type
            self.dims[tensor.name] = list(tensor.dims)
            if tensor.HasField("raw_data") or 0 in tensor.dims:
                self.values[tensor.name] = numpy_helper.to_array(tensor)
            elif tensor.name in weights and len(tensor.dims) == 1 and tensor.dims[0] <= FOLD_LIMIT_ELEMENTS:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                self.values[tensor.name] = weights[tensor.name].view(dtype)
        self.opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def makers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Tensor name → the node that makes it."""
    return {name: node for node in graph.node for name in node.output}


def takers_of(graph: onnx.GraphProto) -> defaultdict[str, list[onnx.NodeProto]]:
    """Tensor name → the nodes that take it, each once."""
    takers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            takers[name].append(node)
    return takers


def _without_bfloat16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """The model to infer types and shapes on, and whether fp16 stands for bf16 in it.

    Before opset 22 ONNX has no bf16 convolution, so inference stops at the first (engine builders take them all along).
    """
    narrow, stand_in = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16
    if all(value.type.tensor_type.elem_type != narrow for value in model.graph.output):
        return model, False
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in _tensors(copy.graph):
        if tensor.data_type == narrow:
            tensor.data_type = stand_in
    _retype(copy.graph, narrow, stand_in)
    return copy, True


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All initializers and constants."""
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR)


def _cast_targets(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    """The attributes of casts that name a type."""
    for node in graph.node:
        if node.op_type == "Cast":
            yield from (attribute for attribute in node.attribute if attribute.name == "to")


def _fold(model: onnx.ModelProto, weights: Weights) -> None:
    """Replace each node whose result is known by a constant."""
    facts = Facts(model, weights)
    for node in model.graph.node:
        if len(node.output) != 1:
            continue
        if node.op_type == "CastLike" and (target := facts.types.get(node.input[1])):
            node.CopyFrom(onnx.helper.make_node("Cast", node.input[:1], node.output, name=node.name, to=target))
        value = _evaluate(node, facts)
        if value is None:
            continue
        facts.values[node.output[0]] = value
        if node.op_type != "Constant":
            constant = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape))
            node.CopyFrom(onnx.helper.make_node("Constant", [], node.output, name=node.name, value=constant))


def _evaluate(node: onnx.NodeProto, facts: Facts) -> npt.NDArray[Any] | None:
    """The node's value, if it is known ahead of time."""
    if node.op_type == "Constant":
        return _constant(node)
    if node.op_type == "Shape":
        return _evaluate_shape(node, facts)
    if node.op_type not in FOLDABLE or node.domain not in ("", "ai.onnx"):
        return None
    inputs: dict[str, npt.NDArray[Any] | None] = {name: facts.values.get(name) for name in node.input if name}
    first = node.input[0]
    if first in facts.sizes and all(value is not None for name, value in inputs.items() if name != first):
        inputs[first] = _known_part(node, facts.sizes[first], inputs)
    if any(value is None for value in inputs.values()):
        return None
    results: Any = ReferenceEvaluator(_as_model(node, inputs, facts.opset)).run(None, inputs)
    result = np.asarray(results[0])
    return result if result.size <= FOLD_LIMIT_ELEMENTS else None


def _constant(node: onnx.NodeProto) -> npt.NDArray[Any] | None:
    """The value of a Constant node."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t)
    kinds: dict[str, Any] = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32}
    kinds["value_floats"] = np.float32
    if attribute.name not in kinds:
        return None
    return np.asarray(onnx.helper.get_attribute_value(attribute), dtype=kinds[attribute.name])


def _evaluate_shape(node: onnx.NodeProto, facts: Facts) -> npt.NDArray[Any] | None:
    """A tensor's shape, if it is static; else remember the sizes that are."""
    dims = facts.dims.get(node.input[0])
    if dims is None:
        return None
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    dims = dims[bounds.get("start", 0) : bounds.get("end", len(dims))]
    if None in dims:
        facts.sizes[node.output[0]] = dims
        return None
    return np.asarray(dims, dtype=np.int64)


def _known_part(
    node: onnx.NodeProto, sizes: list[int | None], inputs: Mapping[str, npt.NDArray[Any] | None]
) -> npt.NDArray[Any] | None:
    """Sizes as an array, if the node takes only such as are known (one element of a shape, say)."""
    if node.op_type == "Gather":
        index = inputs[node.input[1]]
        taken = None if index is None else [sizes[i] for i in index.ravel().tolist()]
    elif node.op_type == "Slice":
        parts = [inputs[name] for name in node.input[1:]]
        numbers = [int(part.ravel()[0]) for part in parts if part is not None]
        start, end, step = numbers[0], numbers[1], numbers[3] if len(numbers) > 3 else 1
        taken = sizes[start:end:step]
    else:
        return None
    if taken is None or None in taken:
        return None
    return np.asarray([-1 if size is None else size for size in sizes], dtype=np.int64)


def _as_model(node: onnx.NodeProto, inputs: Mapping[str, Any], opset: int) -> onnx.ModelProto:
    """A model of one node."""
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    output = onnx.ValueInfoProto(name=node.output[0])
    graph = onnx.helper.make_graph([node], "node", values, [output])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _drop_no_ops(model: onnx.ModelProto, weights: Weights) -> None:
    """Bypass Identity, casts to the type a tensor has already, and multiplication or division by one."""
    facts = Facts(model, weights)
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := _constant(node)) is not None:
            facts.values[node.output[0]] = value
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        _rename_inputs(node, renamed)
        if len(node.output) == 1 and node.output[0] not in outputs and _changes_nothing(node, facts):
            renamed[node.output[0]] = node.input[0]


def _changes_nothing(node: onnx.NodeProto, facts: Facts) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        return any(a.name == "to" and a.i == facts.types.get(node.input[0]) for a in node.attribute)
    if node.op_type in ("Mul", "Div"):
        factor = facts.values.get(node.input[1])
        return factor is not None and factor.ndim == 0 and bool(factor == 1)
    return False


def _merge_equal(graph: onnx.GraphProto) -> None:
    """Let equal nodes (same operator, attributes and inputs) be one node."""
    outputs = {value.name for value in graph.output}
    seen: dict[bytes, onnx.NodeProto] = {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        _rename_inputs(node, renamed)
        if outputs.intersection(node.output):
            continue
        bare = onnx.NodeProto(op_type=node.op_type, domain=node.domain, input=node.input, attribute=node.attribute)
        first = seen.setdefault(bare.SerializeToString(deterministic=True), node)
        if first is not node:
            renamed.update(zip(node.output, first.output, strict=True))


def _rename_inputs(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        if name in renamed:
            node.input[index] = renamed[name]


def _fold_transposes(graph: onnx.GraphProto, weights: Weights) -> None:
    """Store transposed those matrices that the graph takes transposed only; their names then end in `.T`."""
    uses = Counter(name for node in graph.node for name in node.input)
    matrices = {tensor.name: tensor for tensor in graph.initializer if tensor.name in weights and len(tensor.dims) == 2}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in matrices and uses[node.input[0]] == 1:
            tensor = matrices[node.input[0]]
            rows, columns = tensor.dims
            data = weights.pop(tensor.name)
            items = data.view(f"u{data.nbytes // (rows * columns)}").reshape(rows, columns)
            tensor.name += ".T"
            tensor.dims[:] = [columns, rows]
            weights[tensor.name] = np.ascontiguousarray(items.T).reshape(-1).view(np.uint8)
            node.CopyFrom(onnx.helper.make_node("Identity", [tensor.name], node.output, name=node.name))


def _fold_widening(graph: onnx.GraphProto, weights: Weights) -> None:
    """Store in fp32 those fp16 weights that the graph takes in fp32 only; their names then end in `.fp32`.

    TensorRT 8.6 takes a convolution's weights from the file, not from a cast.
    """
    uses = Counter(name for node in graph.node for name in node.input)
    halves = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.name in weights and tensor.data_type == onnx.TensorProto.FLOAT16
    }
    for node in graph.node:
        if node.op_type != "Cast" or node.input[0] not in halves or uses[node.input[0]] != 1:
            continue
        if node.attribute[0].i == onnx.TensorProto.FLOAT:
            tensor = halves[node.input[0]]
            data = weights.pop(tensor.name)
            tensor.name += ".fp32"
            tensor.data_type = onnx.TensorProto.FLOAT
            weights[tensor.name] = data.view(np.float16).astype(np.float32).view(np.uint8)
            node.CopyFrom(onnx.helper.make_node("Identity", [tensor.name], node.output, name=node.name))


def drop_unused(graph: onnx.GraphProto, weights: Weights) -> None:
    """Remove nodes and weights that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    if len(kept) < len(graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del graph.node[:]
        graph.node.extend(kept)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            weights.pop(graph.initializer[index].name, None)
            del graph.initializer[index]


def float32_nodes(path: Path) -> frozenset[str]:
    """The names of a file's nodes that compute in fp32: arithmetic, not the moving about of its results."""
    model, weights = load_split(path)
    types = Facts(model, weights).types
    computing = (node for node in model.graph.node if node.op_type not in MOVING)
    return frozenset(node.name for node in computing if types.get(node.output[0]) == onnx.TensorProto.FLOAT)


def widen_bfloat16(model: onnx.ModelProto, weights: Weights) -> None:
    """Turn a bf16 graph into an fp32 one with the same (rounded) weights, for runtimes without bf16."""
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in _tensors(model.graph):
        if tensor.data_type != narrow:
            continue
        if tensor.name in weights:
            tensor.data_type = wide
            weights[tensor.name] = _widen(weights[tensor.name]).view(np.uint8)
        else:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    _retype(model.graph, narrow, wide)


def _retype(graph: onnx.GraphProto, old: int, new: int) -> None:
    """Change a data type wherever the graph names it: inputs, outputs, and what casts make."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == old:
            value.type.tensor_type.elem_type = new
    for attribute in _cast_targets(graph):
        if attribute.i == old:
            attribute.i = new


def _widen(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """bf16 bytes as fp32 numbers: bf16 is fp32's upper half."""
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

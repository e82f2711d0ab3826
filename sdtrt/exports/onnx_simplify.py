"""Make an exported graph plain: fold what is known, drop what changes nothing, merge what is equal.

The exporters write the right arithmetic in a roundabout way: sizes that are known are read off tensors again and again,
equal casts follow each other, and constants (the attention scale) are computed from shapes at run time. Engine builders
see through most of that, at the price of time and of fusions missed. `simplify` leaves what depends on the input alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from sdtrt.exports.onnx_file import Weights
from sdtrt.exports.onnx_index import FOLD_LIMIT_ELEMENTS, GraphIndex

MAX_ROUNDS = 10
# fmt: off
FOLDABLE = frozenset((
    "Abs", "Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Cos", "Div", "Equal", "Exp", "Expand", "Floor",
    "Gather", "Identity", "Mod", "Mul", "Neg", "Not", "Pow", "Range", "Reciprocal", "Reshape", "Sin", "Slice",
    "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"
))
# fmt: on


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


def _fold(model: onnx.ModelProto, weights: Weights) -> None:
    """Replace each node whose result is known by a constant."""
    facts = GraphIndex(model, weights)
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


def _evaluate(node: onnx.NodeProto, facts: GraphIndex) -> npt.NDArray[Any] | None:
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


def _evaluate_shape(node: onnx.NodeProto, facts: GraphIndex) -> npt.NDArray[Any] | None:
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
    facts = GraphIndex(model, weights)
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := _constant(node)) is not None:
            facts.values[node.output[0]] = value
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        _rename_inputs(node, renamed)
        if len(node.output) == 1 and node.output[0] not in outputs and _changes_nothing(node, facts):
            renamed[node.output[0]] = node.input[0]


def _changes_nothing(node: onnx.NodeProto, facts: GraphIndex) -> bool:
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

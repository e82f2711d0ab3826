"""ONNX graphs as files: split off the weights, name the graph's axes, write it, with bf16 or without.

Works on graphs whose weights are elsewhere, so that protobuf's 2 GiB limit and copies of gigabytes don't matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sdtrt.common.errors import ExportError
from sdtrt.specs.contract import Contract, TensorSpec

Weights = dict[str, npt.NDArray[np.uint8]]

# A protobuf message ends at 2 GiB; the graph itself takes a few megabytes of that.
INLINE_LIMIT_BYTES = 2**31 - 2**26
DATA_ALIGNMENT_BYTES = 4096  # a page, so that readers can map tensors (ONNX's own recommendation)
SMALL_BYTES = 1024  # tensors up to this size stay in the graph: shapes, axes, scalars

ELEM_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
}


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


def without_bfloat16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
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


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All initializers and constants."""
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR)


def _retype(graph: onnx.GraphProto, old: int, new: int) -> None:
    """Change a data type wherever the graph names it: inputs, outputs, and what casts make."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == old:
            value.type.tensor_type.elem_type = new
    for attribute in _cast_targets(graph):
        if attribute.i == old:
            attribute.i = new


def _cast_targets(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    """The attributes of casts that name a type."""
    for node in graph.node:
        if node.op_type == "Cast":
            yield from (attribute for attribute in node.attribute if attribute.name == "to")


def _widen(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """bf16 bytes as fp32 numbers: bf16 is fp32's upper half."""
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

"""What is known of an ONNX graph before it runs: its tensors' types, sizes and values, and who makes and takes them."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sdtrt.exports.onnx_file import Weights, without_bfloat16

FOLD_LIMIT_ELEMENTS = 4096  # the largest constant that folding may make (the timestep's frequencies); never a weight
# fmt: on


class GraphIndex:
    """What is known of a graph's tensors ahead of time: types, sizes and small values; and who makes and takes them."""

    def __init__(self, model: onnx.ModelProto, weights: Weights) -> None:
        stand_in, bfloat16 = without_bfloat16(model)
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
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":  # a tensor
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.makers, self.takers = makers_of(model.graph), takers_of(model.graph)

    def bytes_of(self, name: str) -> int:
        """A tensor's size; sizes that are not known count as one."""
        item = onnx.helper.tensor_dtype_to_np_dtype(self.types[name]).itemsize
        return int(item) * math.prod(dim or 1 for dim in self.dims.get(name, ()))

    def scalar(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """Of a node of two inputs, one of them a constant of one element: the other's name, and the constant."""
        for name, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
            value = self.values.get(other)
            if value is not None and value.size == 1:
                return name, float(value.ravel()[0])
        return None

    def end_of_shape(self, name: str, count: int) -> tuple[int, ...] | None:
        """The last elements of a shape, if they are known."""
        if (value := self.values.get(name)) is not None:
            return tuple(int(size) for size in value.ravel()[-count:])
        node = self.makers.get(name)
        if node is None or node.op_type != "Concat" or len(node.input) < count:
            return None
        parts = [self.values.get(part) for part in node.input[-count:]]
        return tuple(int(part.ravel()[0]) for part in parts if part is not None and part.size == 1)

    def only_taker(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The one node that takes a tensor, if it is of that kind."""
        takers = self.takers[name]
        return takers[0] if len(takers) == 1 and takers[0].op_type == operator else None


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

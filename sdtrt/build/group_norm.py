"""Group normalisations in forms that serve TensorRT 8.6 better than the exporter's.

A UNet's become nodes of a plugin (`use_plugin`), which works in the layout of the convolutions; a VAE's are spelled out
(`spell_out`), for left to itself 8.6 keeps the largest of them in fp32, at twice the memory and more.

The ONNX spells a group normalisation out: reshape, instance normalisation, reshape, scale, shift, and often SiLU. 8.6
turns that into three kernels with a change of layout before and after. Its plugin library has one made for Stable
Diffusion (`GroupNorm`, from TensorRT 8.5.2 on): statistics and all in two kernels on the convolutions' own layout,
SiLU included, sums in fp32.

What it does otherwise than the ONNX (its source is in NVIDIA's TensorRT repository, plugin/groupNormPlugin): it adds up
by atomics, so two runs may differ in the last bit; the variance is E[x²] - E[x]², without an epsilon (1 where that is
not positive), so groups that hardly vary, with a standard deviation below 0.02 or of a thousandth of their mean, come
out wrong by more than fp16's rounding; and its workspace is for 32 samples, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sdtrt import onnx_graph
from sdtrt.onnx_graph import Weights

OPERATOR = "GroupNorm"  # the plugin's name in TensorRT's registry; the parser looks operators up there
GROUPS = 32  # the only number that it serves
MAX_BATCH = 32  # beyond it writes past its workspace
# How many channels a block of the plugin's kernel takes: it must divide the channels, and hold whole groups. These are
# the widths of Stable Diffusion's UNets. Its VAE's (128 to 512) fail to launch in 8.6.0 on an H200 ("invalid
# configuration argument"), though the library has kernels of those sizes.
CHANNELS_PER_BLOCK = {960: 480, 1920: 480}
OTHER_CHANNELS_PER_BLOCK = 320

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Norm:
    """One group normalisation of a graph: what it takes, and the node that it ends with."""

    source: str
    last: onnx.NodeProto
    groups: int
    scale: Array
    shift: Array
    epsilon: float
    swish: bool


def serves(channels: int) -> bool:
    """Whether the plugin can normalise that many channels."""
    block, group = CHANNELS_PER_BLOCK.get(channels, OTHER_CHANNELS_PER_BLOCK), channels // GROUPS
    return channels % GROUPS == 0 and channels % block == 0 and block % group == 0


def use_plugin(model: onnx.ModelProto, weights: Weights) -> int:
    """Replace the group normalisations that the plugin serves by nodes of its name; returns how many.

    Args:
        model: an export's graph, changed in place; no ONNX operator set knows the new nodes.
        weights: the graph's; scales and shifts come in as fp32, which the plugin asks for.
    """
    found = _find(model.graph, _constants(model.graph, weights))
    norms = [norm for norm in found if norm.groups == GROUPS and serves(norm.scale.size)]
    for number, norm in enumerate(norms):
        names = [f"group_norm.{number}.{kind}" for kind in ("scale", "shift")]
        for name, values in zip(names, (norm.scale, norm.shift), strict=True):
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        attributes: dict[str, Any] = {"epsilon": norm.epsilon, "bSwish": int(norm.swish), "plugin_version": "1"}
        inputs = [norm.source, *names]
        norm.last.CopyFrom(onnx.helper.make_node(OPERATOR, inputs, norm.last.output, name=norm.last.name, **attributes))
    onnx_graph.drop_unused(model.graph, weights)
    return len(norms)


def spell_out(model: onnx.ModelProto, weights: Weights) -> int:
    """Write group normalisations and their SiLU as means over channels and one fp32 product and sum; returns how many.

    The mean and the variance (E[x²] - E[x]²) of a group come from those of its channels, and a scale and a shift for
    each channel from both, so that nothing of a tensor's own size need be kept in fp32. Those without SiLU are left:
    an attention's, small and of another rank.

    Args:
        model: an export's graph of opset 17, changed in place.
        weights: the graph's; scales and shifts come in as fp32.
    """
    graph = model.graph
    norms = [norm for norm in _find(graph, _constants(graph, weights)) if norm.swish]
    for number, norm in enumerate(norms):
        spelling = _Spelling(norm, f"group_norm.{number}")
        spelling.write()
        graph.initializer.extend(spelling.constants)
        place = list(graph.node).index(norm.last)
        graph.node.remove(norm.last)
        for node in reversed(spelling.nodes):
            graph.node.insert(place, node)
    onnx_graph.drop_unused(graph, weights)
    return len(norms)


class _Spelling:
    """The nodes and constants that one group normalisation with SiLU is made of."""

    def __init__(self, norm: _Norm, prefix: str) -> None:
        self._norm, self._prefix = norm, prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def write(self) -> None:
        """Make them, in order."""
        factor, offset = self._scale_and_shift()
        in_channels = self._constant("in_channels", np.array([0, -1, 1, 1]))
        factors, offsets = (
            self._add("Reshape", one, in_channels, name=f"{one}.of_channels") for one in (factor, offset)
        )
        wide = self._widened("wide_again")  # rather read twice than kept in fp32
        result = self._add("Add", self._add("Mul", wide, factors, name="scaled"), offsets, name="result")
        result = self._add("Mul", result, self._add("Sigmoid", result, name="gate"), name="silu")
        last, half = self._norm.last, onnx.TensorProto.FLOAT16
        self.nodes.append(onnx.helper.make_node("Cast", [result], last.output, name=last.name, to=half))

    def _scale_and_shift(self) -> tuple[str, str]:
        """What a channel is to be multiplied with, and what is added then: [B,G,C/G,1]."""
        norm, add = self._norm, self._add
        wide = self._widened("wide")
        mean = self._mean("mean", wide)
        squares = self._mean("squares", add("Mul", wide, wide, name="square"))
        difference = add("Sub", squares, add("Mul", mean, mean, name="square_of_mean"), name="difference")
        variance = add("Relu", difference, name="variance")  # rounding may have left less than nothing
        epsilon = self._constant("epsilon", np.array(norm.epsilon, np.float32))
        deviation = add("Sqrt", add("Add", variance, epsilon, name="above_zero"), name="deviation")
        scale, shift = (
            self._constant(name, values.astype(np.float32).reshape(1, norm.groups, -1, 1))
            for name, values in (("scale", norm.scale), ("shift", norm.shift))
        )
        factor = add("Div", scale, deviation, name="factor")
        return factor, add("Sub", shift, add("Mul", mean, factor, name="factor_of_mean"), name="offset")

    def _mean(self, name: str, value: str) -> str:
        """Of each group, [B,G,1,1], by way of its channels."""
        in_groups = self._constant(f"{name}.shape", np.array([0, self._norm.groups, -1, 1]))
        channels = self._add("ReduceMean", value, name=f"{name}_of_channels", axes=[2, 3], keepdims=1)
        grouped = self._add("Reshape", channels, in_groups, name=f"{name}_in_groups")
        return self._add("ReduceMean", grouped, name=name, axes=[2], keepdims=1)

    def _widened(self, name: str) -> str:
        return self._add("Cast", self._norm.source, name=name, to=onnx.TensorProto.FLOAT)

    def _constant(self, name: str, values: Array) -> str:
        self.constants.append(numpy_helper.from_array(values, f"{self._prefix}.{name}"))
        return self.constants[-1].name

    def _add(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        output = name if name.startswith(self._prefix) else f"{self._prefix}.{name}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output


def _constants(graph: onnx.GraphProto, weights: Weights) -> dict[str, Array]:
    """The values of all constants that may be a scale, a shift or a shape."""
    values: dict[str, Array] = {}
    for tensor in graph.initializer:
        if tensor.name in weights and math.prod(tensor.dims) == max(tensor.dims):  # a vector, of whatever rank
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values[tensor.name] = weights[tensor.name].view(dtype)
        elif tensor.name not in weights:
            values[tensor.name] = numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return values


def _find(graph: onnx.GraphProto, constants: Mapping[str, Array]) -> list[_Norm]:
    producers, takers = onnx_graph.makers_of(graph), onnx_graph.takers_of(graph)
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    found = (_match(node, producers, takers, constants) for node in norms)
    return [norm for norm in found if norm is not None]


def _match(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    takers: Mapping[str, list[onnx.NodeProto]],
    constants: Mapping[str, Array],
) -> _Norm | None:
    """The group normalisation around an instance normalisation, as PyTorch's TorchScript exporter writes it."""
    split = producers.get(node.input[0])
    groups = _groups(split, constants) if split is not None and split.op_type == "Reshape" else None
    if split is None or groups is None:
        return None
    chain = [node]
    for operator in ("Reshape", "Mul", "Add"):
        after = takers[chain[-1].output[0]]
        if len(after) != 1 or after[0].op_type != operator:
            return None
        chain.append(after[0])
    scale, shift = (_other(one, before, constants) for before, one in pairwise(chain[1:]))
    if scale is None or shift is None or scale.size != shift.size or scale.size % groups:
        return None
    last, swish = _silu(chain[-1], takers)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    return _Norm(split.input[0], last, groups, scale.reshape(-1), shift.reshape(-1), epsilon, swish)


def _groups(split: onnx.NodeProto, constants: Mapping[str, Array]) -> int | None:
    """Into how many groups a reshape to [B,G,-1] splits the channels."""
    shape = constants.get(split.input[1])
    return int(shape[1]) if shape is not None and shape.shape == (3,) and shape[1] > 0 else None


def _other(node: onnx.NodeProto, before: onnx.NodeProto, constants: Mapping[str, Array]) -> Array | None:
    """The constant that a node of two inputs takes beside another node's output."""
    names = [name for name in node.input if name != before.output[0]]
    return constants.get(names[0]) if len(names) == 1 else None


def _silu(node: onnx.NodeProto, takers: Mapping[str, list[onnx.NodeProto]]) -> tuple[onnx.NodeProto, bool]:
    """The node that ends a SiLU of a node's output, and True; the node itself where there is none."""
    value = node.output[0]
    kinds = {taker.op_type: taker for taker in takers[value]}
    if len(takers[value]) == 2 and kinds.keys() == {"Sigmoid", "Mul"}:
        product, gate = kinds["Mul"], kinds["Sigmoid"].output[0]
        if set(product.input) == {value, gate} and len(takers[gate]) == 1:
            return product, True
    return node, False

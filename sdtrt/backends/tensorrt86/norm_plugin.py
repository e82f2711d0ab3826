"""Group normalisations as TensorRT 8.6's own plugin for them, which works in the layout of its convolutions.

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

from sdtrt.exports import onnx_index, onnx_simplify
from sdtrt.exports.onnx_file import Weights

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
    """One group normalisation of a graph: what it takes, and the node whose output the plugin's is to be."""

    source: str
    last: onnx.NodeProto
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
    norms = _find(model.graph, _constants(model.graph, weights))
    for number, norm in enumerate(norms):
        names = [f"group_norm.{number}.{kind}" for kind in ("scale", "shift")]
        for name, values in zip(names, (norm.scale, norm.shift), strict=True):
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        attributes: dict[str, Any] = {"epsilon": norm.epsilon, "bSwish": int(norm.swish), "plugin_version": "1"}
        inputs = [norm.source, *names]
        norm.last.CopyFrom(onnx.helper.make_node(OPERATOR, inputs, norm.last.output, name=norm.last.name, **attributes))
    onnx_simplify.drop_unused(model.graph, weights)
    return len(norms)


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
    producers, takers = onnx_index.makers_of(graph), onnx_index.takers_of(graph)
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    found = (_match(node, producers, takers, constants) for node in norms)
    return [norm for norm in found if norm is not None and serves(norm.scale.size)]


def _match(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    takers: Mapping[str, list[onnx.NodeProto]],
    constants: Mapping[str, Array],
) -> _Norm | None:
    """The group normalisation around an instance normalisation, as PyTorch's TorchScript exporter writes it."""
    split = producers.get(node.input[0])
    if split is None or split.op_type != "Reshape" or _groups(split, constants) != GROUPS:
        return None
    chain = [node]
    for operator in ("Reshape", "Mul", "Add"):
        after = takers[chain[-1].output[0]]
        if len(after) != 1 or after[0].op_type != operator:
            return None
        chain.append(after[0])
    scale, shift = (_other(one, before, constants) for before, one in pairwise(chain[1:]))
    if scale is None or shift is None or scale.size != shift.size:
        return None
    last, swish = _silu(chain[-1], takers)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    return _Norm(split.input[0], last, scale.reshape(-1), shift.reshape(-1), epsilon, swish)


def _groups(split: onnx.NodeProto, constants: Mapping[str, Array]) -> int | None:
    """Into how many groups a reshape to [B,G,-1] splits the channels."""
    shape = constants.get(split.input[1])
    return int(shape[1]) if shape is not None and shape.shape == (3,) else None


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

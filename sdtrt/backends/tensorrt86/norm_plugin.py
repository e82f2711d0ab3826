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
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sdtrt.backends.tensorrt86.group_norms import SpelledNorm, find_spelled
from sdtrt.exports import onnx_simplify
from sdtrt.exports.onnx_file import Weights
from sdtrt.exports.onnx_index import GraphIndex

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
    norms = _find(GraphIndex(model, weights), weights)
    for number, norm in enumerate(norms):
        names = [f"group_norm.{number}.{kind}" for kind in ("scale", "shift")]
        for name, values in zip(names, (norm.scale, norm.shift), strict=True):
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        attributes: dict[str, Any] = {"epsilon": norm.epsilon, "bSwish": int(norm.swish), "plugin_version": "1"}
        inputs = [norm.source, *names]
        norm.last.CopyFrom(onnx.helper.make_node(OPERATOR, inputs, norm.last.output, name=norm.last.name, **attributes))
    onnx_simplify.drop_unused(model.graph, weights)
    return len(norms)


def _find(facts: GraphIndex, weights: Weights) -> list[_Norm]:
    """The group normalisations that the plugin serves."""
    found = (_match(facts, weights, one) for one in find_spelled(facts) if one.groups == GROUPS)
    return [norm for norm in found if norm is not None and serves(norm.scale.size)]


def _match(facts: GraphIndex, weights: Weights, spelled: SpelledNorm) -> _Norm | None:
    """A group normalisation with the scale and the shift that come after it, and SiLU where that does."""
    scaled = facts.only_taker(spelled.result, "Mul")
    shifted = None if scaled is None else facts.only_taker(scaled.output[0], "Add")
    if scaled is None or shifted is None:
        return None
    scale = _other(facts, weights, scaled, spelled.result)
    shift = _other(facts, weights, shifted, scaled.output[0])
    if scale is None or shift is None or scale.size != shift.size:
        return None
    last, swish = _silu(facts, shifted)
    return _Norm(spelled.source, last, scale.reshape(-1), shift.reshape(-1), spelled.epsilon, swish)


def _other(facts: GraphIndex, weights: Weights, node: onnx.NodeProto, before: str) -> Array | None:
    """The constant that a node of two inputs takes beside another node's output; None where that is no vector."""
    names = [name for name in node.input if name != before]
    if len(names) != 1 or names[0] not in weights:
        return facts.values.get(names[0]) if len(names) == 1 else None
    dims = [dim or 0 for dim in facts.dims[names[0]]]
    if math.prod(dims) != max(dims):  # a vector may be of any rank
        return None
    return weights[names[0]].view(onnx.helper.tensor_dtype_to_np_dtype(facts.types[names[0]]))


def _silu(facts: GraphIndex, node: onnx.NodeProto) -> tuple[onnx.NodeProto, bool]:
    """The node that ends a SiLU of a node's output, and True; the node itself where there is none."""
    value = node.output[0]
    kinds = {taker.op_type: taker for taker in facts.takers[value]}
    if len(facts.takers[value]) == 2 and kinds.keys() == {"Sigmoid", "Mul"}:
        product, gate = kinds["Mul"], kinds["Sigmoid"].output[0]
        if set(product.input) == {value, gate} and len(facts.takers[gate]) == 1:
            return product, True
    return node, False

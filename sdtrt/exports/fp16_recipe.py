"""Which layers of an fp16 UNet are computed in fp32 because fp16 loses too much there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

# How many layers (resnet and attention), counted back from the output, of an fp16 UNet compute their convolutions in
# fp32, together with those whose results they read through skip connections (see `wide_convolutions`).
#
# PyTorch's fp16 convolutions add up in fp32. TensorRT 8.6's only ones add up in fp16: measured on an H200, a 3x3
# convolution of 1280 channels is then off by 3.8e-3 instead of 3e-4 (relative L2), as sqrt(additions) foretells. In
# fp32 such a layer runs on tensor cores as TF32, which holds every fp16 number exactly: as right as PyTorch's fp16, in
# 1.7 times the time. Near the output it counts most, for no later layer averages the error away; the more so, the
# larger a model's activations are. What each number gains and costs is in `benchmarks/fidelity.md`.
WIDE_LAYERS = 2

# Convolutions of at most so many channels are all in fp32: they are over before the GPU has the next one. Stable
# Diffusion's begin at 320 channels; a small model averages less away, and needs it.
NARROW_CHANNELS = 256


def wide_convolutions(unet: torch.nn.Module, layers: int = WIDE_LAYERS) -> dict[str, torch.nn.Conv2d]:
    """Name → module of the convolutions of an fp16 UNet that compute in fp32 in its export; none of another module.

    All that are so narrow that it takes no longer: a small UNet's. Of a larger one the first and the last, those of
    the last `layers` layers on the way up, and on the way down those whose error reaches them through the most skip
    connections: downsamplers, and the first layer of each block. Upsamplers are left out: in the time of one,
    several others can be in fp32, which gain more.
    """
    if not isinstance(unet, UNet2DConditionModel) or layers == 0:
        return {}
    wide = ("conv_in", "conv_out", *_last_layers(unet, layers), *_skipped_to(unet, layers))
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.weight.dtype == torch.float16
        if name.startswith(wide) or max(module.in_channels, module.out_channels) <= NARROW_CHANNELS
    }


def _layer(side: str, block: int, index: int) -> tuple[str, str]:
    """How the names of a layer's modules begin."""
    return f"{side}_blocks.{block}.resnets.{index}.", f"{side}_blocks.{block}.attentions.{index}."


def _last_layers(unet: Any, layers: int) -> Iterator[str]:
    """How the names of the last layers' modules begin."""
    ups = [(block, index) for block, up in enumerate(unet.up_blocks) for index in range(len(up.resnets))]
    for block, index in ups[-layers:]:
        yield from _layer("up", block, index)


def _skipped_to(unet: Any, layers: int) -> Iterator[str]:
    """How the names of those modules begin that write what the last layers read, but for a block's later layers."""
    sources: list[tuple[str, ...]] = [()]  # conv_in comes first
    for block, down in enumerate(unet.down_blocks):
        sources += [_layer("down", block, index) if index == 0 else () for index in range(len(down.resnets))]
        sources += [(f"down_blocks.{block}.downsamplers.",)] if down.downsamplers else []
    for names in sources[:layers]:
        yield from names


def convolve_in_fp32(convolution: torch.nn.Conv2d, hidden_states: Tensor) -> Tensor:
    """`Conv2d.forward` with fp32 arithmetic on half-precision weights and states."""
    bias = None if convolution.bias is None else convolution.bias.float()
    wide: Tensor = convolution._conv_forward(hidden_states.float(), convolution.weight.float(), bias)
    return wide.to(hidden_states.dtype)

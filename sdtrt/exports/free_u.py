"""A UNet with FreeU (https://arxiv.org/abs/2309.11497), as an exporter may trace it: its four numbers are an input.

diffusers filters skip connections by a Fourier transform, which no engine has. What it scales are the lowest
frequencies, 0 and -1 of both axes: four coefficients, which two products with sines and cosines give and put back.
Knows diffusers' UNets. Knows no contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdtrt.exports.attributes import attribute
from sdtrt.specs.groups import residual_shapes

STAGES = 2  # the blocks on the way up that FreeU is for


class FreeUCall(torch.nn.Module):
    """A call of a UNet whose contract has FreeU's numbers as its last input.

    Args:
        inner: takes the contract's other inputs, in its order.
        unet: what it calls.
        as_diffusers: compute by diffusers' own code, which can't be traced.
    """

    def __init__(self, inner: torch.nn.Module, unet: Any, *, as_diffusers: bool) -> None:
        super().__init__()
        self.unet = unet
        self._inner = (inner,)  # no submodule: the UNet's tensors have one name each
        self._as_diffusers = as_diffusers

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the inner call takes, and s1, s2, b1, b2 [4] → out_sample."""
        *usual, numbers = inputs
        with ExitStack() as stack:
            if self._as_diffusers:
                for block in self.unet.up_blocks:
                    for name, number in zip(("s1", "s2", "b1", "b2"), numbers, strict=True):
                        stack.enter_context(attribute(block, name, float(number)))
            else:
                for resnet, stage, width in _resnets(self.unet):
                    forward = partial(_run, resnet.forward, width, numbers[stage], numbers[STAGES + stage])
                    stack.enter_context(attribute(resnet, "forward", forward))
            output: Tensor = self._inner[0].forward(*usual)
            return output


def _resnets(unet: Any) -> Iterator[tuple[Any, int, int]]:
    """The layers that get skip connections, of the blocks that FreeU is for: the block's number from 0, and how many
    of a layer's channels come from the block itself, which are the first ones."""
    skips = [channels for channels, _ in residual_shapes(unet.config)[:-1]]
    for stage, block in enumerate(unet.up_blocks[:STAGES]):
        for resnet in block.resnets:
            yield resnet, stage, resnet.in_channels - skips.pop()


def _run(
    forward: Callable[..., Tensor], width: int, skip_scale: Tensor, scale: Tensor, states: Tensor, *args: Any
) -> Tensor:
    """A layer's call: half of the block's own channels count more, and the skip connection's low frequencies less."""
    half = width // 2
    raised, kept, skip = states[:, :half], states[:, half:width], states[:, width:]
    parts = (raised * scale.to(states.dtype), kept, _filtered(skip, skip_scale))
    return forward(torch.cat(parts, dim=1), *args)


def _filtered(states: Tensor, scale: Tensor) -> Tensor:
    """`states` [B,C,H,W] with the lowest frequencies scaled, as diffusers' `fourier_filter` does with threshold 1."""
    wide = states.float()
    waves = _waves(wide)
    found = wide.flatten(2) @ waves.transpose(0, 1) @ waves
    lowest = found.reshape(wide.shape) / (wide.shape[-2] * wide.shape[-1])
    return (wide + (scale - 1) * lowest).to(states.dtype)


def _waves(states: Tensor) -> Tensor:
    """The waves [7,H·W] of the frequencies 0 and -1 of both axes. An axis of one number has the frequency 0 alone."""
    height, width = states.shape[-2:]
    rows = torch.arange(height, dtype=torch.float32, device=states.device)
    columns = torch.arange(width, dtype=torch.float32, device=states.device)
    down, across = (2 * math.pi * rows / height)[:, None], (2 * math.pi * columns / width)[None, :]
    has_rows, has_columns = rows[-1:, None].clamp(max=1), columns[None, -1:].clamp(max=1)
    flat = torch.ones_like(down) * torch.ones_like(across)
    angles = ((down * flat, has_rows), (across * flat, has_columns), (down + across, has_rows * has_columns))
    waves = [flat]
    for angle, is_there in angles:
        waves += [torch.cos(angle) * is_there, torch.sin(angle) * is_there]
    return torch.stack(waves).flatten(1)

"""A VAE in fp16 whose activations would leave fp16: it computes with its residual stream divided by a constant.

Each branch of an `AutoencoderKL` begins with a group norm, and a group norm of x/s with the epsilon ε/s² is that of x
with ε. So the stream may be x/s, as long as all that is added to it is divided, too; what follows the last norm is as
ever. With a power of two that is exact, but for what becomes too small for fp16. No weight changes, and each keeps its
name: an engine is given the model's own.

Knows diffusers' layers. Knows no compiler, and not which VAEs need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional

from sdtrt.common.errors import ExportError
from sdtrt.exports.attributes import attribute

# fp16 ends at 65504, which SDXL's decoder passes: with this, 4 · 10^6 fit. Where a stream is of size 1 instead, what is
# below 0.004 is rounded by up to 2e-6 at each layer.
SCALE = 64

# What works on normalised values within a branch, or behind the last norm: it stays as it is.
_WITHIN = frozenset({"to_q", "to_k", "to_v", "to_qkv", "conv_out"})


@dataclass
class _Layers:
    """The layers of half a VAE that the stream's scale changes something of.

    Args:
        norms: read the stream, and give values of size 1.
        entering: read such values, and give what is added to the stream.
        along: read the stream, and give what takes its place or is added to it.
    """

    norms: list[Any] = field(default_factory=list)
    entering: list[Any] = field(default_factory=list)
    along: list[Any] = field(default_factory=list)

    def all(self) -> list[torch.nn.Module]:
        """All of them."""
        return [*self.norms, *self.entering, *self.along]


@contextmanager
def scaled_stream(half: torch.nn.Module, scale: float = SCALE) -> Iterator[None]:
    """Have an encoder or a decoder of an `AutoencoderKL` compute with its residual stream divided by `scale`.

    It computes the same function, in every precision that has room for it, until the end of the `with`.

    Args:
        half: `AutoencoderKL.decoder` or `.encoder`.
        scale: a power of two.

    Raises:
        ExportError: where it has layers that this does not know.
    """
    layers = _layers_of(half)
    with ExitStack() as stack:
        for norm in layers.norms:
            stack.enter_context(attribute(norm, "eps", norm.eps / scale**2))
        for layer in layers.entering:
            stack.enter_context(attribute(layer, "forward", partial(_enter, layer, 1 / scale)))
        for layer in layers.along:
            stack.enter_context(attribute(layer, "forward", partial(_pass, layer, 1 / scale)))
        yield


def _layers_of(half: Any) -> _Layers:
    """Find the layers that the scale changes something of. Raises `ExportError` where others have weights, too."""
    found = _Layers(norms=[half.conv_norm_out], entering=[half.conv_in])
    for part in half.modules():
        if isinstance(part, ResnetBlock2D):
            # What conv1 gives, the second norm alone reads: it gets the same room as the stream.
            found.norms += [part.norm1, part.norm2]
            found.entering += [part.conv1, part.conv2]
            found.along += [part.conv_shortcut] if part.conv_shortcut is not None else []
        elif isinstance(part, Attention) and isinstance(part.group_norm, torch.nn.GroupNorm):
            found.norms.append(part.group_norm)
            found.entering.append(part.to_out[0])  # of a product and a dropout
        elif isinstance(part, (Upsample2D, Downsample2D)) and isinstance(part.conv, torch.nn.Conv2d):
            found.along.append(part.conv)
    _check_known(half, found)
    return found


def _check_known(half: torch.nn.Module, found: _Layers) -> None:
    """Raise `ExportError` where a layer with weights is none of those found, and not within a branch."""
    known = {id(layer) for layer in found.all()}
    for name, layer in half.named_modules():
        is_within = name.rpartition(".")[2] in _WITHIN and _is_normalised(half, name)
        if [*layer.parameters(recurse=False)] and id(layer) not in known and not is_within:
            raise ExportError(
                f"the VAE's {name} ({type(layer).__name__}) is of no kind that sdtrt knows how to keep within fp16",
                hint="use --precision fp32 or bf16 for this model",
            )


def _is_normalised(half: torch.nn.Module, name: str) -> bool:
    """Whether what a layer reads went through a norm: the last layer's has, an attention's where it has one."""
    owner = half.get_submodule(name.rpartition(".")[0])
    return owner is half or isinstance(getattr(owner, "group_norm", None), torch.nn.GroupNorm)


def _enter(layer: Any, factor: float, values: Tensor) -> Tensor:
    """A layer's result times `factor`; the product is of its input, or the result would overflow before it."""
    return _weigh(layer, values * factor, factor)


def _pass(layer: Any, factor: float, stream: Tensor) -> Tensor:
    """The result of a layer whose input has been multiplied by `factor` already, times `factor`."""
    return _weigh(layer, stream, factor)


def _weigh(layer: Any, values: Tensor, factor: float) -> Tensor:
    """A convolution or a linear layer whose bias is multiplied by `factor`."""
    bias = None if layer.bias is None else layer.bias * factor
    is_linear = isinstance(layer, torch.nn.Linear)
    weigh: Callable[..., Tensor] = functional.linear if is_linear else layer._conv_forward
    return weigh(values, layer.weight, bias)

"""A live VAE that takes images in tiles, or a batch one by one: diffusers cuts and joins them, an engine computes each.

Knows diffusers' VAEs. Knows no engine: it is given what computes a part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from sdtrt.specs import Component

# What computes a part: of decoding latents `[1,C,h,w]` → image, of encoding an image → moments.
Part = Callable[[torch.Tensor], torch.Tensor]
# By the half: the layer that has its name, the convolution at the latents, which engines have in them, and the method.
_LAYERS = {"vae_decoder": ("decoder", "post_quant_conv", "decode"), "vae_encoder": ("encoder", "quant_conv", "encode")}


def is_in_parts(module: Any, tensor: torch.Tensor) -> bool:
    """Whether a VAE takes a tensor of latents or pixels in parts: `enable_tiling`, `enable_slicing`."""
    return bool(module.use_tiling or (module.use_slicing and tensor.shape[0] > 1))


def in_parts(module: Any, component: Component, part: Part, *args: Any, **kwargs: Any) -> Any:
    """Decode or encode as diffusers' own method does, tiles, borders and all, with something else for each part.

    It runs on a shallow copy of the module, whose half is that. The module stays as it is.
    """
    layer, convolution, method = _LAYERS[component]
    made = copy.copy(module)
    made._modules = {**module._modules, layer: _Half(part), convolution: torch.nn.Identity()}
    return getattr(type(module), method)(made, *args, **kwargs)


def plain_part(given: Any) -> torch.Tensor:
    """The tensor of what a VAE's `decode` or `encode` gives: the image, the moments, a tiny VAE's latents."""
    if hasattr(given, "latent_dist"):
        moments: torch.Tensor = given.latent_dist.parameters
        return moments
    found: torch.Tensor = given.sample if hasattr(given, "sample") else given.latents
    return found


class _Half(torch.nn.Module):
    """Stands in for a VAE's decoder or encoder."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self._part = part

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """One part."""
        return self._part(sample)

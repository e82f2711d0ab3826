"""VAEs in tiles and slices: diffusers' own methods cut a picture up and join it, and something else computes a tile.

Knows neither engines nor files.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from sdtrt.models.source import ModelSource
from sdtrt.specs import SIZE_MULTIPLE, Component, Sizes
from sdtrt.specs.contract import is_tiny_vae

TINY_TILE = 512  # of diffusers' `AutoencoderTiny`, whatever its configuration
DEFAULT_SAMPLE_SIZE = 32  # of `AutoencoderKL`
Compute = Callable[[torch.Tensor], torch.Tensor]
_HALVES = {"vae_decoder": "decoder", "vae_encoder": "encoder"}


def cuts(vae: Any, batch: int) -> bool:
    """Whether diffusers would cut a batch up: into tiles (which small pictures are one of), or into its images."""
    return bool(getattr(vae, "use_tiling", False) or (getattr(vae, "use_slicing", False) and batch > 1))


def in_tiles(vae: Any, component: Component, compute: Compute, *args: Any, **kwargs: Any) -> Any:
    """Decode or encode as diffusers does, but for the computing of a tile.

    Args:
        vae: the module, whose settings count: `use_tiling`, `use_slicing`, `tile_overlap_factor`, ...
        component: which half of it.
        compute: latents → images, or images → moments (a tiny VAE's: latents), with the convolution beside the half.
        args, kwargs: of the module's `decode` or `encode`.
    """
    method = {"vae_decoder": "decode", "vae_encoder": "encode"}[component]
    return getattr(_Cut(vae, _HALVES[component], compute), method)(*args, **kwargs)


class _Cut:
    """A VAE as its class's own methods see it, with another half; the convolution beside it is done there."""

    def __init__(self, vae: Any, half: str, compute: Compute) -> None:
        self._vae = vae
        self.config = types.SimpleNamespace(**{**vae.config, "use_quant_conv": False, "use_post_quant_conv": False})
        self.quant_conv = self.post_quant_conv = None
        setattr(self, half, compute)

    def __getattr__(self, name: str) -> Any:
        """The class's methods are this one's; all else is as the VAE has it."""
        own = getattr(type(self._vae), name, None)
        return types.MethodType(own, self) if isinstance(own, types.FunctionType) else getattr(self._vae, name)


def is_edge(vae: Any, component: Component, sizes: Sizes) -> bool:
    """Whether a picture of that size is what is left at an edge: smaller than a tile."""
    tile = tile_pixels(vae)
    return tile is not None and cuts(vae, 1) and min(sizes.height, sizes.width) < tile


def tile_pixels(vae: Any) -> int | None:
    """A tile's side in pixels; None for a VAE that has no tiles."""
    latent = getattr(vae, "tile_latent_min_size", None)
    return None if latent is None else int(latent) * SIZE_MULTIPLE


def tile_side(model: ModelSource) -> int | None:
    """The side in pixels that diffusers gives the tiles of a model's VAE; None where that is not known."""
    config = model.config("vae")
    if is_tiny_vae(config):
        return TINY_TILE
    size = config.get("sample_size", DEFAULT_SAMPLE_SIZE)
    side = size[0] if isinstance(size, list | tuple) and size else size
    return side if isinstance(side, int) else None


def in_pytorch(vae: Any, component: Component, sample: torch.Tensor) -> torch.Tensor:
    """What the module itself makes of one tile."""
    if component == "vae_decoder":
        convolution = getattr(vae, "post_quant_conv", None)
        image: torch.Tensor = vae.decoder(sample if convolution is None else convolution(sample))
        return image
    encoded: torch.Tensor = vae.encoder(sample)
    convolution = getattr(vae, "quant_conv", None)
    moments: torch.Tensor = encoded if convolution is None else convolution(encoded)
    return moments

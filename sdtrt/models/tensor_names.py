"""The names of a model's tensors: those of its part's `state_dict()`, whichever version of a library names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdtrt.specs import Component

if TYPE_CHECKING:
    import torch

_TEXT_PREFIX = "text_model."  # what transformers puts before a text encoder's names, or not, from version to version

# What a part's tensors begin with that are none of a component's: the other half of a VAE, what is computed anyway.
_OTHERS: dict[Component, tuple[str, ...]] = {
    "vae_decoder": ("encoder.", "quant_conv."),
    "vae_encoder": ("decoder.", "post_quant_conv."),
    "text_encoder": ("embeddings.position_ids",),
    "text_encoder_2": ("embeddings.position_ids",),
}


def own_name(name: str) -> str:
    """A tensor's name without what some versions of its library put before it."""
    return name.removeprefix(_TEXT_PREFIX)


def own_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A part's tensors by those names."""
    return {own_name(name): tensor for name, tensor in tensors.items()}


def other_names(component: Component) -> tuple[str, ...]:
    """What the names begin with of those tensors of a part that a component does without."""
    return _OTHERS.get(component, ())

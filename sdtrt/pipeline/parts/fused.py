"""Projections that diffusers fused (`fuse_qkv_projections`): whether they compute what the layers do that engines have.

Knows diffusers' attentions. Knows no engine.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

FUSED_PROCESSOR = "FusedAttnProcessor2_0"
_PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}  # what diffusers fuses, and of which layers

Places = tuple[tuple[int, int, int], ...]
_SAME: WeakKeyDictionary[torch.nn.Module, Places] = WeakKeyDictionary()  # where the tensors were when they were alike


def is_as_unfused(attention: torch.nn.Module) -> bool:
    """Whether an attention's fused layers have the numbers of those that they were made of.

    All numbers are compared once, and again where a tensor is another one, elsewhere, or was changed in place.
    """
    pairs = [pair for name in _PARTS for pair in _pairs(attention, name)]
    places = tuple((id(one), one.data_ptr(), _version(one)) for fused, parts in pairs for one in (fused, *parts))
    if not pairs:
        return False
    if _SAME.get(attention) != places:
        if not all(_are_alike(fused, parts) for fused, parts in pairs):
            return False
        _SAME[attention] = places
    return True


def _pairs(attention: Any, name: str) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """A fused layer's tensors, each with those that it was made of; none where there is no such layer."""
    fused = getattr(attention, name, None)
    if fused is None:
        return []
    layers = [getattr(attention, part) for part in _PARTS[name]]
    found = [(fused.weight, [layer.weight for layer in layers])]
    return found if fused.bias is None else [*found, (fused.bias, [layer.bias for layer in layers])]


def _are_alike(fused: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether a tensor is others one after the other."""
    with torch.no_grad():
        joined = torch.cat([one.to(fused.device, fused.dtype) for one in parts])
        return torch.equal(fused, joined)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

"""What PyTorch computes between the pieces of an engine, on the current stream; a CUDA graph may be capturing it."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrt.runtime.pieces import Attention, Cut, Normalization

# PyTorch's kernels for attention between pieces, the fastest first (`benchmarks/attention-h200.json`); each serves
# where those before it don't.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# PyTorch's choice of kernels is the process's: threads change it one after the other, or they would restore wrong ones.
_CHOOSING = threading.Lock()


def compute(cut: Cut, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a cut gives, as a new tensor; its sources are among the tensors."""
    return attend(cut, tensors) if isinstance(cut, Attention) else normalize(cut, tensors)


def attend(attention: Attention, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Self-attention in PyTorch's fused kernels, which add up in fp32 and read the heads where they lie.

    Args:
        tensors: the attention's sources among them: `[B,S,C]` each of queries, keys and values, or `[B,S,3C]` of all.

    Returns:
        `[B,S,C]`, contiguous.
    """
    given = [tensors[name] for name in attention.sources]
    parts = given if len(given) == 3 else given[0].chunk(3, dim=-1)
    query, key, value = (part.view(*part.shape[:2], attention.heads, attention.width).transpose(1, 2) for part in parts)
    # A caller's autocast would give another dtype than the plan reads.
    with torch.autocast(query.device.type, enabled=False), _CHOOSING, sdpa_kernel(KERNELS, set_priority=True):
        states = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    return states.transpose(1, 2).flatten(2).contiguous()  # a view, where the kernel writes in its inputs' layout


def normalize(normalization: Normalization, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Group normalisation in PyTorch's kernels, which add up in fp32 and need no copy in fp32 of what they normalise.

    They round means and deviations to the tensor's type, as in PyTorch's own VAE in fp16.

    Args:
        tensors: the source among them, `[B,C,H,W]`.

    Returns:
        `[B,C,H,W]`, contiguous.
    """
    given = tensors[normalization.source]
    with torch.autocast(given.device.type, enabled=False):  # as for attention; it would be fp32
        result = torch.nn.functional.group_norm(given, normalization.groups, eps=normalization.epsilon)
    return result.contiguous()

"""What PyTorch computes between the pieces of an engine, on the current stream; a CUDA graph may be capturing it."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrt.backends.tensorrt86.pieces import Cut, Normalization
from sdtrt.specs.contract import Attention

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
    """Compute one cut.

    Args:
        tensors: the cut's sources by name and, for a normalisation, the buffer that its result is written to.
    """
    if isinstance(cut, Attention):
        return attend(cut, tensors)
    return normalize(cut, tensors[cut.source], tensors[cut.result])


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


def normalize(normalization: Normalization, given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Group normalisation without a copy in fp32 of what is normalised: sums in fp32, rounded once in between.

    The variance is that of what is centred, as a small difference of large sums would lose it; half of what is centred
    is kept, which fits fp16 whatever was given. PyTorch's own has one thread block for each group, of which there are
    32, rounds means and deviations, and makes a new tensor.

    Args:
        given, out: `[B,C,H,W]`, contiguous; the same memory, or apart from each other.

    Returns:
        `out`.
    """
    assert (given.shape, given.dtype) == (out.shape, out.dtype), "PyTorch would resize what it writes to"
    groups, result = (one.view(one.shape[0], normalization.groups, -1) for one in (given, out))
    count = groups.shape[-1]
    with torch.autocast(given.device.type, enabled=False):  # it would make the copy
        mean = groups.sum(-1, keepdim=True, dtype=torch.float32) / count
        torch.add(mean * -0.5, groups, alpha=0.5, out=result)
        quarter = torch.linalg.vector_norm(result, dim=-1, keepdim=True, dtype=torch.float32).square() / count
        result.mul_((quarter + normalization.epsilon / 4).rsqrt())
    return out

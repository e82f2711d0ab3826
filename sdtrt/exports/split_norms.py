"""Group norms whose statistics are taken in two stages, for layouts with channels last.

There a group's values lie in pieces of a few channels, one piece a pixel; a compiler that sums a group up in one go
reads memory in those pieces, which on a GPU is slow. First each channel of each line of pixels has its own mean and
variance, for which memory is read as it lies; then those few numbers are joined: the variance of all is the mean of the
variances, plus the variance of the means (Chan et al., "Algorithms for computing the sample variance", 1983, for parts
of one size).

Knows PyTorch's `GroupNorm`. Knows no model and no compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sdtrt.exports.attributes import attribute


@contextmanager
def split_norms(module: torch.nn.Module) -> Iterator[None]:
    """Have all group norms of a module compute in two stages, until the end of the `with`."""
    with ExitStack() as stack:
        for part in module.modules():
            if type(part) is torch.nn.GroupNorm:
                stack.enter_context(attribute(part, "forward", partial(_normalise, part)))
        yield


def _normalise(norm: torch.nn.GroupNorm, values: Tensor) -> Tensor:
    """The norm of `[N,C,H,W]`, in fp32 within; of other shapes as PyTorch has it."""
    if values.ndim != 4:
        return functional.group_norm(values, norm.num_groups, norm.weight, norm.bias, norm.eps)
    pixels = values.permute(0, 2, 3, 1).float()  # [N,H,W,C], which is how they lie in memory
    mean, factor = (_per_channel(one, pixels.shape[-1]) for one in _statistics(pixels, norm))
    result = (pixels - mean) * factor
    if norm.weight is not None:
        result = result * norm.weight.float() + norm.bias.float()
    return result.to(values.dtype).permute(0, 3, 1, 2)


def _statistics(pixels: Tensor, norm: torch.nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean, and one over the deviation, of each group of `[N,H,W,C]`: `[N,G]` each."""
    variances, means = torch.var_mean(pixels, dim=2, correction=0)  # of lines, [N,H,C]
    variances, means = (one.unflatten(2, (norm.num_groups, -1)) for one in (variances, means))  # [N,H,G,C/G]
    variance = variances.mean((1, 3)) + means.var((1, 3), correction=0)
    return means.mean((1, 3)), torch.rsqrt(variance + norm.eps)


def _per_channel(groups: Tensor, channels: int) -> Tensor:
    """`[N,G]` → `[N,1,1,C]`."""
    return groups.unsqueeze(2).expand(-1, -1, channels // groups.shape[1]).reshape(-1, 1, 1, channels)

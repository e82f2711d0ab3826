"""Linear layers in 8 bits: which of a module's they are, and what they compute.

A row of weights (of one output) and a row of inputs (of one token) each have a scale of their own: the largest of the
row is the largest number that 8 bits have. Inputs are scaled anew at each call, so that nothing has to be calibrated.
Knows layers by their names alone. Knows no compiler, and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 1e-12  # that a row is scaled by: one of zeros stays one of zeros

SCALES = "_scale"  # after a weight's name: the scales of its rows
WITHIN = ".attentions."  # transformers have their linear layers there; those of timesteps are elsewhere
BESIDE = ".processor."  # projections of IP-Adapters: of a few tokens
MULTIPLE = 16  # of the numbers in a row, which GPUs' products of 8 bits ask for
FEW_ROWS = 16  # up to which `torch._int_mm` has no product on a GPU


def quantised_rows(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits.

    Args:
        numbers: `[rows, columns]`, of any floating dtype.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.

    Returns:
        The rounded numbers, and what each row of them is to be multiplied by: float32 `[rows, 1]`, which is not finite
        where the row is not.
    """
    wide = numbers.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST[dtype]
    scaled = wide / scales
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


class QuantisedLinear(torch.nn.Module):
    """A linear layer whose product is one of 8 bits. PyTorch's own operators compute it, which every compiler knows.

    Args:
        linear: whose place it takes; its bias is kept as it is.
        dtype: as of `quantised_rows`.
    """

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        rows, scales = quantised_rows(linear.weight.detach(), dtype)
        self.register_buffer("weight", rows)
        self.register_buffer(f"weight{SCALES}", scales)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """States of any shape, `[..., inputs]` → `[..., outputs]`, in their own dtype."""
        rows = states.reshape(-1, states.shape[-1])
        product = self._widened(rows) if self._are_few(rows) else self._product(rows)
        result = (product if self.bias is None else product + self.bias).to(states.dtype)
        return result.reshape(*states.shape[:-1], result.shape[-1])

    def _product(self, rows: Tensor) -> Tensor:
        weight, of_weight = self._stored()
        narrow, of_rows = quantised_rows(rows, weight.dtype)
        if weight.dtype == torch.int8:
            return torch._int_mm(narrow, weight.t()).float() * of_rows * of_weight.t()
        # Row by row, PyTorch gives this in bf16 alone. GPUs that add with fewer bits are faster, and 8 bits have fewer.
        scales = (of_rows, of_weight.t())
        return torch._scaled_mm(narrow, weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=rows.is_cuda)

    def _are_few(self, rows: Tensor) -> bool:
        """Whether there are too few rows for a product of 8 bits; a range of sizes is taken to begin beyond them."""
        count, of_int8 = rows.shape[0], self._stored()[0].dtype == torch.int8
        return rows.is_cuda and of_int8 and isinstance(count, int) and count <= FEW_ROWS

    def _widened(self, rows: Tensor) -> Tensor:
        """The product with the rounded weights in the states' own dtype."""
        weight, of_weight = self._stored()
        return torch.nn.functional.linear(rows, (weight.float() * of_weight).to(rows.dtype))

    def _stored(self) -> tuple[Tensor, Tensor]:
        """The weight's numbers, and the scales of its rows."""
        return self.get_buffer("weight"), self.get_buffer(f"weight{SCALES}")


def layers_to_quantise(module: torch.nn.Module, kept: Sequence[str] = ()) -> list[str]:
    """The names of a module's linear layers that are to compute in 8 bits.

    Args:
        kept: patterns of the names of those that are not (`*.attn2.to_kv`).
    """
    return [
        name
        for name, layer in module.named_modules()
        if type(layer) is torch.nn.Linear
        and WITHIN in f".{name}"
        and BESIDE not in name
        and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
        and not any(fnmatch(name, pattern) for pattern in kept)
    ]


def quantise(module: torch.nn.Module, names: Sequence[str], kind: str) -> None:
    """Put layers of 8 bits in the place of linear ones, by their names. The module is changed for good."""
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = module.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        setattr(module.get_submodule(parent), own, QuantisedLinear(layer, DTYPES[kind]))

"""What a component computes in PyTorch: what engines and graphs are held against. Knows neither of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdtrt.exports.tracing import reference
from sdtrt.specs.contract import BATCH, Contract

ROWS_AT_ONCE = 2

Tensors = Mapping[str, torch.Tensor]


def computed(module: torch.nn.Module, contract: Contract, feeds: Tensors) -> dict[str, torch.Tensor]:
    """A module's own outputs by the contract's names, on the CPU, computed where the module is, a few rows at a time.

    Args:
        feeds: the contract's inputs, in its order; numbers with a fraction are widened for a module in fp32.
    """
    call, first = reference(module, contract), next(module.parameters())
    found = []
    with torch.inference_mode():
        for part in _by_rows(feeds, contract):
            outputs = call(*(_fitting(one, first) for one in part.values()))
            found.append((outputs,) if isinstance(outputs, torch.Tensor) else outputs)
        joined = [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]
    return {spec.name: tensor for spec, tensor in zip(contract.outputs, joined, strict=True)}


def _by_rows(feeds: Tensors, contract: Contract) -> list[Tensors]:
    """Inputs in parts of a few rows, which need less memory, and which PyTorch computes rightly.

    A UNet of SDXL's in fp32 does not: at 1024x1024, 8 rows at once are 6 to 11 % off what they are in twos
    (`benchmarks/rows_at_once.py`), while fp16 agrees with the latter.
    """
    whole = {spec.name for spec in contract.inputs if BATCH not in spec.dims}
    rows = max(len(tensor) for name, tensor in feeds.items() if name not in whole)
    return [
        {name: tensor if name in whole else tensor[first : first + ROWS_AT_ONCE] for name, tensor in feeds.items()}
        for first in range(0, rows, ROWS_AT_ONCE)
    ]


def _fitting(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An input where a parameter is, in fp32 if that is; whole numbers stay as they are."""
    widens = like.dtype == torch.float32 and tensor.is_floating_point()
    return (tensor.float() if widens else tensor).to(like.device)

"""The residuals that ControlNets and T2I-Adapters give a UNet, as its engine takes them. Knows contracts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdtrt.common.errors import EngineError
from sdtrt.specs import SIZE_MULTIPLE, Sizes
from sdtrt.specs.contract import Contract
from sdtrt.specs.groups import ADAPTER_RESIDUAL, MID_RESIDUAL, adapter_names, residual_names


def residual_feeds(
    contract: Contract, sample: torch.Tensor, down: Sequence[torch.Tensor] | None, middle: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """An engine's inputs for residuals, by name; zeros where a call has none, which add nothing.

    Args:
        contract: the engine's.
        sample: the latents `[B,C,H,W]` of the call.
        down: of the skip connections, in their order. Some ControlNets pool theirs to `[B,C,1,1]`: they are widened.
        middle: of the middle block; given with `down`, or neither.

    Raises:
        EngineError: for residuals of another number or shape.
    """
    names = residual_names(contract)
    wanted = _shapes(contract, sample)
    if down is None or middle is None:
        return {name: sample.new_zeros(wanted[name]) for name in names}
    given = [*down, middle]
    if len(given) != len(names):
        raise EngineError(
            f"the unet takes {len(names) - 1} residuals of a ControlNet beside the middle block's, got {len(down)}",
            hint="use a ControlNet for this model (SD 1.x, 2.x and XL have ones of their own)",
        )
    return {name: _widened(name, tensor, wanted[name]) for name, tensor in zip(names, given, strict=True)}


def adapter_feeds(
    contract: Contract, sample: torch.Tensor, given: Sequence[torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """An engine's inputs for what T2I-Adapters give, by name; zeros where a call has none, which add nothing.

    As in diffusers, blocks beyond what is given get nothing, and the middle block takes a tensor of its own shape only.

    Args:
        contract: the engine's.
        sample: the latents `[B,C,H,W]` of the call.
        given: of the blocks, in their order. The list is left as it is.

    Raises:
        EngineError: for tensors of another shape.
    """
    wanted, tensors = _shapes(contract, sample), list(given or ())
    *blocks, middle = names = adapter_names(contract) or ("",)
    feeds = {name: _widened(name, tensor, wanted[name]) for name, tensor in zip(blocks, tensors, strict=False)}
    if blocks and len(tensors) > len(blocks) and tuple(tensors[len(blocks)].shape) == wanted[middle]:
        feeds[middle] = tensors[len(blocks)]
    return feeds | {name: sample.new_zeros(wanted[name]) for name in names if name and name not in feeds}


def _shapes(contract: Contract, sample: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each input beside latents of a size."""
    rows, _, height, width = sample.shape
    return contract.input_shapes(Sizes(rows, SIZE_MULTIPLE * height, SIZE_MULTIPLE * width))


def _widened(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A residual at its full size. Raises `EngineError` where it is of another."""
    fits = tensor.ndim == len(shape) and all(own in (1, size) for own, size in zip(tensor.shape, shape, strict=True))
    if not fits or (tensor.shape[1] != shape[1]):
        place = "block" if name.startswith(ADAPTER_RESIDUAL) else "skip connection"
        which = "the middle block" if name == MID_RESIDUAL else f"the {place} {int(name[-2:])}"
        raise EngineError(
            f"the residual of {which} must have the shape {list(shape)}, got {list(tensor.shape)}",
            hint="use a ControlNet or T2I-Adapter for this model (SD 1.x, 2.x and XL have ones of their own)",
        )
    return tensor.expand(shape)

"""FreeU on a live UNet: the four numbers that diffusers leaves on its blocks, as an input of the UNet's engine.

Knows a UNet's blocks and a call's arguments. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdtrt.common.errors import EngineError
from sdtrt.pipeline.parts.image_prompts import ADDED, BEFORE_ADDED, NAMES
from sdtrt.specs import Group
from sdtrt.specs.groups import FREE_U

_NUMBERS = ("s1", "s2", "b1", "b2")
_STAGES = 2  # the blocks on the way up that it is for


def free_u_of(unet: Any) -> tuple[float, ...] | None:
    """FreeU's s1, s2, b1 and b2; None where it is switched off, or none of the UNet's blocks has it.

    A block has it where all four are there and none is 0, as in diffusers. One that has not counts as by ones.

    Raises:
        EngineError: for what is no number.
    """
    blocks = list(getattr(unet, "up_blocks", ()))[:_STAGES]
    found = [tuple(getattr(block, name, None) for name in _NUMBERS) for block in blocks]
    given = [numbers if all(numbers) else None for numbers in found]
    if not any(given):
        return None
    first, second = ([*given, None][at] or (1.0,) * len(_NUMBERS) for at in range(_STAGES))
    chosen = (first[0], second[1], first[2], second[3])
    if odd := [one for one in chosen if not isinstance(one, (int, float))]:
        raise EngineError(
            f"the unet has FreeU with {odd[0]!r}, which is no number",
            hint="pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), or pipe.disable_freeu()",
        )
    return tuple(map(float, chosen))  # type: ignore[arg-type]  # they are numbers by now


def groups_of(unet: Any) -> tuple[Group, ...]:
    """The group of inputs that a UNet needs for FreeU; none where it is off."""
    return () if free_u_of(unet) is None else (FREE_U,)


class FreeU:
    """FreeU of a UNet's calls.

    Args:
        unet: gives it; None where it is gone.
    """

    def __init__(self, unet: Callable[[], torch.nn.Module | None]) -> None:
        self._unet = unet
        self._last: tuple[Any, torch.Tensor] | None = None

    def take(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Group, ...], tuple[Any, ...], dict[str, Any]]:
        """The group of inputs that a UNet's call needs, and its arguments with the numbers [4] among the added ones.

        Without FreeU there is no group, and they are as they were.
        """
        numbers = free_u_of(self._unet())
        if numbers is None:
            return (), args, kwargs
        kwargs = {**dict(zip(NAMES, args[BEFORE_ADDED:], strict=False)), **kwargs}
        sample = args[0] if args else kwargs["sample"]
        if self._last is None or self._last[0] != (numbers, sample.device):
            self._last = (numbers, sample.device), torch.tensor(numbers, dtype=torch.float32, device=sample.device)
        added = {**(kwargs.get(ADDED) or {}), FREE_U: self._last[1]}
        return (FREE_U,), args[:BEFORE_ADDED], {**kwargs, ADDED: added}

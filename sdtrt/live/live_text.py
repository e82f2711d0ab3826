"""The text encoder of a live pipeline: an engine's states, and PyTorch's where an engine has none.

Knows a session and the encoder's own `forward`. Knows nothing of where that stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch

from sdtrt.backends.session import Session
from sdtrt.common.errors import NotInEngineError
from sdtrt.pipeline.parts.forwards import EncodedText, TextForward
from sdtrt.specs import Profile


def encodes(
    session: Session[torch.Tensor],
    device: torch.device,
    encoder: ref[torch.nn.Module],
    profiles: Sequence[Profile],
    way_out: str,
) -> Callable[..., EncodedText]:
    """A text encoder's forward, which gives the dtype that the encoder has by then.

    One prompt of several images comes alone: an engine for more rows gets it as often as it needs.
    """

    def forward(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> EncodedText:
        module = encoder()
        assert module is not None
        rows = input_ids.shape[0]
        missing = least_rows(profiles, rows) - rows
        ids = torch.cat([input_ids, input_ids[-1:].expand(missing, -1)]) if missing else input_ids
        encoded = TextForward(session, device, next(module.parameters()).dtype, way_out)(ids, *args, **kwargs)
        return EncodedText({name: tensor[:rows] for name, tensor in encoded.tensors.items()}) if missing else encoded

    return forward


def least_rows(profiles: Sequence[Profile], rows: int) -> int:
    """The fewest rows, from so many up, that an engine of these profiles takes; so many where it takes none."""
    return min((max(rows, one.batch.min) for one in profiles if rows <= one.batch.max), default=rows)


class LiveText:
    """What a text encoder gives: an engine's states, and those of other layers by PyTorch, once they are asked for."""

    def __init__(self, encoded: EncodedText, rest: Callable[[], Any]) -> None:
        self._encoded, self._rest = encoded, functools.cache(rest)

    def __getitem__(self, index: int | str | slice) -> Any:
        try:
            return self._encoded[index]  # type: ignore[index]
        except NotInEngineError:
            return self._rest()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "hidden_states":
            return _LiveStates(self._encoded, self._rest)
        try:
            return getattr(self._encoded, name)
        except NotInEngineError:
            return getattr(self._rest(), name)


class _LiveStates:
    """All layers' states, of which the engine gives the last but one."""

    def __init__(self, encoded: EncodedText, rest: Callable[[], Any]) -> None:
        self._encoded, self._rest = encoded, rest

    def __getitem__(self, index: int) -> Any:
        return self._encoded.hidden_states[-2] if index == -2 else self._rest().hidden_states[index]

    def __len__(self) -> int:
        return len(self._rest().hidden_states)

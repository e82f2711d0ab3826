"""Refuses the methods of a pipeline that need all its weights. Knows no engine, only the names of what they run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from sdtrt.common.errors import EngineError
from sdtrt.specs import Component

AS_A_WHOLE = (
    "save_pretrained",
    "push_to_hub",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
)


def refuse_as_a_whole(pipe: Any, names: Iterable[Component]) -> None:
    """Refuse what diffusers would do to half of a pipeline, or begin and not end, before it does anything.

    A method that refuses needs no `self`, so copies of the pipeline may share it.
    """
    for method in AS_A_WHOLE:
        setattr(pipe, method, _refusal(getattr(type(pipe), method), " and ".join(names)))


def _refusal(method: Callable[..., Any], names: str) -> Callable[..., NoReturn]:
    """A method of a pipeline, by its name and signature, that raises `EngineError`."""

    @functools.wraps(method)
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise EngineError(
            f"{method.__name__} needs the weights of {names}, which engines hold",
            hint="open the pipeline with the backend torch",
        )

    signature = inspect.signature(method)
    own = list(signature.parameters.values())[1:]  # without `self`
    refuse.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return refuse

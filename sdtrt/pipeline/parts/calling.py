"""Which pipeline calls a module: diffusers tells a module nothing of that, and Python's stack does.

A module may be of several pipelines (`from_pipe`), whose rows mean different things. Knows diffusers' pipelines. Knows
no engine and no step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

GUIDED = "do_classifier_free_guidance"  # of most pipelines a property, of one a name in its call


@dataclass(frozen=True)
class Calling:
    """A pipeline that is making pictures.

    Args:
        pipe: diffusers' own object.
        module: where the `__call__` that runs is written; of a subclass with none of its own, its base's.
        is_guided: whether it doubles (or trebles) the rows of a step for classifier-free guidance, by now: a callback
            may turn that off.
    """

    pipe: Any
    module: str
    is_guided: bool


def calling_pipeline() -> Calling | None:
    """The innermost pipeline whose `__call__` has led here; None where somebody calls the module by itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            names = frame.f_locals
            pipe = names.get("self")
            if isinstance(pipe, DiffusionPipeline):
                guided = bool(getattr(pipe, GUIDED, names.get(GUIDED, False)))
                return Calling(pipe, str(frame.f_globals.get("__name__")), guided)
        frame = frame.f_back
    return None

"""The ControlNets of a pipeline: which they are, and whether they fit its UNet. Each may run in an engine.

Knows diffusers' classes and their configurations. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from sdtrt.common.errors import EngineError
from sdtrt.live.t2i_adapters import adapters_of
from sdtrt.models import live
from sdtrt.specs import Group
from sdtrt.specs.groups import control_facts

PART = "controlnet"
IN_PYTORCH = "PyTorch runs it; what it gives are inputs of the unet's engine"


def groups_of(pipe: Any) -> tuple[Group, ...]:
    """The optional groups of inputs that a pipeline gives its UNet."""
    control: tuple[Group, ...] = ("controlnet",) if getattr(pipe, PART, None) is not None else ()
    return (*control, "t2i_adapter") if adapters_of(pipe) else control


def controlnets_of(pipe: Any) -> list[torch.nn.Module]:
    """The ControlNets of a pipeline, of one that has several each; those that `torch.compile` wraps are unwrapped."""
    return [getattr(one, "_orig_mod", one) for one in live.controlnets_of(pipe).values()]


def check_controlnets(name: str, pipe: Any, hint: str) -> None:
    """Refuse ControlNets of other classes, and those for another UNet.

    Args:
        name: of the pipeline.
        hint: what to do with a pipeline that engines don't serve.

    Raises:
        EngineError: naming what does not fit.
    """
    for one in controlnets_of(pipe):
        if not isinstance(one, (ControlNetModel, ControlNetUnionModel)):
            raise EngineError(
                f"{name} has a controlnet that is a {type(one).__name__}, not a ControlNetModel", hint=hint
            )
        config: Any = one.config
        own, wanted = control_facts(config), control_facts(pipe.unet.config)
        if differing := [fact for fact in own if own[fact] != wanted[fact]]:
            fact = differing[0]
            raise EngineError(
                f"the controlnet of {name} is for another model: its {fact} is {own[fact]}, the unet's {wanted[fact]}",
                hint="use a ControlNet for this model (SD 1.x, 2.x and XL have ones of their own)",
            )


def refuse_wanted(pipe: Any, there: Container[str], names: Container[str]) -> None:
    """Refuse an engine of ControlNets that have none.

    Args:
        there: the parts of the pipeline that engines may run.
        names: of the components that are asked for.

    Raises:
        EngineError: where PyTorch alone runs what the pipeline has.
    """
    if PART in names and PART not in there and controlnets_of(pipe):
        raise EngineError(
            f"no engine runs the controlnet of {type(pipe).__name__}: it, or one of several, is a union, compiled or"
            " quantised, or pools its residuals",
            hint="leave controlnet out of components=: PyTorch runs it, beside engines of the other parts",
        )

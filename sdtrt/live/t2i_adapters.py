"""The T2I-Adapters of a pipeline: which they are, and whether they fit its UNet. PyTorch runs them, once a picture.

Knows diffusers' classes and their configurations. Knows no engine.
"""

from __future__ import annotations

from typing import Any

from diffusers import MultiAdapter, T2IAdapter

from sdtrt.common.errors import EngineError
from sdtrt.specs import SIZE_MULTIPLE
from sdtrt.specs.groups import adapter_shapes

PART = "adapter"


def adapters_of(pipe: Any) -> list[Any]:
    """The T2I-Adapters of a pipeline, each of one that has several; none where that part is of another class."""
    found = getattr(pipe, PART, None)
    several = list(found.adapters) if isinstance(found, MultiAdapter) else [found]
    return [one for one in several if isinstance(one, T2IAdapter)]


def check_adapters(name: str, pipe: Any) -> None:
    """Refuse T2I-Adapters for another UNet.

    Args:
        name: of the pipeline.

    Raises:
        EngineError: naming what does not fit.
    """
    wanted = adapter_shapes(pipe.unet.config) if adapters_of(pipe) else []
    for one in adapters_of(pipe):
        own, fitting = list(one.config.channels), [channels for channels, _ in wanted]
        factor = wanted[0][1] * SIZE_MULTIPLE
        facts = {
            "list of channels": (own, fitting[: len(own)]),
            "downscale_factor": (one.config.downscale_factor, factor),
        }
        for fact, (found, expected) in facts.items():
            if found != expected:
                raise EngineError(
                    f"the adapter of {name} is for another model: its {fact} is {found}, where the unet takes"
                    f" {expected}",
                    hint="use a T2I-Adapter for this model (SD 1.x, 2.x and XL have ones of their own)",
                )

"""The T2I-Adapters of a pipeline: which they are, and whether they fit its UNet. PyTorch runs them, once a picture.

Knows diffusers' classes and their configurations. Knows no engine.
"""

from __future__ import annotations

from typing import Any

from diffusers import MultiAdapter, T2IAdapter

from sdtrt.common.errors import EngineError
from sdtrt.specs.groups import adapter_mismatch

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
    for one in adapters_of(pipe):
        if (differing := adapter_mismatch(one.config, pipe.unet.config)) is not None:
            fact, found, expected = differing
            raise EngineError(
                f"the adapter of {name} is for another model: its {fact} is {found}, where the unet takes {expected}",
                hint="use a T2I-Adapter for this model (SD 1.x, 2.x and XL have ones of their own)",
            )

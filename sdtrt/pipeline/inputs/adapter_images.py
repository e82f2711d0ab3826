"""The pictures that T2I-Adapters go by: read, fitted to a size, in colours or grey as an adapter takes them.

Knows pictures and configurations. Knows no adapter's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdtrt.common.console import QUIET, Console
from sdtrt.pipeline.inputs.images import InitImage, read_init_image
from sdtrt.specs import AdapterSpec, GenerateSpec

WHAT = "t2i image"


@dataclass(frozen=True)
class AdapterImage:
    """A T2I-Adapter of a request, and its picture as it was read."""

    spec: AdapterSpec
    picture: InitImage

    def fitted(self, height: int, width: int, config: Mapping[str, Any]) -> Image.Image:
        """The picture at exactly this size; `config` is the adapter's, which says how many channels it takes."""
        fitted = self.picture.fitted(height, width)
        return fitted.convert("L") if config.get("in_channels") == 1 else fitted


def read_adapter_images(spec: GenerateSpec, console: Console = QUIET) -> tuple[AdapterImage, ...]:
    """Read the pictures of a request's T2I-Adapters, as init images are read. Raises `UsageError` for no picture."""
    return tuple(AdapterImage(one, read_init_image(one.image, console, WHAT)) for one in spec.adapters)

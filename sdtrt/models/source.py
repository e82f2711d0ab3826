"""What exports, engines and pipelines ask of a model, whether it lies in files or lives in a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sdtrt.specs import ModelSpec


class ModelSource(Protocol):
    """A model: `resolve.Model` reads files, `live.LiveModel` takes the modules of a pipeline."""

    @property
    def spec(self) -> ModelSpec:
        """Which model it is, by name."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its parts."""

    @property
    def is_sdxl(self) -> bool:
        """Whether its UNet takes SDXL's added conditioning."""

    @property
    def is_editing(self) -> bool:
        """Whether its UNet takes the latents of an image that is to be edited (instruct-pix2pix)."""

    @property
    def pooled_width(self) -> int | None:
        """The width of the pooled text that the UNet takes; None where it takes none."""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the UNet was trained for."""

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part."""

    def check_has(self, *parts: str) -> None:
        """Raise `ModelError` where one of these parts (or none named: any) is missing."""

    def files(self, part: str) -> tuple[Path, ...]:
        """The files that a part is read from; none for a live one."""

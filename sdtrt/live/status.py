"""`status`: what runs each part of a pipeline, and why no engine does where none does.

Knows pipelines as `accelerate` and `load` leave them, and changes nothing of them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from sdtrt.common.errors import SdtrtError
from sdtrt.engines.entry import Entry
from sdtrt.live.accepted import check_pipeline, takes_images, vae_in_pytorch
from sdtrt.live.controlnets import IN_PYTORCH, PART
from sdtrt.live.swap import METHODS, Swapped, swapped_of
from sdtrt.models.components import VAE_HALVES, part_of
from sdtrt.models.live import LiveModel
from sdtrt.pipeline.opening import opened
from sdtrt.pipeline.parts.tiles import tile_pixels
from sdtrt.specs import Component

PYTORCH = "PyTorch"
ONCE = "PyTorch runs it, once for a picture"  # beside a UNet's steps, an engine of it would gain nothing


@dataclass(frozen=True)
class EngineStatus:
    """An engine that is open for a part.

    Args:
        name: of its entry in the engine directory.
        sizes: what calls it serves; `any` for all.
    """

    name: str
    backend: str
    precision: str
    sizes: str


@dataclass(frozen=True)
class PartStatus:
    """What runs a part of a pipeline: engines, or PyTorch, and why that; of a VAE in engines, how it cuts pictures.

    Args:
        is_left: PyTorch runs it although it has engines, for the reason.
    """

    part: str
    engines: tuple[EngineStatus, ...] = ()
    reason: str = ""
    is_left: bool = False

    @property
    def is_in_engine(self) -> bool:
        """Whether engines run it."""
        return bool(self.engines) and not self.is_left


@dataclass(frozen=True)
class Status:
    """What runs each part of a pipeline; `print` shows it as a table."""

    pipeline: str
    parts: tuple[PartStatus, ...]

    def __getitem__(self, part: str) -> PartStatus:
        """A part by its name, `unet`. Raises `KeyError` where there is none."""
        return {one.part: one for one in self.parts}[part]

    def __str__(self) -> str:
        rows = [("part", "runs in", "precision", "sizes", "engine, or why not")]
        for part in self.parts:
            rows += [] if part.is_in_engine else [(part.part, PYTORCH, "", "", part.reason)]
            why = f" ({part.reason})" if part.reason and part.is_in_engine else ""
            rows += [(part.part, one.backend, one.precision, one.sizes, one.name + why) for one in part.engines]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join((self.pipeline, *lines))


def status(pipe: Any) -> Status:
    """Which part of a pipeline runs in which engine, and why the others don't.

    Args:
        pipe: any pipeline: accelerated, opened by `load`, or neither.

    Example:
        >>> print(sdtrt.status(pipe))
    """
    entries = [one.entry for part in swapped_of(pipe).values() for one in part.engines]
    engines: dict[Component, tuple[EngineStatus, ...]] = {}
    for entry in (*entries, *opened.entries(pipe).values()):  # several ControlNets have one each
        component = entry.engine_key.component
        engines[component] = (*engines.get(component, ()), _engine_status(entry))
    parts = [name for name in METHODS if getattr(pipe, part_of(name), None) is not None]
    refusal = "" if engines else _refusal(pipe)
    found = [_part_status(pipe, name, engines.get(name, ()), refusal) for name in parts]
    others = [name for name in getattr(pipe, "components", {}) if name not in {part_of(part) for part in parts}]
    found += [
        PartStatus(name, (), ONCE if name == "image_encoder" else "no engine runs such a part")
        for name in others
        if isinstance(getattr(pipe, name, None), torch.nn.Module)
    ]
    return Status(type(pipe).__name__, tuple(found))


def _tiles(pipe: Any, component: Component) -> str:
    """How a VAE that engines run cuts pictures up; empty where it takes them whole."""
    side = tile_pixels(pipe.vae) if component in VAE_HALVES and getattr(pipe.vae, "use_tiling", False) else None
    return f"in tiles of {side}x{side} pixels; PyTorch has those that no engine fits" if side is not None else ""


def _engine_status(entry: Entry) -> EngineStatus:
    key = entry.engine_key
    sizes = "; ".join(
        f"batch {one.batch.min}-{one.batch.max}, {one.width.min}-{one.width.max} x"
        f" {one.height.min}-{one.height.max} pixels"
        for one in key.profiles
    )
    return EngineStatus(entry.name, key.backend, key.precision, sizes or "any")


def _part_status(pipe: Any, component: Component, engines: tuple[EngineStatus, ...], refusal: str) -> PartStatus:
    if not engines:
        return PartStatus(component, (), _reason(pipe, component, refusal))
    left = next(filter(None, (_why_left(one) for one in swapped_of(pipe).values() if one.component == component)), "")
    return PartStatus(component, engines, left or _tiles(pipe, component), bool(left))


def _reason(pipe: Any, component: Component, refusal: str) -> str:
    """Why PyTorch runs a component that has no engine."""
    if refusal:
        return refusal
    if part_of(component) == "vae" and (why := vae_in_pytorch(LiveModel.of(pipe))):
        return why
    if component == "vae_encoder" and not takes_images(pipe):
        return "this pipeline encodes no images"
    if component == PART and "unet" in swapped_of(pipe):
        return IN_PYTORCH
    return "not among the components of sdtrt.accelerate" if swapped_of(pipe) else "sdtrt.accelerate was not called"


def _why_left(swapped: Swapped) -> str:
    """Why PyTorch runs what has engines; what would be an error at the next call is not looked at."""
    with swapped.settings.lock:
        with contextlib.suppress(SdtrtError):
            swapped.find_left(looks=True)
        return swapped.left.reason


def _refusal(pipe: Any) -> str:
    """Why `accelerate` would refuse a pipeline; empty where it would not."""
    try:
        check_pipeline(pipe)
    except SdtrtError as error:
        return error.message
    return ""

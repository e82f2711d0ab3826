"""A second pass at a larger size: the picture is enlarged, and changed from there, as web UIs' hires fix does it.

Latents are enlarged bilinearly, pixels by Lanczos or by a model that spandrel reads (an extra). Knows no prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, UsageError, first_line
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.components import components_of
from sdtrt.pipeline.opening.open import (
    OpenPipeline,
    checked_scheduler,
    is_lcm,
    load_scheduler,
    open_pipeline,
    reassembled,
)
from sdtrt.pipeline.opening.request import PipelineSpec, check_spec, note_tiles
from sdtrt.pipeline.runs.call import PipelineCall
from sdtrt.specs import LANCZOS, LATENT, Component, GenerateSpec, UpscaleSpec

_TITLES = {LATENT: "Latent", LANCZOS: "Lanczos"}
_SAFE, _PICKLES = (".safetensors",), (".pth", ".pt", ".ckpt")
_HINT = "use --upscaler latent, lanczos, or the .safetensors file of a model that spandrel reads"


@dataclass(frozen=True)
class Upscaler:
    """What enlarges a picture, and the open pipeline of the second pass."""

    opened: OpenPipeline
    spec: UpscaleSpec
    model: Any = None

    def second(self, first: PipelineCall, made: Any) -> PipelineCall:
        """The call of the second pass: the same texts, and noise of the same seeds, as in web UIs."""
        start = self._latents(made) if self.spec.is_latent else self._pictures(made)
        strength = self.spec.strength
        return replace(first, start=start, strength=strength, until=None, after=None, generators=None)

    def _latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the second pass's size, bilinear without antialiasing, as web UIs' `Latent`."""
        sizes, factor = self.opened.spec.sizes, self.opened.spec.model.vae_scale_factor
        size = (sizes.height // factor, sizes.width // factor)
        return torch.nn.functional.interpolate(latents.float(), size, mode="bilinear").to(latents.dtype)

    def _pictures(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures in the second pass's size; a model's, whose factor is its own, are brought to it by Lanczos."""
        sizes = self.opened.spec.sizes
        if self.model is not None:
            pictures = [_by_model(self.model, one, self.opened.spec.device) for one in pictures]
        return [one.resize((sizes.width, sizes.height), Image.Resampling.LANCZOS) for one in pictures]


def title_of(spec: UpscaleSpec) -> str:
    """What web UIs call an upscaler."""
    return _TITLES.get(spec.upscaler, Path(spec.upscaler).stem)


def plan_upscale(spec: GenerateSpec, first: PipelineSpec, console: Console) -> PipelineSpec | None:
    """How the second pass runs: as the first one does, at its own size; None where there is none.

    Raises:
        UsageError: for a size or an upscaler that can't be.
    """
    if spec.upscale is None:
        return None
    height, width = spec.upscale.size(first.sizes.height, first.sizes.width)
    _check_upscaler(spec.upscale, spec.model.allow_pickle)
    planned = replace(
        first,
        sizes=replace(first.sizes, height=height, width=width),
        img2img=True,
        strength=spec.upscale.strength,
        components=without(first, "vae_encoder") if spec.upscale.is_latent else first.components,
    )
    planned = replace(planned, steps=_steps(spec.upscale, planned))
    check_spec(planned)
    checked_scheduler(first)  # what is wrong with that is said of it
    _check_steps(planned)
    if planned.tile != first.tile:
        note_tiles(planned, console)
    return planned


def _steps(spec: UpscaleSpec, planned: PipelineSpec) -> int:
    """The steps of the second pass's schedule; diffusers' pipeline of latent consistency models runs all it has."""
    return spec.steps or planned.steps if is_lcm(planned, load_scheduler(planned)) else spec.schedule(planned.steps)


def _check_steps(planned: PipelineSpec) -> None:
    """Refuse more steps than the scheduler has."""
    try:
        checked_scheduler(planned)
    except UsageError as error:
        hint = "use fewer --upscale-steps, or a higher --upscale-strength"
        raise UsageError(f"second pass: {error.message}", hint=hint) from error


def without(spec: PipelineSpec, component: Component) -> tuple[Component, ...]:
    """The components of a pipeline that engines run, but for one that it does not call."""
    wanted = components_of(spec.model) if spec.components is None else spec.components
    return tuple(name for name in wanted if name != component)


def _check_upscaler(spec: UpscaleSpec, allow_pickle: str | None) -> None:
    """Refuse an upscaler that is no file, that nothing reads here, or that would run code."""
    if spec.upscaler in _TITLES:
        return
    path = Path(spec.upscaler).expanduser()
    if not path.is_file():
        raise UsageError(f"--upscaler {spec.upscaler} is neither latent, lanczos nor a file", hint=_HINT)
    if path.suffix.lower() in _PICKLES and allow_pickle != path.name:
        raise ModelError(
            f"--upscaler {path} is a pickle file: reading it runs its code",
            hint=f"use a .safetensors file, or trust it: --allow-pickle {path.name}",
        )
    if path.suffix.lower() not in (*_SAFE, *_PICKLES):
        raise UsageError(f"--upscaler {path} is no file of a model", hint=_HINT)
    if find_spec("spandrel") is None:
        raise UsageError(
            "models that enlarge pictures need spandrel, which is not installed",
            hint='pip install "sdtrt[upscale]", or use --upscaler latent or lanczos',
        )


@contextmanager
def open_upscaler(
    spec: GenerateSpec,
    planned: PipelineSpec | None,
    model: Any,
    first: OpenPipeline,
    directory: EngineDirectory,
    console: Console,
) -> Iterator[Upscaler | None]:
    """Open a request's second pass, with engines of its size; without engines, it has the first one's modules.

    Args:
        model: of `load_upscaler`.
    """
    if planned is None or spec.upscale is None:
        yield None
        return
    if not planned.has_engines:
        yield Upscaler(reassembled(first, planned), spec.upscale, model)
        return
    with open_pipeline(planned, directory, console, allow_build=spec.allow_build) as opened:
        yield Upscaler(opened, spec.upscale, model)


def load_upscaler(spec: GenerateSpec, planned: PipelineSpec | None) -> Any:
    """The model that enlarges a request's pictures, on its device; None where none does. Raises as of `_load`."""
    if planned is None or spec.upscale is None or spec.upscale.upscaler in _TITLES:
        return None
    return _load(spec.upscale, planned.device)


def _load(spec: UpscaleSpec, device: torch.device) -> Any:
    """A model that enlarges pictures.

    Raises:
        UsageError: where spandrel, or what it needs, can't be imported.
        ModelError: where it reads no such model of that file.
    """
    try:
        import spandrel
    except ImportError as error:
        raise UsageError(
            f"spandrel can't be imported: {first_line(error)}", hint='pip install "sdtrt[upscale]", and what it needs'
        ) from error
    try:
        model = spandrel.ModelLoader(device=device).load_from_file(Path(spec.upscaler).expanduser())
    except Exception as error:  # it tries what each architecture raises
        raise ModelError(f"--upscaler {spec.upscaler} can't be read: {first_line(error)}", hint=_HINT) from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise ModelError(f"--upscaler {spec.upscaler} takes more than a picture in colours", hint=_HINT)
    return model.eval()


def _by_model(model: Any, picture: Image.Image, device: torch.device) -> Image.Image:
    """A picture as a model enlarges it."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].to(device).float() / 255
    with torch.inference_mode():
        made = model(pixels)[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(made.astype(np.uint8))

"""A refiner behind a model: it takes the latents where the model leaves off, and does the last steps.

Source: https://huggingface.co/papers/2211.01324, as diffusers' `denoising_end` and `denoising_start` have it. Knows
neither prompts nor files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sdtrt.common.console import Console
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.models.components import components_of
from sdtrt.models.loading import check_loras
from sdtrt.pipeline.inputs.text_states import plan_texts
from sdtrt.pipeline.opening.open import OpenPipeline, checked_scheduler, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec, check_spec, unet_sizes
from sdtrt.specs import DeepCaching, GenerateSpec


@dataclass(frozen=True)
class Refiner:
    """An open refiner; from `start` of the noise schedule on, it runs."""

    opened: OpenPipeline
    start: float


def plan_refiner(spec: GenerateSpec, base: PipelineSpec, console: Console) -> PipelineSpec | None:
    """How a request's refiner runs beside its model: the same backend, precision, size and scheduler.

    Raises:
        UsageError: where one of the two is no SDXL, or takes other latents.
        ModelError, EngineError: where it can't be had, or can't run.
    """
    if spec.refiner is None:
        return None
    if not base.model.is_sdxl:
        raise UsageError(f"{base.model.name} is no SDXL, whose refiner takes its latents", hint="leave --refiner out")
    model = resolve.resolve_model(spec.refiner.model, console)
    model.check_has()
    if not model.is_sdxl or model.is_inpainting:
        raise UsageError(
            f"--refiner {model.name} is no model of SDXL that changes images",
            hint="as in --refiner stabilityai/stable-diffusion-xl-refiner-1.0",
        )
    check_loras(model)
    if base.model.loras or spec.embeddings:
        what = " and ".join(
            word for word, given in (("LoRAs", base.model.loras), ("embeddings", spec.embeddings)) if given
        )
        console.note(f"{what}: in {base.model.name} alone, not in the refiner")
    text = plan_texts(replace(spec, embeddings=()), model)
    rows = unet_sizes(model, base.images, base.sizes.height, base.sizes.width, guidance=spec.uses_guidance)
    wanted = components_of(model) if base.components is None else base.components
    planned = replace(
        base,
        model=model,
        sizes=replace(rows, tokens=rows.tokens * text.chunks),
        img2img=True,
        inpaint=False,
        edit=False,
        components=tuple(name for name in components_of(model) if name in wanted and name != "vae_encoder"),
        text=text,
        others={},
        adapters=(),
        savings=replace(base.savings, caching=DeepCaching()),  # its few steps are the picture's details
    )
    check_spec(planned)
    checked_scheduler(planned)
    return planned


@contextmanager
def open_refiner(
    spec: GenerateSpec, planned: PipelineSpec | None, directory: EngineDirectory, console: Console
) -> Iterator[Refiner | None]:
    """Open a request's refiner; None where it has none."""
    if planned is None or spec.refiner is None:
        yield None
        return
    with open_pipeline(planned, directory, console, allow_build=spec.allow_build) as opened:
        yield Refiner(opened, spec.refiner.start)

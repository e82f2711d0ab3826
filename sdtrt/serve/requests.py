"""One request for pictures, whichever interface it came by: plain values, checked, and what may share a call with it.

Knows specs and limits. Knows no HTTP and no pipeline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.runs.jobs import Job as Drawn
from sdtrt.serve.beside import Beside
from sdtrt.serve.catalog import Catalog
from sdtrt.specs import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_IMAGE_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    DeepCaching,
    GenerateSpec,
    GuidanceInterval,
    LoraSpec,
    NoiseSpec,
    Savings,
    SizeConditioning,
    find_sigmas,
)
from sdtrt.specs.serve import Limits, ServeSpec

MOST_GUIDANCE = 100.0  # beyond, no model makes anything but noise
MOST_LORAS = 8  # of one request: more is a typo
INIT, MASK = "init_image", "mask"  # what uploads are called, and the files that a worker reads them from


@dataclass(frozen=True)
class PictureRequest:
    """What pictures are to be like; names and defaults are those of `GenerateSpec`.

    Args:
        model: a name of the catalog; None for its first one.
        count: pictures, whose seeds count up from `seed`.
        sigmas: spacing of noise levels, by any of its names.
        loras: names of the catalog, and how much each counts.
        edit: change the init image as the prompt says, by a model for that.
        quality: a preset of what a run leaves out (`exact`, `high`, `balanced`, `fast`); None for nothing.
        savings: what is left out; the preset's, where it says nothing.
        timestep_spacing, prediction_type, zero_snr: as of `NoiseSpec`.
        conditioning: what SDXL is told of the picture's size.
        beside: ControlNets, adapters, a refiner, a second pass.
        uploads: the init image, the mask, and what ControlNets and adapters go by, as files.
    """

    prompt: str
    model: str | None = None
    negative_prompt: str = ""
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    count: int = 1
    scheduler: str | None = None
    sigmas: str | None = None
    strength: float = DEFAULT_STRENGTH
    mask_blur: int = 0
    padding_crop: int | None = None
    clip_skip: int = 0
    prompt_syntax: str = "plain"
    eta: float | None = None
    vae_tiling: bool = False
    edit: bool = False
    image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE_SCALE
    quality: str | None = None
    savings: Savings = Savings()
    timestep_spacing: str | None = None
    prediction_type: str | None = None
    zero_snr: bool | None = None
    conditioning: SizeConditioning = field(default_factory=SizeConditioning)
    loras: tuple[LoraSpec, ...] = ()
    beside: Beside = field(default_factory=Beside)
    uploads: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def check(self, limits: Limits, catalog: Catalog, serve: ServeSpec) -> None:
        """Raise `UsageError` for what no model makes, or this server doesn't. Reads no picture."""
        _check_limit("prompt", max(len(self.prompt), len(self.negative_prompt)), limits.prompt, "characters")
        _check_limit("steps", self.steps, limits.steps, "steps")
        _check_limit("count", self.count, limits.images, "pictures")
        if self.height is not None and self.width is not None:
            _check_limit("size", self.height * self.width, limits.pixels, "pixels")
        for name in ("height", "width"):
            _check_limit(name, getattr(self, name) or 0, limits.pixels // 8, "pixels")
        if self.guidance_scale > MOST_GUIDANCE:
            raise UsageError(
                f"guidance scale must be at most {MOST_GUIDANCE:g}, got {self.guidance_scale}", hint="use 7.5"
            )
        if len(self.loras) > MOST_LORAS:
            raise UsageError(f"at most {MOST_LORAS} LoRAs are merged at once, got {len(self.loras)}", hint="use fewer")
        if "\0" in self.prompt + self.negative_prompt:
            raise UsageError("a prompt has a character of code 0", hint="take it out")
        self.beside.check(limits, self.height, self.width, self.uploads)
        self.spec(catalog, serve)

    def spec(self, catalog: Catalog, serve: ServeSpec, jobs: tuple[Drawn, ...] = (), batch: int = 1) -> GenerateSpec:
        """The request that the commands would make of it; uploads are files of their names in the working folder."""
        model = self.beside.into(catalog.model(self.model, self.loras), catalog)
        return GenerateSpec(
            prompts=tuple(job.prompt for job in jobs) or (self.prompt,),
            model=model,
            backend=serve.backend,
            precision=serve.precision,
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            seed=self.seed,
            num_images=1 if jobs else self.count,
            batch_size=batch,
            scheduler=self.scheduler,  # type: ignore[arg-type]  # any name: the spec looks for it
            noise=self._noise(),
            init_image=Path(INIT) if INIT in self.uploads else None,
            mask=Path(MASK) if MASK in self.uploads else None,
            strength=self.strength,
            mask_blur=self.mask_blur,
            padding_crop=self.padding_crop,
            clip_skip=self.clip_skip,
            prompt_syntax=self.prompt_syntax,  # type: ignore[arg-type]  # it is checked there
            eta=self.eta,
            vae_tiling=self.vae_tiling,
            edit=self.edit,
            image_guidance_scale=self.image_guidance_scale,
            quality=self.quality,  # type: ignore[arg-type]  # it is checked there
            savings=self.savings,
            conditioning=self.conditioning,
            **self.beside.fields(model, catalog),
        )

    def _noise(self) -> NoiseSpec:
        """What the scheduler is told; a web UI's schedule type may be no more than timesteps."""
        return NoiseSpec(
            prediction_type=self.prediction_type,  # type: ignore[arg-type]  # it is checked there
            timestep_spacing=self.timestep_spacing,  # type: ignore[arg-type]  # it is checked there
            zero_snr=self.zero_snr,
            sigmas=find_sigmas(self.sigmas) if self.sigmas else None,
        )

    @property
    def key(self) -> str:
        """What requests have in common that can share a call: all but the prompts, the seed and the number.

        Those with a negative prompt, and those without one, are no company: SDXL has zeros for none.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.uploads.items()}
        negative = "something" if self.negative_prompt else ""
        common = replace(self, prompt="", negative_prompt=negative, seed=None, count=1, uploads={})
        return json.dumps([common.to_json(), digests], sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the uploads."""
        return asdict(replace(self, uploads={})) | {"uploads": {}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], uploads: Mapping[str, bytes]) -> Self:
        """The inverse of `to_json`."""
        saved, told = data["savings"], data["conditioning"]
        read: dict[str, Any] = {
            "loras": tuple(LoraSpec(**one) for one in data["loras"]),
            "savings": Savings(GuidanceInterval(**saved["guidance"]), DeepCaching(**saved["caching"])),
            "conditioning": SizeConditioning(**{name: pair and tuple(pair) for name, pair in told.items()}),
            "beside": Beside.from_json(data["beside"]),
            "uploads": uploads,
        }
        return cls(**{**data, **read})


def usual_steps(asked: int | None, limits: Limits) -> int:
    """The steps of a request that may name none: the commands' own number, or as many as are allowed."""
    return min(DEFAULT_STEPS, limits.steps) if asked is None else asked


def _check_limit(name: str, value: int, most: int, unit: str) -> None:
    if value > most:
        raise UsageError(f"{name} must be at most {most} {unit} here, got {value}", hint="ask for less")

"""What a job's body may have, in sdtrt's own interface, and the request that it means. Names are those of the commands.

Knows fields and pictures as base64. Knows no route and no job.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdtrt.serve import uploads
from sdtrt.serve.beside import CONTROL, IP_IMAGE, MOST_OF_A_KIND, T2I_IMAGE, Beside, Control, Scaled
from sdtrt.serve.requests import INIT, MASK, MOST_LORAS, PictureRequest, usual_steps
from sdtrt.specs import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_IMAGE_GUIDANCE_SCALE,
    DEFAULT_REFINER_START,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    DEFAULT_UPSCALE_STRENGTH,
    LATENT,
    MAX_SEED,
    GuidanceInterval,
    LoraSpec,
    PredictionType,
    Savings,
    SizeConditioning,
    TimestepSpacing,
    UpscaleSpec,
)
from sdtrt.specs.control import Preprocessor
from sdtrt.specs.presets import QualityName, settle
from sdtrt.specs.savings import CacheSchedule
from sdtrt.specs.serve import Limits

Name = Annotated[str, Field(min_length=1, max_length=256)]
Side = Annotated[int, Field(ge=0, le=2**20)]
Pair = tuple[Side, Side]
IMAGE = "as base64, with or without `data:image/png;base64,`"


class LoraBody(BaseModel):
    """A LoRA of the server's list."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    weight: float = Field(1.0, ge=-100, le=100)


class ControlBody(BaseModel):
    """A ControlNet of the server's list, and the map that it goes by."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    image: str = Field(description=IMAGE)
    scale: float = Field(1.0, ge=-100, le=100)
    start: float = Field(0.0, description="from which part of the steps it counts, 0 to 1")
    end: float = Field(1.0, description="up to which part")
    preprocessor: Preprocessor | None = Field(None, description="canny makes a map of edges, none takes any picture")
    mode: int | None = Field(None, le=1000, description="of a union of ControlNets, which of them")


class AdapterBody(BaseModel):
    """An IP-Adapter or a T2I-Adapter of the server's list, and its picture."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    image: str = Field(description=IMAGE)
    scale: float = Field(1.0, ge=-100, le=100)


class RefinerBody(BaseModel):
    """A refiner of the server's list, for the last steps."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    start: float = Field(DEFAULT_REFINER_START, description="the share of the noise schedule after which it takes over")


class UpscaleBody(BaseModel):
    """A second pass over the picture made larger."""

    model_config = ConfigDict(extra="forbid")
    factor: float = Field(2.0, description="of both sides")
    upscaler: Name = Field(LATENT, description="latent, lanczos, or a name of the server's list")
    steps: int | None = Field(None, description="that run; by default as many as the picture has")
    strength: float = DEFAULT_UPSCALE_STRENGTH


class JobBody(BaseModel):
    """What pictures are to be like. Pictures come as base64, with or without `data:image/png;base64,`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = None
    negative_prompt: str = ""
    width: int | None = Field(None, description="pixels, a multiple of 8; by default the model's, or the image's")
    height: int | None = None
    steps: int | None = Field(None, description=f"by default {DEFAULT_STEPS}, or as many as are allowed")
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    seed: int | None = Field(None, le=MAX_SEED, description="of the first picture; by default, or at -1, random")
    count: int = Field(1, description="pictures, whose seeds count up")
    scheduler: str | None = None
    sigmas: str | None = None
    timestep_spacing: TimestepSpacing | None = None
    prediction_type: PredictionType | None = None
    zero_snr: bool | None = None
    strength: float = DEFAULT_STRENGTH
    init_image: str | None = None
    mask: str | None = Field(None, description="what is white in it is made anew")
    mask_blur: int = 0
    padding_crop: int | None = None
    edit: bool = False
    image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE_SCALE
    clip_skip: int = 0
    prompt_syntax: Literal["plain", "webui"] = "plain"
    eta: float | None = None
    vae_tiling: bool = False
    quality: QualityName | None = Field(None, description="a preset of what a run leaves out; by default nothing")
    guidance_interval: tuple[float, float] | None = Field(None, description="the part of the run that is guided")
    cache_interval: int | None = Field(None, description="deep caching: 1 step in so many is whole")
    cache_depth: int | None = Field(None, le=1000, description="layers that the others compute")
    cache_schedule: CacheSchedule | None = None
    original_size: Pair | None = Field(None, description="(width, height) that SDXL is told; so are the next two")
    crop: Pair | None = Field(None, description="(left, top)")
    target_size: Pair | None = Field(None, description="(width, height)")
    loras: list[LoraBody] = Field(default_factory=list, max_length=MOST_LORAS)
    control: list[ControlBody] = Field(default_factory=list, max_length=MOST_OF_A_KIND, description="ControlNets")
    ip_adapters: list[AdapterBody] = Field(default_factory=list, max_length=MOST_OF_A_KIND)
    t2i_adapters: list[AdapterBody] = Field(default_factory=list, max_length=MOST_OF_A_KIND)
    embeddings: list[Name] = Field(
        default_factory=list, max_length=MOST_OF_A_KIND, description="textual inversions; each name is its word"
    )
    refiner: RefinerBody | None = None
    upscale: UpscaleBody | None = None

    def request(self, limits: Limits) -> PictureRequest:
        """The request. Raises `UsageError` for pictures that can't be read, or are too large."""
        own = self.model_dump(include=OWN_FIELDS) | {"steps": usual_steps(self.steps, limits)}
        return PictureRequest(
            **own,
            **self._savings(),
            conditioning=SizeConditioning(self.original_size, self.crop, self.target_size),
            loras=tuple(LoraSpec(one.name, one.weight) for one in self.loras),
            beside=self._beside(),
            uploads=self._files(limits.pixels),
        )

    def _files(self, pixels: int) -> dict[str, bytes]:
        """The pictures, by the names that uploads have."""
        given = {INIT: self.init_image, MASK: self.mask}
        given |= {f"{CONTROL}{number}": one.image for number, one in enumerate(self.control)}
        given |= {f"{IP_IMAGE}{number}": one.image for number, one in enumerate(self.ip_adapters)}
        given |= {f"{T2I_IMAGE}{number}": one.image for number, one in enumerate(self.t2i_adapters)}
        return {name: uploads.decode(text, name, pixels) for name, text in given.items() if text is not None}

    def _beside(self) -> Beside:
        return Beside(
            controls=tuple(Control(**one.model_dump(exclude={"image"})) for one in self.control),
            ip_adapters=tuple(Scaled(one.name, one.scale) for one in self.ip_adapters),
            t2i_adapters=tuple(Scaled(one.name, one.scale) for one in self.t2i_adapters),
            embeddings=tuple(self.embeddings),
            upscale=None if self.upscale is None else UpscaleSpec(**self.upscale.model_dump()),
            refiner=None if self.refiner is None else self.refiner.name,
            refiner_start=DEFAULT_REFINER_START if self.refiner is None else self.refiner.start,
        )

    def _savings(self) -> dict[str, Any]:
        """What is left out: what is said here, and what a preset says of the rest, as the commands take both."""
        interval = None if self.guidance_interval is None else GuidanceInterval(*self.guidance_interval)
        caching = (self.cache_interval, self.cache_depth, self.cache_schedule)
        savings = settle(self.quality, interval, *caching)
        named = None if self.quality is None else "exact" if savings == Savings() else self.quality
        return {"savings": savings, "quality": named}


# The fields that a `PictureRequest` has by the same names.
OWN_FIELDS = set(JobBody.model_fields) - {
    *("init_image", "mask", "steps", "quality", "guidance_interval", "cache_interval", "cache_depth", "cache_schedule"),
    *("original_size", "crop", "target_size", "loras", "control", "ip_adapters", "t2i_adapters", "embeddings"),
    *("refiner", "upscale"),
}

"""Text, or an image and text, to images: one path for txt2img and img2img, with diffusers' own pipelines."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from sdtrt import __version__, engines, host, images, models, schedulers
from sdtrt.cache import EngineDirectory, Entry
from sdtrt.components import DTYPES, unet_contract
from sdtrt.console import Console, quiet_libraries
from sdtrt.errors import EngineError, ModelError
from sdtrt.models import Model
from sdtrt.modules import UNetFacade
from sdtrt.runtime import open_session
from sdtrt.specs import DEFAULT_TOKENS, SIZE_MULTIPLE, Backend, GenerateSpec, Precision, SchedulerName, Sizes

RANDOM_SEEDS = 2**32
SHOWN_TOKENS = 100  # of a prompt that is too long
LARGE_AREA = 4  # times the model's own number of pixels: above, a model repeats itself and runs long


@dataclass(frozen=True)
class GeneratedImage:
    """One image that was made; `seconds` from its noise to its file."""

    path: Path
    seed: int
    prompt: str
    negative_prompt: str
    width: int
    height: int
    seconds: float


@dataclass(frozen=True)
class GenerateReport:
    """What was made, and everything needed to make each image again.

    Args:
        settings: what all the images have in common, as plain data: model, backend, device, precision, scheduler, …
        engine: name and digest of the engine's entry; None for the torch backend.
        load_seconds: from the request to a pipeline that is ready, with the building of an engine.
    """

    images: tuple[GeneratedImage, ...]
    settings: Mapping[str, Any]
    engine: Mapping[str, str] | None
    load_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        made = [
            {
                "path": str(image.path),
                "seed": image.seed,
                "prompt": image.prompt,
                "negative_prompt": image.negative_prompt,
                "width": image.width,
                "height": image.height,
            }
            for image in self.images
        ]
        seconds = {
            "load": round(self.load_seconds, 3),
            "generate": [round(image.seconds, 3) for image in self.images],
        }
        engine = None if self.engine is None else dict(self.engine)
        return {"images": made, **self.settings, "engine": engine, "seconds": seconds}


@dataclass(frozen=True)
class Plan:
    """How one model runs: settled before anything heavy is loaded.

    Args:
        sizes: of a UNet call; `height` and `width` are the images'.
        steps: denoising steps, all of them (img2img runs a part).
        img2img: start from an image.
        scheduler: None for the model's own.
    """

    model: Model
    backend: Backend
    precision: Precision
    sizes: Sizes
    steps: int
    img2img: bool = False
    scheduler: SchedulerName | None = None

    @property
    def device(self) -> torch.device:
        """Where the whole pipeline runs."""
        on_gpu = self.backend in ("tensorrt", "tensorrt-rtx") or (self.backend == "torch" and torch.cuda.is_available())
        return torch.device("cuda" if on_gpu else "cpu")

    @property
    def parts_dtype(self) -> torch.dtype:
        """The dtype of what no engine runs. PyTorch's own pipeline has one dtype; a CPU computes best in float32."""
        if self.backend != "torch" and self.device.type == "cpu":
            return torch.float32
        dtype = getattr(torch, DTYPES[self.precision])
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class OpenPipeline:
    """A diffusers pipeline that is ready to run, and the engine in it (None for the torch backend)."""

    pipe: Any
    plan: Plan
    entry: Entry | None


def generate(spec: GenerateSpec, directory: EngineDirectory, console: Console) -> GenerateReport:
    """Make the images of a request, one after the other; each is saved as soon as it is done.

    Every image is a pipeline call of its own with a generator of its own on the CPU: a seed gives the same image
    whatever else is asked for, on a CPU and on a GPU alike up to rounding.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        ModelError, EngineError, ExportError, BuildError: where the model or its engine can't be had.
    """
    start = time.perf_counter()
    jobs = _jobs(spec)
    texts = [prompt + spec.negative_prompt for prompt in spec.prompts]
    output = images.plan_output(spec.output, count=len(jobs), overwrite=spec.overwrite, texts=texts)
    init = images.read_init_image(spec.init_image) if spec.init_image is not None else None
    if spec.negative_prompt and not spec.uses_guidance:
        console.warn(
            f"the negative prompt has no effect at guidance scale {spec.guidance_scale:g} (it needs more than 1)"
        )
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' advice on a model's configuration files
        model = models.resolve_model(spec.model, console)
        plan = _plan(spec, model, init, console)
        with open_pipeline(plan, directory, console, allow_build=spec.allow_build) as opened:
            for text in dict.fromkeys((*spec.prompts, spec.negative_prompt)):
                _warn_truncated(opened.pipe, text, console)
            with console.stage("fingerprinting the weights"):  # seconds the first time, nothing later
                settings = _settings(spec, opened, init, directory)
            run = _Run(spec, opened, output, init, console, settings)
            load_seconds = time.perf_counter() - start
            made = tuple(run.make(number, len(jobs), prompt, seed) for number, (prompt, seed) in enumerate(jobs, 1))
    return GenerateReport(made, run.settings, _engine_facts(opened.entry), load_seconds)


def _jobs(spec: GenerateSpec) -> list[tuple[str, int]]:
    """(prompt, seed) of each image: every prompt starts at the seed and counts up from it."""
    first = spec.seed if spec.seed is not None else secrets.randbelow(RANDOM_SEEDS)
    return [(prompt, first + number) for prompt in spec.prompts for number in range(spec.num_images)]


def _plan(spec: GenerateSpec, model: Model, init: images.InitImage | None, console: Console) -> Plan:
    """Backend, precision and size of a request."""
    backend = engines.choose_backend(spec.backend, console)
    precision = spec.precision or engines.default_precision(backend)
    height, width = _image_size(spec, model, init, console)
    tokens = model.config(_encoders(model)[0]).get("max_position_embeddings", DEFAULT_TOKENS)
    sizes = Sizes(2 if spec.uses_guidance else 1, height, width, tokens)
    plan = Plan(model, backend, precision, sizes, spec.steps, img2img=init is not None, scheduler=spec.scheduler)
    _check_plan(plan)
    return plan


def _image_size(spec: GenerateSpec, model: Model, init: images.InitImage | None, console: Console) -> tuple[int, int]:
    """The (height, width) of a request's images in pixels."""
    own_height, own_width = model.default_size()
    if init is None:
        height, width = spec.height or own_height, spec.width or own_width
    else:
        height, width = init.result_size(spec.height, spec.width)
        own = init.pixels.size
        if own != (width, height):
            console.note(f"init image: resized from {own[0]}x{own[1]} to {width}x{height} (Lanczos)")
    if height * width > LARGE_AREA * own_height * own_width:
        console.warn(
            f"{width}x{height} is far above the model's own size, {own_width}x{own_height}: expect it to be slow,"
            f" and the picture to repeat itself (--width {own_width} --height {own_height} is what it knows)"
        )
    return height, width


def _check_plan(plan: Plan) -> None:
    """Refuse what no engine can run, before anything is exported."""
    if plan.device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"{plan.backend} needs an NVIDIA GPU and a CUDA build of PyTorch",
            hint="run: sdtrt doctor; or --backend auto",
        )
    if plan.backend == "torch":
        return
    unet_contract(plan.model.config("unet"), plan.precision)
    if plan.model.vae_scale_factor != SIZE_MULTIPLE:
        raise ModelError(
            f"engines need a VAE of factor {SIZE_MULTIPLE}, that of {plan.model.spec.name} has"
            f" {plan.model.vae_scale_factor}",
            hint="use --backend torch for this model",
        )


def _encoders(model: Model) -> list[str]:
    """The names of the model's text encoders (SDXL has two, its refiner the second only)."""
    return [name for name in ("text_encoder", "text_encoder_2") if name in model.parts]


@contextmanager
def open_pipeline(
    plan: Plan, directory: EngineDirectory, console: Console, *, allow_build: bool = True
) -> Iterator[OpenPipeline]:
    """Load what a plan needs and no more, with the engine's facade as the UNet.

    The scheduler comes first, so that too many steps are refused before an engine is built.
    """
    parts = models.load_parts(plan.model, ["scheduler"], torch.float32)
    parts["scheduler"] = schedulers.make_scheduler(plan.scheduler, parts["scheduler"])
    schedulers.check_steps(parts["scheduler"], plan.steps)
    encoders = _encoders(plan.model)
    names = [*(name.replace("text_encoder", "tokenizer") for name in encoders), *encoders, "vae"]
    with _open_unet(plan, directory, console, allow_build) as (unet, entry), torch.no_grad():
        with console.stage("loading the pipeline"):
            parts |= models.load_parts(plan.model, names, plan.parts_dtype)
            for part in parts.values():
                if isinstance(part, torch.nn.Module):
                    part.to(plan.device).eval()
        yield OpenPipeline(_assemble(plan, unet, parts), plan, entry)


@contextmanager
def _open_unet(
    plan: Plan, directory: EngineDirectory, console: Console, allow_build: bool
) -> Iterator[tuple[torch.nn.Module, Entry | None]]:
    """The model's own UNet for the torch backend; else the facade of an engine, and the engine's entry."""
    if plan.backend == "torch":
        yield models.load_unet(plan.model, plan.parts_dtype).to(plan.device), None
        return
    entry = engines.ensure_engine(
        plan.model, plan.backend, plan.precision, plan.sizes, directory, allow_build=allow_build, console=console
    )
    config = plan.model.config("unet")
    with open_session(entry, plan.device) as session:
        yield UNetFacade(session, unet_contract(config, plan.precision), config, plan.device), entry


def _assemble(plan: Plan, unet: torch.nn.Module, parts: Mapping[str, Any]) -> Any:
    """diffusers' own pipeline of these parts, by its constructor."""
    options: dict[str, Any]
    if plan.model.is_sdxl:
        cls = diffusers.StableDiffusionXLImg2ImgPipeline if plan.img2img else diffusers.StableDiffusionXLPipeline
        zeros = plan.model.pipeline_options.get("force_zeros_for_empty_prompt", True)
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    else:
        cls = diffusers.StableDiffusionImg2ImgPipeline if plan.img2img else diffusers.StableDiffusionPipeline
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = cls(unet=unet, **parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _warn_truncated(pipe: Any, text: str, console: Console) -> None:
    """Say which end of a prompt the text encoder won't see."""
    tokenizer = pipe.tokenizer or pipe.tokenizer_2
    ids = tokenizer(text, truncation=False).input_ids
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        dropped = tokenizer.decode(ids[limit - 1 : limit - 1 + SHOWN_TOKENS][: len(ids) - limit]).strip()
        more = " …" if len(ids) - limit > SHOWN_TOKENS else ""
        console.warn(f"the prompt is longer than {limit} tokens; this part of it is ignored: {dropped!r}{more}")


class _Finite:
    """Watches the latents after each denoising step. It asks the device nothing until the end: no step waits for it."""

    def __init__(self) -> None:
        self.flags: list[torch.Tensor] = []

    def add(self, latents: torch.Tensor) -> None:
        """Note one step's latents."""
        self.flags.append(torch.isfinite(latents).all())

    def first_bad(self) -> int | None:
        """The first step (from 1) whose latents were not finite."""
        finite = torch.stack(self.flags).tolist() if self.flags else []
        return finite.index(False) + 1 if False in finite else None


@dataclass(frozen=True)
class _Run:
    """One request on an open pipeline."""

    spec: GenerateSpec
    opened: OpenPipeline
    output: images.OutputPlan
    init: images.InitImage | None
    console: Console
    settings: Mapping[str, Any]

    def make(self, number: int, count: int, prompt: str, seed: int) -> GeneratedImage:
        """Make one image, and save it."""
        start = time.perf_counter()
        name = f"seed {seed}" if count == 1 else f"image {number} of {count}, seed {seed}"
        image = self._denoise(name, prompt, seed)
        path = self.output.save(image, self._metadata(prompt, seed), prompt=prompt, seed=seed)
        self.console.note(f"{name}: {path}")
        seconds = time.perf_counter() - start
        return GeneratedImage(path, seed, prompt, self.spec.negative_prompt, image.width, image.height, seconds)

    def _denoise(self, name: str, prompt: str, seed: int) -> Image.Image:
        """One call of the pipeline."""
        pipe, finite = self.opened.pipe, _Finite()
        steps = len(self._timesteps())
        with self.console.bar(name, steps) as advance, _out_of_memory(self.opened.plan):

            def on_step_end(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                finite.add(tensors["latents"])
                advance()
                return {}

            pixels = pipe(**self._arguments(prompt, seed), callback_on_step_end=on_step_end, output_type="np").images
        self._check_finite(finite.first_bad(), steps, pixels)
        image: Image.Image = pipe.image_processor.numpy_to_pil(pixels)[0]
        return image

    def _timesteps(self) -> Any:
        """The timesteps that the pipeline will run: PNDM has one more than steps, Heun nearly twice as many."""
        pipe, spec = self.opened.pipe, self.spec
        pipe.scheduler.set_timesteps(spec.steps, device=self.opened.plan.device)
        if self.init is None:
            return pipe.scheduler.timesteps
        return pipe.get_timesteps(spec.steps, spec.strength, self.opened.plan.device)[0]

    def _arguments(self, prompt: str, seed: int) -> dict[str, Any]:
        """The pipeline's arguments."""
        spec, sizes = self.spec, self.opened.plan.sizes
        common = {
            "prompt": prompt,
            "negative_prompt": spec.negative_prompt or None,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance_scale,
            "generator": torch.Generator().manual_seed(seed),
        }
        if self.init is None:
            return {**common, "height": sizes.height, "width": sizes.width}
        return {**common, "image": self.init.fitted(sizes.height, sizes.width), "strength": spec.strength}

    def _check_finite(self, bad_step: int | None, steps: int, pixels: np.ndarray[Any, Any]) -> None:
        """Refuse an image that would come out black."""
        if bad_step is None and bool(np.isfinite(pixels).all()):
            return
        plan = self.opened.plan
        where = f"denoising step {bad_step} of {steps}" if bad_step is not None else "the VAE's decoding"
        hint = "use --precision fp32"
        if plan.precision == "fp32":
            hint = "the model's weights may be damaged; try another --scheduler or --guidance-scale, or --backend torch"
        raise EngineError(
            f"{where} gave values that are not finite ({plan.backend}, {plan.precision}): no image was made", hint=hint
        )

    def _metadata(self, prompt: str, seed: int) -> images.Metadata:
        """The text that one image carries. Nothing in it changes between two runs with one seed."""
        spec, sizes, settings = self.spec, self.opened.plan.sizes, self.settings
        scheduler = self.opened.pipe.scheduler
        fields = {
            "Steps": spec.steps,
            "Sampler": schedulers.sampler_name(scheduler),
            "Schedule type": schedulers.schedule_type(scheduler),
            "CFG scale": float(spec.guidance_scale),
            "Seed": seed,
            "Size": f"{sizes.width}x{sizes.height}",
            "Model hash": settings["model"]["sha256"][:10] if "sha256" in settings["model"] else None,
            "Model": _model_title(self.opened.plan.model),
            "Denoising strength": float(spec.strength) if self.init is not None else None,
            "Version": f"sdtrt {__version__}",
        }
        own = {"prompt": prompt, "negative_prompt": spec.negative_prompt, "seed": seed}
        own |= {"width": sizes.width, "height": sizes.height}
        parameters = images.format_parameters(prompt, spec.negative_prompt, fields)
        return images.Metadata(parameters, {**own, **settings})


def _settings(
    spec: GenerateSpec, opened: OpenPipeline, init: images.InitImage | None, directory: EngineDirectory
) -> dict[str, Any]:
    """What all images of a request have in common, as plain data."""
    plan, scheduler = opened.plan, opened.pipe.scheduler
    return {
        "model": _model_facts(plan.model, directory),
        "backend": plan.backend,
        "device": _device_name(plan.device),
        "precision": plan.precision,
        "scheduler": {"name": spec.scheduler, "class": type(scheduler).__name__},
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "strength": spec.strength if init is not None else None,
        "init_image": None if init is None else {"name": init.path.name, "sha256": init.sha256},
        "versions": {"sdtrt": __version__, **host.library_versions()},
    }


def _model_facts(model: Model, directory: EngineDirectory) -> dict[str, Any]:
    """Which model it was: its name, and the fingerprints of the parts with weights (the name alone may change hands).

    A single file's own sha256 is there too: web UIs show its beginning as the model's hash.
    """
    spec = model.spec
    facts: dict[str, Any] = {"name": spec.name, "revision": spec.revision, "variant": spec.variant}
    for part in ("unet", *_encoders(model), "vae"):
        facts[part] = model.fingerprint(part, directory.file_digest)
    if model.layout == "single-file":
        facts["sha256"] = directory.file_digest(model.source)
    return facts


def _device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _model_title(model: Model) -> str:
    """A model's short name, as web UIs show it."""
    path = Path(model.spec.name)
    return path.stem if model.layout == "single-file" else path.name or path.resolve().name


def _engine_facts(entry: Entry | None) -> dict[str, str] | None:
    """Which engine it was."""
    return None if entry is None else {"name": entry.name, "digest": entry.digest}


@contextmanager
def _out_of_memory(plan: Plan) -> Iterator[None]:
    """Turn PyTorch's failures to allocate into an `EngineError` (the CPU's is a bare `RuntimeError`)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        texts = ("can't allocate memory", "not enough memory")
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(text in str(error) for text in texts):
            raise
        raise EngineError(
            f"out of memory at {plan.sizes.width}x{plan.sizes.height} pixels with {plan.backend} in {plan.precision}",
            hint="use a smaller --height and --width",
        ) from error

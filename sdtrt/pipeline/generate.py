"""Text, or an image and text, to images: one path for txt2img and img2img."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdtrt import __version__
from sdtrt.common import host
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.engines import find
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.models.components import sizes_of, text_encoders_of
from sdtrt.models.resolve import Model
from sdtrt.pipeline import images, memory, prompts, saving, schedulers
from sdtrt.pipeline.finite import Finite
from sdtrt.pipeline.memory import out_of_memory
from sdtrt.pipeline.open import OpenPipeline, engine_facts, open_pipeline
from sdtrt.pipeline.request import resolve_request
from sdtrt.specs import Component, GenerateSpec

RANDOM_SEEDS = 2**32
SHOWN_TOKENS = 100  # of a prompt that is too long


@dataclass(frozen=True)
class GeneratedImage:
    """One image that was made; `seconds` from its noise to its file, a batch's shared equally by its images."""

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
        engines: name and digest of the engine's entry, for each component that an engine ran.
        load_seconds: from the request to a pipeline that is ready, with the building of an engine.
    """

    images: tuple[GeneratedImage, ...]
    settings: Mapping[str, Any]
    engines: Mapping[Component, Mapping[str, str]]
    load_seconds: float

    @property
    def engine(self) -> Mapping[str, str] | None:
        """The UNet's engine; None where PyTorch ran it."""
        return self.engines.get("unet")

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
        facts = {name: dict(engine) for name, engine in self.engines.items()}
        return {"images": made, **self.settings, "engine": facts.get("unet"), "engines": facts, "seconds": seconds}


@dataclass(frozen=True)
class Job:
    """One image to be made."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Jobs:
    """All the images of a request, prompt after prompt: each prompt starts at the first seed and counts up from it.

    A job is made when it is asked for: a request may be for tens of millions.
    """

    prompts: tuple[str, ...]
    num_images: int
    first_seed: int

    def __len__(self) -> int:
        return len(self.prompts) * self.num_images

    def batch(self, first: int, size: int) -> list[Job]:
        """The jobs from the number `first` on: `size`, or as many as there are."""
        return [self._job(number) for number in range(first, min(first + size, len(self)))]

    def _job(self, number: int) -> Job:
        prompt, image = divmod(number, self.num_images)
        return Job(self.prompts[prompt], self.first_seed + image)


def generate(spec: GenerateSpec, directory: EngineDirectory, console: Console) -> GenerateReport:
    """Make the images of a request, batch after batch; each is saved as soon as it is done.

    Every image has a generator of its own on the CPU: a seed gives the same image whatever else is asked for, on a CPU
    and on a GPU alike up to rounding. Alone in its pipeline call (`batch_size` 1) it is the same to the last bit, but
    with engines of TensorRT 8.6 that add up by atomics (`tensorrt86.norm_plugin`); in a larger batch sums may be
    rounded in another order.

    Where the memory is too small for a batch, it goes on with batches of half as many.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        ModelError, EngineError, ExportError, BuildError: where the model or its engine can't be had.
    """
    start = time.perf_counter()
    jobs = _jobs(spec)
    texts = (prompt + spec.negative_prompt for prompt in spec.prompts)
    output = saving.plan_output(spec.output, count=len(jobs), overwrite=spec.overwrite, texts=texts)
    init = images.read_init_image(spec.init_image, console) if spec.init_image is not None else None
    if spec.negative_prompt and not spec.uses_guidance:
        console.warn(
            f"the negative prompt has no effect at guidance scale {spec.guidance_scale:g} (it needs more than 1)"
        )
    if found := prompts.web_ui_syntax((*spec.prompts, spec.negative_prompt)):
        console.warn(f"web UIs' prompt syntax is taken literally: {found!r} (no weights, no BREAK, no <lora:…> yet)")
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' advice on a model's configuration files
        model = resolve.resolve_model(spec.model, console)
        pipeline_spec = resolve_request(spec, model, console, init)
        with open_pipeline(pipeline_spec, directory, console, allow_build=spec.allow_build) as opened:
            for text, name in _named(spec).items():
                _warn_truncated(opened.pipe, text, name, console)
            with console.stage("fingerprinting the weights"):  # seconds the first time, nothing later
                settings = _settings(spec, opened, init, directory)
                opened.files.check()  # so that they are of the weights that were loaded
            run = _Run(spec, opened, output, init, console, settings)
            load_seconds = time.perf_counter() - start
            made = run.make_all(jobs)
    facts = {name: engine_facts(entry) for name, entry in opened.entries.items()}
    return GenerateReport(tuple(made), run.settings, facts, load_seconds)


def _jobs(spec: GenerateSpec) -> Jobs:
    """The images of a request, from its seed on, or from a random one."""
    first = spec.seed if spec.seed is not None else secrets.randbelow(RANDOM_SEEDS)
    return Jobs(spec.prompts, spec.num_images, first)


def _named(spec: GenerateSpec) -> dict[str, str]:
    """Each different text of a request, and what it is called."""
    texts = dict.fromkeys(spec.prompts)
    names = {text: f"prompt {number} of {len(texts)}" for number, text in enumerate(texts, 1)}
    if len(names) == 1:
        names = dict.fromkeys(names, "the prompt")
    if spec.uses_guidance:  # without, nobody reads it
        both = f"{names[spec.negative_prompt]} and the negative prompt" if spec.negative_prompt in names else None
        names[spec.negative_prompt] = both or "the negative prompt"
    return names


def _warn_truncated(pipe: Any, text: str, name: str, console: Console) -> None:
    """Say which end of a prompt the text encoder won't see."""
    tokenizer = pipe.tokenizer or pipe.tokenizer_2
    ids = tokenizer(text, truncation=False).input_ids
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        dropped = tokenizer.decode(ids[limit - 1 : limit - 1 + SHOWN_TOKENS][: len(ids) - limit]).strip()
        more = " …" if len(ids) - limit > SHOWN_TOKENS else ""
        console.warn(f"{name} is longer than {limit} tokens; this part of it is ignored: {dropped!r}{more}")


@dataclass(frozen=True)
class _Run:
    """One request on an open pipeline."""

    spec: GenerateSpec
    opened: OpenPipeline
    output: saving.OutputPlan
    init: images.InitImage | None
    console: Console
    settings: Mapping[str, Any]

    def make_all(self, jobs: Jobs) -> list[GeneratedImage]:
        """Make all images; where the memory is too small for as many at once as were asked for, go on with fewer."""
        made: list[GeneratedImage] = []
        size = self.opened.spec.images
        while len(made) < len(jobs):
            try:
                made += self.make(jobs, len(made), size)
                continue
            except MemoryShortage as error:
                batch = jobs.batch(len(made), size)
                size = self._halved(len(self._filled(batch, size)), error)
            memory.release()  # here the failed call's tensors are gone: the exception had them
        return made

    def make(self, jobs: Jobs, first: int, size: int) -> list[GeneratedImage]:
        """Make the batch of `size` images that starts at the job `first`, and save its images."""
        start = time.perf_counter()
        batch = jobs.batch(first, size)
        made = self._denoise(_batch_name(batch, first + 1, len(jobs)), batch, size)
        self.opened.check_weights()
        found = []
        for number, (job, image) in enumerate(zip(batch, made, strict=True), first + 1):
            metadata = self._metadata(job.prompt, job.seed, size)
            path = self.output.save(image, metadata, prompt=job.prompt, seed=job.seed)
            self.console.note(f"{_batch_name([job], number, len(jobs))}: {path}")
            found.append((path, job, image))
        seconds = (time.perf_counter() - start) / len(batch)
        negative = self.spec.negative_prompt
        return [
            GeneratedImage(path, job.seed, job.prompt, negative, image.width, image.height, seconds)
            for path, job, image in found
        ]

    def _halved(self, size: int, error: MemoryShortage) -> int:
        """Half as many images at once, with a word on that; the error itself where one is too many already."""
        if size == 1:
            raise error
        half = size // 2
        if not self._takes(half):
            raise MemoryShortage(
                error.message, hint=f"use --batch-size {half}: it gets engines of its own, these don't take so few"
            ) from error
        self.console.warn(f"{error.message}: going on with --batch-size {half}")
        return half

    def _denoise(self, name: str, batch: Sequence[Job], size: int) -> list[Image.Image]:
        """One call of the pipeline."""
        pipe, finite = self.opened.pipe, Finite()
        steps = len(self._timesteps())
        watching = finite.watching(pipe)
        with self.console.bar(name, steps) as advance, out_of_memory(self.opened.spec, size), watching:

            def on_step_end(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
                advance()
                return {}

            arguments = self._arguments(self._filled(batch, size))
            pixels = pipe(**arguments, callback_on_step_end=on_step_end, output_type="np").images[: len(batch)]
        self._check_finite(finite.first_bad(), steps)
        made: list[Image.Image] = pipe.image_processor.numpy_to_pil(pixels)
        return made

    def _filled(self, batch: Sequence[Job], size: int) -> Sequence[Job]:
        """The last batch, filled up with what is made in vain, where an engine takes full batches only."""
        return batch if self._takes(len(batch)) else [*batch, *[batch[-1]] * (size - len(batch))]

    def _takes(self, count: int) -> bool:
        """Whether all engines take so many images at once."""
        pipeline_spec = self.opened.spec
        unet = replace(pipeline_spec.sizes, batch=pipeline_spec.sizes.batch // pipeline_spec.images * count)
        return all(
            find.slack(entry.engine_key.profiles, sizes_of(name, unet, count)) is not None
            for name, entry in self.opened.entries.items()
        )

    def _timesteps(self) -> Any:
        """The timesteps that the pipeline will run: PNDM has one more than steps, Heun nearly twice as many."""
        pipe, spec = self.opened.pipe, self.spec
        pipe.scheduler.set_timesteps(spec.steps, device=self.opened.spec.device)
        if self.init is None:
            return pipe.scheduler.timesteps
        return pipe.get_timesteps(spec.steps, spec.strength, self.opened.spec.device)[0]

    def _arguments(self, batch: Sequence[Job]) -> dict[str, Any]:
        """The pipeline's arguments."""
        spec, sizes = self.spec, self.opened.spec.sizes
        common = {
            "prompt": [job.prompt for job in batch],
            "negative_prompt": [spec.negative_prompt] * len(batch) if spec.negative_prompt else None,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance_scale,
            "generator": [torch.Generator().manual_seed(job.seed) for job in batch],
        }
        if self.init is None:
            return {**common, "height": sizes.height, "width": sizes.width}
        return {**common, "image": self.init.fitted(sizes.height, sizes.width), "strength": spec.strength}

    def _check_finite(self, bad: str | None, steps: int) -> None:
        """Refuse an image that would come out black."""
        if bad is None:
            return
        pipeline_spec = self.opened.spec
        where = f"{bad} of {steps}" if bad.startswith("unet") else bad
        hint = "use --precision fp32"
        if pipeline_spec.precision == "fp32":
            hint = "the model's weights may be damaged; try another --scheduler or --guidance-scale, or --backend torch"
        if pipeline_spec.has_engines and bad.startswith("unet"):
            hint += "; sdtrt verify holds the engine against PyTorch"
        raise EngineError(
            f"{where} gave values that are not finite ({pipeline_spec.backend}, {pipeline_spec.precision}):"
            " no image was made",
            hint=hint,
        )

    def _metadata(self, prompt: str, seed: int, size: int) -> images.Metadata:
        """The text that one image carries. Nothing in it changes between two runs with one seed."""
        spec, sizes, settings = self.spec, self.opened.spec.sizes, self.settings
        scheduler = self.opened.pipe.scheduler
        fields = {
            "Steps": spec.steps,
            "Sampler": schedulers.sampler_name(scheduler),
            "Schedule type": schedulers.schedule_type(scheduler),
            "CFG scale": float(spec.guidance_scale),
            "Seed": seed,
            "Size": f"{sizes.width}x{sizes.height}",
            "Model hash": settings["model"]["sha256"][:10] if "sha256" in settings["model"] else None,
            "Model": _model_title(self.opened.spec.model),
            "Denoising strength": float(spec.strength) if self.init is not None else None,
            "RNG": "CPU",  # web UIs take a GPU's otherwise: other noise
            "Noise Schedule": schedulers.noise_schedule(scheduler),
            "Emphasis": "None" if set(prompt + spec.negative_prompt) & set("()[]") else None,  # taken literally
            "Version": f"sdtrt {__version__}",
        }
        own = {"prompt": prompt, "negative_prompt": spec.negative_prompt, "seed": seed}
        own |= {"width": sizes.width, "height": sizes.height}
        parameters = images.format_parameters(prompt, spec.negative_prompt, fields)
        return images.Metadata(parameters, {**own, **settings, "batch_size": size})


def _batch_name(batch: Sequence[Job], number: int, count: int) -> str:
    """What a batch is called while it is made; `number` is that of its first image."""
    seeds = ", ".join(f"{job.seed}" for job in batch)
    if len(batch) > 1:
        return f"images {number} to {number + len(batch) - 1} of {count}, seeds {seeds}"
    return f"seed {seeds}" if count == 1 else f"image {number} of {count}, seed {seeds}"


def _settings(
    spec: GenerateSpec, opened: OpenPipeline, init: images.InitImage | None, directory: EngineDirectory
) -> dict[str, Any]:
    """What all images of a request have in common, as plain data."""
    pipeline_spec, scheduler = opened.spec, opened.pipe.scheduler
    return {
        "model": _model_facts(pipeline_spec.model, directory),
        "backend": pipeline_spec.backend,
        "device": _device_name(pipeline_spec.device),
        "precision": pipeline_spec.precision,
        "scheduler": {"name": spec.scheduler, **schedulers.facts(scheduler)},
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "strength": spec.strength if init is not None else None,
        "init_image": None if init is None else {"name": init.path.name, "sha256": init.sha256},
        "batch_size": pipeline_spec.images,
        "versions": {"sdtrt": __version__, **host.library_versions()},
    }


def _model_facts(model: Model, directory: EngineDirectory) -> dict[str, Any]:
    """Which model it was: its name, and the fingerprints of the parts with weights (the name alone may change hands).

    A single file's own sha256 is there too: web UIs show its beginning as the model's hash.
    """
    spec = model.spec
    facts: dict[str, Any] = {"name": spec.name, "revision": spec.revision, "variant": spec.variant}
    for part in ("unet", *text_encoders_of(model), "vae"):
        facts[part] = model.fingerprint(part, directory.file_digest)
    if spec.vae is not None:
        facts["vae_name"] = spec.vae
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

"""Makes images of a request and saves them: one path from text, an image or a masked image to files.

It knows neither how engines are found nor how diffusers is called.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from sdtrt.common.console import QUIET, Console, quiet_libraries
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.engines import find
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.models.resolve import Model
from sdtrt.models.t2i_adapters import PART as ADAPTER
from sdtrt.pipeline.inputs import adapter_images, control_images, images, masks, prompts
from sdtrt.pipeline.inputs.adapter_images import AdapterImage
from sdtrt.pipeline.inputs.control_images import ControlImage
from sdtrt.pipeline.opening import memory
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.pipeline.opening.memory import out_of_memory
from sdtrt.pipeline.opening.open import OpenPipeline, engine_facts, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec, check_modes
from sdtrt.pipeline.opening.slow_cpu import note_slow_cpu
from sdtrt.pipeline.parts.finite import Finite
from sdtrt.pipeline.recipes import reading as recipes
from sdtrt.pipeline.runs import saving
from sdtrt.pipeline.runs.call import Control, PipelineCall, generators_of
from sdtrt.pipeline.runs.jobs import Job, JobList, Jobs, batch_name
from sdtrt.pipeline.runs.previews import Preview, find_preview_vae, load_preview
from sdtrt.pipeline.runs.refining import Refiner, open_refiner, plan_refiner
from sdtrt.pipeline.runs.settings import adapter_facts, metadata_of, refiner_facts, settings_of, upscale_facts
from sdtrt.pipeline.runs.upscaling import Upscaler, load_upscaler, open_upscaler, plan_upscale, without
from sdtrt.specs import GenerateSpec


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
        engines: name and digest of the engine's entry, for each component that an engine ran; a refiner's are called
            `refiner_unet` and the like, those of a second pass `upscale_unet`.
        load_seconds: from the request to a pipeline that is ready, with the building of an engine.
    """

    images: tuple[GeneratedImage, ...]
    settings: Mapping[str, Any]
    engines: Mapping[str, Mapping[str, str]]
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


def generate(spec: GenerateSpec, directory: EngineDirectory, console: Console) -> GenerateReport:
    """Make the images of a request, batch after batch; each is saved as soon as it is done.

    Every image has a generator of its own on the CPU: a seed gives the same image whatever else is asked for, on a CPU
    and on a GPU alike up to rounding. Alone in its pipeline call (`batch_size` 1) it is the same to the last bit, but
    with engines of TensorRT 8.6 that add up by atomics (in its plugin for norms); in a larger batch sums may be
    rounded in another order.

    Where the memory is too small for a batch, it goes on with batches of half as many.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        ModelError, EngineError, ExportError, BuildError: where the model or its engine can't be had.
    """
    began = time.perf_counter()
    if spec.recipe is not None:
        recipes.tell(spec.recipe, console)
    jobs = Jobs.of(spec)
    texts = (prompt + spec.negative_prompt for prompt in spec.prompts)
    output = saving.plan_output(spec.output, count=len(jobs), overwrite=spec.overwrite, texts=texts)
    read = read_pictures(spec, console)
    _warn_of_texts(spec, console)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' advice on a model's configuration files
        plan = _plan(spec, directory, console, read)
        start = started(plan.spec, plan.first, read.init, read.mask)
        fitted = fitted_maps(read.controls, plan.first, start, console)
        larger = fitted_maps(read.controls, plan.larger, None) if plan.larger is not None else ()
        adapted = adapted_pictures(read.adapters, plan.first, console)
        tiny = find_preview_vae(spec.preview, plan.first.model, console) if spec.preview else None
        with _opened(plan, directory, console) as stages:
            if spec.prompt_syntax == "plain":
                prompts.warn_truncated(stages.first.pipe, spec, console)
            with console.stage("fingerprinting the weights"):  # seconds the first time, nothing later
                settings = settings_of_all(plan, stages.first, read, directory)
                stages.check_files()  # so that they are of the weights that were loaded
            if spec.recipe is not None:
                recipes.tell_differences(spec.recipe, settings, console)
            stages.scale_adapters([one.scale for one in spec.ip_images])
            with _previewing(spec, stages.first, tiny, output, console) as preview:
                shown = tuple(one.pixels for one in read.pictures)
                given = (plan.spec, stages, output, start, fitted, console, settings, preview, shown, larger, adapted)
                run = Run(*given)
                load_seconds = time.perf_counter() - began
                made = run.make_all(jobs)
    return GenerateReport(tuple(made), run.settings, stages.engine_facts(), load_seconds)


@dataclass(frozen=True)
class Pictures:
    """The pictures that a request goes by, as they were read; `pictures` are those of IP-Adapters."""

    init: images.InitImage | None
    mask: masks.Mask | None
    controls: tuple[ControlImage, ...]
    adapters: tuple[AdapterImage, ...]
    pictures: tuple[images.InitImage, ...]


def read_pictures(spec: GenerateSpec, console: Console) -> Pictures:
    """Read all pictures of a request. Raises `UsageError` for what is none, or does not fit."""
    init = images.read_init_image(spec.init_image, console) if spec.init_image is not None else None
    mask = None
    if spec.mask is not None and init is not None:
        mask = masks.read_mask(spec.mask, init, spec.mask_blur, console)
    pictures = tuple(images.read_init_image(one.image, console, "ip image") for one in spec.ip_images)
    controls = control_images.read_control_images(spec, init, console)
    return Pictures(init, mask, controls, adapter_images.read_adapter_images(spec, console), pictures)


def settings_of_all(plan: Plan, opened: OpenPipeline, read: Pictures, directory: EngineDirectory) -> dict[str, Any]:
    """What all images have in common, as plain data."""
    settings = settings_of(plan.spec, opened, read.init, read.mask, read.controls, directory, read.pictures)
    return settings | {**adapter_facts(opened, read.adapters, directory), **plan.facts(directory)}


def _warn_of_texts(spec: GenerateSpec, console: Console) -> None:
    """Say which texts don't mean what they may seem to."""
    if spec.negative_prompt and not spec.uses_guidance:
        console.warn(
            f"the negative prompt has no effect at guidance scale {spec.guidance_scale:g} (it needs more than 1)"
        )
    if spec.prompt_syntax == "plain":
        prompts.warn_literal(spec, console)


@dataclass(frozen=True)
class Plan:
    """How a request's pipelines run: the first one, and those that go on with what it makes; what enlarges that."""

    spec: GenerateSpec
    first: PipelineSpec
    refiner: PipelineSpec | None
    larger: PipelineSpec | None
    enlarger: Any = None

    def facts(self, directory: EngineDirectory) -> dict[str, Any]:
        """What is told of those that go on, as plain data."""
        refiner = refiner_facts(self.spec, self.refiner, directory)
        return {**refiner, **upscale_facts(self.spec, self.larger, directory)}


def _plan(
    spec: GenerateSpec,
    directory: EngineDirectory,
    console: Console,
    read: Pictures,
) -> Plan:
    """Settle everything before anything heavy is loaded."""
    model = resolve.resolve_model(spec.model, console)
    plan = plan_stages(recipes.settle(spec, model), model, directory, console, read)
    note_slow_cpu(plan.first, console)
    first, enlarger = plan.first, load_upscaler(spec, plan.larger)
    if spec.upscale is not None and spec.upscale.is_latent:
        first = replace(first, components=without(first, "vae_decoder"))
    return replace(plan, first=first, enlarger=enlarger)


def plan_stages(spec: GenerateSpec, model: Model, directory: EngineDirectory, console: Console, read: Pictures) -> Plan:
    """How the pipelines of a request for a model run, which a recipe's settings are settled for."""
    if model.embeds_guidance and spec.negative_prompt:
        console.warn(f"{model.name} takes no negative prompt: its unet has the guidance scale as an input")
    maps = [*(one.picture for one in read.controls), *(one.picture for one in read.adapters)]
    first = resolve_fastest(spec, model, directory, console, read.init, maps)
    check_modes(spec.controls, (first.model, *first.others.values()))
    return Plan(spec, first, plan_refiner(spec, first, console), plan_upscale(spec, first, console))


@dataclass(frozen=True)
class Stages:
    """A request's open pipelines."""

    first: OpenPipeline
    refiner: Refiner | None = None
    upscaler: Upscaler | None = None

    @property
    def named(self) -> dict[str, OpenPipeline]:
        """All of them, by what their engines' names begin with."""
        others = {"refiner_": self.refiner, "upscale_": self.upscaler}
        return {"": self.first} | {name: one.opened for name, one in others.items() if one is not None}

    @property
    def passes_latents(self) -> bool:
        """Whether another one goes on with the first one's latents."""
        return self.refiner is not None or (self.upscaler is not None and self.upscaler.spec.is_latent)

    def takes(self, count: int) -> bool:
        """Whether all engines take so many images at once."""
        return all(_takes(one, count) for one in self.named.values())

    def scale_adapters(self, scales: list[float]) -> None:
        """Have IP-Adapters count so much, one number for each; a refiner has none."""
        larger = [] if self.upscaler is None else [self.upscaler.opened]
        for one in [self.first, *larger] if scales else []:
            one.pipe.set_ip_adapter_scale(scales)

    def check_files(self) -> None:
        """Raise `ModelChangedError` where files of weights were replaced since they were read."""
        for one in self.named.values():
            one.files.check()

    def check_weights(self) -> None:
        """Raise `ModelChangedError` where weights that are mapped into memory were written meanwhile."""
        for one in self.named.values():
            one.check_weights()

    def engine_facts(self) -> dict[str, Mapping[str, str]]:
        """Which engine ran each component."""
        named = ((start, one.entries.items()) for start, one in self.named.items())
        return {f"{start}{name}": engine_facts(entry) for start, entries in named for name, entry in entries}


@contextmanager
def _opened(plan: Plan, directory: EngineDirectory, console: Console) -> Iterator[Stages]:
    """Open a request's pipelines, one after the other."""
    build = plan.spec.allow_build
    with (
        open_pipeline(plan.first, directory, console, allow_build=build) as first,
        open_refiner(plan.spec, plan.refiner, directory, console) as refiner,
        open_upscaler(plan.spec, plan.larger, plan.enlarger, first, directory, console) as upscaler,
    ):
        yield Stages(first, refiner, upscaler)


@contextmanager
def _previewing(
    spec: GenerateSpec, opened: OpenPipeline, tiny: Model | None, output: saving.OutputPlan, console: Console
) -> Iterator[Preview | None]:
    """Show each picture while it is made, in a file that is there as long as this lasts; None where nobody asked."""
    if tiny is None:
        yield None
        return
    with output.preview(spec.prompts[0], console) as file:
        yield load_preview(tiny, opened, lambda _step, pictures: file.show(pictures), spec.preview_every)


def started(
    spec: GenerateSpec, pipeline_spec: PipelineSpec, init: images.InitImage | None, mask: masks.Mask | None
) -> Image.Image | masks.Inpainting | None:
    """What the images start from, in the size that the pipeline works at; None for text alone."""
    sizes = pipeline_spec.sizes
    if init is None:
        return None
    if mask is None:
        return init.fitted(sizes.height, sizes.width)
    latent = pipeline_spec.model.vae_scale_factor
    return masks.fit(init, mask, (sizes.height, sizes.width), spec.padding_crop, latent)


def fitted_maps(
    controls: Sequence[ControlImage],
    pipeline_spec: PipelineSpec,
    start: Image.Image | masks.Inpainting | None,
    console: Console = QUIET,
) -> tuple[Control, ...]:
    """What ControlNets go by, in the size that the pipeline works at."""
    sizes, box = pipeline_spec.sizes, start.box if isinstance(start, masks.Inpainting) else None
    if box is None:
        control_images.note_sizes(controls, sizes.height, sizes.width, console)
    return tuple(Control.of(one, sizes, box) for one in controls)


def adapted_pictures(
    adapters: Sequence[AdapterImage], pipeline_spec: PipelineSpec, console: Console
) -> tuple[tuple[Image.Image, float], ...]:
    """What T2I-Adapters go by, in the size that the pipeline works at, and how much each counts."""
    sizes, models = pipeline_spec.sizes, (pipeline_spec.model, *pipeline_spec.adapters)
    control_images.note_sizes(adapters, sizes.height, sizes.width, console, adapter_images.WHAT)
    return tuple(
        (one.fitted(sizes.height, sizes.width, model.config(ADAPTER)), one.spec.scale)
        for one, model in zip(adapters, models, strict=False)
    )


class Sink(Protocol):
    """Where pictures go: a `saving.OutputPlan`, or what hands them on."""

    def save(self, image: Image.Image, metadata: images.Metadata, *, prompt: str, seed: int) -> Path:
        """Take one picture with the text that it carries, and say what it is called."""


@dataclass(frozen=True)
class Run:
    """One request on its open pipelines.

    Args:
        output: where each picture goes as soon as it is made.
        controls: what ControlNets go by; in a second pass `larger`, at its size.
        adapters: what T2I-Adapters go by, and how much each counts.
    """

    spec: GenerateSpec
    stages: Stages
    output: Sink
    start: Image.Image | masks.Inpainting | None
    controls: tuple[Control, ...]
    console: Console
    settings: Mapping[str, Any]
    preview: Preview | None = None
    pictures: tuple[Image.Image, ...] = ()
    larger: tuple[Control, ...] = ()
    adapters: tuple[tuple[Image.Image, float], ...] = ()

    def make_all(self, jobs: JobList) -> list[GeneratedImage]:
        """Make all images; where the memory is too small for as many at once as were asked for, go on with fewer."""
        made: list[GeneratedImage] = []
        size = self.stages.first.spec.images
        while len(made) < len(jobs):
            try:
                made += self.make(jobs, len(made), size)
                continue
            except MemoryShortage as error:
                batch = jobs.batch(len(made), size)
                size = self._halved(len(self._filled(batch, size)), error)
            memory.release()  # here the failed call's tensors are gone: the exception had them
        return made

    def make(self, jobs: JobList, first: int, size: int) -> list[GeneratedImage]:
        """Make the batch of `size` images that starts at the job `first`, and save its images."""
        start = time.perf_counter()
        batch = jobs.batch(first, size)
        made = self._denoise(batch_name(batch, first + 1, len(jobs)), batch, size)
        self.stages.check_weights()
        found = []
        for number, (job, image) in enumerate(zip(batch, made, strict=True), first + 1):
            own = replace(self.spec, negative_prompt=self._negative(job))
            metadata = metadata_of(own, self.stages.first, self.settings, job, size)
            path = self.output.save(image, metadata, prompt=job.prompt, seed=job.seed)
            self.console.note(f"{batch_name([job], number, len(jobs))}: {path}")
            found.append((path, job, image))
        seconds = (time.perf_counter() - start) / len(batch)
        return [
            GeneratedImage(path, job.seed, job.prompt, self._negative(job), image.width, image.height, seconds)
            for path, job, image in found
        ]

    def _halved(self, size: int, error: MemoryShortage) -> int:
        """Half as many images at once, with a word on that; the error itself where one is too many already."""
        if size == 1:
            raise error
        half = size // 2
        if not self.stages.takes(half):
            raise MemoryShortage(
                error.message, hint=f"use --batch-size {half}: it gets engines of its own, these don't take so few"
            ) from error
        self.console.warn(f"{error.message}: going on with --batch-size {half}")
        return half

    def _denoise(self, name: str, batch: Sequence[Job], size: int) -> list[Image.Image]:
        """One call of the pipeline, and of its refiner or of a second pass."""
        call, stages = self._call(self._filled(batch, size)), self.stages
        made = self._run(stages.first, call, name, size, leaves_latents=stages.passes_latents)
        if stages.refiner is not None:
            after = replace(
                call, start=made, until=None, after=stages.refiner.start, pictures=(), controls=(), adapters=()
            )
            made = self._run(stages.refiner.opened, after, "refiner", size)
        if stages.upscaler is not None:
            second = replace(stages.upscaler.second(call, made), controls=self.larger)
            made = self._run(stages.upscaler.opened, second, "second pass", size)
        pictures: list[Image.Image] = made[: len(batch)]
        return [self.start.finished(one) for one in pictures] if isinstance(self.start, masks.Inpainting) else pictures

    def _run(
        self, opened: OpenPipeline, call: PipelineCall, name: str, size: int, *, leaves_latents: bool = False
    ) -> Any:
        """Pixels, or latents, of one pipeline's call, which are finite."""
        finite = Finite()
        with out_of_memory(opened.spec, size), finite.watching(opened.pipe):
            steps = call.count_unet_calls(opened)
            with self.console.bar(name, steps) as advance:
                kind: Literal["pil", "latent"] = "latent" if leaves_latents else "pil"
                preview = self.preview if opened is self.stages.first else None
                made = call.run(opened, output_type=kind, advance=advance, preview=preview)
        self._check_finite(finite.first_bad(), steps, opened)
        return made

    def _filled(self, batch: Sequence[Job], size: int) -> Sequence[Job]:
        """The last batch, filled up with what is made in vain, where an engine takes full batches only."""
        return batch if self.stages.takes(len(batch)) else [*batch, *[batch[-1]] * (size - len(batch))]

    def _call(self, batch: Sequence[Job]) -> PipelineCall:
        """The call of the pipeline that makes a batch."""
        spec, start = self.spec, self.start
        image, mask = (start.image, start.covered) if isinstance(start, masks.Inpainting) else (start, None)
        return PipelineCall(
            prompts=tuple(job.prompt for job in batch),
            seeds=tuple(job.seed for job in batch),
            guidance_scale=spec.guidance_scale,
            negative_prompt=spec.negative_prompt,
            start=image,
            strength=spec.strength,
            mask=mask,
            pictures=self.pictures,
            conditioning=spec.conditioning,
            until=None if self.stages.refiner is None else self.stages.refiner.start,
            generators=generators_of([job.seed for job in batch]),
            controls=self.controls,
            adapters=self.adapters,
            image_guidance_scale=spec.image_guidance_scale,
            negative_prompts=tuple(map(self._negative, batch)),
        )

    def _negative(self, job: Job) -> str:
        return self.spec.negative_prompt if job.negative_prompt is None else job.negative_prompt

    def _check_finite(self, bad: str | None, steps: int, opened: OpenPipeline) -> None:
        """Refuse an image that would come out black."""
        if bad is None:
            return
        pipeline_spec = opened.spec
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


def _takes(opened: OpenPipeline, count: int) -> bool:
    """Whether all engines of a pipeline take so many images at once."""
    spec = opened.spec
    fewer = replace(spec, images=count, sizes=replace(spec.sizes, batch=spec.sizes.batch // spec.images * count))
    return all(
        find.slack(entry.engine_key.profiles, fewer.sizes_of(name, entry.engine_key.component)) is not None
        for name, entry in opened.entries.items()
    )

"""Text, or an image and text, to images: one path for txt2img and img2img, with diffusers' own pipelines."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from sdtrt import __version__, engines, host, images, memory, models, schedulers
from sdtrt.cache import EngineDirectory, Entry
from sdtrt.components import DTYPES
from sdtrt.console import Console, quiet_libraries
from sdtrt.errors import EngineError, MemoryShortage, ModelError, UsageError
from sdtrt.models import Model
from sdtrt.modules import TextEncoderFacade, UNetFacade, VaeFacade
from sdtrt.parts import (
    TEXT_ENCODERS,
    VAE_HALVES,
    choose_components,
    components_of,
    contract_of,
    part_of,
    sizes_of,
)
from sdtrt.runtime import open_session
from sdtrt.runtime.scratch import Scratch
from sdtrt.runtime.session import Session
from sdtrt.specs import DEFAULT_TOKENS, SIZE_MULTIPLE, Backend, Component, GenerateSpec, Precision, SchedulerName, Sizes

RANDOM_SEEDS = 2**32
SHOWN_TOKENS = 100  # of a prompt that is too long
LARGE_AREA = 4  # times the model's own number of pixels: above, a model repeats itself and runs long


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
class Plan:
    """How one model runs: settled before anything heavy is loaded.

    Args:
        sizes: of a UNet call; `height` and `width` are the images'.
        steps: denoising steps, all of them (img2img runs a part).
        img2img: start from an image.
        scheduler: None for the model's own.
        components: those that engines are to run; None for the backend's default.
        images: made by one pipeline call.
    """

    model: Model
    backend: Backend
    precision: Precision
    sizes: Sizes
    steps: int
    img2img: bool = False
    scheduler: SchedulerName | None = None
    components: tuple[Component, ...] | None = None
    images: int = 1

    @property
    def in_engines(self) -> tuple[Component, ...]:
        """The components that engines run: of those that are wanted, what the pipeline calls at all."""
        if self.backend == "torch":
            return ()
        wanted = components_of(self.model) if self.components is None else self.components
        return tuple(name for name in wanted if self.img2img or name != "vae_encoder")

    @property
    def device(self) -> torch.device:
        """Where the whole pipeline runs."""
        on_gpu = self.backend in ("tensorrt", "tensorrt-rtx") or (self.backend == "torch" and torch.cuda.is_available())
        return torch.device("cuda" if on_gpu else "cpu")

    @property
    def parts_dtype(self) -> torch.dtype:
        """The dtype of what no engine runs: guidance and scheduler, and parts that are left to PyTorch.

        fp32 beside engines. PyTorch's own pipeline has one dtype for all; in fp16 its noise is another than in fp32.
        """
        if self.backend != "torch":
            return torch.float32
        dtype = getattr(torch, DTYPES[self.precision])
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class OpenPipeline:
    """A diffusers pipeline that is ready to run, and the engines in it."""

    pipe: Any
    plan: Plan
    entries: Mapping[Component, Entry]

    @property
    def entry(self) -> Entry | None:
        """The UNet's engine; None where PyTorch runs it."""
        return self.entries.get("unet")


def generate(spec: GenerateSpec, directory: EngineDirectory, console: Console) -> GenerateReport:
    """Make the images of a request, batch after batch; each is saved as soon as it is done.

    Every image has a generator of its own on the CPU: a seed gives the same image whatever else is asked for, on a CPU
    and on a GPU alike up to rounding. Alone in its pipeline call (`batch_size` 1) it is the same to the last bit; in a
    larger batch sums may be rounded in another order.

    Where the memory is too small for a batch, it goes on with batches of half as many.

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
            made = run.make_all(jobs)
    facts = {name: engine_facts(entry) for name, entry in opened.entries.items()}
    return GenerateReport(tuple(made), run.settings, facts, load_seconds)


def _jobs(spec: GenerateSpec) -> list[Job]:
    """Every prompt starts at the seed and counts up from it."""
    first = spec.seed if spec.seed is not None else secrets.randbelow(RANDOM_SEEDS)
    return [Job(prompt, first + number) for prompt in spec.prompts for number in range(spec.num_images)]


def plan_image(spec: GenerateSpec, model: Model, console: Console) -> Plan:
    """How a request from text alone runs: backend, precision and size. Refuses what can't run."""
    return _plan(spec, model, None, console)


def _plan(spec: GenerateSpec, model: Model, init: images.InitImage | None, console: Console) -> Plan:
    """Backend, precision and size of a request. No batch is larger than there are images to make."""
    backend = engines.choose_backend(spec.backend, console)
    precision = spec.precision or engines.default_precision(backend)
    height, width = _image_size(spec, model, init, console)
    count = min(spec.batch_size, len(spec.prompts) * spec.num_images)
    plan = Plan(
        model,
        backend,
        precision,
        unet_sizes(model, count, height, width, guidance=spec.uses_guidance),
        spec.steps,
        img2img=init is not None,
        scheduler=spec.scheduler,
        components=choose_components(model, spec.components) if spec.components else None,
        images=count,
    )
    check_plan(plan)
    _note_parts(plan, console)
    return plan


def _note_parts(plan: Plan, console: Console) -> None:
    """Say what a choice of components means: which of them are not called at all, and what PyTorch runs, in fp32."""
    if not plan.components or plan.backend == "torch":
        return
    idle = [name for name in plan.components if name not in plan.in_engines]
    if not plan.in_engines:
        raise UsageError(
            f"--component {' --component '.join(idle)} leaves no engine to run", hint="name what txt2img uses, as unet"
        )
    if idle:
        console.note(f"{', '.join(idle)}: not called without an init image")
    rest = [name for name in components_of(plan.model) if name not in (*plan.components, "vae_encoder")]
    if rest:
        console.note(f"{', '.join(rest)}: in PyTorch, in fp32")


def unet_sizes(model: Model, images: int, height: int, width: int, *, guidance: bool) -> Sizes:
    """The size of the UNet calls that make so many images at once."""
    tokens = model.config(_encoders(model)[0]).get("max_position_embeddings", DEFAULT_TOKENS)
    return Sizes(images * (2 if guidance else 1), height, width, tokens)


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


def check_plan(plan: Plan) -> None:
    """Refuse what no engine can run, before anything is exported."""
    if plan.device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"{plan.backend} needs an NVIDIA GPU and a CUDA build of PyTorch",
            hint="run: sdtrt doctor; or --backend auto",
        )
    if plan.backend == "torch":
        return
    for component in plan.in_engines:
        contract_of(plan.model, component, plan.precision)
    if plan.model.vae_scale_factor != SIZE_MULTIPLE:
        raise ModelError(
            f"engines need a VAE of factor {SIZE_MULTIPLE}, that of {plan.model.spec.name} has"
            f" {plan.model.vae_scale_factor}",
            hint="use --backend torch for this model",
        )


def _encoders(model: Model) -> list[Component]:
    """The names of the model's text encoders (SDXL has two, its refiner the second only)."""
    return [name for name in TEXT_ENCODERS if name in model.parts]


@contextmanager
def open_pipeline(
    plan: Plan,
    directory: EngineDirectory,
    console: Console,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> Iterator[OpenPipeline]:
    """Load what a plan needs and no more, with the engines' facades as the parts that they replace.

    The scheduler comes first, so that too many steps are refused before an engine is built.

    Args:
        unet_engine: the UNet's engine, whatever weights it was built from; None to find or build the one that fits.
    """
    parts = models.load_parts(plan.model, ["scheduler"], torch.float32)
    parts["scheduler"] = schedulers.make_scheduler(plan.scheduler, parts["scheduler"])
    schedulers.check_steps(parts["scheduler"], plan.steps)
    if plan.backend != "torch":  # that one stays diffusers' own, to be compared with
        schedulers.keep_on_host(parts["scheduler"])
    with _open_engines(plan, directory, console, allow_build, unet_engine) as running, torch.no_grad():
        with console.stage("loading the pipeline"):
            parts |= _load_parts(plan, running)
            parts |= _facades(plan, running, parts.get("vae"))
        yield OpenPipeline(_assemble(plan, parts), plan, running.entries)


@dataclass(frozen=True)
class _Running:
    """The engines of a pipeline, and the sessions that run them."""

    entries: dict[Component, Entry] = field(default_factory=dict)
    sessions: dict[Component, Session[torch.Tensor]] = field(default_factory=dict)

    def covers(self, part: str, img2img: bool) -> bool:
        """Whether engines do all that the pipeline asks of a part."""
        names = (VAE_HALVES if img2img else VAE_HALVES[:1]) if part == "vae" else (part,)
        return all(name in self.sessions for name in names)


def engines_of(
    plan: Plan,
    directory: EngineDirectory,
    console: Console,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> dict[Component, Entry]:
    """Find or build the engines of a plan; none for the torch backend. `unet_engine`: as of `open_pipeline`."""
    given: dict[Component, Entry] = {} if unet_engine is None else {"unet": unet_engine}
    return given | engines.ensure_engines(
        plan.model,
        plan.backend,
        plan.precision,
        plan.sizes,
        directory,
        [name for name in plan.in_engines if name not in given],
        images=plan.images,
        allow_build=allow_build,
        console=console,
    )


@contextmanager
def _open_engines(
    plan: Plan, directory: EngineDirectory, console: Console, allow_build: bool, unet_engine: Entry | None
) -> Iterator[_Running]:
    """Find or build the engines of a plan, then open all of them."""
    if not plan.in_engines:
        yield _Running()
        return
    entries = engines_of(plan, directory, console, allow_build=allow_build, unet_engine=unet_engine)
    _check_memory(plan, entries)
    scratch = Scratch()  # the parts of a pipeline run one after the other
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(open_session(entries[name], plan.device, scratch))
            for name in memory.by_scratch(entries)
        }
        yield _Running(entries, sessions)


def _check_memory(plan: Plan, entries: Mapping[Component, Entry]) -> None:
    """Refuse a request whose engines can't fit in the GPU's memory, with a size that would."""
    free = memory.free_bytes(plan.device)
    if free is None:
        return
    demand = memory.demand_of(entries, plan.sizes, plan.images)
    if demand.total <= free:
        return
    size = f"{plan.sizes.width}x{plan.sizes.height} pixels" + f", {plan.images} at once" * (plan.images > 1)
    need, left = (f"{count / 2**30:.2f} GiB" for count in (demand.total, free))
    raise MemoryShortage(
        f"the engines for {size} need {need} of GPU memory, and {left} are free",
        hint=_what_fits(plan, demand, free),
    )


def _what_fits(plan: Plan, demand: memory.Demand, free: int) -> str:
    """The hint for engines that are too large for the GPU."""
    found = memory.fitting(demand, free, plan.sizes, plan.images)
    if found is None:
        smaller = "use --precision fp16, " if plan.precision == "fp32" else ""
        return f"end other programs on the GPU, {smaller}or use a GPU with more memory: the weights alone take too much"
    count, sizes = found
    side = f"--height {sizes.height} --width {sizes.width}"
    words = [f"--batch-size {count}"] * (count < plan.images) + [side] * (sizes.height < plan.sizes.height)
    fits = f"use {' '.join(words)}" if words else "that size fits"
    if demand.scratch <= demand.wanted:
        return f"{fits}, or end other programs on the GPU"
    build = f"sdtrt build --batch {sizes.batch} {side}"
    return f"{fits} with engines for nothing larger ({build}), or end other programs on the GPU"


def _load_parts(plan: Plan, running: _Running) -> dict[str, Any]:
    """What PyTorch runs, on the plan's device, and the tokenizers."""
    encoders = _encoders(plan.model)
    modules = [name for name in ("unet", *encoders, "vae") if not running.covers(name, plan.img2img)]
    names = [*(name.replace("text_encoder", "tokenizer") for name in encoders), *modules]
    parts = {"unet": models.load_unet(plan.model, plan.parts_dtype)} if "unet" in names else {}
    parts |= models.load_parts(plan.model, [name for name in names if name != "unet"], plan.parts_dtype)
    for half in VAE_HALVES:
        if "vae" in modules and half in running.sessions:
            setattr(parts["vae"], half.removeprefix("vae_"), None)
    for name in modules:
        parts[name].to(plan.device).eval()
    return parts


def _facades(plan: Plan, running: _Running, vae: Any) -> dict[str, torch.nn.Module]:
    """What stands in for the parts that engines run; `vae` is PyTorch's, where a half of it has no engine."""
    facades: dict[str, torch.nn.Module] = {}
    for name, session in running.sessions.items():
        config = plan.model.config(part_of(name))
        if name == "unet":
            facades[name] = UNetFacade(session, session.contract, config, plan.device)
        elif name in TEXT_ENCODERS:
            facades[name] = TextEncoderFacade(session, config, plan.device, plan.parts_dtype)
        else:
            decoder, encoder = (running.sessions.get(half) for half in VAE_HALVES)
            facades["vae"] = VaeFacade(config, plan.device, decoder=decoder, encoder=encoder, rest=vae)
    return facades


def _assemble(plan: Plan, parts: Mapping[str, Any]) -> Any:
    """diffusers' own pipeline of these parts, by its constructor."""
    options: dict[str, Any]
    if plan.model.is_sdxl:
        cls = diffusers.StableDiffusionXLImg2ImgPipeline if plan.img2img else diffusers.StableDiffusionXLPipeline
        zeros = plan.model.pipeline_options.get("force_zeros_for_empty_prompt", True)
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    else:
        cls = diffusers.StableDiffusionImg2ImgPipeline if plan.img2img else diffusers.StableDiffusionPipeline
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = cls(**parts, **options)
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
    """Watches what the parts of a pipeline give each other: the UNet's inputs and outputs, and the VAE's decoding.

    It asks the device nothing until the end: no step waits for it. (Pixels would be too late: their clamping turns
    infinities into white and black.)
    """

    def __init__(self) -> None:
        self.flags: list[torch.Tensor] = []
        self.sources: list[str] = []
        self.step = 0

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Note what the parts of a pipeline give, for the time of a `with`."""
        decode = pipe.vae.decode

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = decode(*args, **kwargs)
            self._add("vae_decoder", result[0])
            return result

        pipe.vae.decode = watched
        try:
            with hooked(pipe.unet, self._add_step):
                yield
        finally:
            del pipe.vae.decode

    def _add_step(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one call of the UNet: its output, and before the first step what other parts have made for it."""
        if self.step == 0:
            self._add("text_encoder", kwargs["encoder_hidden_states"])
            self._add("vae_encoder", args[0])
        self.step += 1
        self._add(f"unet at denoising step {self.step}", output[0])

    def _add(self, source: str, tensor: torch.Tensor) -> None:
        self.sources.append(source)
        self.flags.append(torch.isfinite(tensor).all())

    def first_bad(self) -> str | None:
        """The first source of values that were not finite."""
        finite = torch.stack(self.flags).tolist() if self.flags else []
        return self.sources[finite.index(False)] if False in finite else None


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook` after each forward of a module, with its arguments and its output, for the time of a `with`."""
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Run:
    """One request on an open pipeline."""

    spec: GenerateSpec
    opened: OpenPipeline
    output: images.OutputPlan
    init: images.InitImage | None
    console: Console
    settings: Mapping[str, Any]

    def make_all(self, jobs: Sequence[Job]) -> list[GeneratedImage]:
        """Make all images; where the memory is too small for as many at once as were asked for, go on with fewer."""
        made: list[GeneratedImage] = []
        size = self.opened.plan.images
        while len(made) < len(jobs):
            try:
                made += self.make(jobs, len(made), size)
                continue
            except MemoryShortage as error:
                batch = jobs[len(made) : len(made) + size]
                size = self._halved(len(self._filled(batch, size)), error)
            memory.release()  # here the failed call's tensors are gone: the exception had them
        return made

    def make(self, jobs: Sequence[Job], first: int, size: int) -> list[GeneratedImage]:
        """Make the batch of `size` images that starts at the job `first`, and save its images."""
        start = time.perf_counter()
        batch = jobs[first : first + size]
        made = self._denoise(_batch_name(batch, first + 1, len(jobs)), batch, size)
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
        pipe, finite = self.opened.pipe, _Finite()
        steps = len(self._timesteps())
        watching = finite.watching(pipe)
        with self.console.bar(name, steps) as advance, out_of_memory(self.opened.plan, size), watching:

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
        plan = self.opened.plan
        unet = replace(plan.sizes, batch=plan.sizes.batch // plan.images * count)
        return all(
            engines.slack(entry.key, sizes_of(name, unet, count)) is not None
            for name, entry in self.opened.entries.items()
        )

    def _timesteps(self) -> Any:
        """The timesteps that the pipeline will run: PNDM has one more than steps, Heun nearly twice as many."""
        pipe, spec = self.opened.pipe, self.spec
        pipe.scheduler.set_timesteps(spec.steps, device=self.opened.plan.device)
        if self.init is None:
            return pipe.scheduler.timesteps
        return pipe.get_timesteps(spec.steps, spec.strength, self.opened.plan.device)[0]

    def _arguments(self, batch: Sequence[Job]) -> dict[str, Any]:
        """The pipeline's arguments."""
        spec, sizes = self.spec, self.opened.plan.sizes
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
        plan = self.opened.plan
        where = f"{bad} of {steps}" if bad.startswith("unet") else bad
        hint = "use --precision fp32"
        if plan.precision == "fp32":
            hint = "the model's weights may be damaged; try another --scheduler or --guidance-scale, or --backend torch"
        if plan.backend != "torch" and bad.startswith("unet"):
            hint += "; sdtrt verify holds the engine against PyTorch"
        raise EngineError(
            f"{where} gave values that are not finite ({plan.backend}, {plan.precision}): no image was made", hint=hint
        )

    def _metadata(self, prompt: str, seed: int, size: int) -> images.Metadata:
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
        "batch_size": plan.images,
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


def engine_facts(entry: Entry) -> dict[str, str]:
    """Which engine it was."""
    return {"name": entry.name, "digest": entry.digest}


@contextmanager
def out_of_memory(plan: Plan, images: int | None = None) -> Iterator[None]:
    """Turn failures to allocate into a `MemoryShortage` (PyTorch's on the CPU is a bare `RuntimeError`).

    Args:
        images: made at once, if not as many as planned.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        texts = ("can't allocate memory", "not enough memory")
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(text in str(error) for text in texts):
            raise
        count = images or plan.images
        size = f"{plan.sizes.width}x{plan.sizes.height} pixels" + f", {count} at once," * (count > 1)
        raise MemoryShortage(
            f"out of memory at {size} with {plan.backend} in {plan.precision}",
            hint="use a smaller --height and --width" + ", or --batch-size" * (count > 1),
        ) from error

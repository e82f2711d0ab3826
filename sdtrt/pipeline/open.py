"""How a request runs, and diffusers' own pipelines with engines in the place of their parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch

from sdtrt.backends import registry
from sdtrt.backends.open import open_session
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, MemoryShortage, ModelChangedError, ModelError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import Sight
from sdtrt.models import loading
from sdtrt.models.components import (
    TEXT_ENCODERS,
    VAE_HALVES,
    choose_components,
    components_of,
    contract_of,
    part_of,
    text_encoders_of,
    unet_batch,
)
from sdtrt.models.resolve import Model
from sdtrt.models.weights import WEIGHT_NAMES
from sdtrt.pipeline import images, memory, preloaded, schedulers
from sdtrt.pipeline.facades import TextEncoderFacade, UNetFacade, VaeFacade
from sdtrt.specs import (
    DEFAULT_TOKENS,
    SIZE_MULTIPLE,
    Backend,
    Component,
    GenerateSpec,
    NoiseSpec,
    Precision,
    SchedulerName,
    Sizes,
)
from sdtrt.specs.contract import DTYPES

LARGE_AREA = 4  # times the model's own number of pixels: above, a model repeats itself and runs long


@dataclass(frozen=True)
class PipelineSpec:
    """How one model runs: settled before anything heavy is loaded.

    Args:
        sizes: of a UNet call; `height` and `width` are the images'.
        steps: denoising steps, all of them (img2img runs a part).
        img2img: start from an image.
        scheduler: None for the model's own.
        components: those that engines are to run; None for the backend's default.
        images: made by one pipeline call.
        noise: what was asked for; the rest is as the model's checkpoint says, then as its scheduler's configuration.
        texts: that are to be encoded, prompts and negative ones, as far as they are known already.
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
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    texts: tuple[str, ...] = ()

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
    """A diffusers pipeline that is ready to run, the engines in it, and the files that its parts were read from."""

    pipe: Any
    spec: PipelineSpec
    entries: Mapping[Component, Entry]
    files: Sight

    def check_weights(self) -> None:
        """Raise `ModelChangedError` where weights that this pipeline has mapped into memory were written meanwhile."""
        if self.spec.device.type == "cpu":  # a GPU has copies
            called = (name for name in components_of(self.spec.model) if self.spec.img2img or name != "vae_encoder")
            self.files.check_mapped({part_of(name) for name in called if name not in self.entries})

    @property
    def entry(self) -> Entry | None:
        """The UNet's engine; None where PyTorch runs it."""
        return self.entries.get("unet")


def resolve_request(
    spec: GenerateSpec, model: Model, console: Console, init: images.InitImage | None = None
) -> PipelineSpec:
    """How a request runs: backend, precision and size; no batch is larger than there are images to make.

    Raises:
        EngineError, ModelError, UsageError: for what can't run.
    """
    check_task(model, img2img=init is not None)
    backend = registry.choose_backend(spec.backend, console)
    precision = spec.precision or registry.default_precision(backend)
    height, width = _image_size(spec, model, init, console)
    count = spec.images_at_once
    pipeline_spec = PipelineSpec(
        model,
        backend,
        precision,
        unet_sizes(model, count, height, width, guidance=spec.uses_guidance),
        spec.steps,
        img2img=init is not None,
        scheduler=spec.scheduler,
        components=choose_components(model, spec.components) if spec.components else None,
        images=count,
        noise=spec.noise,
        texts=tuple(dict.fromkeys((*spec.prompts, spec.negative_prompt))),
    )
    check_spec(pipeline_spec)
    note_noise(spec.noise, model, console)
    _note_parts(pipeline_spec, console)
    return pipeline_spec


def check_task(model: Model, *, img2img: bool) -> None:
    """Refuse a model that lacks a part, or that makes no images from text alone.

    Raises:
        ModelError: where a single file lacks a part, naming it.
        UsageError: for SDXL's refiner without an image.
    """
    model.check_has()
    if model.is_refiner and not img2img:
        raise UsageError(
            f"{model.name} is a refiner: it changes images, and makes none from text alone",
            hint="use sdtrt img2img --init-image FILE, or another model (bench: --task img2img)",
        )


def note_noise(asked: NoiseSpec, model: Model, console: Console) -> None:
    """Say where the scheduler does not go by the model's configuration, and why."""
    if said := asked.over(model.stated).describe():
        console.note(f"noise: {said}")


def _note_parts(spec: PipelineSpec, console: Console) -> None:
    """Say what a choice of components means: which of them are not called at all, and what PyTorch runs, in fp32."""
    if not spec.components or spec.backend == "torch":
        return
    idle = [name for name in spec.components if name not in spec.in_engines]
    if not spec.in_engines:
        raise UsageError(
            f"--component {' --component '.join(idle)} leaves no engine to run", hint="name what txt2img uses, as unet"
        )
    if idle:
        console.note(f"{', '.join(idle)}: not called without an init image")
    rest = [name for name in components_of(spec.model) if name not in (*spec.components, "vae_encoder")]
    if rest:
        console.note(f"{', '.join(rest)}: in PyTorch, in fp32")


def unet_sizes(model: Model, images: int, height: int, width: int, *, guidance: bool) -> Sizes:
    """The size of the UNet calls that make so many images at once."""
    tokens = model.config(text_encoders_of(model)[0]).get("max_position_embeddings", DEFAULT_TOKENS)
    return Sizes(unet_batch(images, guidance=guidance), height, width, tokens)


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


def check_spec(spec: PipelineSpec) -> None:
    """Refuse what no engine can run, before anything is exported.

    Raises:
        EngineError: where the backend needs a GPU that PyTorch can't use.
        ModelError: for a model that engines don't serve.
    """
    if spec.device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"{spec.backend} needs an NVIDIA GPU and a CUDA build of PyTorch",
            hint="run: sdtrt doctor; or --backend auto",
        )
    if spec.backend == "torch":
        return
    for component in spec.in_engines:
        contract_of(spec.model, component, spec.precision)
    if spec.model.vae_scale_factor != SIZE_MULTIPLE:
        raise ModelError(
            f"engines need a VAE of factor {SIZE_MULTIPLE}, that of {spec.model.spec.name} has"
            f" {spec.model.vae_scale_factor}",
            hint="use --backend torch for this model",
        )


@contextmanager
def open_pipeline(
    spec: PipelineSpec,
    directory: EngineDirectory,
    console: Console,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> Iterator[OpenPipeline]:
    """Load what a pipeline needs and no more, with the engines' facades as the parts that they replace.

    Scheduler and tokenizers come first, so that what they can't do is refused before an engine is built. PyTorch's grad
    mode stays the caller's own: the weights of what PyTorch runs are frozen, and engines refuse what asks for a
    gradient.

    Args:
        unet_engine: the UNet's engine, whatever weights it was built from; None to find or build the one that fits.
    """
    parts = {"scheduler": _load_scheduler(spec)} | _load_tokenizers(spec)
    schedulers.check_steps(parts["scheduler"], spec.steps, img2img=spec.img2img)
    if spec.backend != "torch":  # that one stays diffusers' own, to be compared with
        schedulers.keep_on_host(parts["scheduler"])
    with _open_engines(spec, directory, console, allow_build, unet_engine) as running:
        with console.stage("loading the pipeline"):
            files = Sight(spec.model, (name for name in WEIGHT_NAMES if name in spec.model.parts))
            with files.steady():
                parts |= _load_parts(spec, running)
                _check_weights(spec, running, directory, given=unet_engine)
            parts |= _facades(spec, running, parts.get("vae"))
        pipe = _assemble(spec, parts)
        if running.sessions:
            _refuse_as_a_whole(pipe, running.sessions)
        yield OpenPipeline(pipe, spec, running.entries, files)


def _load_scheduler(spec: PipelineSpec) -> Any:
    """The model's own scheduler, or the one of another name, which does without the own one's class."""
    try:
        own = loading.load_parts(spec.model, ["scheduler"], torch.float32)["scheduler"]
    except ModelError:
        if spec.scheduler is None:
            raise
        own = schedulers.Settings(loading.scheduler_config(spec.model))
    made = schedulers.make_scheduler(spec.scheduler, own)
    return schedulers.with_noise(made, spec.noise.over(spec.model.stated))


def _load_tokenizers(spec: PipelineSpec) -> dict[str, Any]:
    """The tokenizers, by name; they have made tokens of the texts, which the text encoders know."""
    encoders = {name.replace("text_encoder", "tokenizer"): name for name in text_encoders_of(spec.model)}
    tokenizers = loading.load_parts(spec.model, list(encoders), torch.float32)
    for name, tokenizer in tokenizers.items():
        vocabulary = spec.model.config(encoders[name]).get("vocab_size", loading.CLIP_VOCABULARY)
        loading.check_words(tokenizer, spec.texts, vocabulary)
    return tokenizers


def _check_weights(spec: PipelineSpec, running: _Running, directory: EngineDirectory, given: Entry | None) -> None:
    """Refuse engines of other weights than the model has by now; one that is `given` may be of any."""
    for name, entry in running.entries.items():
        part = part_of(name)
        if entry != given and entry.key["export"]["fingerprint"] != spec.model.fingerprint(part, directory.file_digest):
            raise ModelChangedError(
                f"the {part} of {spec.model.name} was replaced while its engine was found or built",
                hint="run the command again",
            )


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
    spec: PipelineSpec,
    directory: EngineDirectory,
    console: Console,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> dict[Component, Entry]:
    """Find or build the engines of a pipeline; none for the torch backend. `unet_engine`: as of `open_pipeline`."""
    given: dict[Component, Entry] = {} if unet_engine is None else {"unet": unet_engine}
    return given | registry.ensure_engines(
        spec.model,
        spec.backend,
        spec.precision,
        spec.sizes,
        directory,
        [name for name in spec.in_engines if name not in given],
        images=spec.images,
        allow_build=allow_build,
        console=console,
    )


@contextmanager
def _open_engines(
    spec: PipelineSpec, directory: EngineDirectory, console: Console, allow_build: bool, unet_engine: Entry | None
) -> Iterator[_Running]:
    """Find or build the engines of a pipeline, then open all of them."""
    if not spec.in_engines:
        preloaded.let_go()
        yield _Running()
        return
    entries = engines_of(spec, directory, console, allow_build=allow_build, unet_engine=unet_engine)
    scratch = Scratch()  # the parts of a pipeline run one after the other
    with ExitStack() as stack:
        with preloaded.taken(entries.values()) as loaded:
            _check_memory(spec, entries, loaded)
            sessions = {
                name: stack.enter_context(open_session(entries[name], spec.device, scratch))
                for name in memory.by_scratch(entries)
            }
        yield _Running(entries, sessions)


def _check_memory(spec: PipelineSpec, entries: Mapping[Component, Entry], loaded: Collection[Path] = ()) -> None:
    """Refuse a request whose engines can't fit in the GPU's memory, with a size that would.

    Args:
        loaded: folders of those whose plans lie there already.
    """
    free = memory.free_bytes(spec.device)
    if free is None:
        return
    free += memory.weights_of(entry for entry in entries.values() if entry.path in loaded)
    demand = memory.demand_of(entries, spec.sizes, spec.images)
    if demand.total <= free:
        return
    size = f"{spec.sizes.width}x{spec.sizes.height} pixels" + f", {spec.images} at once" * (spec.images > 1)
    need, left = (f"{count / 2**30:.2f} GiB" for count in (demand.total, free))
    raise MemoryShortage(
        f"the engines for {size} need {need} of GPU memory, and {left} are free",
        hint=_what_fits(spec, demand, free),
    )


def _what_fits(spec: PipelineSpec, demand: memory.Demand, free: int) -> str:
    """The hint for engines that are too large for the GPU."""
    found = memory.fitting(demand, free, spec.sizes, spec.images)
    if found is None:
        smaller = "use --precision fp16, " if spec.precision == "fp32" else ""
        return f"end other programs on the GPU, {smaller}or use a GPU with more memory: the weights alone take too much"
    count, sizes = found
    side = f"--height {sizes.height} --width {sizes.width}"
    words = [f"--batch-size {count}"] * (count < spec.images) + [side] * (sizes.height < spec.sizes.height)
    fits = f"use {' '.join(words)}" if words else "that size fits"
    if demand.scratch <= demand.wanted:
        return f"{fits}, or end other programs on the GPU"
    build = f"sdtrt build --batch {sizes.batch} {side}"
    return f"{fits} with engines for nothing larger ({build}), or end other programs on the GPU"


def _load_parts(spec: PipelineSpec, running: _Running) -> dict[str, Any]:
    """What PyTorch runs, on the pipeline's device."""
    encoders = text_encoders_of(spec.model)
    modules = [name for name in ("unet", *encoders, "vae") if not running.covers(name, spec.img2img)]
    parts = {"unet": loading.load_unet(spec.model, spec.parts_dtype)} if "unet" in modules else {}
    parts |= loading.load_parts(spec.model, [name for name in modules if name != "unet"], spec.parts_dtype)
    for half in VAE_HALVES:
        if "vae" in modules and half in running.sessions:
            setattr(parts["vae"], half.removeprefix("vae_"), None)
    for name in modules:
        parts[name].to(spec.device).eval()
    return parts


def _facades(spec: PipelineSpec, running: _Running, vae: Any) -> dict[str, torch.nn.Module]:
    """What stands in for the parts that engines run; `vae` is PyTorch's, where a half of it has no engine."""
    facades: dict[str, torch.nn.Module] = {}
    for name, session in running.sessions.items():
        config = spec.model.config(part_of(name))
        if name == "unet":
            facades[name] = UNetFacade(session, session.contract, config, spec.device)
        elif name in TEXT_ENCODERS:
            facades[name] = TextEncoderFacade(session, config, spec.device, spec.parts_dtype)
        else:
            decoder, encoder = (running.sessions.get(half) for half in VAE_HALVES)
            facades["vae"] = VaeFacade(config, spec.device, decoder=decoder, encoder=encoder, rest=vae)
    return facades


def _assemble(spec: PipelineSpec, parts: Mapping[str, Any]) -> Any:
    """diffusers' own pipeline of these parts, by its constructor."""
    options: dict[str, Any]
    if spec.model.is_sdxl:
        cls = diffusers.StableDiffusionXLImg2ImgPipeline if spec.img2img else diffusers.StableDiffusionXLPipeline
        zeros = spec.model.pipeline_options.get("force_zeros_for_empty_prompt", True)
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
        options |= {name: None for name in ("tokenizer", "text_encoder") if name not in parts}
        options |= {"requires_aesthetics_score": True} if spec.model.is_refiner else {}
    else:
        cls = diffusers.StableDiffusionImg2ImgPipeline if spec.img2img else diffusers.StableDiffusionPipeline
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = cls(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


AS_A_WHOLE = (
    "save_pretrained",
    "push_to_hub",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
)


def _refuse_as_a_whole(pipe: Any, names: Iterable[Component]) -> None:
    """Refuse what diffusers would do to half of a pipeline, or begin and not end, before it does anything.

    A method that refuses needs no `self`, so copies of the pipeline may share it.
    """
    for method in AS_A_WHOLE:
        setattr(pipe, method, _refusal(getattr(type(pipe), method), " and ".join(names)))


def _refusal(method: Callable[..., Any], names: str) -> Callable[..., NoReturn]:
    """A method of a pipeline, by its name and signature, that raises `EngineError`."""

    @functools.wraps(method)
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise EngineError(
            f"{method.__name__} needs the weights of {names}, which engines hold",
            hint="open the pipeline with the backend torch",
        )

    signature = inspect.signature(method)
    own = list(signature.parameters.values())[1:]  # without `self`
    refuse.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return refuse


Hook = Callable[..., None]


class _Hook:
    """Calls a hook for one module. A copy of the module made meanwhile has the hook as well, and it is silent there."""

    def __init__(self, module: torch.nn.Module | None = None, hook: Hook | None = None) -> None:
        self.module, self.hook = module, hook

    def __call__(self, module: torch.nn.Module, *arguments: Any) -> None:
        if module is self.module and self.hook is not None:
            self.hook(module, *arguments)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def end(self) -> None:
        """Let go of both."""
        self.module = self.hook = None


@contextmanager
def hooked(module: torch.nn.Module, hook: Hook) -> Iterator[None]:
    """Call `hook` after each forward of a module, with its arguments and its output, for the time of a `with`."""
    attached = _Hook(module, hook)
    handle = module.register_forward_hook(attached, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        attached.end()


def engine_facts(entry: Entry) -> dict[str, str]:
    """Which engine it was."""
    return {"name": entry.name, "digest": entry.digest}


@contextmanager
def out_of_memory(spec: PipelineSpec, images: int | None = None) -> Iterator[None]:
    """Turn failures to allocate into a `MemoryShortage` (PyTorch's on the CPU is a bare `RuntimeError`).

    Args:
        images: made at once, if not as many as the spec says.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        texts = ("can't allocate memory", "not enough memory")
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(text in str(error) for text in texts):
            raise
        count = images or spec.images
        size = f"{spec.sizes.width}x{spec.sizes.height} pixels" + f", {count} at once," * (count > 1)
        raise MemoryShortage(
            f"out of memory at {size} with {spec.backend} in {spec.precision}",
            hint="use a smaller --height and --width" + ", or --batch-size" * (count > 1),
        ) from error

"""How a request runs: backend, precision, sizes, settled before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from sdtrt.backends import registry
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, ModelError, UsageError
from sdtrt.models.components import (
    TEXT_ENCODERS,
    VAE_HALVES,
    choose_components,
    components_of,
    contract_of,
    groups_of,
    sizes_of,
    text_encoders_of,
    unet_batch,
)
from sdtrt.models.controlnets import PART as CONTROLNET
from sdtrt.models.controlnets import UNION
from sdtrt.models.loading import check_ip_adapters, check_loras
from sdtrt.models.resolve import Model, with_controlnet, with_t2i_adapter
from sdtrt.models.source import ModelSource
from sdtrt.models.t2i_adapters import PART as ADAPTER
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.inputs.text_states import TextPlan, plan_texts
from sdtrt.pipeline.parts.tiles import tile_side
from sdtrt.specs import (
    DEFAULT_TOKENS,
    SIZE_MULTIPLE,
    BackendName,
    Component,
    ControlSpec,
    GenerateSpec,
    Group,
    NoiseSpec,
    Precision,
    Savings,
    SchedulerName,
    Sizes,
)
from sdtrt.specs.contract import DTYPES, embeds_guidance
from sdtrt.specs.deep_features import SHALLOW, default_depth, shallow_groups, whole_group
from sdtrt.specs.presets import told
from sdtrt.specs.savings import few_steps

T = TypeVar("T")
PROMPT_ROWS = "_prompt_rows"  # behind the name of an engine: a second one, for steps without guidance
LARGE_AREA = 4  # times the model's own number of pixels: above, a model repeats itself and runs long


def first_of(name: str) -> str:
    """The name of the engine beside which one serves fewer rows, or shallow steps; its own for a first one."""
    return name.removesuffix(PROMPT_ROWS).removesuffix(SHALLOW)


def shallow_beside(name: str, found: Mapping[str, T]) -> T | None:
    """Of a pipeline's engines, by their names, the one of the shallow steps beside one of the UNet's.

    Where it takes fewer rows as well, there is no other for them.
    """
    if first_of(name) != "unet":
        return None
    usual = "unet" + SHALLOW
    return found.get(usual + PROMPT_ROWS if name.endswith(PROMPT_ROWS) else usual, found.get(usual))


@dataclass(frozen=True)
class EngineRequest:
    """Which engines have to be there.

    Args:
        sizes: of a UNet call.
        components: that engines run; none for a backend without engines.
        images: made by one pipeline call.
        device: where it runs.
        groups: optional ones of inputs that the UNet's is to have.
    """

    model: ModelSource
    backend: BackendName
    precision: Precision
    sizes: Sizes
    components: tuple[Component, ...]
    images: int
    device: torch.device
    groups: tuple[Group, ...] = ()

    def sizes_of(self, component: Component) -> Sizes:
        """The sizes of one call of a component."""
        return sizes_of(component, self.sizes, self.images)

    def precision_of(self, component: Component) -> Precision:
        """The precision of a component's engine."""
        return registry.get(self.backend).precision_of(self.model, component, self.precision)

    @property
    def shallow(self) -> EngineRequest | None:
        """The engine of the UNet's shallow steps; None where no deep feature is given."""
        groups = shallow_groups(self.groups)
        return replace(self, components=("unet",), groups=groups) if groups and "unet" in self.components else None

    def groups_of(self, component: Component) -> tuple[Group, ...]:
        """The optional groups of a component's inputs."""
        return self.groups if component == "unet" else ()


@dataclass(frozen=True)
class PipelineSpec:
    """How one model runs: settled before anything heavy is loaded.

    Args:
        sizes: of a UNet call; `height` and `width` are the images'.
        steps: denoising steps, all of them (img2img runs a part).
        img2img: start from an image.
        inpaint: make what a mask covers of that image; `img2img` is set, too.
        strength: how much of that image is replaced.
        eta: of the scheduler's steps; None for diffusers' default.
        edit: change it as the prompt says, by a model for that; `img2img` is set, too.
        scheduler: None for the model's own.
        components: those that engines are to run; None for the backend's default.
        images: made by one pipeline call.
        noise: what was asked for; the rest is as the model's checkpoint says, then as its scheduler's configuration.
        texts: that are to be encoded, prompts and negative ones, as far as they are known already.
        text: how they become states.
        vae_tiling: whether what is larger than a tile of the VAE's is cut into such.
        others: the model with each further ControlNet in the place of its first one, by the names that their engines
            have among the pipeline's: `controlnet_2`, …
        adapters: the model with each further T2I-Adapter in the place of its first one.
        savings: what of a run's work is left out.
    """

    model: Model
    backend: BackendName
    precision: Precision
    sizes: Sizes
    steps: int
    img2img: bool = False
    inpaint: bool = False
    edit: bool = False
    scheduler: SchedulerName | None = None
    components: tuple[Component, ...] | None = None
    images: int = 1
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    texts: tuple[str, ...] = ()
    text: TextPlan = field(default_factory=TextPlan)
    strength: float = 1.0
    eta: float | None = None
    vae_tiling: bool = False
    others: Mapping[str, Model] = field(default_factory=dict)
    adapters: tuple[Model, ...] = ()
    savings: Savings = field(default_factory=Savings)

    @property
    def has_engines(self) -> bool:
        """Whether the backend has engines at all."""
        return registry.get(self.backend).source is not None

    @property
    def in_engines(self) -> tuple[Component, ...]:
        """The components that engines run: of those that are wanted, what the pipeline calls at all."""
        if not self.has_engines:
            return ()
        wanted = components_of(self.model) if self.components is None else self.components
        called = (name for name in wanted if self.img2img or name != "vae_encoder")
        if self.tile is not None:
            called = (name for name in called if name not in VAE_HALVES)
        return tuple(name for name in called if not (self.text.in_pytorch and name in TEXT_ENCODERS))

    @property
    def tile(self) -> int | None:
        """The side in pixels of the tiles in which PyTorch runs the VAE, as they are of any size; None for no tiles."""
        side = tile_side(self.model) if self.vae_tiling else None
        return side if side is not None and max(self.sizes.height, self.sizes.width) > side else None

    @property
    def engines(self) -> EngineRequest:
        """The engines that it needs, but for those of further ControlNets."""
        return EngineRequest(
            self.model,
            self.backend,
            self.precision,
            self.sizes,
            self.in_engines,
            self.images,
            self.device,
            (*groups_of(self.model), *self.model.groups, *self._deep_groups),
        )

    @property
    def _deep_groups(self) -> tuple[Group, ...]:
        """The group of the UNet's engine that gives a deep feature, where such are kept."""
        caching = self.savings.caching
        if caching.is_off or "unet" not in self.in_engines:
            return ()
        return (whole_group(caching.depth or default_depth(self.model.config("unet"))),)

    @property
    def other_engines(self) -> dict[str, EngineRequest]:
        """The engines of further ControlNets and of the UNet's shallow steps, by their names among the pipeline's."""
        wanted = self.has_engines and (self.components is None or "controlnet" in self.components)
        found = {
            name: replace(self.engines, model=model, components=("controlnet",))
            for name, model in self.others.items()
            if wanted and "controlnet" in components_of(model)
        }
        shallow = self.engines.shallow
        return found if shallow is None else {**found, "unet" + SHALLOW: shallow}

    @property
    def prompt_rows(self) -> int | None:
        """The rows of a UNet call in a step without guidance; None where all steps are guided, or none is."""
        saves = not self.savings.guidance.is_whole and self.sizes.batch > self.images
        return self.images if saves else None

    def sizes_of(self, name: str, component: Component) -> Sizes:
        """The sizes of one call of the engine of a name."""
        sizes = self.engines.sizes_of(component)
        return replace(sizes, batch=self.images) if name.endswith(PROMPT_ROWS) else sizes

    @property
    def is_union(self) -> bool:
        """Whether its ControlNet is a union of several."""
        return CONTROLNET in self.model.parts and self.model.class_name(CONTROLNET) == UNION

    def source_of(self, name: str) -> Model:
        """The model that has what is called so among the pipeline's engines."""
        return self.others.get(name.removesuffix(PROMPT_ROWS), self.model)

    @property
    def device(self) -> torch.device:
        """Where the whole pipeline runs."""
        return torch.device(registry.get(self.backend).device())

    @property
    def parts_dtype(self) -> torch.dtype:
        """The dtype of what no engine runs: guidance and scheduler, and parts that are left to PyTorch.

        fp32 beside engines. PyTorch's own pipeline has one dtype for all; in fp16 its noise is another than in fp32.
        """
        if self.has_engines:
            return torch.float32
        dtype = getattr(torch, DTYPES[self.precision])
        assert isinstance(dtype, torch.dtype)
        return dtype


def resolve_request(
    spec: GenerateSpec,
    model: Model,
    console: Console,
    init: images.InitImage | None = None,
    maps: Sequence[images.InitImage] = (),
    *,
    backend: BackendName | None = None,
) -> PipelineSpec:
    """How a request runs: backend, precision and size; no batch is larger than there are images to make.

    Args:
        maps: what ControlNets go by.
        backend: what `auto` has come to mean; None for the machine to say.

    Raises:
        EngineError, ModelError, UsageError: for what can't run.
    """
    registry.check_request(spec.backend, spec.precision, spec.components)
    _tell_quality(spec, console)
    img2img, inpaint = spec.init_image is not None or init is not None, spec.mask is not None
    check_task(model, img2img=img2img, inpaint=inpaint, edit=spec.edit)
    _check_model(spec, model, img2img=img2img)
    model, others, adapters = _with_beside(spec, model, console)
    backend = backend or registry.choose_backend(spec.backend, console)
    count, text = spec.images_at_once, plan_texts(spec, model)
    sizes = unet_sizes(model, count, *_image_size(spec, model, init, maps, console), guidance=spec.uses_guidance)
    planned = PipelineSpec(
        model,
        backend,
        spec.precision or registry.get(backend).default_precision(),
        replace(sizes, tokens=sizes.tokens * text.chunks),
        spec.steps,
        img2img=img2img,
        inpaint=inpaint,
        edit=spec.edit,
        scheduler=spec.scheduler,
        components=choose_components(model, spec.components) if spec.components else None,
        images=count,
        noise=spec.noise,
        texts=tuple(dict.fromkeys((*spec.prompts, spec.negative_prompt))),
        text=text,
        strength=spec.strength if img2img else 1.0,
        eta=spec.eta,
        vae_tiling=spec.vae_tiling,
        others=others,
        adapters=adapters,
        savings=spec.savings,
    )
    return _settled(planned, console)


def _settled(spec: PipelineSpec, console: Console) -> PipelineSpec:
    """A request with what deep caching comes to in so many steps, checked; what is to be said of it is said."""
    found = _cached(spec, console)
    check_spec(found)
    _note(found, console)
    return found


def _tell_quality(spec: GenerateSpec, console: Console) -> None:
    """Say what a name for how much is saved comes to."""
    if spec.quality is not None:
        console.note(told(spec.quality, spec.savings))


def _check_model(spec: GenerateSpec, model: Model, *, img2img: bool) -> None:
    """Refuse what a model can't take, before anything is read of it."""
    check_loras(model)
    check_ip_adapters(model)
    if spec.conditioning.given and not model.is_sdxl:
        option = next(iter(spec.conditioning.given)).replace("_", "-")
        raise UsageError(f"{model.name} is no SDXL, and is not told of sizes", hint=f"leave --{option} out")
    check_together(spec, model, img2img=img2img)


def check_together(spec: GenerateSpec, model: Model, *, img2img: bool) -> None:
    """Refuse what a model takes one by one, and no pipeline of diffusers takes at once."""
    if spec.controls and model.embeds_guidance and (img2img or spec.upscale is not None):
        where = "from an image" if img2img else "in a second pass"
        raise UsageError(
            f"the unet of {model.name} takes the guidance scale, which diffusers' pipelines with a ControlNet don't"
            f" give it {where}",
            hint=f"leave {'--controlnet' if img2img else '--upscale'} out, or use another model",
        )
    others = {"--ip-adapter": model.ip_adapters, "--embedding": spec.embeddings}
    for option in [name for name, given in others.items() if given] if spec.adapters and not model.is_sdxl else ():
        raise UsageError(
            f"{model.name} is no SDXL, and diffusers' pipeline for T2I-Adapters takes no {option} then",
            hint=f"leave --t2i-adapter or {option} out",
        )
    if spec.edit and model.is_sdxl and model.ip_adapters:
        raise UsageError(
            f"{model.name} is an SDXL that edits, and diffusers' pipeline for it takes no IP-Adapter",
            hint="leave --ip-adapter out, or use a model as timbrooks/instruct-pix2pix",
        )


def _with_beside(
    spec: GenerateSpec, model: Model, console: Console
) -> tuple[Model, dict[str, Model], tuple[Model, ...]]:
    """A model with the first ControlNet and T2I-Adapter of a request; with each further one of the two kinds."""
    model, *others = controlled(spec, model, console)
    model, *adapters = _adapted(spec, model, console)
    return model, named_others(others), tuple(adapters)


def controlled(spec: GenerateSpec, model: Model, console: Console) -> Iterator[Model]:
    """A model with each ControlNet of a request; the model itself where there is none."""
    if not spec.controls:
        yield model
    for one in spec.controls:
        yield with_controlnet(model, one.name, console)


def _adapted(spec: GenerateSpec, model: Model, console: Console) -> Iterator[Model]:
    """A model with each T2I-Adapter of a request; the model itself where there is none."""
    if not spec.adapters:
        yield model
    for one in spec.adapters:
        yield with_t2i_adapter(model, one.name, console)


def _check_adapters(spec: PipelineSpec) -> None:
    """Refuse a size that T2I-Adapters don't divide, and several that give other numbers of tensors.

    Raises:
        UsageError: naming the adapter.
    """
    configs = [model.config(ADAPTER) for model in (spec.model, *spec.adapters) if ADAPTER in model.parts]
    counts = [len(config["channels"]) for config in configs]
    if len(set(counts)) > 1:
        raise UsageError(
            f"T2I-Adapter {spec.model.spec.t2i_adapter} gives {counts[0]} tensors, and another one {counts[-1]}",
            hint="use T2I-Adapters of one kind together",
        )
    for name, side in (("height", spec.sizes.height), ("width", spec.sizes.width)):
        factor = configs[0]["downscale_factor"] if configs else 1
        if side % factor:
            raise UsageError(
                f"{name} must be a multiple of {factor} for {spec.model.spec.t2i_adapter}, got {side}",
                hint=f"use --{name} {side // factor * factor or factor}",
            )


def named_others(models: Sequence[Model]) -> dict[str, Model]:
    """The models with further ControlNets, by the names that their engines have among a pipeline's: `controlnet_2`."""
    return {f"controlnet_{number}": model for number, model in enumerate(models, 2)}


def check_modes(controls: Sequence[ControlSpec], models: Iterable[Model]) -> None:
    """Refuse a union of ControlNets without a mode that it has, or beside others, and a mode of what is no union.

    Args:
        models: with each of the ControlNets.

    Raises:
        UsageError: naming the ControlNet.
    """
    for one, model in zip(controls, models, strict=False):
        is_union, modes = model.class_name(CONTROLNET) == UNION, model.config(CONTROLNET).get("num_control_type", 6)
        if is_union and len(controls) > 1:
            raise UsageError(f"{one.name} is a union of ControlNets: it runs alone", hint="leave the others out")
        if is_union and (one.mode is None or one.mode >= modes):
            what = "no mode says which of them" if one.mode is None else f"it has no mode {one.mode}"
            raise UsageError(
                f"{one.name} is a union of {modes} ControlNets, and {what}",
                hint=f"use --control-mode 0 to {modes - 1}; its page says what they are",
            )
        if one.mode is not None and not is_union:
            raise UsageError(
                f"{one.name} is no union of ControlNets: it has no mode {one.mode}", hint="leave --control-mode out"
            )


def check_task(model: Model, *, img2img: bool, inpaint: bool = False, edit: bool = False) -> None:
    """Refuse a model that lacks a part, or that makes no images from text alone, or from nothing but a mask's image.

    Raises:
        ModelError: where a single file lacks a part, naming it.
        UsageError: for SDXL's refiner without an image, a model for inpainting without a mask, and edits by a model
            that is none for them, or the other way round.
    """
    if edit != model.is_editing:
        kind = "makes images" if edit else "edits images as a text says"
        raise UsageError(
            f"{model.name} {kind}{': it edits none' if edit else ', and makes none'}",
            hint="use a model for that, as --model timbrooks/instruct-pix2pix" if edit else "use sdtrt img2img --edit",
        )
    model.check_has()
    if model.is_refiner and not img2img:
        raise UsageError(
            f"{model.name} is a refiner: it changes images, and makes none from text alone",
            hint="use sdtrt img2img --init-image FILE, or another model (bench: --task img2img)",
        )
    if model.is_inpainting and not inpaint:
        raise UsageError(
            f"{model.name} is a model for inpainting: it makes what a mask covers of an image",
            hint="use sdtrt inpaint --init-image FILE --mask FILE, or the model that it was made from",
        )


def note_noise(asked: NoiseSpec, model: Model, console: Console) -> None:
    """Say where the scheduler does not go by the model's configuration, and why."""
    if said := asked.over(model.stated).describe():
        console.note(f"noise: {said}")


def warn_of_interval(spec: PipelineSpec, console: Console) -> None:
    """Say where guidance in a part of the steps means nothing, as there is none or the UNet does it by itself."""
    if spec.savings.guidance.is_whole or spec.prompt_rows is not None:
        return
    why = "guidance scales up to 1 are no guidance"
    if "unet" in spec.model.parts and embeds_guidance(spec.model.config("unet")):
        why = f"the unet of {spec.model.name} takes the guidance scale, and has one row an image in all steps"
    console.warn(f"--guidance-interval {spec.savings.guidance} has no effect: {why}")


def note_tiles(spec: PipelineSpec, console: Console) -> None:
    """Say what `--vae-tiling` comes to."""
    if spec.tile is not None:
        precision = ", in fp32" if spec.has_engines else ""
        console.note(f"vae: in PyTorch{precision}, in tiles of {spec.tile}x{spec.tile} pixels (--vae-tiling)")
    elif spec.vae_tiling:
        size = f"{spec.sizes.width}x{spec.sizes.height}"
        console.note(f"vae: {size} is no larger than one of its tiles: --vae-tiling changes nothing")


def _cached(spec: PipelineSpec, console: Console) -> PipelineSpec:
    """A request with what deep caching comes to in a run of so many steps. Raises as of `check_spec`."""
    caching = spec.savings.caching
    if caching.is_off:
        return spec
    _check_cached(spec)
    steps = spec.steps if spec.edit else int(spec.steps * spec.strength)
    left = caching.over(steps)
    depth = caching.depth or default_depth(spec.model.config("unet"))
    if left.is_off:
        console.note(few_steps(steps))
    else:
        console.note(f"deep caching: {caching.describe(depth)}")
    return replace(spec, savings=replace(spec.savings, caching=left))


def _note(spec: PipelineSpec, console: Console) -> None:
    """Say where the scheduler does not go by the model's configuration, and what PyTorch runs beside engines."""
    note_noise(spec.noise, spec.model, console)
    warn_of_interval(spec, console)
    note_tiles(spec, console)
    if spec.text.in_pytorch and spec.has_engines:
        console.note(f"{', '.join(text_encoders_of(spec.model))}: in PyTorch, in fp32, for {spec.text.reasons}")
    _note_parts(spec, console)


def _note_parts(spec: PipelineSpec, console: Console) -> None:
    """Say what a choice of components means: which of them are not called at all, and what PyTorch runs, in fp32."""
    if not spec.components or not spec.has_engines:
        return
    idle = [name for name in spec.components if name not in (*spec.in_engines, *TEXT_ENCODERS)]
    if not spec.in_engines:
        raise UsageError(
            f"--component {' --component '.join(spec.components)} leaves no engine to run",
            hint="name what txt2img uses, as unet",
        )
    if idle:
        console.note(f"{', '.join(idle)}: not called without an init image")
    rest = [name for name in components_of(spec.model) if name not in (*spec.components, "vae_encoder")]
    if rest:
        console.note(f"{', '.join(rest)}: in PyTorch, in fp32")


def unet_sizes(model: ModelSource, images: int, height: int, width: int, *, guidance: bool) -> Sizes:
    """The size of the UNet calls that make so many images at once.

    Args:
        guidance: whether the scale is above 1. A UNet that takes the scale as an input has one row an image even then.
    """
    encoders = text_encoders_of(model)  # a live pipeline may have none: its calls bring embeddings
    tokens = model.config(encoders[0]).get("max_position_embeddings", DEFAULT_TOKENS) if encoders else DEFAULT_TOKENS
    doubled = guidance and not ("unet" in model.parts and embeds_guidance(model.config("unet")))
    return Sizes(unet_batch(images, guidance=doubled, editing=model.is_editing), height, width, tokens)


def _image_size(
    spec: GenerateSpec,
    model: Model,
    init: images.InitImage | None,
    maps: Sequence[images.InitImage],
    console: Console,
) -> tuple[int, int]:
    """The (height, width) of a request's images in pixels."""
    own_height, own_width = model.default_size()
    if spec.padding_crop is not None or (init is None and not maps):
        height, width = spec.height or own_height, spec.width or own_width
    elif init is None:
        height, width = maps[0].result_size(spec.height, spec.width)
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


def _check_cached(spec: PipelineSpec) -> None:
    """Refuse deep caching where no engine runs the UNet."""
    caching = spec.savings.caching
    if caching.is_off or "unet" in spec.in_engines:
        return
    why = "has no engines" if not spec.has_engines else "runs the unet in PyTorch, by --component"
    raise UsageError(
        f"--cache-interval {caching.interval} needs engines of the unet, and {spec.backend} {why}",
        hint="leave --cache-interval out, or use --backend auto with an engine of the unet",
    )


def check_spec(spec: PipelineSpec) -> None:
    """Refuse what no engine can run, before anything is exported.

    Raises:
        EngineError: where the backend needs a GPU that PyTorch can't use.
        ModelError: for a model that engines don't serve.
        UsageError: for a size that a T2I-Adapter does not take.
    """
    _check_adapters(spec)
    if spec.device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            f"{spec.backend} needs an NVIDIA GPU and a CUDA build of PyTorch",
            hint="run: sdtrt doctor; or --backend auto",
        )
    _check_cached(spec)
    if not spec.has_engines:
        return
    for component in spec.in_engines:
        groups = spec.engines.groups_of(component)
        contract_of(spec.model, component, spec.precision, groups)
        registry.get(spec.backend).check_groups(groups)
    if spec.model.vae_scale_factor != SIZE_MULTIPLE:
        raise ModelError(
            f"engines need a VAE of factor {SIZE_MULTIPLE}, that of {spec.model.spec.name} has"
            f" {spec.model.vae_scale_factor}",
            hint="use --backend torch for this model",
        )

"""`accelerate` and `restore`: engines in a diffusers pipeline that somebody else has made, and out of it again.

Knows pipelines and requests. What stands in a module's place is `swap`'s, which pipelines are taken `accepted`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast
from weakref import ref

import torch

from sdtrt.backends import registry
from sdtrt.backends.scratch import Scratch
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.engines.entry import Entry
from sdtrt.live.accepted import (
    check_pipeline,
    choose_backend,
    engine_pixels,
    refuse_vae,
    takes_images,
    vae_in_pytorch,
)
from sdtrt.live.controlnets import groups_of, refuse_wanted
from sdtrt.live.swap import ON_MISS, OnMiss, Settings, Swapped, swapped_of
from sdtrt.models import image_prompts
from sdtrt.models.components import choose_components, contract_of, part_of
from sdtrt.models.live import LiveModel
from sdtrt.pipeline.opening import memory, opened
from sdtrt.pipeline.opening.all_engines import ensure_second, for_prompt_rows
from sdtrt.pipeline.opening.engines import ensure_engines
from sdtrt.pipeline.opening.fastest import faster
from sdtrt.pipeline.opening.request import EngineRequest, first_of, shallow_beside, unet_sizes
from sdtrt.pipeline.parts import free_u, pixels
from sdtrt.pipeline.parts.guided_rows import check_is_guided, refuse_rows
from sdtrt.pipeline.parts.schedulers import keep_on_host, let_go
from sdtrt.pipeline.parts.watch import refuse_changes
from sdtrt.specs import (
    AUTO,
    COMPONENTS,
    PRECISIONS,
    BackendName,
    Component,
    Group,
    Precision,
    Savings,
    check_choice,
    check_size,
)
from sdtrt.specs.deep_features import SHALLOW, default_depth, whole_group
from sdtrt.specs.presets import SavingArguments, settle

CONTROLNET: Component = "controlnet"
PipeT = TypeVar("PipeT")
Parts = Mapping[str, Swapped]

_CHANGING = threading.RLock()  # pipelines may share modules, and builders want the GPU's memory to themselves


def accelerate(
    pipe: PipeT,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    guidance: bool = True,
    backend: BackendName = AUTO,
    precision: Precision | None = None,
    components: Iterable[Component] | None = None,
    engine_dir: str | Path | None = None,
    on_miss: OnMiss = "build",
    progress: bool = True,
    **saved: Unpack[SavingArguments],
) -> PipeT:
    """Run the UNet, the text encoders and the VAE of a diffusers pipeline in engines, found or built for its weights.

    Its modules stay diffusers' own; what their `forward` runs is an engine's. A second call adds engines for its size,
    or replaces them: for another backend or precision, or changed weights. These raise an `EngineError` at the next
    picture; `inductor` takes them. On a GPU, weights that engines have are on the CPU until `restore`.

    Args:
        pipe: one of Stable Diffusion 1.x, 2.x or XL; docs/features.md says which, and with what.
        height, width: of the images in pixels, multiples of 8; None for the model's own size.
        batch_size: images that one call makes.
        guidance: whether their guidance scale is above 1, for which the UNet runs two rows an image.
        backend: `auto`, `tensorrt`, `tensorrt-rtx`, `inductor` or `onnxruntime`; it has to run where the pipeline is.
        precision: `fp32`, `fp16` or `bf16`; None for fp16 on a GPU and fp32 on a CPU.
        components: those that engines run, as `unet`; None for all that the pipeline calls.
        engine_dir, progress: as of `generate`.
        on_miss: at a call that no engine serves, `build` one, have `torch` run the module (changed weights and hooks,
            too, which else are an `EngineError`), or raise an `error`.
        saved: what calls leave out, as of `sdtrt.specs.presets.SavingArguments`; docs/quality.md has its price.

    Raises:
        UsageError: for a size, precision or component that there is not; for an interval without guidance.
        EngineError: for a pipeline that engines don't serve, by its name; where no backend runs where it is.
        ExportError, BuildError, CacheError: where an engine can't be had. The pipeline is as it was then.

    Example:
        >>> pipe = sdtrt.accelerate(pipe, height=512, width=512)
        >>> image = pipe("a lighthouse at dawn").images[0]
    """
    parts = None if components is None else tuple(components)
    savings = settle(**saved, guided=guidance)
    directory = EngineDirectory(default_directory() if engine_dir is None else Path(engine_dir))
    choices = _Choices(height, width, batch_size, guidance, backend, precision, parts, directory, on_miss, savings)
    with _CHANGING, quiet_libraries():
        _swap(pipe, _plan(pipe, choices, Console(quiet=not progress)))
    return pipe


def restore(pipe: PipeT) -> PipeT:
    """Undo `accelerate`: the modules run in PyTorch again, their weights are back, and the engines are closed.

    Pictures are what they were before, to the last bit. A pipeline without engines stays as it is.

    Args:
        pipe: the pipeline, or any other of the same modules (`from_pipe`).

    Returns:
        The same pipeline.

    Raises:
        EngineError: for a pipeline of `load`, which has no weights to go back to.

    Example:
        >>> sdtrt.restore(pipe)
    """
    opened.refuse_restoring(pipe)
    with _CHANGING:
        for swapped in swapped_of(pipe).values():
            swapped.close()
        let_go(getattr(pipe, "scheduler", None))
        pixels.let_go(getattr(pipe, "image_processor", None))
    return pipe


@dataclass(frozen=True)
class _Choices:
    """What a caller of `accelerate` chooses. Raises `UsageError` for what no pipeline could have."""

    height: int | None
    width: int | None
    batch_size: int
    guidance: bool
    backend: BackendName
    precision: Precision | None
    components: tuple[Component, ...] | None
    directory: EngineDirectory
    on_miss: OnMiss
    savings: Savings

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_size(name, side)
        if self.batch_size < 1:
            hint = "it counts images, not UNet rows"
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}", hint=hint)
        check_choice("on_miss", self.on_miss, ON_MISS)
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        if self.components == ():
            raise UsageError("components= names none", hint='name some, as in components=["unet"], or leave it out')
        registry.check_request(self.backend, self.precision)
        self._check_guidance()

    def _check_guidance(self) -> None:
        """Refuse an interval of guidance where it could mean nothing."""
        interval = self.savings.guidance
        if interval.is_whole:
            return
        check_is_guided(interval, guidance=self.guidance)
        if self.components is not None and "unet" not in self.components:
            raise UsageError(
                f"guidance_interval {interval} is about the unet, which is not among components=",
                hint="add unet to components=, or leave guidance_interval out",
            )

    def request(
        self,
        model: LiveModel,
        backend: BackendName,
        precision: Precision,
        components: tuple[Component, ...],
        device: torch.device,
        groups: tuple[Group, ...],
    ) -> EngineRequest:
        """The engines that a pipeline needs."""
        height, width = (engine_pixels(model, own) for own in self._size(model))
        images = self.batch_size
        sizes = unet_sizes(model, images, height, width, guidance=self.guidance)
        return EngineRequest(model, backend, precision, sizes, components, images, device, groups)

    def groups(self, pipe: Any, model: LiveModel) -> tuple[Group, ...]:
        """The optional groups of inputs and outputs that a pipeline's UNet needs."""
        return (*_groups(pipe), *self.deep_groups(model))

    def deep_groups(self, model: LiveModel) -> tuple[Group, ...]:
        """The group of a UNet that gives deep features to be kept."""
        caching = self.savings.caching
        if caching.is_off:
            return ()
        if "unet" not in (self.components or ("unet",)) or "unet" not in model.modules:
            raise UsageError(
                f"cache_interval={caching.interval} needs an engine of the unet, and PyTorch is to run it",
                hint="leave cache_interval out, or have an engine run the unet, as in components=['unet']",
            )
        return (whole_group(caching.depth or default_depth(model.config("unet"))),)

    def _size(self, model: LiveModel) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = model.default_size()
        return self.height or height, self.width or width


@dataclass(frozen=True)
class _Plan:
    """What is to run in engines, which ones, and what runs in engines by now and stays.

    Args:
        others: the request of each further ControlNet, by its name, `controlnet_2`.
    """

    request: EngineRequest
    others: Mapping[str, EngineRequest]
    settings: Settings
    staying: Parts

    def ensure_engines(self) -> dict[str, Entry]:
        """Find or build all engines; those for steps without guidance have `PROMPT_ROWS` behind their names."""
        settings, request = self.settings, self.request
        found: dict[str, Entry] = dict(ensure_engines(request, settings.directory, settings.console).items())
        for name, other in self.others.items():
            found[name] = ensure_engines(other, settings.directory, settings.console)[CONTROLNET]
        shallow = request.shallow
        if shallow is not None:
            found["unet" + SHALLOW] = ensure_engines(shallow, settings.directory, settings.console)["unet"]
        if settings.savings.guidance.is_whole or request.sizes.batch == request.images:
            return found
        second = for_prompt_rows(request, request.images)
        requests: dict[str, EngineRequest] = dict.fromkeys(second.components, second)
        requests |= {name: for_prompt_rows(other, request.images) for name, other in self.others.items()}
        if shallow is not None:
            requests["unet" + SHALLOW] = for_prompt_rows(shallow, request.images)
        return found | ensure_second(requests, found, settings.directory, settings.console)

    def adding(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Of all engines those that take memory which nothing has yet: of parts that come, and second ones of others.

        A shallow one is opened together with the one that it goes on from.
        """

        def is_new(name: str) -> bool:
            base = first_of(name)
            there = self.staying.get(base)
            with_it = entries.get(name.replace(SHALLOW, ""), entries[base])
            return there is None or (base != name and all(one.entry.path != with_it.path for one in there.engines))

        return {name: entry for name, entry in entries.items() if is_new(name)}

    @property
    def coming(self) -> dict[str, Swapped]:
        """What is to stand in the place of those that run in no engine yet, or in one that does not serve."""
        names = (*self.request.components, *self.others)
        return {name: self._swapped(name) for name in names if name not in self.staying}

    def _swapped(self, name: str) -> Swapped:
        settings = self.settings.of(name)
        model, component = settings.model, _component_of(name)
        return Swapped(model.modules[part_of(component)], component, settings, _digest(model, component, settings))


def _plan(pipe: Any, choices: _Choices, console: Console) -> _Plan:
    """Settle everything before anything changes."""
    model = check_pipeline(pipe)
    if not choices.savings.guidance.is_whole:
        refuse_rows(pipe)
    device = next(_main_module(model).parameters()).device
    name = _backend(pipe, model, choices, device, console)
    backend = registry.get(name)
    precision = choices.precision or backend.default_precision()
    backend.check_precision(precision)
    modules = {part: ref(module) for part, module in model.modules.items()}
    fixed = (name, precision, choices.directory, device, choices.on_miss, console, threading.RLock())
    settings = Settings(model.spec, model.stored, modules, *fixed, choices.savings, choices.deep_groups(model))
    there = {part: one for part, one in swapped_of(pipe).items() if _serves(one, part, settings)}
    wanted = _components(pipe, model, choices.components, there)
    request = choices.request(model, name, precision, wanted, device, choices.groups(pipe, model))
    further = model.others if CONTROLNET in wanted else {}
    others = {part: replace(request, model=one, components=(CONTROLNET,)) for part, one in further.items()}
    for component in wanted:
        _check(model, component, request)
    for one in further.values():
        _check(one, CONTROLNET, request)
    return _Plan(request, others, settings, {part: one for part, one in there.items() if part in (*wanted, *others)})


def _check(model: LiveModel, component: Component, request: EngineRequest) -> None:
    """Refuse a component that no engine can be made of, before any is."""
    backend, groups = registry.get(request.backend), request.groups_of(component)
    contract_of(model, component, request.precision, groups)
    backend.check_groups(groups)
    refuse_changes(model.modules[part_of(component)], component, merges=not backend.weights_inside)


def _main_module(model: LiveModel) -> torch.nn.Module:
    """The UNet; of a pipeline that only encodes text, a text encoder."""
    return model.modules["unet"] if "unet" in model.modules else next(iter(model.modules.values()))


def _backend(pipe: Any, model: LiveModel, choices: _Choices, device: torch.device, console: Console) -> BackendName:
    """The backend that is chosen; for `auto` the fastest of those that have engines, which it says.

    Where none has, it is the one that is expected to be the fastest where the pipeline is.
    """
    usual, why = choose_backend(choices.backend, device)
    if choices.backend != AUTO:
        return usual
    wanted = _components(pipe, model, choices.components, swapped_of(pipe))

    def request_of(name: BackendName) -> EngineRequest:
        precision = choices.precision or registry.get(name).default_precision()
        registry.get(name).check_precision(precision)
        return choices.request(model, name, precision, wanted, device, choices.groups(pipe, model))

    name, reason = faster(usual, request_of, choices.directory)
    console.note(f"backend: {name} ({reason or why})")
    return name


def _groups(pipe: Any) -> tuple[Group, ...]:
    """The optional groups of inputs that a pipeline gives its UNet."""
    own = () if pipe.unet is None else (*free_u.groups_of(pipe.unet), *image_prompts.groups_of(pipe.unet))
    return (*groups_of(pipe), *own)


def _components(
    pipe: Any, model: LiveModel, names: tuple[Component, ...] | None, there: Iterable[str]
) -> tuple[Component, ...]:
    """The components that engines are to run: those named, else all that the pipeline calls, and what runs in one."""
    if names is not None:
        refuse_wanted(pipe, model.parts, names)
        refuse_vae(model, names)
        return choose_components(model, list(names))
    own = (
        name for name in choose_components(model, ()) if name != "vae_encoder" or takes_images(pipe) or name in there
    )
    return tuple(name for name in own if part_of(name) != "vae" or not vae_in_pytorch(model))


def _swap(pipe: Any, plan: _Plan) -> None:
    """Find or build the engines, open them, and put them in the place of the modules' methods; all of it or nothing.

    Engines that others replace run until those are there; then they make room for them.
    """
    lock = next((one.settings.lock for one in plan.staying.values()), plan.settings.lock)
    settings = replace(plan.settings, lock=lock)
    leaving = [one for name, one in swapped_of(pipe).items() if name not in plan.staying]
    plan = replace(plan, settings=settings)
    new = plan.coming
    with _closed_on_failure(new.values()):
        _park(new.values())
        entries = plan.ensure_engines()
        for one in leaving:
            one.close()
        _park(new.values())  # what came back with those that left
        memory.check_memory(plan.request, plan.adding(entries))
        shared = [one.scratch for one in plan.staying.values()]
        scratch = shared[0] if shared else Scratch(memory.pool_bytes(plan.request, entries))
        _open({**plan.staying, **new}, entries, scratch)
    for name, one in plan.staying.items():
        one.settings = settings.of(name)
    for one in new.values():
        one.attach()
    if settings.device.type == "cuda":
        keep_on_host(pipe.scheduler)
        pixels.round_on_device(getattr(pipe, "image_processor", None))


def _park(parts: Iterable[Swapped]) -> None:
    """Let weights leave the GPU, and its memory be free."""
    if sum(one.park() for one in parts):
        memory.release()


def _open(parts: Parts, entries: Mapping[str, Entry], scratch: Scratch) -> None:
    """Open engines in the parts' places. The parts of a pipeline run one after the other, and so share memory."""
    for name in memory.by_scratch({name: one for name, one in entries.items() if SHALLOW not in name}):
        part = parts[first_of(name)]
        with part.settings.lock:
            part.open(entries[name], scratch, shallow_beside(name, entries))


def _digest(model: LiveModel, component: Component, settings: Settings) -> str:
    """Of the weights that an engine holds; empty where it holds none."""
    backend = registry.get(settings.backend)
    if not backend.weights_inside:
        return ""
    return model.digest(component, backend.precision_of(model, component, settings.precision))


def _component_of(name: str) -> Component:
    """The component that a part is by its name: each further ControlNet is one as the first."""
    return cast(Component, name) if name in COMPONENTS else CONTROLNET


def _serves(one: Swapped, name: str, settings: Settings) -> bool:
    """Whether what runs a part already is of the backend, precision and directory asked for, and of these weights."""
    if (part_of(_component_of(name)) if name in COMPONENTS else name) not in settings.modules:
        return False
    own = one.settings
    same = (own.backend, own.precision, own.directory.path, own.device) == (
        settings.backend,
        settings.precision,
        settings.directory.path,
        settings.device,
    )
    fits = one.table is None or one.table.fits(one.module)
    return same and fits and one.watch.digest == _digest(settings.of(name).model, one.component, settings)


@contextmanager
def _closed_on_failure(parts: Iterable[Swapped]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for one in parts:
            one.close()
        raise

"""`accelerate` and `restore`: engines in a diffusers pipeline that somebody else has made, and out of it again.

Knows pipelines and requests. What stands in a module's place is `swap`'s, which pipelines are taken `accepted`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast
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
from sdtrt.pipeline import free_u, memory, opened, pixels
from sdtrt.pipeline.engines import ensure_engines
from sdtrt.pipeline.fastest import faster
from sdtrt.pipeline.request import EngineRequest, unet_sizes
from sdtrt.pipeline.schedulers import keep_on_host, let_go
from sdtrt.pipeline.watch import refuse_changes
from sdtrt.specs import AUTO, COMPONENTS, PRECISIONS, BackendName, Component, Group, Precision, check_choice, check_size

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
) -> PipeT:
    """Run the UNet, the text encoders and the VAE of a diffusers pipeline in engines, found or built for its weights.

    Its modules stay diffusers' and transformers' own; what their `forward` (a VAE's `decode` and `encode`) runs is an
    engine's. Saving and copies are of the modules. A second call adds engines for its size, or replaces them: for
    another backend or precision, or changed weights. These raise an `EngineError` at the next picture; `inductor` takes
    them, and adapters. Threads need schedulers and tokenizers of their own. On a GPU, weights that engines have are on
    the CPU until `restore`, and the scheduler keeps its timesteps there.

    Args:
        pipe: one of Stable Diffusion 1.x, 2.x or XL; docs/features.md says which, and with what.
        height, width: of the images in pixels, multiples of 8; None for the model's own size.
        batch_size: images that one call makes.
        guidance: whether their guidance scale is above 1, for which the UNet runs two rows an image.
        backend: `auto`, `tensorrt`, `tensorrt-rtx`, `inductor` or `onnxruntime`; it has to run where the pipeline is.
        precision: `fp32`, `fp16` or `bf16`; None for fp16 on a GPU and fp32 on a CPU.
        components: those that engines run, as `unet`; None for all that the pipeline calls.
        engine_dir: None for $SDTRT_ENGINE_DIR, `./engines` where it is, or the user's cache.
        on_miss: at a call that no engine serves, `build` one, have `torch` run the module (changed weights and hooks,
            too, which else are an `EngineError`), or raise an `error`.
        progress: say on stderr what is built.

    Raises:
        UsageError: for a size, precision or component that there is not.
        EngineError: for a pipeline that engines don't serve, by its name; where no backend runs where it is.
        ExportError, BuildError, CacheError: where an engine can't be had. The pipeline is as it was then.

    Example:
        >>> pipe = sdtrt.accelerate(pipe, height=512, width=512)
        >>> image = pipe("a lighthouse at dawn").images[0]
    """
    directory = EngineDirectory(default_directory() if engine_dir is None else Path(engine_dir))
    parts = None if components is None else tuple(components)
    choices = _Choices(height, width, batch_size, guidance, backend, precision, parts, directory, on_miss)
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

    @property
    def coming(self) -> dict[str, Swapped]:
        """What is to stand in the place of those that run in no engine yet, or in one that does not serve."""
        names = (*self.request.components, *self.others)
        return {name: self._swapped(name) for name in names if name not in self.staying}

    def _swapped(self, name: str) -> Swapped:
        settings = self.settings.of(name)
        model, component = settings.model, _component_of(name)
        return Swapped(model.modules[part_of(component)], component, settings, _digest(model, component, settings))

    def engines(self) -> dict[str, Entry]:
        """Find or build all engines."""
        directory, console = self.settings.directory, self.settings.console
        found: dict[str, Entry] = dict(ensure_engines(self.request, directory, console).items())
        for name, request in self.others.items():
            found[name] = ensure_engines(request, directory, console)[CONTROLNET]
        return found


def _plan(pipe: Any, choices: _Choices, console: Console) -> _Plan:
    """Settle everything before anything changes."""
    model = check_pipeline(pipe)
    device = next(_main_module(model).parameters()).device
    name = _backend(pipe, model, choices, device, console)
    backend = registry.get(name)
    precision = choices.precision or backend.default_precision()
    backend.check_precision(precision)
    modules = {part: ref(module) for part, module in model.modules.items()}
    fixed = (name, precision, choices.directory, device, choices.on_miss, console, threading.RLock())
    settings = Settings(model.spec, model.stored, modules, *fixed)
    there = {part: one for part, one in swapped_of(pipe).items() if _serves(one, part, settings)}
    wanted = _components(pipe, model, choices.components, there)
    request = choices.request(model, name, precision, wanted, device, _groups(pipe))
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
        return choices.request(model, name, precision, wanted, device, _groups(pipe))

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
        entries = plan.engines()
        for one in leaving:
            one.close()
        _park(new.values())  # what came back with those that left
        memory.check_memory(plan.request, {name: entry for name, entry in entries.items() if name in new})
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
    for name in memory.by_scratch(entries):
        with parts[name].settings.lock:
            parts[name].open(entries[name], scratch)


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

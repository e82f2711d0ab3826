"""`accelerate`, `restore` and `status`: engines in a diffusers pipeline that somebody else has made.

Knows pipelines and requests. What stands in a module's place is `swap`'s, which pipelines are taken `accepted`'s.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import ref

import torch

from sdtrt.backends import registry
from sdtrt.backends.scratch import Scratch
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.engines.entry import Entry
from sdtrt.models.components import choose_components, contract_of, part_of, precision_of
from sdtrt.models.live import LiveModel
from sdtrt.pipeline import memory, opened
from sdtrt.pipeline.accepted import check_pipeline, choose_backend
from sdtrt.pipeline.engines import ensure_engines
from sdtrt.pipeline.request import EngineRequest, unet_sizes
from sdtrt.pipeline.swap import METHODS, ON_MISS, OnMiss, Settings, Swapped, swapped_of
from sdtrt.pipeline.watch import refuse_changes
from sdtrt.specs import AUTO, PRECISIONS, BackendName, Component, Precision, Sizes, check_choice, check_size

PipeT = TypeVar("PipeT")
PYTORCH = "PyTorch"


def accelerate(
    pipe: PipeT,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    backend: BackendName = AUTO,
    precision: Precision | None = None,
    components: Iterable[Component] | None = None,
    engine_dir: str | Path | None = None,
    on_miss: OnMiss = "build",
    progress: bool = True,
) -> PipeT:
    """Run the UNet, the text encoders and the VAE of a diffusers pipeline in engines, found or built for its weights.

    The pipeline and its modules stay diffusers' and transformers' own; only what their `forward` (a VAE's `decode` and
    `encode`) runs is an engine's. Saving, schedulers, callbacks, `from_pipe` and copies go on as before: a deep copy of
    a module runs in PyTorch. On a GPU the weights that engines have move to the CPU until `restore`.

    A second call with another size adds engines; with another backend, precision, components, or after the weights were
    changed, it replaces them. Weights that change behind an engine raise an `EngineError` at the next picture.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline from text, from an image, or for inpainting (4-channel UNet).
        height, width: of the images in pixels, multiples of 8; None for the model's own size.
        batch_size: images that one call makes. With guidance the UNet runs twice as many rows.
        backend: `auto`, `tensorrt`, `tensorrt-rtx` or `onnxruntime`; it has to run where the pipeline is.
        precision: `fp32`, `fp16` or `bf16`; None for the backend's default, fp16 on a GPU and fp32 on a CPU.
        components: those that engines run: `unet`, `text_encoder`, `text_encoder_2`, `vae_decoder`, `vae_encoder`; None
            for all that the pipeline calls.
        engine_dir: None for $SDTRT_ENGINE_DIR, `./engines` where it is, or the user's cache.
        on_miss: at a call whose size no engine has, `build` builds one and says so, `torch` runs the module itself and
            says so once, `error` raises an `EngineError`.
        progress: say on stderr what is built.

    Returns:
        The same pipeline.

    Raises:
        UsageError: for a size, precision or component that there is not.
        EngineError: for a pipeline that engines don't serve, by its name; where no backend runs where it is.
        ExportError, BuildError, CacheError: where an engine can't be made or kept. The pipeline is as it was then.

    Example:
        >>> import sdtrt
        >>> pipe = sdtrt.accelerate(pipe, height=512, width=512)
        >>> image = pipe("a lighthouse at dawn").images[0]
    """
    console = Console(quiet=not progress)
    _check_request(height, width, batch_size, precision, on_miss)
    registry.check_request(backend, precision)
    with quiet_libraries():
        model = check_pipeline(pipe)
        device = _device(pipe)
        backend = choose_backend(backend, device)
        wanted = _components(pipe, model, components)
        asked = precision or registry.get(backend).default_precision()
        registry.get(backend).check_precision(asked)
        for component in wanted:
            contract_of(model, component, asked)
            refuse_changes(model.modules[part_of(component)], component)
        own_height, own_width = model.default_size()
        sizes = unet_sizes(model, batch_size, height or own_height, width or own_width, guidance=True)
        directory = EngineDirectory(Path(engine_dir) if engine_dir is not None else default_directory())
        settings = _settings(model, backend, asked, directory, device, on_miss, console)
        _swap(pipe, model, wanted, settings, sizes, batch_size)
    return pipe


def restore(pipe: PipeT) -> PipeT:
    """Undo `accelerate`: the modules run in PyTorch again, their weights are back, and the engines are closed.

    Pictures are what they were before, to the last bit. A pipeline that `load` opened has no weights to go back to: its
    engines are closed, and it can't be called any more. One without engines stays as it is.

    Args:
        pipe: the pipeline, or any other of the same modules (`from_pipe`).

    Returns:
        The same pipeline.

    Example:
        >>> sdtrt.restore(pipe)
    """
    for swapped in swapped_of(pipe).values():
        swapped.close()
    opened.close(pipe)
    return pipe


@dataclass(frozen=True)
class EngineStatus:
    """An engine that is open for a part.

    Args:
        name: of its entry in the engine directory.
        sizes: what calls it serves; `any` for all.
    """

    name: str
    backend: str
    precision: str
    sizes: str


@dataclass(frozen=True)
class PartStatus:
    """What runs a part of a pipeline: engines, or PyTorch, and why that."""

    part: str
    engines: tuple[EngineStatus, ...] = ()
    reason: str = ""

    @property
    def is_in_engine(self) -> bool:
        """Whether engines run it."""
        return bool(self.engines)


@dataclass(frozen=True)
class Status:
    """What runs each part of a pipeline; `print` shows it as a table."""

    pipeline: str
    parts: tuple[PartStatus, ...]

    def __getitem__(self, part: str) -> PartStatus:
        """A part by its name, `unet`. Raises `KeyError` where there is none."""
        return {one.part: one for one in self.parts}[part]

    def __str__(self) -> str:
        rows = [("part", "runs in", "precision", "sizes", "engine, or why not")]
        for part in self.parts:
            rows += [(part.part, one.backend, one.precision, one.sizes, one.name) for one in part.engines]
            rows += [] if part.engines else [(part.part, PYTORCH, "", "", part.reason)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join((self.pipeline, *lines))


def status(pipe: Any) -> Status:
    """Which part of a pipeline runs in which engine, and why the others don't.

    Args:
        pipe: any pipeline: accelerated, opened by `load`, or neither.

    Example:
        >>> print(sdtrt.status(pipe))
    """
    swapped = swapped_of(pipe)
    engines = {name: tuple(_engine_status(one.entry) for one in part.engines) for name, part in swapped.items()}
    engines |= {name: (_engine_status(entry),) for name, entry in opened.entries(pipe).items()}
    parts = [name for name in METHODS if getattr(pipe, part_of(name), None) is not None]
    refusal = "" if engines else _refusal(pipe)
    found = [PartStatus(name, engines.get(name, ()), _reason(pipe, name, refusal)) for name in parts]
    others = [name for name in getattr(pipe, "components", {}) if name not in {part_of(part) for part in parts}]
    found += [
        PartStatus(name, (), "no engine runs such a part")
        for name in others
        if isinstance(getattr(pipe, name, None), torch.nn.Module)
    ]
    return Status(type(pipe).__name__, tuple(found))


def _engine_status(entry: Entry) -> EngineStatus:
    key = entry.engine_key
    sizes = "; ".join(
        f"batch {one.batch.min}-{one.batch.max}, {one.width.min}-{one.width.max} x"
        f" {one.height.min}-{one.height.max} pixels"
        for one in key.profiles
    )
    return EngineStatus(entry.name, key.backend, key.precision, sizes or "any")


def _reason(pipe: Any, component: Component, refusal: str) -> str:
    """Why PyTorch runs a component."""
    if refusal:
        return refusal
    if component == "vae_encoder" and not _takes_images(pipe):
        return "this pipeline encodes no images"
    return "not among the components of sdtrt.accelerate" if swapped_of(pipe) else "sdtrt.accelerate was not called"


def _refusal(pipe: Any) -> str:
    """Why `accelerate` would refuse a pipeline; empty where it would not."""
    try:
        check_pipeline(pipe)
    except SdtrtError as error:
        return error.message
    return ""


# --- accelerate, step by step ---------------------------------------------------------------------------------------


def _check_request(height: int | None, width: int | None, batch_size: int, precision: str | None, on_miss: str) -> None:
    """Raise `UsageError` for what no pipeline could have."""
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            check_size(name, pixels)
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}", hint="it counts images, not UNet rows")
    check_choice("on_miss", on_miss, ON_MISS)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)


def _device(pipe: Any) -> torch.device:
    """Where the pipeline is."""
    device: torch.device = next(pipe.unet.parameters()).device
    return device


def _components(pipe: Any, model: LiveModel, names: Iterable[Component] | None) -> tuple[Component, ...]:
    """The components that engines are to run."""
    if names is not None:
        chosen = choose_components(model, list(names))
        if not list(names):
            raise UsageError("components= names none", hint='name some, as in components=["unet"], or leave it out')
        return chosen
    return tuple(name for name in choose_components(model, ()) if name != "vae_encoder" or _takes_images(pipe))


def _takes_images(pipe: Any) -> bool:
    """Whether a pipeline's call encodes images."""
    return "image" in inspect.signature(type(pipe).__call__).parameters


def _settings(
    model: LiveModel,
    backend: BackendName,
    precision: Precision,
    directory: EngineDirectory,
    device: torch.device,
    on_miss: OnMiss,
    console: Console,
) -> Settings:
    modules = {name: ref(module) for name, module in model.modules.items()}
    lock = threading.RLock()
    return Settings(model.spec, model.stored, modules, backend, precision, directory, device, on_miss, console, lock)


def _swap(
    pipe: Any, model: LiveModel, wanted: tuple[Component, ...], settings: Settings, sizes: Sizes, images: int
) -> None:
    """Find or build the engines, open them, and put them in the place of the modules' methods; all of it or nothing."""
    there = {name: one for name, one in swapped_of(pipe).items() if name in wanted and _serves(one, model, settings)}
    for name, one in swapped_of(pipe).items():
        if name not in there:
            one.close()
    lock = next((one.settings.lock for one in there.values()), settings.lock)
    settings = replace(settings, lock=lock)
    new = {
        name: Swapped(model.modules[part_of(name)], name, settings, _digest(model, name, settings))
        for name in wanted
        if name not in there
    }
    with _closed_on_failure(new.values()):
        for one in new.values():
            one.park()
        if any(one.parked for one in new.values()):
            memory.release()
        request = EngineRequest(model, settings.backend, settings.precision, sizes, wanted, images, settings.device)
        entries = ensure_engines(request, settings.directory, settings.console)
        missing = {name: entry for name, entry in entries.items() if name in new}
        memory.check_memory(request, missing)
        _open({**there, **new}, entries)
    for one in there.values():
        one.settings = settings
    for one in new.values():
        one.attach()


def _open(parts: Mapping[Component, Swapped], entries: Mapping[Component, Entry]) -> None:
    scratch = Scratch()  # the parts of a pipeline run one after the other
    for name in memory.by_scratch(entries):
        with parts[name].settings.lock:
            parts[name].open(entries[name], scratch)


def _digest(model: LiveModel, component: Component, settings: Settings) -> str:
    return model.digest(component, precision_of(model, component, settings.precision))


def _serves(one: Swapped, model: LiveModel, settings: Settings) -> bool:
    """Whether what runs a component already is of the backend, precision and directory asked for, and these weights."""
    own = one.settings
    same = (own.backend, own.precision, own.directory.path, own.device) == (
        settings.backend,
        settings.precision,
        settings.directory.path,
        settings.device,
    )
    return same and one.watch.digest == _digest(model, one.component, settings)


@contextmanager
def _closed_on_failure(parts: Iterable[Swapped]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for one in parts:
            one.close()
        raise

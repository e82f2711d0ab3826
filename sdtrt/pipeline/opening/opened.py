"""Pipelines that stay open: `load` opens one without PyTorch's copy of the weights, and keeps its engines with it.

Knows how a pipeline is opened as the commands do it. Where it is dropped, or closed, its engines are closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import EngineError
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.engines.entry import Entry
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.pipeline.opening.open import open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts.guided_rows import check_is_guided
from sdtrt.specs import (
    AUTO,
    DEFAULT_MODEL,
    BackendName,
    Component,
    ControlSpec,
    GenerateSpec,
    ImagePromptSpec,
    ModelSpec,
    Precision,
    Savings,
    SchedulerName,
    check_choice,
)
from sdtrt.specs.presets import SavingArguments, settle

ATTRIBUTE = "_sdtrt_open"
Task = Literal["txt2img", "img2img", "inpaint", "pix2pix"]


class _KeptOpen:
    """What closes a pipeline. Copies of the pipeline share its engines, and this."""

    def __init__(self, stack: ExitStack, entries: Mapping[str, Entry]) -> None:
        self.stack, self.entries = stack, dict(entries)

    def close(self) -> None:
        """Close the pipeline's engines, and free their memory. May be called twice."""
        self.stack.close()
        self.entries.clear()

    def __copy__(self) -> _KeptOpen:
        return self

    def __deepcopy__(self, memo: object) -> _KeptOpen:
        return self


def load(
    model: str | ModelSpec = DEFAULT_MODEL,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    task: Task = "txt2img",
    guidance: bool = True,
    backend: BackendName = AUTO,
    precision: Precision | None = None,
    components: Iterable[Component] | None = None,
    scheduler: SchedulerName | None = None,
    controlnet: str | Iterable[str] = (),
    engine_dir: str | Path | None = None,
    progress: bool = True,
    **saved: Unpack[SavingArguments],
) -> Any:
    """Open a diffusers pipeline without PyTorch's copy of the weights that engines have, as the commands do.

    It stays open until it is dropped or closed: `with contextlib.closing(sdtrt.load(...)) as pipe`, or `pipe.close()`.
    It is where its backend runs. It can't be saved, take a LoRA or go back to PyTorch: `accelerate` is for that.

    Args:
        model: `tiny`, a diffusers folder, a hub id or a `.safetensors` file; a `ModelSpec` for a variant or a revision.
        height, width: of the images in pixels, multiples of 8; None for the model's own size.
        batch_size: images that one call makes.
        task: `img2img` and `inpaint` open an image or an inpainting pipeline, with an engine for the VAE's encoder;
            `pix2pix` one that edits images as a text says.
        guidance: whether calls have a guidance scale above 1, for which the UNet runs two rows an image.
        backend, precision, components, engine_dir, progress, saved: as of `accelerate`.
        scheduler: `euler`, `dpm++`, …; None for the model's own.
        controlnet: a folder, a hub id or a file of a ControlNet, or several: each has an engine, and calls bring maps.

    Returns:
        diffusers' pipeline, with `close`. Its modules have no weights.

    Raises:
        UsageError, ModelError, EngineError, ExportError, BuildError, CacheError: where it can't be had.

    Example:
        >>> import sdtrt
        >>> pipe = sdtrt.load("tiny", height=128, width=128)
        >>> image = pipe("a red circle").images[0]
    """
    console = Console(quiet=not progress)
    spec = _spec(model, task, height, width, batch_size, guidance, backend, precision, components, scheduler)
    spec = replace(spec, controls=_controls(controlnet), savings=_savings(saved, guidance))
    with quiet_libraries():
        directory = EngineDirectory(Path(engine_dir) if engine_dir is not None else default_directory())
        return _open(_request(spec, directory, console), directory, console)


def _controls(names: str | Iterable[str]) -> tuple[ControlSpec, ...]:
    """ControlNets whose maps come with the calls."""
    return tuple(ControlSpec(name, Path("image")) for name in ([names] if isinstance(names, str) else names))


def _savings(saved: SavingArguments, guidance: bool) -> Savings:
    """What calls leave out. Raises `UsageError` for a part of a run that is guided, where none is."""
    savings = settle(**saved, guided=guidance)
    check_is_guided(savings.guidance, guidance=guidance)
    return savings


def _spec(
    model: str | ModelSpec,
    task: Task,
    height: int | None,
    width: int | None,
    batch_size: int,
    guidance: bool,
    backend: BackendName,
    precision: Precision | None,
    components: Iterable[Component] | None,
    scheduler: SchedulerName | None,
) -> GenerateSpec:
    """The request of a call that makes as many images as the pipeline is for; the calls bring the task's."""
    check_choice("task", task, get_args(Task))
    model = model if isinstance(model, ModelSpec) else ModelSpec(model)
    return GenerateSpec(
        prompts=("",),
        model=model,
        backend=backend,
        precision=precision,
        height=height,
        width=width,
        batch_size=batch_size,
        num_images=batch_size,
        guidance_scale=2.0 if guidance else 1.0,
        scheduler=scheduler,
        init_image=None if task == "txt2img" else Path("image"),
        mask=Path("mask") if task == "inpaint" else None,
        edit=task == "pix2pix",
        components=tuple(components or ()),
        ip_images=tuple(ImagePromptSpec(Path("image")) for _ in model.ip_adapters),
    )


def _request(spec: GenerateSpec, directory: EngineDirectory, console: Console) -> PipelineSpec:
    found = resolve_model(spec.model, console)
    return resolve_fastest(spec, found, directory, console)


def _open(request: PipelineSpec, directory: EngineDirectory, console: Console) -> Any:
    with ExitStack() as stack:
        pipeline = stack.enter_context(open_pipeline(request, directory, console))
        kept = _KeptOpen(stack.pop_all(), pipeline.entries)
    setattr(pipeline.pipe, ATTRIBUTE, kept)
    pipeline.pipe.close = kept.close  # `contextlib.closing(pipe)` calls it
    return pipeline.pipe


def entries(pipe: Any) -> Mapping[str, Entry]:
    """The engines of a pipeline that `load` opened; none of another."""
    kept = getattr(pipe, ATTRIBUTE, None)
    return kept.entries if isinstance(kept, _KeptOpen) else {}


def refuse_restoring(pipe: Any) -> None:
    """Raise `EngineError` for a pipeline that `load` opened."""
    if isinstance(getattr(pipe, ATTRIBUTE, None), _KeptOpen):
        raise EngineError(
            f"this {type(pipe).__name__} was opened by sdtrt.load: it has no weights to go back to",
            hint="pipe.close() frees its engines; from_pretrained and sdtrt.accelerate make one that can be restored",
        )

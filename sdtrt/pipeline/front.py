"""The public functions beside `accelerate` and `load`: one call each for what a command does, without its terminal.

They make a spec of their arguments and call the room that does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import (
    AdapterSpec,
    BackendName,
    BuildSpec,
    Component,
    ControlSpec,
    EmbeddingSpec,
    ExportSpec,
    GenerateSpec,
    ImagePromptSpec,
    ModelSpec,
    NoiseSpec,
    Precision,
    PromptSyntax,
    QualityName,
    Recipe,
    RefinerSpec,
    Savings,
    SchedulerName,
    SizeConditioning,
    UpscaleSpec,
)

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.session import Session
    from sdtrt.engines.entry import Entry
    from sdtrt.pipeline.runs.generate import GenerateReport


class GenerateOptions(TypedDict, total=False):
    """The fields of a `GenerateSpec` that `generate` takes beside a text."""

    model: str | ModelSpec
    backend: BackendName
    precision: Precision | None
    negative_prompt: str
    steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    seed: int | None
    num_images: int
    batch_size: int
    scheduler: SchedulerName | None
    init_image: Path | None
    strength: float
    mask: Path | None
    mask_blur: int
    padding_crop: int | None
    edit: bool
    image_guidance_scale: float
    output: Path | None
    overwrite: bool
    allow_build: bool
    components: tuple[Component, ...]
    noise: NoiseSpec
    embeddings: tuple[EmbeddingSpec, ...]
    clip_skip: int
    prompt_syntax: PromptSyntax
    eta: float | None
    preview: str | None
    preview_every: int
    ip_images: tuple[ImagePromptSpec, ...]
    vae_tiling: bool
    refiner: RefinerSpec | None
    upscale: UpscaleSpec | None
    conditioning: SizeConditioning
    recipe: Recipe | None
    controls: tuple[ControlSpec, ...]
    adapters: tuple[AdapterSpec, ...]
    savings: Savings
    quality: QualityName | None


def generate(
    prompt: str | GenerateSpec,
    *,
    engine_dir: str | Path | None = None,
    progress: bool = True,
    **options: Unpack[GenerateOptions],
) -> GenerateReport:
    """Make images and save them, as `sdtrt txt2img`, `sdtrt img2img` and `sdtrt inpaint` do.

    Args:
        prompt: a text, or a whole `GenerateSpec`.
        engine_dir: None for $SDTRT_ENGINE_DIR, `./engines` where it is, or the user's cache.
        progress: say on stderr what goes on.
        options: fields of `GenerateSpec` (`steps=20, height=512, seed=7, output=Path("out")`), beside a text alone.

    Returns:
        The report: `report.images[0].path`, seeds, engines, seconds.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        ModelError, EngineError, ExportError, BuildError, CacheError: where the model or an engine can't be had.

    Example:
        >>> import sdtrt
        >>> report = sdtrt.generate("a red circle", steps=2, height=64, width=64, seed=1)
        >>> report.images[0].seed
        1
    """
    from sdtrt.pipeline.runs.generate import generate as make

    return make(_spec_of(prompt, options), _directory(engine_dir), Console(quiet=not progress))


def _spec_of(prompt: str | GenerateSpec, options: GenerateOptions) -> GenerateSpec:
    """The request. Raises `UsageError` for options that it has not, and for any beside a whole one."""
    if isinstance(prompt, GenerateSpec):
        if options:
            names = ", ".join(options)
            raise UsageError(f"{names} beside a GenerateSpec, which has its own", hint="dataclasses.replace(spec, ...)")
        return prompt
    known = GenerateOptions.__annotations__
    if unknown := options.keys() - known.keys():
        raise UsageError(f"generate has no {', '.join(sorted(unknown))}", hint=f"it has {', '.join(known)}")
    model = options.get("model")
    fields: dict[str, Any] = {**options, **({"model": ModelSpec(model)} if isinstance(model, str) else {})}
    return GenerateSpec(prompts=(prompt,), **fields)


def export(
    spec: ExportSpec | None = None, *, engine_dir: str | Path | None = None, progress: bool = True
) -> Entry | Path:
    """Write a component of a model as ONNX, checked against PyTorch.

    Args:
        spec: the model, the component and its precision; None for the UNet of `tiny` in fp16.
        engine_dir, progress: as of `generate`.

    Returns:
        The entry of the engine directory, whose `file("model.onnx")` is the graph; the file, where `spec.output` names
        one.

    Raises:
        UsageError, ModelError, ExportError, CacheError, OutputError: where it can't be made or kept.

    Example:
        >>> import sdtrt
        >>> from sdtrt.specs import ExportSpec
        >>> entry = sdtrt.export(ExportSpec(component="text_encoder", precision="fp32"))
        >>> entry.file("model.onnx").is_file()
        True
    """
    from sdtrt.exports.component import export_component
    from sdtrt.exports.to_file import export_file

    spec, console = spec or ExportSpec(), Console(quiet=not progress)
    with quiet_libraries():
        model = resolve_model(spec.model, console)
        if spec.output is not None:
            return export_file(model, spec, console)
        return export_component(model, spec, _directory(engine_dir), console)


def build(spec: BuildSpec, *, engine_dir: str | Path | None = None, progress: bool = True) -> Entry:
    """Find or build an engine; its component is exported first where that is missing.

    Args:
        spec: the export, the backend, and the sizes (`Profile`) that a TensorRT engine serves.
        engine_dir, progress: as of `generate`.

    Returns:
        The entry of the engine directory.

    Raises:
        UsageError, ModelError, ExportError, BuildError, CacheError: where it can't be made or kept.

    Example:
        >>> import sdtrt
        >>> from sdtrt.specs import BuildSpec, ExportSpec
        >>> entry = sdtrt.build(BuildSpec(ExportSpec(component="text_encoder", precision="fp32"), "onnxruntime"))
        >>> entry.key["component"]
        'text_encoder'
    """
    from sdtrt.backends.build import build_engine

    console = Console(quiet=not progress)
    with quiet_libraries():
        return build_engine(resolve_model(spec.export.model, console), spec, _directory(engine_dir), console)


def open_session(entry: Entry, device: str | torch.device | None = None) -> Session[torch.Tensor]:
    """Open an engine: torch tensors in, torch tensors out, by the names in `session.inputs` and `session.outputs`.

    Args:
        entry: of the kind `engine`, as `build` returns it.
        device: where its tensors lie; None for where its backend runs, `cuda` or `cpu`.

    Returns:
        A context manager, whose `run` takes and gives tensors by name. It serves one thread at a time.

    Raises:
        CacheError: where a file of the entry is not what was published.
        EngineError: where it can't be loaded on this machine.

    Example:
        >>> import sdtrt, torch
        >>> from sdtrt.specs import BuildSpec, ExportSpec
        >>> entry = sdtrt.build(BuildSpec(ExportSpec(component="text_encoder", precision="fp32"), "onnxruntime"))
        >>> with sdtrt.open_session(entry) as session:
        ...     outputs = session.run({"input_ids": torch.zeros(1, 77, dtype=torch.int32)})
        >>> sorted(outputs)
        ['last_hidden_state', 'penultimate_hidden_state']
    """
    import torch

    from sdtrt.backends import open as opening
    from sdtrt.backends import registry

    place = device if device is not None else registry.get(str(entry.key.get("backend"))).device()
    return opening.open_session(entry, torch.device(place))


def _directory(path: str | Path | None) -> EngineDirectory:
    return EngineDirectory(Path(path) if path is not None else default_directory())

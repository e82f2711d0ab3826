"""The public functions beside `accelerate` and `load`: one call each for what a command does, without its terminal.

They make a spec of their arguments and call the room that does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import Console, quiet_libraries
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import BuildSpec, ExportSpec, GenerateSpec, ModelSpec

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.session import Session
    from sdtrt.engines.entry import Entry
    from sdtrt.pipeline.generate import GenerateReport


def generate(
    prompt: str | GenerateSpec, *, engine_dir: str | Path | None = None, progress: bool = True, **options: Any
) -> GenerateReport:
    """Make images and save them, as `sdtrt txt2img` and `sdtrt img2img` do.

    Args:
        prompt: a text, or a whole `GenerateSpec`.
        engine_dir: None for $SDTRT_ENGINE_DIR, `./engines` where it is, or the user's cache.
        progress: say on stderr what goes on.
        options: fields of `GenerateSpec` (`steps=20, height=512, seed=7, output=Path("out")`), beside a text.

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
    from sdtrt.pipeline.generate import generate as make

    spec = prompt if isinstance(prompt, GenerateSpec) else GenerateSpec(prompts=(prompt,), **options)
    return make(spec, _directory(engine_dir), Console(quiet=not progress))


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


def open_session(
    entry: Entry, device: str | torch.device | None = None, model: ModelSpec | None = None
) -> Session[torch.Tensor]:
    """Open an engine: torch tensors in, torch tensors out, by the names in `session.inputs` and `session.outputs`.

    Args:
        entry: of the kind `engine`, as `build` returns it.
        device: where its tensors lie; None for where its backend runs, `cuda` or `cpu`.
        model: whose weights an engine that holds none computes with; None where `session.set_weights` follows.

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
    source = resolve_model(model) if model is not None else None
    return opening.open_session(entry, torch.device(place), model=source)


def _directory(path: str | Path | None) -> EngineDirectory:
    return EngineDirectory(Path(path) if path is not None else default_directory())

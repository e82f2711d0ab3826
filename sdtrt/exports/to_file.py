"""An export for other programs, written to a file of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import OutputError, UsageError, quote
from sdtrt.common.files import FULL, fsync, make_folders, private_folder, rename_to_free
from sdtrt.common.interrupts import held
from sdtrt.engines.keys import Sight, steadily
from sdtrt.exports.component import _make
from sdtrt.models.components import part_of
from sdtrt.models.source import ModelSource
from sdtrt.specs import ExportSpec


def export_file(model: ModelSource, spec: ExportSpec, console: Console = QUIET) -> Path:
    """Export a component to the file `spec.output`: complete and checked, or not at all.

    Raises:
        UsageError: `spec.output` is no `.onnx` file name, or there is such a file and `spec.overwrite` is off.
        OutputError: it can't be written there.
        ExportError: as of `export_component`.
    """
    if spec.output is None:
        raise ValueError("export_file needs spec.output")
    target = spec.output.absolute()
    _check_target(target, spec.component, overwrite=spec.overwrite)
    steadily(partial(_write, model, spec, target, console), console)
    return spec.output


def _write(model: ModelSource, spec: ExportSpec, target: Path, console: Console) -> None:
    """One attempt of `export_file`. Raises `ModelChangedError` where the weights were replaced while they were read."""
    sight = Sight(model, (part_of(spec.component),))
    with _draft_folder(target) as folder:
        with sight.steady():
            _make(model, spec, console, folder, name=target.name)
        _move_into_place(folder, target, overwrite=spec.overwrite)


def _check_target(target: Path, component: str, *, overwrite: bool) -> None:
    """Refuse an output that is no `.onnx` file name, or that is there already."""
    if target.suffix != ".onnx" or target.is_dir():
        is_folder = target.is_dir() or not (target.suffix or target.exists())
        better = target / f"{component}.onnx" if is_folder else target.with_suffix(".onnx")
        raise UsageError(f"--output must name an .onnx file, got {target}", hint=f"use --output {quote(str(better))}")
    for path in (target, _data_file(target)):
        if (path.exists() or path.is_symlink()) and not overwrite:
            raise UsageError(f"{path} exists", hint="use --overwrite, or another --output")


def _data_file(target: Path) -> Path:
    return target.with_name(target.name + ".data")


@contextmanager
def _draft_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target; made before the work starts, so that an unwritable place costs no time."""
    with ExitStack() as stack:
        try:
            make_folders(target.parent)
            folder = stack.enter_context(private_folder(target.parent, f".{target.name}-"))
        except OSError as error:
            raise OutputError(
                f"can't write {target}: {error.strerror}", hint="name another file: --output FOLDER/unet.onnx"
            ) from error
        try:
            yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            hint = "free some space there, or name another file with --output"
            raise OutputError(f"can't write {target}: {error.strerror}", hint=hint) from error


def _move_into_place(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Rename the draft's files to the target's; the graph last, as it refers to the data.

    Should this be cut short, there is no graph rather than an old one with new weights.
    """
    data = _data_file(target)
    has_data = (folder / data.name).exists()
    move = Path.replace if overwrite else rename_to_free
    try:
        for path in folder.iterdir():
            fsync(path)
        with held():
            if has_data:
                if overwrite and data.exists():
                    target.unlink(missing_ok=True)
                move(folder / data.name, data)
            move(folder / target.name, target)
            if not has_data and overwrite:
                data.unlink(missing_ok=True)  # of the export that was overwritten
        fsync(target.parent)
    except FileExistsError as error:
        raise OutputError(
            f"{error.filename2 or target} has come into being meanwhile", hint="name another file with --output"
        ) from error
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror}", hint="name another file with --output") from error

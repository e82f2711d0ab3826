"""The command line: parse → spec → one call → render. Heavy imports happen inside the commands."""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from typer import Argument, Option

from sdtrt import __version__
from sdtrt.cli.options import (
    BackendOptions,
    BenchOptions,
    BuildOptions,
    DirectoryOptions,
    ExporterOptions,
    GenerateOptions,
    ModelOptions,
    NoiseOptions,
    OutputOptions,
    ProfileOptions,
    VerifyOptions,
    grouped,
)
from sdtrt.cli.startup import quick_imports
from sdtrt.common import interrupts, threads
from sdtrt.common.console import Console, print_table
from sdtrt.common.errors import CacheError, SdtrtError, UsageError, command_line, first_line, printable
from sdtrt.common.files import FULL, LIMITS, MORE_FILES, RAISE_LIMITS, is_exhausted
from sdtrt.engines.directory import Checked, mend_of
from sdtrt.engines.entry import Entry, ForeignEntry, removal_of
from sdtrt.specs import (
    BACKENDS,
    DEFAULT_STRENGTH,
    GIB,
    PRECISIONS,
    Backend,
    Component,
    GenerateSpec,
    Precision,
    PruneSpec,
    Sizes,
    bytes_of,
    check_choice,
)

if TYPE_CHECKING:
    from sdtrt.models.resolve import Model
    from sdtrt.reports.bench import BenchReport
    from sdtrt.reports.inspection import EngineReport, ModelReport
    from sdtrt.reports.verify_report import VerifyReport

DAY = 86400
NO_ROOM = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")  # of the system's loader
NO_THREAD = "can't start new thread"  # in Python's own words

app = typer.Typer(
    name="sdtrt",
    help="Stable Diffusion, fast on your own GPU: TensorRT engines inside unmodified diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
engines_app = typer.Typer(help="The engine directory: list, verify, remove, prune.", invoke_without_command=True)
app.add_typer(engines_app, name="engines")


def _show_version(wanted: bool) -> None:
    """Print the version and end, before a command is asked for."""
    if wanted:
        print(f"sdtrt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", help="show the version", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
@grouped
def txt2img(
    generate: GenerateOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Make images from text."""
    _generate(generate.spec(model.spec(), backend, noise=noise.spec()), directory, output)


@app.command()
@grouped
def img2img(
    init_image: Annotated[Path, Option("--init-image", "-i", help="the image to start from")],
    strength: Annotated[float, Option(help="how much of it is replaced: above 0, at most 1")] = DEFAULT_STRENGTH,
    *,
    generate: GenerateOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Make images from an image and text."""
    image = {"init_image": init_image, "strength": strength, "noise": noise.spec()}
    _generate(generate.spec(model.spec(), backend, **image), directory, output)


def _generate(spec: GenerateSpec, directory: DirectoryOptions, output: OutputOptions) -> None:
    """Run a generation; stdout gets the image paths, one a line, or one JSON document."""
    from sdtrt.engines.digests import hash_ahead

    engines = directory.directory()
    if spec.backend != "torch":
        hash_ahead(lambda: engines.likely(spec.model.name, spec.backend))
    with quick_imports():
        if spec.backend != "onnxruntime":
            from sdtrt.cli.prewarm import start_gpu

            start_gpu(spec, engines)
        from sdtrt.pipeline.generate import generate

    report = generate(spec, engines, output.console())
    _render([str(image.path) for image in report.images], report.to_json(), output)


@app.command()
@grouped
def export(
    precision: Annotated[str, Option(help=f"one of {', '.join(PRECISIONS)}")] = "fp16",
    target: Annotated[
        Path | None, Option("--output", "-o", help="an .onnx file to write; by default the engine directory")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="replace an output file that exists")] = False,
    *,
    exporter: ExporterOptions,
    model: ModelOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Write the model's components as ONNX with dynamic batch, height and width, checked against PyTorch."""
    _check_components(exporter, model, precision)
    if target is not None and len(exporter.component or ()) != 1:
        count = len(exporter.component or ()) or "all"
        raise UsageError(f"--output takes one component, got {count}", hint="as in --component unet --output unet.onnx")
    engines, console = directory.directory(), output.console()
    from sdtrt.exports.component import FILE_NAME, export_component, export_file
    from sdtrt.models.resolve import resolve_model

    resolved = resolve_model(model.spec(), console)
    specs = [
        exporter.spec(model.spec(), fitting, name, output=target, overwrite=overwrite)
        for name, fitting in _components(resolved, exporter, precision, console)
    ]
    if target is not None:
        path = export_file(resolved, specs[0], console)
        _render([str(path)], {"path": str(path), "precision": specs[0].precision}, output)
        return
    entries = [export_component(resolved, spec, engines, console) for spec in specs]
    _render([str(entry.file(FILE_NAME)) for entry in entries], _document(entries), output)


def _check_components(exporter: ExporterOptions, model: ModelOptions, precision: str) -> None:
    """Refuse what is wrong with an export before anything heavy is loaded."""
    for name in exporter.component or ("unet",):
        exporter.spec(model.spec(), precision, name)


def _components(
    model: Model, exporter: ExporterOptions, precision: str, console: Console
) -> Iterator[tuple[Component, Precision]]:
    """The components that are asked for, each with the precision that it is made in."""
    from sdtrt.models.components import choose_components, precision_of

    if model.missing and not exporter.component:
        console.note(f"{model.name} has no {' and no '.join(model.missing)}: nothing is made of that")
    for name in choose_components(model, exporter.component or ()):
        fitting = precision_of(model, name, cast("Precision", precision))
        if fitting != precision:
            console.note(f"{name}: in {fitting}, as this model's VAE overflows in {precision} (force_upcast)")
        yield name, fitting


def _document(entries: Sequence[Entry]) -> dict[str, Any]:
    """Entries as one JSON document: one entry as it is, several as a list."""
    documents = [{"path": str(entry.path), **entry.to_json()} for entry in entries]
    return documents[0] if len(documents) == 1 else {"entries": documents}


@app.command()
@grouped
def build(
    options: BuildOptions,
    sizes: ProfileOptions,
    exporter: ExporterOptions,
    backend: BackendOptions,
    model: ModelOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Build engines from the exported components, exporting first what is missing."""
    check_choice("backend", backend.backend, BACKENDS)
    options.check()
    _check_components(exporter, model, backend.precision or "fp16")
    sizes.profiles(Sizes(2, 512, 512))
    engines, console = directory.directory(), output.console()
    from sdtrt.backends.build import build_engine
    from sdtrt.backends.registry import choose_backend, default_precision
    from sdtrt.models.components import profiles_of
    from sdtrt.models.resolve import resolve_model

    chosen: Backend = choose_backend(backend.backend, console)  # type: ignore[arg-type]  # checked above
    if chosen == "onnxruntime" and sizes.given():
        console.note(f"{sizes.given()}: without effect, as ONNX Runtime engines take any size")
    resolved = resolve_model(model.spec(), console)
    profiles = () if chosen == "onnxruntime" else sizes.profiles(Sizes(2, *resolved.default_size()))
    components = _components(resolved, exporter, backend.precision or default_precision(chosen), console)
    exports = [exporter.spec(model.spec(), fitting, name) for name, fitting in components]
    specs = options.specs(exports, chosen, {one.component: profiles_of(one.component, profiles) for one in exports})
    entries = [build_engine(resolved, replace(spec, force=exporter.force), engines, console) for spec in specs]
    _render([str(entry.path) for entry in entries], _document(entries), output)


@app.command()
@grouped
def verify(
    options: VerifyOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Hold an engine against the fp32 model: at each timestep of a denoising run, and in its final image."""
    spec = options.spec(model.spec(), backend, noise.spec())
    with quick_imports():
        from sdtrt.reports.verify import verify

    report = verify(spec, directory.directory(), output.console())
    _show(report, output)
    report.raise_on_failure()


@app.command()
@grouped
def bench(
    options: BenchOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Time whole pipeline calls and their parts, beside PyTorch in the same run."""
    spec = options.spec(model.spec(), backend, noise.spec())
    with quick_imports():
        from sdtrt.reports.bench import run_bench

    report = run_bench(spec, directory.directory(), output.console(), command_line("sdtrt", *sys.argv[1:]))
    _show(report, output)
    report.check()


@app.command()
@grouped
def inspect(
    engine: Annotated[str | None, Option("--engine", "-e", help="an engine of the engine directory, by name")] = None,
    part: Annotated[str | None, Option(help="one part of the model, such as text_encoder")] = None,
    tree: Annotated[bool, Option("--tree", help="the part's whole PyTorch module tree")] = False,
    *,
    model: ModelOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Show a model's parts and sizes, or an engine's inputs, outputs and profiles."""
    from sdtrt.reports.inspection import inspect_engine, inspect_model

    report: EngineReport | ModelReport
    if engine is not None:
        if part is not None or tree:
            raise UsageError("--part and --tree are about a model, not an engine", hint="leave --engine out, or those")
        report = inspect_engine(directory.directory().named(engine))
    else:
        from sdtrt.models.resolve import resolve_model

        report = inspect_model(resolve_model(model.spec(), output.console()), part, tree=tree)
    _show(report, output)


@app.command()
@grouped
def doctor(directory: DirectoryOptions, output: OutputOptions) -> None:
    """Say what this machine can run, what is missing, and the command that mends it."""
    from sdtrt.reports.doctor import diagnose

    diagnosis = diagnose(directory.directory())
    if output.as_json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        rows = [(finding.state, finding.name, finding.detail, finding.mend) for finding in diagnosis.findings]
        print_table(("", "what", "seen", "to mend"), rows)
        print(f"\nthis machine can run: {', '.join(diagnosis.backends) or 'nothing yet'}")
    if not diagnosis.healthy:
        raise typer.Exit(1)


@engines_app.callback()
@grouped
def engines(context: typer.Context, directory: DirectoryOptions, output: OutputOptions) -> None:
    """The engine directory: list, verify, remove, prune."""
    command = context.invoked_subcommand
    if command is None:
        _list(directory, output)
    elif (directory, output) != (DirectoryOptions(), OutputOptions()):
        raise UsageError(
            f"options before {command} would not reach it", hint=f"give them after it: sdtrt engines {command} ..."
        )


@engines_app.command("list")
@grouped
def list_entries(directory: DirectoryOptions, output: OutputOptions) -> None:
    """List exports and engines, with their sizes and when they were last used."""
    _list(directory, output)


@engines_app.command("rm")
@grouped
def remove_entries(
    names: Annotated[list[str], Argument(help="names, or their beginnings")],
    *,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Remove entries by name, damaged ones too."""
    found = directory.directory()
    folders = {folder.name: folder for folder in (found.folder_named(name) for name in names)}
    for folder in folders.values():  # all or none
        found.require_free(folder)
    for folder in folders.values():
        found.remove(folder)
    _render(list(folders), {"removed": list(folders)}, output)


@engines_app.command("verify")
@grouped
def verify_entries(directory: DirectoryOptions, output: OutputOptions) -> None:
    """Read every entry whole and compare it with what was published; exit 1 where one is damaged or unsafe."""
    found = directory.directory()
    with output.console().stage("verifying"):
        checked = list(found.check())
    if output.as_json:
        print(json.dumps({"directory": str(found.path), "entries": [asdict(one) for one in checked]}, indent=2))
    elif checked:
        print_table(("name", "state", "size", "what is wrong"), [_row(one) for one in checked])
    damaged = [one.name for one in checked if one.state == "damaged"]
    if damaged:
        raise CacheError(
            f"{len(damaged)} of {len(checked)} entries are damaged: {', '.join(damaged)}",
            hint=f"{removal_of(found.path, *damaged)}; what is needed of them is made again",
        )
    if unsafe := found.unsafe():
        raise CacheError(
            f"{len(unsafe)} of {len(checked)} entries can be changed by other users: {', '.join(unsafe)}",
            hint=f"{mend_of(unsafe)}, if nobody has; else {removal_of(found.path, *unsafe)}",
        )


def _row(one: Checked) -> tuple[str, str, str, str]:
    """What was found of an entry, as a table's row."""
    return one.name, one.state, f"{one.size_bytes / 2**20:.1f} MiB", one.problem


@engines_app.command("prune")
@grouped
def prune_entries(
    older_than_days: Annotated[float | None, Option(help="remove what was not used for so many days")] = None,
    keep_gib: Annotated[float | None, Option(help="remove the least recently used until the rest fits")] = None,
    foreign: Annotated[bool, Option("--foreign", help="remove what this machine or this sdtrt can't load")] = False,
    damaged: Annotated[bool, Option("--damaged", help="remove what engines verify finds damaged")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="only say what would go")] = False,
    *,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Remove entries by age, size, host or damage, and what killed builds left behind; nothing that is in use."""
    keep_bytes = None if keep_gib is None else bytes_of("--keep-gib", keep_gib)
    spec = PruneSpec(older_than_days, keep_bytes, foreign, damaged, dry_run)
    from sdtrt.engines.upkeep import prune

    console = output.console()
    pruned = prune(directory.directory(), spec, console)
    verb = "would remove" if spec.dry_run else "removed"
    size = f"{pruned.freed_bytes / GIB:.2f} GiB"
    console.note(f"{verb} {len(pruned.removed)} entries, {size}, and {pruned.leftovers} unfinished builds")
    _render(pruned.removed, asdict(pruned), output)


def _list(directory: DirectoryOptions, output: OutputOptions) -> None:
    """Show all entries."""
    found = directory.directory()
    entries = found.all_entries()
    console = output.console()
    passed_over = found.warn_of_unsafe(console)
    if output.as_json:
        lists: dict[str, list[dict[str, Any]]] = {"entries": [], "foreign": []}
        for entry in entries:
            lists["entries" if isinstance(entry, Entry) else "foreign"].append(entry.to_json())
        print(json.dumps({"directory": str(found.path), **lists}, indent=2))
        return
    rows = [
        (entry.name, _made_for(entry), f"{entry.size_bytes / 2**20:.1f} MiB", _age(entry.last_used))
        for entry in entries
    ]
    if rows:
        print_table(("name", "model", "size", "last used"), rows)
    elif not passed_over:
        console.note(f"{found.path} has no engines yet: sdtrt build makes one")


def _made_for(entry: Entry | ForeignEntry) -> str:
    """The model that an entry was made for, as the list shows it."""
    return str(entry.info.get("model", "")) if isinstance(entry, Entry) else "(of another version of sdtrt)"


def _age(moment: float) -> str:
    """How long ago a moment was, roughly."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _show(report: EngineReport | ModelReport | VerifyReport | BenchReport, output: OutputOptions) -> None:
    """Print a report on stdout: as a table, or as one JSON document."""
    if output.as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        report.print()


def _render(lines: Sequence[str], document: Mapping[str, Any], output: OutputOptions) -> None:
    """Print a command's result on stdout: lines, or one JSON document."""
    if output.as_json:
        print(json.dumps(document, indent=2))
    elif lines:
        print("\n".join(lines))


def _as_it_came_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for stdout: paths go out as they came in, whatever their bytes; else as `\\u043a`."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def main() -> NoReturn:
    """Run the command line; every failure that its reader can mend is an `error:` and a `hint:` line on stderr."""
    if isinstance(sys.stdout, TextIOWrapper):
        codecs.register_error("sdtrt", _as_it_came_or_escaped)
        sys.stdout.reconfigure(errors="sdtrt")
    try:
        _check_working_folder()
        _check_docstrings()
        if threads.make_do():
            Console().warn(f"few threads to spare, so that one computes: {RAISE_LIMITS}")
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except SdtrtError as error:
        code = _fail(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # only where nobody listens (`interrupts.listen`)
        code = interrupts.INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        code = 1
    except MemoryError:
        code = _fail("out of memory", "end other programs, or use a smaller --height and --width", 1)
    except _CLICK_EXCEPTION as error:
        message = error.format_message()  # empty where the help was shown instead, for want of arguments
        hint = f"{_command_path(error)} --help shows the options"
        code = _fail(message, hint, error.exit_code) if message else error.exit_code
    except Exception as error:
        code = _fail_of_the_system(error)
    if code == interrupts.INTERRUPTED:  # newer typers turn the exception into this code themselves
        _fail(interrupts.MESSAGE, interrupts.HINT, interrupts.INTERRUPTED)
    sys.exit(code)


def _check_docstrings() -> None:
    """Raise `SdtrtError` where Python leaves docstrings out: transformers can't be imported without its own."""
    if sys.flags.optimize > 1:
        raise SdtrtError(
            "Python runs without docstrings (-OO, PYTHONOPTIMIZE=2), which transformers and the help of commands need",
            hint="unset PYTHONOPTIMIZE",
        )


def _check_working_folder() -> None:
    """Raise `SdtrtError` where the working folder is gone: libraries end the process without a word of sense."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise SdtrtError(f"the working folder can't be used: {error.strerror}", hint="cd to one that exists") from error


def _drop_stdout() -> None:
    """Let what is left in stdout's buffer go nowhere, so that the interpreter's own flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_of_the_system(error: Exception) -> int:
    """Say what the system has no more of: files to open, memory, threads, or space. Raises what is of another kind."""
    if is_exhausted(error):
        return _fail(f"too many files are open: {first_line(error)}", MORE_FILES, 1)
    if isinstance(error, (ImportError, RuntimeError)) and any(text in str(error) for text in NO_ROOM):
        return _fail(f"out of memory: {first_line(error)}", "end other programs, or raise the limit: ulimit -v", 1)
    if (isinstance(error, OSError) and error.errno in LIMITS) or str(error) == NO_THREAD:
        return _fail(str(error), RAISE_LIMITS, 1)
    if not isinstance(error, OSError) or error.errno not in (*FULL, errno.EIO):
        raise error
    _drop_stdout()
    what = error.filename or "all of the output"
    hint = "free some space, or write elsewhere; temporary files go where $TMPDIR says"
    return _fail(f"can't write {what}: {error.strerror}", hint, 1)


def _fail(message: str, hint: str, code: int) -> int:
    """Say what is wrong and what mends it. Where files can't be opened, nothing else that is advised would help."""
    hint = MORE_FILES if is_exhausted(sys.exception()) else hint
    print(f"error: {printable(message)}\nhint: {printable(hint)}", file=sys.stderr)
    return code


# Typer's errors derive from click's class of this name, which newer versions carry inside typer.
_CLICK_EXCEPTION: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _command_path(error: Any) -> str:
    """The command that a usage error is about, as typed."""
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "sdtrt"

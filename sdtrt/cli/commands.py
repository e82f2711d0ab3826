"""The command line: parse → spec → one call → render. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer import Option

from sdtrt import __version__
from sdtrt.backends import registry
from sdtrt.cli.engine_commands import engines_app
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
from sdtrt.cli.prewarm import quick_imports
from sdtrt.cli.render import document, render, show
from sdtrt.common.console import Console, print_table
from sdtrt.common.errors import UsageError, command_line
from sdtrt.specs import (
    DEFAULT_STRENGTH,
    PRECISIONS,
    Component,
    GenerateSpec,
    Precision,
    Sizes,
)

if TYPE_CHECKING:
    from sdtrt.models.resolve import Model
    from sdtrt.reports.inspection import EngineReport, ModelReport


app = typer.Typer(
    name="sdtrt",
    help="Stable Diffusion, fast on your own GPU: TensorRT engines inside unmodified diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
    from sdtrt.engines.find import likely

    engines = directory.directory()
    candidates = registry.candidates(spec.backend)
    if any(backend.source for backend in candidates):
        hash_ahead(lambda: likely(engines, spec.model.name, spec.backend))
    with quick_imports():
        if any("cuda" in backend.devices for backend in candidates):
            from sdtrt.cli.prewarm import start_gpu

            start_gpu(spec, engines)
        from sdtrt.pipeline.generate import generate

    report = generate(spec, engines, output.console())
    render([str(image.path) for image in report.images], report.to_json(), output)


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
    from sdtrt.exports.component import FILE_NAME, export_component
    from sdtrt.exports.to_file import export_file
    from sdtrt.models.resolve import resolve_model

    resolved = resolve_model(model.spec(), console)
    specs = [
        exporter.spec(model.spec(), fitting, name, output=target, overwrite=overwrite)
        for name, fitting in _components(resolved, exporter, precision, console)
    ]
    if target is not None:
        path = export_file(resolved, specs[0], console)
        render([str(path)], {"path": str(path), "precision": specs[0].precision}, output)
        return
    entries = [export_component(resolved, spec, engines, console) for spec in specs]
    render([str(entry.file(FILE_NAME)) for entry in entries], document(entries), output)


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
    backend.check()
    options.check()
    _check_components(exporter, model, backend.precision or "fp16")
    sizes.profiles(Sizes(2, 512, 512))
    engines, console = directory.directory(), output.console()
    from sdtrt.backends.build import build_engine
    from sdtrt.models.components import profiles_of
    from sdtrt.models.resolve import resolve_model

    chosen = registry.get(registry.choose_backend(backend.backend, console))
    if chosen.takes_any_size and sizes.given():
        console.note(f"{sizes.given()}: without effect, as {chosen.title} engines take any size")
    resolved = resolve_model(model.spec(), console)
    profiles = () if chosen.takes_any_size else sizes.profiles(Sizes(2, *resolved.default_size()))
    components = _components(resolved, exporter, backend.precision or chosen.default_precision(), console)
    exports = [exporter.spec(model.spec(), fitting, name) for name, fitting in components]
    specs = options.specs(exports, chosen, {one.component: profiles_of(one.component, profiles) for one in exports})
    entries = [build_engine(resolved, replace(spec, force=exporter.force), engines, console) for spec in specs]
    render([str(entry.path) for entry in entries], document(entries), output)


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
    show(report, output)
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
    show(report, output)
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
    show(report, output)


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

"""The commands: each parses its options, builds one spec, calls one function and renders one report.

Heavy libraries are imported inside the commands, so that `--help` loads none. What a command does is not known here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from sdtrt.backends import registry
from sdtrt.cli.build_options import BuildOptions, ExporterOptions, ProfileOptions
from sdtrt.cli.cache_options import CacheOptions
from sdtrt.cli.control_options import AdapterOptions, BesideOptions, ControlNet, ControlOptions, ImagePromptOptions
from sdtrt.cli.engine_commands import engines_app
from sdtrt.cli.groups import grouped
from sdtrt.cli.image_options import (
    GenerateOptions,
    InitImage,
    NoiseOptions,
    RefinerOptions,
    SizeOptions,
    UpscaleOptions,
)
from sdtrt.cli.options import BackendOptions, DirectoryOptions, LoraOptions, ModelOptions, OutputOptions
from sdtrt.cli.prewarm import quick_imports
from sdtrt.cli.quality_options import MetricsOptions
from sdtrt.cli.render import document, render, show
from sdtrt.cli.report_options import BenchOptions, DoctorOptions, VerifyOptions
from sdtrt.cli.saving_options import PresetOptions, SavingOptions
from sdtrt.cli.serve_command import AccessOptions, LimitOptions, ListOptions, ServeOptions, check_packages
from sdtrt.common import host
from sdtrt.common.console import print_table
from sdtrt.common.errors import UsageError, command_line
from sdtrt.common.version import __version__
from sdtrt.specs import (
    ALL,
    DEFAULT_IMAGE_GUIDANCE_SCALE,
    DEFAULT_STRENGTH,
    PRECISIONS,
    GenerateSpec,
    ModelSpec,
)

if TYPE_CHECKING:
    from sdtrt.reports.inspection import EngineReport, ModelReport


app = typer.Typer(
    name="sdtrt",
    help="Stable Diffusion, fast on your own GPU: TensorRT engines inside unmodified diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(engines_app, name="engines")

run_app = typer.Typer(help="Make images: txt2img, img2img and inpaint under one name.", no_args_is_help=True)
app.add_typer(run_app, name="run")


def _show_version(context: typer.Context, wanted: bool) -> None:
    """Print the version and end, before a command is asked for; with `--verbose` those of the libraries, too."""
    if not wanted:
        return
    print(f"sdtrt {__version__}")
    if context.params["verbose"]:
        for name, version in host.library_versions().items():
            print(f"{name} {version}")
    raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    verbose: Annotated[
        bool, Option("--verbose", help="with --version: the libraries' versions, too", is_eager=True)
    ] = False,
    version: Annotated[bool, Option("--version", help="show the version", callback=_show_version)] = False,
) -> None:
    """Options before the command."""
    if verbose:
        command = context.invoked_subcommand
        raise UsageError(
            f"--verbose before {command} would not reach it", hint=f"give it after it: sdtrt {command} ... --verbose"
        )


@app.command()
@run_app.command()
@grouped
def txt2img(
    generate: GenerateOptions,
    control: ControlOptions,
    adapter: AdapterOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    lora: LoraOptions,
    sizes: SizeOptions,
    refiner: RefinerOptions,
    upscale: UpscaleOptions,
    preset: PresetOptions,
    saving: SavingOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Make images from text."""
    named = lora.into(model.spec())
    image = {
        "noise": noise.spec(),
        "conditioning": sizes.spec(),
        "refiner": refiner.spec(named),
        "controls": control.specs(),
        "adapters": adapter.specs(),
    }
    image |= {"upscale": upscale.spec(), **preset.fields(saving)}
    _generate(generate.spec(named, backend, **image), directory, output)


@app.command()
@run_app.command()
@grouped
def img2img(
    init_image: InitImage,
    strength: Annotated[float, Option(help="how much of it is replaced: above 0, at most 1")] = DEFAULT_STRENGTH,
    edit: Annotated[
        bool, Option("--edit", help="change it as the prompt says, by a model for that (instruct-pix2pix)")
    ] = False,
    image_guidance_scale: Annotated[
        float, Option("--image-guidance-scale", "--image-cfg-scale", help="how closely an edit keeps to it, from 1 up")
    ] = DEFAULT_IMAGE_GUIDANCE_SCALE,
    *,
    generate: GenerateOptions,
    control: ControlOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    lora: LoraOptions,
    sizes: SizeOptions,
    refiner: RefinerOptions,
    preset: PresetOptions,
    saving: SavingOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Make images from an image and text."""
    named = lora.into(model.spec())
    image = {"init_image": init_image, "strength": strength, "noise": noise.spec()}
    image |= {"conditioning": sizes.spec(), "refiner": refiner.spec(named), "controls": control.specs()}
    image |= {"edit": edit, "image_guidance_scale": image_guidance_scale, **preset.fields(saving)}
    _generate(generate.spec(named, backend, **image), directory, output)


@app.command()
@run_app.command()
@grouped
def inpaint(
    init_image: InitImage,
    mask: Annotated[Path, Option("--mask", help="an image of its size: what is white in it is made anew")],
    strength: Annotated[float, Option(help="how much of that is replaced: above 0, at most 1")] = DEFAULT_STRENGTH,
    mask_blur: Annotated[int, Option(help="pixels by which the mask's edges are softened")] = 0,
    padding_crop: Annotated[
        int | None, Option(help="make the masked part alone, with so many pixels around it; the rest stays as it is")
    ] = None,
    *,
    generate: GenerateOptions,
    control: ControlOptions,
    noise: NoiseOptions,
    model: ModelOptions,
    lora: LoraOptions,
    sizes: SizeOptions,
    preset: PresetOptions,
    saving: SavingOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Make anew what a mask covers of an image."""
    image = {"init_image": init_image, "strength": strength, "noise": noise.spec(), "conditioning": sizes.spec()}
    image |= {"controls": control.specs(), **preset.fields(saving)}
    image |= {"mask": mask, "mask_blur": mask_blur, "padding_crop": padding_crop}
    _generate(generate.spec(lora.into(model.spec()), backend, **image), directory, output)


def _generate(spec: GenerateSpec, directory: DirectoryOptions, output: OutputOptions) -> None:
    """Make the images of a request; stdout gets their paths, one a line, or one JSON document."""
    from sdtrt.cli.weights_ahead import read_ahead
    from sdtrt.engines.digests import hash_ahead
    from sdtrt.engines.find import likely

    engines = directory.directory()
    candidates = registry.candidates(spec.backend)
    if any(backend.source for backend in candidates):
        hash_ahead(lambda: likely(engines, spec.model, spec.backend))
    read_ahead(spec, engines)
    with quick_imports():
        if any("cuda" in backend.devices for backend in candidates):
            from sdtrt.cli.prewarm import start_gpu

            start_gpu(spec, engines)
        from sdtrt.pipeline.runs.generate import generate

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
    controlnet: ControlNet = None,
    *,
    exporter: ExporterOptions,
    model: ModelOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Write the model's components as ONNX with dynamic batch, height and width, checked against PyTorch."""
    beside = replace(model.spec(), controlnet=controlnet)
    request = exporter.request(beside, precision, output=target, overwrite=overwrite)
    engines, console = directory.directory(), output.console()
    from sdtrt.exports.request import export_all, export_to_file

    if target is not None:
        path, spec = export_to_file(request, console)
        render([str(path)], {"path": str(path), "precision": spec.precision}, output)
        return
    entries = export_all(request, engines, console)
    render([str(entry.file("model.onnx")) for entry in entries], document(entries), output)


@app.command()
@grouped
def build(
    options: BuildOptions,
    sizes: ProfileOptions,
    exporter: ExporterOptions,
    backend: BackendOptions,
    model: ModelOptions,
    lora: LoraOptions,
    beside: BesideOptions,
    cache: CacheOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Build engines from the exported components, exporting first what is missing.

    --backend all builds those of each backend that runs here, and shows how fast each is.
    """
    if backend.backend != ALL:
        backend.check()
    exports = exporter.request(beside.into(lora.into(model.spec())), backend.precision or "fp16")
    exports = replace(exports, caching=cache.caching())
    requests = [options.request(one, backend, sizes.request()) for one in beside.beside(exports)]
    engines, console = directory.directory(), output.console()
    from sdtrt.backends.build import build_all, build_each

    make = build_each if backend.backend == ALL else build_all
    entries = [entry for one in requests for entry in make(one, engines, console)]
    render([str(entry.path) for entry in entries], document(entries), output)


def _refuse_pictures(option: str, model: ModelSpec, control: ControlOptions) -> None:
    """Refuse what goes by pictures beside a comparison of savings, which makes its pictures from text alone."""
    given = {"--controlnet": control.specs(), "--ip-adapter": model.ip_adapters}
    for name, found in given.items():
        if found:
            raise UsageError(f"{name} has no effect beside {option} yet", hint=f"leave {name} out, or {option}")


@app.command()
@grouped
def verify(
    options: VerifyOptions,
    metrics: MetricsOptions,
    control: ControlOptions,
    pictures: ImagePromptOptions,
    noise: NoiseOptions,
    preset: PresetOptions,
    saving: SavingOptions,
    model: ModelOptions,
    lora: LoraOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Hold an engine against the fp32 model, at each timestep of a run and in its final image; or savings against none.

    --against exact makes the same pictures with and without what is saved, and says what that loses.
    """
    named, pictured = (
        pictures.into(lora.into(model.spec())),
        {"controls": control.specs(), "ip_images": pictures.specs()},
    )
    if options.against != "fp32":
        _refuse_pictures("--against exact", named, control)
        judged = metrics.spec(offline=named.offline)
        savings = options.quality_spec(named, backend, noise.spec(), judged, preset.fields(saving))
        with quick_imports():
            from sdtrt.reports.quality import verify_quality

        loss = verify_quality(savings, directory.directory(), output.console())
        show(loss, output)
        loss.raise_on_failure()
        return
    for option in (*metrics.given, *preset.given):
        raise UsageError(f"{option} is about savings", hint="add --against exact")
    spec = options.spec(named, backend, noise.spec(), {**pictured, "savings": saving.spec()})
    with quick_imports():
        from sdtrt.reports.verify import verify

    report = verify(spec, directory.directory(), output.console())
    show(report, output)
    report.raise_on_failure()


@app.command()
@grouped
def bench(
    options: BenchOptions,
    metrics: MetricsOptions,
    control: ControlOptions,
    noise: NoiseOptions,
    saving: SavingOptions,
    model: ModelOptions,
    lora: LoraOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Time whole pipeline calls and their parts, beside PyTorch in the same run.

    --quality times choices of savings instead, and says what each loses on the same prompts.
    """
    named, command = lora.into(model.spec()), command_line("sdtrt", *sys.argv[1:])
    if options.quality is not None:
        _refuse_pictures("--quality", named, control)
        for option in saving.given:
            raise UsageError(f"{option} has no effect beside --quality", hint=f"say it there: --quality {option[2:]}=…")
        judged = metrics.spec(offline=named.offline)
        choices = options.quality_spec(named, backend, noise.spec(), judged)
        with quick_imports():
            from sdtrt.reports.quality_bench import bench_quality

        found = bench_quality(choices, directory.directory(), output.console(), command)
        show(found, output)
        found.check()
        return
    for option in metrics.given:
        raise UsageError(f"{option} is about savings", hint="add --quality all")
    spec = options.spec(named, backend, noise.spec(), saving.spec(), control.specs())
    with quick_imports():
        from sdtrt.reports.bench import baselines_code, run_bench

    if options.show_baselines:
        code = baselines_code(spec, output.console())
        render([f"# {title}\n{text}" for title, text in code.items()], code, output)
        return
    report = run_bench(spec, directory.directory(), output.console(), command)
    show(report, output)
    report.check()


@app.command()
@grouped
def serve(
    options: ServeOptions,
    lists: ListOptions,
    access: AccessOptions,
    limits: LimitOptions,
    backend: BackendOptions,
    directory: DirectoryOptions,
) -> None:
    """Serve warm engines over HTTP: OpenAI's interface, the web UIs', and jobs. Stdout gets the address."""
    check_packages()
    spec = options.spec(lists, access, limits, backend, directory)
    from sdtrt.serve.server import run

    run(spec, quiet=options.quiet)


@app.command()
@grouped
def inspect(
    engine: Annotated[str | None, Option("--engine", "-e", help="an engine of the engine directory, by name")] = None,
    part: Annotated[str | None, Option(help="one part of the model, such as text_encoder")] = None,
    tree: Annotated[bool, Option("--tree", help="the part's whole PyTorch module tree")] = False,
    controlnet: ControlNet = None,
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

        shown = replace(model.spec(), controlnet=controlnet)
        report = inspect_model(resolve_model(shown, output.console()), part, tree=tree)
    show(report, output)


@app.command()
@grouped
def doctor(options: DoctorOptions, directory: DirectoryOptions, output: OutputOptions) -> None:
    """Say what this machine can run, what is missing, and the command that mends it."""
    if options.prove:
        with quick_imports():
            from sdtrt.reports.prove import prove

        proofs = prove(output.console())
        show(proofs, output)
        proofs.raise_on_failure()
        return
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

"""Whether an engine computes what its model computes: against the fp32 PyTorch UNet, over a real denoising run.

It chooses what is run and says what came out; the runs, the judgement and the pictures have modules of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtrt.backends import registry
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import EngineError, SdtrtError, UsageError, command_line
from sdtrt.common.metrics import require_ssim
from sdtrt.engines import find
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import Sight, source_key
from sdtrt.models import resolve
from sdtrt.models.components import contract_of
from sdtrt.models.resolve import Model
from sdtrt.pipeline.inputs.control_images import read_control_images
from sdtrt.pipeline.inputs.images import read_init_image
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.engines import build_command
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.pipeline.opening.open import engine_facts
from sdtrt.pipeline.opening.request import PipelineSpec, check_modes, resolve_request
from sdtrt.pipeline.runs import saving
from sdtrt.pipeline.runs.settings import caching_facts
from sdtrt.reports.verify_pictures import comparison, error_plot
from sdtrt.reports.verify_report import TimestepError, VerifyReport, compare_call, compare_images, judge
from sdtrt.reports.verify_runs import (
    Array,
    RecordedCall,
    Shown,
    asked_of,
    run_candidate,
    run_noise_floor,
    run_reference,
    seed_of,
    start_of,
    strength_of,
)
from sdtrt.specs import ExportSpec, GenerateSpec, VerifySpec
from sdtrt.specs.contract import Contract


def verify(spec: VerifySpec, directory: EngineDirectory, console: Console) -> VerifyReport:
    """Hold an engine against the fp32 model, at the timesteps of one denoising run and in its final image.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        SdtrtError: where scikit-image or matplotlib is missing, or the engine can't be had or run.
    """
    require_extras()
    output = saving.plan_output(spec.output, count=2, overwrite=False)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = _shown(spec.image, console)
        model = resolve.resolve_model(spec.image.model, console)
        pipeline_spec, found = _subject(spec, model, shown, directory, console)
        entry = found.get("unet")
        sight = Sight(model, ["unet"])
        same_weights = _same_weights(model, entry, directory)
        if same_weights is False and entry is not None:
            console.note(f"{entry.name} was built from other weights than those of {model.name}")
        reference = run_reference(spec, pipeline_spec, shown, directory, console)
        floor = run_noise_floor(pipeline_spec, reference, shown, console)
        outputs, pixels = run_candidate(spec, pipeline_spec, entry, reference, shown, directory, console)
        sight.check()
    errors = _compare(reference.calls, floor, outputs)
    image = compare_images(pixels, reference.pixels)
    files = _draw(output.folder, errors, pixels, reference.pixels, pipeline_spec)
    settings = _settings(spec, pipeline_spec)
    thresholds = spec.thresholds_of(pipeline_spec.precision)
    failures = judge(thresholds, errors, image)
    facts = {name: engine_facts(one) for name, one in found.items()}
    rebuild = _rebuild(pipeline_spec, found, directory)
    removal = entry.removal if entry is not None else ""
    return VerifyReport(settings, thresholds, errors, image, failures, files, facts, same_weights, rebuild, removal)


def require_extras() -> None:
    """Say early what is missing: a run takes minutes."""
    require_ssim()
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SdtrtError("the plot of verify needs matplotlib", hint="pip install matplotlib") from error


def _shown(image: GenerateSpec, console: Console) -> Shown:
    """The pictures that ControlNets and IP-Adapters go by, read as generations read them."""
    controls = read_control_images(image, None, console)
    pictures = tuple(read_init_image(one.image, console, "ip image").pixels for one in image.ip_images)
    return Shown(controls, pictures, tuple(one.scale for one in image.ip_images))


def _subject(
    spec: VerifySpec, model: Model, shown: Shown, directory: EngineDirectory, console: Console
) -> tuple[PipelineSpec, Mapping[str, Entry]]:
    """How the pipeline runs, and its engines: the UNet's that is named, or the one that would make the image."""
    image = asked_of(spec.image, model)
    start = start_of(image, model)
    maps = [one.picture for one in shown.controls]
    if spec.engine is not None:
        entry = directory.named(spec.engine)
        pipeline_spec = resolve_request(_as_engine(image, entry), model, console, start, maps)
        _check_fits(entry, pipeline_spec)
        _check_takes_all(entry, pipeline_spec)
    else:
        entry, pipeline_spec = None, resolve_fastest(image, model, directory, console, start, maps)
    check_modes(image.controls, (pipeline_spec.model, *pipeline_spec.others.values()))
    # All that the image needs, before the long part begins.
    return pipeline_spec, ensure_all(
        pipeline_spec, directory, console, allow_build=spec.image.allow_build, unet_engine=entry
    )


def _rebuild(spec: PipelineSpec, entries: Mapping[str, Entry], directory: EngineDirectory) -> str:
    """The command that builds the engines beside the UNet's again; empty where there are none."""
    others = tuple(name for name in spec.in_engines if name in entries and name != "unet")
    if not others:
        return ""
    further = [request.model.spec.controlnet or "" for request in spec.other_engines.values()]
    return f"{build_command(replace(spec.engines, components=others), directory, further)} --force"


def _as_engine(image: GenerateSpec, entry: Entry) -> GenerateSpec:
    """The request with an engine's backend and precision; refuses other ones."""
    if entry.kind != "engine" or entry.engine_key.component != "unet":
        listing = command_line("sdtrt", "engines", "list", "--engine-dir", str(entry.path.parent))
        raise UsageError(f"{entry.name} is no engine of a unet", hint=f"{listing} shows the engines")
    key = entry.engine_key
    for name, built_for, given in (
        ("backend", key.backend, image.backend),
        ("precision", key.precision, image.precision),
    ):
        if given not in (None, "auto", built_for):
            raise UsageError(f"{entry.name} is for {built_for}, not {given}", hint=f"leave --{name} out")
    return replace(image, backend=key.backend, precision=key.precision)


def _check_fits(entry: Entry, spec: PipelineSpec) -> None:
    """Refuse an engine of another architecture, or one that does not take the run's sizes."""
    groups = spec.engines.groups_of("unet")
    if Contract.from_json(entry.info["contract"]) != contract_of(spec.model, "unet", spec.precision, groups):
        same = set(groups) == set(entry.engine_key.export.groups)
        model = f"it was built for {entry.info.get('model')}: give that as --model"
        with_groups = " with inputs for ".join(("unet", *groups))
        raise EngineError(
            f"{entry.name} takes other inputs than the {with_groups} of {spec.model.name}",
            hint=model if same else "leave --engine out: the engine of such a run is found, or built",
        )
    profiles = entry.engine_key.profiles
    if find.slack(profiles, spec.sizes) is None:
        best = profiles[0].optimum
        guidance = " --guidance-scale 1" if best.batch == 1 else ""
        raise EngineError(
            f"{entry.name} does not take {spec.sizes}",
            hint=f"use --height {best.height} --width {best.width}{guidance}",
        )


def _check_takes_all(entry: Entry, spec: PipelineSpec) -> None:
    """Refuse an engine that alone does not serve a run with steps without guidance."""
    rows = spec.prompt_rows
    if rows is not None and find.slack(entry.engine_key.profiles, replace(spec.sizes, batch=rows)) is None:
        raise EngineError(
            f"{entry.name} takes no call of {rows} row{'s' * (rows > 1)}, which steps without guidance are",
            hint="leave --guidance-interval or --engine out",
        )


def _same_weights(model: Model, entry: Entry | None, directory: EngineDirectory) -> bool | None:
    """Whether an engine was built from the model's own weights and configuration, or serves any of its architecture."""
    if entry is None:
        return None
    key = entry.engine_key
    export = ExportSpec(model.spec, "unet", key.precision, groups=key.export.groups)
    own = source_key(model, export, directory.file_digest, weights=registry.get(key.backend).weights_inside)
    return key.export.fingerprint == own.fingerprint


def _compare(
    calls: Sequence[RecordedCall], floor: Sequence[Array], outputs: Sequence[Array]
) -> tuple[TimestepError, ...]:
    """The errors at each timestep."""
    return tuple(
        compare_call(float(call.timestep), output, call.output, own)
        for call, own, output in zip(calls, floor, outputs, strict=True)
    )


def _settings(spec: VerifySpec, pipeline_spec: PipelineSpec) -> dict[str, Any]:
    """What was run, as plain data."""
    image = spec.image
    return {
        "model": pipeline_spec.model.name,
        "backend": pipeline_spec.backend,
        "precision": pipeline_spec.precision,
        "prompt": image.prompts[0],
        "negative_prompt": image.negative_prompt,
        "seed": seed_of(image),
        "steps": image.steps,
        "guidance_scale": image.guidance_scale,
        **({} if image.savings.guidance.is_whole else {"guidance_interval": str(image.savings.guidance)}),
        **caching_facts(pipeline_spec),
        "scheduler": image.scheduler,
        "noise": pipeline_spec.noise.over(pipeline_spec.model.stated).describe(),
        "height": pipeline_spec.sizes.height,
        "width": pipeline_spec.sizes.width,
        **({"strength": strength_of(image)} if pipeline_spec.img2img else {}),
        **({"vae": image.model.vae} if image.model.vae is not None else {}),
        **({"loras": [str(one) for one in image.model.loras]} if image.model.loras else {}),
        **({"controlnets": _controls(image)} if image.controls else {}),
        **({"ip_adapters": _ip_adapters(image)} if image.ip_images else {}),
    }


def _controls(image: GenerateSpec) -> list[dict[str, Any]]:
    """The ControlNets of a run, as plain data."""
    return [
        {"name": one.name, "image": str(one.image), "scale": one.scale, "start": one.start, "end": one.end}
        for one in image.controls
    ]


def _ip_adapters(image: GenerateSpec) -> list[dict[str, Any]]:
    """The IP-Adapters of a run, as plain data."""
    pairs = zip(image.model.ip_adapters, image.ip_images, strict=True)
    return [{"name": name, "image": str(one.image), "scale": one.scale} for name, one in pairs]


def _draw(
    folder: Path, errors: Sequence[TimestepError], actual: Array, expected: Array, spec: PipelineSpec
) -> dict[str, Path]:
    """Write the two pictures under new names."""
    stem = f"verify-{spec.backend}-{spec.precision}"
    label = f"{spec.backend} {spec.precision}"
    figures = [(error.timestep, error.relative_l2, error.reference_relative_l2) for error in errors]
    timesteps, own, floor = (list(column) for column in zip(*figures, strict=True))
    return {
        "comparison": saving.save_new(comparison(actual, expected, label), folder, f"{stem}-comparison"),
        "errors": saving.save_new(error_plot(timesteps, own, floor, label), folder, f"{stem}-errors"),
    }

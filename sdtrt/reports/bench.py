"""How long whole pipeline calls and their parts take, beside PyTorch in several forms, in one run on one machine."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from sdtrt.backends import registry
from sdtrt.backends.native import NATIVE
from sdtrt.common import host
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import EngineError, SdtrtError, UsageError, first_line
from sdtrt.common.host import torch_sees_gpu
from sdtrt.common.version import __version__
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.models.loading import check_loras
from sdtrt.models.resolve import Model
from sdtrt.pipeline.inputs.control_images import ControlImage, read_control_images
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.memory import out_of_memory
from sdtrt.pipeline.opening.open import OpenPipeline, engine_facts, open_pipeline
from sdtrt.pipeline.opening.request import (
    PipelineSpec,
    check_modes,
    check_spec,
    check_task,
    check_together,
    controlled,
    named_others,
    note_noise,
    unet_sizes,
    warn_of_interval,
)
from sdtrt.pipeline.runs import saving
from sdtrt.pipeline.runs.call import Control, PipelineCall
from sdtrt.pipeline.runs.settings import device_name
from sdtrt.reports import meters
from sdtrt.reports.bench_baselines import BASELINES, CUDA_PROVIDER, Baseline, has_provider, open_baseline
from sdtrt.reports.bench_parts import parts_of, time_component
from sdtrt.reports.bench_report import BenchReport, Measured, Row, Runner
from sdtrt.reports.energy import EnergyMeter
from sdtrt.reports.meters import MemoryMeter, tf32, time_calls
from sdtrt.specs import SAMPLE_PROMPT, BenchSpec, BenchTask, Precision, Savings

FILES = ("bench.json", "bench.md", "bench.png")


def run_bench(spec: BenchSpec, directory: EngineDirectory, console: Console, command: str) -> BenchReport:
    """Measure every row of a request, and write the files that it asks for.

    The backend that was asked for comes first. A baseline that fails is a row with the reason; so is the asked backend
    where it can't serve or runs out of memory (`BenchReport.check` then raises).

    Args:
        command: as it was typed, for the report.

    Raises:
        UsageError, OutputError, ModelError: for a wrong request, before anything is timed.
    """
    if spec.output is not None:
        saving.check_files(spec.output, FILES, overwrite=spec.overwrite)
    facts = host.facts() | _state()
    maps = read_control_images(spec.request(spec.tasks[0]), None, console)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' advice on a model's configuration files
        model = resolve.resolve_model(spec.model, console)
        check_loras(model)
        tasks = _tasks(spec, model, console)
        model, *others = _controlled(spec, tasks, model, console)
        note_noise(spec.noise, model, console)
        runners = _runners(spec, console)
        bench = _Bench(spec, model, directory, console, maps, named_others(others))
        rows = [
            row
            for task in tasks
            for batch in spec.batch_sizes
            for row in _with_speedups([bench.row(task, runner, batch) for runner in runners])
        ]
    versions = _versions(runners[0])
    report = BenchReport(tuple(rows), facts, versions, command, spec.model.name)
    if None in report.energy_sources:
        console.note("no joules an image: nobody counts a CPU's energy, nor this GPU's")
    if spec.output is not None:
        for path in saving.write_files(spec.output, _files(report), overwrite=spec.overwrite):
            console.note(f"wrote {path}")
    return report


def _tasks(spec: BenchSpec, model: Model, console: Console) -> tuple[BenchTask, ...]:
    """Of the tasks that are asked for, those that the model does: SDXL's refiner makes no image from text alone."""
    tasks = tuple(task for task in spec.tasks if task == "img2img" or not model.is_refiner)
    check_task(model, img2img="img2img" in tasks)
    if tasks != spec.tasks:
        console.note(f"{model.name} is a refiner, which makes no images from text alone: {', '.join(tasks)} only")
    return tasks


def _controlled(spec: BenchSpec, tasks: Sequence[BenchTask], model: Model, console: Console) -> list[Model]:
    """The model with each ControlNet, which fit it, and which it takes in all tasks."""
    for task in tasks:
        check_together(spec.request(task), model, img2img=task == "img2img")
    request = spec.request(spec.tasks[0])
    models = list(controlled(request, model, console))
    check_modes(request.controls, models)
    return models


def _runners(spec: BenchSpec, console: Console) -> list[Runner]:
    """The backend that was asked for, then the baselines."""
    registry.check_request(spec.backend, spec.precision)
    backend = registry.choose_backend(spec.backend, console)
    precision = spec.precision or registry.get(backend).default_precision()
    same = {("fp32", NATIVE): BASELINES["torch-fp32"], ("fp16", NATIVE): BASELINES["torch-fp16"]}
    own = same.get((precision, backend))
    interval, caching = spec.savings.guidance, spec.savings.caching
    words = (
        own.variant if own is not None else None,
        None if interval.is_whole else f"guidance in {interval}",
        None if caching.is_off else f"1 step in {caching.interval} whole ({caching.schedule})",
    )
    asked = Runner(backend, precision, ", ".join(filter(None, words)) or None, own, asked=True)
    return [asked, *(_baseline_runner(found) for found in _baselines(spec, console) if found != own)]


def baselines_code(spec: BenchSpec, console: Console) -> dict[str, str]:
    """The Python of each baseline of a request, by its title. Nothing is measured, and no model is looked for."""
    return {runner.title: runner.code or "" for runner in map(_baseline_runner, _baselines(spec, console))}


def _baseline_runner(baseline: Baseline) -> Runner:
    """A CPU computes in fp32, whatever a baseline's precision is on a GPU."""
    precision: Precision = baseline.precision if torch_sees_gpu() else "fp32"
    return Runner(baseline.backend, precision, baseline.variant, baseline, asked=False)


def _baselines(spec: BenchSpec, console: Console) -> list[Baseline]:
    """Those that were named; else those that this machine has a use for, and a word on the others."""
    if spec.baselines is not None:
        return [BASELINES[name] for name in spec.baselines]
    on_gpu, why = torch_sees_gpu(), "they are for GPUs, but for torch-compile's forms, which take long"
    chosen = [BASELINES["torch-fp32"]]
    if on_gpu:
        missing = {"torch-compile-max", "torch-compile-regional", "torch-compile-unet"}
        missing |= set() if has_provider(CUDA_PROVIDER) else {"onnxruntime-cuda"}
        missing |= set() if find_spec("torch_tensorrt") else {"torch-tensorrt"}
        chosen = [found for found in BASELINES.values() if found.name not in missing]
        why = "other forms of torch.compile are slower or tune for minutes; others need onnxruntime-gpu, torch-tensorrt"
    left_out = [found.name for found in BASELINES.values() if found not in chosen]
    console.note(f"baselines left out: {', '.join(left_out)} ({why}); --baselines all, or their names, asks for them")
    return chosen


def _state() -> dict[str, Any]:
    """What the machine is like now: PyTorch's threads, and how busy it is before anything is measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"torch_threads": torch.get_num_threads(), "load_average": load}


def _versions(asked: Runner) -> dict[str, str]:
    """Of everything that decides the figures."""
    versions = {"sdtrt": __version__, **host.library_versions()}
    on_gpu = registry.get(asked.backend) in registry.with_engines_on_gpu()
    if on_gpu and (asked_version := _engine_version(asked)):
        versions[asked.backend] = asked_version
    driver = meters.driver_version()
    return versions | ({} if driver is None else {"driver": driver})


def _engine_version(asked: Runner) -> str | None:
    """The version of the backend's library itself, which its Python package may not tell."""
    try:
        return registry.get(asked.backend).version()
    except SdtrtError:
        return None


def _with_speedups(rows: Sequence[Row]) -> list[Row]:
    """The rows of one request, each with its speed relative to PyTorch fp32 with TF32 off."""
    plain = BASELINES["torch-fp32"]
    base = next((row.measured for row in rows if row.runner.baseline == plain), None)
    if base is None:
        return list(rows)
    median = base.latency.median
    return [row if row.measured is None else replace(row, speedup=median / row.measured.latency.median) for row in rows]


def _files(report: BenchReport) -> dict[str, bytes]:
    """The report as JSON, Markdown and a chart."""
    data, picture = io.BytesIO(), report.chart()
    picture.save(data, "PNG")
    document = json.dumps(report.to_json(), indent=1) + "\n"
    return dict(zip(FILES, (document.encode(), report.markdown().encode(), data.getvalue()), strict=True))


@dataclass(frozen=True)
class _Bench:
    """One run's request, on one model; what its ControlNets go by, and the model with each further one of these."""

    spec: BenchSpec
    model: Model
    directory: EngineDirectory
    console: Console
    maps: tuple[ControlImage, ...] = ()
    others: Mapping[str, Model] = field(default_factory=dict)

    def row(self, task: BenchTask, runner: Runner, batch: int) -> Row:
        """Measure one row, or say why it can't be."""
        pipeline_spec = self._pipeline_spec(task, runner, batch)
        warn_of_interval(pipeline_spec, self.console)
        sizes = pipeline_spec.sizes
        all_run = self.model.is_lcm and self.spec.scheduler in (None, "lcm")  # whatever the strength
        steps = self.spec.steps if all_run else self.spec.steps_run(task)
        row = Row(task, runner, steps, sizes.height, sizes.width, batch)
        self.console.note(f"{task}, batch {batch}: {runner.title} ...")
        try:
            measured = self._measure(runner, pipeline_spec)
        except UsageError:
            raise
        except Exception as error:
            if runner.asked and not isinstance(error, (SdtrtError, MemoryError)):
                raise  # a bug of ours; what a baseline raises is a finding
            reason = error.message if isinstance(error, SdtrtError) else f"{type(error).__name__}: {first_line(error)}"
            self.console.warn(f"{runner.title} failed: {reason}")
            return replace(row, error=reason, hint=error.hint if isinstance(error, SdtrtError) else None)
        return replace(row, measured=measured)

    def _pipeline_spec(self, task: BenchTask, runner: Runner, batch: int) -> PipelineSpec:
        """How a runner runs: a baseline is the torch backend's pipeline, changed afterwards."""
        spec, (own_height, own_width) = self.spec, self.model.default_size()
        guidance = spec.request(task).uses_guidance
        sizes = unet_sizes(self.model, batch, spec.height or own_height, spec.width or own_width, guidance=guidance)
        return PipelineSpec(
            model=self.model,
            backend=runner.backend if runner.asked else NATIVE,
            precision=runner.precision,
            sizes=sizes,
            steps=spec.steps,
            img2img=task == "img2img",
            scheduler=spec.scheduler,
            images=batch,
            noise=spec.noise,
            strength=spec.strength if task == "img2img" else 1.0,
            others=self.others,
            savings=spec.savings if runner.asked else Savings(),
        )

    def _measure(self, runner: Runner, pipeline_spec: PipelineSpec) -> Measured:
        """Open the pipeline, warm it up, time it, then its parts."""
        check_spec(pipeline_spec)
        # Before memory is watched: a build is no part of generating.
        ensure_all(pipeline_spec, self.directory, self.console, allow_build=self.spec.allow_build)
        device = pipeline_spec.device
        meter = MemoryMeter(device)
        pipeline_call = self._call(pipeline_spec)
        with self._open(runner, pipeline_spec) as opened, out_of_memory(pipeline_spec):
            call = partial(pipeline_call.run, opened, output_type="pil")
            call()
            # What compiles has done it in that call, and that is no part of generating either.
            meters.release_memory(device)
            with meter.watching():
                for _ in range(self.spec.warmups - 1):
                    call()
            energy = EnergyMeter(device)
            with energy.watching():
                latency = time_calls(call, self.spec.repeats, device)
            meter.read()
            memory, peak = meter.to_json(), meter.peak_bytes
            components = {name: time_component(part, device) for name, part in parts_of(opened).items()}
            unet_calls = pipeline_call.count_unet_calls(opened)
        joules = None if energy.joules is None else energy.joules / self.spec.repeats
        engine = None if opened.entry is None else engine_facts(opened.entry)
        name = device_name(device)
        return Measured(name, latency, components, unet_calls, memory, peak, joules, engine, energy.source)

    @contextmanager
    def _open(self, runner: Runner, pipeline_spec: PipelineSpec) -> Iterator[OpenPipeline]:
        """The runner's pipeline. TF32 is off but for the one baseline that is about it."""
        with tf32(False):
            if runner.baseline is None:
                allow_build = self.spec.allow_build
                with open_pipeline(pipeline_spec, self.directory, self.console, allow_build=allow_build) as opened:
                    yield opened
                return
            if runner.baseline.needs_gpu is not None and pipeline_spec.device.type != "cuda":
                raise EngineError(runner.baseline.needs_gpu, hint="leave this baseline out")
            with open_baseline(runner.baseline, pipeline_spec, self.directory, self.console) as opened:
                yield opened

    def _call(self, pipeline_spec: PipelineSpec) -> PipelineCall:
        """The call that is timed: the same noise each time."""
        spec, sizes, batch = self.spec, pipeline_spec.sizes, pipeline_spec.images
        image = Image.effect_noise((sizes.width, sizes.height), 64).convert("RGB") if pipeline_spec.img2img else None
        return PipelineCall(
            prompts=(SAMPLE_PROMPT,) * batch,
            seeds=tuple(range(batch)),
            guidance_scale=spec.guidance_scale,
            start=image,
            strength=spec.strength,
            controls=tuple(Control.of(one, sizes) for one in self.maps),
        )

"""Whether an engine computes what its model computes: against the fp32 PyTorch UNet, over a real denoising run.

Three runs in turn, so that no two UNets are resident at once: the whole pipeline in fp32, whose UNet calls are
recorded; PyTorch's UNet in half precision on the recorded inputs, whose error is the noise floor; the engine on the
recorded inputs, and the whole pipeline with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdtrt.backends import registry
from sdtrt.backends.native import NATIVE
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import EngineError, SdtrtError, UsageError, command_line
from sdtrt.common.metrics import count_non_finite, require_ssim
from sdtrt.engines import find
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import Sight, source_key
from sdtrt.models import loading, resolve
from sdtrt.models.components import contract_of
from sdtrt.models.resolve import Model
from sdtrt.pipeline import engines, saving
from sdtrt.pipeline.engines import engines_of
from sdtrt.pipeline.hooks import hooked
from sdtrt.pipeline.images import InitImage
from sdtrt.pipeline.memory import out_of_memory
from sdtrt.pipeline.open import OpenPipeline, engine_facts, open_pipeline
from sdtrt.pipeline.request import PipelineSpec, resolve_request
from sdtrt.reports.meters import release_memory, tf32
from sdtrt.reports.verify_pictures import comparison, error_plot, gradient
from sdtrt.reports.verify_report import TimestepError, VerifyReport, compare_call, compare_images, judge
from sdtrt.specs import DEFAULT_VERIFY_SEED, Component, ExportSpec, GenerateSpec, Precision, Profile, VerifySpec
from sdtrt.specs.contract import Contract

Array = npt.NDArray[Any]


def verify(spec: VerifySpec, directory: EngineDirectory, console: Console) -> VerifyReport:
    """Hold an engine against the fp32 model, at the timesteps of one denoising run and in its final image.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        SdtrtError: where scikit-image or matplotlib is missing, or the engine can't be had or run.
    """
    _require_extras()
    output = saving.plan_output(spec.output, count=2, overwrite=False)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = resolve.resolve_model(spec.image.model, console)
        pipeline_spec, found = _subject(spec, model, directory, console)
        entry = found.get("unet")
        sight = Sight(model, ["unet"])
        same_weights = _same_weights(model, entry, directory)
        if same_weights is False and entry is not None:
            console.note(f"{entry.name} was built from other weights than those of {model.name}")
        reference = _reference(spec, pipeline_spec, directory, console)
        floor = _noise_floor(pipeline_spec, reference, console)
        outputs, pixels = _candidate(spec, pipeline_spec, entry, reference, directory, console)
        sight.check()
    errors = _compare(reference.calls, floor, outputs)
    image = compare_images(pixels, reference.pixels)
    files = _draw(output.folder, errors, pixels, reference.pixels, pipeline_spec)
    settings = _settings(spec, pipeline_spec)
    failures = judge(spec.thresholds, errors, image)
    facts = {name: engine_facts(one) for name, one in found.items()}
    rebuild = _rebuild(pipeline_spec, found, directory)
    removal = entry.removal if entry is not None else ""
    return VerifyReport(
        settings, spec.thresholds, errors, image, failures, files, facts, same_weights, rebuild, removal
    )


def _require_extras() -> None:
    """Say early what is missing: a run takes minutes."""
    require_ssim()
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SdtrtError("the plot of verify needs matplotlib", hint="pip install matplotlib") from error


# --- what is verified --------------------------------------------------------------------------------------------


def _subject(
    spec: VerifySpec, model: Model, directory: EngineDirectory, console: Console
) -> tuple[PipelineSpec, Mapping[Component, Entry]]:
    """How the pipeline runs, and its engines: the UNet's that is named, or the one that would make the image."""
    start = _start(spec.image, model) if model.is_refiner else None
    if spec.engine is not None:
        entry = directory.named(spec.engine)
        pipeline_spec = resolve_request(_as_engine(spec.image, entry), model, console, start)
        _check_fits(entry, pipeline_spec)
    else:
        entry, pipeline_spec = None, resolve_request(spec.image, model, console, start)
    # All that the image needs, before the long part begins.
    return pipeline_spec, engines_of(
        pipeline_spec, directory, console, allow_build=spec.image.allow_build, unet_engine=entry
    )


def _start(image: GenerateSpec, model: Model) -> InitImage:
    """What SDXL's refiner starts from, which makes no image from text alone: always the same picture."""
    own_height, own_width = model.default_size()
    return InitImage(Path("gradient"), "", gradient(image.height or own_height, image.width or own_width))


def _strength(image: GenerateSpec) -> float:
    """How much of that picture is replaced: at least one step runs."""
    return image.strength if int(image.steps * image.strength) else 1.0


def _rebuild(spec: PipelineSpec, entries: Mapping[Component, Entry], directory: EngineDirectory) -> str:
    """The command that builds the engines beside the UNet's again; empty where there are none."""
    others = [name for name in entries if name != "unet"]
    if not others:
        return ""
    command = engines.build_command(
        spec.model, spec.backend, spec.precision, spec.sizes, directory, others, spec.images
    )
    return f"{command} --force"


def _as_engine(image: GenerateSpec, entry: Entry) -> GenerateSpec:
    """The request with an engine's backend and precision; refuses other ones."""
    if entry.kind != "engine" or entry.key["component"] != "unet":
        listing = command_line("sdtrt", "engines", "list", "--engine-dir", str(entry.path.parent))
        raise UsageError(f"{entry.name} is no engine of a unet", hint=f"{listing} shows the engines")
    for name, given in (("backend", image.backend), ("precision", image.precision)):
        if given not in (None, "auto", entry.key[name]):
            raise UsageError(f"{entry.name} is for {entry.key[name]}, not {given}", hint=f"leave --{name} out")
    return replace(image, backend=entry.key["backend"], precision=entry.key["precision"])


def _check_fits(entry: Entry, spec: PipelineSpec) -> None:
    """Refuse an engine of another architecture, or one that does not take the run's sizes."""
    if Contract.from_json(entry.info["contract"]) != contract_of(spec.model, "unet", spec.precision):
        raise EngineError(
            f"{entry.name} takes other inputs than the unet of {spec.model.name}",
            hint=f"it was built for {entry.info.get('model')}: give that as --model",
        )
    if find.slack(entry.key, spec.sizes) is None:
        best = Profile.from_json(entry.key["profiles"][0]).optimum
        guidance = " --guidance-scale 1" if best.batch == 1 else ""
        raise EngineError(
            f"{entry.name} does not take {spec.sizes}",
            hint=f"use --height {best.height} --width {best.width}{guidance}",
        )


def _same_weights(model: Model, entry: Entry | None, directory: EngineDirectory) -> bool | None:
    """Whether an engine was built from the model's own weights and configuration, or serves any of its architecture."""
    if entry is None:
        return None
    inside = registry.get(entry.key["backend"]).weights_inside
    export = ExportSpec(model.spec, "unet", entry.key["precision"])
    own = source_key(model, export, directory, weights=inside)
    return bool(entry.key["export"]["fingerprint"] == own["fingerprint"])


# --- the three runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One call of the UNet in the fp32 run, on the CPU: its inputs and its output `[B,C,H,W]`."""

    sample: torch.Tensor
    timestep: torch.Tensor
    encoder_hidden_states: torch.Tensor
    added: Mapping[str, torch.Tensor] | None
    output: Array

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The inputs as a UNet takes them; the timestep keeps its dtype."""
        added = None if self.added is None else {name: t.to(device, dtype) for name, t in self.added.items()}
        return {
            "sample": self.sample.to(device, dtype),
            "timestep": self.timestep.to(device),
            "encoder_hidden_states": self.encoder_hidden_states.to(device, dtype),
            "added_cond_kwargs": added,
        }


@dataclass(frozen=True)
class _Reference:
    """The fp32 run: the calls that were recorded, and the final image `[H,W,3]` in 0 to 1."""

    calls: tuple[_Call, ...]
    pixels: Array


class _Recorder:
    """A hook that keeps some of a UNet's calls, by their numbers."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = frozenset(wanted)
        self.count = 0
        self.calls: list[_Call] = []

    def __call__(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one call of a diffusers pipeline: `unet(sample, timestep, encoder_hidden_states=…)`."""
        if self.count in self.wanted:
            added = kwargs.get("added_cond_kwargs")
            kept = None if added is None else {name: tensor.cpu() for name, tensor in added.items()}
            states = kwargs["encoder_hidden_states"].cpu()
            self.calls.append(_Call(args[0].cpu(), torch.as_tensor(args[1]).cpu(), states, kept, _numpy(output[0])))
        self.count += 1


def _reference(
    spec: VerifySpec, pipeline_spec: PipelineSpec, directory: EngineDirectory, console: Console
) -> _Reference:
    """Run the whole pipeline in PyTorch, in fp32 without TF32."""
    pipeline_spec = replace(pipeline_spec, backend=NATIVE, precision="fp32")
    with tf32(False), open_pipeline(pipeline_spec, directory, console) as opened:
        recorder = _Recorder(spread(_count_calls(spec.image, opened), spec.timesteps))
        with hooked(opened.pipe.unet, recorder):
            pixels = _image(spec.image, opened, "fp32 reference", console)
    del opened  # or its UNet would stay where it is
    release_memory(pipeline_spec.device)
    reference = _Reference(tuple(recorder.calls), pixels)
    if count_non_finite(pixels) or any(count_non_finite(call.output) for call in reference.calls):
        raise EngineError(
            f"{pipeline_spec.model.name} itself gives values that are not finite in fp32, without any engine",
            hint="its weights may be damaged; try another --scheduler or --guidance-scale",
        )
    return reference


def _noise_floor(spec: PipelineSpec, reference: _Reference, console: Console) -> list[Array]:
    """PyTorch's own UNet in half precision (bf16 for an engine in bf16, else fp16) on the recorded inputs."""
    precision: Precision = "bf16" if spec.precision == "bf16" else "fp16"
    own = replace(spec, backend=NATIVE, precision=precision)
    try:
        unet = loading.load_unet(own.model, own.parts_dtype).to(own.device)
    except SdtrtError as error:  # weights that don't fit into fp16: then there is no floor
        console.warn(f"no noise floor: {error.message}")
        return [np.full_like(call.output, np.nan) for call in reference.calls]
    outputs = _replay(unet, reference, own, f"{precision} noise floor", console)
    del unet
    release_memory(spec.device)
    return outputs


def _candidate(
    spec: VerifySpec,
    pipeline_spec: PipelineSpec,
    entry: Entry | None,
    reference: _Reference,
    directory: EngineDirectory,
    console: Console,
) -> tuple[list[Array], Array]:
    """The engine on the recorded inputs, and the whole image as `sdtrt txt2img` makes it with this engine."""
    allow_build = spec.image.allow_build
    with open_pipeline(pipeline_spec, directory, console, allow_build=allow_build, unet_engine=entry) as opened:
        name = "engine" if entry is not None else f"{pipeline_spec.backend} {pipeline_spec.precision}"
        outputs = _replay(opened.pipe.unet, reference, pipeline_spec, name, console)
        return outputs, _image(spec.image, opened, f"image with {name}", console)


def _replay(unet: Any, reference: _Reference, spec: PipelineSpec, name: str, console: Console) -> list[Array]:
    """What a UNet gives for the recorded inputs, in its own precision."""
    outputs = []
    with torch.inference_mode(), console.bar(name, len(reference.calls)) as advance, out_of_memory(spec):
        for call in reference.calls:
            outputs.append(_numpy(unet(**call.inputs(spec.device, unet.dtype), return_dict=False)[0]))
            advance()
    return outputs


def _image(image: GenerateSpec, opened: OpenPipeline, name: str, console: Console) -> Array:
    """One call of a pipeline: pixels `[H,W,3]`, finite or not."""
    spec = opened.spec
    seed = DEFAULT_VERIFY_SEED if image.seed is None else image.seed
    own = {"height": spec.sizes.height, "width": spec.sizes.width}
    start = {"image": gradient(**own), "strength": _strength(image)}
    with console.bar(name, _count_calls(image, opened)) as advance, out_of_memory(spec):

        def on_step_end(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            advance()
            return {}

        result = opened.pipe(
            prompt=image.prompts[0],
            negative_prompt=image.negative_prompt or None,
            num_inference_steps=image.steps,
            guidance_scale=image.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            **(start if spec.img2img else own),
            callback_on_step_end=on_step_end,
            output_type="np",
        )
    pixels: Array = np.asarray(result.images[0])
    return pixels


def _count_calls(image: GenerateSpec, opened: OpenPipeline) -> int:
    """How often a run calls the UNet: PNDM has one timestep more than steps, Heun nearly twice as many."""
    pipe, steps = opened.pipe, opened.spec.steps
    pipe.scheduler.set_timesteps(steps)
    if not opened.spec.img2img:
        return len(pipe.scheduler.timesteps)
    return len(pipe.get_timesteps(steps, _strength(image), opened.spec.device)[0])


def _numpy(tensor: torch.Tensor) -> Array:
    """On the CPU, in fp32 (NumPy has no bf16)."""
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def spread(total: int, wanted: int | None) -> list[int]:
    """The numbers of `wanted` of `total` calls, spread evenly, the first and the last among them; all for None."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return sorted({round(position) for position in np.linspace(0, total - 1, wanted).tolist()})


def _compare(calls: Sequence[_Call], floor: Sequence[Array], outputs: Sequence[Array]) -> tuple[TimestepError, ...]:
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
        "seed": DEFAULT_VERIFY_SEED if image.seed is None else image.seed,
        "steps": image.steps,
        "guidance_scale": image.guidance_scale,
        "scheduler": image.scheduler,
        "noise": pipeline_spec.noise.over(pipeline_spec.model.stated).describe(),
        "height": pipeline_spec.sizes.height,
        "width": pipeline_spec.sizes.width,
        **({"strength": _strength(image)} if pipeline_spec.img2img else {}),
        **({"vae": image.model.vae} if image.model.vae is not None else {}),
    }


# --- pictures ----------------------------------------------------------------------------------------------------


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

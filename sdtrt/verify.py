"""Whether an engine computes what its model computes: against the fp32 PyTorch UNet, over a real denoising run.

Three runs in turn, so that no two UNets are resident at once: the whole pipeline in fp32, whose UNet calls are
recorded; PyTorch's UNet in half precision on the recorded inputs, whose error is the noise floor; the engine on the
recorded inputs, and the whole pipeline with it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdtrt import engines, host, images, models
from sdtrt.cache import EngineDirectory
from sdtrt.components import Contract, unet_contract
from sdtrt.console import Console, print_table, quiet_libraries
from sdtrt.entries import Entry
from sdtrt.errors import EngineError, SdtrtError, UsageError
from sdtrt.meters import free_memory, tf32
from sdtrt.metrics import cosine, count_non_finite, max_abs, psnr, relative_l2, require_ssim, ssim
from sdtrt.models import Model
from sdtrt.pictures import comparison, error_plot
from sdtrt.pipeline import (
    OpenPipeline,
    Plan,
    engine_facts,
    engines_of,
    hooked,
    open_pipeline,
    out_of_memory,
    plan_image,
)
from sdtrt.specs import DEFAULT_VERIFY_SEED, Component, GenerateSpec, Precision, Profile, Thresholds, VerifySpec

MAX_PSNR_DB = 200.0  # reported for equal images, whose PSNR is infinite: beyond what two unequal float32 images have

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TimestepError:
    """How far the engine's output is from the fp32 reference's at one timestep: the worse of the two guidance rows.

    Args:
        relative_l2: `‖engine − reference‖₂ / ‖reference‖₂`.
        max_abs: largest absolute error, in the output's own unit (about 1: it is noise).
        non_finite: values that are NaN or infinite, of all rows.
        reference_relative_l2: the noise floor: relative L2 error of PyTorch's own UNet in half precision.
    """

    timestep: float
    cosine: float
    relative_l2: float
    max_abs: float
    non_finite: int
    reference_relative_l2: float

    @property
    def noise_ratio(self) -> float:
        """The engine's error as a multiple of the noise floor; NaN where PyTorch itself overflows."""
        floor = self.reference_relative_l2
        if floor == 0:
            return 0.0 if self.relative_l2 == 0 else math.inf
        return self.relative_l2 / floor


@dataclass(frozen=True)
class ImageError:
    """How alike the final images are: PSNR in dB (`MAX_PSNR_DB` for equal ones) and structural similarity."""

    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and how it came out.

    Args:
        settings: what was run, as plain data.
        failures: what missed its threshold, in words.
        files: the pictures that were written.
        engines: name and digest of the engine's entry, for each component that an engine ran.
        same_weights: whether the UNet's engine was built from this model's weights; None where there is no engine.
        rebuild: the command that builds the other components' engines again; empty where there are none.
    """

    settings: Mapping[str, Any]
    thresholds: Thresholds
    timesteps: tuple[TimestepError, ...]
    image: ImageError
    failures: tuple[str, ...]
    files: Mapping[str, Path]
    engines: Mapping[Component, Mapping[str, str]]
    same_weights: bool | None
    rebuild: str

    @property
    def engine(self) -> Mapping[str, str] | None:
        """The UNet's engine; None where PyTorch ran it."""
        return self.engines.get("unet")

    @property
    def unet_passed(self) -> bool:
        """Whether every threshold was held at every timestep that was compared: what then fails is rather the work of
        other parts, or of errors that add up over the steps."""
        return not any(_misses(self.thresholds, self.timesteps))

    @property
    def passed(self) -> bool:
        """Whether every threshold was held."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain data; a figure that is not finite is null."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "thresholds": asdict(self.thresholds),
            "timesteps": [_finite(asdict(error)) for error in self.timesteps],
            "image": _finite(asdict(self.image)),
            "files": {name: str(path) for name, path in self.files.items()},
            **self.settings,
            "host": host.facts(),
            "engine": None if self.engine is None else {**self.engine, "same_weights": self.same_weights},
            "engines": {name: dict(engine) for name, engine in self.engines.items()},
        }

    def print(self) -> None:
        """Print the table, the image's figures, the pictures' paths and the verdict on stdout."""
        rows = [
            (
                f"{error.timestep:g}",
                f"{error.cosine:.7f}",
                f"{error.relative_l2:.2e}",
                f"{error.reference_relative_l2:.2e}",
                f"{error.max_abs:.2e}",
                str(error.non_finite),
            )
            for error in self.timesteps
        ]
        print_table(("timestep", "cosine", "relative L2", "PyTorch's own", "max abs", "non-finite"), rows)
        equal = " (equal)" if self.image.psnr_db == MAX_PSNR_DB else ""
        print(f"\nimage: PSNR {self.image.psnr_db:.2f} dB{equal}, SSIM {self.image.ssim:.5f}")
        for path in self.files.values():
            print(path)
        print("passed" if self.passed else "\n".join(("failed:", *(f"  {text}" for text in self.failures))))

    def raise_on_failure(self) -> None:
        """Raise `EngineError` unless it passed."""
        if self.passed:
            return
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        what = self.engine["name"] if self.engine is not None else f"{self.settings['backend']} itself"
        but = ""
        if self.unet_passed:
            what = f"the image of {self.settings['backend']} in {self.settings['precision']}"
            but = f", but the unet is faithful at each of the {len(self.timesteps)} timesteps compared"
        raise EngineError(f"{what} is not faithful: {self.failures[0]}{more}{but}", hint=self._mend())

    def _mend(self) -> str:
        """What to do about a failure."""
        if self.engine is not None and self.same_weights is False:
            name, model = self.engine["name"], self.settings["model"]
            return f"{name} was built from other weights than those of {model}: give the --model it is of"
        hints = ["use --precision fp32"] if self.settings["precision"] != "fp32" else []
        if self.unet_passed:
            return ", or ".join([*hints, *self._suspects()]) or "the model's weights may be damaged"
        if self.engine is not None:
            hints.append(f"build it again (sdtrt engines rm {self.engine['name']} drops it)")
        return ", or ".join(hints) or "the model's weights may be damaged"

    def _suspects(self) -> Iterator[str]:
        """What to do about the engines beside the UNet's, if there are any: no timestep shows what they do."""
        if others := [engine["name"] for name, engine in self.engines.items() if name != "unet"]:
            yield (
                f"suspect {' and '.join(others)}, which no timestep shows, or errors that add up:"
                f" build again with {self.rebuild}"
            )


def verify(spec: VerifySpec, directory: EngineDirectory, console: Console) -> VerifyReport:
    """Hold an engine against the fp32 model, at the timesteps of one denoising run and in its final image.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        SdtrtError: where scikit-image or matplotlib is missing, or the engine can't be had or run.
    """
    _require_extras()
    output = images.plan_output(spec.output, count=2, overwrite=False)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.resolve_model(spec.image.model, console)
        plan, found = _subject(spec, model, directory, console)
        entry = found.get("unet")
        same_weights = _same_weights(model, entry, directory)
        if same_weights is False and entry is not None:
            console.note(f"{entry.name} was built from other weights than those of {model.name}")
        reference = _reference(spec, plan, directory, console)
        floor = _noise_floor(plan, reference, console)
        outputs, pixels = _candidate(spec, plan, entry, reference, directory, console)
    errors = _compare(reference.calls, floor, outputs)
    image = _compare_images(pixels, reference.pixels)
    files = _draw(output.folder, errors, pixels, reference.pixels, plan)
    settings = _settings(spec, plan)
    failures = judge(spec.thresholds, errors, image)
    facts = {name: engine_facts(one) for name, one in found.items()}
    rebuild = _rebuild(plan, found, directory)
    return VerifyReport(settings, spec.thresholds, errors, image, failures, files, facts, same_weights, rebuild)


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
) -> tuple[Plan, Mapping[Component, Entry]]:
    """How the pipeline runs, and its engines: the UNet's that is named, or the one that would make the image."""
    if spec.engine is not None:
        entry = directory.named(spec.engine)
        plan = plan_image(_as_engine(spec.image, entry), model, console)
        _check_fits(entry, plan)
    else:
        entry, plan = None, plan_image(spec.image, model, console)
    # All that the image needs, before the long part begins.
    return plan, engines_of(plan, directory, console, allow_build=spec.image.allow_build, unet_engine=entry)


def _rebuild(plan: Plan, entries: Mapping[Component, Entry], directory: EngineDirectory) -> str:
    """The command that builds the engines beside the UNet's again; empty where there are none."""
    others = [name for name in entries if name != "unet"]
    if not others:
        return ""
    command = engines.build_command(
        plan.model, plan.backend, plan.precision, plan.sizes, directory, others, plan.images
    )
    return f"{command} --force"


def _as_engine(image: GenerateSpec, entry: Entry) -> GenerateSpec:
    """The request with an engine's backend and precision; refuses other ones."""
    if entry.kind != "engine" or entry.key["component"] != "unet":
        raise UsageError(f"{entry.name} is no engine of a unet", hint="sdtrt engines list shows the engines")
    for name, given in (("backend", image.backend), ("precision", image.precision)):
        if given not in (None, "auto", entry.key[name]):
            raise UsageError(f"{entry.name} is for {entry.key[name]}, not {given}", hint=f"leave --{name} out")
    return replace(image, backend=entry.key["backend"], precision=entry.key["precision"])


def _check_fits(entry: Entry, plan: Plan) -> None:
    """Refuse an engine of another architecture, or one that does not take the run's sizes."""
    if Contract.from_json(entry.info["contract"]) != unet_contract(plan.model.config("unet"), plan.precision):
        raise EngineError(
            f"{entry.name} takes other inputs than the unet of {plan.model.name}",
            hint=f"it was built for {entry.info.get('model')}: give that as --model",
        )
    if engines.slack(entry.key, plan.sizes) is None:
        best = Profile.from_json(entry.key["profiles"][0]).optimum
        guidance = " --guidance-scale 1" if best.batch == 1 else ""
        raise EngineError(
            f"{entry.name} does not take {plan.sizes}",
            hint=f"use --height {best.height} --width {best.width}{guidance}",
        )


def _same_weights(model: Model, entry: Entry | None, directory: EngineDirectory) -> bool | None:
    """Whether an engine was built from the model's own weights and configuration."""
    if entry is None:
        return None
    return bool(entry.key["export"]["fingerprint"] == model.fingerprint("unet", directory.file_digest))


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


def _reference(spec: VerifySpec, plan: Plan, directory: EngineDirectory, console: Console) -> _Reference:
    """Run the whole pipeline in PyTorch, in fp32 without TF32."""
    plan = replace(plan, backend="torch", precision="fp32")
    with tf32(False), open_pipeline(plan, directory, console) as opened:
        recorder = _Recorder(spread(_count_calls(opened), spec.timesteps))
        with hooked(opened.pipe.unet, recorder):
            pixels = _image(spec.image, opened, "fp32 reference", console)
    del opened  # or its UNet would stay where it is
    free_memory(plan.device)
    reference = _Reference(tuple(recorder.calls), pixels)
    if count_non_finite(pixels) or any(count_non_finite(call.output) for call in reference.calls):
        raise EngineError(
            f"{plan.model.name} itself gives values that are not finite in fp32, without any engine",
            hint="its weights may be damaged; try another --scheduler or --guidance-scale",
        )
    return reference


def _noise_floor(plan: Plan, reference: _Reference, console: Console) -> list[Array]:
    """PyTorch's own UNet in half precision (bf16 for an engine in bf16, else fp16) on the recorded inputs."""
    precision: Precision = "bf16" if plan.precision == "bf16" else "fp16"
    own = replace(plan, backend="torch", precision=precision)
    try:
        unet = models.load_unet(own.model, own.parts_dtype).to(own.device)
    except SdtrtError as error:  # weights that don't fit into fp16: then there is no floor
        console.warn(f"no noise floor: {error.message}")
        return [np.full_like(call.output, np.nan) for call in reference.calls]
    outputs = _replay(unet, reference, own, f"{precision} noise floor", console)
    del unet
    free_memory(plan.device)
    return outputs


def _candidate(
    spec: VerifySpec,
    plan: Plan,
    entry: Entry | None,
    reference: _Reference,
    directory: EngineDirectory,
    console: Console,
) -> tuple[list[Array], Array]:
    """The engine on the recorded inputs, and the whole image as `sdtrt txt2img` makes it with this engine."""
    allow_build = spec.image.allow_build
    with open_pipeline(plan, directory, console, allow_build=allow_build, unet_engine=entry) as opened:
        name = "engine" if entry is not None else f"{plan.backend} {plan.precision}"
        outputs = _replay(opened.pipe.unet, reference, plan, name, console)
        return outputs, _image(spec.image, opened, f"image with {name}", console)


def _replay(unet: Any, reference: _Reference, plan: Plan, name: str, console: Console) -> list[Array]:
    """What a UNet gives for the recorded inputs, in its own precision."""
    outputs = []
    with torch.inference_mode(), console.bar(name, len(reference.calls)) as advance, out_of_memory(plan):
        for call in reference.calls:
            outputs.append(_numpy(unet(**call.inputs(plan.device, unet.dtype), return_dict=False)[0]))
            advance()
    return outputs


def _image(image: GenerateSpec, opened: OpenPipeline, name: str, console: Console) -> Array:
    """One call of a pipeline: pixels `[H,W,3]`, finite or not."""
    plan = opened.plan
    seed = DEFAULT_VERIFY_SEED if image.seed is None else image.seed
    with console.bar(name, _count_calls(opened)) as advance, out_of_memory(plan):

        def on_step_end(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            advance()
            return {}

        result = opened.pipe(
            prompt=image.prompts[0],
            negative_prompt=image.negative_prompt or None,
            num_inference_steps=image.steps,
            guidance_scale=image.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            height=plan.sizes.height,
            width=plan.sizes.width,
            callback_on_step_end=on_step_end,
            output_type="np",
        )
    pixels: Array = np.asarray(result.images[0])
    return pixels


def _count_calls(opened: OpenPipeline) -> int:
    """How often a run calls the UNet: PNDM has one timestep more than steps, Heun nearly twice as many."""
    opened.pipe.scheduler.set_timesteps(opened.plan.steps)
    return len(opened.pipe.scheduler.timesteps)


def _numpy(tensor: torch.Tensor) -> Array:
    """On the CPU, in fp32 (NumPy has no bf16)."""
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def spread(total: int, wanted: int | None) -> list[int]:
    """The numbers of `wanted` of `total` calls, spread evenly, the first and the last among them; all for None."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return sorted({round(position) for position in np.linspace(0, total - 1, wanted).tolist()})


# --- comparing ---------------------------------------------------------------------------------------------------


def _compare(calls: Sequence[_Call], floor: Sequence[Array], outputs: Sequence[Array]) -> tuple[TimestepError, ...]:
    """The errors at each timestep."""
    return tuple(
        compare_call(float(call.timestep), output, call.output, own)
        for call, own, output in zip(calls, floor, outputs, strict=True)
    )


def compare_call(timestep: float, actual: Array, expected: Array, floor: Array) -> TimestepError:
    """The errors at one timestep: the worse of the guidance rows. Arrays of `[B,C,H,W]`, `floor` being PyTorch's own.

    Rows are compared each for itself: together, a row that is right would hide half of the other's error.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        rows = list(zip(actual, expected, strict=True))
        return TimestepError(
            timestep,
            cosine=float(np.min([cosine(*row) for row in rows])),
            relative_l2=float(np.max([relative_l2(*row) for row in rows])),
            max_abs=float(np.max([max_abs(*row) for row in rows])),
            non_finite=count_non_finite(actual),
            reference_relative_l2=float(np.max([relative_l2(*row) for row in zip(floor, expected, strict=True)])),
        )


def _compare_images(actual: Array, expected: Array) -> ImageError:
    """PSNR and SSIM of two images of 0 to 1."""
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = psnr(actual, expected, data_range=1.0)
    return ImageError(ratio if math.isnan(ratio) else min(ratio, MAX_PSNR_DB), ssim(actual, expected, data_range=1.0))


def judge(thresholds: Thresholds, errors: Sequence[TimestepError], image: ImageError) -> tuple[str, ...]:
    """What missed its threshold, in words. A figure that is NaN misses every threshold."""
    failures = list(_misses(thresholds, errors))
    if math.isnan(image.psnr_db):
        return (*failures, "the image has pixels that are not finite")
    for name, value, least in (
        ("PSNR", image.psnr_db, thresholds.min_psnr_db),
        ("SSIM", image.ssim, thresholds.min_ssim),
    ):
        if least is not None and not value >= least:
            failures.append(f"the image's {name} is {value:.4g}, below {least:g}")
    return tuple(failures)


def _misses(thresholds: Thresholds, errors: Sequence[TimestepError]) -> Iterator[str]:
    """What missed its threshold at the timesteps: one line for each threshold, with the worst."""
    total = len(errors)
    if broken := [error for error in errors if error.non_finite]:
        count = sum(error.non_finite for error in broken)
        where = f"at {len(broken)} of {total} timesteps, first at {broken[0].timestep:g}"
        yield f"{count} values are NaN or infinite {where}"
    errors = [error for error in errors if not error.non_finite]
    least, most, ratio = thresholds.min_cosine, thresholds.max_relative_l2, thresholds.max_noise_ratio
    if least is not None and (bad := [error for error in errors if not error.cosine >= least]):
        worst = min(bad, key=lambda error: error.cosine)
        where = f"at {len(bad)} of {total} timesteps, worst at {worst.timestep:g}: {worst.cosine:.7f}"
        yield f"cosine is below {least:g} {where}"
    if most is not None and (bad := [error for error in errors if not error.relative_l2 <= most]):
        worst = max(bad, key=lambda error: error.relative_l2)
        where = f"at {len(bad)} of {total} timesteps, worst at {worst.timestep:g}: {worst.relative_l2:.2e}"
        yield f"relative L2 error is above {most:g} {where}"
    # The ratio is NaN where PyTorch itself overflows: then there is no floor to compare with.
    if ratio is not None and (bad := [error for error in errors if error.noise_ratio > ratio]):
        worst = max(bad, key=lambda error: error.noise_ratio)
        where = f"at {len(bad)} of {total} timesteps, worst at {worst.timestep:g}: {worst.noise_ratio:.1f} times"
        yield f"relative L2 error is above {ratio:g} times PyTorch's own in half precision {where}"


def _settings(spec: VerifySpec, plan: Plan) -> dict[str, Any]:
    """What was run, as plain data."""
    image = spec.image
    return {
        "model": plan.model.name,
        "backend": plan.backend,
        "precision": plan.precision,
        "prompt": image.prompts[0],
        "negative_prompt": image.negative_prompt,
        "seed": DEFAULT_VERIFY_SEED if image.seed is None else image.seed,
        "steps": image.steps,
        "guidance_scale": image.guidance_scale,
        "scheduler": image.scheduler,
        "height": plan.sizes.height,
        "width": plan.sizes.width,
    }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}


# --- pictures ----------------------------------------------------------------------------------------------------


def _draw(folder: Path, errors: Sequence[TimestepError], actual: Array, expected: Array, plan: Plan) -> dict[str, Path]:
    """Write the two pictures under new names."""
    stem = f"verify-{plan.backend}-{plan.precision}"
    label = f"{plan.backend} {plan.precision}"
    figures = [(error.timestep, error.relative_l2, error.reference_relative_l2) for error in errors]
    timesteps, own, floor = (list(column) for column in zip(*figures, strict=True))
    return {
        "comparison": images.save_new(comparison(actual, expected, label), folder, f"{stem}-comparison"),
        "errors": images.save_new(error_plot(timesteps, own, floor, label), folder, f"{stem}-errors"),
    }

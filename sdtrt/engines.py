"""Which backend and which engine serve a request: choose, find, or build on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdtrt import host
from sdtrt.build import backend_version, build_engine, host_key
from sdtrt.cache import EngineDirectory, Entry
from sdtrt.console import QUIET, Console
from sdtrt.errors import EngineError, SdtrtError
from sdtrt.export import export_key
from sdtrt.models import Model
from sdtrt.specs import Backend, BackendChoice, BuildSpec, ExportSpec, Precision, Profile, Range, Sizes


def choose_backend(choice: BackendChoice, console: Console = QUIET) -> Backend:
    """The backend that serves a request; for `auto`, say on stderr which and why.

    A GPU with TensorRT for that GPU comes first, then ONNX Runtime on the CPU. Where there is a GPU without TensorRT,
    PyTorch on the GPU is faster than anything on the CPU.
    """
    if choice != "auto":
        return choice
    backend, reason = _automatic()
    console.note(f"backend: {backend} ({reason})")
    return backend


def _automatic() -> tuple[Backend, str]:
    """The best backend of this machine, and why it is."""
    from sdtrt import trt_api

    gpus = host.gpus()
    if not gpus:
        return "onnxruntime", "no NVIDIA GPU here"
    for backend in ("tensorrt", "tensorrt-rtx"):
        if trt_api.is_installed(backend) and trt_api.supports(backend, gpus[0].compute_capability):
            return backend, f"{gpus[0].name}, TensorRT {trt_api.version(backend)}"
    if torch_sees_gpu():
        return "torch", f"{gpus[0].name}, but TensorRT is not installed: pip install 'sdtrt[tensorrt]'"
    return "onnxruntime", f"{gpus[0].name}, but neither TensorRT nor a CUDA build of PyTorch is installed"


def torch_sees_gpu() -> bool:
    """Whether this PyTorch can use the GPU (its CPU build can't)."""
    import torch

    return torch.cuda.is_available()


def default_precision(backend: Backend) -> Precision:
    """What a backend computes in unless asked: fp16 on a GPU, fp32 on a CPU."""
    if backend == "onnxruntime" or (backend == "torch" and not torch_sees_gpu()):
        return "fp32"
    return "fp16"


def find_engine(
    model: Model, backend: Backend, precision: Precision, sizes: Sizes, directory: EngineDirectory
) -> Entry | None:
    """The engine that fits a request on this machine: the one with the tightest profile, None if there is none."""
    wanted = {
        "component": "unet",
        "precision": precision,
        "backend": backend,
        "backend_version": backend_version(backend),
        "host": host_key(backend),
    }
    export = export_key(model, ExportSpec(model.spec, precision=precision), directory)
    fitting = [
        entry
        for entry in directory.entries("engine")
        if all(entry.key.get(name) == value for name, value in wanted.items())
        and _same_weights(entry.key["export"], export)
        and slack(entry.key, sizes) is not None
    ]
    best = min(fitting, key=lambda entry: slack(entry.key, sizes) or 0.0, default=None)
    if best is not None:
        directory.touch(best)
    return best


def ensure_engine(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    *,
    allow_build: bool = True,
    console: Console = QUIET,
) -> Entry:
    """Find the engine for a request, or export and build it on the spot, for exactly this size.

    Raises:
        EngineError: when there is none and `allow_build` is off; the hint is the build command.
        ExportError, BuildError: when it can't be made.
    """
    entry = find_engine(model, backend, precision, sizes, directory)
    if entry is not None:
        return entry
    if not allow_build:
        raise EngineError(
            f"no {backend} {precision} engine for {model.spec.name} fits {sizes}",
            hint=build_command(model, backend, precision, sizes, directory),
        )
    console.note(f"no {backend} {precision} engine for {sizes} yet: building it (once)")
    profiles = () if backend == "onnxruntime" else (Profile.of(sizes),)
    spec = BuildSpec(ExportSpec(model.spec, precision=precision), backend, profiles)
    return build_engine(model, spec, directory, console)


def is_foreign(entry: Entry) -> bool:
    """Whether an engine was built for another GPU, processor or library version than this machine's."""
    if entry.kind != "engine":
        return False
    try:
        here = {"backend_version": backend_version(entry.key["backend"]), "host": host_key(entry.key["backend"])}
    except SdtrtError:  # the backend is not there at all
        return True
    return any(entry.key[name] != value for name, value in here.items())


def build_command(
    model: Model, backend: Backend, precision: Precision, sizes: Sizes, directory: EngineDirectory
) -> str:
    """The command that builds the engine for a request."""
    import shlex

    words = ["sdtrt", "build", "--model", model.spec.name, "--backend", backend, "--precision", precision]
    if backend != "onnxruntime":
        words += ["--batch", str(sizes.batch), "--height", str(sizes.height), "--width", str(sizes.width)]
    words += ["--engine-dir", str(directory.path)]
    return shlex.join(words)


def slack(key: Mapping[str, Any], sizes: Sizes) -> float | None:
    """How loosely an engine's profiles fit a size: 0 for exactly, None for not at all."""
    profiles = [_profile(data) for data in key["profiles"]]
    if not profiles:
        return 0.0
    fitting = [profile for profile in profiles if sizes in profile]
    return min((_looseness(profile, sizes) for profile in fitting), default=None)


def _looseness(profile: Profile, sizes: Sizes) -> float:
    """Distance of a size from what a profile is tuned for, then the profile's width."""
    pairs = (
        (profile.batch, sizes.batch),
        (profile.height, sizes.height),
        (profile.width, sizes.width),
        (profile.tokens, sizes.tokens),
    )
    return sum(abs(bounds.opt - value) / value + (bounds.max - bounds.min) / bounds.max for bounds, value in pairs)


def _profile(data: Mapping[str, Mapping[str, int]]) -> Profile:
    """A profile from its plain data."""
    return Profile(**{name: Range(**bounds) for name, bounds in data.items()})


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two export keys are of the same weights: exporter and opset may differ, a user's choice at build time."""
    free = {"exporter", "opset"}
    return {k: v for k, v in one.items() if k not in free} == {k: v for k, v in other.items() if k not in free}

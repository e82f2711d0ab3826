"""Which backend and which engine serve a request: choose, find, or build on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdtrt.backends.build import FORMATS, backend_version, host_key
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import SdtrtError
from sdtrt.common.host import torch_sees_gpu
from sdtrt.engines.entry import MALFORMED, Entry
from sdtrt.engines.keys import FORMAT as EXPORT_FORMAT
from sdtrt.specs import Backend, BackendChoice, Precision

TENSORRT_BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")


def choose_backend(choice: BackendChoice, console: Console = QUIET) -> Backend:
    """The backend that serves a request; for `auto`, say on stderr which and why.

    A GPU with TensorRT for that GPU comes first, then ONNX Runtime on the CPU. Where there is a GPU without TensorRT,
    PyTorch on the GPU is faster than anything on the CPU.
    """
    if choice != "auto":
        return choice
    backend, reason = _automatic(console)
    console.note(f"backend: {backend} ({reason})")
    return backend


def _automatic(console: Console) -> tuple[Backend, str]:
    """The best backend of this machine, and why it is."""
    gpus = host.gpus()
    if not gpus:
        return "onnxruntime", "no NVIDIA GPU here"
    if not torch_sees_gpu():
        return "onnxruntime", f"{gpus[0].name}, but this PyTorch can't use it: see sdtrt doctor"
    for backend in TENSORRT_BACKENDS:
        problem = why_not(backend)
        if problem is None:
            return backend, f"{gpus[0].name}, TensorRT {backend_version(backend)}"
        console.detail(f"not {backend}: {problem.message}")
    return "torch", f"{gpus[0].name}, but no TensorRT for it: see sdtrt doctor"


def why_not(backend: Backend) -> SdtrtError | None:
    """Why a TensorRT can't build and run engines on this machine's first GPU; None if it can."""
    from sdtrt.backends.tensorrt.versions import libraries

    try:
        library = libraries.open_library(backend)
        libraries.require_gpu(library)
        libraries.require_builder(library)
    except SdtrtError as error:
        return error
    return None


def default_precision(backend: Backend) -> Precision:
    """What a backend computes in unless asked: fp16 on a GPU, fp32 on a CPU."""
    if backend == "onnxruntime" or (backend == "torch" and not torch_sees_gpu()):
        return "fp32"
    return "fp16"


def is_foreign(entry: Entry) -> bool:
    """Whether an entry is of another sdtrt, or an engine for another GPU, processor or library than this machine's."""
    if entry.kind == "onnx":
        return entry.key.get("format") != EXPORT_FORMAT
    if entry.kind != "engine":
        return True
    try:
        return not runs_here(entry.key["backend"])(entry.key)
    except (SdtrtError, *MALFORMED):  # the backend is not there at all, or the key is not one of ours
        return True


def runs_here(backend: Backend) -> Callable[[Mapping[str, Any]], bool]:
    """What says of an engine's key whether this sdtrt runs it, on this machine and in the backend's version."""
    wanted = {"format": FORMATS[backend], "backend": backend, "host": host_key(backend)}
    version = backend_version(backend)

    def runs(key: Mapping[str, Any]) -> bool:
        try:
            return all(key.get(name) == value for name, value in wanted.items()) and _runs_in(version, key)
        except MALFORMED:
            return False

    return runs


def _runs_in(version: str, key: Mapping[str, Any]) -> bool:
    """Whether a version runs an engine: the one that built it; where the plan is version-compatible, later ones too."""
    built = key["backend_version"]
    return bool(built == version or (key["options"]["version_compatible"] and _numbers(built) < _numbers(version)))


def _numbers(version: str) -> tuple[int, ...]:
    """`10.13.3.9.post1` → (10, 13, 3, 9)."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal())

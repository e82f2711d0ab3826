"""The backends that there are, and which of them serves a request. Imports none of their libraries."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from sdtrt.backends.backend import Backend
from sdtrt.backends.inductor.backend import Inductor
from sdtrt.backends.native import NATIVE, Native
from sdtrt.backends.onnxruntime.backend import OnnxRuntime
from sdtrt.backends.tensorrt86.backend import TensorRT86
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import FORMAT as EXPORT_FORMAT
from sdtrt.engines.keys import ExportKey
from sdtrt.specs import AUTO, BackendName, check_choice

# In the order in which `auto` takes them.
_BACKENDS: tuple[Backend, ...] = (
    TensorRT86("tensorrt"),
    TensorRT86("tensorrt-rtx"),
    Inductor("inductor"),
    OnnxRuntime("onnxruntime"),
    Native(NATIVE),
)
_BY_NAME = {backend.name: backend for backend in _BACKENDS}


def names() -> tuple[str, ...]:
    """What `--backend` takes."""
    return (AUTO, *_BY_NAME)


def get(name: BackendName) -> Backend:
    """The backend of a name. Raises `UsageError` for an unknown one."""
    check_choice("backend", name, tuple(_BY_NAME))
    return _BY_NAME[name]


def candidates(choice: BackendName) -> tuple[Backend, ...]:
    """Which backends a choice may come to mean: one, or for `auto` all."""
    return tuple(one for one in _BACKENDS if not one.by_name_only) if choice == AUTO else (get(choice),)


def with_engines_on_gpu() -> Iterator[Backend]:
    """The backends that have engines for GPUs (some of them for processors, too)."""
    return (backend for backend in _BACKENDS if backend.source and "cuda" in backend.devices)


def running_here() -> Iterator[Backend]:
    """The backends that can run on this machine."""
    usable = host.torch_sees_gpu()
    return (one for one in _BACKENDS if (usable or "cpu" in one.devices) and one.why_not() is None)


def check_request(choice: BackendName, precision: str | None = None, components: Collection[str] = ()) -> None:
    """Refuse what no backend does, before anything heavy is loaded.

    Args:
        choice: a backend's name, or `auto`.
        precision: None for the backend's default.
        components: those that engines are to run; none for the backend's default.

    Raises:
        UsageError: for an unknown backend, a precision that it never computes in, and engines that it doesn't have.
    """
    check_choice("backend", choice, names())
    if choice == AUTO:
        return
    backend = get(choice)
    if backend.source is None and components:
        raise UsageError(
            f"the {backend.name} backend has no engines", hint="leave --component out, or use another --backend"
        )
    if precision is not None:
        backend.check_precision(precision)


def choose_backend(choice: BackendName, console: Console = QUIET) -> BackendName:
    """The name of the backend that serves a request; for `auto`, say on stderr which and why.

    Knows no engines: where some are there, `pipeline.fastest` may take another one. A GPU with TensorRT for that GPU
    comes first, then ONNX Runtime on the CPU. Where there is a GPU without TensorRT, PyTorch on the GPU is faster than
    anything on the CPU.
    """
    if choice != AUTO:
        return get(choice).name
    backend, reason = _automatic(console)
    console.note(f"backend: {backend.name} ({reason})")
    return backend.name


def rivals(name: BackendName) -> tuple[Backend, ...]:
    """The backends that run where one of them does, and have engines; in the order in which `auto` takes them."""
    device = get(name).device()
    return tuple(one for one in _BACKENDS if one.source and one.device() == device and one.why_not() is None)


def _automatic(console: Console) -> tuple[Backend, str]:
    """The best backend of this machine, and why it is."""
    gpus = host.gpus()
    usable = bool(gpus) and host.torch_sees_gpu()
    for backend in candidates(AUTO):
        if backend.device() != ("cuda" if usable else "cpu"):
            continue
        problem = backend.why_not()
        if problem is None:
            break
        console.detail(f"not {backend.name}: {problem.message}")
    if not gpus:
        return backend, "no NVIDIA GPU here"
    if not usable:
        return backend, f"{gpus[0].name}, but this PyTorch can't use it: see sdtrt doctor"
    if backend.source is None:
        return backend, f"{gpus[0].name}, but no TensorRT for it: see sdtrt doctor"
    return backend, f"{gpus[0].name}, {backend.title} {backend.version()}"


def is_foreign(entry: Entry) -> bool:
    """Whether an entry is of another sdtrt, or an engine for another GPU, processor or library than this machine's."""
    key = entry.parsed_key
    if isinstance(key, ExportKey):
        return key.format != EXPORT_FORMAT
    if key is None:
        return True
    try:
        return not get(key.backend).runs_here()(key)
    except SdtrtError:  # the backend is not there at all
        return True

"""The backends that there are, and which of them serves a request. Imports none of their libraries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from sdtrt.backends.backend import Backend
from sdtrt.backends.inductor.backend import Inductor
from sdtrt.backends.native import NATIVE, Native
from sdtrt.backends.onnxruntime.backend import OnnxRuntime
from sdtrt.backends.openvino.backend import OpenVino
from sdtrt.backends.tensorrt86.backend import TensorRT86
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import FORMAT as EXPORT_FORMAT
from sdtrt.engines.keys import ExportKey
from sdtrt.specs import AUTO, BackendName, check_choice

# In the order in which `auto` takes them where no engines are there: what was measured comes first. On one H200 a step
# of Stable Diffusion 1.5 takes Inductor's engines 5.96 ms and those of TensorRT 8.6 7.68; they are built in 125 s and
# 587 s. SDXL's UNet takes 29.9 ms in a package of Inductor, and 36.96 in an engine of TensorRT 8.6. Of TensorRT 10
# and later nothing is measured yet. Where engines are there, their own times decide (`pipeline.opening.fastest`).
_BACKENDS: tuple[Backend, ...] = (
    Inductor("inductor"),
    TensorRT86("tensorrt"),
    TensorRT86("tensorrt-rtx"),
    OnnxRuntime("onnxruntime"),
    OpenVino("openvino"),
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
    return _BACKENDS if choice == AUTO else (get(choice),)


def with_engines() -> Iterator[Backend]:
    """The backends that have engines."""
    return (backend for backend in _BACKENDS if backend.source)


def with_engines_on_gpu() -> Iterator[Backend]:
    """The backends that have engines for GPUs (some of them for processors, too)."""
    return (backend for backend in with_engines() if "cuda" in backend.devices)


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

    Knows no engines: where some are there, `pipeline.opening.fastest` may take another one.
    """
    if choice != AUTO:
        return get(choice).name
    name, reason = expected(console)
    console.note(f"backend: {name} ({reason})")
    return name


def rivals(name: BackendName, there: Collection[BackendName]) -> tuple[Backend, ...]:
    """Those of some backends that run where one does, and have engines; in the order in which `auto` takes them."""
    device = get(name).device()
    with_engines = (one for one in _BACKENDS if one.name in there and one.source)
    return tuple(one for one in with_engines if one.device() == device and one.why_not() is None)


def expected(console: Console = QUIET) -> tuple[BackendName, str]:
    """What `auto` takes where no engines are there: what is expected to be the fastest on this machine, and why.

    Where no engines run on a GPU, PyTorch on that GPU is faster than anything on the CPU.
    """
    gpus = host.gpus()
    usable = bool(gpus) and host.torch_sees_gpu()
    backend, problems = automatic("cuda" if usable else "cpu")
    for problem in problems:
        console.detail(f"not {problem}")
    name = NATIVE if backend is None else backend.name
    if not gpus:
        return name, "no NVIDIA GPU here"
    if not usable:
        return name, f"{gpus[0].name}, but this PyTorch can't use it: see sdtrt doctor"
    if backend is None:
        return name, f"{gpus[0].name}, but no engines run on it: see sdtrt doctor"
    return name, f"{gpus[0].name}, {why(backend, problems)}"


def automatic(device: str) -> tuple[Backend | None, list[str]]:
    """The backend whose engines `auto` has built on a device where none are there, and why not those before it.

    Returns:
        None where no backend's engines run there; the reasons as `tensorrt: it is not installed`.
    """
    problems = []
    for backend in _BACKENDS:
        if backend.source is None or not backend.is_automatic(device):
            continue
        if backend.device() != device:
            problems.append(f"{backend.name}: it runs on {backend.device()}")
        elif (problem := backend.why_not()) is not None:
            problems.append(f"{backend.name}: {problem.message}")
        else:
            return backend, problems
    return None, problems


def why(backend: Backend, problems: Iterable[str] = ()) -> str:
    """Why `auto` takes a backend where no engines are there, and why not those that would come before it."""
    expectation = f": {backend.expectation}" if backend.expectation else ""
    return "; ".join([f"{backend.title} {backend.version()}{expectation}", *(f"not {one}" for one in problems)])


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

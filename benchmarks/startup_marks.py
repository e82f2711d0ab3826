"""One process of `benchmarks/startup.py`, timed from outside: nothing in sdtrt knows of it.

    python benchmarks/startup_marks.py command MARKS.json [--nothing-ahead] txt2img --prompt "a red circle" ...
    python benchmarks/startup_marks.py floor MARKS.json NAME [ARGUMENT ...]

All times are seconds since the process began, as the kernel counts them (to 10 ms): the interpreter's own start counts.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

CHUNK_BYTES = 2**24
CUDA_SUCCESS = 0

# Imports that are timed, in the order in which a request meets them; one within another counts in both.
IMPORTS = (
    "sdtrt.cli.commands",
    "torch",
    "sdtrt.pipeline.runs.generate",
    "onnx",
    "diffusers",
    "transformers",
    "torch._dynamo",
    "sympy",
    "diffusers.loaders.lora_base",
    "scipy.stats",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "tensorrt",
    "tensorrt_lean",
    "tensorrt_rtx",
    "onnxruntime",
)


def started_at() -> float:
    """When this process began, in seconds since the machine booted (proc(5), field 22)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


STARTED = started_at()


def now() -> float:
    """Seconds since this process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - STARTED


def usage() -> dict[str, float]:
    """What this process has used: processor time, page faults that waited for the disk, bytes that came from it."""
    counts = resource.getrusage(resource.RUSAGE_SELF)
    read = 0
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        read = next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    except OSError:  # not every container shows it
        pass
    return {
        "user_s": counts.ru_utime,
        "system_s": counts.ru_stime,
        "major_faults": counts.ru_majflt,
        "minor_faults": counts.ru_minflt,
        "disk_bytes": read,
    }


class Marks:
    """What happened when: spans with their thread, and what the whole process used in them."""

    def __init__(self, file: Path) -> None:
        self.spans: list[dict[str, Any]] = []
        self.compiled: list[float] = []  # seconds of each module
        self.engine_files: list[str] = []
        self.facts: dict[str, Any] = {}
        self._file = file

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what a `with` holds, failed or not."""
        begin, before = now(), usage()
        try:
            yield
        finally:
            used = {key: round(value - before[key], 4) for key, value in usage().items()}
            thread = threading.current_thread()
            where = "main" if thread is threading.main_thread() else thread.name
            self.spans.append({"name": name, "begin": begin, "end": now(), "thread": where, **used})

    def write(self) -> None:
        """Write all that is known; the process's end comes after that."""
        found = {
            "spans": sorted(self.spans, key=lambda span: span["begin"]),
            "end": now(),
            "usage": usage(),
            "modules": len(sys.modules),
            "modules_compiled": len(self.compiled),
            "compiling_s": sum(self.compiled),
            "engine_files": self.engine_files,
            "libraries": mapped_libraries(),
            **self.facts,
        }
        self._file.write_text(json.dumps(found))


def mapped_libraries() -> dict[str, int]:
    """The shared libraries in this process's memory, with their sizes in bytes."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(words[5]) for line in lines if len(words := line.split(maxsplit=5)) == 6 and ".so" in words[5]}
    return {str(path): path.stat().st_size for path in sorted(paths) if path.is_file()}


class Timed:
    """A finder before all others: it times the imports of `IMPORTS`, and wraps functions of modules as they come."""

    def __init__(self, marks: Marks, wraps: dict[str, dict[str, Callable[..., Any]]]) -> None:
        self._marks, self._wraps = marks, wraps

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Python's own finding, with another way to run the module."""
        if name not in IMPORTS and name not in self._wraps:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def timed(module: ModuleType) -> None:
            if name in IMPORTS:
                with self._marks.span(f"import {name}"):
                    run(module)
            else:
                run(module)
            for attribute, wrap in self._wraps.get(name, {}).items():
                _replace(module, attribute, wrap)

        spec.loader.exec_module = timed  # type: ignore[method-assign]
        return spec


def _replace(module: ModuleType, attribute: str, wrap: Callable[..., Any]) -> None:
    """Put a function, or a class's method, into another one; one that isn't there (an older sdtrt) is left out."""
    *owners, last = attribute.split(".")
    owner: Any = module
    for name in owners:
        owner = getattr(owner, name, None)
    if hasattr(owner, last):
        setattr(owner, last, wrap(getattr(owner, last)))


def every_call(marks: Marks, name: Callable[..., str], after: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """A wrap that times each call, with a name made of its arguments, and what has to come after it to be counted."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with marks.span(name(*args)):
                result = function(*args, **kwargs)
                after()
                return result

        return timed

    return wrap


def first_call(marks: Marks, name: str, after: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """A wrap that times the first call only, and what has to come after it to be counted."""
    begun: list[str] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if begun:
                return function(*args, **kwargs)
            begun.append(name)
            with marks.span(name):
                result = function(*args, **kwargs)
                after()
            return result

        return timed

    return wrap


def synchronize() -> None:
    """Wait for the GPU, where PyTorch uses one."""
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def allocate() -> None:
    """The first allocation: PyTorch's own initialisation makes no context yet."""
    sys.modules["torch"].empty(1, device="cuda")


def opened(marks: Marks) -> Callable[..., Any]:
    """A wrap of `open_pipeline`: times how it is entered, not what runs in it."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            manager = function(*args, **kwargs)
            with marks.span("the pipeline is opened"):
                pipeline = manager.__enter__()
            try:
                yield pipeline
            finally:
                with marks.span("the pipeline is closed"):
                    manager.__exit__(*sys.exc_info())

        return timed

    return wrap


def nothing(_function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrap that leaves out what sdtrt does in the background."""
    return lambda *args, **kwargs: None


Wraps = dict[str, dict[str, Callable[..., Any]]]


def file(path: Path) -> str:
    """A file of an engine or a model, by its folder's first word."""
    return f"{path.parent.name.split('-')[0]}: {path.name}"


def wraps_of_files(marks: Marks) -> Wraps:
    """What looks for the GPU, and finds and reads models and engines."""

    def digested(path: Path) -> str:
        marks.engine_files.append(str(path))
        return f"digest of {file(path)}"

    return {
        "torch.cuda": {"_lazy_init": first_call(marks, "PyTorch initialises CUDA, with one allocation", allocate)},
        "sdtrt.common.host": {
            "gpus": first_call(marks, "the driver is asked for GPUs"),
            "open_primary_context": every_call(marks, lambda *_: "a CUDA context is made"),
        },
        "sdtrt.common.files": {"sha256_file": every_call(marks, lambda path: f"hash {file(path)}")},
        "sdtrt.engines.digests": {"digest_of": every_call(marks, digested)},
        "sdtrt.pipeline.opening.engines": {"ensure_engines": every_call(marks, lambda *_: "engines are found")},
        "sdtrt.models.resolve": {"resolve_model": every_call(marks, lambda *_: "the model is read")},
        "sdtrt.models.loading": {
            "load_parts": every_call(marks, lambda _model, names, *_: f"load {', '.join(names) or 'nothing'}"),
            "stored_tensors": every_call(marks, lambda _model, part: f"the stored {part} is looked up"),
        },
    }


def wraps_of_engines(marks: Marks) -> Wraps:
    """What opens engines, and what is begun before they are asked for."""
    return {
        "sdtrt.backends.tensorrt.versions.libraries": {"open_library": first_call(marks, "TensorRT is opened")},
        "sdtrt.backends.tensorrt.versions.running": {
            "load_engine": every_call(marks, lambda _library, plan, *_: f"deserialise {file(plan)}"),
        },
        "sdtrt.cli.prewarm": {"_compute_on": every_call(marks, lambda *_: "cuBLAS and cuDNN are loaded")},
        "sdtrt.cli.weights_ahead": {"read_file": every_call(marks, lambda path: f"read {file(path)}")},
        "sdtrt.pipeline.runs.settings": {"settings_of": every_call(marks, lambda *_: "the weights are fingerprinted")},
        "sdtrt.pipeline.opening.memory": {"check_memory": every_call(marks, lambda *_: "the memory is checked")},
        "sdtrt.backends.inductor.package": {
            "Package.__init__": every_call(marks, lambda _self, path, *_: f"open package {file(path)}"),
        },
        "sdtrt.backends.inductor.session": {
            f"InductorSession.{name}": every_call(
                marks, lambda session, *_: f"weights of the {session.contract.component} to the device", synchronize
            )
            for name in ("take_stored", "set_weights")
        },
        "sdtrt.backends.cuda_graphs": {
            "CudaGraphs._capture": every_call(marks, lambda *_: "a CUDA graph is captured", synchronize)
        },
        "sdtrt.cli.likely_engines": {"load_ahead": every_call(marks, lambda *_: "engines are loaded ahead")},
        "sdtrt.pipeline.opening.preloaded": {
            "_settle": every_call(marks, lambda *_: "what is loaded ahead is waited for")
        },
        "sdtrt.exports.onnx_run": {"open_model": every_call(marks, lambda path: f"deserialise {file(path)}")},
        "sdtrt.backends.open": {
            "open_session": every_call(marks, lambda entry, *_: f"open {entry.key.get('component')}")
        },
    }


def wraps_of_the_picture(marks: Marks) -> Wraps:
    """What runs in an open pipeline."""
    return {
        "sdtrt.pipeline.opening.open": {"open_pipeline": opened(marks)},
        "sdtrt.pipeline.parts.forwards": {
            "TextForward.__call__": first_call(marks, "the first call of the text encoder", synchronize),
            "UNetForward.__call__": first_call(marks, "the first call of the UNet", synchronize),
        },
        "sdtrt.pipeline.parts.facades": {
            "VaeFacade.decode": first_call(marks, "the first call of the VAE", synchronize)
        },
        "sdtrt.pipeline.runs.saving": {"OutputPlan.save": first_call(marks, "the image is written")},
    }


def wraps_of(marks: Marks, nothing_ahead: bool) -> Wraps:
    """The functions to be timed, by their modules; they must be there before other modules import them by name."""
    found = wraps_of_files(marks) | wraps_of_engines(marks) | wraps_of_the_picture(marks)
    if nothing_ahead:
        found["sdtrt.engines.digests"]["hash_ahead"] = nothing
        found["sdtrt.cli.weights_ahead"] = {"read_ahead": nothing}
        found["sdtrt.cli.prewarm"] = dict.fromkeys(("wake_gpu", "start_libraries", "import_tensorrt"), nothing)
    return found


def count_compiled(marks: Marks) -> None:
    """Count modules that are compiled from their source because there is no valid `.pyc`, and take the time."""
    compile_source = SourceFileLoader.source_to_code

    def counted(self: SourceFileLoader, data: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        code = compile_source(self, data, path, *args, **kwargs)
        marks.compiled.append(time.perf_counter() - begin)
        return code

    SourceFileLoader.source_to_code = counted  # type: ignore[method-assign, assignment]


def run_command(marks: Marks, arguments: list[str]) -> None:
    """Run sdtrt's command line in this process."""
    nothing_ahead = arguments[:1] == ["--nothing-ahead"]
    count_compiled(marks)
    sys.meta_path.insert(0, Timed(marks, wraps_of(marks, nothing_ahead)))
    atexit.register(marks.write)
    with marks.span("sdtrt is entered"):
        from sdtrt.__main__ import main
    sys.argv = ["sdtrt", *arguments[nothing_ahead:]]
    main()


def floor_python(marks: Marks) -> None:
    """Python's own start."""


def floor_torch(marks: Marks) -> None:
    """PyTorch alone."""
    with marks.span("import torch"):
        import torch  # noqa: F401


def floor_cuda(marks: Marks) -> None:
    """PyTorch, and CUDA with one allocation."""
    floor_torch(marks)
    with marks.span("the first allocation"):
        allocate()
        synchronize()


def floor_driver(marks: Marks) -> None:
    """The CUDA driver alone: initialised, and a context made."""
    import ctypes

    handle, device = ctypes.c_void_p(), ctypes.c_int()
    with marks.span("load the driver"):
        driver = ctypes.CDLL("libcuda.so.1")
    with marks.span("cuInit"):
        _check(driver.cuInit(0))
    with marks.span("make the context"):
        _check(driver.cuDeviceGet(ctypes.byref(device), 0))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(handle), device))


def _check(status: int) -> None:
    if status != CUDA_SUCCESS:
        sys.exit(f"CUDA driver error {status}")


def floor_library(marks: Marks, name: str) -> None:
    """A library alone; of a TensorRT also its plugins and a Runtime, which initialises CUDA."""
    with marks.span(f"import {name}"):
        library = import_module(name)
    if not name.startswith("tensorrt"):
        return
    with marks.span("logger and plugins"):
        logger = library.Logger(library.Logger.ERROR)
        if hasattr(library, "init_libnvinfer_plugins"):
            library.init_libnvinfer_plugins(logger, "")
    with marks.span("make a Runtime"):
        marks.facts["runtime"] = str(library.Runtime(logger))


def floor_diffusers(marks: Marks) -> None:
    """The libraries around an engine: PyTorch, transformers' and diffusers' classes of a pipeline."""
    floor_torch(marks)
    with marks.span("import transformers"):
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    with marks.span("import diffusers"):
        from diffusers import StableDiffusionPipeline  # noqa: F401


def floor_read(marks: Marks, *paths: str) -> None:
    """Read files whole, as the page cache or the disk gives them."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with marks.span("read"):
        for path in paths:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                while file.readinto(buffer):
                    pass


def floor_hold(marks: Marks) -> None:
    """Keep the GPU initialised for other processes until stdin ends, as persistence mode does."""
    floor_driver(marks)
    print("ready", flush=True)
    sys.stdin.read()


FLOORS: dict[str, Callable[..., None]] = {
    "python": floor_python,
    "torch": floor_torch,
    "cuda": floor_cuda,
    "driver": floor_driver,
    "library": floor_library,
    "diffusers": floor_diffusers,
    "read": floor_read,
    "hold": floor_hold,
}


def main() -> None:
    """Run what the first argument says."""
    kind, file, *arguments = sys.argv[1:]
    marks = Marks(Path(file))
    if kind == "command":
        run_command(marks, arguments)
    else:
        count_compiled(marks)
        FLOORS[arguments[0]](marks, *arguments[1:])
        marks.write()


if __name__ == "__main__":
    main()

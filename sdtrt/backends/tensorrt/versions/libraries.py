"""The TensorRTs that are installed: their modules, versions, features, messages, and the GPUs that they serve."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TextIO

from sdtrt.common import host
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.specs import BackendName

Family = Literal["tensorrt", "tensorrt_lean", "tensorrt_rtx"]
Version = tuple[int, ...]
Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]  # smallest, optimal, largest

# The first that can be imported serves. The lean runtime runs version-compatible plans and builds nothing.
MODULES: dict[BackendName, tuple[Family, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_lean"),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
OLDEST: Version = (8, 6)


@dataclass(frozen=True)
class Feature:
    """Something that not every version has: the names that it brings, and where sdtrt uses it.

    Args:
        names: `Class.member`, `Class` or a function.
        families: the libraries that have it; of `rtx`, every version does.
        since, until: versions of TensorRT (full or lean), the last one not included.
    """

    names: tuple[str, ...]
    families: tuple[Family, ...]
    since: Version = OLDEST
    until: Version | None = None

    def is_in(self, family: Family, version: Version) -> bool:
        """Whether a version has it."""
        if family not in self.families:
            return False
        return family == "tensorrt_rtx" or (self.since <= version and (self.until is None or version < self.until))


FULL: tuple[Family, ...] = ("tensorrt",)
RTX: tuple[Family, ...] = ("tensorrt_rtx",)
BUILDERS: tuple[Family, ...] = ("tensorrt", "tensorrt_rtx")
ALL: tuple[Family, ...] = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")

FEATURES: dict[str, Feature] = {
    # Up to 8.6 the builder chooses precisions, from flags and each layer's wish; the ONNX's types are only a start.
    "weak typing": Feature(
        (
            "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
            "BuilderFlag.FP16",
            "BuilderFlag.PREFER_PRECISION_CONSTRAINTS",
            "ILayer.precision",
            "ILayer.set_output_type",
        ),
        FULL,
        until=(10,),
    ),
    "strong typing": Feature(("NetworkDefinitionCreationFlag.STRONGLY_TYPED",), BUILDERS, since=(10,)),
    # 8.6.0 normalises natively unasked.
    "parser flags": Feature(("OnnxParser.set_flag", "OnnxParserFlag.NATIVE_INSTANCENORM"), BUILDERS, since=(8, 6, 1)),
    # cuBLAS and cuDNN tactics are on by default up to 8.6, need libraries of their own, and make plans depend on them.
    "external tactics by default": Feature(("TacticSource.CUBLAS", "TacticSource.CUDNN"), FULL, until=(10,)),
    # Several contexts on one profile: asked for in 8.6, a matter of course later.
    "profile sharing on request": Feature(("PreviewFeature.PROFILE_SHARING_0806",), FULL, until=(10,)),
    "bfloat16": Feature(("DataType.BF16",), ALL, since=(10,)),
    "progress monitor": Feature(
        (
            "IBuilderConfig.progress_monitor",
            "IProgressMonitor.phase_start",
            "IProgressMonitor.step_complete",
            "IProgressMonitor.phase_finish",
        ),
        BUILDERS,
        since=(10,),
    ),
    "parser node names": Feature(("ParserError.node_name", "ParserError.node_operator"), BUILDERS, since=(10,)),
    "plugins": Feature(("init_libnvinfer_plugins",), BUILDERS),
    # In a weakly typed network a plugin says itself which types and layouts it takes, and gets them.
    "plugins that choose types": Feature(("get_plugin_registry",), FULL, until=(10,)),
    "version-compatible plans": Feature(("BuilderFlag.VERSION_COMPATIBLE",), FULL),
    "context memory": Feature(
        (
            "ICudaEngine.create_execution_context_without_device_memory",
            "ICudaEngine.device_memory_size",
            "IExecutionContext.device_memory",
        ),
        FULL,
        until=(10, 1),
    ),
    "context memory v2": Feature(
        (
            "ExecutionContextAllocationStrategy.USER_MANAGED",
            "ICudaEngine.device_memory_size_v2",
            "IExecutionContext.set_device_memory",
        ),
        ALL,
        since=(10, 1),
    ),
    # Ahead of time, for a GPU that is not here; kernels are finished at run time, when shapes are known.
    "named compute capability": Feature(
        ("ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"), RTX
    ),
    "kernels finished at run time": Feature(
        (
            "DynamicShapesKernelSpecializationStrategy.EAGER",
            "ICudaEngine.create_runtime_config",
            "IExecutionContext.is_stream_capturable",
            "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
            "IRuntimeConfig.set_execution_context_allocation_strategy",
        ),
        RTX,
    ),
}


class Log:
    """TensorRT's messages. Errors are kept; a build also copies everything into a file."""

    def __init__(self, keep: int = 100) -> None:
        self._lock = threading.Lock()
        self._errors: deque[tuple[int, str]] = deque(maxlen=keep)
        self._count = 0
        self._file: TextIO | None = None
        self._verbose = False

    def record(self, severity: str, text: str) -> None:
        """Take one message; called by TensorRT from any of its threads."""
        with self._lock:
            if severity in ("ERROR", "INTERNAL_ERROR"):
                self._count += 1
                self._errors.append((self._count, text))
            if self._file is not None and (self._verbose or severity != "VERBOSE"):
                self._file.write(f"[{severity}] {text}\n")
                self._file.flush()

    def mark(self) -> int:
        """A point in time for `errors`."""
        with self._lock:
            return self._count

    def errors(self, since: int = 0) -> list[str]:
        """The errors since a mark, oldest first."""
        with self._lock:
            return [text for number, text in self._errors if number > since]

    @contextmanager
    def copied_to(self, file: TextIO, *, verbose: bool) -> Iterator[None]:
        """Copy all messages to `file` (the most detailed ones only if `verbose`)."""
        self._file, self._verbose = file, verbose
        try:
            yield
        finally:
            with self._lock:
                self._file = None


@dataclass(frozen=True)
class Library:
    """One TensorRT: its module, and what its version has."""

    module: Any
    family: Family
    version: Version
    log: Log = field(default_factory=Log)
    _logger: list[Any] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def name(self) -> str:
        """For people: `TensorRT 8.6.1`."""
        title = {"tensorrt": "TensorRT", "tensorrt_lean": "TensorRT lean runtime", "tensorrt_rtx": "TensorRT for RTX"}
        return f"{title[self.family]} {'.'.join(map(str, self.version))}"

    def has(self, feature: str) -> bool:
        """Whether this version has a feature of `FEATURES`."""
        return FEATURES[feature].is_in(self.family, self.version)

    @property
    def logger(self) -> Any:
        """The one logger of this library (TensorRT keeps the first that it gets), plugins registered with it.

        Plugins must be there before anything is parsed or deserialised: without them a plan that uses one of
        TensorRT's own (InstanceNormalization_TRT) can't be read.
        """
        with self._lock:
            if not self._logger:
                logger = _make_logger(self.module, self.log)
                if self.has("plugins"):
                    trt = self.module
                    trt.init_libnvinfer_plugins(logger, "")
                self._logger.append(logger)
            return self._logger[0]


def _make_logger(trt: Any, log: Log) -> Any:
    """An `ILogger` that gives its messages to `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.record(severity.name, msg)

    return Logger()


def version(backend: BackendName) -> str:
    """The version of a backend's library, as `8.6.1`. Raises `EngineError` where it is missing or too old."""
    return ".".join(map(str, open_library(backend).version))


_OPENING = threading.Lock()


def open_library(backend: BackendName) -> Library:
    """Import a backend's library, once.

    Raises:
        EngineError: when it is not installed, can't be loaded, or is older than 8.6.
    """
    with _OPENING:  # the logger must be one, whichever thread comes first
        return _open_library(backend)


@cache
def _open_library(backend: BackendName) -> Library:
    for family in MODULES[backend]:
        if importlib.util.find_spec(family) is not None:
            return library_of(family, family)
    raise EngineError(f"{backend} is not installed", hint=f'pip install "sdtrt[{backend}]"')


def library_of(module_name: str, family: Family) -> Library:
    """The library in a module of any name (`open_library` finds the usual ones).

    Raises:
        EngineError: when it can't be loaded, or is older than 8.6.
    """
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{module_name} is installed but can't be loaded: {error}",
            hint=f"pip install --force-reinstall {module_name.replace('_', '-')}",
        ) from error
    found = parse_version(module.__version__)
    if family == "tensorrt" and found < (10,):
        found = min(found, _loaded_version() or found)
    if family != "tensorrt_rtx" and found < OLDEST:
        raise EngineError(
            f"TensorRT {module.__version__} is too old: sdtrt needs 8.6 or newer", hint="pip install -U tensorrt"
        )
    return Library(module, family, found)


def _loaded_version() -> Version | None:
    """The version of the 8.x library itself; its bindings, which are packaged apart, may be newer."""
    try:
        number = int(ctypes.CDLL("libnvinfer.so.8").getInferLibVersion())
    except (OSError, AttributeError):
        return None
    return number // 1000, number % 1000 // 100, number % 100


def parse_version(text: str) -> Version:
    """`10.13.3.9.post1` → (10, 13, 3, 9)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split("."))  # type: ignore[index]


def serves(library: Library, compute_capability: tuple[int, int]) -> bool:
    """Whether a library serves GPUs of a compute capability (NVIDIA's support matrices)."""
    if library.has("named compute capability"):
        return capability_name(compute_capability) in compute_capabilities(library)
    if library.version < (10,):
        return (5, 0) <= compute_capability <= (9, 0)
    lowest = (7, 0) if library.version < (10, 5) else (7, 5)
    highest = (9, 0) if library.version < (10, 8) else (99, 0)
    return lowest <= compute_capability <= highest


def compute_capabilities(library: Library) -> tuple[str, ...]:
    """The compute capabilities that a library can build for ahead of time, as `SM89`."""
    trt = library.module
    return tuple(name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))


def capability_name(compute_capability: tuple[int, int]) -> str:
    return f"SM{compute_capability[0]}{compute_capability[1]}"


def require_gpu(library: Library) -> None:
    """Raise `EngineError` unless there is a GPU that the library serves. (Without one, some versions crash.)"""
    gpus = host.gpus()
    if not gpus:
        raise EngineError(
            f"{library.name} needs an NVIDIA GPU, and the driver shows none",
            hint="check nvidia-smi; without a GPU use --backend onnxruntime",
        )
    capability = gpus[0].compute_capability
    if not serves(library, capability):
        raise EngineError(
            f"{library.name} does not serve {gpus[0].name} (compute capability {capability[0]}.{capability[1]})",
            hint="use --backend tensorrt" if library.family == "tensorrt_rtx" else "pip install -U tensorrt",
        )


def require_builder(library: Library) -> None:
    """Raise `BuildError` for a lean runtime."""
    if library.family == "tensorrt_lean":
        raise BuildError(
            f"{library.name} runs engines and builds none", hint='pip install "sdtrt[tensorrt]" to build engines'
        )


DTYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def dtype_name(dtype: Any) -> str:
    """A TensorRT data type, as torch and NumPy spell it."""
    name: str = dtype.name
    return DTYPE_NAMES.get(name, name.lower())

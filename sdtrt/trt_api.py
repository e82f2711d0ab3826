"""Everything that differs between TensorRT 8.6, 10, 11 and TensorRT for RTX. Nothing else asks for a version.

Every flag and method is asked for by its name, never by its number (the numbers moved between 10 and 11). What not
every version has is in `FEATURES`; the tests hold that table, and each attribute used here and in the modules that
build and run engines, against what the real bindings of each version have. For that test, variables that hold
TensorRT objects have one name each: `trt`, `builder`, `network`, `parser`, `config`, `optimization`, `runtime`,
`engine`, `context`, `inspector`, `layer`, `tensor`, `problem`, `timing`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import mmap
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TextIO

from sdtrt import host
from sdtrt.errors import BuildError, BuildMemoryShortage, EngineError, MemoryShortage, SdtrtError
from sdtrt.specs import Backend, BuildSpec, Precision

Family = Literal["tensorrt", "tensorrt_lean", "tensorrt_rtx"]
Version = tuple[int, ...]
Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]  # smallest, optimal, largest

# The first that can be imported serves. The lean runtime runs version-compatible plans and builds nothing.
MODULES: dict[Backend, tuple[Family, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_lean"),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
OLDEST: Version = (8, 6)
MAX_OPSET_8 = 17  # the newest ONNX opset that TensorRT 8.6's parser reads
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
PRECISION_OF_DTYPE: dict[str, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


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


def is_installed(backend: Backend) -> bool:
    """Whether a backend's library is there (nothing is imported)."""
    return any(importlib.util.find_spec(name) is not None for name in MODULES[backend])


def version(backend: Backend) -> str:
    """The version of a backend's library, as `8.6.1`. Raises `EngineError` where it is missing or too old."""
    return ".".join(map(str, open_library(backend).version))


_OPENING = threading.Lock()


def open_library(backend: Backend) -> Library:
    """Import a backend's library, once.

    Raises:
        EngineError: when it is not installed, can't be loaded, or is older than 8.6.
    """
    with _OPENING:  # the logger must be one, whichever thread comes first
        return _open_library(backend)


@cache
def _open_library(backend: Backend) -> Library:
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
        return _capability_name(compute_capability) in compute_capabilities(library)
    if library.version < (10,):
        return (5, 0) <= compute_capability <= (9, 0)
    lowest = (7, 0) if library.version < (10, 5) else (7, 5)
    highest = (9, 0) if library.version < (10, 8) else (99, 0)
    return lowest <= compute_capability <= highest


def compute_capabilities(library: Library) -> tuple[str, ...]:
    """The compute capabilities that a library can build for ahead of time, as `SM89`."""
    trt = library.module
    return tuple(name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))


def _capability_name(compute_capability: tuple[int, int]) -> str:
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


# ---------------------------------------------------------------------------------------------------------- building


@dataclass
class Draft:
    """A parsed network, what must live as long as it (the parser owns the weights), and what to warn of."""

    library: Library
    builder: Any
    network: Any
    parser: Any
    warnings: list[str] = field(default_factory=list)


# Parsers of 8.6.0 under the bindings of 8.6.1: virtual functions came in before the destructor, which would miss.
_NEVER_FREED: list[Any] = []


def parse_onnx(library: Library, onnx: Path) -> Draft:
    """Read an ONNX file (external data beside it) into a network.

    Raises:
        BuildError: when the library can't read it, with the node, its operator and the reason.
    """
    trt = library.module
    mark = library.log.mark()
    try:
        builder = trt.Builder(library.logger)
    except TypeError as error:  # what pybind makes of a null pointer
        raise explain(library, library.log.errors(mark), "the TensorRT builder can't start") from error
    network = builder.create_network(_network_flags(library))
    parser = trt.OnnxParser(network, library.logger)
    if library.has("parser flags"):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # norm statistics in fp32; needed for portable plans
    else:
        _NEVER_FREED.append(parser)
    if not parser.parse_from_file(str(onnx)):
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [_describe_problem(library, problem, onnx) for problem in problems] or library.log.errors(mark)
        raise BuildError(
            f"{library.name} can't read {onnx.name}: {'; '.join(reasons[:3]) or 'no reason given'}",
            hint=_parse_hint(library, onnx),
        )
    return Draft(library, builder, network, parser)


def has_plugin(library: Library, name: str) -> bool:
    """Whether there is a plugin for weakly typed networks. The parser takes ONNX operators of its name for it."""
    if not library.has("plugins that choose types"):
        return False
    trt, _ = library.module, library.logger  # plugins are registered with the logger
    return any(creator.name == name for creator in trt.get_plugin_registry().plugin_creator_list)


def _network_flags(library: Library) -> int:
    """Explicit batch on 8.6, where it must be asked for; strong typing wherever it exists (11 knows no other)."""
    trt = library.module
    if library.has("strong typing"):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def _describe_problem(library: Library, problem: Any, onnx: Path) -> str:
    """One parse error: node, operator, reason. 8.6 knows the node's number only; the ONNX file has the rest."""
    if library.has("parser node names"):
        name, operator = problem.node_name(), problem.node_operator()
    else:
        name, operator = _onnx_node(onnx, problem.node())
    node = f"node {name or problem.node()}" + (f" ({operator})" if operator else "")
    return f"{node}: {problem.desc()}"


def _onnx_node(onnx: Path, index: int) -> tuple[str, str]:
    """Name and operator of a node, empty where there is no such node or the file can't be read."""
    import onnx as onnx_library

    try:
        node = onnx_library.load(str(onnx), load_external_data=False).graph.node[max(index, 0)]
    except Exception:  # the parse error that is being reported may be just that: an unreadable file
        return "", ""
    return node.name, node.op_type


def _parse_hint(library: Library, onnx: Path) -> str:
    """What may help against a parse error."""
    if not library.has("strong typing") and (opset := _onnx_opset(onnx)) > MAX_OPSET_8:
        return f"{library.name} reads ONNX opsets up to {MAX_OPSET_8}, this is {opset}: use --exporter torchscript"
    return "export it again: sdtrt export --force, or use --exporter torchscript"


def _onnx_opset(onnx: Path) -> int:
    """The opset of an ONNX file's main domain, 0 where it can't be read."""
    import onnx as onnx_library

    try:
        model = onnx_library.load(str(onnx), load_external_data=False)
    except Exception:
        return 0
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def network_inputs(draft: Draft) -> dict[str, str]:
    """Name → dtype (`float16`) of a network's inputs."""
    tensors = [draft.network.get_input(index) for index in range(draft.network.num_inputs)]
    return {tensor.name: dtype_name(tensor.dtype) for tensor in tensors}


CHANNELS_TOGETHER = 8  # of a tensor that lies channels last


def lay_channels_last(draft: Draft, names: Collection[str]) -> None:
    """Have some of a network's inputs and outputs lie channels last; fp16, a multiple of 8 channels.

    TensorRT calls that `HWC8`: [N,C,H,W] as an array [N][H][W][(C+7)/8*8], so with such a C the very bytes of NHWC; in
    8.x bound to fp16, and for three dimensions or more (8.5.3's Python API on `TensorFormat`). A mask on tensors that
    are neither inputs nor outputs is ignored (Developer Guide, "I/O Formats"; NVIDIA/TensorRT issue 3604 for 8.6). Only
    one format is in the mask, which leaves no choice: who gives and who takes a tensor agree. `BuilderFlag.DIRECT_IO`
    is not set: it fails a build that needs a change of layout at an input or output ("no conformant implementation
    exists", NVIDIA-AI-IOT/cuDLA-samples issue 36), and a fast layer inside may be worth one.
    """
    trt, network = draft.library.module, draft.network
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    assert set(names) <= {tensor.name for tensor in tensors}, "a plan would give or take another layout"
    for tensor in tensors:
        if tensor.name in names:
            tensor.allowed_formats = 1 << int(trt.TensorFormat.HWC8)


def dtype_name(dtype: Any) -> str:
    """A TensorRT data type, as torch and NumPy spell it."""
    name: str = dtype.name
    return DTYPE_NAMES.get(name, name.lower())


def configure(
    draft: Draft,
    spec: BuildSpec,
    profiles: Sequence[Mapping[str, ShapeRange]],
    fp32_nodes: Collection[str] = (),
) -> Any:
    """The builder's configuration for a build.

    Args:
        profiles: input name → range, one mapping a profile.
        fp32_nodes: the ONNX nodes that compute in fp32; a weakly typed fp16 network must be told.

    Raises:
        BuildError: for what this version can't do.
    """
    library, builder = draft.library, draft.builder
    trt = library.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then tells precisions; runs as fast
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    level = spec.optimization_level if spec.optimization_level is not None else _default_level(library)
    if level is not None:
        config.builder_optimization_level = level
    if spec.export.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not what was asked for
    if spec.version_compatible:
        _make_version_compatible(library, config)
    if library.has("external tactics by default"):
        kept = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(source) for source in kept))
    if library.has("profile sharing on request"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if library.has("named compute capability"):
        _set_compute_capability(library, config, spec.compute_capability)
    _set_precision(draft, config, spec.export.precision, fp32_nodes)
    for shapes in profiles:
        _add_profile(builder, config, shapes)
    return config


def _default_level(library: Library) -> int | None:
    """The builder's effort where nobody asks for one: the library's own, but of 8.6.

    There, 1 is what UNets of Stable Diffusion 1.5's size were built and timed with; level 2 made none of the parts that
    were tried faster, and 3, its own, did not end in the time that there was (`benchmarks/tuning.md`).
    """
    return 1 if library.has("weak typing") else None


# From how many tokens on an attention is worth a cut: 64x64 latents have 4096, and 1024 at the next resolution, where
# TensorRT 8.6's kernel takes a tenth of the time and its sums in fp16 lose little (`benchmarks/fidelity.md`).
SPLIT_TOKENS = 2048


def split_tokens(spec: BuildSpec) -> int:
    """From how many tokens on an engine leaves self-attentions to PyTorch; 0 for none.

    Unless the build says so itself, that is on 8.6 only, where the engine is for one fixed size: its own kernel is slow
    on newer GPUs, and adds up in fp16. Later versions have better ones.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    if spec.split_attention is not None or not spec.can_split:
        return spec.split_attention or 0
    return SPLIT_TOKENS if open_library(spec.backend).has("weak typing") else 0


def splits_norms(spec: BuildSpec) -> bool:
    """Whether an engine leaves its large group normalisations to PyTorch, those of `splitting.choose_norms`.

    That is one of a VAE's decoder or encoder on 8.6, for one fixed size, unless the build leaves nothing to PyTorch
    (`split_attention` is 0): no flag and no other form of a norm keeps 8.6 from three copies of it in fp32, which are
    most of the memory that either works in.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    may = spec.can_split_norms and spec.split_attention != 0
    return may and open_library(spec.backend).has("weak typing")


def _make_version_compatible(library: Library, config: Any) -> None:
    """Ask for a plan that later versions can load."""
    trt = library.module
    if not library.has("version-compatible plans"):
        raise BuildError(
            f"{library.name} has no version-compatible plans", hint="leave --version-compatible out, or use tensorrt"
        )
    config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _set_compute_capability(library: Library, config: Any, wanted: tuple[int, int] | None) -> None:
    """Build for a named GPU generation, or for the GPU of this machine."""
    trt = library.module
    capability = wanted or (host.gpus()[0].compute_capability if host.gpus() else None)
    if capability is None:
        raise BuildError("there is no GPU to build for", hint="name one: --compute-capability 8.9")
    name = _capability_name(capability)
    if name not in compute_capabilities(library):
        raise BuildError(
            f"{library.name} can't build for compute capability {capability[0]}.{capability[1]}",
            hint=f"it builds for {', '.join(compute_capabilities(library))}",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _set_precision(draft: Draft, config: Any, precision: Precision, fp32_nodes: Collection[str]) -> None:
    """Let the engine compute in `precision`. With strong typing the ONNX's own types already say so."""
    library = draft.library
    if precision == "bf16" and not library.has("bfloat16"):
        raise BuildError(f"{library.name} has no bf16", hint="use --precision fp16")
    if library.has("strong typing") or precision == "fp32":
        return
    trt = library.module
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    for layer in fp32_layers(draft, fp32_nodes):
        layer.precision = trt.DataType.FLOAT
        layer.set_output_type(0, trt.DataType.FLOAT)


# Layers that compute. Others move, store or convert numbers, and tell nothing about precision.
COMPUTING = frozenset(
    {
        *("ACTIVATION", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ELEMENTWISE", "MATRIX_MULTIPLY", "NORMALIZATION"),
        *("POOLING", "REDUCE", "SCALE", "SOFTMAX", "UNARY"),
    }
)


def fp32_layers(draft: Draft, nodes: Collection[str]) -> list[Any]:
    """The layers of a weakly typed fp16 network that must not be lowered: those of the ONNX nodes that compute in fp32.

    That is what strong typing does by itself: the export decides (timestep embedding, upcast attention). The network's
    own types don't tell: before a build, 8.6 calls most layers of an fp16 graph fp32. Its parser names a layer after
    its node, which is how they are found. Norm statistics need no mention: the normalisation layer computes them in
    fp32 anyway.
    """
    layers = [draft.network.get_layer(index) for index in range(draft.network.num_layers)]
    kept = [layer for layer in layers if layer.name in nodes and layer.type.name in COMPUTING]
    missing = set(nodes) - {layer.name for layer in layers}
    if missing:
        draft.warnings.append(
            f"{len(missing)} of {len(nodes)} operators that the ONNX computes in fp32 may be computed in fp16:"
            f" TensorRT's parser has no layers of their names ({', '.join(sorted(missing)[:3])})"
        )
    return kept


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, ShapeRange]) -> None:
    """Add one optimisation profile."""
    optimization = builder.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        optimization.set_shape(name, smallest, best, largest)
    if config.add_optimization_profile(optimization) < 0:
        raise BuildError(f"TensorRT refuses the profile {dict(shapes)}", hint="check --batch, --height and --width")


def read_timing_cache(config: Any, file: Path | None) -> bool:
    """Start from the kernel timings of earlier builds; False where the file is another version's or GPU's.

    The cache is always attached, empty at worst, so that `write_timing_cache` has something to write.
    """
    data = file.read_bytes() if file is not None and file.is_file() else b""
    timing = config.create_timing_cache(data)
    fits = timing is not None and config.set_timing_cache(timing, False)
    if not fits:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return bool(fits)


def timing_cache_bytes(config: Any, kept: bytes = b"") -> bytes:
    """The kernel timings that a build has gathered, to be kept for the next one.

    Args:
        kept: timings that others have kept since; all are together then, but for those of another TensorRT or GPU.
    """
    timing = config.get_timing_cache()
    if timing is None:
        return b""
    others = config.create_timing_cache(kept) if kept else None
    if others is not None:
        timing.combine(others, False)
    return bytes(timing.serialize())


def watch_progress(library: Library, config: Any, show: Callable[[str], bool]) -> Any:
    """Call `show` with the builder's current step; the build stops when that returns False.

    Returns:
        The monitor, which must live as long as the build; None where this version has none (8.6).
    """
    if not library.has("progress monitor"):
        return None
    trt = library.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            show(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return show(f"{phase_name} {step + 1}/{self.steps.get(phase_name, step + 1)}")

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def serialize(draft: Draft, config: Any) -> Any:
    """Build the plan: minutes.

    Returns:
        Its bytes, as an object with the buffer protocol.

    Raises:
        BuildError: when it fails, with TensorRT's last errors.
    """
    library, builder = draft.library, draft.builder
    mark = library.log.mark()
    plan = builder.build_serialized_network(draft.network, config)
    if plan is None:
        raise explain(library, library.log.errors(mark), f"{library.name} can't build the engine", BuildError)
    return plan


def network_precisions(draft: Draft) -> dict[str, int]:
    """How many computing layers of a strongly typed network have each precision, `{"fp16": 120, "fp32": 7}`."""
    counts: Counter[str] = Counter()
    for index in range(draft.network.num_layers):
        layer = draft.network.get_layer(index)
        tensor = layer.get_output(0) if layer.type.name in COMPUTING else None
        if tensor is not None and (precision := PRECISION_OF_DTYPE.get(dtype_name(tensor.dtype))):
            counts[precision] += 1
    return dict(counts)


# ----------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of a plan say: the library's version, and the plan's length where it is known."""

    version: Version
    size_bytes: int | None


HEADER_BYTES = 28
TENSORRT_MAGIC, RTX_MAGIC = b"ftrt", b"vtrt"


def read_header(plan: Path) -> PlanHeader | None:
    """The header of a plan file, None if it is no plan.

    Both libraries begin with four letters, a layout number (32 bits, 0 so far) and have the version in 4 bytes at byte
    24 (where trtexec --getPlanVersionOnly reads it). TensorRT for RTX and TensorRT 8.6 have the file's length in 64
    bits at byte 16; of later TensorRTs no plan was at hand to look at.
    """
    with plan.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES or head[:4] not in (TENSORRT_MAGIC, RTX_MAGIC):
        return None
    if head[4:8] != bytes(4):  # another layout than the one known
        return PlanHeader((), None)
    version = tuple(head[24:28])
    has_length = head[:4] == RTX_MAGIC or version[:2] == (8, 6)
    return PlanHeader(version, int.from_bytes(head[16:24], "little") if has_length else None)


def load_engine(library: Library, plan: Path, *, allow_host_code: bool = False) -> tuple[Any, Any]:
    """Deserialise a plan on the current GPU.

    Args:
        allow_host_code: let a version-compatible plan bring the runtime that runs it (code: only from a plan of
            one's own).

    Returns:
        The runtime, which must live as long as the engine, and the engine.

    Raises:
        EngineError: when it can't be loaded: cut short, of another version or GPU, a plugin or memory missing.
    """
    header = _check_plan_file(plan)
    require_gpu(library)
    if not allow_host_code and _is_of_another_version(library, header):  # 8.6 reads such a plan and may go wrong later
        raise explain(library, (), f"{plan} can't be loaded", EngineError, header)
    trt = library.module
    mark = library.log.mark()
    runtime = trt.Runtime(library.logger)
    runtime.engine_host_code_allowed = allow_host_code
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise explain(library, library.log.errors(mark), f"{plan} can't be loaded")
    return runtime, engine


def _is_of_another_version(library: Library, header: PlanHeader) -> bool:
    """Whether a plan was built by another minor version. Plans of TensorRT for RTX may run in later ones."""
    known = library.family != "tensorrt_rtx" and bool(header.version)
    return known and header.version[:2] != library.version[:2]


def _check_plan_file(plan: Path) -> PlanHeader:
    """Find what is wrong with a plan before TensorRT reads it (it may crash on rubbish); returns its header."""
    if not plan.is_file():
        raise EngineError(f"there is no engine at {plan}", hint="build it: sdtrt build --backend tensorrt")
    header, size = read_header(plan), plan.stat().st_size
    if header is None:
        raise EngineError(f"{plan} is no TensorRT plan ({size} bytes)", hint=REBUILD)
    if header.size_bytes is not None and size < header.size_bytes:
        raise EngineError(f"{plan} is cut short: {size} of {header.size_bytes} bytes are there", hint=REBUILD)
    return header


def engine_tensors(library: Library, engine: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Name → dtype of an engine's inputs and of its outputs."""
    trt = library.module
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name in names:
        is_output = engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT
        found[is_output][name] = dtype_name(engine.get_tensor_dtype(name))
    return found


def engine_profiles(engine: Any, inputs: Sequence[str]) -> list[dict[str, ShapeRange]]:
    """Input name → (smallest, optimal, largest) shape, for each of an engine's profiles."""

    def ranges(name: str, index: int) -> ShapeRange:
        low, best, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
        return low, best, high

    return [{name: ranges(name, index) for name in inputs} for index in range(engine.num_optimization_profiles)]


def scratch_bytes(library: Library, engine: Any) -> int:
    """The scratch memory that a context of `create_shared_context` needs, enough for every profile."""
    if library.has("context memory v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def create_shared_context(library: Library, engine: Any, scratch: int, size_bytes: int) -> Any:
    """An execution context that works in the caller's scratch memory: contexts that don't run at once can share it.

    Args:
        scratch: address of the memory on the GPU, aligned to 256 bytes.
        size_bytes: of it, at least `scratch_bytes`.
    """
    trt = library.module
    mark = library.log.mark()
    if library.has("kernels finished at run time"):
        options = engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Captured into a CUDA graph, a stand-in kernel would stay for good: have the real ones made first.
        options.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = engine.create_execution_context(options)
    elif library.has("context memory v2"):
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        context = engine.create_execution_context_without_device_memory()
    _check_context(library, context, mark)
    if library.has("context memory v2"):
        context.set_device_memory(scratch, size_bytes)
    else:
        context.device_memory = scratch
    return context


def create_context(library: Library, engine: Any) -> Any:
    """An execution context with memory of its own."""
    mark = library.log.mark()
    context = engine.create_execution_context()
    _check_context(library, context, mark)
    return context


def _check_context(library: Library, context: Any, mark: int) -> None:
    if context is None:
        raise explain(library, library.log.errors(mark), "TensorRT can't create an execution context", EngineError)


def prepare_context(
    library: Library, context: Any, profile: int, shapes: Mapping[str, Shape], stream: int
) -> dict[str, Shape]:
    """Set a context's profile and input shapes.

    Args:
        stream: handle of the CUDA stream that the context will run on.

    Returns:
        The shape of every output.
    """
    mark = library.log.mark()
    if context.active_optimization_profile != profile:
        _expect(library, context.set_optimization_profile_async(profile, stream), f"profile {profile}", mark)
    for name, shape in shapes.items():
        _expect(library, context.set_input_shape(name, shape), f"{name} {list(shape)}", mark)
    return output_shapes(library, context)


def output_shapes(library: Library, context: Any) -> dict[str, Shape]:
    """The shape of every output of a context whose input shapes are set."""
    engine, output = context.engine, library.module.TensorIOMode.OUTPUT
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = [name for name in names if engine.get_tensor_mode(name) == output]
    return {name: tuple(context.get_tensor_shape(name)) for name in found}


def set_addresses(library: Library, context: Any, addresses: Mapping[str, int]) -> None:
    """Tell a context where its inputs and outputs lie on the GPU."""
    mark = library.log.mark()
    for name, address in addresses.items():
        _expect(library, context.set_tensor_address(name, address), f"the address of {name}", mark)


def enqueue(library: Library, context: Any, stream: int) -> None:
    """Start a context's run on a CUDA stream. Raises `EngineError` when TensorRT refuses."""
    mark = library.log.mark()
    if not context.execute_async_v3(stream):
        raise explain(library, library.log.errors(mark), "the engine failed to run", EngineError)


def is_capturable(library: Library, context: Any, stream: int) -> bool:
    """Whether the next run may be captured into a CUDA graph."""
    return not library.has("kernels finished at run time") or bool(context.is_stream_capturable(stream))


def _expect(library: Library, accepted: bool, what: str, mark: int) -> None:
    if not accepted:
        raise explain(library, library.log.errors(mark), f"TensorRT refuses {what}", EngineError)


def inspect(library: Library, engine: Any, context: Any) -> dict[str, Any]:
    """What the engine inspector tells (`Layers`, `Bindings`); of dynamic shapes, as they are set in `context`."""
    trt = library.module
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without it, 8.6 says "N/A due to dynamic shapes" in place of data types
    return dict(json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON), strict=False))


# Layers of the inspector that only move or convert: an fp32 engine with fp16 inputs has fp16 ones of these too.
MOVING = re.compile(r"reformat|noop|constant|shuffle|cast|slice|concat|copy|gather|shape|signal|wait", re.IGNORECASE)
# How the versions write data types: `Row major linear FP16 format`, `Half`, `Channel major FP16 format where ...`.
DATATYPES = (
    ("bf16", re.compile(r"BF16|BFLOAT16", re.IGNORECASE)),
    ("fp16", re.compile(r"FP16|FLOAT16|HALF", re.IGNORECASE)),
    ("fp8", re.compile(r"FP8|FLOAT8", re.IGNORECASE)),
    ("int8", re.compile(r"INT8", re.IGNORECASE)),
    ("fp32", re.compile(r"FP32|FLOAT", re.IGNORECASE)),
)


def layer_precisions(information: Mapping[str, Any]) -> dict[str, int]:
    """How many computing layers of an engine give each precision, from the inspector's JSON.

    Fused regions count as one layer of their outputs' precision. Empty where the plan was built without details.
    """
    counts: Counter[str] = Counter()
    for layer in information.get("Layers", ()):
        if not isinstance(layer, Mapping) or MOVING.search(str(layer.get("LayerType", ""))):
            continue
        found = {_datatype(str(output.get("Format/Datatype", ""))) for output in layer.get("Outputs", ())}
        counts.update(found - {""})
    return dict(counts)


def _datatype(text: str) -> str:
    return next((name for name, pattern in DATATYPES if pattern.search(text)), "")


# ------------------------------------------------------------------------------------------------------------ errors

REBUILD = "build it again: sdtrt build --backend tensorrt --force"

OUT_OF_MEMORY = (
    r"out of memory|OutOfMemory|cudaError 2\b|initialization failure with error: 2\b|insufficient memory"
    r"|Requested amount of GPU memory"
)
NO_KERNEL = r"Could not find any implementation for node ([^\s.]+)"  # kernels that need more than is free are left out
SHORTAGES: dict[type[SdtrtError], type[MemoryShortage] | type[BuildMemoryShortage]] = {
    EngineError: MemoryShortage,
    BuildError: BuildMemoryShortage,
}

# What TensorRT's messages mean. The first that matches is the cause: what comes with it is consequence.
CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"expecting library version ([\d.]*\d) got ([\d.]*\d)",
        "it was built by TensorRT {1}, and this is {0}",
        REBUILD,
    ),
    (
        r"Version tag does not match.*?Current Version: (\d+), Serialized Engine Version: (\d+)",
        "it was built by another TensorRT version (serialisation {1}, this is {0})",
        REBUILD,
    ),
    (
        r"expecting compute (\d+\.\d+) got compute (\d+\.\d+)",
        "it was built for compute capability {1}, and this GPU has {0}",
        REBUILD,
    ),
    (
        r"(?:could not find plugin:?|[Cc]annot find plugin:|[Pp]lugin not found.*?:|plugin creator for)\s*'?(\w+)",
        "it needs the plugin {0}, which is not registered here",
        "load the plugin's library before the engine, or export and build the model again: sdtrt build --force",
    ),
    (
        r"driver version is insufficient|cudaError 35\b|initialization failure with error: 35\b",
        "the NVIDIA driver is missing or older than this TensorRT needs",
        "update the driver (check nvidia-smi), or install a TensorRT for the CUDA version that nvidia-smi shows",
    ),
    (
        r"no CUDA-capable device|initialization failure with error: (?:100|3|999)\b|cudaError 100\b",
        "there is no working NVIDIA GPU",
        "check nvidia-smi; without a GPU use --backend onnxruntime",
    ),
    (
        OUT_OF_MEMORY,
        "the GPU has too little free memory",
        "end other programs on the GPU, or build for smaller sizes: sdtrt build with a lower --batch or --height",
    ),
    (
        r"[Hh]ost ?[Cc]ode|lean runtime",
        "it brings its own runtime (version-compatible), which was not allowed",
        "open it from the engine directory it was built in",
    ),
    (
        r"magic ?[Tt]ag|Serialization assertion|stdArchiveReader|corrupt|checksum|plan header|Unexpected end",
        "the file is damaged or no plan of this TensorRT",
        REBUILD,
    ),
    (
        NO_KERNEL,
        "no kernel fits the node {0}",
        "raise --workspace-gib, use --optimization-level 3, or try another --precision",
    ),
)


def explain(
    library: Library,
    errors: Sequence[str],
    what: str,
    kind: type[EngineError] | type[BuildError] = EngineError,
    header: PlanHeader | None = None,
) -> EngineError | BuildError:
    """The error for what TensorRT has just reported.

    Args:
        errors: its messages, oldest first.
        what: what failed.
        kind: the exception to make.
        header: of the plan that was loaded.
    """
    said = f" (TensorRT: {errors[-1].strip()[:300]})" if errors else ""
    if header is not None and _is_of_another_version(library, header):
        ours, theirs = (".".join(map(str, version)) for version in (library.version, header.version))
        return kind(f"{what}: it was built by TensorRT {theirs}, and this is {ours}{said}", hint=REBUILD)
    text = "\n".join(errors)
    for pattern, cause, hint in CAUSES:
        if match := re.search(pattern, text, re.DOTALL):
            if pattern in (OUT_OF_MEMORY, NO_KERNEL):
                kind = SHORTAGES.get(kind, kind)
            return kind(f"{what}: {cause.format(*match.groups())}{said}", hint=hint)
    last = "; ".join(error.strip()[:300] for error in errors[-3:]) or f"{library.name} gave no reason"
    return kind(f"{what}: {last}", hint="read TensorRT's log, named above" if kind is BuildError else REBUILD)

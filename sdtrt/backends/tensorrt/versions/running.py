"""Plan → engine → execution context → run; and what the engine inspector tells."""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrt.backends.tensorrt.versions.header import PlanHeader, is_of_another_version, read_header
from sdtrt.backends.tensorrt.versions.libraries import Library, Shape, ShapeRange, dtype_name, require_gpu
from sdtrt.backends.tensorrt.versions.messages import REBUILD, explain
from sdtrt.common.errors import EngineError


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
    if not allow_host_code and is_of_another_version(library, header):  # 8.6 reads such a plan and may go wrong later
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

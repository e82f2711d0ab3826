"""ONNX Runtime as the judge of graphs: exports and new engines are held against it. It needs no onnx package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.common.errors import EngineError
from sdtrt.common.files import RAISE_LIMITS
from sdtrt.engines.entry import verification_of

if TYPE_CHECKING:
    import torch

LOG_SEVERITY = 4  # fatal only: errors are raised as well, and would reach the user twice

# How ONNX Runtime says that memory is short: its arena, C++'s own allocator, and sizes that no 64-bit number counts.
OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation", "SafeIntOnOverflow")
# ... and that there is no thread or file to spare.
OUT_OF_LIMITS = ("pthread_create", "Resource temporarily unavailable", "Too many open files", "thread constructor")


def open_model(model: Path, *, as_it_is: bool, threads: int = 0, arena: bool = True) -> Any:
    """ONNX Runtime's own session of a file, on its CPU provider; it logs nothing that it raises.

    Args:
        as_it_is: run the graph with no optimisation.
        threads: for one operator; 0 for ONNX Runtime's own choice.
        arena: keep the memory of one run for the next one.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    if as_it_is:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    # Waiting threads that spin take the cores from what PyTorch computes between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of ONNX Runtime's means too little memory; it has no type of its own for that."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def load_model(model: Path, *, as_it_is: bool, threads: int) -> Any:
    """`open_model`, with errors of ours.

    Raises:
        EngineError: when ONNX Runtime can't load the file, or there is too little memory for it.
    """
    try:
        return open_model(model, as_it_is=as_it_is, threads=threads)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if is_out_of_memory(error):
            raise EngineError(
                f"too little memory to load {model}", hint="end other programs, or use --precision fp16"
            ) from error
        raise EngineError(f"ONNX Runtime can't load {model}: {error}", hint=mend_of(error, model)) from error


def run_model(
    session: Any, model: Path, feeds: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Run ONNX Runtime's session of a file on CPU tensors; returns the outputs of these names, new tensors.

    Raises:
        EngineError: for a model that fails.
        MemoryError: where it needs more memory than there is.
    """
    import torch

    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in feeds.items()}
    try:
        results = session.run(list(names), arrays)
    except Exception as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        if is_out_of_memory(error):
            raise MemoryError(f"ONNX Runtime has too little memory at {shapes}") from error
        raise EngineError(f"ONNX Runtime failed at {shapes}: {error}", hint=mend_of(error, model)) from error
    return {name: torch.from_numpy(array) for name, array in zip(names, results, strict=True)}


def mend_of(error: BaseException, model: Path) -> str:
    """What to do about an exception of ONNX Runtime's over a file of an entry.

    The file's content was proven before: it is not advised to remove it.
    """
    if any(text in str(error) for text in OUT_OF_LIMITS):
        return f"{RAISE_LIMITS}, or use fewer threads: OMP_NUM_THREADS=1"
    return f"use --backend torch; {verification_of(model.parent.parent)} says whether it is damaged"

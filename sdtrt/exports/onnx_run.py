"""ONNX Runtime as the judge of graphs: exports and new engines are held against it. It needs no onnx package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LOG_SEVERITY = 4  # fatal only: errors are raised as well, and would reach the user twice

# How ONNX Runtime says that memory is short: its arena, C++'s own allocator, and sizes that no 64-bit number counts.
OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation", "SafeIntOnOverflow")


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

"""ONNX → optimised ONNX Runtime model: the graph optimisations done once, saved, and checked against the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdtrt.components import Contract
from sdtrt.console import Console
from sdtrt.errors import BuildError, EngineError
from sdtrt.metrics import relative_l2
from sdtrt.parity import seeded_feeds
from sdtrt.runtime import ONNXRUNTIME_FILE
from sdtrt.runtime.onnxruntime import LOG_SEVERITY, OnnxRuntimeSession, is_out_of_memory, remove_command
from sdtrt.specs import Sizes

__all__ = ["optimize", "seeded_feeds"]

EXTERNAL_BYTES = 2**30  # protobuf holds 2 GiB; weights beyond half of that go to a file beside the graph
# Fusions reorder sums: fp32 results differ in the last bits, fp16 ones where ONNX Runtime keeps fp32 between casts.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}
CHECK_SIZES = Sizes(batch=2, height=128, width=128)
REPORT = "use --backend torch, and report this model and your onnxruntime version"


def optimize(source: Path, folder: Path, contract: Contract, console: Console) -> dict[str, Any]:
    """Write `folder/engine.onnx`, optimised for this machine's processor, and check it.

    Args:
        source: the exported ONNX model.
        folder: an entry's folder.
        contract: of the model.

    Returns:
        What was measured: `parity` with the relative L2 difference to the unoptimised model.

    Raises:
        BuildError: where ONNX Runtime can't optimise or run it, or the result differs from the original.
    """
    target = folder / ONNXRUNTIME_FILE
    try:
        with console.stage("optimising for ONNX Runtime"):
            _save_optimized(source, target)
            difference = _difference(source, target, contract)
    except MemoryError as error:
        raise BuildError(
            f"too little memory to optimise {source}", hint="end other programs, or use --precision fp16"
        ) from error
    except EngineError as error:  # its hint names the draft, which is gone by then
        raise BuildError(f"the optimised model can't be used: {error.message}", hint=REPORT) from error
    if not difference <= TOLERANCES[contract.precision]:
        raise BuildError(
            f"the optimised model differs from its ONNX: relative L2 {difference:.2e}",
            hint=REPORT,
        )
    return {"parity": {"relative_l2": difference}}


def _save_optimized(source: Path, target: Path) -> None:
    """Run ONNX Runtime's graph optimisations and save their result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    if sum(path.stat().st_size for path in source.parent.glob(f"{source.name}*")) > EXTERNAL_BYTES:
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, f"{target.name}.data")
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise BuildError(
            f"ONNX Runtime can't optimise {source}: {error}",
            hint=f"remove the export: {remove_command(source)}; the next build makes it again",
        ) from error


def _difference(source: Path, target: Path, contract: Contract) -> float:
    """The largest relative L2 difference between the original's and the optimised model's outputs, seeded inputs."""
    feeds = seeded_feeds(contract, CHECK_SIZES)
    results = []
    for path, optimized in ((source, False), (target, True)):
        with OnnxRuntimeSession(path, contract, optimized=optimized) as session:
            results.append(session.run(feeds))
    return max(
        relative_l2(results[1][name].numpy().astype(np.float64), results[0][name].numpy().astype(np.float64))
        for name in results[0]
    )

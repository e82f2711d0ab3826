"""ONNX → optimised ONNX Runtime model: attentions fused, graph optimisations done once, saved, and checked."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sdtrt.backends.checking import compare, measure_step, worst
from sdtrt.backends.onnxruntime.fused_attention import KEPT, fuse
from sdtrt.backends.onnxruntime.session import ONNXRUNTIME_FILE, OnnxRuntimeSession
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.onnx_run import LOG_SEVERITY, is_out_of_memory, mend_of
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Contract

MARGIN_BYTES = 2**20  # where not even so much can be written after a failure, the disk is taken to be its cause
EXTERNAL_BYTES = 2**30  # protobuf holds 2 GiB; weights beyond half of that go to a file beside the graph
# Fusions reorder sums: fp32 results differ in the last bits, fp16 ones where ONNX Runtime keeps fp32 between casts.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}
CHECK_SIZES = (Sizes(2, 128, 128), Sizes(3, 80, 96, tokens=154))  # what serves one batch and length may not serve all
REPORT = "use --backend torch, and report this model and your onnxruntime version"


def optimize(source: Path, folder: Path, contract: Contract, console: Console) -> dict[str, Any]:
    """Write `folder/engine.onnx`, optimised for this machine's processor, and check it.

    Args:
        source: the exported ONNX model.
        folder: an entry's folder.
        contract: of the model.

    Returns:
        What was measured: `parity` with the relative L2 difference to the model as it was exported, how many of its
        attentions are one operator, `fused_attentions`, and `step_ms` at the size of the check, `step_sizes`.

    Raises:
        BuildError: where ONNX Runtime can't optimise or run it, or the result differs from the original.
        OSError: where the disk is full.
    """
    try:
        with console.stage("optimising for ONNX Runtime"):
            return _optimize(source, folder, contract, console)
    except MemoryError as error:
        raise BuildError(
            f"too little memory to optimise {source}", hint="end other programs, or use --precision fp16"
        ) from error
    except EngineError as error:  # its hint names the draft, which is gone by then
        raise BuildError(f"the optimised model can't be used: {error.message}", hint=REPORT) from error


def _optimize(source: Path, folder: Path, contract: Contract, console: Console) -> dict[str, Any]:
    """Optimise a model with its attentions fused; as it was exported, where that fails or differs, which is said."""
    allowed = TOLERANCES[contract.precision]
    with tempfile.TemporaryDirectory(prefix=".fused-", dir=folder) as place:
        model, count = fuse(source, Path(place), EXTERNAL_BYTES, console)
        try:
            difference, step = _write(model, source, folder, contract)
            said = f"the model differs, relative L2 {difference:.2e}"
        except (BuildError, EngineError) as error:  # too little memory or disk is another error, and may pass
            if count == 0:
                raise
            difference, step, said = math.inf, {}, f"it fails: {error.message}"
    if count and not difference <= allowed:
        console.warn(f"attention {KEPT}: with ONNX Runtime's own operator {said}")
        count, (difference, step) = 0, _write(source, source, folder, contract)
    if not difference <= allowed:
        raise BuildError(f"the optimised model differs from its ONNX: relative L2 {difference:.2e}", hint=REPORT)
    fused = {"fused_attentions": count} if count else {}
    return {"parity": {"relative_l2": difference}, **fused, **step}


def _write(model: Path, source: Path, folder: Path, contract: Contract) -> tuple[float, dict[str, Any]]:
    """Write a model, optimised, into a folder; how much the result differs from `source`, and how fast it is.

    Raises:
        OSError: on a full disk.
    """
    target = folder / ONNXRUNTIME_FILE
    for file in _files(target):
        file.unlink()  # of an attempt before this one
    try:
        _save_optimized(model, target, source)
        return _difference(source, target, contract)
    except (BuildError, EngineError):
        _require_room(target, _size_of(model))
        raise


def _files(model: Path) -> list[Path]:
    """A model's file, and that of its weights where they are apart."""
    return sorted(model.parent.glob(f"{model.name}*"))


def _size_of(model: Path) -> int:
    """Bytes of a model, weights included."""
    return sum(file.stat().st_size for file in _files(model))


def _require_room(target: Path, size_bytes: int) -> None:
    """Raise `OSError` where what has failed may be for want of room: ONNX Runtime doesn't tell that of other failures.

    It leaves what it has written of `target`, so writing on from there fails where it failed (a quota's end, too).
    """
    if shutil.disk_usage(target.parent).free < size_bytes - _size_of(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    largest = max(_files(target), key=lambda file: file.stat().st_size, default=target)
    with largest.open("ab") as file:
        file.write(bytes(MARGIN_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _save_optimized(model: Path, target: Path, source: Path) -> None:
    """Run ONNX Runtime's graph optimisations and save their result; `source` is the export that the model is of."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    if _size_of(model) > EXTERNAL_BYTES:
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, f"{target.name}.data")
    try:
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise BuildError(f"ONNX Runtime can't optimise {source}: {error}", hint=mend_of(error, source)) from error


def _difference(source: Path, target: Path, contract: Contract) -> tuple[float, dict[str, Any]]:
    """The largest relative L2 difference between the original's and the optimised model's outputs, seeded inputs; and
    how long a run of the optimised one takes (`measure_step`).
    """
    given = [seeded_feeds(contract, sizes) for sizes in CHECK_SIZES]
    with OnnxRuntimeSession(source, contract, optimized=False) as session:
        wanted = [session.run(feeds) for feeds in given]
    with OnnxRuntimeSession(target, contract, optimized=True) as session:
        results = [session.run(feeds) for feeds in given]
        step = measure_step(contract, session, CHECK_SIZES[0])
    return worst(compare(found, expected)["relative_l2"] for expected, found in zip(wanted, results, strict=True)), step

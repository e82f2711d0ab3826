"""ONNX → optimised ONNX Runtime model: the graph optimisations done once, saved, and checked against the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdtrt.components import Contract, dimension_values
from sdtrt.console import Console
from sdtrt.errors import BuildError
from sdtrt.metrics import relative_l2
from sdtrt.runtime import ONNXRUNTIME_FILE
from sdtrt.runtime.onnxruntime import OnnxRuntimeSession
from sdtrt.specs import Sizes

EXTERNAL_BYTES = 2**30  # protobuf holds 2 GiB; weights beyond half of that go to a file beside the graph
# Fusions reorder sums: fp32 results differ in the last bits, fp16 ones where ONNX Runtime keeps fp32 between casts.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}
CHECK_SIZES = Sizes(batch=2, height=128, width=128)


def optimize(source: Path, folder: Path, contract: Contract, console: Console) -> dict[str, Any]:
    """Write `folder/engine.onnx`, optimised for this machine's processor, and check it.

    Args:
        source: the exported ONNX model.
        folder: an entry's folder.
        contract: of the model.

    Returns:
        What was measured: `parity` with the relative L2 difference to the unoptimised model.

    Raises:
        BuildError: where ONNX Runtime can't optimise it, or the result differs from the original.
    """
    target = folder / ONNXRUNTIME_FILE
    with console.stage("optimising for ONNX Runtime"):
        _save_optimized(source, target)
        difference = _difference(source, target, contract)
    if not difference <= TOLERANCES[contract.precision]:
        raise BuildError(
            f"the optimised model differs from its ONNX: relative L2 {difference:.2e}",
            hint="use --backend torch, and report this model and your onnxruntime version",
        )
    return {"parity": {"relative_l2": difference}}


def _save_optimized(source: Path, target: Path) -> None:
    """Run ONNX Runtime's graph optimisations and save their result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    if sum(path.stat().st_size for path in source.parent.glob(f"{source.name}*")) > EXTERNAL_BYTES:
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, f"{target.name}.data")
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise BuildError(
            f"ONNX Runtime can't optimise {source}: {error}", hint="export it again: sdtrt export --force"
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


def seeded_feeds(contract: Contract, sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Plausible inputs for one run, the same for the same seed: noise, timesteps spread over 0 to 999."""
    generator = torch.Generator().manual_seed(seed)
    values = dimension_values(sizes)
    feeds = {}
    for spec in contract.inputs:
        data = torch.randn(spec.shape(values), generator=generator)
        if spec.name == "timestep":
            data = torch.linspace(999, 1, sizes.batch)
        feeds[spec.name] = data.to(getattr(torch, spec.dtype))
    return feeds

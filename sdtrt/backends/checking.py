"""A new engine held against a reference: run once on seeded inputs, and compared.

It knows sessions and contracts. What the reference is, and how much is allowed, each backend says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdtrt.backends.session import Session
from sdtrt.common.errors import BuildError
from sdtrt.common.metrics import cosine, max_abs, relative_l2
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Contract

if TYPE_CHECKING:
    import torch

TIMED_RUNS, TIMED_SECONDS = 20, 5.0  # at most, of the runs that a step's time is the median of
FIRST_RUNS = 3  # on a GPU they load kernels and capture a graph

Compute = Callable[[Mapping[str, "torch.Tensor"]], Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Reference:
    """What an engine must compute.

    Args:
        name: of what computes it, as errors call it: `its ONNX`.
        compute: inputs → outputs, both on the CPU.
        allowed: the largest relative L2 error of any output.
        hint: what may help where it is larger.
    """

    name: str
    compute: Compute
    allowed: float
    hint: str


def run_once(
    contract: Contract, session: Session[torch.Tensor], sizes: Sizes, reference: Reference | None
) -> dict[str, Any]:
    """Run an engine on seeded inputs, and compare its outputs with the reference's.

    Args:
        reference: None where there is nothing to compare with: the outputs must be finite then.

    Returns:
        The `sizes`, and the figures of the comparison.

    Raises:
        BuildError: where an output is not finite, or too far off.
    """
    from sdtrt.exports.feeds import seeded_feeds

    feeds = seeded_feeds(contract, sizes)
    outputs = {name: tensor.cpu() for name, tensor in session.run(feeds).items()}
    for name, tensor in outputs.items():
        if not bool(tensor.isfinite().all()):
            raise BuildError(
                f"the engine's {name} has values that are not finite at {sizes}", hint="use --precision fp32"
            )
    if reference is None:
        return {"sizes": str(sizes)}
    figures = compare(outputs, reference.compute(feeds))
    check_parity(figures, reference)
    return {"sizes": str(sizes), **figures}


def compare(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The worst figures over all outputs; NaN, where one is."""
    pairs = [(found[name].float().numpy(), expected[name].float().numpy()) for name in expected]
    return {
        "relative_l2": worst(relative_l2(*pair) for pair in pairs),
        "cosine": float(np.min([cosine(*pair) for pair in pairs])),
        "max_abs": worst(max_abs(*pair) for pair in pairs),
    }


def worst(errors: Iterable[float]) -> float:
    """The largest of some errors; NaN, where one is."""
    return float(np.max(list(errors)))


def check_parity(figures: Mapping[str, float], reference: Reference) -> None:
    """Raise `BuildError` for an engine that computes something else than its reference."""
    if not figures["relative_l2"] <= reference.allowed:  # also where it is not a number
        raise BuildError(
            f"the engine differs from {reference.name}: relative L2 error {figures['relative_l2']:.2e},"
            f" {reference.allowed} is allowed",
            hint=reference.hint,
        )


def measure_step(contract: Contract, session: Session[torch.Tensor], sizes: Sizes) -> dict[str, Any]:
    """How long a run of an engine takes that has run before: the median of some, on seeded inputs.

    Returns:
        `step_ms`, and the size that it is of: `step_sizes`. Times of different sizes can't be compared.
    """
    import torch

    from sdtrt.exports.feeds import seeded_feeds

    begin, times = time.perf_counter(), list[float]()
    device = next(iter(session.run(seeded_feeds(contract, sizes)).values())).device
    feeds = {name: tensor.to(device) for name, tensor in seeded_feeds(contract, sizes).items()}
    on_gpu = device.type == "cuda"
    for number in range(TIMED_RUNS + FIRST_RUNS):
        start = time.perf_counter()
        session.run(feeds)
        if on_gpu:
            torch.cuda.synchronize(device)
        if number >= FIRST_RUNS or not on_gpu:
            times.append(time.perf_counter() - start)
        if times and time.perf_counter() - begin > TIMED_SECONDS:
            break
    return {"step_ms": round(1000 * statistics.median(times), 4), "step_sizes": str(sizes)}

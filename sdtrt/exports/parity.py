"""Whether an ONNX graph computes what the PyTorch module computes: ONNX Runtime against PyTorch in fp32."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import ExportError, first_line
from sdtrt.common.metrics import cosine, max_abs, relative_l2
from sdtrt.exports import onnx_file
from sdtrt.exports.computed import computed
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.onnx_run import open_model
from sdtrt.specs import QUANTISED, Precision, Sizes
from sdtrt.specs.contract import Contract

# Sides in latents: 16×16 (even at every level), 9×13 (odd at every level), 10×12 (even, then odd), 17×18, 24×11.
# Small ones, so that a UNet of 860 M parameters takes seconds: what goes wrong with sizes goes wrong with these. But
# none that ends in 1×1 pixels, where a group of two channels is normalised by the difference of two numbers.
CHECK_SIZES = (
    Sizes(1, 128, 128),
    Sizes(2, 72, 104),
    Sizes(5, 80, 96, tokens=154),
    Sizes(1, 136, 144),
    Sizes(2, 192, 88, tokens=231),
)

# Largest relative L2 error. Measured on small random UNets of each kind: fp32 1e-6 (the order of summation); fp16 7e-4,
# where PyTorch in fp16 itself is 1.5e-3 from fp32; bf16, checked in fp32 (see `check_onnx`), 1e-4 (rounded constants).
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-3}
# What 8 bits cost, on seeded numbers that no picture has. Measured: int8 0.016 to 0.035, fp8 0.046 to 0.091.
QUANTISED_TOLERANCES: dict[Precision, float] = {"int8": 0.1, "fp8": 0.2}
IN_BF16: tuple[Precision, ...] = ("bf16", *QUANTISED)  # what ONNX Runtime has on no CPU

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SizeParity:
    """How far graph and module are apart at one size."""

    sizes: Sizes
    relative_l2: float
    cosine: float
    max_abs: float


@dataclass(frozen=True)
class ParityReport:
    """What was checked, and how it came out.

    Args:
        tolerance: largest relative L2 error that passes.
        computed_in: the precision that ONNX Runtime ran the graph in.
        seconds: that the whole check took.
    """

    checks: tuple[SizeParity, ...]
    tolerance: float
    computed_in: Precision
    seconds: float

    @property
    def worst(self) -> SizeParity:
        """The size with the largest error."""
        return max(self.checks, key=lambda check: check.relative_l2)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for sidecars."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{len(self.checks)} sizes, relative L2 error at most {self.worst.relative_l2:.1e} "
            f"(allowed {self.tolerance:.0e}; at {self.worst.sizes})"
        )


def check_onnx(
    path: Path,
    module: torch.nn.Module,
    contract: Contract,
    sizes: Sequence[Sizes] = CHECK_SIZES,
    console: Console = QUIET,
) -> ParityReport:
    """Hold an ONNX file against the format's rules, then against the module at several sizes.

    The reference is PyTorch in fp32 with the module's own (rounded) weights and inputs, so that the error is that of
    the graph and its arithmetic alone. ONNX Runtime has no bf16 on CPUs: a bf16 graph runs in fp32, which proves the
    graph but not its rounding.

    Args:
        module: what the file was made from, on the CPU; in fp32 meanwhile, and afterwards what it was.
        sizes: to check at; those that are the same to this component count once.

    Raises:
        ExportError: the file is no valid ONNX, a result is not finite, or too far off.
    """
    start = time.perf_counter()
    sizes = list({str(contract.input_shapes(size)): size for size in reversed(sizes)}.values())[::-1]
    with console.stage(f"checking {contract.component} against PyTorch at {len(sizes)} sizes"):
        _check_format(path, contract)
        inputs = [seeded_feeds(contract, size, seed) for seed, size in enumerate(sizes)]
        expected = _reference(module, contract, inputs)
        with runnable(path, contract) as (graph, dtypes):
            session = _open(graph)
            checks = tuple(
                _compare(_run(session, arrays, dtypes), wanted, size)
                for arrays, wanted, size in zip(inputs, expected, sizes, strict=True)
            )
    computed_in: Precision = "fp32" if contract.precision in IN_BF16 else contract.precision
    seconds = round(time.perf_counter() - start, 3)
    tolerance = (TOLERANCES | QUANTISED_TOLERANCES)[contract.precision]
    report = ParityReport(checks, tolerance, computed_in, seconds)
    _judge(report, contract)
    console.note(f"parity: {report}")
    return report


def _check_format(path: Path, contract: Contract) -> None:
    """onnx.checker, by path: it then reads models beyond protobuf's 2 GiB too.

    With all types and shapes but for bf16, which ONNX's convolutions don't have before opset 22.
    """
    try:
        onnx.checker.check_model(str(path), full_check=contract.precision not in IN_BF16)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is not valid ONNX: {first_line(error)[:300]}",
            hint="try the other exporter: --exporter torchscript or --exporter dynamo",
        ) from error


def _reference(
    module: torch.nn.Module, contract: Contract, inputs: Sequence[dict[str, torch.Tensor]]
) -> list[list[Array]]:
    """The module's own results in fp32: for each of the inputs, all outputs."""
    dtype = next(module.parameters()).dtype
    # Exact, and so is the way back: every fp16 and bf16 number is an fp32 number. (diffusers' own `to` warns.)
    torch.nn.Module.to(module, torch.float32)
    try:
        results = [computed(module, contract, tensors) for tensors in inputs]
    finally:
        torch.nn.Module.to(module, dtype)
    outputs = [[tensor.numpy() for tensor in found.values()] for found in results]
    if not all(np.isfinite(output).all() for found in outputs for output in found):
        raise ExportError(
            f"the model's own {contract.component} gives infinite or NaN values in fp32, before any export",
            hint="its weights are damaged: download the model again",
        )
    return outputs


@contextmanager
def runnable(path: Path, contract: Contract) -> Iterator[tuple[Path, dict[str, str]]]:
    """A graph that ONNX Runtime runs on CPUs, and its inputs' dtypes: the graph itself, or fp32 in bf16's place."""
    dtypes = {spec.name: spec.dtype for spec in contract.inputs}
    if contract.precision not in IN_BF16:
        yield path, dtypes
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / path.name
        model, weights = onnx_file.load_split(path)
        onnx_file.widen_bfloat16(model, weights)
        onnx_file.save(model, weights, copy)
        yield copy, {name: "float32" if dtype == "bfloat16" else dtype for name, dtype in dtypes.items()}


def _open(path: Path) -> Any:
    """An ONNX Runtime session that runs the graph as it is (and holds no widened copy of its weights)."""
    try:
        return open_model(path, as_it_is=True, arena=False)
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime can't load the exported graph: {first_line(error)[:300]}",
            hint="try the other exporter: --exporter torchscript or --exporter dynamo",
        ) from error


def _run(session: Any, tensors: dict[str, torch.Tensor], dtypes: dict[str, str]) -> list[Array]:
    arrays = {name: tensor.to(getattr(torch, dtypes[name])).numpy() for name, tensor in tensors.items()}
    try:
        outputs: list[Array] = session.run(None, arrays)
    except Exception as error:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ExportError(
            f"ONNX Runtime can't run the exported graph on {shapes}: {first_line(error)[:300]}",
            hint="try the other exporter: --exporter torchscript or --exporter dynamo",
        ) from error
    return outputs


def _compare(actual: Sequence[Array], expected: Sequence[Array], sizes: Sizes) -> SizeParity:
    """The worst figures of all outputs."""
    shapes, wanted = ([array.shape for array in arrays] for arrays in (actual, expected))
    if shapes != wanted:
        raise ExportError(
            f"the exported graph gives {shapes} at {sizes}, PyTorch {wanted}",
            hint="try the other exporter: --exporter torchscript or --exporter dynamo",
        )
    pairs = list(zip(actual, expected, strict=True))
    return SizeParity(
        sizes,
        # NaN, which `max` may pass over, is what this looks for
        float(np.max([relative_l2(*pair) for pair in pairs])),
        float(np.min([cosine(*pair) for pair in pairs])),
        float(np.max([max_abs(*pair) for pair in pairs])),
    )


def _judge(report: ParityReport, contract: Contract) -> None:
    """Raise unless every size is finite and close enough."""
    for check in report.checks:
        if not np.isfinite(check.relative_l2):
            raise ExportError(
                f"the {contract.precision} graph gives infinite or NaN values at {check.sizes}",
                hint="this model overflows in fp16: use --precision bf16 on a GPU, or --precision fp32"
                if contract.precision == "fp16"
                else "try the other exporter: --exporter torchscript or --exporter dynamo",
            )
    if report.worst.relative_l2 > report.tolerance:
        raise ExportError(
            f"the exported {contract.precision} graph is off by {report.worst.relative_l2:.1e} (relative L2 error, "
            f"at most {report.tolerance:.0e} is right) at {report.worst.sizes}",
            hint="use --precision fp16, or scale it by more pictures: --calibration-prompt TEXT"
            if contract.precision in QUANTISED
            else "try the other exporter, --exporter torchscript or --exporter dynamo, or --precision fp32",
        )

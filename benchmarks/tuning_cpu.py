"""What makes a step of the UNet faster with ONNX Runtime on a CPU, and what does not: one choice at a time.

    python benchmarks/tuning_cpu.py --output benchmarks/tuning-cpu.json
    python benchmarks/tuning_cpu.py --model sd15 --height 512 --width 512 --repeats 3 --variants torch product \\
        spelled-out --output benchmarks/tuning-cpu-sd15.json

Every measurement is a process of its own, which runs what `--folder` has and says its peak memory; the variants take
turns, so that what else the machine does meets them all. Results and what follows from them: `tuning.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from sdtrt.backends.onnxruntime import build
from sdtrt.backends.onnxruntime.session import ONNXRUNTIME_FILE, OnnxRuntimeSession
from sdtrt.backends.tensorrt86.cut import freeze
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.metrics import relative_l2
from sdtrt.exports import onnx_file
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import UNetCall
from sdtrt.models.components import contract_of, load_component
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.meters import Timing, process_peak_bytes, reset_process_peak, time_calls
from sdtrt.specs import DEFAULT_OPSETS, Exporter, ModelSpec, Sizes
from sdtrt.specs.contract import Contract

CPU = torch.device("cpu")
TORCH = "torch"
EXPECTED = "expected.pt"


@dataclass(frozen=True)
class Choice:
    """One variant.

    Args:
        exporter, opset: that write the ONNX.
        fused: attentions are one operator each.
        fixed: all sizes are fixed ahead of the optimisation.
        optimized: by ONNX Runtime, in advance.
    """

    exporter: Exporter = "torchscript"
    opset: int = DEFAULT_OPSETS["torchscript"]
    fused: bool = True
    fixed: bool = False
    optimized: bool = True


VARIANTS: dict[str, Choice] = {
    "product": Choice(),
    "spelled-out": Choice(fused=False),
    "fixed-sizes": Choice(fixed=True),
    "as-exported": Choice(fused=False, optimized=False),
    **{f"opset-{opset}": Choice(opset=opset) for opset in (14, 16, 20)},
    **{f"dynamo-{opset}": Choice("dynamo", opset) for opset in (18, 21, 23)},
}


def prepare(name: str, module: torch.nn.Module, contract: Contract, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Export and build a variant into its folder; what the build measured."""
    choice = VARIANTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "model.onnx"
    write_onnx(module, contract, source, exporter=choice.exporter, opset=choice.opset, console=Console())
    if choice.fixed:
        model, weights = onnx_file.load_split(source)
        freeze(model, weights, contract.input_shapes(sizes))
        source = folder / "fixed.onnx"
        onnx_file.save(model, weights, source)
    if not choice.optimized:
        source.rename(folder / ONNXRUNTIME_FILE)
        return {}
    with patch.object(build, "CHECK_SIZES", (sizes,) if choice.fixed else build.CHECK_SIZES), _fusing(choice.fused):
        return build.optimize(source, folder, contract, Console())


@contextmanager
def _fusing(wanted: bool) -> Iterator[None]:
    """Leave attentions as they are, where that is not wanted."""
    if wanted:
        yield
        return
    with patch.object(build, "fuse", lambda source, *_: (source, 0)):
        yield


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run what is in a folder: seconds of each call, peak memory, error against PyTorch."""
    model = resolve_model(ModelSpec(str(args.model)))
    contract, sizes = contract_of(model, "unet", "fp32"), Sizes(2, args.height, args.width)
    feeds = seeded_feeds(contract, sizes)
    reset_process_peak()
    if name == TORCH:
        return _timed(torch_call(load_component(model, "unet", torch.float32), feeds), args)
    with OnnxRuntimeSession(args.folder / name / ONNXRUNTIME_FILE, contract) as session:
        return _timed(lambda: session.run(feeds)["out_sample"], args)


def torch_call(module: torch.nn.Module, feeds: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """One step by PyTorch."""
    unet = UNetCall(module)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            output: torch.Tensor = unet(*feeds.values())
        return output

    return call


def _timed(call: Callable[[], torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """What one process measures."""
    for _ in range(args.warmups):
        given = call()
    samples = time_calls(call, args.repeats, CPU).samples
    expected = torch.load(args.folder / EXPECTED, weights_only=True)
    error = relative_l2(given.numpy(), expected.numpy())
    return {"samples": list(samples), "peak_bytes": process_peak_bytes(), "relative_l2": error}


def in_a_process(name: str) -> dict[str, Any]:
    """What a process of its own measures of a variant."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


def row_of(name: str, runs: Sequence[dict[str, Any]], built: dict[str, Any]) -> dict[str, Any]:
    """All that is known of a variant; samples by rounds."""
    timing = Timing(tuple(sample * 1000 for run in runs for sample in run["samples"]))
    return {
        "variant": name,
        "step_ms": timing.to_json(),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "relative_l2": runs[0]["relative_l2"],
        "build": built,
    }


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows: build all, then measure them in turn."""
    model = resolve_model(ModelSpec(str(args.model)))
    contract, sizes = contract_of(model, "unet", "fp32"), Sizes(2, args.height, args.width)
    module = load_component(model, "unet", torch.float32)
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch_call(module, seeded_feeds(contract, sizes))(), args.folder / EXPECTED)
    built: dict[str, Any] = {TORCH: {}}
    for name in args.variants:
        if name != TORCH:
            built[name] = prepare(name, module, contract, sizes, args.folder / name)
    del module
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.variants}
    for _ in range(args.rounds):
        for name in args.variants:
            runs[name].append(in_a_process(name))
    return [row_of(name, runs[name], built[name]) for name in args.variants]


def main() -> None:
    """Measure, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [TORCH, *VARIANTS]
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where graphs and engines go, kept; else a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    command = shlex.join(["python", *sys.argv])
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            args.folder = Path(temporary)
            sys.argv += ["--folder", temporary]
        rows = compare(args)
    report = {"command": command, "host": host.facts(), "versions": host.library_versions(), "rows": rows}
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

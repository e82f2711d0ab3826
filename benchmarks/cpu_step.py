"""Time one exported part in an engine of the backend openvino, beside OpenVINO's own API on the same ONNX.

    sdtrt export --model FOLDER --component unet --precision bf16 --output unet.onnx
    python benchmarks/cpu_step.py unet.onnx --batch 1 --output unet.json

Runs of both take turns, so that whatever else the machine does meets both; the least time of each counts. OpenVINO's
own is what its documentation begins with: `compile_model(model, "CPU")` of the ONNX with fixed sizes. On a processor
with bf16 that computes in bf16 unless told otherwise, so `--own f32` tells it for an ONNX in fp32.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from sdtrt.backends.checking import compare
from sdtrt.backends.openvino import build, library
from sdtrt.backends.openvino.session import OPENVINO_FILE, OpenVinoSession
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.specs import Profile, Sizes
from sdtrt.specs.contract import Contract

Run = Callable[[], object]


def contract_of(path: Path) -> Contract:
    """What the export says of itself."""
    model = onnx.load(path, load_external_data=False)
    return Contract.from_json(json.loads(next(p.value for p in model.metadata_props if p.key == "sdtrt.contract")))


def own_run(path: Path, feeds: Mapping[str, torch.Tensor], hint: str | None) -> Run:
    """A run of OpenVINO's own API at the size of the inputs."""
    openvino, core = library.load(), library.core()
    model = core.read_model(str(path))
    names = {port: next(name for name in feeds if name in port.names) for port in model.inputs}
    model.reshape({port: list(feeds[name].shape) for port, name in names.items()})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint} if hint else {})
    request = compiled.create_infer_request()
    given = {port: _tensor(openvino, feeds[name]) for port, name in names.items()}
    return lambda: request.infer({index: given[port] for index, port in enumerate(names)})


def _tensor(openvino: Any, tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return openvino.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy())


def take_turns(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each, one after the other; a first one of each is not counted."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(round(time.perf_counter() - begin, 4))
    return times


def resident_gib() -> dict[str, float]:
    """What this process holds: memory of its own, and pages of mapped files, which the system may take back."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {name: round(int(value.split()[0]) / 2**20, 3) for name, value in found.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build, open, and let both take turns."""
    contract, sizes = contract_of(args.onnx), Sizes(args.batch, args.height, args.width)
    feeds, load = seeded_feeds(contract, sizes), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.onnx.parent) as folder:
        target = Path(folder) / OPENVINO_FILE
        begin = time.perf_counter()
        build.compile_model(args.onnx, target, contract, Profile.of(sizes))
        compiled, before = time.perf_counter() - begin, resident_gib()
        begin = time.perf_counter()
        with OpenVinoSession(target, contract) as session:
            opened, held = time.perf_counter() - begin, resident_gib()
            runs: dict[str, Run] = {"sdtrt": lambda: session.run(feeds)}
            if args.own != "none":
                runs["openvino"] = own_run(args.onnx, feeds, None if args.own == "default" else args.own)
            times = take_turns(runs, args.repeats)
            figures = _errors(session.run(feeds), args.reference)
    return {
        "component": contract.component,
        "precision": contract.precision,
        "sizes": str(sizes),
        "seconds": times,
        "least": {name: min(own) for name, own in times.items()},
        "median": {name: statistics.median(own) for name, own in times.items()},
        "own_precision_hint": args.own,
        "compile_seconds": round(compiled, 2),
        "open_seconds": round(opened, 2),
        "resident_gib": {"before": before, "open": held},
        "errors": figures,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "torch_threads": torch.get_num_threads(),
        "host": host.facts(),
    }


def _errors(found: Mapping[str, torch.Tensor], reference: Path | None) -> dict[str, Any]:
    """How far the engine, and PyTorch's own bf16, are from PyTorch's fp32: as saved."""
    if reference is None:
        return {}
    saved: dict[str, torch.Tensor] = torch.load(reference, weights_only=True)
    name = next(iter(found))
    named = {"sdtrt": found[name].float(), "torch-bf16": saved["bf16"]}
    return {which: compare({name: tensor}, {name: saved["fp32"]}) for which, tensor in named.items()}


def main() -> None:
    """Measure, print the JSON, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--own", choices=["default", "f32", "bf16", "none"], default="default")
    parser.add_argument("--reference", type=Path, help="PyTorch's own outputs: {'fp32': tensor, 'bf16': tensor}")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=1)
    Console().note(f"measured {args.onnx}")
    print(text)
    if args.output is not None:
        args.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

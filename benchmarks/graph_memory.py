"""What a pipeline's engines take of a GPU's memory, beside what the check before opening counts (`pipeline.opening.memory`).

    python benchmarks/graph_memory.py --model sd15 --backend inductor --height 512 --width 512 --output memory.json

Three pictures of a few steps: in the second one each part has its CUDA graph, in the third one all are replayed.
`counted` is the check's: weights, an allowance, and intermediate results. `reserved` is what PyTorch has taken since
before the engines were opened, at its highest and at the end, with what it keeps for later; `allocated` what of that
was in use; `driver` what the driver says is gone, with the libraries' own; `closed` what stays when the engines are
closed. On a CPU there is nothing to see, and the check counts nothing.

`--pools both`, the default, measures twice, in a process each: with one pool of memory for all parts of the pipeline,
as it is (`shared`), and with one for each (`private`). Their pictures are compared by their digests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import sdtrt
from sdtrt.backends.inductor.backend import Inductor
from sdtrt.common import host
from sdtrt.pipeline.opening import opened
from sdtrt.pipeline.opening.memory import demand_of
from sdtrt.specs import Sizes


def taken() -> dict[str, int]:
    """Bytes of the GPU's memory that are in use now."""
    free, total = torch.cuda.mem_get_info()
    return {
        "reserved": torch.cuda.memory_reserved(),
        "allocated": torch.cuda.memory_allocated(),
        "driver": total - free,
    }


def since(before: dict[str, int]) -> dict[str, int]:
    """Bytes that are in use beyond those of before, and their highest since then."""
    torch.cuda.synchronize()
    found = {f"{name}_bytes": value - before[name] for name, value in taken().items()}
    peaks = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return found | {f"highest_{name}_bytes": value - before[name] for name, value in peaks.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Open the pipeline, and make three pictures."""
    if args.pools == "private":
        shared = Inductor.open
        setattr(Inductor, "open", lambda self, entry, device, scratch: shared(self, entry, device, None))  # noqa: B010
    on_gpu = torch.cuda.is_available()
    before: dict[str, int] = {}
    if on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = taken()
    pipe = sdtrt.load(args.model, height=args.height, width=args.width, backend=args.backend)
    found: dict[str, Any] = {"opened": since(before) if on_gpu else None}
    for number in (1, 2, 3):
        seed = torch.Generator().manual_seed(number)
        image = pipe("a red circle", num_inference_steps=args.steps, generator=seed).images[0]
        found[f"picture_{number}"] = since(before) if on_gpu else None
        found.setdefault("digests", []).append(hashlib.sha256(image.tobytes()).hexdigest())
    entries = opened.entries(pipe)
    demand = demand_of(entries, Sizes(2, args.height, args.width), 1)
    figures = ("plan_bytes", "scratch_bytes")
    found["engines"] = {name: {one: entry.info.get(one) for one in figures} for name, entry in entries.items()}
    found["counted"] = {"fixed_bytes": demand.fixed, "scratch_bytes": demand.scratch, "total_bytes": demand.total}
    if on_gpu:
        found["is_enough"] = found["picture_3"]["highest_reserved_bytes"] <= demand.total
    pipe.close()
    if on_gpu:
        torch.cuda.empty_cache()
        found["closed"] = since(before)
    return found


def measure_both() -> dict[str, Any]:
    """Measure with shared and with private pools, in a process each."""
    found: dict[str, Any] = {}
    for pools in ("shared", "private"):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "found.json"
            # The last of an option counts.
            subprocess.run([sys.executable, *sys.argv, "--pools", pools, "--output", output], check=True)
            found[pools] = json.loads(output.read_text())
    found["pictures_are_equal"] = found["shared"]["digests"] == found["private"]["digests"]
    return found


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pools", choices=("both", "shared", "private"), default="both")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = measure_both() if args.pools == "both" else {"host": host.facts(), **measure(args)}
    args.output.write_text(json.dumps({"command": sys.argv, **found}, indent=1) + "\n")
    for name in (
        "counted",
        "opened",
        "picture_1",
        "picture_2",
        "picture_3",
        "closed",
        "is_enough",
        "pictures_are_equal",
    ):
        if name in found:
            print(f"{args.pools} {name}: {found[name]}", file=sys.stderr)


if __name__ == "__main__":
    main()

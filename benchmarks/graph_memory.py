"""What a pipeline's engines take of a GPU's memory, beside what the check before opening counts (`pipeline.memory`).

    python benchmarks/graph_memory.py --model sd15 --backend inductor --height 512 --width 512 --output memory.json

Two pictures of a few steps: in the second one each part has its CUDA graph. `counted` is the check's: weights, an
allowance, and intermediate results. `reserved` is what PyTorch has taken since before the engines were opened, at its
highest and at the end, with what it keeps for later; `allocated` what of that was in use; `driver` what the driver says
is gone, with the libraries' own. On a CPU there is nothing to see, and the check counts nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import sdtrt
from sdtrt.common import host
from sdtrt.pipeline import opened
from sdtrt.pipeline.memory import demand_of
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
    """Open the pipeline, and make two pictures."""
    on_gpu = torch.cuda.is_available()
    before: dict[str, int] = {}
    if on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = taken()
    pipe = sdtrt.load(args.model, height=args.height, width=args.width, backend=args.backend)
    found: dict[str, Any] = {"opened": since(before) if on_gpu else None}
    for number in (1, 2):
        pipe("a red circle", num_inference_steps=args.steps, generator=torch.Generator().manual_seed(number))
        found[f"picture_{number}"] = since(before) if on_gpu else None
    entries = opened.entries(pipe)
    demand = demand_of(entries, Sizes(2, args.height, args.width), 1)
    figures = ("plan_bytes", "scratch_bytes")
    found["engines"] = {name: {one: entry.info.get(one) for one in figures} for name, entry in entries.items()}
    found["counted"] = {"fixed_bytes": demand.fixed, "scratch_bytes": demand.scratch, "total_bytes": demand.total}
    if on_gpu:
        found["is_enough"] = found["picture_2"]["highest_reserved_bytes"] <= demand.total
    pipe.close()
    return found


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = {"command": sys.argv, "host": host.facts(), **measure(args)}
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("counted", "opened", "picture_1", "picture_2", "is_enough"):
        print(f"{name}: {found.get(name)}", file=sys.stderr)


if __name__ == "__main__":
    main()

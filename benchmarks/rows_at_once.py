"""How far eager PyTorch's UNet is off when it computes many rows at once, beside the same rows in twos in fp32.

    python benchmarks/rows_at_once.py --model FOLDER --rows 8 --height 1024 --width 1024 --output rows.json

Each row has latents, states and a prompt of its own, which no other row should change. Prints the relative L2 error of
each row in fp32 (without TF32), and in fp16 with each way that PyTorch has of computing attention.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrt.backends.checking import compare
from sdtrt.common import host
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import reference
from sdtrt.models.components import contract_of, load_component
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.meters import tf32
from sdtrt.specs import ModelSpec, Sizes
from sdtrt.specs.contract import Contract

WAYS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
Tensors = dict[str, torch.Tensor]


def run(module: torch.nn.Module, contract: Contract, feeds: Tensors, dtype: torch.dtype, at_once: int) -> torch.Tensor:
    """The UNet's output, so many rows at once."""
    call, rows = reference(module.to(dtype), contract), len(feeds["sample"])
    parts = []
    for first in range(0, rows, at_once):
        some = (tensor[first : first + at_once] for tensor in feeds.values())
        with torch.inference_mode():
            found = call(*(one.to(dtype) if one.is_floating_point() else one for one in some))
        assert isinstance(found, torch.Tensor)
        parts.append(found.float().cpu())
    return torch.cat(parts)


def errors(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Each row's relative L2 error."""
    return [compare({"out": one}, {"out": other})["relative_l2"] for one, other in zip(found, expected, strict=True)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = resolve_model(ModelSpec(args.model))
    contract = contract_of(model, "unet", "fp32")
    module = load_component(model, "unet", torch.float32).to(device)
    sizes = Sizes(args.rows, args.height, args.width)
    feeds = {name: tensor.to(device) for name, tensor in seeded_feeds(contract, sizes).items()}
    with tf32(False):
        expected = run(module, contract, feeds, torch.float32, 2)
        found = {"fp32": errors(run(module, contract, feeds, torch.float32, args.rows), expected)}
        if device.type == "cpu":
            return found
        found["fp16_in_twos"] = errors(run(module, contract, feeds, torch.float16, 2), expected)
        for way in WAYS:
            with sdpa_kernel(way):
                found[f"fp16_{way.name.lower()}"] = errors(
                    run(module, contract, feeds, torch.float16, args.rows), expected
                )
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    sizes = {"rows": args.rows, "height": args.height, "width": args.width}
    found = {"host": host.facts(), "versions": host.library_versions(), **sizes, "relative_l2": measure(args)}
    text = json.dumps(found, indent=1)
    print(text)
    args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

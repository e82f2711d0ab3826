"""PyTorch's kernels for self-attentions that an engine in pieces leaves to it (`tensorrt86.pieces`), by themselves.

    python benchmarks/attention.py --output benchmarks/attention-h200.json

Microseconds of one attention, from a CUDA graph of many (on a CPU of a call), with queries, keys and values as one
tensor, as the product has them, and as three; relative L2 error against fp64; the GPU's kernels. Shapes are of Stable
Diffusion 1.5 at 512x512, and the first with its heads widened to what kernels like.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fidelity import errors, kernels
from torch.nn.attention import SDPBackend

from sdtrt.backends.tensorrt86 import torch_kernels
from sdtrt.common import host
from sdtrt.reports.meters import time_queued_calls
from sdtrt.specs.contract import Attention

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SHAPES = ((2, 8, 4096, 40), (2, 8, 4096, 64), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160))  # [B,heads,S,D]
CALLS = 20  # in a graph


def measure(shape: tuple[int, ...], kernel: str, joined: bool, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row; where the kernel does not serve a shape, its error."""
    batch, heads, tokens, width = shape
    names = ("qkv",) if joined else ("q", "k", "v")
    attention = Attention(names, "result", heads, width, width**-0.5)
    sizes = (batch, tokens, heads * width * (3 if joined else 1))
    tensors = {name: torch.randn(sizes, dtype=torch.float16, device=device) for name in names}
    row: dict[str, Any] = {"shape": shape, "kernel": kernel, "layout": "joined" if joined else "separate"}
    try:
        with torch.inference_mode(), patch.object(torch_kernels, "KERNELS", [KERNELS[kernel]]):
            states = torch_kernels.attend(attention, tensors)
            call, count = repeated(lambda: torch_kernels.attend(attention, tensors), device)
            call()
            found = time_queued_calls(call, repeats, device).scaled(1e6 / count).median
            work = kernels(call, 1) if device.type == "cuda" else []
        exact = torch_kernels.attend(attention, {name: tensor.double().cpu() for name, tensor in tensors.items()})
    except RuntimeError as error:
        return row | {"error": " ".join(str(error).split())[:300]}
    return row | {"us": found, "relative_l2": errors([states], [exact])["relative_l2"][0], "kernels": work}


def repeated(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """On a GPU a graph of many calls, and their number; on a CPU the call itself."""
    if device.type != "cuda":
        return call, 1
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    return graph.replay, CALLS


def main() -> None:
    """Measure, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["cudnn", "flash", "efficient"])
    parser.add_argument("--max-tokens", type=int, default=4096, help="leave larger shapes out")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [
        measure(shape, kernel, joined, device, args.repeats)
        for shape in SHAPES
        if shape[2] <= args.max_tokens
        for kernel in args.kernels
        for joined in (True, False)
    ]
    report = {"command": shlex.join(["python", *sys.argv]), "host": host.facts(), "versions": host.library_versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

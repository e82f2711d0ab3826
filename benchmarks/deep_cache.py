"""What deep caching saves and what it costs: a step whole and shallow at each depth, whole pictures, the pixel checker.

    python benchmarks/deep_cache.py --output benchmarks/deep-cache-cpu.json
    python benchmarks/deep_cache.py --model FOLDER --backend inductor --height 512 --width 512 --no-scores \\
        --folder /tmp/deep --output benchmarks/deep-cache-h200.json

Four parts, each left out by its `--no-…`: `work` counts the operations of a step of Stable Diffusion 1.5 and of XL,
with no weights; `eager` times PyTorch on the first one's UNet, with weights by chance, in fp32 on a CPU and in fp16 on
a GPU; `steps` builds and times a model's engines, and its pictures; `scores` has the pixel checker judge the built-in
model. The report is written after each row.
"""

from __future__ import annotations

import sdtrt  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdtrt.common import host
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import component_call
from sdtrt.pipeline.opening.opened import entries
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Contract, unet_contract
from sdtrt.specs.deep_features import shallow_groups, whole_group, with_deep_features

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from tiny_score import held_out_prompts, rates, score_prompts

SD15: dict[str, Any] = {"cross_attention_dim": 768}  # all else is the class's default
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ARCHITECTURES = {"sd15": (SD15, Sizes(2, 512, 512)), "sdxl": (SDXL, Sizes(2, 1024, 1024))}
CHOICES = ((1, None, "uniform"), *((interval, 1, "uniform") for interval in (2, 3, 5)), (3, 1, "middle"))


def main() -> None:
    """Run it all, and write the report after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=60, help="that are judged")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager-side", type=int, default=512, help="of the pictures of that part, in pixels")
    parser.add_argument("--folder", type=Path, help="where engines are kept; by default they are thrown away")
    parser.add_argument("--output", type=Path)
    for name in PARTS:
        parser.add_argument(f"--no-{name}", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
    report |= {"host": host.facts(), "versions": host.library_versions()}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or Path(folder)
        for name, part in PARTS.items():
            if getattr(args, f"no_{name}"):
                continue
            report[name] = []
            for row in part(args):
                report[name].append(row)
                print(json.dumps(row), file=sys.stderr)
                if args.output:  # whatever becomes of the next one
                    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def work(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The operations of a step, whole and shallow: of products and convolutions, a multiplication and a sum each."""
    for name, (config, sizes) in ARCHITECTURES.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config).eval()
        for depth, contract in programs(unet, "fp32", args.depths):
            feeds = {one: tensor.to("meta") for one, tensor in seeded_feeds(contract, sizes).items()}
            with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
                component_call(unet, contract)(*feeds.values())
            flops = counter.get_total_flops()
            yield {"architecture": name, "sizes": str(sizes), "depth": depth, "gflops": round(flops / 1e9, 1)}


def eager(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The time of a step in PyTorch, of weights by chance, and the processor's: that alone counts where others work."""
    device, precision, dtype = torch.device("cpu"), "fp32", torch.float32
    if torch.cuda.is_available():
        device, precision, dtype = torch.device("cuda"), "fp16", torch.float16
    config, sizes = ARCHITECTURES["sd15"]
    sizes = replace(sizes, height=args.eager_side, width=args.eager_side)
    unet = torch.nn.Module.to(UNet2DConditionModel(**config).eval(), device, dtype)
    for depth, contract in programs(unet, precision, args.depths):
        feeds = [tensor.to(device) for tensor in seeded_feeds(contract, sizes).values()]
        call, times, busy = component_call(unet, contract), [], []
        with torch.no_grad():
            for _ in range(1 + args.repeats):
                start, began = time.perf_counter(), time.process_time()
                call(*feeds)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                busy.append(time.process_time() - began)
        found: dict[str, Any] = {"architecture": "sd15", "sizes": str(sizes), "depth": depth, "precision": precision}
        found |= {"threads": torch.get_num_threads(), "processor_s": round(statistics.median(busy[1:]), 3)}
        yield {**found, "step_ms": round(1e3 * statistics.median(times[1:]), 2)}


def programs(unet: Any, precision: Any, depths: list[int]) -> Iterator[tuple[int | None, Contract]]:
    """The whole UNet's contract, whose depth is None, and that of its shallow program at each depth."""
    base = unet_contract(unet.config, precision)
    yield None, base
    for depth in depths:
        yield depth, with_deep_features(base, unet.config, shallow_groups((whole_group(depth),)))


def steps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Engines' times of a step, as they were measured when they were built, and those of whole pictures."""
    for interval, depth in ((1, None), *((interval, depth) for depth in args.depths for interval in (2, 3, 5))):
        with closing(_load(args, interval, depth, "uniform")) as pipe:
            there = {name: entry.info.get("step_ms") for name, entry in entries(pipe).items() if "unet" in name}
            times = []
            for number in range(1 + args.repeats):
                start = time.perf_counter()
                pipe("a red circle", num_inference_steps=args.steps, generator=torch.Generator().manual_seed(number))
                times.append(time.perf_counter() - start)
        found = {"model": args.model, "backend": args.backend, "steps": args.steps, "interval": interval}
        yield {**found, "depth": depth, "step_ms": there, "picture_s": round(statistics.median(times[1:]), 4)}


def scores(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How many of the built-in model's pictures the pixel checker finds right, for each choice."""
    prompts = held_out_prompts(args.prompts, [(128, 128)], seed=2)
    for interval, depth, schedule in CHOICES:
        with closing(_load(args, interval, depth, schedule, model="tiny", height=128, width=128)) as pipe:
            found = rates(score_prompts(pipe, prompts, args.steps).verdicts, prompts)
        chosen = {"interval": interval, "depth": depth, "schedule": schedule, "steps": args.steps}
        yield {**chosen, "prompts": args.prompts, "scores": found}


def _load(args: argparse.Namespace, interval: int, depth: int | None, schedule: Any, **options: Any) -> Any:
    """A pipeline without a bar, in engines that are built where they are missing."""
    given = {"model": args.model, "height": args.height, "width": args.width, "backend": args.backend}
    caching = {"cache_interval": interval, "cache_depth": depth, "cache_schedule": schedule}
    pipe = sdtrt.load(**{**given, **options}, **caching, engine_dir=args.folder / "engines", progress=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PARTS = {"work": work, "eager": eager, "steps": steps, "scores": scores}


if __name__ == "__main__":
    main()

"""The founding table: whole pipeline calls, PyTorch fp32 beside TensorRT fp16 engines, in one run on one GPU.

    python scripts/make_random_model.py sd15
    python benchmarks/founding.py --model sd15 --output benchmarks/founding.json

The call that is timed is the diffusers pipeline's own, from the prompt to the PIL image, after warm-up calls; the GPU
is waited for before and after. TF32 is off for PyTorch. Weights are random, which speed does not depend on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import UNetCall
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.open import OpenPipeline, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.reports.meters import Timing, driver_version, time_calls, time_queued_calls
from sdtrt.specs import BackendName, ModelSpec, Precision, Sizes
from sdtrt.specs.contract import unet_contract

STEPS, STRENGTH = 50, 0.8
PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Task:
    """One row's request; `height` and `width` in pixels."""

    name: str
    height: int
    width: int

    @property
    def img2img(self) -> bool:
        """Whether it starts from an image."""
        return self.name == "img2img"


TASKS = (Task("txt2img", 512, 512), Task("img2img", 512, 512), Task("img2img", 512, 768))
BACKENDS: tuple[tuple[BackendName, Precision, int], ...] = (("torch", "fp32", 3), ("tensorrt", "fp16", 10))


def pipeline_call(opened: OpenPipeline, task: Task) -> Callable[[], Any]:
    """The diffusers call of a task."""
    generator = torch.Generator().manual_seed(0)
    common = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 7.5, "generator": generator}
    if not task.img2img:
        return lambda: opened.pipe(**common, height=task.height, width=task.width)
    image = Image.effect_noise((task.width, task.height), 64).convert("RGB")
    return lambda: opened.pipe(**common, image=image, strength=STRENGTH)


@torch.no_grad()
def unet_step_ms(opened: OpenPipeline) -> Timing:
    """GPU milliseconds of one UNet call with guidance: 50 after 5 warm-ups, by CUDA events, no wait between calls."""
    spec, config = opened.spec, opened.spec.model.config("unet")
    feeds = seeded_feeds(unet_contract(config, spec.precision), spec.sizes).values()
    inputs = [tensor.to(spec.device) for tensor in feeds]
    unet = UNetCall(opened.pipe.unet)
    for _ in range(5):
        unet(*inputs)
    return time_queued_calls(lambda: unet(*inputs), 50, spec.device).scaled(1000)


def measure(
    task: Task, backend: BackendName, precision: Precision, repeats: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    torch.cuda.reset_peak_memory_stats()
    spec = PipelineSpec(
        model=resolve_model(ModelSpec(str(args.model))),
        backend=backend,
        precision=precision,
        sizes=Sizes(2, task.height, task.width),
        steps=STEPS,
        img2img=task.img2img,
    )
    with open_pipeline(spec, EngineDirectory(args.engine_dir), Console(), allow_build=args.build) as opened:
        call = pipeline_call(opened, task)
        for _ in range(2):  # a shape's second run captures its CUDA graph, also of what runs once a call
            call()
        latency = time_calls(call, repeats, spec.device)
        step = unet_step_ms(opened)
        used = {name: {"name": entry.name, "key": entry.key} for name, entry in opened.entries.items()}
    return {
        "task": task.name,
        "backend": backend,
        "precision": precision,
        "steps": STEPS if not task.img2img else int(STEPS * STRENGTH),
        "height": task.height,
        "width": task.width,
        "batch": 1,
        "latency_s": latency.to_json(),
        "unet_step_ms": step.to_json(),
        "peak_torch_bytes": torch.cuda.max_memory_allocated(),
        "engines": used,
    }


def with_speedups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its speed relative to PyTorch fp32 on the same task."""
    base = {(r["task"], r["width"]): r["latency_s"]["median"] for r in rows if r["backend"] == "torch"}
    return [row | {"speedup": base[row["task"], row["width"]] / row["latency_s"]["median"]} for row in rows]


def main() -> None:
    """Measure every row and write the JSON; nothing is written if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engine-dir", type=Path, default=default_directory())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--build", action="store_true", help="build missing engines")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768], help="leave tasks of other widths out")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    for task in (task for task in TASKS if task.width in args.widths):
        for backend, precision, repeats in BACKENDS:
            row = measure(task, backend, precision, repeats, args)
            rows.append(row)
            print(
                f"{task.name} {task.width}x{task.height} {backend} {precision}: {row['latency_s']['median']:.4f} s,"
                f" UNet {row['unet_step_ms']['median']:.2f} ms",
                file=sys.stderr,
                flush=True,
            )
    versions = host.library_versions() | {"tensorrt": libraries.version("tensorrt"), "driver": driver_version()}
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "host": host.facts(),
        "versions": versions,
        "rows": with_speedups(rows),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

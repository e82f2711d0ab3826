"""What pictures of four steps cost: a consistency model with a tiny VAE at SD 1.5's size, and SDXL without guidance.

    python benchmarks/few_steps.py --folder /tmp/few-steps --output benchmarks/few-steps-h200.json

Models with random weights are made where they are missing (`scripts/make_random_model.py`), and Inductor engines built.
Each case is timed twice: opened as the commands do it (`sdtrt bench`, with its parts), and as a live pipeline
in engines (`accelerate`), whose time is told apart as well. `--lcm` and `--sdxl` name other models, `--small` makes
64x64 pixels in fewer repeats: to try this on a CPU with models of miniature size.
"""

from __future__ import annotations

import sdtrt  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import inspect
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.pipeline.parts.schedulers import with_noise
from sdtrt.reports.bench import run_bench
from sdtrt.reports.meters import synchronize, time_calls
from sdtrt.specs import SAMPLE_PROMPT, BenchSpec, ModelSpec, NoiseSpec

STEPS = 4
MAKER = Path(__file__).resolve().parents[1] / "scripts" / "make_random_model.py"


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        architecture: of `scripts/make_random_model.py`.
        goal_ms: a picture, at most.
    """

    name: str
    architecture: str
    pixels: int
    guidance_scale: float
    goal_ms: float
    noise: NoiseSpec = field(default_factory=NoiseSpec)


CASES = (
    Case("lcm", "lcm", 512, 8.0, 50.0),  # the scale is an input of its UNet, which runs one row
    Case("sdxl", "sdxl", 1024, 0.0, 180.0, NoiseSpec(timestep_spacing="trailing")),
)


def main() -> None:
    """Run all cases, and write the report; exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where models and engines are kept")
    parser.add_argument("--lcm", help="a model in the place of the random one")
    parser.add_argument("--sdxl", help="a model in the place of the random one")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--baselines", default="", help="of sdtrt bench, with commas: torch-compile,torch-graph")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    command = shlex.join(["python", *sys.argv])
    chosen = [case for case in CASES if not args.case or case.name in args.case]
    cases = {case.name: measure(case, args) for case in chosen}
    report = {"command": command, "host": host.facts(), "versions": host.library_versions(), "cases": cases}
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    sys.exit(0 if all(case["meets_goal"] for case in cases.values()) else 1)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a case; a picture's time is the shorter one of the two ways to open it."""
    model = getattr(args, case.name) or made(case, args.folder)
    pixels, repeats = (64, 2) if args.small else (case.pixels, 20)
    directory = EngineDirectory(args.folder / "engines")
    spec = BenchSpec(
        model=ModelSpec(model),
        backend=args.backend,
        baselines=tuple(filter(None, args.baselines.split(","))),
        steps=STEPS,
        guidance_scale=case.guidance_scale,
        height=pixels,
        width=pixels,
        repeats=repeats,
        warmups=min(repeats, 3),
        noise=case.noise,
    )
    opened = run_bench(spec, directory, Console(), shlex.join(["python", *sys.argv])).to_json()
    live = accelerated(case, model, pixels, repeats, args)
    own = next(row for row in opened["rows"] if row["baseline"] is None)
    latency = own["latency_s"]
    best = min(live["picture_ms"], *([1000 * latency["median"]] if latency else []))
    figures = {"goal_ms": case.goal_ms, "picture_ms": best, "meets_goal": best <= case.goal_ms}
    return {**figures, "accelerated": live, "bench": opened}


def made(case: Case, folder: Path) -> str:
    """The model with random weights of a case, written where it is missing."""
    path = folder / case.architecture
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(MAKER), str(path), "--architecture", case.architecture]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return str(path)


def accelerated(case: Case, model: str, pixels: int, repeats: int, args: argparse.Namespace) -> dict[str, Any]:
    """A live pipeline's picture in engines, its parts, and how it was without them."""
    gpu = torch.cuda.is_available()
    dtype = torch.float16 if gpu else torch.float32
    pipe: Any = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if gpu else "cpu")
    pipe.scheduler = with_noise(pipe.scheduler, case.noise)

    def call() -> Any:
        given = {"num_inference_steps": STEPS, "guidance_scale": case.guidance_scale}
        generator = torch.Generator().manual_seed(0)
        return pipe(SAMPLE_PROMPT, height=pixels, width=pixels, **given, generator=generator).images

    plain = timed(call, pipe.device, min(repeats, 5))
    started = time.perf_counter()
    engines = args.folder / "engines"
    sdtrt.accelerate(pipe, height=pixels, width=pixels, guidance=False, backend=args.backend, engine_dir=engines)
    found: dict[str, Any] = {"accelerate_s": time.perf_counter() - started, "pytorch_picture_ms": plain}
    found["picture_ms"] = timed(call, pipe.device, repeats)
    found["parts_ms"] = parts(pipe, call, repeats)
    if gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of a call's milliseconds, a GPU idle before and after it; three calls before that are not timed."""
    for _ in range(min(repeats, 3)):
        call()
    return 1000 * time_calls(call, repeats, device).median


def parts(pipe: Any, call: Callable[[], object], repeats: int) -> Mapping[str, float]:
    """The median milliseconds of what a call consists of; the waiting between them makes the whole a little longer."""
    runs: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, spent in once(pipe, call).items():
            runs[name].append(spent)
    return {name: statistics.median(spent) for name, spent in runs.items()}


def once(pipe: Any, call: Callable[[], object]) -> dict[str, float]:
    """The milliseconds of one call's parts: texts, all steps of the UNet and of the scheduler, the VAE, the picture."""
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        synchronize(pipe.device)
        marks.append((name, time.perf_counter()))

    with ExitStack() as stack:
        mark("start")
        stack.enter_context(marked(pipe, "encode_prompt", "latents", "texts", mark))
        stack.enter_context(marked(pipe.scheduler, "step", "unet", "scheduler", mark))
        stack.enter_context(marked(pipe.image_processor, "postprocess", "vae", "picture", mark))
        call()
        mark("rest")
    found: dict[str, float] = defaultdict(float)
    for (_, before), (name, after) in pairwise(marks):
        found[name] += 1000 * (after - before)
    return dict(found)


@contextmanager
def marked(owner: Any, method: str, before: str, after: str, mark: Callable[[str], None]) -> Iterator[None]:
    """Mark what ends where a method begins, and what ends with it. What a call does first is called `latents`, too."""
    own = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        mark(before)
        result = own(*args, **kwargs)
        mark(after)
        return result

    wrapped.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]  # diffusers looks for `generator`
    setattr(owner, method, wrapped)
    try:
        yield
    finally:
        delattr(owner, method)


if __name__ == "__main__":
    main()

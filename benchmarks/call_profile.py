"""Where a call's time goes outside of the UNet: by the host's parts, and while the GPU has nothing to do.

    python benchmarks/call_profile.py --model sd15 --task img2img --height 512 --width 768 --steps 50 --output call.json

`wall_ms` is a call as `sdtrt bench` times it, the median of some. `parts` are of calls with a mark around each part, in
the order in which they first come: how often one runs, `host_ms` in it beside the marked parts within, and `gpu_ms`
from where its first work comes up on the GPU to where its last is done, waiting for the host included; both are sums
over a call. `idle_ms` of a part is how long the GPU had nothing to do while the host was in it, by PyTorch's profiler
in one more call; `busy_ms`, `idle_ms` and `span_ms` of `gpu` are of that call as a whole, which the profiler makes
slower. `--trace FILE` keeps its trace. On a CPU there are the host's figures alone.

`--own` gives and takes pictures as diffusers itself converts them, for a comparison. `--stub` is for a CPU: engines
run once, and then answer with what they gave; the host's time is that of one thread, which others' work leaves alone.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.pipeline.opening.open import OpenPipeline, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec, unet_sizes
from sdtrt.pipeline.parts import pixels
from sdtrt.pipeline.runs.call import PipelineCall
from sdtrt.reports.meters import synchronize, time_calls
from sdtrt.specs import ModelSpec

PREFIX = "sdtrt: "  # of the marks in a trace
WHOLE = "the rest of the call"
Interval = tuple[float, float]  # microseconds


def marked_methods(pipe: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, object and attribute of what a mark is put around."""
    yield "pixels: to the device", pixels, "to_device"
    yield "pixels: to pictures", pixels, "to_pictures"
    for part, names in {
        "pipe": ("check_inputs", "encode_prompt", "prepare_latents"),
        "image_processor": ("preprocess", "postprocess"),
        "scheduler": ("set_timesteps", "add_noise", "scale_model_input", "step"),
        "text_encoder": ("forward",),
        "text_encoder_2": ("forward",),
        "vae": ("encode", "decode"),
        "unet": ("forward",),
    }.items():
        owner = pipe if part == "pipe" else getattr(pipe, part, None)
        yield from ((f"{part}.{name}", owner, name) for name in names if hasattr(owner, name))


class Marks:
    """What runs when: the host's own time in each part, and events of the GPU at its ends."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.on_gpu, self._clock = device.type == "cuda", clock
        self.clear()

    def clear(self) -> None:
        """Forget all that was noted."""
        self.counts: dict[str, int] = defaultdict(int)
        self.host_s: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, Any, Any]] = []
        self._within: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note what a `with` takes, beside what is noted within."""
        begin = self._event()
        self._turn_over()
        self._within.append(name)
        self.counts[name] += 1
        with record_function(PREFIX + name):
            yield
        self._turn_over()
        self._within.pop()
        self.events.append((name, begin, self._event()))

    def _turn_over(self) -> None:
        """Count the time until now for the innermost part."""
        now = self._clock()
        if self._within:
            self.host_s[self._within[-1]] += now - self._since
        self._since = now

    def _event(self) -> Any:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def gpu_ms(self) -> dict[str, float]:
        """The GPU's time between the ends of each part, once it has done all."""
        found: dict[str, float] = defaultdict(float)
        for name, begin, end in self.events if self.on_gpu else ():
            found[name] += begin.elapsed_time(end)
        return found


@contextmanager
def marking(pipe: Any, marks: Marks) -> Iterator[None]:
    """Put marks around a pipeline's parts for the time of a `with`."""
    with ExitStack() as stack:
        for name, owner, attribute in marked_methods(pipe):
            own = attribute in vars(owner)
            before = getattr(owner, attribute)
            object.__setattr__(owner, attribute, _marked(before, marks, name))
            restore = partial(object.__setattr__, owner, attribute, before)
            stack.callback(restore if own else partial(object.__delattr__, owner, attribute))
        yield


def _marked(function: Callable[..., Any], marks: Marks, name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with marks.part(name):
            return function(*args, **kwargs)

    return call


def run_marked(call: Callable[[], object], marks: Marks, device: torch.device) -> dict[str, dict[str, float]]:
    """One marked call: figures of each part."""
    marks.clear()
    synchronize(device)
    with marks.part(WHOLE):
        call()
    synchronize(device)
    gpu = marks.gpu_ms()
    return {
        name: {"calls": count, "host_ms": 1000 * marks.host_s[name], "gpu_ms": gpu.get(name, 0.0)}
        for name, count in marks.counts.items()
    }


def medians(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Part by part, the median of each figure."""
    return {
        name: {key: round(statistics.median(row[name][key] for row in rows), 3) for key in figures}
        for name, figures in rows[0].items()
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals in order, those that touch joined."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def gaps(busy: list[Interval], whole: Interval) -> list[Interval]:
    """What of an interval is in none of some others, which are in order."""
    ends = [whole[0], *(end for _, end in busy)]
    begins = [*(begin for begin, _ in busy), whole[1]]
    pairs = ((max(end, whole[0]), min(begin, whole[1])) for end, begin in zip(ends, begins, strict=True))
    return [(begin, end) for begin, end in pairs if begin < end]


def idle_by_part(idle: list[Interval], ranges: list[tuple[str, Interval]]) -> dict[str, float]:
    """Milliseconds of idle intervals by the innermost of the host's nested ranges that they lie in."""
    found: dict[str, float] = defaultdict(float)
    cuts = sorted({point for _, interval in ranges for point in interval})
    for begin, end in idle:
        points = [begin, *(point for point in cuts if begin < point < end), end]
        for one, other in pairwise(points):
            inside = [(last - first, name) for name, (first, last) in ranges if first <= one and other <= last]
            found[min(inside)[1] if inside else WHOLE] += (other - one) / 1000
    return found


def profile_gpu(call: Callable[[], object], marks: Marks, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """One more marked call under PyTorch's profiler: when the GPU had nothing to do, and where the host was then."""
    marks.clear()
    synchronize(device)
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=kinds) as profiler, marks.part(WHOLE):
        call()
        synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    ranges, busy = read_events(profiler.events() or ())
    whole = next(interval for name, interval in ranges if name == WHOLE)
    working = union(busy)
    idle = gaps(working, whole)
    return {
        "span_ms": round((whole[1] - whole[0]) / 1000, 3),
        "busy_ms": round(sum(end - begin for begin, end in working) / 1000, 3),
        "idle_ms": round(sum(end - begin for begin, end in idle) / 1000, 3),
        "by_part": {name: round(value, 3) for name, value in idle_by_part(idle, ranges).items()},
    }


def read_events(events: Iterable[Any]) -> tuple[list[tuple[str, Interval]], list[Interval]]:
    """Of a profiler's events the host's marks, and when the GPU worked; it has the marks as well."""
    ranges, busy = [], []
    for event in events:
        interval = (float(event.time_range.start), float(event.time_range.end))
        on_host = event.device_type.name == "CPU"
        if event.name.startswith(PREFIX):
            ranges += [(event.name.removeprefix(PREFIX), interval)] * on_host
        elif not on_host:
            busy.append(interval)
    return ranges, busy


def pipeline_spec(args: argparse.Namespace, model: Model) -> PipelineSpec:
    """How the pipeline is opened, as `sdtrt bench` opens it."""
    return PipelineSpec(
        model=model,
        backend=args.backend,
        precision=args.precision,
        sizes=unet_sizes(model, 1, args.height, args.width, guidance=True),
        steps=args.steps,
        img2img=args.task == "img2img",
        images=1,
    )


def pipeline_call(args: argparse.Namespace) -> PipelineCall:
    """The call, as `sdtrt bench` makes it."""
    image = Image.effect_noise((args.width, args.height), 64).convert("RGB") if args.task == "img2img" else None
    return PipelineCall(("a photo of a cat",), (0,), guidance_scale=7.5, start=image, strength=args.strength)


def as_diffusers(opened: OpenPipeline, call: PipelineCall) -> object:
    """The call with pictures in and out as diffusers itself converts them."""
    given = replace(call, start=None)._arguments(opened)
    if call.start is not None:
        given = {name: value for name, value in given.items() if name not in ("height", "width")}
        given |= {"image": call.start, "strength": call.strength}
    return opened.pipe(**given, output_type="pil").images


def stub(pipe: Any) -> None:
    """Let engines run once, and then answer with copies of what they gave."""
    torch.set_num_threads(1)
    halves = (getattr(pipe.vae, f"{half}_session", None) for half in ("decoder", "encoder"))
    parts = (getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2"))
    for session in (*halves, *(getattr(part, "session", None) for part in parts)):
        if session is not None:
            session.run = _answering(session.run)


def _answering(run: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    kept: dict[str, torch.Tensor] = {}

    def answer(feeds: Any) -> dict[str, torch.Tensor]:
        if not kept:
            kept.update(run(feeds))
        return {name: tensor.clone() for name, tensor in kept.items()}

    return answer


def measure(args: argparse.Namespace, opened: OpenPipeline) -> dict[str, Any]:
    """All figures of a pipeline's calls."""
    device, one = opened.spec.device, pipeline_call(args)
    call = partial(as_diffusers, opened, one) if args.own else partial(one.run, opened, output_type="pil")
    if args.stub:
        stub(opened.pipe)
    for _ in range(3):
        call()
    timing = time_calls(call, args.repeats, device)
    marks = Marks(device, time.thread_time if args.stub else time.perf_counter)
    with marking(opened.pipe, marks):
        parts = medians([run_marked(call, marks, device) for _ in range(args.repeats)])
        gpu = profile_gpu(call, marks, device, args.trace) if device.type == "cuda" else None
    for name, value in (gpu or {}).pop("by_part", {}).items():
        parts[name]["idle_ms"] = value
    return {"wall_ms": round(1000 * timing.median, 3), "gpu": gpu, "parts": parts}


def table(found: dict[str, Any]) -> Iterator[str]:
    """What is printed."""
    yield f"a call: {found['wall_ms']} ms; the GPU, profiled: {found['gpu']}"
    yield f"{'part':28} {'calls':>5} {'host ms':>9} {'GPU ms':>9} {'idle ms':>9}"
    for name, part in found["parts"].items():
        idle = part.get("idle_ms", 0.0)
        yield f"{name:28} {part['calls']:5.0f} {part['host_ms']:9.3f} {part['gpu_ms']:9.3f} {idle:9.3f}"


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--task", choices=("txt2img", "img2img"), default="img2img")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--strength", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--own", action="store_true", help="pictures in and out as diffusers itself converts them")
    parser.add_argument("--stub", action="store_true", help="the host's time alone, on a CPU")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = resolve_model(ModelSpec(args.model))
    directory = EngineDirectory(args.engine_dir or default_directory())
    with open_pipeline(pipeline_spec(args, model), directory, Console()) as opened:
        found = measure(args, opened)
    args.output.write_text(json.dumps({"command": sys.argv, "host": host.facts(), **found}, indent=1) + "\n")
    print("\n".join(table(found)), file=sys.stderr)


if __name__ == "__main__":
    main()

"""Curves of speed against loss: each saving alone and together, judged by pixels and by the exact run.

    python benchmarks/quality_curve.py --folder /tmp/curve --output benchmarks/quality-tiny-cpu.json
    python benchmarks/quality_curve.py --folder DIR --model MODEL --prompts FILE --output quality-model.json

The built-in model's pictures are judged by `tests/pixel_checker.py`, too: the share of prompts whose background,
colours, kinds, sizes, number and places are right (held-out prompts of `scripts/tiny_score.py`). Any other model needs
`--prompts`, a file with a line each, and has no such scores. A choice is what `sdtrt bench --quality` takes. The report
is written after each choice, and pictures are kept in the folder: a run goes on where another ended.
"""

from __future__ import annotations

# isort: split
import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from tiny_score import Prompt, held_out_prompts, rates

# isort: split
from pixel_checker import judge

from sdtrt.common import host
from sdtrt.common.console import Console, quiet_libraries
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.reports.losses import Judges, Picture, find_judges, mean_loss
from sdtrt.reports.quality_runs import Way, make_pictures, opened_way, settle_way, time_way
from sdtrt.specs import Choice, GenerateSpec, MetricsSpec, ModelSpec
from sdtrt.specs.presets import describe
from sdtrt.specs.quality import parse_choices

INTERVALS = ("0:0.9", "0:0.8", "0:0.7", "0:0.6", "0:0.5", "0:0.4", "0.1:0.9", "0.2:0.8")
CACHES = ("2", "3", "4", "5")
CHOICES = ",".join(
    (
        *(f"guidance-interval={one}" for one in INTERVALS),
        *(f"cache-interval={one}" for one in CACHES),
        *(f"cache-interval={one}+cache-depth=2" for one in CACHES[:2]),
        "cache-interval=3+cache-schedule=middle",
        *("high", "balanced", "fast"),
    )
)
WARMUPS = 2
SEED = 20  # of the held-out prompts, and of the first picture
EXACT = Choice("exact", "exact", ())


@dataclass(frozen=True)
class Made:
    """A choice's pictures: latents `[N,C,H,W]`, pixels `[N,H,W,3]` of 0 to 255.

    Args:
        seconds: of timed calls, by the clock.
        cpu_seconds: that the process's threads worked for a call: other programs don't change it.
    """

    latents: np.ndarray[Any, Any]
    pixels: np.ndarray[Any, Any]
    seconds: tuple[float, ...]
    cpu_seconds: float

    def pictures(self) -> list[Picture]:
        """Them, as they are judged: of the levels that a file has."""
        pairs = zip(self.latents, self.pixels.astype(np.float32) / 255, strict=True)
        return [Picture(latents, pixels) for latents, pixels in pairs]


def main() -> None:
    """Measure all choices, the exact request first."""
    args, console = parsed(), Console()
    args.folder.mkdir(parents=True, exist_ok=True)
    prompts = prompts_of(args)
    image = request(args, [one.text for one in prompts])
    directory = EngineDirectory(args.engine_dir or args.folder / "engines")
    rows: list[dict[str, Any]] = []
    with quiet_libraries():
        model = resolve_model(image.model, console)
        way = settle_way(image, model, directory, console)
        judges = find_judges(
            MetricsSpec(clip_model=args.clip_model), (way.spec.sizes.height, way.spec.sizes.width), console
        )
        exact: Made | None = None
        for choice in (EXACT, *parse_choices(args.choices)):
            made = kept(choice.of(image), choice.text, model, directory, args, console)
            exact = exact or made
            rows.append(row_of(choice, choice.of(image), made, exact, prompts, judges, args.model == "tiny"))
            console.note(json.dumps({name: rows[-1][name] for name in ("choice", "speedup", "scores")}))
            write(args.output, report_of(way, rows, judges))


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where pictures and engines are kept")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=Path, help="a line each; for the built-in model held-out ones by default")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--choices", default=CHOICES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--scheduler")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--clip-model")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each choice")
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """What is drawn; the scenes of the user's own prompts are not known, and none are asked for."""
    if args.prompts is not None:
        lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [Prompt(line, None, (0, 0)) for line in lines[: args.count]]
    if args.model != "tiny":
        raise SystemExit("error: --prompts FILE says what another model than tiny draws")
    return held_out_prompts(args.count, [(args.height or 128, args.width or 128)], SEED)


def request(args: argparse.Namespace, prompts: Sequence[str]) -> GenerateSpec:
    """The exact request."""
    return GenerateSpec(
        prompts=tuple(prompts),
        model=ModelSpec(args.model),
        backend=args.backend,
        precision=args.precision,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        height=args.height,
        width=args.width,
        seed=SEED,
        batch_size=args.batch_size,
    )


def kept(
    image: GenerateSpec, name: str, model: Model, directory: EngineDirectory, args: argparse.Namespace, console: Console
) -> Made:
    """A choice's pictures, which may be those of an earlier run; it is timed in any case."""
    words = (name, args.model, args.steps, args.count, args.guidance_scale, args.scheduler, image.savings)
    file = args.folder / f"{re.sub(r'[^0-9a-z.]+', '-', ' '.join(map(str, words)).lower())}.npz"
    way = settle_way(image, model, directory, console)
    with opened_way(way, directory, console) as opened:
        began = time.process_time()
        seconds = time_way(way, opened, args.repeats, WARMUPS).samples
        cpu_seconds = (time.process_time() - began) / (args.repeats + WARMUPS)
        if not file.exists():
            pictures = make_pictures(way, opened, name, Console(quiet=True))
            levels = [(np.clip(one.pixels, 0, 1) * 255).round().astype(np.uint8) for one in pictures]
            np.savez(file, latents=np.stack([one.latents for one in pictures]), pixels=np.stack(levels))
    with np.load(file) as found:
        return Made(found["latents"], found["pixels"], seconds, cpu_seconds)


def row_of(
    choice: Choice,
    image: GenerateSpec,
    made: Made,
    exact: Made,
    prompts: Sequence[Prompt],
    judges: Judges,
    checked: bool,
) -> dict[str, Any]:
    """A choice's figures, as plain data."""
    pairs = zip(prompts, made.pictures(), exact.pictures(), strict=True)
    losses = [judges.loss(own, None if made is exact else other, prompt.text) for prompt, own, other in pairs]
    scores = points(made, prompts) if checked else {}
    usual = points(exact, prompts) if checked else {}
    median = float(np.median(made.seconds))
    return {
        "choice": choice.text,
        "what": describe(image.savings),
        "savings": asdict(image.savings),
        "latency_s": {"median": median, "samples": list(made.seconds)},
        "cpu_s": made.cpu_seconds,
        "speedup": float(np.median(exact.seconds)) / median,
        "cpu_speedup": exact.cpu_seconds / made.cpu_seconds,
        "mean": mean_loss(losses).to_json(),
        "scores": scores,
        "scores_lost": {name: round(usual[name] - value, 2) for name, value in scores.items()},
    }


def points(made: Made, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The pixel checker's scores, in percent."""
    verdicts = [judge(pixels, prompt.scene) for pixels, prompt in zip(made.pixels, prompts, strict=True)]
    return {name: round(100 * share, 2) for name, share in rates(verdicts, list(prompts)).items()}


def report_of(way: Way, rows: list[dict[str, Any]], judges: Judges) -> dict[str, Any]:
    """All figures, and how they came about."""
    image, spec = way.image, way.spec
    return {
        "host": host.facts(),
        "versions": host.library_versions(),
        "command": shlex.join(["python", *sys.argv]),
        "model": image.model.name,
        "backend": spec.backend,
        "precision": spec.precision,
        "steps": image.steps,
        "guidance_scale": image.guidance_scale,
        "height": spec.sizes.height,
        "width": spec.sizes.width,
        "batch": spec.images,
        "prompts": len(image.prompts),
        "left_out": dict(judges.left_out),
        "rows": rows,
    }


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report in the place of the last one."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()

"""FID and CLIP score of a model's pictures for a file of captions, as MLPerf judges SDXL: 20 steps, guidance 8, Euler.

    python benchmarks/fid.py --model stabilityai/stable-diffusion-xl-base-1.0 --captions captions_source.tsv \\
        --statistics val2014.npz --pictures /tmp/fid --output benchmarks/fid-sdxl-h200.json

Captions and statistics are MLPerf's own (mlcommons/inference, text_to_image: 5000 captions of COCO 2014, and the mean
and covariance of all its validation pictures' features). Its window for SDXL is FID 23.01 to 23.95, CLIP 31.69 to
31.81. As there, one noise is every picture's; `--seed-each` gives each its own. Pictures that are in the folder are
kept, so that a run goes on where another ended.

The features are those of torch-fidelity's Inception (`pip install torch-fidelity torchvision`), which torchmetrics
takes; `--inception FILE` names a TorchScript file in its place, which takes pictures `[B,3,H,W]` of uint8 and gives
features `[B,F]`. The CLIP model is MLPerf's, ViT-B/32. This has not run on real weights yet.
"""

from __future__ import annotations

# isort: split
import argparse
import csv
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdtrt.common import host
from sdtrt.common.console import QUIET, Console, quiet_libraries
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.clip_score import load_clip_score
from sdtrt.reports.quality_runs import Way, opened_way, settle_way
from sdtrt.reports.verify_runs import call_of
from sdtrt.specs import QUALITIES, GenerateSpec, ModelSpec
from sdtrt.specs.presets import preset

WINDOW = {"fid": (23.01086, 23.95008), "clip": (31.68632, 31.81332)}  # of SDXL in MLPerf Inference, closed division
NEGATIVE = "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"  # MLPerf's
CLIP = "openai/clip-vit-base-patch32"
BATCH = 16  # pictures whose features are taken at once


def main() -> None:
    """Make the pictures, and judge them."""
    args, console = parsed(), Console()
    image = request(args, read_captions(args.captions)[: args.count])
    way = make(image, args.pictures, EngineDirectory(args.engine_dir or default_directory()), console, args.seed_each)
    files = [file_of(args.pictures, number) for number in range(len(image.prompts))]
    scores = {
        "fid": fid(files, args.statistics, args.real, args.inception, way.spec.device, console),
        "clip": clip(files, image.prompts, args.clip_model),
    }
    report = report_of(way, args.quality, len(files), scores)
    print(json.dumps({name: report[name] for name in ("pictures", "fid", "clip", "inside")}, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--captions", type=Path, required=True, help="a .tsv with a column caption, or a line each")
    parser.add_argument("--count", type=int, default=5000, help="captions that are taken, from the first on")
    parser.add_argument("--pictures", type=Path, required=True, help="a folder for them")
    real = parser.add_mutually_exclusive_group(required=True)
    real.add_argument("--statistics", type=Path, help="of real pictures' features: an .npz with mu and sigma")
    real.add_argument("--real", type=Path, help="a folder of real pictures")
    parser.add_argument("--inception", type=Path, help="a TorchScript file in the place of torch-fidelity's")
    parser.add_argument("--clip-model", default=CLIP)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=8.0)
    parser.add_argument("--scheduler", default="euler")
    parser.add_argument("--negative-prompt", default=NEGATIVE)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seed-each", action="store_true", help="count the seed up from picture to picture")
    parser.add_argument("--quality", choices=QUALITIES, default="exact", help="the savings of a preset")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def request(args: argparse.Namespace, captions: Sequence[str]) -> GenerateSpec:
    """The pictures that are asked for."""
    return GenerateSpec(
        prompts=tuple(captions),
        model=ModelSpec(args.model),
        backend=args.backend,
        precision=args.precision,
        negative_prompt=args.negative_prompt,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        height=args.height,
        width=args.width,
        seed=args.seed,
        batch_size=args.batch_size,
        savings=preset(args.quality).savings,
    )


def report_of(way: Way, quality: str, pictures: int, scores: Mapping[str, float]) -> dict[str, Any]:
    """The scores, and how they came about, as plain data."""
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
        "scheduler": image.scheduler,
        "height": spec.sizes.height,
        "width": spec.sizes.width,
        "quality": quality,
        "savings": asdict(image.savings),
        "pictures": pictures,
        **scores,
        "mlperf_window": WINDOW,
        "inside": {name: low <= scores[name] <= high for name, (low, high) in WINDOW.items()},
    }


def read_captions(path: Path) -> list[str]:
    """The captions of MLPerf's table, or of a text with a line each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".tsv":
        return [row["caption"] for row in csv.DictReader(lines, delimiter="\t")]
    return [line for line in lines if line.strip()]


def file_of(folder: Path, number: int) -> Path:
    """A picture's file."""
    return folder / f"{number:05}.png"


def make(image: GenerateSpec, folder: Path, directory: EngineDirectory, console: Console, seed_each: bool) -> Way:
    """Make the pictures that the folder lacks, and say how they are made."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        way = settle_way(image, resolve_model(image.model, console), directory, console)
        missing = [number for number in range(len(image.prompts)) if not file_of(folder, number).exists()]
        if not missing:
            return way
        with opened_way(way, directory, console) as opened, console.bar("pictures", len(missing)) as advance:
            for batch in chunks(missing, way.spec.images):
                full = [*batch, *[batch[-1]] * (way.spec.images - len(batch))]
                texts = tuple(image.prompts[number] for number in full)
                seeds = tuple((image.seed or 0) + number * seed_each for number in full)
                made = call_of(way.image, way.spec, texts, seeds).run(opened, output_type="pil")
                for number, picture in zip(batch, made, strict=False):  # what fills the last batch up is dropped
                    draft = file_of(folder, number).with_suffix(".part")
                    picture.save(draft, "PNG")
                    draft.replace(file_of(folder, number))
                    advance()
    return way


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Them in their order, so many at a time."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def clip(files: Sequence[Path], captions: Sequence[str], model: str) -> float:
    """The mean CLIP score of pictures with their captions."""
    with quiet_libraries():
        score = load_clip_score(model, QUIET, offline=False)
        found = [score(pixels_of(file) / 255, text) for file, text in zip(files, captions, strict=True)]
    return float(np.mean(found))


def fid(
    files: Sequence[Path],
    statistics: Path | None,
    real: Path | None,
    inception: Path | None,
    device: torch.device,
    console: Console,
) -> float:
    """The Fréchet distance of the pictures' features from those of real ones (https://arxiv.org/abs/1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = 2048 if inception is None else torch.jit.load(inception, map_location="cpu")
    metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64).to(device)
    if statistics is not None:
        give_statistics(metric, statistics)
    else:
        assert real is not None
        suffixes = {".png", ".jpg", ".jpeg", ".webp"}
        look(metric, sorted(file for file in real.iterdir() if file.suffix.lower() in suffixes), device, is_real=True)
    with console.stage("features"):
        look(metric, files, device, is_real=False)
    return float(metric.compute())


@torch.no_grad()
def look(metric: Any, files: Sequence[Path], device: torch.device, *, is_real: bool) -> None:
    """Show pictures to the metric; those of one size at once."""
    for batch in chunks(files, BATCH):
        for shape, same in by_shape(pixels_of(file) for file in batch).items():
            assert len(shape) == 3
            metric.update(torch.stack(same).to(device), real=is_real)


def by_shape(pictures: Iterator[np.ndarray[Any, Any]]) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """Pictures as `[3,H,W]` of uint8, by their shapes."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for pixels in pictures:
        found.setdefault(pixels.shape, []).append(torch.from_numpy(pixels).permute(2, 0, 1))
    return found


def pixels_of(file: Path) -> np.ndarray[Any, Any]:
    """A picture `[H,W,3]` of uint8."""
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))


def give_statistics(metric: Any, path: Path) -> None:
    """Have the real pictures' features be those of a file: torchmetrics keeps sums, of which these are the moments."""
    with np.load(path) as found:
        mean, covariance = (torch.from_numpy(found[name]).double() for name in ("mu", "sigma"))
    count = 2  # any number gives the same moments
    metric.real_features_sum = (mean * count).to(metric.device)
    metric.real_features_cov_sum = (covariance * (count - 1) + count * torch.outer(mean, mean)).to(metric.device)
    metric.real_features_num_samples = torch.tensor(count, device=metric.device)


if __name__ == "__main__":
    main()

"""Pictures of a refiner, of a second larger pass and of tiles: engines beside PyTorch, and how long each takes.

    python benchmarks/stages.py --model FOLDER --refiner FOLDER --size 1024 --output stages.json

Without `--refiner` there is no such case. Each case is made twice, the second time without a build, and compared with
PyTorch's picture in the same precision. Exits with 1 where one is below 35 dB. Random weights do.
"""

from __future__ import annotations

import sdtrt  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdtrt.specs import GenerateSpec, ModelSpec, RefinerSpec, SizeConditioning, UpscaleSpec

LEAST_PSNR = 35.0


def cases_of(base: GenerateSpec, refiner: str | None) -> dict[str, GenerateSpec]:
    """What is made, by name."""
    cases = {
        "plain": base,
        "upscale latent": replace(base, upscale=UpscaleSpec(1.5, steps=10)),
        "upscale lanczos": replace(base, upscale=UpscaleSpec(1.5, "lanczos", steps=10)),
        "tiles": replace(base, height=(base.height or 0) * 3 // 2, vae_tiling=True),
    }
    if refiner is not None:
        told = SizeConditioning(original=(2048, 2048), crop=(16, 32))
        cases["refiner"] = replace(base, refiner=RefinerSpec(ModelSpec(refiner)), conditioning=told)
    return cases


def made(spec: GenerateSpec, engine_dir: str) -> tuple[np.ndarray[Any, Any], float]:
    """A picture, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        report = sdtrt.generate(replace(spec, output=Path(folder)), engine_dir=engine_dir)
        with Image.open(report.images[0].path) as image:
            return np.asarray(image.convert("RGB")).astype(float), report.images[0].seconds


def psnr(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio in dB of two pictures."""
    error = float(((first - second) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main() -> None:
    """Make all cases, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--refiner")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--engine-dir", default="engines")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    base = GenerateSpec(
        ("a lighthouse at dawn",),
        ModelSpec(options.model),
        precision=options.precision,
        steps=options.steps,
        height=options.size,
        width=options.size,
        seed=1,
    )
    found: dict[str, Any] = {}
    for name, spec in cases_of(base, options.refiner).items():
        expected, slow = made(replace(spec, backend="torch"), options.engine_dir)
        engines = replace(spec, backend=options.backend)
        made(engines, options.engine_dir)
        picture, seconds = made(replace(engines, allow_build=False), options.engine_dir)
        found[name] = {"psnr": psnr(expected, picture), "seconds": seconds, "torch_seconds": slow}
        print(f"{name}: {found[name]}", flush=True)
    options.output.write_text(json.dumps({"command": sys.argv, "cases": found}, indent=2) + "\n")
    sys.exit(any(one["psnr"] < LEAST_PSNR for one in found.values()))


if __name__ == "__main__":
    main()

"""Many generations in one process, with changing sizes and models: memory along the way, and one seed's image."""

from __future__ import annotations

import ctypes
import gc
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import torch
from fault_server import UNET

from sdtrt.common.console import QUIET
from sdtrt.engines.directory import EngineDirectory
from sdtrt.pipeline.runs.generate import generate
from sdtrt.specs import GenerateSpec, ModelSpec

WARM = 100  # generations after which memory has settled: libraries are loaded, allocators have what they need
SIZES = ((64, 64), (96, 64), (64, 96))


def run(count: int, seed: int, *, warm: int = WARM, each: int = 10, every: int = 100) -> dict[str, Any]:
    """Generate `count` images with two models in three sizes; resident bytes along the way, and at both ends.

    Args:
        warm: images after which growth is counted.
        every: images between two looks at the memory.
        each: images of one request; the pipeline is opened anew, with another model and size, for the next one.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sdtrt-soak-") as place:
        folder = Path(place)
        models = [
            factories.sd1_folder(folder / f"model{number}", seed=number, cross_attention_dim=32, **UNET)
            for number in range(2)
        ]
        directory = EngineDirectory(folder / "engines")
        first = _request(models[0], directory, folder, SIZES[0], seed, 1)
        memory: dict[int, int] = {}
        for number in range(each, count + 1, each):
            turn = number // each
            _request(models[turn % 2], directory, folder, SIZES[turn % 3], seed + number, each)
            if number in (warm, count) or number % every == 0:
                memory[number] = resident_bytes()
        last = _request(models[0], directory, folder, SIZES[0], seed, 1)
    return {
        "generations": count,
        "images_of_a_request": each,
        "resident_bytes": memory,
        "growth": round(memory[count] / memory[warm] - 1, 4),
        "same_image_before_and_after": first == last,
    }


def _request(
    model: Path, directory: EngineDirectory, folder: Path, size: tuple[int, int], seed: int, count: int
) -> str:
    """Make images in a pipeline of their own; the digest of the first."""
    height, width = size
    output = folder / "images"
    spec = GenerateSpec(("a red circle",), ModelSpec(str(model)), "onnxruntime", steps=2, seed=seed, height=height)
    report = generate(replace(spec, width=width, output=output, num_images=count), directory, QUIET)
    first = factories.sha256_of(report.images[0].path)
    shutil.rmtree(output)
    return first


def resident_bytes() -> int:
    """The process's resident memory, with what is free given back to the system first: what is left is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

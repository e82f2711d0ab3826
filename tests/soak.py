"""Many generations in one process, with changing sizes and models: memory along the way, and one seed's image."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import torch
from fault_server import UNET

from sdtrt.cache import EngineDirectory
from sdtrt.console import QUIET
from sdtrt.pipeline import generate
from sdtrt.specs import GenerateSpec, ModelSpec

WARM = 100  # generations after which memory has settled: libraries are loaded, allocators have what they need
SIZES = ((64, 64), (96, 64), (64, 96))


def run(count: int, seed: int, *, warm: int = WARM) -> dict[str, Any]:
    """Generate `count` images with two models in three sizes; resident bytes after each hundredth, and at both ends."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sdtrt-soak-") as place:
        folder = Path(place)
        models = [
            factories.sd1_folder(folder / f"model{number}", seed=number, cross_attention_dim=32, **UNET)
            for number in range(2)
        ]
        directory = EngineDirectory(folder / "engines")
        first = _image(models[0], directory, folder, SIZES[0], seed)
        memory: dict[int, int] = {}
        for number in range(1, count + 1):
            _image(models[number % 2], directory, folder, SIZES[number % 3], seed + number)
            if number in (warm, count) or number % 100 == 0:
                memory[number] = resident_bytes()
        last = _image(models[0], directory, folder, SIZES[0], seed)
    return {
        "generations": count,
        "resident_bytes": memory,
        "growth": round(memory[count] / memory[warm] - 1, 4),
        "same_image_before_and_after": first == last,
    }


def _image(model: Path, directory: EngineDirectory, folder: Path, size: tuple[int, int], seed: int) -> str:
    """Make one image in a pipeline of its own; its digest."""
    height, width = size
    output = folder / "image.png"
    spec = GenerateSpec(("a red circle",), ModelSpec(str(model)), "onnxruntime", steps=2, seed=seed, height=height)
    generate(replace(spec, width=width, output=output, overwrite=True), directory, QUIET)
    return hashlib.sha256(output.read_bytes()).hexdigest()


def resident_bytes() -> int:
    """The process's resident memory, with what is free given back to the system first: what is left is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

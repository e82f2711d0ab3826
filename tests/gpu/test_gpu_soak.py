"""Many pictures in one process on a real GPU: memory of the process and of the GPU stays flat, a seed's picture too."""

from __future__ import annotations

import gpu_engines
import numpy as np
import pytest
import torch
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT
from PIL import Image
from soak import resident_bytes

from sdtrt.common.console import QUIET
from sdtrt.pipeline.runs.generate import generate
from sdtrt.specs import GenerateSpec

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(1200)]
REQUESTS, EACH, WARM = 50, 20, 5  # 1000 pictures; each request opens the engines anew
SPREAD_BYTES = 32 * 2**20  # what the driver's and the allocators' granularity may make of nothing


def used_bytes():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_is_flat_over_a_thousand_pictures(directory, tmp_path):
    gpu_engines.engine("dynamic", directory)
    pictures: dict[int, list[np.ndarray]] = {}  # of the first and the last request: all would be the memory that grows
    memory = []
    for number in range(REQUESTS):
        seed = 1 if number in (0, REQUESTS - 1) else 1 + EACH * number
        spec = GenerateSpec(
            ("a red circle on a blue background",),
            backend="tensorrt",
            precision="fp16",
            height=128,
            width=128,
            steps=2,
            seed=seed,
            num_images=EACH,
            output=tmp_path / str(number),
        )
        report = generate(spec, directory, QUIET)
        made = [np.asarray(Image.open(image.path)) for image in report.images]
        assert len(made) == EACH
        if number in (0, REQUESTS - 1):
            pictures[number] = made
        memory.append((resident_bytes(), used_bytes()))
    print(f"resident and GPU MiB: {[tuple(size // 2**20 for size in sizes) for sizes in memory[:: REQUESTS // 10]]}")
    assert memory[-1][0] <= 1.02 * memory[WARM][0]
    assert memory[-1][1] <= memory[WARM][1] + SPREAD_BYTES
    np.testing.assert_array_equal(pictures[0], pictures[REQUESTS - 1])

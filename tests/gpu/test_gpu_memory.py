"""Too little memory on a real GPU: refused before work starts, or done in smaller batches; the process stays usable."""

from __future__ import annotations

from contextlib import closing, contextmanager

import gpu_engines
import numpy as np
import pytest
import torch
from gpu_engines import NEEDS_GPU, NEEDS_INDUCTOR, NEEDS_TENSORRT
from PIL import Image

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.common.errors import MemoryShortage
from sdtrt.pipeline.inputs.images import read_metadata
from sdtrt.pipeline.opening import open as pipeline_open
from sdtrt.pipeline.opening import opened
from sdtrt.pipeline.opening.memory import ALLOWANCE_BYTES, demand_of, free_bytes
from sdtrt.pipeline.runs.generate import generate
from sdtrt.specs import GenerateSpec, Sizes

pytestmark = [*NEEDS_GPU, pytest.mark.timeout(1200)]
CUDA = torch.device("cuda")


@contextmanager
def all_but(spare):
    """Hold the GPU's memory, but for about so many bytes."""
    torch.cuda.empty_cache()
    held = torch.empty(max(free_bytes(CUDA) - spare, 0), dtype=torch.uint8, device=CUDA)
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


@contextmanager
def limited(size):
    """Let PyTorch's allocator take no more than so many bytes: beyond that it is out of memory, as on a smaller GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(CUDA).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@NEEDS_TENSORRT
def test_what_can_not_fit_is_refused_before_anything_is_loaded(directory, tmp_path, monkeypatch):
    gpu_engines.engine("dynamic", directory)
    spec = GenerateSpec(("a red circle",), backend="tensorrt", height=128, width=128, seed=1, steps=2, output=tmp_path)
    generate(spec, directory, QUIET)  # builds what is missing
    opened = []
    monkeypatch.setattr(pipeline_open, "open_session", lambda *arguments, **options: opened.append(arguments))
    with all_but(ALLOWANCE_BYTES // 2), pytest.raises(MemoryShortage, match="GiB of GPU memory") as caught:
        generate(spec, directory, QUIET)
    assert not opened
    assert caught.value.hint
    monkeypatch.undo()
    assert len(generate(spec, directory, QUIET).images) == 1  # with the memory back, the same process goes on


def test_a_batch_that_runs_out_of_memory_goes_on_in_smaller_ones(directory, tmp_path):
    """PyTorch's own error for memory that is not there, on a limit that one image fits in and eight don't."""
    options = {"backend": "torch", "height": 512, "width": 512, "seed": 1, "steps": 2}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    one = generate(GenerateSpec(("a red circle",), output=tmp_path / "one", **options), directory, QUIET)
    limit = 3 * torch.cuda.max_memory_allocated()
    with limited(limit):
        many = GenerateSpec(("a red circle",), num_images=8, batch_size=8, output=tmp_path / "many", **options)
        report = generate(many, directory, QUIET)
    assert [image.seed for image in report.images] == list(range(1, 9))
    sizes = {read_metadata(image.path).details["batch_size"] for image in report.images}
    assert sizes <= {1, 2, 4}, sizes
    again = generate(GenerateSpec(("a red circle",), output=tmp_path / "again", **options), directory, QUIET)
    first, last = (np.asarray(Image.open(report.images[0].path)).astype(int) for report in (one, again))
    assert np.abs(first - last).max() <= 2


@NEEDS_INDUCTOR
def test_the_check_counts_what_graphs_hold(directory):
    """Engines of Inductor: each part's graph keeps what a run takes, and no more than that is there beside it."""
    torch.zeros(1, device=CUDA)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    pipe = sdtrt.load("tiny", height=512, width=512, backend="inductor", engine_dir=directory.path)
    with closing(pipe):
        for seed in (1, 2):
            size = {"height": 512, "width": 512}
            pipe("a red circle", **size, num_inference_steps=3, generator=torch.Generator().manual_seed(seed))
        demand = demand_of(opened.entries(pipe), Sizes(2, 512, 512), 1)
        assert demand.scratch > 0
        assert torch.cuda.max_memory_reserved() - before <= demand.total

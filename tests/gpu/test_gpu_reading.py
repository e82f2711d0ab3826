"""A reading of weights on a real GPU, which nobody waits for."""

from __future__ import annotations

import torch
from gpu_engines import NEEDS_GPU

from sdtrt.pipeline.parts.reading import Reading, block_sums

pytestmark = [*NEEDS_GPU]


def test_a_gpu_adds_as_the_host_does_and_its_stream_goes_on():
    generator = torch.Generator().manual_seed(0)
    shapes = [(320, 320, 3, 3), (320,), (49, 77), (4,)]
    tensors = [torch.randn(shape, generator=generator).half() for shape in shapes]
    dtypes = [torch.float16] * len(tensors)
    expected = block_sums(tensors, dtypes)
    there = [tensor if number == 1 else tensor.cuda() for number, tensor in enumerate(tensors)]
    Reading(there, dtypes).wait()  # the first memory of its kind is waited for, as long as the GPU computes
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy
    one = Reading(there, dtypes)
    assert not one.is_done
    assert torch.equal(one.wait(), expected)
    assert one.is_done

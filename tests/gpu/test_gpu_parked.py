"""Weights that leave a real GPU: what diffusers makes of them meanwhile comes back with them."""

from __future__ import annotations

import factories
import pytest
import torch
from diffusers import StableDiffusionPipeline
from gpu_engines import NEEDS_GPU

from sdtrt.pipeline.parts.parked import Parked

pytestmark = [*NEEDS_GPU, pytest.mark.timeout(300)]


class Holder:
    """A pipeline on the GPU, whose UNet's weights come back when a layer is called."""

    def __init__(self, pipe):
        self.pipe, self.parked = pipe, Parked(self.come_back)

    def come_back(self):
        self.parked.bring_back(self.pipe.unet)


def devices(unet):
    return {one.device.type for one in unet.parameters()}


def test_projections_that_are_fused_meanwhile_come_to_the_gpu_with_the_rest(tmp_path):
    folder = factories.sd1_folder(tmp_path / "sd1", layers_per_block=1)
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None).to("cuda")
    unet, holder = pipe.unet, Holder(pipe)
    inputs = (
        torch.ones(2, 4, 8, 8, device="cuda"),
        torch.tensor(500, device="cuda"),
        torch.ones(2, 77, 32, device="cuda"),
    )
    with torch.no_grad():
        expected = unet(*inputs).sample
        assert holder.parked.park(unet, unet.named_parameters())
        assert devices(unet) == {"cpu", "cuda"}, "a first one stays, by which the pipeline knows its device"
        pipe.fuse_qkv_projections(vae=False)
        found = unet(*inputs).sample
    assert devices(unet) == {"cuda"}
    assert torch.allclose(found, expected, atol=1e-3)

"""Layers that are made of weights while these are away from the GPU: they come to it together."""

from __future__ import annotations

import factories
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from sdtrt.pipeline.parts import parked
from sdtrt.pipeline.parts.parked import Parked

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def parking(monkeypatch):
    """A GPU that is not there: away from it weights are float64, which no layer takes beside float32."""
    monkeypatch.setattr(parked, "is_on_gpu", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(parked, "to_host", lambda data: data.double())
    monkeypatch.setattr(parked, "to_device", lambda data, device: data.float())


class Holder:
    """A UNet whose weights are away, until a layer of it is called."""

    def __init__(self, tokenizer):
        unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
        self.pipe = factories.live_pipeline(StableDiffusionPipeline, "sd1", tokenizer, unet=unet)
        self.parked = Parked(self.come_back)

    def park(self):
        assert self.parked.park(self.pipe.unet, self.pipe.unet.named_parameters())

    def come_back(self):
        self.parked.bring_back(self.pipe.unet)

    def call(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(500), torch.ones(2, 77, 32)
        with torch.no_grad():
            return self.pipe.unet(*inputs).sample


def dtypes(unet):
    return {one.dtype for one in unet.parameters()}


@pytest.mark.parametrize("called", [True, False])
def test_projections_that_are_fused_meanwhile_come_to_the_gpu_with_the_rest(tokenizer, called):
    holder = Holder(tokenizer)
    expected = holder.call()
    holder.park()
    with torch.no_grad():
        holder.pipe.fuse_qkv_projections(vae=False)
    fused = [one for name, one in holder.pipe.unet.named_parameters() if "to_qkv" in name or "to_kv" in name]
    assert {one.dtype for one in fused} == {torch.float64}, "beside what they are made of"
    if not called:
        holder.come_back()
    assert torch.allclose(holder.call(), expected, atol=1e-5)
    assert dtypes(holder.pipe.unet) == {torch.float32}
    holder.park()  # they are the module's by now
    assert {one.dtype for one in fused} == {torch.float64}
    holder.come_back()
    holder.pipe.unfuse_qkv_projections(vae=False)
    assert torch.allclose(holder.call(), expected, atol=1e-5)


def test_adapters_that_come_meanwhile_go_to_the_gpu_with_the_rest(tokenizer):
    holder = Holder(tokenizer)
    holder.park()
    holder.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    holder.pipe.unet.double()  # as peft makes them where the weights are
    holder.pipe.unet.conv_in.float()
    holder.call()
    assert dtypes(holder.pipe.unet) == {torch.float32}


def test_what_was_elsewhere_before_stays_there(tokenizer):
    """A user's own choice, as diffusers' offloading by groups makes it."""
    holder = Holder(tokenizer)
    last = holder.pipe.unet.conv_out.double()
    holder.park()
    holder.come_back()
    assert {one.dtype for one in last.parameters()} == {torch.float64}

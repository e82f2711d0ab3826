"""LoRAs on live pipelines that save steps: with guidance in a part of a run, with kept deep features, with both.

PyTorch runs the engines here (`torch_engines`). LoRAs with compiled engines in 8 bits: `test_quantised_engines`.
"""

from __future__ import annotations

import copy

import factories
import pytest
import torch
import torch_engines
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

import sdtrt
from sdtrt.specs import GuidanceInterval

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
TOLERANCE = 1e-3  # of latents of unit variance: the one is merged by peft, the other by sdtrt
VISIBLE = 50 * TOLERANCE
SAVED = {
    "interval": {"guidance_interval": GuidanceInterval(0.0, 0.5)},
    "caching": {"cache_interval": 3},
    "both": {"guidance_interval": GuidanceInterval(0.0, 0.5), "cache_interval": 3},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def accelerated(tokenizer, directory, monkeypatch):
    """Make the same pipeline each time, changed before engines are put into it."""
    torch_engines.instead_of_inductor(monkeypatch)

    def made(saved, change=lambda pipe: None):
        unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"], norm_num_groups=8)
        pipe = factories.live_pipeline(StableDiffusionPipeline, "sd1", tokenizer, unet=unet)
        change(pipe)
        given = {"height": 64, "width": 64, "engine_dir": directory, "progress": False, "components": ("unet",)}
        return sdtrt.accelerate(pipe, backend="inductor", **given, **saved)

    return made


@pytest.fixture(scope="module")
def lora(tokenizer, tmp_path_factory):
    """The folder of a LoRA by chance, of a seed; also of layers that run in shallow steps."""
    folder = tmp_path_factory.mktemp("loras")

    def written(seed):
        unet = copy.deepcopy(factories.small_unet("sd1", **factories.SMALLEST["sd1"], norm_num_groups=8))
        config = LoraConfig(r=4, target_modules=["to_q", "to_v", "ff.net.2", "conv1"])
        inject_adapter_in_model(config, unet.requires_grad_(False), adapter_name="made")
        generator = torch.Generator().manual_seed(seed)
        state = get_peft_model_state_dict(unet, adapter_name="made")
        layers = {name: 0.2 * torch.randn(one.shape, generator=generator) for name, one in state.items()}
        StableDiffusionPipeline.save_lora_weights(folder / str(seed), unet_lora_layers=layers)
        return str(folder / str(seed))

    return written


def latents(pipe):
    """Of a run with much guidance, as random weights hardly heed a prompt."""
    given = {
        "num_inference_steps": 12,
        "output_type": "latent",
        "height": 64,
        "width": 64,
        "guidance_scale": 100.0,
    }  # random weights hardly heed a prompt
    return pipe("a red circle", **given, generator=torch.Generator().manual_seed(3)).images


def differ(found, expected):
    return float((found - expected).abs().max() / expected.std())


def fused(*pairs):
    """Put LoRAs into a pipeline's weights for good, each with its weight: what engines then are of."""

    def change(pipe):
        for path, weight in pairs:
            pipe.load_lora_weights(path)
            pipe.fuse_lora(lora_scale=weight)
            pipe.unload_lora_weights()

    return change


@pytest.mark.parametrize("name", SAVED)
def test_a_lora_comes_counts_and_goes(accelerated, lora, name):
    """What is computed is what engines of the merged weights compute; back is back to the last bit."""
    saved = SAVED[name]
    pipe, one, other = accelerated(saved), lora(1), lora(2)
    before = latents(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(other, adapter_name="other")
    pipe.set_adapters("one")
    first = latents(pipe)
    assert differ(first, before) > VISIBLE
    assert differ(first, latents(accelerated(saved, fused((one, 1.0))))) < TOLERANCE
    pipe.set_adapters("other")
    assert differ(latents(pipe), first) > VISIBLE
    pipe.set_adapters("one")
    assert torch.equal(latents(pipe), first)
    pipe.set_adapters(["one", "other"], [0.5, 0.25])
    weighted = latents(pipe)
    assert min(differ(weighted, first), differ(weighted, before)) > VISIBLE
    assert differ(weighted, latents(accelerated(saved, fused((one, 0.5), (other, 0.25))))) < TOLERANCE
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)


def test_a_run_that_saves_is_another_one(accelerated, lora):
    """Or the tests above would prove nothing of savings."""
    made = {name: latents(accelerated(saved, fused((lora(1), 1.0)))) for name, saved in {"none": {}, **SAVED}.items()}
    assert not torch.equal(made["interval"], made["none"])
    assert not torch.equal(made["both"], made["caching"])
    assert differ(made["caching"], made["none"]) > VISIBLE

"""T2I-Adapters in pipelines whose UNet runs in an engine, beside plain diffusers: what they give are its inputs."""

from __future__ import annotations

import factories
import pytest
import torch
from diffusers import (
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from test_controlnet import MAP, OTHER_MAP, TOLERANCE, differ, latents
from trt_fakes import fake_library

import sdtrt
from sdtrt.backends import registry
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import component_call
from sdtrt.pipeline.parts.residuals import adapter_feeds
from sdtrt.specs import Sizes
from sdtrt.specs.contract import unet_contract
from sdtrt.specs.groups import adapter_shapes, with_groups

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SLOW = pytest.mark.slow
SIZES = {"height": 64, "width": 64}
KINDS = {  # pipeline, UNet, adapter
    "sd1": (StableDiffusionAdapterPipeline, factories.SMALLEST["sd1"], {"channels": [32, 64]}),
    "sd1-whole": (StableDiffusionAdapterPipeline, {"layers_per_block": 1}, {"channels": [32, 32, 64, 64]}),
    "sdxl": (  # its fourth tensor is the middle block's
        StableDiffusionXLAdapterPipeline,
        {"layers_per_block": 1, "transformer_layers_per_block": 1},
        {"channels": [32, 32, 64, 64], "adapter_type": "full_adapter_xl", "downscale_factor": 16},
    ),
}


def small_adapter(seed=5, **config):
    """An adapter that has an effect."""
    with factories.seeded(seed):
        adapter = T2IAdapter(**config)
    return adapter.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def make(tokenizer):
    def made(name="sd1", count=1, **parts):
        cls, unet, adapter = KINDS[name]
        several = [small_adapter(5 + number, **adapter) for number in range(count)]
        one = MultiAdapter(several) if count > 1 else several[0]
        kind = name.partition("-")[0]
        parts = {"adapter": one, "unet": factories.small_unet(kind, **unet), **parts}
        return factories.live_pipeline(cls, kind, tokenizer, **parts)

    return made


def accelerated(pipe, directory, **options):
    given = {
        **SIZES,
        "engine_dir": directory.path,
        "progress": False,
        "components": ("unet",),
        "backend": "onnxruntime",
    }
    return sdtrt.accelerate(pipe, **{**given, **options})


@SLOW
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.feature("T2I-Adapter", "sd1 sdxl", "onnxruntime")
def test_an_adapter_has_its_effect_and_nothing_that_is_turned_builds_an_engine(name, make, directory):
    plain, pipe = make(name), accelerated(make(name), directory)
    built = len(directory.entries("engine"))
    assert differ(latents(plain), latents(plain, adapter_conditioning_scale=0.0)) > 100 * TOLERANCE
    changes = [{}, {"adapter_conditioning_scale": 0.3}, {"image": OTHER_MAP, "prompt": "a blue star"}]
    changes += [{"adapter_conditioning_factor": 0.5}] * (name == "sdxl")
    for options in changes:
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE, options
    assert len(directory.entries("engine")) == built
    assert sdtrt.status(pipe)["unet"].is_in_engine
    assert not sdtrt.status(pipe)["adapter"].is_in_engine
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain))


@SLOW
def test_several_adapters_are_summed_before_the_engine(make, directory):
    plain, pipe = make(count=2), accelerated(make(count=2), directory)
    given = {"image": [MAP, OTHER_MAP], "adapter_conditioning_scale": [0.8, 0.4]}
    assert differ(latents(pipe, **given), latents(plain, **given)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler")
@pytest.mark.feature("T2I-Adapter", "sd1", "inductor")
def test_an_inductor_engine_takes_what_an_adapter_gives(make, directory):
    plain, pipe = make(), accelerated(make(), directory, backend="inductor")
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    found, expected = (latents(one, adapter_conditioning_scale=0.2) for one in (pipe, plain))
    assert differ(found, expected) <= TOLERANCE


def contract_of(unet, kind, groups):
    pooled = factories.TEXT_WIDTH if kind == "sdxl" else None
    return with_groups(unet_contract(unet.config, "fp32", pooled), unet.config, groups)


@SLOW
@pytest.mark.parametrize("name", KINDS)
def test_its_engine_takes_both_groups(name):
    kind, config = name.partition("-")[0], KINDS[name][1]
    unet = factories.small_unet(kind, **config)
    contract = contract_of(unet, kind, ("controlnet", "t2i_adapter"))
    feeds = seeded_feeds(contract, Sizes(2, 64, 64))
    whole = component_call(unet, contract)(*feeds.values())
    for start in ("adapter_", "down_residual_", "mid_"):
        less = {key: value * (not key.startswith(start)) for key, value in feeds.items()}
        assert differ(component_call(unet, contract)(*less.values()), whole) > 10 * TOLERANCE


def test_shapes_are_those_of_the_known_adapters():
    sd1 = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    }
    assert adapter_shapes(sd1) == [(320, 1), (640, 2), (1280, 4), (1280, 8), (1280, 8)]
    xl = {"block_out_channels": [320, 640, 1280], "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2}
    assert adapter_shapes(xl) == [(320, 2), (640, 2), (1280, 4), (1280, 4)]


def test_lists_stay_whole_and_missing_tensors_are_zeros():
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    contract, sample = contract_of(unet, "sd1", ("t2i_adapter",)), torch.zeros(2, 4, 8, 8)
    given = [torch.ones(2, 32, 8, 8), torch.ones(1, 64, 4, 4)]
    feeds = adapter_feeds(contract, sample, given)
    assert len(given) == 2
    assert {name: tuple(one.shape) for name, one in feeds.items()} == {
        "adapter_residual_00": (2, 32, 8, 8),
        "adapter_residual_01": (2, 64, 4, 4),
        "adapter_residual_02": (2, 64, 4, 4),
    }
    assert not feeds["adapter_residual_02"].any()
    assert not any(one.any() for one in adapter_feeds(contract, sample, None).values())
    middle = adapter_feeds(contract, sample, [*given, torch.ones(2, 64, 4, 4)])
    assert middle["adapter_residual_02"].all()
    assert not adapter_feeds(contract, sample, [*given, torch.ones(2, 64, 8, 8)])["adapter_residual_02"].any()
    with pytest.raises(EngineError, match=r"the residual of the block 0 must have the shape \[2, 32, 8, 8\]"):
        adapter_feeds(contract, sample, given[::-1])


def test_an_adapter_for_another_model_is_refused_by_name(make, directory):
    built = len(directory.entries("engine"))
    wrong = small_adapter(channels=[32, 32])
    with pytest.raises(EngineError, match=r"its list of channels is \[32, 32\], where the unet takes \[32, 64\]"):
        accelerated(make(adapter=wrong), directory)
    wrong = small_adapter(channels=[32, 64], downscale_factor=16)
    with pytest.raises(EngineError, match="its downscale_factor is 16, where the unet takes 8"):
        accelerated(make(adapter=wrong), directory)
    assert len(directory.entries("engine")) == built


@pytest.mark.feature(
    "T2I-Adapter", "sd1 sd2 sdxl", "tensorrt86", error="no engine whose unet has inputs for t2i_adapter"
)
def test_tensorrt_8_6_says_the_way_out(monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda *_: fake_library("tensorrt 8.6.1"))
    with pytest.raises(UsageError, match="builds no engine whose unet has inputs for t2i_adapter") as caught:
        registry.get("tensorrt").check_groups(("t2i_adapter",))
    assert "use the backend inductor" in caught.value.hint

"""A VAE whose activations leave fp16, in fp16 on a stream that is divided: right, finite, with its own weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import factories
import pytest
import torch
from diffusers.models.attention_processor import SpatialNorm
from diffusers.models.autoencoders.vae import Decoder

from sdtrt.common.errors import ExportError
from sdtrt.common.metrics import cosine
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.program import Recipe, export_program
from sdtrt.exports.scaled_vae import SCALE, scaled_stream
from sdtrt.exports.tracing import component_call
from sdtrt.models.components import VAE_HALVES
from sdtrt.specs import Profile, Range, Sizes
from sdtrt.specs.contract import vae_contract

SIZES = Sizes(1, 32, 32)
FOUR_NINES = 0.9999
GAIN = 1e5  # of what is added to the stream: some of that alone is beyond fp16


def vae(gain=1.0, **overrides):
    return factories.overflowing_vae(gain=gain, **overrides).half()


def half_of(module, component):
    return getattr(module, component.removeprefix("vae_"))


def computed(module, component, precision, scale=None):
    """What half a VAE gives for seeded inputs, plainly or with its stream divided."""
    module = copy.deepcopy(module)
    contract = vae_contract(dict(module.config), precision, component)
    call = component_call(torch.nn.Module.to(module, getattr(torch, contract.outputs[0].dtype)), contract)
    feeds = seeded_feeds(contract, SIZES).values()
    with torch.inference_mode():
        if scale is None:
            return call(*feeds)
        with scaled_stream(half_of(module, component), scale):
            return call(*feeds)


@pytest.mark.parametrize("component", VAE_HALVES)
def test_what_overflows_in_fp16_is_right_in_fp16(component):
    module = vae(GAIN)
    assert not computed(module, component, "fp16").isfinite().all(), "or this proves nothing"
    wanted, found = computed(module, component, "fp32"), computed(module, component, "fp16", SCALE)
    assert found.dtype == torch.float16
    assert found.isfinite().all()
    assert cosine(found.float().numpy(), wanted.numpy()) >= FOUR_NINES
    assert float((found.float() - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("component", VAE_HALVES)
def test_what_does_not_overflow_is_as_good_as_in_plain_fp16(component):
    """So VAEs of Stable Diffusion 1.x may have the same engine."""
    module = vae()
    wanted = computed(module, component, "fp32")
    plain, scaled = (
        float((computed(module, component, "fp16", scale).float() - wanted).norm() / wanted.norm())
        for scale in (None, SCALE)
    )
    assert scaled <= 1.25 * plain


@pytest.mark.parametrize("component", VAE_HALVES)
@pytest.mark.parametrize("gain", [1.0, GAIN])
def test_it_is_the_same_function(component, gain):
    """A power of two moves no digit: in fp32 nothing differs at all, of another number only the rounding."""
    module = vae(gain, layers_per_block=2, block_out_channels=(8, 16, 16, 16))
    plain = computed(module, component, "fp32")
    torch.testing.assert_close(computed(module, component, "fp32", SCALE), plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(computed(module, component, "fp32", 48), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("component", VAE_HALVES)
@pytest.mark.parametrize(
    "layers",
    [
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
        {
            "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        },
    ],
    ids=["no attention", "more attentions"],
)
def test_so_it_is_with_other_layers(component, layers):
    module = vae(GAIN, **layers)
    plain = computed(module, component, "fp32")
    torch.testing.assert_close(computed(module, component, "fp32", SCALE), plain, atol=1e-6, rtol=1e-6)
    assert computed(module, component, "fp16", SCALE).isfinite().all()


@pytest.mark.parametrize("component", [pytest.param("vae_decoder", marks=pytest.mark.slow), "vae_encoder"])
def test_a_program_has_the_same_weights_by_the_same_names(component):
    """They are the model's own: whatever an engine is given, it computes with that."""
    plain, scaled = (
        export_program(
            module := vae(GAIN),
            vae_contract(dict(module.config), "fp16", component),
            Profile.of(SIZES),
            device=torch.device("cpu"),
            recipe=Recipe(stream_scale=scale),
        )
        for scale in (1, SCALE)
    )
    assert dict(scaled.sources) == dict(plain.sources)
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in scaled.weights.items())
    assert not scaled.fixed
    contract = vae_contract(dict(vae().config), "fp16", component)
    with torch.inference_mode():
        found = scaled.exported.module()(*seeded_feeds(contract, SIZES).values())
    assert cosine(found.float().numpy(), computed(vae(GAIN), component, "fp32").numpy()) >= FOUR_NINES


@pytest.mark.slow
def test_a_program_for_ranges_of_sizes_is_scaled_too():
    module = vae(GAIN)
    contract = vae_contract(dict(module.config), "fp16", "vae_decoder")
    profile = replace(Profile.of(SIZES), height=Range(32, 32, 64))
    recipe = Recipe(stream_scale=SCALE)
    program = export_program(module, contract, profile, device=torch.device("cpu"), recipe=recipe)
    with torch.inference_mode():
        found = program.exported.module()(*seeded_feeds(contract, SIZES).values())
    assert cosine(found.float().numpy(), computed(vae(GAIN), "vae_decoder", "fp32").numpy()) >= FOUR_NINES


def test_the_module_is_as_it_was_afterwards():
    module = vae()
    before = {name: dict(vars(layer)) for name, layer in module.named_modules()}
    with scaled_stream(module.decoder):
        assert module.decoder.conv_norm_out.eps == pytest.approx(1e-6 / SCALE**2)
        assert "forward" in vars(module.decoder.conv_in)
    assert {name: dict(vars(layer)) for name, layer in module.named_modules()} == before


def test_layers_that_it_does_not_know_are_refused():
    """Rather than to give another function."""
    module = vae()
    module.decoder.mid_block.attentions[0].group_norm = None
    with (
        pytest.raises(ExportError, match=r"mid_block.attentions.0.to_q \(Linear\)") as caught,
        scaled_stream(module.decoder),
    ):
        pass
    assert "--precision fp32" in caught.value.hint
    spatial = Decoder(in_channels=4, norm_type="spatial", block_out_channels=(32,), mid_block_add_attention=False)
    assert isinstance(spatial.conv_norm_out, SpatialNorm)
    with pytest.raises(ExportError, match="is of no kind that sdtrt knows"), scaled_stream(spatial):
        pass


def test_a_tiny_vae_has_no_such_stream():
    module = factories.small_tiny_vae()
    contract = vae_contract(dict(module.config), "fp32", "vae_decoder")
    feeds = seeded_feeds(contract, SIZES).values()
    with torch.inference_mode():
        wanted = component_call(module, contract)(*feeds)
        recipe = Recipe(stream_scale=SCALE)
        program = export_program(module, contract, Profile.of(SIZES), device=torch.device("cpu"), recipe=recipe)
        torch.testing.assert_close(program.exported.module()(*feeds), wanted)

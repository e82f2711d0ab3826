"""The UNet contract: derived from diffusers' configuration, concrete at each size, and the same after a round trip."""

from __future__ import annotations

import json

import factories
import pytest

from sdtrt.common.errors import ModelError
from sdtrt.specs import Profile, Range, Sizes
from sdtrt.specs.contract import Contract, unet_contract
from sdtrt.specs.groups import controlnet_contract, with_groups

SIZES = Sizes(batch=3, height=72, width=104, tokens=154)


@pytest.fixture(scope="module")
def configs():
    return {kind: dict(factories.small_unet(kind).config) for kind in factories.UNET_CONFIGS}


def test_shapes_at_a_size(configs):
    contract = unet_contract(configs["sd1"], "fp16")
    assert contract.input_shapes(SIZES) == {
        "sample": (3, 4, 9, 13),  # pixels / 8, height first
        "timestep": (3,),
        "encoder_hidden_states": (3, 154, 32),
    }
    assert contract.output_shapes(SIZES) == {"out_sample": (3, 4, 9, 13)}


def test_sdxl_takes_pooled_text_and_time_ids(configs):
    shapes = unet_contract(configs["sdxl"], "fp16").input_shapes(SIZES)
    assert list(shapes)[3:] == ["text_embeds", "time_ids"]
    assert shapes["text_embeds"] == (3, factories.TEXT_WIDTH)
    assert shapes["time_ids"] == (3, 6)


def test_residuals_have_the_shapes_that_the_unet_adds_them_to(configs):
    """Rounded up where a side is odd: 9 and 13 latents, then 5 and 7, 3 and 4, 2 and 2."""
    sides = {1: (9, 13), 2: (5, 7), 4: (3, 4), 8: (2, 2)}
    for kind, factors in (("sd1", [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]), ("sdxl", [1, 1, 1, 2, 2, 2, 4, 4, 4])):
        plain = unet_contract(configs[kind], "fp16")
        shapes = with_groups(plain, configs[kind], ("controlnet",)).input_shapes(SIZES)
        names = list(shapes)[len(plain.inputs) :]
        assert names == [*(f"down_residual_{index:02}" for index in range(len(factors))), "mid_residual"]
        assert [shapes[name][2:] for name in names] == [sides[factor] for factor in [*factors, factors[-1]]]
        assert shapes["down_residual_00"][:2] == (3, 32)
        assert shapes["mid_residual"][:2] == (3, 64)
        assert with_groups(plain, configs[kind], ()) == plain


def test_a_controlnet_gives_what_its_unet_takes(configs):
    for kind in ("sd1", "sdxl"):
        contract = controlnet_contract(configs[kind], "fp16")
        unet = unet_contract(configs[kind], "fp16")
        assert contract.inputs[: len(unet.inputs)] == unet.inputs
        assert (*unet.inputs, *contract.outputs) == with_groups(unet, configs[kind], ("controlnet",)).inputs
        shapes = contract.input_shapes(SIZES)
        assert shapes["control_image"] == (3, 3, 72, 104)
        assert shapes["residual_scales"] == (len(contract.outputs),)


def test_residuals_of_blocks_of_another_kind_are_refused(configs):
    config = {**configs["sd1"], "down_block_types": ("KDownBlock2D",)}
    with pytest.raises(ModelError, match="KDownBlock2D"):
        with_groups(unet_contract(config, "fp16"), config, ("controlnet",))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_dtypes(configs, precision, dtype):
    contract = unet_contract(configs["sdxl"], precision)
    dtypes = {spec.name: spec.dtype for spec in (*contract.inputs, *contract.outputs)}
    assert dtypes.pop("timestep") == dtypes.pop("time_ids") == "float32"
    assert set(dtypes.values()) == {dtype}


def test_dynamic_axes(configs):
    axes = unet_contract(configs["sd1"], "fp16").dynamic_axes
    assert axes["sample"] == axes["out_sample"] == {0: "batch", 2: "latent_height", 3: "latent_width"}
    assert axes["encoder_hidden_states"] == {0: "batch", 1: "tokens"}
    assert axes["timestep"] == {0: "batch"}


def test_profile_shapes(configs):
    profile = Profile(Range(1, 2, 8), Range(64, 512, 768), Range.of(512), Range(77, 77, 231))
    shapes = unet_contract(configs["sd1"], "fp16").profile_shapes(profile)
    assert shapes["sample"] == ((1, 4, 8, 64), (2, 4, 64, 64), (8, 4, 96, 64))
    assert shapes["encoder_hidden_states"] == ((1, 77, 32), (2, 77, 32), (8, 231, 32))


@pytest.mark.parametrize("kind", list(factories.UNET_CONFIGS))
def test_json_round_trip(configs, kind):
    contract = unet_contract(configs[kind], "bf16")
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


def test_inpainting_unet_has_its_own_channels(configs):
    contract = unet_contract({**configs["sd1"], "in_channels": 9}, "fp16")
    assert contract.input_shapes(SIZES)["sample"] == (3, 9, 9, 13)
    assert contract.output_shapes(SIZES)["out_sample"] == (3, 4, 9, 13)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("encoder_hid_dim_type", "text_proj"),
        ("addition_embed_type", "image"),
        ("_class_name", "UNetMotionModel"),
    ],
)
def test_unets_with_other_inputs_are_refused(configs, name, value):
    with pytest.raises(ModelError) as caught:
        unet_contract({**configs["sd1"], name: value}, "fp16")
    assert str(value) in caught.value.message
    assert "--backend torch" in caught.value.hint

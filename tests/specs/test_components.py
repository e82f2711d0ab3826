"""The UNet contract: derived from diffusers' configuration, concrete at each size, and the same after a round trip."""

from __future__ import annotations

import json

import factories
import pytest

from sdtrt.common.errors import ModelError
from sdtrt.specs import Profile, Range, Sizes
from sdtrt.specs.contract import Contract, unet_contract

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
        ("time_cond_proj_dim", 256),
        ("_class_name", "UNetMotionModel"),
    ],
)
def test_unets_with_other_inputs_are_refused(configs, name, value):
    with pytest.raises(ModelError) as caught:
        unet_contract({**configs["sd1"], name: value}, "fp16")
    assert str(value) in caught.value.message
    assert "--backend torch" in caught.value.hint

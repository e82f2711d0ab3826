"""The components of a model: what there is, in which precision, for which sizes."""

from __future__ import annotations

import json

import factories
import pytest

from sdtrt.common.errors import ModelError, UsageError
from sdtrt.models import components
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import ModelSpec, Profile, Range, Sizes
from sdtrt.specs.contract import Contract

SD = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
SDXL = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
SIZES = Sizes(6, 72, 104, tokens=154)
TOKENS, WIDTH = 77, factories.TEXT_WIDTH


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return resolve_model(ModelSpec(str(factories.sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl"))))


@pytest.fixture(scope="module")
def tiny():
    return resolve_model(ModelSpec("tiny"))


def test_a_model_has_the_components_of_its_kind(tiny, sdxl):
    assert components.components_of(tiny) == components.choose_components(tiny, ()) == SD
    assert components.components_of(sdxl) == SDXL
    assert components.choose_components(sdxl, ["vae_decoder", "text_encoder_2", "vae_decoder"]) == (
        SDXL[1],
        "vae_decoder",
    )


@pytest.mark.parametrize(("name", "hint"), [("vea_decoder", "did you mean vae_decoder"), ("text_encoder_2", "it has")])
def test_a_component_that_is_not_there_is_refused(tiny, name, hint):
    with pytest.raises(UsageError, match=name) as caught:
        components.choose_components(tiny, ["unet", name])
    assert hint in caught.value.hint


def shapes(model, component, sizes=SIZES):
    contract = components.contract_of(model, component, "fp16")
    return contract.input_shapes(sizes), contract.output_shapes(sizes)


def test_shapes_of_text_encoders(tiny, sdxl):
    state = (6, TOKENS, WIDTH)
    both = {"last_hidden_state": (6, 77, 128), "penultimate_hidden_state": (6, 77, 128)}
    assert shapes(tiny, "text_encoder") == ({"input_ids": (6, 77)}, both)
    assert shapes(sdxl, "text_encoder") == ({"input_ids": (6, TOKENS)}, dict.fromkeys(both, state))
    assert shapes(sdxl, "text_encoder_2")[1] == {"text_embeds": (6, WIDTH), "penultimate_hidden_state": state}
    (ids,) = components.contract_of(tiny, "text_encoder", "fp16").inputs
    assert (ids.dtype, ids.below) == ("int32", 645), "TensorRT 8.6 has no int64"


def test_shapes_of_the_vaes_halves(tiny):
    assert shapes(tiny, "vae_decoder") == ({"latents": (6, 4, 9, 13)}, {"image": (6, 3, 72, 104)})
    assert shapes(tiny, "vae_encoder") == ({"image": (6, 3, 72, 104)}, {"moments": (6, 8, 9, 13)})


@pytest.mark.parametrize("component", SDXL)
def test_contracts_survive_json(sdxl, component):
    contract = components.contract_of(sdxl, component, "bf16")
    data = json.loads(json.dumps(contract.to_json()))
    assert Contract.from_json(data) == contract
    assert ("below" in data["inputs"][0]) == (component in components.TEXT_ENCODERS), "the UNet's stays what it was"


def test_an_encoder_with_an_attention_mask_is_refused(tmp_path):
    folder = factories.sd1_folder(tmp_path / "sd1")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_attention_mask": True}))
    with pytest.raises(ModelError, match="attention mask"):
        components.contract_of(resolve_model(ModelSpec(str(folder))), "text_encoder", "fp16")


def test_only_sdxls_vae_is_kept_out_of_fp16(tiny, sdxl):
    assert tiny.config("vae")["force_upcast"], "as every configuration that diffusers writes says; SD 1.x needs no more"
    assert {components.precision_of(tiny, name, "fp16") for name in SD} == {"fp16"}
    found = {name: components.precision_of(sdxl, name, "fp16") for name in SDXL}
    assert found == {**dict.fromkeys(SDXL, "fp16"), "vae_decoder": "fp32", "vae_encoder": "fp32"}
    assert components.precision_of(sdxl, "vae_decoder", "bf16") == "bf16"


def test_a_vae_that_was_mended_for_fp16_stays_in_fp16(sdxl, monkeypatch):
    monkeypatch.setattr(type(sdxl), "config", lambda self, part: {"force_upcast": False})
    assert components.precision_of(sdxl, "vae_decoder", "fp16") == "fp16"


def test_sizes_that_mean_nothing_to_a_component_are_always_the_same():
    assert components.sizes_of("unet", SIZES) == SIZES
    assert components.sizes_of("text_encoder", SIZES) == components.sizes_of("text_encoder", Sizes(2, 512, 512))
    assert components.sizes_of("vae_decoder", SIZES, images=3) == Sizes(3, 72, 104)


@pytest.mark.parametrize(("rows", "images"), [((2, 2, 2), (1, 1, 1)), ((1, 2, 8), (1, 1, 4)), ((3, 4, 5), (2, 2, 3))])
def test_the_batch_of_images_is_half_the_unets(rows, images):
    profile = Profile(Range(*rows), Range(256, 512, 768), Range.of(512), Range(77, 77, 231))
    decoder = components.profile_of("vae_decoder", profile)
    assert (decoder.batch, decoder.height, decoder.tokens) == (Range(*images), profile.height, Range.of(77))
    assert components.profile_of("unet", profile) == profile
    other = Profile(profile.batch, Range.of(1024), Range.of(1024))
    assert len(components.profiles_of("text_encoder", (profile, other))) == 1
    assert len(components.profiles_of("vae_encoder", (profile, other))) == 2


def test_a_components_sizes_are_said_without_those_that_mean_nothing(tiny):
    words = {name: components.contract_of(tiny, name, "fp32").describe(components.sizes_of(name, SIZES)) for name in SD}
    assert words["text_encoder"] == "batch 1"
    assert words["vae_encoder"] == "batch 1, height 72, width 104"
    assert words["unet"] == "batch 6, height 72, width 104, tokens 154"

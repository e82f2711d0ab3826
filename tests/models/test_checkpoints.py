"""Old key names: what `test_models.py` does not reach through whole files, above all Stable Diffusion 2.x."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import open_clip_tensors, small_text_encoder
from transformers import CLIPTextConfig, CLIPTextModel

from sdtrt.common.errors import ModelError
from sdtrt.models.checkpoints import check_checkpoint, convert, inferred_repo
from sdtrt.models.weights import TensorInfo

UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
CROSS_ATTENTION = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


def test_the_text_encoder_of_sd2_loses_its_last_layer():
    whole = small_text_encoder(num_hidden_layers=4)
    shorter = CLIPTextModel(CLIPTextConfig(**{**whole.config.to_dict(), "num_hidden_layers": 3}))
    stored = open_clip_tensors(whole, "cond_stage_model.model.")
    stored["cond_stage_model.model.text_projection"] = torch.zeros(32, 32)  # in the file, not in the model

    converted = convert("text_encoder", "single-file", stored, shorter)

    expected = {name: value for name, value in whole.state_dict().items() if "layers.3." not in name}
    assert converted.keys() == shorter.state_dict().keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_names_are_converted_without_data_too():
    encoder = small_text_encoder()
    stored = open_clip_tensors(encoder, "cond_stage_model.model.")
    empty = {name: torch.empty_like(value, device="meta") for name, value in stored.items()}
    converted = convert("text_encoder", "single-file", empty, encoder)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in encoder.state_dict().items()
    }
    assert all(value.is_meta for value in converted.values())


@pytest.mark.parametrize(
    ("width", "extra", "repo_id"),
    [
        (768, None, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (1024, None, "stabilityai/stable-diffusion-2-1"),
        (
            2048,
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
    ],
)
def test_the_configuration_is_that_of_the_kind_of_model(width, extra, repo_id):
    infos = {
        UNET_INPUT: TensorInfo("float16", (320, 4, 3, 3), 0),
        CROSS_ATTENTION: TensorInfo("float16", (640, width), 0),
    }
    if extra:
        infos[extra] = TensorInfo("float16", (1280,), 0)
    check_checkpoint(Path("model.safetensors"), infos)
    assert inferred_repo(infos) == repo_id


def test_unreadable_dtypes_are_named():
    with pytest.raises(ModelError, match="is stored as f4, which PyTorch can't read"):
        inferred_repo({UNET_INPUT: TensorInfo("f4", (320, 4, 3, 3), 0)})

"""SDXL's refiner: one text encoder, an aesthetic score among its time ids, and images from images alone."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import factories
import numpy as np
import pytest
import torch
from PIL import Image

import sdtrt
from sdtrt.common.errors import ModelError, UsageError
from sdtrt.exports.feeds import AESTHETIC_SCORE, seeded_feeds
from sdtrt.models.components import components_of, contract_of
from sdtrt.models.loading import load_parts
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.specs import GenerateSpec, ModelSpec, Sizes

SMALL = {**factories.SMALLEST["sdxl"], "sample_size": 8, "transformer_layers_per_block": 1}
SIZES = Sizes(2, 64, 64)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    """A folder in the form of stable-diffusion-xl-refiner-1.0; tests must not change it."""
    return factories.refiner_folder(tmp_path_factory.mktemp("refiner") / "refiner", **SMALL)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_it_has_the_second_text_encoder_alone(refiner):
    model = resolve_model(ModelSpec(str(refiner)))
    assert model.is_refiner
    assert model.parts == ("tokenizer_2", "text_encoder_2", "unet", "vae", "scheduler")
    assert components_of(model) == ("text_encoder_2", "unet", "vae_decoder", "vae_encoder")


def test_its_unet_takes_five_time_ids_and_the_encoders_own_pooled_width(refiner):
    contract = contract_of(resolve_model(ModelSpec(str(refiner))), "unet", "fp16")
    shapes = contract.input_shapes(SIZES)
    assert (shapes["text_embeds"], shapes["time_ids"]) == ((2, factories.TEXT_WIDTH), (2, 5))
    assert seeded_feeds(contract, SIZES)["time_ids"].tolist() == [[64, 64, 0, 0, AESTHETIC_SCORE]] * 2


@pytest.mark.parametrize("width", [24, 40])
def test_the_pooled_width_is_read_not_reckoned(width, tmp_path):
    """24 + 6 * 8 = 32 + 5 * 8: only the text encoder's configuration tells them apart."""
    total = width + 6 * factories.SDXL_TIME_WIDTH
    folder = factories.sdxl_folder(tmp_path / "model", **SMALL, projection_class_embeddings_input_dim=total)
    change_json(folder / "text_encoder_2/config.json", projection_dim=width)
    shapes = contract_of(resolve_model(ModelSpec(str(folder))), "unet", "fp16").input_shapes(SIZES)
    assert (shapes["text_embeds"], shapes["time_ids"]) == ((2, width), (2, 6))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 75}, "75 numbers of added conditioning"),
        ("unet", {"projection_class_embeddings_input_dim": 8}, "8 numbers of added conditioning"),
        ("unet", {"addition_time_embed_dim": None}, "time ids of None numbers"),
        ("unet", {"projection_class_embeddings_input_dim": 32 + 7 * 8}, "takes 7 time ids"),
        ("unet", {"cross_attention_dim": 64}, "takes text of width 64, where its text encoders make 32"),
        ("text_encoder_2", {"projection_dim": "x"}, "projection_dim = 'x'"),
    ],
)
def test_conditioning_that_no_pipeline_makes_is_refused(refiner, tmp_path, file, values, message):
    folder = tmp_path / "model"
    for config in refiner.rglob("*.*"):
        if config.is_file():
            (folder / config.relative_to(refiner)).parent.mkdir(parents=True, exist_ok=True)
            (folder / config.relative_to(refiner)).symlink_to(config)
    config = folder / file / "config.json"
    content = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(content | values))
    with pytest.raises(ModelError, match=message):
        resolve_model(ModelSpec(str(folder)))


def test_a_base_model_without_its_first_encoder_is_no_refiner(tmp_path):
    folder = factories.sdxl_folder(tmp_path / "model", **SMALL)
    change_json(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ModelError, match="takes text of width 64"):
        resolve_model(ModelSpec(str(folder)))
    change_json(folder / "model_index.json", text_encoder=[None, None], tokenizer=["transformers", "CLIPTokenizer"])
    with pytest.raises(ModelError, match="has no text_encoder"):
        resolve_model(ModelSpec(str(folder)))


def test_its_single_file_has_the_same_weights(refiner, tmp_path):
    file = factories.refiner_single_file(tmp_path / "refiner.safetensors", **SMALL)
    model = resolve_model(ModelSpec(str(file), config=str(refiner)))
    assert (model.missing, model.is_refiner) == ((), True)
    names = ("unet", "text_encoder_2", "vae")
    mine, theirs = (load_parts(one, names, torch.float16) for one in (model, resolve_model(ModelSpec(str(refiner)))))
    for name in names:
        own = theirs[name].state_dict()
        assert all(torch.equal(value, own[key]) for key, value in mine[name].state_dict().items()), name


def test_it_makes_no_image_from_text_alone(refiner, run):
    model = resolve_model(ModelSpec(str(refiner)))
    with pytest.raises(UsageError, match="is a refiner") as caught:
        resolve_request(GenerateSpec(prompts=("red",), model=model.spec, backend="torch"), model, None)
    assert "img2img" in caught.value.hint
    code, _, err = run("bench", "--model", str(refiner), "--task", "txt2img", "--backend", "torch")
    assert (code, "is a refiner" in err) == (2, True)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def plain_image(refiner: Path) -> np.ndarray:
    """What diffusers alone makes of it."""
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
        refiner, dtype=torch.float32, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        "a red circle",
        image=Image.open("init.png"),
        strength=0.8,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(1),
    )
    return np.asarray(result.images[0]).astype(int)


@pytest.mark.slow
def test_images_are_diffusers_own_with_engines_and_without(refiner, run, folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save("init.png")
    common = ("img2img", "--init-image", "init.png", "--seed", "1", "--steps", "2", "--prompt", "a red circle")
    expected = plain_image(refiner)
    for backend, more in (("torch", ()), ("onnxruntime", ("--component", "unet", "--component", "text_encoder_2"))):
        options = ("--model", str(refiner), "--backend", backend, "--precision", "fp32", *more)
        code, _, err = run(*common, *options, "--output", f"{backend}.png")
        assert code == 0, err
        assert np.abs(pixels_of(folder / f"{backend}.png") - expected).max() <= 2


def test_it_is_opened_for_images(refiner):
    pipe = sdtrt.load(str(refiner), task="img2img", backend="torch", progress=False)
    assert type(pipe) is diffusers.StableDiffusionXLImg2ImgPipeline
    pipe.close()


@pytest.mark.slow
def test_it_is_verified_from_a_picture_and_shown(refiner, run, folder):
    """With a tiny VAE, whose engines are soon built; the others are those of the test before, where that ran."""
    pytest.importorskip("skimage")
    vae = factories.vae_folder(folder / "tiny", factories.small_tiny_vae())
    common = ("--model", str(refiner), "--vae", str(vae))
    options = (
        "--backend",
        "onnxruntime",
        "--precision",
        "fp32",
        "--steps",
        "2",
        "--output",
        "verified",
        "--json",
        "-q",
    )
    code, out, err = run("verify", *common, *options)
    assert code == 0, err
    report = json.loads(out)
    assert report["strength"] == 0.8
    assert len(report["timesteps"]) == 1, "of two steps one runs"
    code, out, _ = run("inspect", *common, "--json")
    assert (code, [part["name"] for part in json.loads(out)["parts"]][:2]) == (0, ["tokenizer_2", "text_encoder_2"])

"""SDXL in full, beside plain diffusers: a refiner behind its model, and what it is told of sizes."""

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
from sdtrt.common.errors import UsageError
from sdtrt.pipeline.recipes.reading import read_recipe
from sdtrt.specs import GenerateSpec, ModelSpec, RefinerSpec, SizeConditioning

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SMALL = {**factories.SMALLEST["sdxl"], "sample_size": 8, "transformer_layers_per_block": 1}
SIZE = {"height": 64, "width": 80}
WORDS = ("-p", "red", "-n", "blue", "--seed", "5", "--steps", "5", "--height", "64", "--width", "80")
LEVELS = 2  # of 255


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return factories.sdxl_folder(tmp_path_factory.mktemp("base") / "base", **SMALL)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    """As stable-diffusion-xl-refiner-1.0."""
    return factories.refiner_folder(tmp_path_factory.mktemp("refiner") / "refiner", seed=3, **SMALL)


def plain(cls, folder):
    pipe = cls.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ensemble(base, refiner, share=0.8, image=None, **options) -> np.ndarray:
    """What diffusers alone makes of both, as its documentation does it."""
    generator = torch.Generator().manual_seed(5)
    first = plain(
        diffusers.StableDiffusionXLPipeline if image is None else diffusers.StableDiffusionXLImg2ImgPipeline, base
    )
    common = {"num_inference_steps": 5, "generator": generator, "guidance_scale": 7.5, **options}
    start = SIZE if image is None else {"image": image, "strength": 0.8}
    latents = first("red", negative_prompt="blue", **start, **common, denoising_end=share, output_type="latent").images
    second = plain(diffusers.StableDiffusionXLImg2ImgPipeline, refiner)
    made = second("red", negative_prompt="blue", image=latents, denoising_start=share, **common)
    return np.asarray(made.images[0]).astype(int)


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.slow
def test_a_refiner_takes_over_as_in_diffusers(base, refiner, run, folder):
    options = ("-m", str(base), "--refiner", str(refiner), "--backend", "torch", "--original-size", "512x256")
    code, _, err = run("txt2img", *WORDS, *options, "--crop", "8,16", "--target-size", "100x200", "-o", "a.png")
    assert code == 0, err
    sizes = {"original_size": (256, 512), "crops_coords_top_left": (16, 8), "target_size": (200, 100)}
    assert np.array_equal(pixels_of("a.png"), ensemble(base, refiner, **sizes))
    text = Image.open("a.png").text
    assert "Refiner: refiner, Refiner switch at: 0.8" in text["parameters"]
    told = json.loads(text["sdtrt"])
    assert (told["refiner"]["name"], told["original_size"], told["crop"]) == (str(refiner), [512, 256], [8, 16])
    options = read_recipe(Path("a.png")).options
    assert (options["refiner"], options["refiner_start"], options["crop"]) == (str(refiner), 0.8, "8,16")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.79])
def test_a_refiner_after_img2img(base, refiner, run, folder, share):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)).save("init.png")
    options = ("-m", str(base), "--refiner", str(refiner), "--refiner-start", str(share), "--backend", "torch")
    code, _, err = run("img2img", *WORDS, *options, "-i", "init.png", "-o", "a.png")
    assert code == 0, err
    expected = ensemble(base, refiner, share, Image.open("init.png"))
    assert np.array_equal(pixels_of("a.png"), expected)
    code, _, err = run("img2img", "--from", "a.png", "-o", "b.png")
    assert code == 0, err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.slow
@pytest.mark.feature("SDXL's refiner, `--refiner`", "sdxl", "onnxruntime")
def test_a_refiner_in_engines(base, refiner, run, folder):
    options = ("-m", str(base), "--refiner", str(refiner), "--backend", "onnxruntime")
    code, out, err = run("txt2img", *WORDS, *options, "-o", "a.png", "--json")
    assert code == 0, err
    engines = json.loads(out)["engines"]
    assert {"unet", "vae_decoder", "refiner_unet", "refiner_text_encoder_2"} <= engines.keys()
    assert engines["vae_decoder"] == engines["refiner_vae_decoder"] or engines["unet"] != engines["refiner_unet"]
    assert np.abs(pixels_of("a.png") - ensemble(base, refiner)).max() <= LEVELS
    options = (*options, "--refiner-start", "0.5", "--original-size", "300x300", "--no-build")
    code, _, err = run("txt2img", *WORDS, *options, "-o", "b.png")
    assert code == 0, f"turning what is a number builds nothing: {err}"
    assert np.abs(pixels_of("b.png") - ensemble(base, refiner, 0.5, original_size=(300, 300))).max() <= LEVELS
    assert run("txt2img", *WORDS, *options, "--num-images", "2", "--batch-size", "1", "-o", "two")[0] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--refiner-start", "1"), "above 0 and below 1"),
        (("--original-size", "big"), "--original-size takes two numbers"),
        (("--crop", "1"), "--crop takes two numbers"),
    ],
)
def test_wrong_numbers_are_refused(base, refiner, run, folder, wrong, message):
    code, _, err = run("txt2img", *WORDS, "-m", str(base), "--refiner", str(refiner), *wrong)
    assert (code, message in err) == (2, True), err
    assert len(err.strip().splitlines()) == 2


def test_models_of_other_kinds_are_refused_before_anything_is_read(base, refiner, smallest, run, folder, monkeypatch):
    from sdtrt.models import loading

    monkeypatch.setattr(loading, "load_unet", lambda *_: pytest.fail("a UNet was loaded"))
    for model, second, message in (
        (smallest, refiner, "is no SDXL, whose refiner"),
        (base, smallest, "is no model of SDXL that changes images"),
    ):
        code, _, err = run("txt2img", *WORDS, "-m", str(model), "--refiner", str(second), "--backend", "torch", "-q")
        assert (code, message in err) == (2, True), err
        assert len(err.strip().splitlines()) == 2
    code, _, err = run("txt2img", *WORDS, "-m", str(smallest), "--crop", "0,0", "--backend", "torch", "-q")
    assert (code, "is no SDXL, and is not told of sizes" in err) == (2, True), err


def test_a_mask_and_a_refiner_are_refused(tmp_path):
    with pytest.raises(UsageError, match="a mask covers a part"):
        GenerateSpec(
            ("x",),
            init_image=tmp_path,
            mask=tmp_path,
            refiner=RefinerSpec(ModelSpec("x")),
            conditioning=SizeConditioning(),
        )


# In Python: diffusers' own arguments on accelerated pipelines


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
@pytest.mark.feature("SDXL's refiner, on live pipelines", "sdxl", "onnxruntime inductor")
@pytest.mark.feature("SDXL's size, crop and score conditioning", "sdxl", "onnxruntime inductor")
def test_accelerated_pipelines_take_diffusers_own_arguments(base, refiner, tmp_path, backend):
    expected = ensemble(base, refiner, original_size=(32, 48), crops_coords_top_left=(4, 8))
    first = plain(diffusers.StableDiffusionXLPipeline, base)
    second = plain(diffusers.StableDiffusionXLImg2ImgPipeline, refiner)
    parts = ("unet",) if backend == "inductor" else None
    for pipe in (first, second) if backend == "onnxruntime" else (second,):  # a compile less
        sdtrt.accelerate(pipe, backend=backend, precision="fp32", components=parts, engine_dir=tmp_path, **SIZE)
    generator = torch.Generator().manual_seed(5)
    common = {"negative_prompt": "blue", "num_inference_steps": 5, "generator": generator, "guidance_scale": 7.5}
    sizes = {"original_size": (32, 48), "crops_coords_top_left": (4, 8)}
    latents = first("red", **SIZE, **common, **sizes, denoising_end=0.8, output_type="latent").images
    made = second("red", image=latents, denoising_start=0.8, **common, **sizes).images[0]
    assert np.abs(np.asarray(made).astype(int) - expected).max() <= LEVELS
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    options = {"image": noise, "strength": 0.8, "num_inference_steps": 2}
    options["output_type"] = "latent"

    def scored(score):
        generator = torch.Generator().manual_seed(1)
        return second("red", **options, aesthetic_score=score, generator=generator).images

    made = [scored(score) for score in (1.0, 9.0)]
    sdtrt.restore(second)
    for score, one in zip((1.0, 9.0), made, strict=True):
        assert (scored(score) - one).abs().max() <= 1e-4
    assert (made[0] - made[1]).abs().max() > 1e-4, "the score is an input"

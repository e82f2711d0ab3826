"""`--upscale`: a second pass at a larger size, beside plain diffusers' two pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import factories
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrt.common.errors import ModelError, UsageError
from sdtrt.pipeline.inputs.images import parse_parameters
from sdtrt.pipeline.recipes.reading import read_recipe
from sdtrt.pipeline.runs import upscaling
from sdtrt.specs import GenerateSpec, UpscaleSpec
from sdtrt.specs.stages import steps_of_pass

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LEVELS = 2  # of 255
WORDS = ("-p", "red", "-n", "blue", "--seed", "5", "--steps", "3", "--height", "64", "--width", "80")
LARGE = ("--upscale", "1.5", "--upscale-steps", "2", "--upscale-strength", "0.6")
MANY = 4  # of which 2 run at strength 0.6
KINDS = ("StableDiffusion", "StableDiffusionXL")


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    small = {**factories.SMALLEST["sdxl"], "sample_size": 8, "transformer_layers_per_block": 1}
    return factories.sdxl_folder(tmp_path_factory.mktemp("models") / "xl", **small)


def plain(cls, folder):
    pipe = cls.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def two_passes(folder, kind: str, upscaler: str, many: int = MANY, strength: float = 0.6) -> np.ndarray:
    """What diffusers alone makes of it, as web UIs do: the same seed for the noise of both passes."""
    first = plain(getattr(diffusers, f"{kind}Pipeline"), folder)
    second = plain(getattr(diffusers, f"{kind}Img2ImgPipeline"), folder)
    common = {"negative_prompt": "blue", "guidance_scale": 7.5}
    form = "latent" if upscaler == "latent" else "pil"
    generator = torch.Generator().manual_seed(5)
    made = first(
        "red", **common, height=64, width=80, num_inference_steps=3, output_type=form, generator=generator
    ).images
    if upscaler == "latent":
        start = torch.nn.functional.interpolate(made, (12, 15), mode="bilinear")
    else:
        start = made[0].resize((120, 96), Image.Resampling.LANCZOS)
    options = {"num_inference_steps": many, "strength": strength, "generator": torch.Generator().manual_seed(5)}
    return np.asarray(second("red", image=start, **common, **options).images[0]).astype(int)


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def folder_of(kind, smallest, xl):
    return smallest if kind == "StableDiffusion" else xl


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_the_second_pass_is_diffusers_own(kind, upscaler, smallest, xl, run, folder):
    model = folder_of(kind, smallest, xl)
    options = ("-m", str(model), "--backend", "torch", "--upscaler", upscaler)
    code, _, err = run("txt2img", *WORDS, *LARGE, *options, "-o", "a.png")
    assert code == 0, err
    assert np.array_equal(pixels_of("a.png"), two_passes(model, kind, upscaler))
    text = Image.open("a.png").text
    fields = parse_parameters(text["parameters"]).fields
    assert fields["Size"] == "80x64"
    names = ("Hires upscale", "Hires steps", "Hires upscaler", "Denoising strength")
    assert [fields[name] for name in names] == ["1.5", "2", upscaler.capitalize(), "0.6"]
    told = json.loads(text["sdtrt"])["upscale"]
    assert (told["width"], told["height"], told["strength"]) == (120, 96, 0.6)
    code, _, err = run("txt2img", "--from", "a.png", "-o", "b.png")
    assert code == 0, err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
@pytest.mark.feature("A second, larger pass (`--upscale`)", "sd1", "onnxruntime")
def test_engines_of_both_sizes_are_found_or_built_once(upscaler, smallest, run, folder):
    options = ("-m", str(smallest), "--backend", "onnxruntime", "--upscaler", upscaler)
    code, out, err = run("txt2img", *WORDS, *LARGE, *options, "-o", "a.png", "--json")
    assert code == 0, err
    assert np.abs(pixels_of("a.png") - two_passes(smallest, "StableDiffusion", upscaler)).max() <= LEVELS
    engines = set(json.loads(out)["engines"])
    assert ("vae_decoder" in engines, "upscale_vae_encoder" in engines) == ((upscaler != "latent",) * 2)
    assert {"unet", "upscale_unet", "upscale_vae_decoder"} <= engines
    other = ("--upscale", "2", "--upscale-steps", "3", "--upscale-strength", "0.4", "--no-build")
    code, _, err = run("txt2img", *WORDS, *other, *options, "--num-images", "2", "--batch-size", "1", "-o", "two")
    assert code == 0, err
    assert {Image.open(path).size for path in Path("two").iterdir()} == {(160, 128)}


@pytest.mark.slow
def test_a_model_enlarges_pixels(smallest, run, folder, monkeypatch):
    """By spandrel where it is here; else by what stands for its model, which has its call alone."""
    Path("times4.safetensors").touch()
    monkeypatch.setattr(upscaling, "find_spec", lambda _: object())
    seen = []

    def times4(pixels):
        seen.append((tuple(pixels.shape), pixels.dtype, float(pixels.min()) >= 0, float(pixels.max()) <= 1))
        return torch.nn.functional.interpolate(pixels, scale_factor=4, mode="nearest")

    monkeypatch.setattr(upscaling, "_load", lambda spec, device: times4)
    options = ("-m", str(smallest), "--backend", "torch", "--upscaler", "times4.safetensors")
    code, _, err = run("txt2img", *WORDS, *LARGE, *options, "-o", "a.png")
    assert code == 0, err
    assert seen == [((1, 3, 64, 80), torch.float32, True, True)]
    assert Image.open("a.png").size == (120, 96)
    assert "Hires upscaler: times4" in Image.open("a.png").text["parameters"]


@pytest.mark.slow
def test_spandrel_reads_models(folder):
    spandrel = pytest.importorskip("spandrel", exc_type=ImportError)  # it wants torchvision
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN import RRDBNet

    net = RRDBNet(num_filters=8, num_blocks=1, scale=4)
    save_file({key: one.contiguous() for key, one in net.state_dict().items()}, "x4.safetensors")
    model = upscaling._load(UpscaleSpec(2, "x4.safetensors"), torch.device("cpu"))
    assert isinstance(model, spandrel.ImageModelDescriptor)
    assert upscaling._by_model(model, Image.new("RGB", (16, 8)), torch.device("cpu")).size == (64, 32)
    Path("bad.safetensors").write_bytes(b"bad")
    with pytest.raises(ModelError, match="can't be read"):
        upscaling._load(UpscaleSpec(2, "bad.safetensors"), torch.device("cpu"))


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.01), (20, 0.7), (3, 1.0), (50, 0.35), (7, 0.29)])
def test_as_many_steps_run_as_are_asked_for(steps, strength):
    many = steps_of_pass(steps, strength)
    assert int(many * strength) == steps


def test_a_web_uis_hires_fix_is_an_upscale(tmp_path):
    text = tmp_path / "x.txt"
    fields = "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.45, RNG: CPU"
    text.write_text(f"red\n{fields}, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, Hires resize: 0x0")
    recipe = read_recipe(text)
    names = ("upscale", "upscale_steps", "upscaler", "upscale_strength")
    assert [recipe.options[name] for name in names] == [2, 10, "latent", 0.45]
    assert ("strength" in recipe.options, recipe.left) == (False, ("Hires resize: 0x0",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--upscale", "1"), "above 1 and at most 8"),
        (("--upscale", "2", "--upscale-strength", "0"), "from 0.01 to 1"),
        (("--upscale", "2", "--upscale-steps", "0"), "from 1 to 999"),
        (("--upscale", "2", "--upscale-steps", "900", "--upscale-strength", "0.5"), "of a schedule of 1800"),
        (("--upscale", "2", "--upscaler", "gone.safetensors"), "neither latent, lanczos nor a file"),
        (("--upscale", "2", "--upscaler", "x4.pth"), "is a pickle file"),
        (("--upscale", "2", "--upscaler", "notes.txt"), "is no file of a model"),
        (("--upscale", "8", "--width", "16000", "--height", "64"), "more than 16384 pixels"),
    ],
)
def test_wrong_second_passes_are_refused(smallest, run, folder, wrong, message):
    for name in ("x4.pth", "notes.txt"):
        Path(name).touch()
    code, _, err = run("txt2img", *WORDS, "-m", str(smallest), "--backend", "torch", "-q", *wrong)
    assert (code in (1, 2), message in err) == (True, True), err
    assert sum(line.startswith(("error", "hint")) for line in err.splitlines()) == 2


def test_models_want_spandrel(smallest, run, folder, monkeypatch):
    Path("x4.safetensors").touch()
    monkeypatch.setattr(upscaling, "find_spec", lambda _: None)
    words = ("--upscale", "2", "--upscaler", "x4.safetensors", "--backend", "torch", "-q")
    code, _, err = run("txt2img", *WORDS, "-m", str(smallest), *words)
    assert (code, "need spandrel, which is not installed" in err) == (2, True)
    assert 'pip install "sdtrt[upscale]"' in err


def test_an_upscale_is_for_text_alone(tmp_path):
    spec = GenerateSpec(("x",), upscale=UpscaleSpec(2))
    with pytest.raises(UsageError, match="from text alone"):
        replace(spec, init_image=tmp_path / "x.png")

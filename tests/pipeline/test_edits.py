"""Edits as a text says (instruct-pix2pix): UNets of eight channels and three rows an image, beside plain diffusers."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import factories
import numpy as np
import pytest
import torch
from PIL import Image

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.common.errors import EngineError, ModelError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import components
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.images import read_metadata, read_parameters
from sdtrt.pipeline.opening.engines import build_command
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.pipeline.runs.generate import generate
from sdtrt.reports.verify import verify
from sdtrt.specs import GenerateSpec, ModelSpec, Profile, Sizes, VerifySpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SLOW = pytest.mark.slow
LEVELS = 2  # of 255
TOLERANCE = 1e-4  # of latents in fp32 on the CPU


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """The folder of a model of a kind that edits images."""
    made = {}

    def find(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("models") / f"edits-{kind}"
            made[kind] = editing_folder(path, kind)
        return made[kind]

    return find


def editing_folder(path, kind):
    write = factories.sdxl_folder if kind == "sdxl" else factories.sd1_folder
    write(path, **{**factories.UNET_CONFIGS[kind], **factories.SMALLEST[kind], "in_channels": 8})
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = index["_class_name"].replace("Pipeline", "InstructPix2PixPipeline")
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def spec(tmp_path, model_of):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 64), Image.Resampling.BICUBIC).save(tmp_path / "init.png")
    given = {"init_image": tmp_path / "init.png", "edit": True, "output": tmp_path / "out", "negative_prompt": "blue"}
    return GenerateSpec(("make it red",), ModelSpec(str(model_of("sd1"))), "torch", steps=2, seed=5, **given)


def own_pipeline(folder, kind):
    """The untouched pipeline, loaded by diffusers itself."""
    name = f"StableDiffusion{'XL' * (kind == 'sdxl')}InstructPix2PixPipeline"
    more = {} if kind == "sdxl" else {"safety_checker": None}
    pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(spec, kind, **options):
    size = {"height": 64, "width": 80} if kind == "sdxl" else {}
    given = {"image": Image.open(spec.init_image), "num_inference_steps": spec.steps, "negative_prompt": "blue", **size}
    given |= {"guidance_scale": spec.guidance_scale, "image_guidance_scale": spec.image_guidance_scale}
    return {"prompt": spec.prompts[0], **given, "generator": torch.Generator().manual_seed(spec.seed), **options}


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def picture(spec, directory):
    return pixels_of(generate(spec, directory, QUIET).images[0].path)


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=SLOW), pytest.param("sdxl", marks=SLOW)])
def test_it_is_the_picture_of_diffusers_own_pipeline(kind, spec, model_of, directory):
    spec = replace(spec, model=ModelSpec(str(model_of(kind))), image_guidance_scale=1.2)
    expected = own_pipeline(model_of(kind), kind)(**arguments(spec, kind)).images[0]
    np.testing.assert_array_equal(picture(spec, directory), np.asarray(expected))


@SLOW
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.feature("Edits by instruct-pix2pix models (`--edit`)", "sd1 sdxl", "onnxruntime")
def test_engines_give_the_picture_of_diffusers_own_pipeline(kind, spec, model_of, engine_dir):
    plain = own_pipeline(model_of(kind), kind)
    spec = replace(spec, model=ModelSpec(str(model_of(kind))), backend="onnxruntime")
    directory = EngineDirectory(engine_dir)
    for changed in ({}, {"image_guidance_scale": 2.0}, {"guidance_scale": 1.0}):
        one = replace(spec, **changed)
        report = generate(one, directory, QUIET)
        assert {"unet", "vae_encoder", "vae_decoder"} <= set(report.engines)
        expected = np.asarray(plain(**arguments(one, kind)).images[0]).astype(int)
        assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS, changed
    given = {"height": 64, "width": 80, "task": "pix2pix", "backend": "onnxruntime", "engine_dir": engine_dir}
    pipe = sdtrt.load(str(model_of(kind)), **given, progress=False)
    assert type(pipe) is type(plain)
    found, expected = (one(**arguments(spec, kind), output_type="latent").images for one in (pipe, plain))
    assert float((found - expected).abs().max()) <= TOLERANCE
    pipe.close()


@SLOW
def test_several_at_once_are_those_made_alone(spec, engine_dir):
    spec, directory = replace(spec, num_images=2, backend="onnxruntime"), EngineDirectory(engine_dir)
    alone = generate(spec, directory, QUIET).images
    together = generate(replace(spec, batch_size=2), directory, QUIET).images
    for one, other in zip(alone, together, strict=True):
        assert one.seed == other.seed
        assert np.abs(pixels_of(one.path) - pixels_of(other.path)).max() <= LEVELS
    assert np.abs(pixels_of(alone[0].path) - pixels_of(alone[1].path)).max() > LEVELS


@SLOW
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.feature("Edits by instruct-pix2pix models (`--edit`)", "sd1 sdxl", "onnxruntime")
def test_a_live_pipeline_is_accelerated(kind, spec, model_of, engine_dir):
    pipe = own_pipeline(model_of(kind), kind)
    plain = pipe(**arguments(spec, kind), output_type="latent").images
    sdtrt.accelerate(pipe, height=64, width=80, backend="onnxruntime", engine_dir=engine_dir, progress=False)
    assert all(sdtrt.status(pipe)[name].is_in_engine for name in ("unet", "vae_encoder", "vae_decoder"))
    found = pipe(**arguments(spec, kind), output_type="latent").images
    assert float((found - plain).abs().max()) <= TOLERANCE
    sdtrt.restore(pipe)
    assert torch.equal(pipe(**arguments(spec, kind), output_type="latent").images, plain)


@SLOW
def test_an_engine_is_verified_on_an_edit(model_of, engine_dir, tmp_path):
    image = GenerateSpec(("red",), ModelSpec(str(model_of("sd1"))), "onnxruntime", steps=2, height=64, width=80)
    report = verify(VerifySpec(image, output=tmp_path), EngineDirectory(engine_dir), QUIET)
    report.raise_on_failure()


@SLOW
def test_the_command_edits_and_the_picture_says_so(spec, run, tmp_path):
    given = ("--init-image", str(spec.init_image), "--edit", "--image-cfg-scale", "1.25", "--seed", "5", "--steps", "2")
    given += ("--model", spec.model.name, "--backend", "torch", "--output", str(tmp_path / "a.png"))
    code, _, err = run("img2img", "make it red", *given)
    assert code == 0, err
    details, fields = read_metadata(tmp_path / "a.png").details, read_parameters(tmp_path / "a.png").fields
    assert (details["edit"], details["image_guidance_scale"], details["strength"]) == (True, 1.25, None)
    assert fields["Image CFG scale"] == "1.25"
    assert "Denoising strength" not in fields


def test_an_edit_has_three_rows_an_image_and_the_other_parts_one(spec, directory):
    model = resolve_model(spec.model)
    request = resolve_request(replace(spec, backend="onnxruntime"), model, QUIET)
    assert (request.sizes.batch, request.engines.sizes_of("text_encoder").batch) == (3, 1)
    assert resolve_request(replace(spec, guidance_scale=1.0), model, QUIET).sizes.batch == 1
    profile = Profile.of(Sizes(3, 64, 80))
    assert components.profile_of("text_encoder", profile, 3).batch.max == 1
    inductor = replace(request, backend="inductor").engines
    assert "--batch 3 " in build_command(inductor, directory)


# What is refused


def test_a_model_that_edits_makes_no_other_images(spec, smallest, directory):
    with pytest.raises(UsageError, match="edits images as a text says, and makes none") as caught:
        generate(replace(spec, edit=False), directory, QUIET)
    assert caught.value.hint == "use sdtrt img2img --edit"
    with pytest.raises(UsageError, match="makes images: it edits none") as caught:
        generate(replace(spec, model=ModelSpec(str(smallest))), directory, QUIET)
    assert "instruct-pix2pix" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_guidance_scale": 0.5}, r"image guidance scale must be a number from 1 up, got 0\.5"),
        ({"image_guidance_scale": 2.0, "edit": False}, "is about --edit, which is off"),
        ({"init_image": None}, "there is no image to edit"),
        ({"mask": "mask.png"}, r"mask mask\.png has no effect on edits"),
    ],
)
def test_wrong_edits_are_refused(changes, message, spec):
    with pytest.raises(UsageError, match=message) as caught:
        replace(spec, **changes)
    assert caught.value.hint


@SLOW
def test_its_unet_takes_eight_channels(model_of, tmp_path, directory):
    wrong = editing_folder(tmp_path / "wrong", "sd1")
    config = json.loads((wrong / "unet" / "config.json").read_text())
    (wrong / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 4}))
    with pytest.raises(ModelError, match="takes 4 channels where the vae makes 4"):
        resolve_model(ModelSpec(str(wrong)))
    parts = own_pipeline(model_of("sd1"), "sd1").components
    plain = diffusers.StableDiffusionPipeline(**{**parts, "requires_safety_checker": False})
    with pytest.raises(EngineError, match="takes 8 channels and gives 4"):
        sdtrt.accelerate(plain, height=64, width=80, engine_dir=directory.path, progress=False)

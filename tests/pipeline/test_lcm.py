"""Latent consistency models: UNets that take the guidance scale as an input, beside plain diffusers."""

from __future__ import annotations

import json

import factories
import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from test_controlnet import small_controlnet

import sdtrt
from sdtrt.common.console import QUIET, Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.live.swap import swapped_of
from sdtrt.pipeline.runs.generate import generate
from sdtrt.specs import GenerateSpec, ModelSpec
from sdtrt.specs.contract import unet_contract

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
SMALLEST = factories.SMALLEST["sd1"]
WIDTH = 16  # of a guidance scale's embedding
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return factories.lcm_folder(tmp_path_factory.mktemp("lcm"))


@pytest.fixture
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(cls=LatentConsistencyModelPipeline, kind="sd1", **parts):
        unet = factories.small_unet(kind, **factories.SMALLEST[kind], time_cond_proj_dim=WIDTH)
        given = {"tokenizer": tokenizer, "unet": unet, "scheduler": LCMScheduler(**factories.LCM_SCHEDULE)}
        return factories.live_pipeline(cls, kind, **{**given, **parts})

    return made


@pytest.fixture
def accelerate(directory):
    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": directory.path, "progress": False, "components": ("unet",)}
        return sdtrt.accelerate(pipe, **{**given, **options})

    return call


def latents(pipe, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "latent"}
    if "Img2Img" not in type(pipe).__name__:
        given |= {"height": 64, "width": 64}
    return pipe(**{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    return float((found - expected).abs().max())


def names(directory):
    return {entry.name for entry in directory.entries("engine")}


def test_the_guidance_scale_is_an_input_of_the_contract():
    config = dict(factories.small_unet("sdxl", **factories.SMALLEST["sdxl"], time_cond_proj_dim=WIDTH).config)
    inputs = unet_contract(config, "fp16").inputs
    assert [(one.name, one.dtype, one.dims) for one in inputs][-1] == ("timestep_cond", "float16", ("batch", WIDTH))
    plain = unet_contract({**config, "time_cond_proj_dim": None}, "fp16")
    assert plain.inputs == inputs[:-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "kind", "options"),
    [
        (LatentConsistencyModelPipeline, "sd1", {}),
        (LatentConsistencyModelImg2ImgPipeline, "sd1", {"image": PICTURE, "strength": 0.5}),
        (StableDiffusionPipeline, "sd1", {"negative_prompt": "a blue star"}),
        (StableDiffusionImg2ImgPipeline, "sd1", {"image": PICTURE, "strength": 0.7}),
        (StableDiffusionXLPipeline, "sdxl", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.feature("Latent consistency models", "sd1 sdxl", "onnxruntime")
def test_pipelines_give_plain_diffusers_latents_at_every_guidance_scale_by_one_engine(
    make, accelerate, directory, cls, kind, options
):
    plain, pipe = make(cls, kind), accelerate(make(cls, kind))
    built, seen = names(directory), []
    for scale in (1.0, 4.0, 8.5):
        found = latents(pipe, guidance_scale=scale, **options)
        assert differ(found, latents(plain, guidance_scale=scale, **options)) <= TOLERANCE
        seen.append(found)
    assert differ(seen[0], seen[2]) > 100 * TOLERANCE, "it has an effect"
    assert names(directory) == built
    (engine,) = swapped_of(pipe)["unet"].engines
    assert engine.session.contract.inputs[-1].name == "timestep_cond"


@pytest.mark.slow
def test_a_call_without_a_guidance_scale_is_as_diffusers_own(make, accelerate):
    plain, pipe = make().unet, accelerate(make(), batch_size=2).unet
    given = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 77, 32)
    with torch.no_grad():
        assert differ(pipe(*given).sample, plain(*given).sample) <= TOLERANCE
        one = torch.randn(1, WIDTH)
        assert differ(pipe(*given, timestep_cond=one).sample, plain(*given, timestep_cond=one).sample) <= TOLERANCE


def picture(folder, tmp_path, directory, **options):
    """The picture of a command, in ONNX Runtime."""
    given = {"prompts": ("a red circle",), "steps": 3, "seed": 5, "height": 64, "width": 64}
    spec = GenerateSpec(
        model=ModelSpec(str(folder)), backend="onnxruntime", output=tmp_path / "one.png", **{**given, **options}
    )
    report = generate(spec, directory, QUIET)
    return np.asarray(Image.open(tmp_path / "one.png")).astype(int), report


def expected(cls, folder, **options):
    pipe = cls.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = {} if "image" in options else {"height": 64, "width": 64}
    given = {"prompt": "a red circle", "num_inference_steps": 3, **size, **options}
    image = pipe(**given, generator=torch.Generator().manual_seed(5)).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.slow
@pytest.mark.feature("Latent consistency models", "sd1", "onnxruntime")
def test_the_commands_run_the_models_own_pipelines(folder, tmp_path, directory):
    """With one row of a UNet a picture, whatever the guidance scale."""
    found, report = picture(folder, tmp_path, directory, guidance_scale=6.0)
    assert np.abs(found - expected(LatentConsistencyModelPipeline, folder, guidance_scale=6.0)).max() <= 2
    assert report.settings["scheduler"]["class"] == "LCMScheduler"
    PICTURE.save(tmp_path / "start.png")
    options = {"guidance_scale": 6.0, "strength": 0.4}
    found, _ = picture(folder, tmp_path, directory, init_image=tmp_path / "start.png", overwrite=True, **options)
    plain = expected(LatentConsistencyModelImg2ImgPipeline, folder, image=PICTURE, **options)
    assert np.abs(found - plain).max() <= 2
    weighted, _ = picture(folder, tmp_path, directory, guidance_scale=6.0, prompt_syntax="webui", overwrite=True)
    assert np.abs(weighted - expected(LatentConsistencyModelPipeline, folder, guidance_scale=6.0)).max() <= 2
    parameters = Image.open(tmp_path / "one.png").text["parameters"]
    assert "Sampler: LCM, CFG scale: 6" in parameters
    scheduled, _ = picture(folder, tmp_path, directory, scheduler="euler", overwrite=True)
    other = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    assert scheduled.shape == found.shape
    assert other.unet.config.time_cond_proj_dim == WIDTH


def test_what_it_can_not_do_is_known_before_anything_is_built(folder, tmp_path, run):
    PICTURE.save(tmp_path / "start.png")
    engines = tmp_path / "engines"
    common = ["--model", str(folder), "--engine-dir", str(engines), "--backend", "onnxruntime", "a star", "--steps"]
    start = ["--init-image", str(tmp_path / "start.png"), "--strength", "0.5"]
    code, _, err = run("img2img", *common, "30", *start)
    assert (code, "LCMScheduler runs at most 25 steps at strength 0.5, got 30" in err) == (2, True)
    code, _, err = run("txt2img", *common, "51")
    assert (code, "use --steps 50" in err) == (2, True)
    assert not engines.exists()


@pytest.mark.slow
def test_verify_and_bench_know_the_guidance_scale(folder, tmp_path, directory, run):
    common = ["--model", str(folder), "--engine-dir", str(directory.path), "--backend", "onnxruntime", "--json"]
    common += ["--steps", "2", "--height", "64", "--width", "64"]
    code, out, err = run("verify", *common, "--output", str(tmp_path / "report"))
    assert code == 0, err
    code, out, err = run("bench", *common, "--task", "img2img", "--strength", "0.5", "--repeats", "1", "--warmups", "1")
    assert code == 0, err
    (row,) = [row for row in json.loads(out)["rows"] if row["baseline"] is None]
    assert (row["unet_calls"], row["steps"]) == (2, 2)


@pytest.mark.slow
def test_a_negative_prompt_has_no_effect_and_that_is_said(folder, tmp_path, directory, capsys):
    spec = GenerateSpec(
        ("a star",),
        ModelSpec(str(folder)),
        "onnxruntime",
        negative_prompt="x",
        steps=1,
        height=64,
        width=64,
        seed=1,
        output=tmp_path / "a.png",
    )
    generate(spec, directory, Console())
    assert "takes no negative prompt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_controlnet_has_its_effect_beside_the_guidance_scale(make, accelerate):
    plain, pipe = (
        make(StableDiffusionControlNetPipeline, controlnet=small_controlnet(factories.small_unet("sd1", **SMALLEST)))
        for _ in range(2)
    )
    accelerate(pipe)
    seen = []
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 8.0}, {"controlnet_conditioning_scale": 0.2}):
        seen.append(latents(pipe, image=PICTURE, **options))
        assert differ(seen[-1], latents(plain, image=PICTURE, **options)) <= TOLERANCE
    assert differ(seen[0], seen[1]) > 100 * TOLERANCE
    assert len(swapped_of(pipe)["unet"].engines) == 1

"""Pictures of few steps: distilled models and LoRAs without guidance, tiny VAEs; all beside plain diffusers."""

from __future__ import annotations

import factories
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from peft import LoraConfig
from PIL import Image
from test_lora import random_adapter

import sdtrt
from sdtrt.backends import registry
from sdtrt.common.console import QUIET
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.specs import GenerateSpec, ModelSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TARGETS = ["to_q", "to_v", "conv1"]
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
CALL = {"num_inference_steps": 4, "output_type": "pt"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few-steps")
    common = {"dtype": torch.float32, "norm_num_groups": 8}
    return {
        "sd1": factories.sd1_folder(folder / "sd1", **factories.SMALLEST["sd1"], **common),
        "sdxl": factories.sdxl_folder(folder / "sdxl", **factories.SMALLEST["sdxl"], **common),
    }


def differ(found, expected):
    return float((found - expected).abs().max())


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 2), (1.0, 2), (1.01, 4), (7.5, 4)])
def test_the_unet_runs_a_row_an_image_without_guidance(smallest, scale, rows):
    """An engine of a fixed size is for so many rows: none for more is looked for, or built."""
    spec = GenerateSpec(("a", "b"), ModelSpec(str(smallest)), "onnxruntime", guidance_scale=scale, batch_size=2)
    request = resolve_request(spec, resolve_model(spec.model), QUIET).engines
    assert (request.sizes_of("unet").batch, request.sizes_of("vae_decoder").batch) == (rows, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "scheduler", "call"),
    [
        ("sd1", ["--scheduler", "lcm", "--guidance-scale", "1"], (LCMScheduler, {"clip_sample": False}), {}),
        ("sd1", ["--scheduler", "LCM", "--guidance-scale", "2"], (LCMScheduler, {"clip_sample": False}), {}),
        (
            "sdxl",
            ["--guidance-scale", "0", "--timestep-spacing", "trailing"],
            (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
            {},
        ),
        (
            "sdxl",
            ["--scheduler", "TCD", "--guidance-scale", "0", "--eta", "0.5"],
            (TCDScheduler, {"clip_sample": False}),
            {"eta": 0.5},
        ),
    ],
    ids=["lcm-lora", "lcm-lora-guided", "lightning-lora", "hyper-lora"],
)
@pytest.mark.feature("Without guidance: one row an image (Turbo, Lightning)", "sd1 sdxl", "onnxruntime")
@pytest.mark.feature("LoRA, `--lora`", "sd1 sdxl", "onnxruntime")
def test_a_lora_of_few_steps_gives_plain_diffusers_picture(
    models, engine_dir, tmp_path, run, kind, options, scheduler, call
):
    plain = DiffusionPipeline.from_pretrained(models[kind], torch_dtype=torch.float32, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    layers = random_adapter(plain.unet, LoraConfig(r=4, target_modules=TARGETS), 1)
    type(plain).save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    request = ["--model", str(models[kind]), "--engine-dir", str(engine_dir), "--backend", "onnxruntime", "--seed", "3"]
    request += [
        "--height",
        "64",
        "--width",
        "64",
        "--output",
        str(tmp_path / "x.png"),
        "--overwrite",
        "--lora",
        str(tmp_path / "lora"),
    ]
    plain.load_lora_weights(tmp_path / "lora")
    plain.scheduler = scheduler[0].from_config(plain.scheduler.config, **scheduler[1])
    given = {"guidance_scale": float(options[options.index("--guidance-scale") + 1]), "height": 64, "width": 64, **call}
    for steps in (1, 4):
        code, _, err = run("txt2img", "a star", *options, "--steps", str(steps), *request)
        assert code == 0, err
        generator = torch.Generator().manual_seed(3)
        expected = plain("a star", num_inference_steps=steps, generator=generator, **given).images[0]
        found = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(found - np.asarray(expected).astype(int)).max() <= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
@pytest.mark.parametrize(
    ("cls", "kind"), [(StableDiffusionImg2ImgPipeline, "sd1"), (StableDiffusionXLImg2ImgPipeline, "sdxl")]
)
@pytest.mark.feature("Tiny VAEs", "sd1 sdxl", "onnxruntime inductor")
def test_both_halves_of_a_live_tiny_vae_run_in_engines(cls, kind, backend, tokenizer, engine_dir):
    if (reason := registry.get(backend).why_not()) is not None:
        pytest.skip(reason.message)
    pipe, plain = (factories.live_pipeline(cls, kind, tokenizer) for _ in range(2))
    halves = ("vae_decoder", "vae_encoder")
    sdtrt.accelerate(
        pipe, height=64, width=64, backend=backend, engine_dir=engine_dir, components=halves, progress=False
    )
    assert all(sdtrt.status(pipe)[half].is_in_engine for half in halves)
    options = {"image": PICTURE, "strength": 0.75, "guidance_scale": 0.0, **CALL}
    found, expected = (one("a", generator=torch.Generator().manual_seed(1), **options).images for one in (pipe, plain))
    assert differ(found, expected) <= 2 / 255
    sdtrt.restore(pipe)
    assert torch.equal(pipe("a", generator=torch.Generator().manual_seed(1), **options).images, expected)


@pytest.mark.slow
@pytest.mark.feature("Tiny VAEs", "sdxl", "onnxruntime")
def test_a_tiny_vae_of_taesds_own_size_gives_plain_diffusers_picture(tokenizer, engine_dir):
    def made():
        with factories.seeded(0):
            vae = AutoencoderTiny().eval().requires_grad_(False)
        return factories.live_pipeline(StableDiffusionXLPipeline, "sdxl", tokenizer, vae=vae)

    pipe, plain = made(), made()
    options = {"backend": "onnxruntime", "engine_dir": engine_dir, "components": ("vae_decoder",), "progress": False}
    sdtrt.accelerate(pipe, height=64, width=64, guidance=False, **options)
    call = {"height": 64, "width": 64, "guidance_scale": 0.0, **CALL}
    found, expected = (one("a", generator=torch.Generator().manual_seed(1), **call).images for one in (pipe, plain))
    assert differ(found, expected) <= 2 / 255

"""Previews: small pictures of what is being made, by a tiny VAE, on plain pipelines and in commands."""

from __future__ import annotations

import factories
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

import sdtrt
from sdtrt.common.errors import UsageError
from sdtrt.pipeline.runs.previews import Preview, variance_factor
from sdtrt.pipeline.runs.saving import PreviewFile

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny VAE's folder, as TAESD lies on the hub."""
    return factories.vae_folder(tmp_path_factory.mktemp("tiny"), factories.small_tiny_vae(seed=5))


@pytest.fixture
def pipe(tmp_path):
    tokenizer = factories.write_tokenizer(tmp_path / "tokenizer")
    return factories.live_pipeline(StableDiffusionPipeline, "sd1", tokenizer)


def pixels(vae, latents):
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).mul(255).round().byte()[0].permute(1, 2, 0).numpy()


def test_a_pipeline_shows_its_latents_every_few_steps_and_gives_the_same_picture(pipe, tiny):
    vae, shown, latents = factories.small_tiny_vae(seed=5).half().float(), {}, {}
    look = sdtrt.preview(str(tiny), lambda step, pictures: shown.update({step: pictures}), every=2)

    def both(one, step, timestep, tensors):
        latents[step + 1] = tensors["latents"].clone()
        return look(one, step, timestep, tensors)

    call = {"num_inference_steps": 5, "height": 64, "width": 64, "output_type": "latent"}
    made = [
        pipe("a star", generator=torch.Generator().manual_seed(1), callback_on_step_end=one, **call).images
        for one in (None, both)
    ]
    assert torch.equal(*made)
    assert list(shown) == [2, 4]
    with torch.no_grad():
        assert all(np.array_equal(np.asarray(one), pixels(vae, latents[step])) for step, (one,) in shown.items())


def test_latents_that_only_get_noise_are_brought_back_to_a_vaes_variance():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert variance_factor(scheduler) == 1.0  # no step was taken
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    scheduler.scale_model_input(latents, scheduler.timesteps[0])
    assert (latents * variance_factor(scheduler)).std() == pytest.approx(1, abs=0.02)
    assert variance_factor(DDIMScheduler()) == 1.0


def test_large_latents_make_a_small_picture():
    look = Preview(factories.small_tiny_vae(), print, 1)
    pictures = look.decode(torch.randn(2, 4, 16, 128))
    assert [one.size for one in pictures] == [(512, 64)] * 2
    with pytest.raises(UsageError, match="every 0 steps"):
        sdtrt.preview(factories.small_tiny_vae(), print, every=0)


@pytest.mark.slow
def test_a_command_keeps_a_file_that_shows_it_until_the_picture_is_there(smallest, tiny, folder, run, monkeypatch):
    seen = []
    own = PreviewFile.show

    def show(file, pictures):
        own(file, pictures)
        seen.append((file.path, np.asarray(Image.open(file.path))))

    monkeypatch.setattr(PreviewFile, "show", show)
    (folder / "star.preview.png").write_bytes(b"somebody's own")
    request = ["txt2img", "a star", "--model", str(smallest), "--backend", "torch", "--steps", "4", "--seed", "1"]
    request += ["--height", "64", "--width", "64", "--output"]
    code, _, err = run(*request, "star.png", "--preview", str(tiny), "--preview-every", "2")
    assert code == 0, err
    assert "preview: star.preview-2.png" in err
    assert [path.name for path, _ in seen] == ["star.preview-2.png"] * 2
    assert not np.array_equal(seen[0][1], seen[1][1])
    assert sorted(path.name for path in folder.iterdir()) == ["star.png", "star.preview.png"]
    assert run(*request, "plain.png")[0] == 0
    assert (folder / "plain.png").read_bytes() == (folder / "star.png").read_bytes()


@pytest.mark.slow
def test_what_is_no_tiny_vae_for_the_model_is_refused_before_anything_is_loaded(smallest, tmp_path, folder, run):
    other = factories.vae_folder(tmp_path / "other", factories.small_tiny_vae(latent_channels=16))
    for name, message in (
        (smallest, "is no tiny VAE, and a full one is too slow"),
        (other, "takes 4 channels where the vae"),
        ("nowhere/at/all", "there is no VAE at"),
    ):
        code, _, err = run("txt2img", "a star", "--model", str(smallest), "--backend", "torch", "--preview", str(name))
        assert (code, message in err, "--vae" in err) == (1, True, False), err
    code, _, err = run("txt2img", "a star", "--preview", "x", "--preview-every", "0")
    assert (code, "preview-every must be at least 1, got 0" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.feature("Previews (`preview`, `--preview`)", "sd1", "onnxruntime")
def test_a_pipelines_own_tiny_vae_shows_it_in_its_engine(pipe, smallest, tiny, folder, run, monkeypatch, engine_dir):
    sdtrt.accelerate(
        pipe, height=64, width=64, components=("vae_decoder",), engine_dir=engine_dir, backend="onnxruntime"
    )
    built, shown = len(list(engine_dir.iterdir())), []
    look = sdtrt.preview(pipe.vae, lambda step, pictures: shown.append(pictures[0].size), every=1)
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 1.0}
    pipe("a star", callback_on_step_end=look, **call)
    assert shown == [(64, 64)] * 2
    assert sdtrt.status(pipe)["vae_decoder"].is_in_engine
    assert len(list(engine_dir.iterdir())) == built
    seen = []
    monkeypatch.setattr(PreviewFile, "show", lambda file, pictures: seen.append(np.asarray(pictures[0]).astype(int)))
    options = ["--backend", "onnxruntime", "--component", "vae_decoder", "--vae", str(tiny), "--preview", str(tiny)]
    request = ["--model", str(smallest), "--steps", "2", "--height", "64", "--width", "64", "--preview-every", "1"]
    code, _, err = run("txt2img", "a star", *options, *request, "--scheduler", "euler", "--output", "own.png")
    assert code == 0, err
    assert np.abs(seen[-1] - np.asarray(Image.open("own.png")).astype(int)).max() <= 1, "the last step's is the picture"

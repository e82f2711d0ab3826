"""VAE tiling and slicing on accelerated pipelines and in commands, beside diffusers' own."""

from __future__ import annotations

import diffusers
import factories
import numpy as np
import pytest
import torch
from PIL import Image

import sdtrt
from sdtrt.live import swap
from sdtrt.pipeline.parts import tiles

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LEVELS = 2  # of 255
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A model whose VAE has tiles of 64 pixels."""
    folder = factories.sd1_folder(tmp_path_factory.mktemp("models") / "tiled", **factories.SMALL)
    config = folder / "vae/config.json"
    config.write_text(config.read_text().replace('"sample_size": 128', '"sample_size": 64'))
    return folder


def plain(folder, cls=diffusers.StableDiffusionPipeline):
    pipe = cls.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_small_vaes_are_cut_as_diffusers_cuts_them():
    """With the module itself for an engine, to the last bit: the cutting is diffusers' own."""
    for vae in (factories.small_vae(sample_size=32), factories.small_tiny_vae()):
        vae.use_tiling = vae.use_slicing = True
        if isinstance(vae, diffusers.AutoencoderTiny):
            vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
        for component, sample in (("vae_decoder", torch.randn(2, 4, 6, 9)), ("vae_encoder", torch.randn(2, 3, 48, 72))):
            seen = []

            def compute(tile, vae=vae, component=component, seen=seen):
                seen.append(tuple(tile.shape[-2:]))
                return tiles.in_pytorch(vae, component, tile)

            method = swap.METHODS[component]
            made = tiles.in_tiles(vae, component, compute, sample, return_dict=False)[0]
            own = getattr(vae, method)(sample, return_dict=False)[0]
            values = [getattr(one, "parameters", one) for one in (made, own)]
            assert torch.equal(*values)
            assert len(seen) >= 2 * 4, "images of a batch by themselves, each in tiles"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
@pytest.mark.feature("VAE tiling and slicing", "sd1", "onnxruntime inductor")
def test_tiles_go_through_engines_and_pictures_are_plain_diffusers(folder_of, tmp_path, backend, capsys):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 112, 3), dtype=np.uint8))
    options = {"image": image, "strength": 0.5, "num_inference_steps": 2, "num_images_per_prompt": 2}
    pictures = []
    for accelerated in (False, True):
        pipe = plain(folder_of, diffusers.StableDiffusionImg2ImgPipeline)
        if accelerated:
            parts = ("vae_decoder", "vae_encoder") if backend == "onnxruntime" else ("vae_decoder",)  # a compile less
            sdtrt.accelerate(
                pipe, backend=backend, precision="fp32", components=parts, height=64, width=64, engine_dir=tmp_path
            )
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
        made = pipe("red", **options, generator=torch.Generator().manual_seed(1)).images
        pictures.append(np.stack([np.asarray(one) for one in made]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= LEVELS
    told = str(sdtrt.status(pipe))
    assert "in tiles of 64x64 pixels; PyTorch has those that no engine fits" in told
    engines = sdtrt.status(pipe)["vae_decoder"].engines
    assert len(engines) == 1, "what is left at the edges builds nothing"
    assert ("PyTorch runs tiles of" in capsys.readouterr().err) is (backend == "inductor")
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert "tiles" not in str(sdtrt.status(pipe))


@pytest.mark.slow
def test_a_picture_that_is_one_tile_is_made_whole(folder_of, tmp_path):
    pipe = plain(folder_of)
    sdtrt.accelerate(pipe, backend="onnxruntime", precision="fp32", components=("vae_decoder",), engine_dir=tmp_path)
    latents = torch.randn(1, 4, 8, 8)
    whole = pipe.vae.decode(latents).sample
    pipe.vae.enable_tiling()
    assert torch.equal(pipe.vae.decode(latents).sample, whole)
    larger = torch.randn(1, 4, 12, 8)
    made = pipe.vae.decode(larger).sample
    sdtrt.restore(pipe)
    assert (made - pipe.vae.decode(larger).sample).abs().max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.feature("`--vae-tiling` (tiles in PyTorch)", "sd1", "onnxruntime")
def test_a_command_decodes_large_images_in_tiles(folder_of, run, folder):
    words = ("-p", "red", "--seed", "5", "--steps", "2", "--height", "96", "--width", "112", "-m", str(folder_of))
    made = {}
    for tiling in (False, True):
        pipe = plain(folder_of)
        if tiling:
            pipe.vae.enable_tiling()
        options = {"num_inference_steps": 2, "height": 96, "width": 112, "generator": torch.Generator().manual_seed(5)}
        made[tiling] = np.asarray(pipe("red", **options).images[0]).astype(int)
    assert not np.array_equal(made[False], made[True])
    for backend, levels in (("torch", 0), ("onnxruntime", LEVELS)):
        parts = ("--component", "unet", "--component", "vae_decoder") if backend == "onnxruntime" else ()
        code, _, err = run("txt2img", *words, "--backend", backend, *parts, "--vae-tiling", "-o", f"{backend}.png")
        assert code == 0, err
        assert np.abs(np.asarray(Image.open(f"{backend}.png")).astype(int) - made[True]).max() <= levels
        assert "in tiles of 64x64 pixels (--vae-tiling)" in err
    assert "engine of the vae_decoder" not in err, "tiles are PyTorch's"
    small = ("-p", "red", "--height", "64", "--width", "64", "--steps", "1", "-m", str(folder_of), "--backend", "torch")
    code, _, err = run("txt2img", *small, "--vae-tiling", "-o", "small.png")
    assert (code, "is no larger than one of its tiles" in err) == (0, True), err
    code, _, err = run("txt2img", "--from", "torch.png", "-o", "again.png")
    assert code == 0, err
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("torch.png")))

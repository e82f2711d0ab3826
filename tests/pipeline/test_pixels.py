"""Pictures between host and device: the numbers are those of diffusers, to the last bit, with and without engines."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor, VaeImageProcessor
from PIL import Image

from sdtrt.common.console import QUIET
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.open import open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts import pixels
from sdtrt.pipeline.runs.call import PipelineCall
from sdtrt.specs import ModelSpec, Sizes

CPU = torch.device("cpu")
PROCESSOR = VaeImageProcessor(vae_scale_factor=8)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def every_half():
    """Every number in 0 to 1 that fp16 has, as pixels of a picture."""
    bits = torch.arange(int(torch.tensor(1.0, dtype=torch.float16).view(torch.int16)) + 1, dtype=torch.int16)
    numbers = bits.view(torch.float16)
    return torch.cat([numbers, numbers.new_zeros(-len(numbers) % (2 * 3 * 64))]).view(2, 3, -1, 64)


def around_halves():
    """fp32 at the middles between levels, where rounding goes to the even one, and on both sides of these."""
    middles = (torch.arange(255, dtype=torch.float32) + 0.5) / 255
    near = [middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(1.0))]
    return torch.cat(near).view(1, 3, 5, 51)


@pytest.mark.parametrize(
    "given",
    [
        every_half(),
        every_half().bfloat16(),
        around_halves(),
        torch.rand(3, 3, 24, 40).to(memory_format=torch.channels_last),
    ],
    ids=["fp16", "bf16", "fp32", "channels-last"],
)
def test_levels_are_those_of_diffusers(given):
    wanted = PROCESSOR.numpy_to_pil(PROCESSOR.pt_to_numpy(given))
    found = pixels.to_pictures(given)
    assert [one.mode for one in found] == [one.mode for one in wanted]
    assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_start_is_the_tensor_that_diffusers_makes_of_it(dtype):
    """And lies as that does, which may decide how a convolution adds up."""
    picture = noise(40, 24)
    picture.paste(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB"))
    assert pixels.fits(picture, 8)
    wanted = PROCESSOR.preprocess(picture).to(dtype)
    found = PROCESSOR.preprocess(pixels.to_device(picture, CPU)).to(dtype)
    assert torch.equal(found, wanted)
    assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())


@pytest.mark.parametrize(
    ("picture", "multiple"), [(noise(40, 28), 8), (noise(40, 24), 16), (noise(40, 24).convert("L"), 8)]
)
def test_what_diffusers_would_change_is_left_to_it(picture, multiple):
    assert not pixels.fits(picture, multiple)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    "start",
    [noise(64, 64), pytest.param(noise(72, 64), marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)],
)
def test_a_call_gives_the_pictures_of_diffusers_own_call(smallest, engine_dir, start, monkeypatch):
    model = resolve_model(ModelSpec(str(smallest)))
    width = 64 if start is None else start.width
    spec = PipelineSpec(model, "torch", "fp32", Sizes(4, 64, width), steps=2, scheduler="euler", images=2)
    call = PipelineCall(("red", "on blue"), (1, 2), guidance_scale=7.5, start=start, strength=0.9)
    with open_pipeline(replace(spec, img2img=start is not None), EngineDirectory(engine_dir), QUIET) as opened:
        found = call.run(opened, output_type="pil")
        again = call.run(opened, output_type="np")
        monkeypatch.setattr(pixels, "fits", lambda *_: False)  # diffusers gets the picture itself
        own = opened.pipe(**call._arguments(opened), output_type="pil").images
    assert len(found) == 2
    for one, other, numbers in zip(found, own, again, strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
        assert (np.asarray(one) == (numbers * 255).round().astype("uint8")).all()


COPIES = {"itself": lambda one: one, "deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("denormalized", [None, [True, True], [False, True]])
def test_a_processor_that_rounds_on_the_device_gives_what_it_gave(output_type, denormalized, how):
    given = torch.randn(2, 3, 16, 24).half().clamp(0, 1) if denormalized == [False, True] else torch.randn(2, 3, 16, 24)
    plain, kept = VaeImageProcessor(vae_scale_factor=8), VaeImageProcessor(vae_scale_factor=8)
    pixels.round_on_device(kept)
    kept = COPIES[how](kept)
    assert isinstance(kept, VaeImageProcessor)
    assert kept.config == plain.config
    found, wanted = (one.postprocess(given, output_type, do_denormalize=denormalized) for one in (kept, plain))
    assert type(found) is type(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert type(one) is type(other)
        assert np.array_equal(np.asarray(one), np.asarray(other))
    pixels.let_go(kept)
    assert type(kept) is VaeImageProcessor


def test_grey_pictures_and_other_processors_stay_as_they_are():
    kept = VaeImageProcessor(vae_scale_factor=8)
    pixels.round_on_device(kept)
    (grey,) = kept.postprocess(torch.rand(1, 1, 16, 24))
    assert (grey.mode, grey.size) == ("L", (24, 16))
    for other in (IPAdapterMaskProcessor(), None):
        before = type(other)
        pixels.round_on_device(other)
        pixels.let_go(other)
        assert type(other) is before

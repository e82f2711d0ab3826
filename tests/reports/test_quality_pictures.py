"""What savings lose of pictures that go by other pictures: a ControlNet's map, an IP-Adapter's prompt."""

from __future__ import annotations

import json
from dataclasses import replace

import factories
import ip_adapters
import numpy as np
import pytest
from PIL import Image
from test_controlnet import small_controlnet

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.quality_runs import make_pictures, opened_way, settle_way
from sdtrt.reports.verify_runs import read_shown
from sdtrt.specs import ControlSpec, GenerateSpec, ImagePromptSpec, ModelSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LEVELS = 2  # of 255
QUICK = ("--steps", "4", "--height", "64", "--width", "64", "--backend", "torch", "--precision", "fp32", "--json")
JUDGED = ("--metrics", "latents,psnr,ssim")


@pytest.fixture(scope="module")
def made(tmp_path_factory, smallest):
    """A ControlNet, an IP-Adapter and a picture for each, beside a small model."""
    root = tmp_path_factory.mktemp("shown")
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    small_controlnet(unet, seed=7).half().save_pretrained(root / "net")
    ip_adapters.write(root / "adapters", unet)
    for name, seed in (("map", 0), ("prompt", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


def adapter_of(made):
    return made / "adapters" / "models" / "ip-adapter_sd15.safetensors"


@pytest.mark.slow
def test_the_pictures_are_those_of_generate(made, smallest, directory, tmp_path):
    """In batches, with each picture's own seed; others without the two."""
    image = GenerateSpec(
        ("red on blue", "a star"),
        ModelSpec(str(smallest), ip_adapters=(str(adapter_of(made)),)),
        "torch",
        steps=2,
        seed=3,
        height=64,
        width=64,
        batch_size=2,
        ip_images=(ImagePromptSpec(made / "prompt.png", 0.7),),
        controls=(ControlSpec(str(made / "net"), made / "map.png", scale=0.8),),
    )
    own = [replace(image, prompts=(text,), seed=seed) for seed, text in enumerate(image.prompts, 3)]
    generated = [
        sdtrt.generate(replace(one, output=tmp_path / "out"), engine_dir=directory.path, progress=False).images[0]
        for one in own
    ]
    wanted = [np.asarray(Image.open(one.path).convert("RGB"), dtype=int) for one in generated]
    model = resolve_model(image.model)
    found = {}
    for name, asked in {
        "both": image,
        "no map": replace(image, controls=()),
        "less": replace(image, ip_images=(ImagePromptSpec(made / "prompt.png", 0.1),)),
    }.items():
        way = settle_way(asked, model, directory, QUIET, read_shown(asked, QUIET))
        with opened_way(way, directory, QUIET) as opened:
            found[name] = [255 * one.pixels for one in make_pictures(way, opened, name, QUIET)]
    apart = {
        name: [np.abs(one - right).max() for one, right in zip(pixels, wanted, strict=True)]
        for name, pixels in found.items()
    }
    assert max(apart["both"]) <= LEVELS
    assert min(apart["no map"] + apart["less"]) > 2 * LEVELS


@pytest.mark.slow
def test_verify_and_bench_take_them(made, smallest, tmp_path, run):
    given = ("--model", str(smallest), *QUICK, *JUDGED, "--engine-dir", str(tmp_path / "engines"))
    control = ("--controlnet", str(made / "net"), "--control-image", str(made / "map.png"))
    adapter = ("--ip-adapter", str(adapter_of(made)), "--ip-image", f"{made / 'prompt.png'}:0.7")
    shown = (*control, *adapter)
    code, out, err = run("verify", "--against", "exact", "--quality", "high", *given, *shown, "-o", str(tmp_path))
    assert code == 0, err
    report = json.loads(out)
    assert report["controlnets"][0]["image"] == str(made / "map.png")
    assert report["ip_adapters"][0]["scale"] == 0.7
    assert 1e-5 < report["mean"]["relative_l2"] < 0.5
    code, out, err = run("bench", "--quality", "high", "--repeats", "1", "--warmups", "1", *given, *shown)
    assert code == 0, err
    timed = json.loads(out)
    assert timed["rows"][1]["mean"]["relative_l2"] == pytest.approx(report["mean"]["relative_l2"], rel=1e-4)
    assert timed["controlnets"] == report["controlnets"]


def test_an_adapter_is_of_pictures_that_are_judged(run, made):
    code, _, told = run("bench", "--ip-adapter", str(adapter_of(made)), "--ip-image", str(made / "prompt.png"))
    assert (code, "--ip-adapter is of pictures that are judged" in told) == (2, True)
    assert "add --quality all" in told

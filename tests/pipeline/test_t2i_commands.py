"""T2I-Adapters on the command line, beside diffusers' own pipelines; wrong ones, refused before anything heavy."""

from __future__ import annotations

import json

import diffusers
import factories
import numpy as np
import pytest
import torch
from PIL import Image
from test_t2i_adapter import KINDS, small_adapter

from sdtrt.pipeline.inputs.images import read_metadata, read_parameters

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SLOW = pytest.mark.slow
LEVELS = 2  # of 255
WORDS = ("--steps", "2", "--seed", "5", "--height", "64", "--width", "80")


@pytest.fixture(scope="module")
def made(tmp_path_factory, smallest):
    """A folder with models, adapters for them, one in grey, and pictures."""
    root = tmp_path_factory.mktemp("t2i")
    (root / "sd1").symlink_to(smallest)
    for name, kind, seed, config in (
        ("a", "sd1", 5, {}),
        ("b", "sd1", 6, {}),
        ("xl", "sdxl", 7, {}),
        ("c", "sd1-whole", 8, {}),
    ):
        small_adapter(seed, **{**KINDS[kind][2], **config}).save_pretrained(root / name)
    small_adapter(9, **KINDS["sd1"][2], in_channels=1).save_pretrained(root / "grey")
    for name, seed in (("one", 0), ("other", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    (root / "file.safetensors").touch()
    return root


@pytest.fixture(scope="module")
def large(made):
    """An SDXL model in that folder."""
    return factories.sdxl_folder(made / "sdxl", **{**factories.UNET_CONFIGS["sdxl"], **KINDS["sdxl"][1]})


@pytest.fixture
def paint(run, made, tmp_path, engine_dir, monkeypatch):
    """`txt2img`, which makes pictures of the prompts; gives their paths, or the two lines of its error."""
    monkeypatch.chdir(made)

    def call(*words, prompts=("red",), model="sd1", backend="torch"):
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        given += ["--model", model, "--backend", backend, "--engine-dir", str(engine_dir), "--output", f"{tmp_path}/"]
        code, out, err = run("txt2img", *given, *WORDS, *words)
        return out.split() if code == 0 else err.splitlines()[-2:]

    return call


def diffusers_own(made, kind, names, pictures, scales, prompts=("red",)):
    """What diffusers' own pipeline makes of the same request, one picture a prompt."""
    cls, more = KINDS[kind][0], {} if kind == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    found = [diffusers.T2IAdapter.from_pretrained(made / name) for name in names]
    adapter = diffusers.MultiAdapter(found) if len(found) > 1 else found[0]
    pipe = cls.from_pretrained(made / kind, adapter=adapter, torch_dtype=torch.float32, **more)
    pipe.set_progress_bar_config(disable=True)
    maps = [
        Image.open(made / f"{one}.png").convert("L" if name == "grey" else "RGB")
        for name, one in zip(names, pictures, strict=True)
    ]
    options = {
        "image": maps if len(maps) > 1 else maps[0],
        "height": 64,
        "width": 80,
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
    }
    options["adapter_conditioning_scale"] = scales if len(scales) > 1 else scales[0]
    return [
        np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(5), **options).images[0]).astype(int)
        for prompt in prompts
    ]


def levels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def pair(name, picture):
    """An adapter and its picture, as options."""
    return "--t2i-adapter", name, "--t2i-image", f"{picture}.png"


@SLOW
def test_a_picture_is_that_of_diffusers_and_says_what_it_was_made_of(paint, made):
    (path,) = paint(*pair("a:0.7", "one"))
    (expected,) = diffusers_own(made, "sd1", ["a"], ["one"], [0.7])
    np.testing.assert_array_equal(levels(path), expected)
    (told,) = read_metadata(path).details["t2i_adapters"]
    assert (told["name"], told["scale"], told["image"]["name"]) == ("a", 0.7, "one.png")
    assert read_parameters(path).fields["ControlNet 0"].startswith("Module: none, Model: a, Weight: 0.7")
    (plain,) = paint()
    assert np.abs(levels(plain) - expected).max() > 10 * LEVELS


@SLOW
@pytest.mark.parametrize(
    ("kind", "names", "scales"), [("sd1", ["a", "b"], [0.7, 0.4]), ("sd1", ["grey"], [1.0]), ("sdxl", ["xl"], [0.8])]
)
@pytest.mark.feature("T2I-Adapter, `--t2i-adapter`", "sd1 sdxl", "onnxruntime")
@pytest.mark.usefixtures("large")
def test_engines_give_the_pictures_of_diffusers_and_nothing_that_is_turned_builds_one(kind, names, scales, paint, made):
    pictures, prompts = ["one", "other"][: len(names)], ("red", "a blue star")
    given = [
        word for name, scale, one in zip(names, scales, pictures, strict=True) for word in pair(f"{name}:{scale}", one)
    ]
    expected = diffusers_own(made, kind, names, pictures, scales, prompts)
    paths = paint(*given, "--batch-size", "2", prompts=prompts, model=kind, backend="onnxruntime")
    for path, own in zip(paths, expected, strict=True):
        assert np.abs(levels(path) - own).max() <= LEVELS
    turned = [word for name, one in zip(names, ["other", "one"], strict=False) for word in pair(f"{name}:0.2", one)]
    assert (
        len(paint(*turned, "--batch-size", "2", "--no-build", prompts=prompts, model=kind, backend="onnxruntime")) == 2
    )


@SLOW
def test_an_engine_is_built_ahead_and_a_picture_made_anew(paint, run, made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    words = ("--backend", "onnxruntime", "--engine-dir", str(tmp_path / "engines"))
    error, hint = paint(*pair("a", "one"), *words, "--no-build")
    assert "no onnxruntime fp32 engine for the text_encoder, unet, vae_decoder of sd1" in error
    assert "--t2i-adapter a " in hint
    code, out, _ = run("build", "--model", "sd1", "--t2i-adapter", "b", *words)
    assert (code, len(out.split())) == (0, 4)
    (path,) = paint(*pair("a:0.7", "one"), *words, "--no-build")
    code, out, err = run("txt2img", "--from", path, *words, "--no-build", "--output", str(tmp_path / "again.png"))
    assert (code, out.strip()) == (0, str(tmp_path / "again.png")), err
    np.testing.assert_array_equal(levels(out.strip()), levels(path))
    code, out, _ = run("txt2img", "--from", path, *words, "--t2i-adapter", "b", "--t2i-image", "other.png", "--json")
    (told,) = json.loads(out)["t2i_adapters"]
    assert (code, told["name"], told["image"]["name"]) == (0, "b", "other.png")


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("--t2i-adapter", "a"), "1 T2I-Adapter and 0 pictures for them were given", "--t2i-image FILE"),
        (pair("a:nan", "one"), "the scale of a must be a number, got nan", "use 1, or 0.8"),
        (pair("xl", "one"), "the T2I-Adapter xl is for another model than sd1: its list of channels is", "SD 1.x, 2.x"),
        (
            pair("file.safetensors", "one"),
            "file.safetensors is a file, which does not say what kind",
            "folder or a hub",
        ),
        (pair("sd1", "one"), "sd1 is no T2I-Adapter's folder: it has no config.json", "pass a T2I-Adapter's folder"),
        (pair("none", "one"), "there is no T2I-Adapter at none", "pass a T2I-Adapter's folder or a hub id"),
        (pair("a", "missing"), "t2i image missing.png does not exist", "give --t2i-image a PNG"),
        ((*pair("a", "one"), "--upscale", "2"), "T2I-Adapter a and --upscale don't go together", "leave --upscale or"),
        (
            (*pair("a", "one"), "--controlnet", "x/y", "--control-image", "one.png"),
            "T2I-Adapter a and --controlnet don't go together: diffusers has no such pipeline",
            "leave --controlnet or --t2i-adapter out",
        ),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(words, error, hint, paint):
    found = paint(*words)
    assert error in found[0]
    assert hint in found[1]


@SLOW
@pytest.mark.usefixtures("large")
def test_a_size_that_an_adapter_does_not_divide_is_refused(paint):
    error, hint = paint(*pair("xl", "one"), "--width", "72", model="sdxl")
    assert "width must be a multiple of 16 for xl, got 72" in error
    assert "use --width 64" in hint

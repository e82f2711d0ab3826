"""Deep caching in the commands, `generate` and `load`: what is built, said, stored in pictures, and taken back."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import closing
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
import torch_engines
from PIL import Image

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.images import read_metadata
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.pipeline.recipes.reading import read_recipe
from sdtrt.specs import DeepCaching, GenerateSpec, ModelSpec, Savings

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "repository"), str(ROOT / "scripts")]

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SIZE = ("--height", "64", "--width", "64", "--steps", "12", "--seed", "5")
EVERY_THIRD = Savings(caching=DeepCaching(3))


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """A model in fp32, as the engines that PyTorch runs here take no other weights."""
    path = tmp_path_factory.mktemp("models") / "fp32"
    return factories.sd1_folder(path, dtype=torch.float32, **factories.SMALLEST["sd1"])


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    """The folder of the built-in model's engines, which are built once."""
    return tmp_path_factory.mktemp("built-in")


@pytest.fixture
def engines(monkeypatch, tmp_path):
    """The engine directory of a test, whose engines PyTorch runs in the place of Inductor's."""
    torch_engines.instead_of_inductor(monkeypatch)
    return EngineDirectory(tmp_path / "engines")


@pytest.fixture
def make(run, smallest, engines, tmp_path):
    """Make a picture by `txt2img`; returns what it says of itself, and what it told people meanwhile."""

    def call(*options, name="one.png"):
        target = tmp_path / name
        where = ("--engine-dir", str(engines.path), "--output", str(target), "--overwrite", "--json")
        code, out, err = run("txt2img", "a red circle", *options, *where)
        assert code == 0, err
        return json.loads(out), " ".join(err.split()), target

    return lambda *options, **more: call("--model", str(smallest), "--backend", "inductor", *SIZE, *options, **more)


def unets(directory):
    return sorted(entry.name for entry in directory.entries("engine") if entry.name.startswith("unet"))


def test_a_picture_says_how_it_was_made_and_is_made_anew_from_that(make, run, engines, tmp_path):
    report, told, target = make("--cache-interval", "3")
    assert "deep caching: 1 step in 3 is whole (uniform), depth 1" in told
    assert report["deep_caching"] == {"interval": 3, "depth": 1, "schedule": "uniform"}
    assert {"unet", "unet_shallow"} <= report["engines"].keys()
    built = unets(engines)
    assert len(built) == 2
    metadata = read_metadata(target)
    assert "Cache interval: 3, Cache depth: 1, Cache schedule: uniform" in metadata.parameters
    again = tmp_path / "again.png"
    where = ("--engine-dir", str(engines.path), "--output", str(again))
    code, _, err = run("txt2img", "--from", str(target), *where)
    assert code == 0, err
    assert np.array_equal(Image.open(again), Image.open(target))
    make("--cache-interval", "4", "--cache-schedule", "middle")
    assert unets(engines) == built, "another interval and schedule build nothing"


@pytest.mark.slow
def test_what_is_off_is_nothing_at_all(make, engines):
    plain, _, first = make()
    one, _, second = make("--cache-interval", "1", name="two.png")
    few, told, third = make("--cache-interval", "3", "--steps", "9", name="three.png")
    short, _, fourth = make("--steps", "9", name="four.png")
    assert first.read_bytes() == second.read_bytes()
    assert third.read_bytes() == fourth.read_bytes()
    assert "deep caching: off, as 9 steps are fewer than 10" in told
    assert not any("deep_caching" in report for report in (plain, one, few, short))
    assert len(unets(engines)) == 1


def test_the_text_of_a_picture_alone_says_it_too(tmp_path):
    text = "a\nSteps: 20, Sampler: PLMS, CFG scale: 7.5, Seed: 1, Size: 64x64, RNG: CPU, "
    (tmp_path / "one.txt").write_text(
        f"{text}Cache interval: 3, Cache depth: 2, Cache schedule: middle, Version: sdtrt"
    )
    recipe = read_recipe(tmp_path / "one.txt")
    assert {"cache_interval": 3, "cache_depth": 2, "cache_schedule": "middle"}.items() <= recipe.options.items()
    assert recipe.left == ()


@pytest.mark.slow
def test_engines_are_built_ahead_and_a_missing_one_names_the_command(make, run, smallest, engines):
    size = ("--height", "64", "--width", "64")
    built = ("build", "--model", str(smallest), "--backend", "inductor", "--precision", "fp32", *size)
    with pytest.raises(AssertionError, match=r"--cache-interval 3 --cache-depth 2") as caught:
        make("--cache-interval", "5", "--cache-depth", "2", "--no-build")
    assert "sdtrt build" in str(caught.value)
    code, out, err = run(*built, "--cache-interval", "3", "--cache-depth", "2", "--engine-dir", str(engines.path))
    assert code == 0, err
    assert len([line for line in out.splitlines() if "unet-" in line]) == 2
    make("--cache-interval", "5", "--cache-depth", "2", "--no-build")


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"backend": "torch"}, "--cache-interval 3 needs engines of the unet, and torch has no engines", "leave"),
        (
            {"backend": "onnxruntime", "components": ("vae_decoder",)},
            "onnxruntime runs the unet in PyTorch, by --component",
            "leave --cache-interval out",
        ),
        (
            {"backend": "onnxruntime", "savings": Savings(caching=DeepCaching(3, 9))},
            "cache-depth 9 is none of this model: its unet has 4 skip connections",
            "--cache-depth 1 to 3",
        ),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_built(smallest, options, words, hint):
    given = {"prompts": ("a",), "model": ModelSpec(str(smallest)), "steps": 12, "savings": EVERY_THIRD, **options}
    spec = GenerateSpec(**given)
    with pytest.raises(UsageError) as caught:
        resolve_request(spec, resolve_model(spec.model), QUIET)
    assert words in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl"])
@pytest.mark.feature("Deep caching (`cache_interval`, `--cache-interval`)", "sdxl", "onnxruntime")
def test_a_pipeline_that_load_opened_keeps_features_in_onnx_runtime(tmp_path, kind):
    """Against the same engines with every step whole: the first two evaluations are alike, as the first is whole."""
    write = factories.sdxl_folder if kind == "sdxl" else factories.sd1_folder
    folder = write(tmp_path / "model", **{**factories.UNET_CONFIGS[kind], **factories.SMALLEST[kind]})
    given = {"height": 64, "width": 64, "backend": "onnxruntime", "engine_dir": tmp_path / "e", "progress": False}
    made = []
    for interval in (1, 3):
        with closing(sdtrt.load(str(folder), cache_interval=interval, **given)) as pipe:
            assert ("unet_shallow" in sdtrt.pipeline.opening.opened.entries(pipe)) == (interval > 1)
            made.append(
                [
                    pipe(
                        "a red circle",
                        num_inference_steps=12,
                        output_type="latent",
                        guidance_scale=2.0,
                        generator=torch.Generator().manual_seed(1),
                    ).images
                    for _ in range(2)
                ]
            )
    assert torch.equal(*made[1]), "a second call begins anew"
    error = float((made[1][0] - made[0][0]).norm() / made[0][0].norm())
    assert 1e-4 < error < 0.5


def blocks_of_docs():
    """What the pages show, which their own tests don't run."""
    import pages

    told = [one for one in pages.blocks() if "cache-interval" in one.text or "cache_interval" in one.text]
    return [one for one in told if "sdtrt bench" not in one.text]


@pytest.mark.slow
def test_what_the_pages_show_runs(run, built_in, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDTRT_ENGINE_DIR", str(built_in))
    shell, python = sorted(blocks_of_docs(), key=lambda block: block.language, reverse=True)
    (words,) = shell.text.splitlines()
    code, _, err = run(*shlex.split(words)[1:])
    assert code == 0, err
    assert (tmp_path / "cached.png").exists()
    exec(compile(python.text, python.name, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.feature("Deep caching (`cache_interval`, `--cache-interval`)", "sd1", "onnxruntime")
def test_the_built_in_model_keeps_passing_the_pixel_checker(built_in):
    from tiny_score import held_out_prompts, rates, score_prompts

    prompts = held_out_prompts(12, [(128, 128)], seed=1)
    for interval in (2, 3):
        given = {"height": 128, "width": 128, "backend": "onnxruntime", "engine_dir": built_in, "progress": False}
        with closing(sdtrt.load("tiny", cache_interval=interval, **given)) as pipe:
            pipe.set_progress_bar_config(disable=True)
            scores = rates(score_prompts(pipe, prompts, steps=20).verdicts, prompts)
        assert min(scores["background"], scores["colour"], scores["kind"]) >= 0.9, interval


def test_what_python_is_asked_is_checked_like_an_option():
    with pytest.raises(UsageError, match="cache-interval must be from 1 to 999, got 0"):
        sdtrt.load("tiny", cache_interval=0)
    with pytest.raises(UsageError, match="unknown cache-schedule"):
        sdtrt.accelerate(None, cache_schedule="midle")
    with pytest.raises(EngineError, match="is no diffusers pipeline"):
        sdtrt.accelerate(None, cache_interval=3)

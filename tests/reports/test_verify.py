"""`verify` finds what is wrong with an engine and passes what is right: real engines, the real miniature."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import (
    SMALLEST,
    TEN_PROMPTS,
    engines_wanted,
    sd1_folder,
    sdxl_folder,
    small_unet,
    tampered_engine,
    unet_engine,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_controlnet import small_controlnet

from sdtrt.backends import open as backend_open
from sdtrt.common.console import QUIET
from sdtrt.common.errors import CacheError, EngineError, SdtrtError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import loading
from sdtrt.models.resolve import TINY, resolve_model
from sdtrt.pipeline.opening import engines
from sdtrt.pipeline.opening import open as pipeline_open
from sdtrt.reports.verify import verify
from sdtrt.reports.verify_report import ImageError, TimestepError, compare_call, judge
from sdtrt.reports.verify_runs import spread
from sdtrt.specs import ControlSpec, GenerateSpec, ModelSpec, Sizes, Thresholds, VerifySpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
PROMPT = "a red circle on a blue background"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(engine_dir):
    return EngineDirectory(engine_dir)


@pytest.fixture
def spec(tmp_path):
    """Quick: 64x64 pixels, four steps, two of which are compared."""
    image = GenerateSpec((PROMPT,), backend="onnxruntime", precision="fp32", steps=4, height=64, width=64, seed=3)
    return VerifySpec(image, timesteps=2, output=tmp_path / "out")


def own_engine(spec, directory):
    """The miniature's right engine."""
    model = resolve_model(spec.image.model)
    return unet_engine(model, "onnxruntime", spec.image.precision, Sizes(2, 64, 64), directory)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, directory):
    """An engine directory for UNets' engines that nothing but these tests may find; the other parts' are right."""
    wrong = EngineDirectory(tmp_path_factory.mktemp("wrong") / "engines")
    wanted = engines_wanted(
        resolve_model(ModelSpec("tiny")), "onnxruntime", "fp32", Sizes(2, 64, 64), ("text_encoder", "vae_decoder")
    )
    for entry in engines.ensure_engines(wanted, directory).values():
        tampered_engine(wrong, entry, lambda _: None)
    return wrong


def changed_tiny(folder, change):
    """A copy of the miniature with the UNet's weights changed."""
    shutil.copytree(TINY, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {name: change(value.float(), generator).to(value.dtype) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


# --- engines that are right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"), [("smallest", "fp16"), *(pytest.param("tiny", one, marks=SLOW) for one in ("fp16", "fp32"))]
)
@pytest.mark.slow
def test_a_models_own_engine_is_faithful_at_every_timestep(spec, directory, smallest, name, precision):
    side, model = (128, name) if name == "tiny" else (64, str(smallest))
    image = replace(spec.image, model=ModelSpec(model), precision=precision, steps=6, height=side, width=side)
    report = verify(replace(spec, image=image, timesteps=None), directory, QUIET)
    assert report.passed, report.failures
    assert len(report.timesteps) == 7  # PNDM runs one timestep more than it is asked for
    for error in report.timesteps:
        assert error.cosine >= 0.9999
        assert error.non_finite == 0
        assert error.noise_ratio <= (1e-2 if precision == "fp32" else 2)
        assert 1e-4 < error.reference_relative_l2 < 1e-2
    assert report.image.psnr_db >= (90 if precision == "fp32" else 40)
    assert report.same_weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "number"), [*(("fp32", number) for number in range(3)), *(("fp16", number) for number in range(10))]
)
def test_a_picture_is_faithful(directory, tmp_path, precision, number):
    """Ten prompts with the defaults of txt2img, ten timesteps of each.

    In fp32 the images are 80 dB within the bound, and three show it.
    """
    image = GenerateSpec((TEN_PROMPTS[number],), backend="onnxruntime", precision=precision, seed=number)
    report = verify(VerifySpec(image, timesteps=10, output=tmp_path), directory, QUIET)
    assert report.passed, report.failures
    assert report.image.psnr_db >= 40
    cosine = min(error.cosine for error in report.timesteps)
    ratio = max(error.noise_ratio for error in report.timesteps)
    figures = report.image.psnr_db, cosine, ratio, report.image.ssim
    print(f"PSNR, cosine, noise ratio, SSIM: {figures}")  # with pytest -rP
    assert cosine >= 0.9999


def test_pytorch_itself_is_verified_as_any_backend(spec, directory):
    report = verify(replace(spec, image=replace(spec.image, backend="torch")), directory, QUIET)
    assert report.passed
    assert report.image.psnr_db == 200
    assert report.image.ssim == 1
    assert report.engine is None
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (data["engine"], data["engines"]) == (None, {})
    worse = replace(report, failures=("the image's SSIM is 0, below 1",))
    with pytest.raises(
        EngineError, match="below 1, but the unet is faithful at each of the 2 timesteps compared"
    ) as caught:
        worse.raise_on_failure()
    assert caught.value.hint == "the model's weights may be damaged"  # no engine to be suspected


@pytest.fixture(scope="module")
def controlled(smallest, tmp_path_factory):
    """The options for the smallest model with a ControlNet: its folder, and a map."""
    folder = tmp_path_factory.mktemp("controlled")
    small_controlnet(small_unet("sd1", **SMALLEST["sd1"])).save_pretrained(folder / "net")
    Image.effect_noise((64, 64), 90).point(lambda level: 255 * (level > 128)).save(folder / "map.png")
    return {"model": ModelSpec(str(smallest)), "controls": (ControlSpec(str(folder / "net"), folder / "map.png"),)}


@pytest.mark.slow
def test_each_step_has_the_residuals_of_controlnets(spec, directory, controlled):
    image = replace(spec.image, backend="torch", steps=2, **controlled)
    report = verify(replace(spec, image=image), directory, QUIET)
    assert report.passed
    assert report.image.psnr_db == 200
    for error in report.timesteps:
        assert error.relative_l2 == 0
        assert 1e-4 < error.reference_relative_l2 < 1e-2  # without residuals it would be some tenths
    (told,) = report.to_json()["controlnets"]
    assert (Path(told["name"]).name, Path(told["image"]).name, told["scale"]) == ("net", "map.png", 1.0)


@pytest.mark.slow
def test_an_engine_without_inputs_for_residuals_is_refused(spec, directory, controlled, smallest):
    image = replace(spec.image, model=ModelSpec(str(smallest)))
    engine = own_engine(replace(spec, image=image), directory).name
    with pytest.raises(EngineError, match="takes other inputs than the unet with inputs for controlnet") as caught:
        verify(replace(spec, image=replace(image, **controlled), engine=engine), directory, QUIET)
    assert "leave --engine out" in caught.value.hint


@pytest.mark.slow
def test_engines_with_controlnets_are_faithful_at_every_timestep(spec, directory, controlled):
    image = replace(spec.image, **{**controlled, "controls": controlled["controls"] * 2})
    report = verify(replace(spec, image=image, timesteps=None), directory, QUIET)
    assert report.passed, report.failures
    assert set(report.engines) == {"text_encoder", "unet", "controlnet", "controlnet_2", "vae_decoder"}
    assert max(error.noise_ratio for error in report.timesteps) <= 1e-2
    assert report.image.psnr_db >= 90
    assert report.rebuild.count("--controlnet") == 2


def test_an_sdxl_model_in_half_precision_is_its_own_noise_floor(spec, directory, tmp_path):
    model = ModelSpec(str(sdxl_folder(tmp_path / "sdxl")))
    image = replace(spec.image, model=model, backend="torch", precision="fp16", steps=2)
    report = verify(replace(spec, image=image, thresholds=Thresholds(None, None, None, None, None)), directory, QUIET)
    assert report.passed
    for error in report.timesteps:
        assert 0 < error.relative_l2 == error.reference_relative_l2 < 1e-2


@pytest.mark.parametrize("scheduler", ["euler-a", "heun"])
def test_any_scheduler_and_no_guidance(spec, directory, scheduler):
    image = replace(spec.image, scheduler=scheduler, guidance_scale=1.0, steps=2)
    report = verify(replace(spec, image=image, timesteps=None), directory, QUIET)
    assert report.passed
    assert len(report.timesteps) == (3 if scheduler == "heun" else 2)


def test_no_two_unets_are_in_memory_at_once(spec, directory, monkeypatch):
    loaded, alive = [], []
    load, open_session = loading.load_unet, backend_open.open_session

    def watched_load(model, dtype):
        alive.append(sum(unet() is not None for unet in loaded))
        unet = load(model, dtype)
        loaded.append(weakref.ref(unet))
        return unet

    def watched_open(*arguments):
        alive.append(sum(unet() is not None for unet in loaded))
        return open_session(*arguments)

    own_engine(spec, directory)
    monkeypatch.setattr(loading, "load_unet", watched_load)
    monkeypatch.setattr(pipeline_open, "open_session", watched_open)
    verify(spec, directory, QUIET)
    assert alive == [0] * 5  # at the reference, the noise floor, and the three engines


# --- engines that are wrong ------------------------------------------------------------------------------------------

ONE_PERCENT = {
    "noise": lambda value, generator: value * (1 + 0.01 * torch.randn(value.shape, generator=generator)),
    "scale": lambda value, generator: value * 1.01,
}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param("noise", "fp16", marks=pytest.mark.slow),
        pytest.param("noise", "fp32", marks=pytest.mark.slow),
        pytest.param("scale", "fp16", marks=pytest.mark.slow),
        pytest.param("scale", "fp32", marks=pytest.mark.slow),
    ],
)
def test_an_engine_of_weights_perturbed_by_one_percent_fails(spec, wrong, tmp_path, kind, precision):
    folder = changed_tiny(tmp_path / "changed", ONE_PERCENT[kind])
    image = replace(spec.image, precision=precision)
    own = verify(replace(spec, image=replace(image, model=ModelSpec(str(folder)))), wrong, QUIET)  # builds it
    assert own.passed

    report = verify(replace(spec, image=replace(image, precision=None), engine=own.engine["name"]), wrong, QUIET)
    assert not report.passed
    assert min(error.noise_ratio for error in report.timesteps) > 2
    assert (own.same_weights, report.same_weights) == (True, False)
    with pytest.raises(EngineError, match="is not faithful") as caught:
        report.raise_on_failure()
    assert "--model" in caught.value.hint


@pytest.mark.slow
def test_an_engine_of_another_model_with_the_same_shapes_fails(spec, smallest, wrong, tmp_path):
    other = resolve_model(ModelSpec(str(sd1_folder(tmp_path / "other", seed=1, **SMALLEST["sd1"]))))
    entry = unet_engine(other, "onnxruntime", "fp32", Sizes(2, 64, 64), wrong)
    spec = replace(spec, image=replace(spec.image, model=ModelSpec(str(smallest))))
    report = verify(replace(spec, engine=entry.name), wrong, QUIET)
    assert not report.passed
    assert max(error.cosine for error in report.timesteps) < 0.9
    assert report.same_weights is False


def test_an_engine_with_a_nan_weight_fails(spec, directory, wrong):
    def spoil(weight):
        weight.flat[7] = np.nan

    entry = tampered_engine(wrong, own_engine(spec, directory), spoil)
    report = verify(replace(spec, engine=entry.name), wrong, QUIET)
    assert not report.passed
    assert "NaN or infinite at 2 of 2 timesteps" in report.failures[0]
    assert "not finite" in report.failures[-1]
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["image"] == {"psnr_db": None, "ssim": None}
    assert data["timesteps"][0]["cosine"] is None
    assert data["timesteps"][0]["non_finite"] > 0
    assert data["timesteps"][0]["reference_relative_l2"] > 0


def test_an_engine_whose_weight_was_changed_fails_though_its_key_is_right(spec, directory, wrong):
    def change(weight):
        weight *= 2

    entry = tampered_engine(wrong, own_engine(spec, directory), change)
    report = verify(replace(spec, engine=entry.name), wrong, QUIET)
    assert report.same_weights
    assert not report.passed
    with pytest.raises(EngineError) as caught:
        report.raise_on_failure()
    assert f"sdtrt engines rm {entry.name} --engine-dir {wrong.path}" in caught.value.hint


def test_an_engine_of_another_part_is_refused_with_where_to_look(spec, directory):
    model = resolve_model(spec.image.model)
    wanted = engines_wanted(model, "onnxruntime", "fp32", Sizes(2, 64, 64), ("vae_decoder",))
    other = engines.ensure_engines(wanted, directory)["vae_decoder"]
    with pytest.raises(UsageError, match="is no engine of a unet") as caught:
        verify(replace(spec, engine=other.name), directory, QUIET)
    assert f"sdtrt engines list --engine-dir {directory.path} shows" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "nan"])
def test_an_image_that_the_vaes_engine_spoils_is_not_blamed_on_the_unets(spec, directory, tmp_path, run, kind):
    """The command says so, and what it hints at makes the engine right again."""

    def change(weight):
        if kind == "nan":
            weight.flat[7] = np.nan
        else:
            weight *= 1 + np.random.default_rng(0).standard_normal(weight.shape).astype(weight.dtype)

    model, spoilt = resolve_model(spec.image.model), EngineDirectory(tmp_path / "engines")
    parts = ("text_encoder", "unet", "vae_decoder")
    right = engines.ensure_engines(engines_wanted(model, "onnxruntime", "fp32", Sizes(2, 64, 64), parts), directory)
    for name, entry in right.items():
        tampered_engine(spoilt, entry, change if name == "vae_decoder" else lambda _: None)

    options = (*QUICK, "--precision", "fp32", "--no-build", "--engine-dir", str(spoilt.path))
    code, out, err = run("verify", *options)
    assert code == 1
    error, hint = err.splitlines()
    what = "pixels that are not finite" if kind == "nan" else "PSNR is"
    assert error.startswith("error: the image of onnxruntime in fp32 is not faithful: the image")
    assert what in error
    assert error.endswith("but the unet is faithful at each of the 2 timesteps compared")
    assert "passed" not in out
    start, command = hint.split(": build again with ")
    suspects = [right[name].name for name in parts if name != "unet"]
    assert start == f"hint: suspect {' and '.join(suspects)}, which no timestep shows, or errors that add up"

    assert run(*shlex.split(command)[1:], "--quiet")[0] == 0
    assert run("verify", *options)[0] == 0


# --- choosing an engine ----------------------------------------------------------------------------------------------


def test_a_missing_engine_is_not_built_if_that_is_forbidden(spec, tmp_path):
    directory = EngineDirectory(tmp_path / "engines")
    with pytest.raises(EngineError, match="no onnxruntime fp32 engine") as caught:
        verify(replace(spec, image=replace(spec.image, allow_build=False)), directory, QUIET)
    assert "sdtrt build" in caught.value.hint


def test_wrong_engines_are_refused(spec, directory, tmp_path):
    entry = own_engine(spec, directory)
    with pytest.raises(CacheError, match="no entry named 'nothing'"):
        verify(replace(spec, engine="nothing"), directory, QUIET)
    image = replace(spec.image, precision="fp16")
    with pytest.raises(UsageError, match="is for fp32, not fp16"):
        verify(replace(spec, image=image, engine=entry.name), directory, QUIET)
    with pytest.raises(UsageError, match="is for onnxruntime, not torch"):
        verify(replace(spec, image=replace(spec.image, backend="torch"), engine=entry.name), directory, QUIET)
    with pytest.raises(UsageError, match="is no engine"):
        verify(replace(spec, engine=directory.entries("onnx")[0].name), directory, QUIET)
    other = ModelSpec(str(sd1_folder(tmp_path / "sd1")))
    with pytest.raises(EngineError, match="takes other inputs than the unet of"):
        verify(replace(spec, image=replace(spec.image, model=other), engine=entry.name), directory, QUIET)


def test_an_engine_is_refused_at_a_size_that_it_does_not_take(spec, directory, wrong):
    profile = {name: {"min": n, "opt": n, "max": n} for name, n in (("batch", 2), ("height", 64), ("width", 96))}
    profile["tokens"] = {"min": 77, "opt": 77, "max": 77}
    entry = tampered_engine(wrong, own_engine(spec, directory), lambda _: None, profiles=[profile])
    with pytest.raises(EngineError, match="does not take batch 2, 64x64") as caught:
        verify(replace(spec, engine=entry.name), wrong, QUIET)
    assert caught.value.hint == "use --height 64 --width 96"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"timesteps": 0}, "timesteps must be at least 1"),
        ({"image": GenerateSpec((PROMPT, PROMPT))}, "one image from one prompt"),
        ({"image": GenerateSpec((PROMPT,), num_images=2)}, "one image from one prompt"),
        ({"image": GenerateSpec((PROMPT,), height=8)}, "height of at least 16, got 8"),
    ],
)
def test_wrong_requests_are_refused(spec, wrong, message):
    with pytest.raises(UsageError, match=message):
        replace(spec, **wrong)


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"min_cosine": 1.1}, "--min-cosine"),
        ({"min_cosine": math.nan}, "--min-cosine"),
        ({"min_psnr_db": math.inf}, "--min-psnr must"),
        ({"max_noise_ratio": -1.0}, "--max-noise-ratio"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(wrong, option):
    with pytest.raises(UsageError, match=option):
        Thresholds(**wrong)


@pytest.mark.parametrize(("module", "hint"), [("skimage.metrics", "scikit-image"), ("matplotlib", "matplotlib")])
def test_a_missing_library_is_named_before_any_work(spec, directory, monkeypatch, module, hint):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SdtrtError) as caught:
        verify(replace(spec, image=replace(spec.image, model=ModelSpec("no/such"))), directory, QUIET)
    assert caught.value.hint == f"pip install {hint}"


# --- figures ---------------------------------------------------------------------------------------------------------


def test_rows_are_judged_each_for_itself():
    expected = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    actual = expected.copy()
    actual[1] += 0.1 * np.linalg.norm(expected[1]) / 16  # 256 values: a relative error of a tenth
    error = compare_call(981.0, actual, expected, expected)
    assert error.relative_l2 == pytest.approx(0.1)
    assert error.max_abs == pytest.approx(0.1 * np.linalg.norm(expected[1]) / 16, rel=1e-4)
    assert error.cosine < 0.998
    assert error.noise_ratio == math.inf
    assert compare_call(1.0, expected, expected, expected).noise_ratio == 0


def test_what_is_not_finite_is_counted_and_fails_every_threshold():
    expected = np.ones((2, 4, 2, 2), dtype=np.float32)
    actual = expected.copy()
    actual[0, 0, 0, 0], actual[1, 0, 0, 0] = np.nan, np.inf
    error = compare_call(1.0, actual, expected, expected)
    assert error.non_finite == 2
    nothing = Thresholds(None, None, None, None, None)
    assert judge(nothing, [error], ImageError(50, 1)) == (
        "2 values are NaN or infinite at 1 of 1 timesteps, first at 1",
    )
    assert judge(nothing, [], ImageError(math.nan, math.nan)) == ("the image has pixels that are not finite",)


def test_each_threshold_is_judged():
    good, bad = TimestepError(981, 1.0, 1e-3, 0.1, 0, 1e-3), TimestepError(1, 0.99, 1e-2, 0.1, 0, 1e-3)
    image = ImageError(30.0, 0.9)
    assert judge(Thresholds(0.98, 11, 0.1, 29, 0.8), [good, bad], image) == ()
    assert judge(Thresholds(0.9999, 2, 5e-3, 35, 0.95), [good, bad], image) == (
        "cosine is below 0.9999 at 1 of 2 timesteps, worst at 1: 0.9900000",
        "relative L2 error is above 0.005 at 1 of 2 timesteps, worst at 1: 1.00e-02",
        "relative L2 error is above 2 times PyTorch's own in half precision at 1 of 2 timesteps, "
        "worst at 1: 10.0 times",
        "the image's PSNR is 30, below 35",
        "the image's SSIM is 0.9, below 0.95",
    )


def test_without_a_noise_floor_the_other_thresholds_still_hold():
    error = TimestepError(1, 0.99, 1e-2, 0.1, 0, math.nan)
    assert judge(Thresholds(), [error], ImageError(50, 1)) == (
        "cosine is below 0.9999 at 1 of 1 timesteps, worst at 1: 0.9900000",
    )


def test_timesteps_are_spread_evenly_with_both_ends():
    assert spread(51, 3) == [0, 25, 50]
    assert spread(4, None) == spread(4, 9) == [0, 1, 2, 3]
    assert spread(5, 1) == [0]


@pytest.mark.slow
def test_no_build_builds_none_of_the_other_components_either(spec, directory, tmp_path):
    only = EngineDirectory(tmp_path / "only")
    image = spec.image
    tampered_engine(only, own_engine(spec, directory), lambda _: None)  # the miniature's, as it is
    before = [entry.name for entry in only.entries()]
    with pytest.raises(EngineError, match="text_encoder"):
        verify(replace(spec, image=replace(image, allow_build=False)), only, QUIET)
    assert [entry.name for entry in only.entries()] == before


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run, folder):
    """In an empty folder, with the shared engines."""
    return run


QUICK = ("--steps", "2", "--timesteps", "2", "--height", "64", "--width", "64", "-q", "--backend", "onnxruntime")


@pytest.mark.slow
def test_the_command_prints_one_json_document_of_the_promised_form(run):
    code, out, err = run("verify", *QUICK, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["passed"] is True
    assert {"passed", "thresholds", "timesteps", "image", "host", "engine"} <= report.keys()
    keys = ["timestep", "cosine", "relative_l2", "max_abs", "non_finite", "reference_relative_l2"]
    assert [list(item) for item in report["timesteps"]] == [keys, keys]
    assert list(report["image"]) == ["psnr_db", "ssim"]
    assert report["thresholds"]["min_cosine"] == 0.9999
    assert [Path(path).suffix for path in report["files"].values()] == [".png", ".png"]
    assert all(Path(path).exists() for path in report["files"].values())


def test_the_command_fails_with_report_error_and_hint(run):
    code, out, err = run("verify", *QUICK, "--min-psnr", "190", "-o", "pictures")
    assert code == 1
    assert "timestep" in out
    assert "failed:\n  the image's PSNR is" in out
    assert "pictures/verify-onnxruntime-fp32-comparison.png" in out
    error, hint = err.splitlines()
    assert error.startswith("error: the image of onnxruntime in fp32 is not faithful: the image's PSNR is")
    assert hint.startswith("hint: suspect text_encoder-")
    assert "or errors that add up" in hint  # nothing is broken here: the threshold asks for too much


def test_the_commands_wrong_input_is_told(run, tmp_path):
    assert run("verify", "--min-cosine", "2")[0] == 2
    assert run("verify", "--timesteps", "-1")[0] == 2
    assert "--seed 0" in run("verify", "--seed", "-1")[2]
    assert run("verify", "--engine", "nothing")[0] == 1
    (tmp_path / "file").write_text("")
    code, _, err = run("verify", *QUICK, "-o", "file/below")
    assert code == 1
    assert err.count("\n") == 2

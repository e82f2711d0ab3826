"""Requests: ranges, sizes, profiles, and what each spec refuses."""

from __future__ import annotations

import contextlib

import pytest
from factories import checked_spec
from hypothesis import given
from hypothesis import strategies as st

from sdtrt.backends import registry
from sdtrt.common.errors import UsageError
from sdtrt.specs import (
    MAX_SEED,
    ExportSpec,
    GenerateSpec,
    Profile,
    PruneSpec,
    Range,
    Sizes,
    bytes_of,
    check_choice,
    check_size,
)

STATIC = Profile.of(Sizes(2, 512, 512))
DYNAMIC = Profile(Range(1, 2, 4), Range(512, 512, 512), Range(512, 512, 512))


@given(st.lists(st.integers(1, 10_000), min_size=3, max_size=3).map(sorted))
def test_range_survives_printing_and_parsing(bounds):
    wanted = Range(*bounds)
    assert Range.parse(str(wanted), "--height") == wanted


@pytest.mark.parametrize("text", ["", "x", "1:2", "3:2:1", "0", "-8", "1:2:3:4", "5.5", "²"])
def test_bad_range_is_refused_with_its_text(text):
    with pytest.raises(UsageError) as caught:
        Range.parse(text, "--batch")
    assert caught.value.exit_code == 2
    assert caught.value.hint


@given(st.text(max_size=30))
def test_range_parse_raises_nothing_but_usage_errors(text):
    with contextlib.suppress(UsageError):
        Range.parse(text, "--batch")


def test_blanks_of_all_kinds_around_a_range_are_no_error():
    assert Range.parse("\t512 : 512\x1f:768", "--height") == Range(512, 512, 768)


def test_size_error_names_the_value_and_a_size_that_works():
    with pytest.raises(UsageError) as caught:
        check_size("height", 500)
    assert caught.value.message == "height must be a multiple of 8, got 500"
    assert caught.value.hint == "use --height 504"


@pytest.mark.parametrize("pixels", [-8, 0, 7, 16392, 2**63 - 8])
def test_sizes_that_no_model_draws_are_refused(pixels):
    with pytest.raises(UsageError, match=str(pixels)):
        check_size("width", pixels)


@pytest.mark.parametrize("gib", [float("nan"), float("inf"), -1.0])
def test_gib_must_be_a_number_from_0_up(gib):
    with pytest.raises(UsageError, match=str(gib)):
        bytes_of("--keep-gib", gib)
    assert bytes_of("--keep-gib", 0.5) == 2**29


@pytest.mark.parametrize("days", [float("nan"), float("inf"), -5.0])
def test_prune_refuses_ages_that_would_take_everything(days):
    with pytest.raises(UsageError, match=str(days)):
        PruneSpec(older_than_days=days)


def test_unknown_choice_suggests_the_closest():
    with pytest.raises(UsageError) as caught:
        check_choice("scheduler", "eulr", ("pndm", "euler", "heun"))
    assert "did you mean euler?" in caught.value.hint


def test_profile_holds_exactly_what_its_ranges_allow():
    profile = Profile(Range(1, 2, 4), Range(384, 512, 768), Range.of(512))
    assert Sizes(4, 768, 512) in profile
    assert Sizes(5, 768, 512) not in profile
    assert Sizes(2, 512, 520) not in profile
    assert Sizes(2, 512, 512, tokens=154) not in profile
    assert profile.minimum in profile
    assert profile.maximum in profile
    assert profile.optimum == Sizes(2, 512, 512)


def test_profile_parse_takes_what_is_left_out_from_the_default():
    profile = Profile.parse("height=512:512:768,batch=4", STATIC)
    assert profile == Profile(Range.of(4), Range(512, 512, 768), Range.of(512))


@pytest.mark.parametrize("text", ["", "depth=3", "height", "height=500", "height=1:2", "height=64, height=64"])
def test_bad_profile_is_refused(text):
    with pytest.raises(UsageError):
        Profile.parse(text, STATIC)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompts": ()}, "no prompt"),
        ({"steps": 0}, "0"),
        ({"num_images": 0}, "0"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"guidance_scale": -1.0}, "-1"),
        ({"seed": -2}, "-2"),
        ({"height": 500}, "500"),
        ({"scheduler": "nope"}, "nope"),
        ({"precision": "int3"}, "int3"),
        ({"seed": MAX_SEED, "num_images": 2}, str(MAX_SEED - 1)),
    ],
)
def test_generate_refuses(wrong, named):
    with pytest.raises(UsageError) as caught:
        GenerateSpec(**({"prompts": ("a circle",)} | wrong))
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 50), (1.5, 50), (-0.1, 50), (0.5, 1), (float("nan"), 50)])
def test_img2img_refuses_strengths_that_run_no_step(tmp_path, strength, steps):
    with pytest.raises(UsageError):
        GenerateSpec(("a circle",), init_image=tmp_path / "x.png", strength=strength, steps=steps)


@pytest.mark.parametrize("strength", [5e-324, 1e-320, 0.0001, 0.001, 1 / 49, 0.0049])
def test_strengths_too_low_are_refused_with_a_hint_that_works(tmp_path, strength):
    """Schedulers run 999 steps at most."""
    for steps in range(1, 1500):
        if int(steps * strength) > 0:
            break
        with pytest.raises(UsageError) as caught:
            GenerateSpec(("a circle",), init_image=tmp_path / "x.png", strength=strength, steps=steps)
        _, option, value, *_ = caught.value.hint.split()
        better = {"steps": int(value)} if option == "--steps" else {"strength": float(value)}
        assert better.get("steps", 1) <= 999
        GenerateSpec(("x",), init_image=tmp_path / "x.png", **({"steps": steps, "strength": strength} | better))


def test_a_seed_of_minus_one_is_a_random_one_as_in_web_uis():
    assert GenerateSpec(("a circle",), seed=-1).seed is None
    assert GenerateSpec(("a circle",), seed=0).seed == 0


def test_strength_does_not_matter_without_an_init_image():
    assert GenerateSpec(("a circle",), strength=0.0).init_image is None


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (("nope",), "nope"),
        (("onnxruntime", "bf16"), "bf16"),
        (("torch", None, ["unet"]), "torch backend has no engines"),
    ],
)
def test_what_no_backend_does_is_refused_before_anything_heavy_is_loaded(request_, named):
    with pytest.raises(UsageError, match=named):
        registry.check_request(*request_)


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "torch"},
        {"backend": "nope"},
        {"backend": "tensorrt"},  # no profile
        {"backend": "tensorrt", "profiles": (STATIC,), "optimization_level": 6},
        {"backend": "tensorrt", "profiles": (STATIC,), "workspace_bytes": 0},
        {"backend": "tensorrt", "profiles": (STATIC,), "compute_capability": (8, 9)},
        {"backend": "onnxruntime", "optimization_level": 3},
        {"backend": "onnxruntime", "norm_plugins": False},
        {"backend": "onnxruntime", "split_attention": 2048},
        {"backend": "tensorrt", "profiles": (STATIC,), "split_attention": -1},
    ],
)
def test_build_refuses(wrong):
    with pytest.raises(UsageError):
        checked_spec(ExportSpec(), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"component": "vea"}, {"precision": "fp4"}, {"exporter": "x"}, {"opset": 9}, {"exporter": "dynamo", "opset": 17}],
)
def test_export_refuses(wrong):
    with pytest.raises(UsageError):
        ExportSpec(**wrong)


def test_only_what_is_made_at_once_counts_as_a_batch():
    assert GenerateSpec(("x",), num_images=3, batch_size=10**9).images_at_once == 3
    with pytest.raises(UsageError, match="batch size must be at most") as caught:
        GenerateSpec(("x",), num_images=20_000, batch_size=10**9)
    assert "--batch-size" in caught.value.hint


def test_guidance_doubles_the_batch_only_above_one():
    assert GenerateSpec(("x",), guidance_scale=1.01).uses_guidance
    assert not GenerateSpec(("x",), guidance_scale=1.0).uses_guidance

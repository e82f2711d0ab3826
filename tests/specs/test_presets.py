"""Presets, choices, metrics and limits, as words say them."""

import math
from pathlib import Path

import pytest

from sdtrt.common.errors import UsageError
from sdtrt.specs import PRESETS, GenerateSpec, LossLimits, MetricsSpec, QualityBenchSpec, QualitySpec
from sdtrt.specs.presets import describe, settle
from sdtrt.specs.quality import exact_of, parse_choices
from sdtrt.specs.savings import DeepCaching, GuidanceInterval, Savings

IMAGE = GenerateSpec(("a red circle",))
SAVING = GenerateSpec(("a red circle",), savings=Savings(GuidanceInterval(0, 0.5)))


def test_a_preset_is_a_request_s_savings_and_own_numbers_win():
    balanced = PRESETS["balanced"].savings
    assert PRESETS["exact"].savings == Savings()
    assert GenerateSpec(("x",), quality="balanced").savings == balanced
    own = Savings(GuidanceInterval(0.2, 0.4))
    assert GenerateSpec(("x",), quality="balanced", savings=own).savings == own
    assert settle("balanced", cache_interval=5).guidance == balanced.guidance
    assert settle("balanced", cache_interval=5).caching.interval == 5
    assert settle("balanced", cache_interval=1, guidance_interval=GuidanceInterval()) == Savings()
    assert settle(None, cache_depth=2).caching == DeepCaching(depth=2)
    with pytest.raises(UsageError, match="unknown quality: 'hihg'") as caught:
        GenerateSpec(("x",), quality="hihg")
    assert caught.value.hint.startswith("did you mean high?")


def test_each_preset_saves_what_its_name_promises():
    saved = {name: one.savings for name, one in PRESETS.items()}
    assert not saved["high"].guidance.is_whole
    assert saved["high"].caching.is_off
    for name in ("balanced", "fast"):
        assert not saved[name].guidance.is_whole
        assert not saved[name].caching.is_off
    assert all(one.why for one in PRESETS.values())


def test_savings_are_told_in_words():
    assert describe(Savings()) == "nothing"
    savings = Savings(GuidanceInterval(0.1, 0.5), DeepCaching(3, 2, "middle"))
    assert describe(savings) == "guidance in 0.1:0.5 of the run; 1 step in 3 whole, depth 2, middle"


def test_choices_are_presets_knobs_and_both():
    assert [one.text for one in parse_choices("all")] == ["high", "balanced", "fast"]
    knobs, both, steps = parse_choices("guidance-interval=0:0.5+cache-interval=3, high+cache-depth=2, steps=30")
    assert knobs.of(IMAGE).savings == Savings(GuidanceInterval(0, 0.5), DeepCaching(3))
    assert both.of(IMAGE).savings.caching == DeepCaching(depth=2)
    assert both.of(IMAGE).savings.guidance == PRESETS["high"].savings.guidance
    assert (steps.of(IMAGE).steps, steps.of(IMAGE).savings) == (30, Savings())
    assert [one.text for one in parse_choices("exact,high,high")] == ["high"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hihg", "unknown quality: 'hihg'"),
        ("high+fast", "unknown knob: 'fast'"),
        ("cache=3", "unknown knob: 'cache'"),
        ("cache-interval=few", "must be a whole number, got 'few'"),
        ("cache-interval=0", "cache-interval must be from 1"),
        ("cache-schedule=odd", "unknown cache-schedule: 'odd'"),
        ("high+cache-interval", "says 'cache-interval' where another KNOB=VALUE"),
        ("steps=3+steps=4", "says 'steps=4' where another KNOB=VALUE"),
        ("guidance-interval=1", "takes two fractions"),
        ("precision=fp99", "unknown precision: 'fp99'"),
        ("steps=0", "steps must be"),
        ("exact", "leaves nothing to compare"),
        ("", "unknown quality: ''"),
    ],
)
def test_what_is_no_choice_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_choices(text)


def test_the_exact_request_has_no_saving():
    assert exact_of(GenerateSpec(("x",), quality="fast", precision="fp16")) == GenerateSpec(("x",), precision="fp16")
    QualitySpec(SAVING)
    QualitySpec(IMAGE, in_fp32=True)
    with pytest.raises(UsageError, match="saves nothing") as caught:
        QualitySpec(IMAGE)
    assert "--quality balanced" in caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"names": ()}, "no metric"),
        ({"names": ("psnr", "fid")}, "unknown metric: 'fid'"),
        ({"names": ("psnr",), "clip_model": "a/b"}, "--clip-model a/b is about clip"),
        ({"names": ("psnr",), "lpips_weights": Path("x.pth")}, "--lpips-weights x.pth is about lpips"),
    ],
)
def test_metrics_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        MetricsSpec(**wrong)


def test_a_metric_is_asked_for_by_name_or_by_its_model():
    assert MetricsSpec().wants("lpips")
    assert not MetricsSpec().names_it("lpips")
    assert MetricsSpec(names=("lpips",)).names_it("lpips")
    assert MetricsSpec(clip_model="a/b").names_it("clip")


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"min_ssim": 1.5}, "--min-ssim must be a number from -1 to 1"),
        ({"min_psnr_db": math.nan}, "--min-psnr must"),
        ({"max_lpips": -1.0}, "--max-lpips must be a number from 0 up"),
        ({"max_clip_loss": math.inf}, "--max-clip-loss"),
    ],
)
def test_limits_that_mean_nothing_are_refused(wrong, option):
    with pytest.raises(UsageError, match=option):
        LossLimits(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": GenerateSpec(("x",), init_image=Path("x.png"))}, "from text alone"),
        ({"image": GenerateSpec(("x",), num_images=2)}, "one picture of each prompt"),
        ({"image": GenerateSpec(("x",), height=8)}, "height of at least 16"),
        ({"repeats": 0}, "repeats and warmups must be at least 1"),
    ],
)
def test_pictures_that_can_not_be_compared_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        QualityBenchSpec(**{"image": IMAGE, "choices": parse_choices("high"), **wrong})

"""Whether the preset `fast` takes engines in 8 bits: by what builds have measured, and never unmeasured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdtrt.backends import registry
from sdtrt.backends.build import engine_key
from sdtrt.common.console import QUIET, Console
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.specs import PRESETS, BuildSpec, ExportSpec, GenerateSpec, ModelSpec, Profile, Range, Sizes
from sdtrt.specs.deep_features import default_depth, shallow_groups, whole_group
from sdtrt.specs.quality import Choice

pytestmark = [
    pytest.mark.usefixtures("on_the_cpu"),
    pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler"),
]
FAST = GenerateSpec(("x",), backend="inductor", quality="fast", steps=4, height=128, width=128, components=("unet",))
USUAL = "fp32"  # of inductor on a CPU
PROFILE = Profile(Range(1, 2, 2), Range(128, 128, 128), Range(128, 128, 128))


@pytest.fixture(scope="module")
def model():
    return resolve_model(ModelSpec("tiny"))


@pytest.fixture
def built(model, directory):
    """Publishes an engine of the UNet that took so long for a step when it was built; it is never opened."""

    def publish(precision, step_ms, groups=(), **info):
        export = ExportSpec(model.spec, "unet", precision, groups=groups)
        key = engine_key(model, BuildSpec(export, "inductor", (PROFILE,)), directory).to_json()
        facts = {"step_sizes": str(PROFILE.optimum), **({} if step_ms is None else {"step_ms": step_ms}), **info}
        return directory.obtain("engine", key, lambda folder: facts)

    return publish


def taken(spec, model, directory, console=QUIET):
    return resolve_fastest(spec, model, directory, console).precision


@pytest.mark.parametrize(
    ("steps", "expected", "words"),
    [
        ({USUAL: 10.0, "fp8": 6.0}, "fp8", "fp8, as builds have measured 6.00 ms a step, and 10.00 in fp32"),
        ({USUAL: 10.0, "fp8": 6.0, "int8": 5.0}, "int8", "int8, as builds have measured 5.00"),
        ({USUAL: 10.0, "fp8": 12.0}, USUAL, "fp32; there are engines in 8 bits, but none was faster"),
        ({USUAL: 10.0, "fp8": 10.0}, USUAL, "but none was faster"),
        ({USUAL: 10.0, "fp8": None}, USUAL, "but none was faster"),
        ({USUAL: None, "fp8": 6.0}, USUAL, "but no engine in fp32 was measured beside them"),
        ({"fp8": 6.0}, USUAL, "but no engine in fp32 was measured beside them"),
    ],
)
def test_it_takes_8_bits_only_where_they_were_measured_to_be_faster(
    model, directory, built, capsys, steps, expected, words
):
    for precision, step_ms in steps.items():
        built(precision, step_ms)
    assert taken(FAST, model, directory, Console()) == expected
    assert words in " ".join(capsys.readouterr().err.split())


def test_times_of_other_sizes_are_not_compared(model, directory, built):
    built(USUAL, 10.0)
    built("fp8", 6.0, step_sizes=str(Sizes(1, 128, 128)))
    assert taken(FAST, model, directory) == USUAL


def test_other_presets_and_a_precision_that_is_asked_for_are_left_alone(model, directory, built, capsys):
    built(USUAL, 10.0)
    built("fp8", 6.0)
    assert [name for name, one in PRESETS.items() if one.eight_bits] == ["fast"]
    for name in (None, "exact", "high", "balanced"):
        assert taken(replace(FAST, quality=name), model, directory) == USUAL
    assert taken(replace(FAST, precision="bf16"), model, directory, Console()) == "bf16"
    assert "8 bits" not in capsys.readouterr().err
    assert taken(replace(FAST, height=192), model, directory) == USUAL, "of that size there is none"


def test_with_deep_caching_the_shallow_step_counts_as_often_as_it_runs(model, directory, built):
    """An engine of whole steps that gains loses to shallow ones that don't: 4 steps of 5 are shallow."""
    whole = (whole_group(default_depth(model.config("unet"))),)
    shallow, spec = shallow_groups(whole), replace(FAST, steps=20)
    built(USUAL, 10.0, whole)
    built(USUAL, 2.0, shallow)
    built("fp8", 6.0, whole)
    assert taken(spec, model, directory) == USUAL, "one engine is missing"
    built("fp8", 3.5, shallow)
    assert taken(spec, model, directory) == USUAL  # 20 ms against 18
    built("int8", 6.0, whole)
    built("int8", 2.5, shallow)
    assert taken(spec, model, directory) == "int8"  # 16 ms


def test_a_choice_of_bench_is_the_preset_with_its_name():
    exact = GenerateSpec(("x",), backend="inductor")
    assert Choice.parse("fast").of(exact).quality == "fast"
    assert Choice.parse("fast").of(exact).precision is None
    assert Choice.parse("fast+precision=bf16").of(exact).precision == "bf16"
    assert Choice.parse("steps=30").of(exact).quality is None

"""What a request saves, as words say it."""

import pytest

from sdtrt.common.errors import UsageError
from sdtrt.specs.savings import DeepCaching, GuidanceInterval


def test_the_guided_steps_are_those_of_diffusers_guiders():
    interval = GuidanceInterval.parse("0.25:0.75")
    assert [interval.holds(step, 6) for step in range(6)] == [False, True, True, True, False, False]
    assert all(GuidanceInterval().holds(step, 7) for step in range(7))
    assert GuidanceInterval().is_whole
    assert not interval.is_whole
    assert f"{interval}" == "0.25:0.75"


@pytest.mark.parametrize("text", ["", "0.5", "0.5:0.5", "0.6:0.4", "-0.1:1", "0:1.1", "a:b", "0:nan", "0:1:2"])
def test_what_is_no_interval_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as error:
        GuidanceInterval.parse(text)
    assert "--guidance-interval 0.1:0.7" in error.value.hint


@pytest.mark.parametrize(
    ("numbers", "hint"),
    [
        ({"interval": 0}, "--cache-interval 3"),
        ({"interval": 1000}, "--cache-interval 3"),
        ({"depth": 0}, "--cache-depth 1"),
        ({"schedule": "unifrom"}, "did you mean uniform?"),
    ],
)
def test_what_is_no_caching_is_refused_with_a_mend(numbers, hint):
    with pytest.raises(UsageError) as error:
        DeepCaching(**numbers)
    assert hint in error.value.hint
    assert DeepCaching().is_off

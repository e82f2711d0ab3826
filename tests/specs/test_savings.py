"""What a request saves, as words say it."""

import itertools
import math

import pytest

from sdtrt.common.errors import UsageError
from sdtrt.specs.savings import CACHE_SCHEDULES, DeepCaching, GuidanceInterval


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


def test_the_first_step_is_whole_and_the_others_lie_as_the_schedule_says():
    assert sorted(DeepCaching(3).whole_steps(10)) == [0, 3, 6, 9]
    assert sorted(DeepCaching().whole_steps(4)) == [0, 1, 2, 3]
    middle = sorted(DeepCaching(5, None, "middle").whole_steps(250))
    gaps = [after - before for before, after in itertools.pairwise(middle)]
    assert middle[0] == 0
    assert max(gaps[len(gaps) // 2 - 3 : len(gaps) // 2 + 3]) <= 4 < 6 == gaps[2]


@pytest.mark.parametrize("schedule", CACHE_SCHEDULES)
@pytest.mark.parametrize(("interval", "steps"), [(2, 10), (3, 50), (7, 51), (999, 20)])
def test_any_schedule_begins_whole_and_has_no_more_whole_steps_than_the_interval_says(schedule, interval, steps):
    whole = DeepCaching(interval, None, schedule).whole_steps(steps)
    assert 0 in whole <= set(range(steps))
    assert steps / interval - 2 <= len(whole) <= math.ceil(steps / interval)


def test_a_run_of_few_steps_keeps_nothing():
    assert DeepCaching(3).over(9).is_off
    assert DeepCaching(3, 2, "middle").over(10) == DeepCaching(3, 2, "middle")

"""Which step a call belongs to, by diffusers' own schedulers and pipelines; and which pipeline calls."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from diffusers import PNDMScheduler

from sdtrt.common.errors import EngineError
from sdtrt.pipeline.parts import guided_rows
from sdtrt.pipeline.parts.calling import calling_pipeline
from sdtrt.pipeline.parts.guided_rows import GuidedForward
from sdtrt.pipeline.parts.run_steps import RunSteps
from sdtrt.pipeline.parts.schedulers import Settings, make_scheduler
from sdtrt.specs import SCHEDULERS, GuidanceInterval

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


class Pipe:
    """What a run's steps are told from, of a pipeline."""

    def __init__(self, scheduler, **facts):
        self.scheduler = scheduler
        self.__dict__.update(facts)

    def begin(self, steps, skipped=0):
        """Begin a run as diffusers' pipelines do: the timesteps that it calls its UNet at."""
        self.scheduler.set_timesteps(steps)
        self._num_timesteps = len(self.scheduler.timesteps) - skipped
        if skipped and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        return self.scheduler.timesteps[skipped:]


def pipe_of(name, **facts):
    return Pipe(make_scheduler(name, Settings(BETAS)), **facts)


def steps_of(steps, pipe, timesteps):
    return [steps.step_of(pipe, timestep) for timestep in timesteps]


def one_each(count, first=0, total=None):
    return [(number, total or count) for number in range(first, count)]


def test_pndms_runge_kutta_steps_have_four_evaluations():
    pipe = Pipe(PNDMScheduler(skip_prk_steps=False))
    expected = [(number, 5) for number in (0, 1, 2) for _ in range(4)] + [(3, 5), (4, 5)]
    assert steps_of(RunSteps(), pipe, pipe.begin(5)) == expected


EVALUATED_TWICE = {"heun", "dpm2", "dpm2-a", "dpm++sde"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_evaluations_of_one_step_count_as_one(name):
    pytest.importorskip("torchsde" if name == "dpm++sde" else "scipy" if name == "lms" else "torch")
    pipe, steps = pipe_of(name), RunSteps()
    found = steps_of(steps, pipe, pipe.begin(5))
    expected = one_each(5)
    if name == "pndm":
        expected = [expected[0], *expected]
    elif name in EVALUATED_TWICE:
        expected = sorted(expected * 2)[:-1]
    assert found == expected
    assert steps_of(steps, pipe, pipe.begin(5)) == expected  # another picture with the same timesteps
    assert steps_of(steps, pipe, pipe.begin(3))[-1] == (2, 3)


@pytest.mark.parametrize(
    ("name", "skipped", "expected"),
    [
        ("ddim", 2, one_each(3)),
        ("euler", 3, one_each(2)),
        ("pndm", 1, [(0, 4), *one_each(4)]),
        ("pndm", 2, [(0, 3), *one_each(3)]),
        ("heun", 4, sorted(one_each(3) * 2)[:-1]),
    ],
)
def test_a_run_from_an_image_is_what_really_runs(name, skipped, expected):
    pipe = pipe_of(name)
    assert steps_of(RunSteps(), pipe, pipe.begin(5, skipped)) == expected


def test_two_pipelines_that_share_a_schedule_count_it_whole():
    base, refiner = (pipe_of("euler", **{name: 0.6}) for name in ("denoising_end", "denoising_start"))
    assert steps_of(RunSteps(), base, base.begin(5)[:3]) == one_each(3, total=5)
    assert steps_of(RunSteps(), refiner, refiner.begin(5, 3)) == one_each(5, first=3)
    alone = pipe_of("euler", denoising_end=None, denoising_start=1.0)  # diffusers heeds neither
    assert steps_of(RunSteps(), alone, alone.begin(5, 3)) == one_each(2)


def test_runs_that_end_early_take_turns_or_leave_steps_out_are_told_apart():
    steps, one, other = RunSteps(), pipe_of("ddim"), pipe_of("euler")
    assert steps_of(steps, one, one.begin(6)[:2]) == one_each(2, total=6)  # interrupted
    first, second = one.begin(6), other.begin(4)
    taken = [found for pair in zip(first, second, strict=False) for found in zip((one, other), pair, strict=True)]
    numbers = [steps.step_of(*pair) for pair in taken]
    assert numbers == [found for number in range(4) for found in ((number, 6), (number, 4))]
    assert steps.step_of(one, first[3]) == (3, 6)  # once more
    assert steps.step_of(one, first[5]) == (5, 6)  # one was left out
    assert steps.step_of(one, first[0]) == (0, 6)  # the same schedule from its beginning
    with pytest.raises(EngineError, match=r"Pipe calls its unet at the timestep 0\.5, which is none"):
        steps.step_of(one, 0.5)


def test_the_pipelines_whose_rows_are_known_are_diffusers_own():
    for name, (copies, group) in guided_rows.ROWS.items():
        there = vars(importlib.import_module(name)).values()
        own = [one for one in there if inspect.isclass(one) and one.__module__ == name and hasattr(one, "from_pipe")]
        (text,) = (inspect.getsource(one.__call__) for one in own)
        doubled = f"torch.cat([latents] * {copies})" in text
        assert doubled == ("LatentConsistency" not in own[0].__name__)  # whose rows are never doubled
        assert ("noise_pred_text, noise_pred_image, noise_pred_uncond = " in text) == (group == 0)


def test_a_module_that_nobody_s_pipeline_calls_computes_all_rows():
    assert calling_pipeline() is None
    forward = GuidedForward(GuidanceInterval(0.5, 1), lambda sample, timestep: sample)
    rows = torch.arange(4.0).reshape(2, 2)
    assert torch.equal(forward(rows, 1), rows)

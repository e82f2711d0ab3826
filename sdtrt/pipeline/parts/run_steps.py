"""Which step of a pipeline's run a call of a module belongs to.

diffusers gives a module the timestep alone. Its place is looked up in what the pipeline's scheduler runs; schedulers
evaluate more often than they step, and evaluations of one step count as one. Knows schedulers. Knows no rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import PNDMScheduler

from sdtrt.common.errors import EngineError


@dataclass
class _Run:
    """One run of a pipeline, as far as it has come.

    Args:
        schedule: the scheduler's own tensor: each run has a new one.
        values: what is in it.
        begin: the place where the run began: img2img leaves out what comes before.
        at: the place of the last call.
    """

    schedule: torch.Tensor
    values: list[float]
    begin: int = 0
    at: int = -1


class RunSteps:
    """Follows one module's calls through the runs of the pipelines that it is a part of.

    Pipelines may take turns, be interrupted, and begin anew with other steps or the same ones.
    """

    def __init__(self) -> None:
        self._runs: WeakKeyDictionary[Any, _Run] = WeakKeyDictionary()

    def step_of(self, pipe: Any, timestep: torch.Tensor | float) -> tuple[int, int]:
        """The number of a call's step, from 0, and how many steps there are.

        Of a run that a refiner goes on with, or goes on with itself, both count: the steps are the whole schedule's.
        Else they are those that run, from where img2img begins.

        Raises:
            EngineError: for a timestep that the pipeline's scheduler does not run.
        """
        run = self._found(pipe, _number(timestep))
        begin = 0 if _goes_on(pipe) else run.begin
        last = len(run.values) - 1 - begin
        return _step(pipe.scheduler, run.at - begin), _step(pipe.scheduler, last) + 1

    def _found(self, pipe: Any, value: float) -> _Run:
        """The run that a call belongs to, which has come to there."""
        schedule, run = pipe.scheduler.timesteps, self._runs.get(pipe)
        if run is None or run.schedule is not schedule:
            run = self._runs[pipe] = _Run(schedule, schedule.tolist())
        elif run.values[run.at + 1 : run.at + 2] == [value]:
            run.at += 1
            return run
        elif run.values[run.at] == value:  # once more
            return run
        places = [place for place, one in enumerate(run.values) if one == value]
        if not places:
            raise EngineError(
                f"{type(pipe).__name__} calls its unet at the timestep {value:g}, which is none of its scheduler's",
                hint="leave guidance_interval out: which step it is can't be told",
            )
        later = [place for place in places if place > run.at >= 0]
        if later:  # steps were left out
            run.at = later[0]
        else:
            run.begin = run.at = _begin(pipe, places, len(run.values))
        return run


def _step(scheduler: Any, evaluation: int) -> int:
    """The step that an evaluation of a run belongs to, both from 0."""
    if not isinstance(scheduler, PNDMScheduler):
        return evaluation // int(scheduler.order)
    runge_kutta = len(scheduler.prk_timesteps)  # of four evaluations a step; without them the first step has two
    if not runge_kutta:
        return max(evaluation - 1, 0)
    return min(evaluation, runge_kutta) // 4 + max(evaluation - runge_kutta, 0)


def _begin(pipe: Any, places: list[int], count: int) -> int:
    """Where a run begins, of the places that its first timestep has: some schedulers run one twice."""
    told = getattr(pipe.scheduler, "begin_index", None)
    left = [place for place in places if count - place == getattr(pipe, "_num_timesteps", None)]
    return told if told in places else (left or places)[0]


def _goes_on(pipe: Any) -> bool:
    """Whether two pipelines share the noise schedule: diffusers' `denoising_end` and `denoising_start`."""
    shares = (getattr(pipe, name, None) for name in ("denoising_end", "denoising_start"))
    return any(isinstance(share, float) and 0 < share < 1 for share in shares)  # diffusers heeds no others


def _number(timestep: torch.Tensor | float) -> float:
    """A timestep's value; of one for each row the first, as all are the same."""
    return float(torch.as_tensor(timestep).reshape(-1)[0])

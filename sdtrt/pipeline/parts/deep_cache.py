"""Deep caching: which of a UNet's two programs a step runs, and the deep feature that is kept from step to step.

A step is an evaluation of the UNet, one of a scheduler's timesteps. What is kept is dropped where a run ends or another
begins, and where the prompt, the size, the number of rows or adapters change. Knows the schedulers of diffusers'
pipelines. Knows no engine directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sdtrt.backends.session import Session
from sdtrt.common.console import Console
from sdtrt.pipeline.parts.calling import calling_pipeline
from sdtrt.pipeline.parts.forwards import UNetForward
from sdtrt.specs.deep_features import given_feature
from sdtrt.specs.savings import DeepCaching, few_steps


@dataclass(frozen=True)
class _Kept:
    """A deep feature, and what it is of.

    Args:
        states: the conditioning, kept so that no other tensor comes to lie in its memory.
        of: the rest that a step must have in common with the one that made it.
    """

    feature: torch.Tensor
    states: torch.Tensor
    of: tuple[object, ...]

    def serves(self, states: torch.Tensor, of: tuple[object, ...]) -> bool:
        """Whether a step may go on from it. Views of one conditioning are the same one."""
        return self.of == of and _memory(self.states) == _memory(states)


class DeepCache:
    """Decides at each call of a UNet which program runs it. All engines of one UNet share this.

    Args:
        caching: what is asked for now.
        console: is told where nothing is kept.
        state: what of the weights may change in a run: another value, and the feature is dropped.
    """

    def __init__(
        self, caching: Callable[[], DeepCaching], console: Console, state: Callable[[], object] = lambda: None
    ) -> None:
        self._caching, self._console, self._state = caching, console, state
        self._schedule: torch.Tensor | None = None  # the scheduler's own tensor: each run has a new one
        self._whole: frozenset[int] | None = None  # None where each step is
        self._step, self._steps = 0, 0
        self._kept: _Kept | None = None
        self._of: tuple[object, ...] = ()
        self._said: set[str] = set()

    def take(self, timestep: torch.Tensor | float, states: torch.Tensor, *of: object) -> torch.Tensor | None:
        """The deep feature that the next step goes on from; None where it is a whole one.

        Args:
            timestep, states: of the call, as its pipeline passes them.
            of: what a step must have in common with the one whose feature it takes.
        """
        self._look(timestep)
        step, self._step = self._step, self._step + 1
        self._of = (*of, self._state())
        kept, is_whole = self._kept, self._whole is None or step in self._whole
        if self._is_over:
            self._kept = None
        if is_whole or kept is None or not kept.serves(states, self._of):
            self._kept = None
            return None
        return kept.feature

    def keep(self, feature: torch.Tensor, states: torch.Tensor) -> None:
        """Keep the feature of the whole step that `take` asked for, where a later one may take it."""
        if self._whole is not None and not self._is_over:
            self._kept = _Kept(feature, states, self._of)

    @property
    def _is_over(self) -> bool:
        """Whether the step that was taken last is its run's last."""
        return self._step >= self._steps

    def _look(self, timestep: torch.Tensor | float) -> None:
        """Find whether a run begins with this call."""
        found = calling_pipeline()
        scheduler = None if found is None else getattr(found.pipe, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if schedule is None or schedule is not self._schedule:
            self._kept, self._schedule, self._step = None, schedule, 0
            self._steps = 0 if schedule is None else _steps_from(scheduler, timestep)
            self._whole = self._plan()

    def _plan(self) -> frozenset[int] | None:
        """The whole steps of the run that begins; None for all."""
        asked = self._caching()
        if asked.is_off:
            return None
        if not self._steps:
            self._say("deep caching: off, as no pipeline of diffusers calls the unet at its scheduler's timesteps")
            return None
        left = asked.over(self._steps)
        if left.is_off:
            self._say(few_steps(self._steps))
            return None
        return left.whole_steps(self._steps)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._console.note(text)
        self._said.add(text)


class CachedForward(UNetForward):
    """A UNet's forward whose engine gives a deep feature, with one beside it that goes on from such.

    Args:
        session: runs the whole program.
        shallow: runs the shallow one; who opened it closes it.
        device, way_out: as of `UNetForward`.
        cache: says which one runs.
    """

    def __init__(
        self,
        session: Session[torch.Tensor],
        shallow: Session[torch.Tensor],
        device: torch.device,
        cache: DeepCache,
        way_out: str = "use --backend torch",
    ) -> None:
        super().__init__(session, session.contract, device, way_out)
        feature = given_feature(session.contract)
        assert feature is not None
        self._shallow, self._cache, self._feature = shallow, cache, feature.name

    def evaluate(
        self, feeds: dict[str, torch.Tensor], timestep: torch.Tensor | float, states: torch.Tensor
    ) -> torch.Tensor:
        """The noise, by the program that the step is for."""
        kept = self._cache.take(timestep, states, self._feature, feeds["sample"].shape, feeds["sample"].dtype)
        noise = self.contract.outputs[0].name
        if kept is None:
            outputs = self.session.run(feeds)
            self._cache.keep(outputs[self._feature], states)
            return outputs[noise]
        given: dict[str, Any] = {**feeds, self._feature: kept}
        return self._shallow.run({spec.name: given[spec.name] for spec in self._shallow.inputs})[noise]


def _memory(tensor: torch.Tensor) -> tuple[int, torch.device]:
    """Where a tensor's memory is."""
    return tensor.untyped_storage().data_ptr(), tensor.device


def _steps_from(scheduler: Any, timestep: torch.Tensor | float) -> int:
    """How many evaluations a run has that begins at a timestep; 0 for one that is none of the scheduler's.

    With a refiner behind it a pipeline ends sooner: what is kept then stays until the next run.
    """
    values = scheduler.timesteps.tolist()
    first = float(torch.as_tensor(timestep).reshape(-1)[0])
    told = getattr(scheduler, "begin_index", None)
    if told is not None and told < len(values) and values[told] == first:  # some schedulers run a timestep twice
        return len(values) - int(told)
    return len(values) - values.index(first) if first in values else 0

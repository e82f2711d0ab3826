"""Guidance in a part of a run: outside of it a module computes the prompt's rows alone, and gives them for all rows.

Then u + s * (c - u) = c, whatever the pipeline's formula makes of that, and no callback is needed. Knows which rows of
diffusers' pipelines are the prompt's, and tensors. Knows no engine: who runs one asks how many rows there are to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from sdtrt.common.errors import EngineError, UsageError
from sdtrt.pipeline.parts.calling import calling_pipeline
from sdtrt.pipeline.parts.run_steps import RunSteps
from sdtrt.specs import GuidanceInterval
from sdtrt.specs.groups import FREE_U
from sdtrt.specs.image_prompts import SCALE

_PIPELINES = "diffusers.pipelines."
_USUAL = (
    *(f"stable_diffusion.pipeline_stable_diffusion{task}" for task in ("", "_img2img", "_inpaint")),
    *(f"stable_diffusion_xl.pipeline_stable_diffusion_xl{task}" for task in ("", "_img2img", "_inpaint")),
    *(f"controlnet.pipeline_controlnet{task}" for task in ("", "_img2img", "_inpaint")),
    *(f"controlnet.pipeline_controlnet{task}" for task in ("_sd_xl", "_sd_xl_img2img", "_inpaint_sd_xl")),
    *(f"controlnet.pipeline_controlnet_union{task}" for task in ("_sd_xl", "_sd_xl_img2img", "_inpaint_sd_xl")),
    *(f"t2i_adapter.pipeline_stable_diffusion{kind}_adapter" for kind in ("", "_xl")),
    *(f"latent_consistency_models.pipeline_latent_consistency_{task}" for task in ("text2img", "img2img")),
)
_EDITS = (
    "stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix",
    "stable_diffusion_xl.pipeline_stable_diffusion_xl_instruct_pix2pix",
)
# By the module of a pipeline's call: how many groups of rows guidance makes, and which of them is the prompt's.
ROWS: Mapping[str, tuple[int, int]] = {
    **{_PIPELINES + name: (2, 1) for name in _USUAL},  # negative prompt, prompt
    **{_PIPELINES + name: (3, 0) for name in _EDITS},  # prompt, image alone, neither
}
# What all steps of a run have in common: a slice of it is kept, so that what is made of it is made once.
_KEPT = ("encoder_hidden_states", "added_cond_kwargs", "controlnet_cond")
_PLACES = ("sample", "timestep", "encoder_hidden_states")  # of the first arguments
_NUMBERS = (SCALE, FREE_U)  # among the added conditioning, and for all rows alike
_WHOLE = ("cross_attention_kwargs", "conditioning_scale")  # which have no rows


@dataclass(frozen=True)
class PromptRows:
    """The rows of a call that are the prompt's.

    Args:
        total: of the call.
        copies: how many times as many as the prompt's.
        group: the number of theirs.
    """

    total: int
    copies: int
    group: int

    @property
    def count(self) -> int:
        """How many they are."""
        return self.total // self.copies

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of these rows; a tensor of another number of rows stays, as it is for each row."""
        if tensor.ndim == 0 or tensor.shape[0] != self.total:
            return tensor
        return tensor[self.group * self.count : (self.group + 1) * self.count]


class GuidedRows:
    """Which rows of one module's calls are computed.

    `look` comes before each call. Nothing else is called then but `run`, for which it counts.

    Attributes:
        now: the rows that are computed alone; None where all are.
        counts: all numbers of rows that calls of this run have.
    """

    def __init__(self) -> None:
        self.now: PromptRows | None = None
        self.counts: tuple[int, ...] = ()
        self._steps = RunSteps()
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def look(self, interval: GuidanceInterval, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Find how many rows of a call are to be computed.

        A call that no pipeline makes, one without guidance, and one of a ControlNet in guess mode, which has the
        prompt's rows alone, are computed as they are.

        Args:
            args, kwargs: of a UNet or a ControlNet, as diffusers calls it.

        Raises:
            EngineError: where it can't be told which rows are the prompt's, or which step it is.
        """
        sample = args[0] if args else kwargs["sample"]
        rows = int(sample.shape[0])
        self.now, self.counts = None, (rows,)
        if interval.is_whole or kwargs.get("guess_mode"):
            return rows
        found = calling_pipeline()
        if found is None:
            return rows
        if found.module not in ROWS:
            raise _unknown(type(found.pipe).__name__)
        if not found.is_guided:
            return rows
        prompts = PromptRows(rows, *ROWS[found.module])
        self.counts = (rows, prompts.count)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if interval.holds(*self._steps.step_of(found.pipe, timestep)):
            self._kept.clear()
            return rows
        self.now = prompts
        return prompts.count

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a forward with the rows that `look` found, and give its result for all rows."""
        if self.now is None:
            return forward(*args, **kwargs)
        kept, self._kept = self._kept, {}
        names = (*_PLACES, *[""] * len(args))
        cut = [self._cut(one, name, kept) for one, name in zip(args, names, strict=False)]
        named = {name: self._cut(one, name, kept) for name, one in kwargs.items()}
        return _repeated(forward(*cut, **named), self.now.copies)

    def _cut(self, value: Any, name: str, kept: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """The prompt's rows of an argument: of a tensor, of each in a list or a dictionary."""
        assert self.now is not None
        if name in _WHOLE:
            return value
        if isinstance(value, Mapping):
            return {key: one if key in _NUMBERS else self._cut(one, name, kept) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(one, name, kept) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        source, part = kept.get(id(value), (None, value))
        if source is not value:
            part = self.now.of(value)
        if name in _KEPT:
            self._kept[id(value)] = value, part
        return part


class GuidedForward:
    """The forward of a facade, or of a module that PyTorch runs, with guidance in a part of a run.

    Args:
        interval: that part.
        whole: computes all rows.
        part: computes the prompt's rows, in an engine for so many; None where `whole` takes them as well.
        part_rows: the most rows of that engine. Calls without guidance have no more, and run in it, too.
    """

    def __init__(
        self,
        interval: GuidanceInterval,
        whole: Callable[..., Any],
        part: Callable[..., Any] | None = None,
        part_rows: int = 0,
    ) -> None:
        self.rows = GuidedRows()
        self._interval, self._whole = interval, whole
        self._part, self._part_rows = part or whole, part_rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for all rows. Raises as of `GuidedRows.look`, and as the forwards do."""
        count = self.rows.look(self._interval, args, kwargs)
        return self.rows.run(self._part if count <= self._part_rows else self._whole, *args, **kwargs)


def computed_rows(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What takes of a call's tensors the rows that a module's last call computed."""
    forward = module.forward
    now = forward.rows.now if isinstance(forward, GuidedForward) else None
    return (lambda tensor: tensor) if now is None else now.of


def check_is_guided(interval: GuidanceInterval, *, guidance: bool) -> None:
    """Raise `UsageError` for a part of a run in which there is no guidance at all."""
    if not guidance and not interval.is_whole:
        raise UsageError(
            f"guidance_interval {interval} is about guidance, and guidance=False says that there is none",
            hint="leave one of the two out",
        )


def refuse_rows(pipe: Any) -> None:
    """Raise `EngineError` for a pipeline of which it is not known what its rows mean."""
    if not any(one.__module__ in ROWS for one in type(pipe).__mro__):
        raise _unknown(type(pipe).__name__)


def _unknown(name: str) -> EngineError:
    return EngineError(
        f"guidance_interval does not know which rows of {name} are the prompt's",
        hint="leave it out for this pipeline; it is for diffusers' own of Stable Diffusion 1.x, 2.x and XL, with"
        " ControlNet, T2I-Adapter and instruct-pix2pix, and for subclasses that call these",
    )


def _repeated(value: Any, copies: int) -> Any:
    """A result's tensors, each so many times one behind the other."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * copies)
    if isinstance(value, BaseOutput):
        return type(value)(**{name: _repeated(one, copies) for name, one in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(one, copies) for one in value)
    return value

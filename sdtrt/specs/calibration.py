"""What an ONNX graph in 8 bits is made with: the pictures whose numbers it is scaled by, and the layers that are left.

It names layers by patterns. It does not know how numbers are gathered, nor what a graph looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import SAMPLE_PROMPT

MOST_STEPS = 1000

# Colours, light, people, and what the miniature draws: inputs of different sizes, in a few pictures.
PROMPTS = (
    SAMPLE_PROMPT,
    "a photo of an old fisherman in a yellow coat, detailed face, evening light",
    "a watercolour of a mountain lake with pine trees under a cloudy sky",
    "a small blue square to the left of a large green star on a white background",
)

# Of the linear layers of transformers those that stay in 16 bits: what they are in engines of inductor, where keys and
# values of a text are of too few rows to gain by less; and what leaves a feed-forward. Inputs have one scale for all
# tokens here (TensorRT has no other), which costs most where few tokens are much larger than the rest. On the built-in
# model in int8 the mean error of two held-out pictures' steps is 0.025 with that layer in 8 bits, and 0.009 without.
KEPT: tuple[str, ...] = ("*.attn1.to_out.0", "*.attn2.to_k", "*.attn2.to_v", "*.ff.net.2")


@dataclass(frozen=True)
class Calibration:
    """The pictures whose steps say how large each layer's inputs get: their scales are fixed in a TensorRT engine.

    Args:
        prompts: one picture each, of the model's own size.
        steps: of each, over the whole run.
        kept: patterns of the names of linear layers that stay in 16 bits.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 5
    kept: tuple[str, ...] = KEPT

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(one, str) for one in self.prompts):
            raise UsageError(
                f"calibration needs prompts, got {self.prompts!r}", hint='use --calibration-prompt "a lighthouse"'
            )
        if not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(
                f"a calibration's pictures take 1 to {MOST_STEPS} steps, got {self.steps}", hint="use 5 steps"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, and of `to_json`."""
        return cls(**{**data, "prompts": tuple(data["prompts"]), "kept": tuple(data["kept"])})

    def to_json(self) -> dict[str, Any]:
        """Plain data, for keys."""
        return {"prompts": list(self.prompts), "steps": self.steps, "kept": list(self.kept)}

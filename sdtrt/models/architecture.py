"""What a part of a model is built like, whatever its weights: all that fine-tunes of one model share.

Knows the classes' own defaults, so that a configuration that spells one out is the same as one that leaves it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sdtrt.models.live import LiveModel, base_of
from sdtrt.models.loading import build_module, class_defaults
from sdtrt.models.resolve import Model
from sdtrt.models.source import ModelSource
from sdtrt.specs.contract import Contract

if TYPE_CHECKING:
    import torch

FILLED = 0.02  # the deviation of weights that begin as zeros
SEED = 0  # of the weights that stand in for a live module's

# What decides nothing of what a part computes: where it came from, how it was trained, what pipelines do around it.
_WITHOUT_EFFECT = frozenset(
    {
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "force_upcast",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dropout",
        "dtype",
        "initializer_factor",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
    }
)


@dataclass(frozen=True)
class Blueprint:
    """What a module of a live pipeline is built like: enough to make one in another process, with other weights.

    Args:
        class_name: of diffusers or transformers.
        config: its whole configuration, plain data.
    """

    class_name: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, model: LiveModel, part: str) -> Self:
        """That of a live model's part."""
        return cls(_class_name(model, part), json.loads(json.dumps(model.config(part), default=str)))

    def with_seeded_weights(self, dtype: torch.dtype) -> torch.nn.Module:
        """A module like it, on the CPU, with the weights that its library begins a training with: always the same."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            module = build_module(self.class_name, dict(self.config)).to(dtype).eval().requires_grad_(False)
            if self.class_name == "ControlNetModel":  # its residuals begin as zeros, which would prove nothing
                _fill_zeros(module)
            return module


def _fill_zeros(module: torch.nn.Module) -> None:
    """Draw the weights of those layers that begin as zeros."""
    for tensor in module.parameters():
        if tensor.ndim > 1 and not tensor.any():
            tensor.normal_(std=FILLED)


def architecture_of(model: ModelSource, part: str) -> dict[str, Any]:
    """The class of a model's part, and those values of its configuration that are not the class's defaults.

    Raises:
        ModelError: as of `Model.config`.
    """
    name = _class_name(model, part)
    defaults = class_defaults(name)
    values = {
        key: value
        for key, value in model.config(part).items()
        if key in defaults and key not in _WITHOUT_EFFECT and not _same(value, defaults[key])
    }
    return {"class": name, "values": values}


def architecture_fingerprint(model: ModelSource, part: str, contract: Contract) -> str:
    """Sha256 of what a part is built like, and of the inputs and outputs of the component that is made of it."""
    content = {"part": part, "architecture": architecture_of(model, part), "contract": contract.to_json()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _class_name(model: ModelSource, part: str) -> str:
    """The class of a part; of a live one that of diffusers or transformers which it is derived from."""
    if isinstance(model, LiveModel):
        return base_of(type(model.modules[part])).__name__
    assert isinstance(model, Model)
    return model.class_name(part)


def _same(value: Any, default: Any) -> bool:
    """Whether two values of a configuration are the same in JSON, which has no tuples."""
    return bool(json.dumps(value, default=repr) == json.dumps(default, default=repr))

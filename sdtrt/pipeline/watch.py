"""A watch over the weights and the structure of a module that an engine stands in for: no change goes unnoticed.

Knows modules and tensors. Knows no engine: it compares what is there with what was there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sdtrt.common.errors import EngineError
from sdtrt.models.live import component_tensors, is_of_transformers, weights_digest
from sdtrt.specs import Component, Precision

SAMPLES = 16  # numbers of each tensor that are compared at each look
WAY_OUT = (
    "sdtrt.accelerate(pipe) again finds or builds engines of the weights as they are now;"
    " sdtrt.restore(pipe) goes back to PyTorch"
)
# What attention processors of diffusers compute is the same; others change the result, or keep it for themselves.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
_FREE_U = ("s1", "s2", "b1", "b2")

Place = tuple[int, int, int, torch.dtype, torch.device]  # object, address, version, dtype, device


@dataclass(frozen=True)
class _Look:
    """What a look at a module found."""

    places: tuple[Place, ...]
    layers: tuple[tuple[int, type], ...]
    samples: torch.Tensor

    def is_like(self, other: _Look) -> bool:
        """Whether nothing that is looked at has changed."""
        return self.places == other.places and self.layers == other.layers and self.has_numbers_of(other)

    def has_numbers_of(self, other: _Look) -> bool:
        """Whether the numbers that are compared are the same, in whatever dtype and place."""
        return torch.equal(self.samples, other.samples)


class WeightsWatch:
    """Tells whether a module still is what an engine was made of.

    A look takes milliseconds: it compares each tensor's object, address, version and dtype, some of its numbers
    (`.data.add_()` changes nothing else), each layer's class, and what changes a result without a tensor. What lies
    elsewhere, as after `.to()`, is held against the digest. Numbers that are changed in place, through `.data`, and
    are not among those compared stay unseen: adding an adapter changes nearly all of a layer's.

    Args:
        module: the part of the pipeline.
        component: what of it the engine runs.
        precision: the engine's.
        digest: of the weights that the engine has (`weights_digest`).
    """

    def __init__(self, module: torch.nn.Module, component: Component, precision: Precision, digest: str) -> None:
        self.component, self.precision, self.digest = component, precision, digest
        self._seen = _look(module, component)

    def check(self, module: torch.nn.Module) -> None:
        """Raise `EngineError` where the module computes something else than the engine does."""
        refuse_changes(module, self.component)
        now = _look(module, self.component)
        if now.is_like(self._seen):
            return
        same_layers = now.layers == self._seen.layers
        if same_layers and _only_cast(now, self._seen) and now.has_numbers_of(self._seen):
            self._seen = now  # SDXL's pipelines widen their VAE for each picture
            return
        if not same_layers or self.differs(module):
            raise EngineError(
                f"the {self.component} has other weights than its engine: {_difference(now, self._seen)}", hint=WAY_OUT
            )
        self._seen = now

    def differs(self, module: torch.nn.Module) -> bool:
        """Whether the module's weights are others than the engine's; reads all of them."""
        return weights_digest(module, self.component, self.precision) != self.digest

    def moved(self, module: torch.nn.Module) -> None:
        """Take the module's tensors as they lie now for unchanged: the caller has moved them."""
        self._seen = _look(module, self.component)


def refuse_changes(module: torch.nn.Module, component: Component) -> None:
    """Raise `EngineError` for what changes a module's results without a tensor, and no engine does."""
    for name, layer in module.named_modules():
        processor = layer.__dict__.get("processor") or layer._modules.get("processor")
        if processor is not None and type(processor).__name__ not in PLAIN_PROCESSORS:
            raise _refusal(component, f"the attention processor {type(processor).__name__}", "set_attn_processor")
        if layer.__dict__.get("fused_projections"):
            raise _refusal(component, "fused projections", "pipe.unfuse_qkv_projections()")
        if "tuners" in type(layer).__module__ and type(layer).__module__.startswith("peft."):
            raise _refusal(component, "LoRA layers", "pipe.fuse_lora(), then pipe.unload_lora_weights()")
        if any(layer.__dict__.get(word) is not None for word in _FREE_U):
            raise _refusal(component, "FreeU", "pipe.disable_freeu()")
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        if name and not all(map(is_of_transformers, hooks)):
            raise _refusal(component, f"hooks on {name}, which an engine doesn't call", "their handles' remove()")


def _refusal(component: Component, what: str, mend: str) -> EngineError:
    return EngineError(
        f"the {component} has {what}", hint=f"take that away with {mend}; or sdtrt.restore(pipe) goes back to PyTorch"
    )


def _look(module: torch.nn.Module, component: Component) -> _Look:
    tensors = list(component_tensors(module, component).values())
    layers = tuple((id(layer), type(layer)) for layer in module.modules())
    return _Look(tuple(map(_place, tensors)), layers, _samples(tensors))


def _place(tensor: torch.Tensor) -> Place:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


def _samples(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Some numbers of each tensor, evenly spread over its memory, as float64 on the CPU; one copy from each device."""
    found: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        found[tensor.device, tensor.dtype].append((number, _some(tensor.detach())))
    parts: dict[int, torch.Tensor] = {}
    for some in found.values():
        joined = torch.cat([part for _, part in some]).to("cpu", torch.float64)
        lengths = [part.numel() for _, part in some]
        parts |= dict(zip((number for number, _ in some), joined.split(lengths), strict=True))
    ordered = [parts[number] for number in sorted(parts)]
    return torch.nan_to_num(torch.cat(ordered)) if ordered else torch.empty(0)


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `SAMPLES` numbers of a tensor, and no copy of it, as far as it lies in one block."""
    count = tensor.numel()
    number = min(count, SAMPLES)
    step = max(1, (count - 1) // max(1, number - 1))
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if not dense:
        return tensor.reshape(-1)[:: max(step, 1)][:number]
    return torch.as_strided(tensor, (number,), (step,), tensor.storage_offset())


def _only_cast(now: _Look, before: _Look) -> bool:
    """Whether the same parameters lie there in another dtype."""
    pairs = list(zip(now.places, before.places, strict=False))
    same = len(now.places) == len(before.places) and all(one[0] == other[0] for one, other in pairs)
    return same and all(one[3] != other[3] for one, other in pairs if one[:3] != other[:3])


def _difference(now: _Look, before: _Look) -> str:
    """What has changed, in a few words."""
    if now.layers != before.layers:
        return "it has other layers"
    if [place[3] for place in now.places] != [place[3] for place in before.places]:
        return f"it was cast to {now.places[0][3]}".replace("torch.", "")
    return "they were changed after sdtrt.accelerate"


def describe(module: Any) -> str:
    """`UNet2DConditionModel`."""
    return type(module).__name__

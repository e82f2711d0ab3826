"""A watch over the weights and the structure of a module that an engine stands in for: no change goes unnoticed.

Knows modules and tensors. Knows no engine: it compares what is there with what was there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from sdtrt.common.errors import EngineError
from sdtrt.models.live import component_tensors, is_of_transformers, weights_digest
from sdtrt.pipeline.parked import ComesBack
from sdtrt.specs import Component, Precision

SAMPLES = 16  # numbers of each tensor that are compared at each look
WORD_BYTES = 8  # of the whole numbers that are added: their sums are exact, and as fast as memory is read
BLOCK_WORDS = 512  # 4 KiB, of which a whole reading keeps one sum
SMALL_WORDS = 8 * BLOCK_WORDS
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
        return self.places == other.places and self.has_numbers_of(other)

    def has_numbers_of(self, other: _Look) -> bool:
        """Whether the numbers that are compared are the same, in whatever dtype and place."""
        return torch.equal(self.samples, other.samples)


class WeightsWatch:
    """Tells whether a module still is what an engine was made of.

    A look takes milliseconds: it compares each tensor's object, address, version and dtype, some of its numbers, each
    layer's class, and what changes a result without a tensor. A whole reading compares all numbers, by a sum of each
    4 KiB: `.data[5] = 0` moves neither address nor version. It takes as long as memory is read (25 GB/s a core), so it
    is for once a picture. What lies elsewhere, as after `.to()`, is read whole at once.

    Args:
        module: the part of the pipeline.
        component: what of it the engine runs.
        precision: the engine's.
        digest: of the weights that the engine has (`weights_digest`).
    """

    _seen: _Look
    _dtypes: list[torch.dtype]  # of the tensors when their sums were taken
    _sums: torch.Tensor

    def __init__(self, module: torch.nn.Module, component: Component, precision: Precision, digest: str) -> None:
        self.component, self.precision, self.digest = component, precision, digest
        self._take(module)

    def look(self, module: torch.nn.Module) -> None:
        """Raise `EngineError` where a look, which costs little, tells that the module computes something else."""
        refuse_changes(module, self.component)
        now = _look(module, self.component)
        if now.layers != self._seen.layers:
            raise self._changed(now)
        if not now.is_like(self._seen):
            self._compare(module, now)

    def read(self, module: torch.nn.Module) -> None:
        """Raise `EngineError` where any number of the weights is another one.

        What lies on a GPU is waited for last: it may be busy.
        """
        if not torch.equal(self._sums_of(module), self._sums):
            self._compare(module, _look(module, self.component))

    def differs(self, module: torch.nn.Module) -> bool:
        """Whether the module's weights are others than the engine's, by their digest."""
        return weights_digest(module, self.component, self.precision) != self.digest

    def moved(self, module: torch.nn.Module) -> None:
        """Take the places where the module's tensors lie now for those where they lay: the caller has moved them."""
        self._seen = replace(self._seen, places=_look(module, self.component).places)

    def _take(self, module: torch.nn.Module) -> None:
        self._seen = _look(module, self.component)
        self._dtypes = [tensor.dtype for tensor in component_tensors(module, self.component).values()]
        self._sums = self._sums_of(module)

    def _compare(self, module: torch.nn.Module, now: _Look) -> None:
        """Read the weights whole. Where that tells of a change, their digest decides: another layout is none."""
        if now.has_numbers_of(self._seen) and torch.equal(self._sums_of(module), self._sums):
            self._seen = now  # moved, or widened, as SDXL's pipelines do with their VAE for each picture
            return
        if self.differs(module):
            raise self._changed(now)
        self._take(module)

    def _sums_of(self, module: torch.nn.Module) -> torch.Tensor:
        return block_sums(component_tensors(module, self.component).values(), self._dtypes)

    def _changed(self, now: _Look) -> EngineError:
        return EngineError(
            f"the {self.component} has other weights than its engine: {_difference(now, self._seen)}", hint=WAY_OUT
        )


def refuse_changes(module: torch.nn.Module, component: Component) -> None:
    """Raise `EngineError` for what changes a module's results without a tensor, and no engine does."""
    for name, layer in module.named_modules():
        if (mover := moved_by(layer)) is not None:
            raise EngineError(
                f"the {component} has hooks of {mover} (offloading, casting, caching): engines do without them",
                hint="sdtrt.restore(pipe) goes back to PyTorch; or load the pipeline without them",
            )
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
        if name and not all(is_of_transformers(hook) or isinstance(hook, ComesBack) for hook in hooks):
            raise _refusal(component, f"hooks on {name}, which an engine doesn't call", "their handles' remove()")


def refuse_training(component: Component, module: torch.nn.Module) -> None:
    """Raise `EngineError` where a gradient of a module's weights is wanted: an engine's result has none."""
    if module.training and torch.is_grad_enabled() and any(one.requires_grad for one in module.parameters()):
        raise EngineError(
            f"the {component} is in training mode, and no gradient passes an engine",
            hint=f"sdtrt.restore(pipe) before training; else {component}.eval() or torch.no_grad()",
        )


def moved_by(layer: torch.nn.Module) -> str | None:
    """The library whose hooks move, cast or skip a layer; None where there are none."""
    if layer.__dict__.get("_hf_hook") is not None:
        return "accelerate"
    registry = layer.__dict__.get("_diffusers_hook")  # is left when its hooks are gone
    return "diffusers" if registry is not None and getattr(registry, "hooks", True) else None


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
    """Some numbers of each tensor, evenly spread over its memory, as float64 on the CPU."""
    return torch.nan_to_num(_joined([_some(tensor.detach()) for tensor in tensors], torch.float64))


def _joined(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Rows of numbers, one after the other, on the CPU in `dtype`; one copy from each device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        found[part.device, part.dtype].append(number)
    placed: dict[int, torch.Tensor] = {}
    for numbers in found.values():
        own = [parts[number] for number in numbers]
        rows = torch.cat(own).to("cpu", dtype).split([row.numel() for row in own])
        placed |= dict(zip(numbers, rows, strict=True))
    return torch.cat([torch.empty(0, dtype=dtype), *(placed[number] for number in sorted(placed))])


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `SAMPLES` numbers of a tensor, evenly spread over its memory."""
    count = tensor.numel()
    number = min(count, SAMPLES)
    step = max(1, (count - 1) // max(1, number - 1))
    return _flat(tensor)[::step][:number]


def block_sums(tensors: Iterable[torch.Tensor], dtypes: Iterable[torch.dtype]) -> torch.Tensor:
    """The sums (int64, on the CPU) of each 4 KiB of tensors' memory, each tensor as if it had its dtype.

    One changed number changes one of them. Numbers that change places within 4 KiB do not. Small tensors are added
    together: half of a UNet's have a few KiB, and each call of PyTorch takes longer than their sum.
    """
    sums, small = [], []
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        words = _words(_flat(tensor.detach().to(dtype)))
        small += [words] if words.numel() < SMALL_WORDS else []
        sums += [_sums(words)] if words.numel() >= SMALL_WORDS else []
    return _joined([*sums, _sums(_joined(small, torch.int64))], torch.int64)


def _words(flat: torch.Tensor) -> torch.Tensor:
    """Numbers as whole numbers of 8 bytes, with zeros after them where that takes some."""
    if flat.storage_offset() * flat.itemsize % WORD_BYTES:
        flat = flat.clone()
    if flat.nbytes % WORD_BYTES:
        return pad(flat.view(torch.uint8), (0, -flat.nbytes % WORD_BYTES)).view(torch.int64)
    return flat.view(torch.int64)


def _sums(words: torch.Tensor) -> torch.Tensor:
    """A sum for each whole block, and one for the rest."""
    whole = words.numel() // BLOCK_WORDS * BLOCK_WORDS
    blocks = words[:whole].view(-1, BLOCK_WORDS).sum(1)
    return blocks if whole == words.numel() else torch.cat([blocks, words[whole:].sum(0, keepdim=True)])


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers lie in one block of memory."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers as they lie in memory, and no copy of them, as far as they lie in one block."""
    if not _is_dense(tensor):
        return tensor.reshape(-1)
    return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())


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

"""A watch over the weights and the structure of a module that an engine stands in for: no change goes unnoticed.

Knows modules and tensors. Knows no engine: it compares what is there with what was there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ref

import torch

from sdtrt.common.errors import EngineError
from sdtrt.models.adapters import foreign_layer, layers_of
from sdtrt.models.image_prompts import PROCESSORS
from sdtrt.models.live import HALVES, is_of_transformers, weights_digest
from sdtrt.pipeline.parts.fused import FUSED_PROCESSOR, is_as_unfused
from sdtrt.pipeline.parts.parked import ComesBack
from sdtrt.pipeline.parts.reading import Reading, block_sums, flat_memory, is_dense
from sdtrt.specs import Component, Precision

SAMPLES = 4  # numbers of each tensor that are compared at each look: merges change most of them
WAY_OUT = (
    "sdtrt.accelerate(pipe) again finds or builds engines of the weights as they are now;"
    " sdtrt.restore(pipe) goes back to PyTorch"
)
# What attention processors of diffusers compute is the same; others change the result, or keep it for themselves.
# Those of IP-Adapters are in engines (`image_prompts`).
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", *PROCESSORS)
_MARKS = frozenset({"_hf_hook", "_diffusers_hook", "processor"})

Place = tuple[int, int, int, torch.dtype, torch.device]  # object, address, version, dtype, device


@dataclass(frozen=True)
class _Look:
    """What a look at a module found.

    Args:
        tensors: those that the component computes with, which are not kept alive.
        samples: numbers of those of them that lie in the host's memory.
    """

    tensors: tuple[ref[torch.Tensor], ...]
    places: tuple[Place, ...]
    layers: tuple[tuple[int, type], ...]
    samples: torch.Tensor

    def is_like(self, other: _Look) -> bool:
        """Whether nothing that is looked at has changed."""
        return self.places == other.places and self.has_numbers_of(other)

    def has_numbers_of(self, other: _Look) -> bool:
        """Whether the numbers that are compared are the same, in whatever dtype and place."""
        same_places = self.samples.shape == other.samples.shape  # else tensors went to a GPU, or came from it
        return not same_places or torch.equal(self.samples, other.samples)


class WeightsWatch:
    """Tells whether a module still is what an engine was made of.

    A look takes three milliseconds: it compares each tensor's object, address, version and dtype, some of its numbers,
    and each layer's class. Numbers on a GPU would be waited for, while it computes: it compares none of those.
    A whole reading compares all numbers, by a sum of each 4 KiB: `.data[5] = 0` moves neither address nor version. It
    goes on while others work (`Reading`), and is for once a picture. What lies elsewhere, as after `.to()`, is read
    whole at once.

    One thread at a time calls it. Who moves the tensors stops the reading first.

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
        self._reading: Reading | None = None
        self._again = False  # another reading comes after this one
        self._take(module)

    def look(self, module: torch.nn.Module) -> None:
        """Raise `EngineError` where a look, which costs little, tells that the tensors or layers are others."""
        now = _look(module, self.component)
        if now.layers != self._seen.layers:
            raise self._changed(now)
        if not now.is_like(self._seen):
            self._compare(module, now)

    def begin(self, module: torch.nn.Module) -> None:
        """Begin to read the weights whole, as the last look found them; after the reading that goes on, if one does."""
        self.poll(module)
        self._again = self._reading is not None
        if self._reading is None:
            self._reading = Reading(self._tensors(), self._dtypes)

    def poll(self, module: torch.nn.Module) -> None:
        """Raise `EngineError` where a reading is done by now that found another number."""
        if self._reading is not None and self._reading.is_done:
            self._judge(module)

    def settle(self, module: torch.nn.Module) -> None:
        """Wait for the reading. Raise `EngineError` where any number of the weights is another one."""
        while self._reading is not None:
            self._judge(module)

    def stop(self) -> bool:
        """End the reading that goes on; whether one did."""
        reading, self._reading, self._again = self._reading, None, False
        if reading is not None:
            reading.stop()
        return reading is not None

    def differs(self, module: torch.nn.Module) -> bool:
        """Whether the module's weights are others than the engine's, by their digest."""
        return weights_digest(module, self.component, self.precision) != self.digest

    def moved(self, module: torch.nn.Module) -> None:
        """Take what a look finds now for what it found before: the caller has moved the tensors."""
        self._seen = _look(module, self.component)

    def retake(self, module: torch.nn.Module) -> None:
        """Take layers that others have replaced, with the same numbers. Raise `EngineError` where they have others."""
        self.stop()
        now = _look(module, self.component)
        kinds = [[kind for _, kind in look.layers] for look in (now, self._seen)]
        if kinds[0] != kinds[1] or not torch.equal(block_sums(_there(now), self._dtypes), self._sums):
            raise self._changed(now)
        self._take(module)

    def _judge(self, module: torch.nn.Module) -> None:
        """Compare what a reading found. It began before this: where it tells of a change, the weights are read anew."""
        reading, again = self._reading, self._again
        self._reading, self._again = None, False
        assert reading is not None
        if not torch.equal(reading.wait(), self._sums):
            self._compare(module, _look(module, self.component))
        if again:
            self._reading = Reading(self._tensors(), self._dtypes)

    def _tensors(self) -> list[torch.Tensor]:
        """The tensors that the last look found, as far as they are there."""
        return _there(self._seen)

    def _take(self, module: torch.nn.Module) -> None:
        self._seen = _look(module, self.component)
        self._dtypes = [place[3] for place in self._seen.places]
        self._sums = block_sums(self._tensors(), self._dtypes)

    def _compare(self, module: torch.nn.Module, now: _Look) -> None:
        """Read the weights whole. Where that tells of a change, their digest decides: another layout is none."""
        if now.layers != self._seen.layers or len(now.places) != len(self._seen.places):
            raise self._changed(now)
        if now.has_numbers_of(self._seen) and torch.equal(block_sums(_there(now), self._dtypes), self._sums):
            self._seen = now  # moved, or widened, as SDXL's pipelines do with their VAE for each picture
            return
        if self.differs(module):
            raise self._changed(now)
        self._take(module)

    def _changed(self, now: _Look) -> EngineError:
        return EngineError(
            f"the {self.component} has other weights than its engine: {_difference(now, self._seen)}", hint=WAY_OUT
        )


def refuse_changes(module: torch.nn.Module, component: Component, *, merges: bool = False) -> None:
    """Raise `EngineError` for what changes a module's results without a tensor, and no engine does.

    Args:
        merges: the engine gets the module's weights with the adapters of peft merged.
    """
    layers, adapters = layers_of(module)
    if adapters and not merges:
        raise _refusal_of_adapters(component)
    if (kind := foreign_layer(layers)) is not None:
        raise _refusal(component, f"a layer of peft that is not merged, {kind}", "pipe.unload_lora_weights()")
    for layer in (*layers, *adapters):
        own = layer.__dict__
        if not own.keys().isdisjoint(_MARKS) or "processor" in own["_modules"]:
            _refuse_marks(layer, component)
        if (own["_forward_hooks"] or own["_forward_pre_hooks"]) and layer is not module:
            _refuse_hooks(layer, module, component)


def _refusal_of_adapters(component: Component) -> EngineError:
    """For layers of peft around those of an engine with weights of its own."""
    return EngineError(
        f"the {component} has LoRA layers, and its engine holds weights of its own",
        hint=(
            "pipe.fuse_lora(), then pipe.unload_lora_weights() and sdtrt.accelerate(pipe) again for an engine of that;"
            ' or sdtrt.accelerate(pipe, backend="inductor"), whose engines take LoRAs without a build;'
            " or sdtrt.restore(pipe) goes back to PyTorch"
        ),
    )


def _refuse_marks(layer: torch.nn.Module, component: Component) -> None:
    """Raise `EngineError` for what a layer's attributes say that it does besides."""
    own = layer.__dict__
    if (mover := moved_by(layer)) is not None:
        raise EngineError(
            f"the {component} has hooks of {mover} (offloading, casting, caching): engines do without them",
            hint="sdtrt.restore(pipe) goes back to PyTorch; or load the pipeline without them",
        )
    processor = own.get("processor") or own["_modules"].get("processor")
    name = type(processor).__name__
    if name == FUSED_PROCESSOR and is_as_unfused(layer) and not _has_adapters(layer):
        return  # it computes what the layers do that are fused
    if processor is not None and name not in PLAIN_PROCESSORS:
        mend = "pipe.unfuse_qkv_projections()" if name.startswith("Fused") else "set_attn_processor"
        raise _refusal(component, f"the attention processor {name}", mend)


def _has_adapters(layer: torch.nn.Module) -> bool:
    """Whether layers of an attention have adapters, which its fused ones know nothing of."""
    return bool(layers_of(layer)[1])


def _refuse_hooks(layer: torch.nn.Module, module: torch.nn.Module, component: Component) -> None:
    """Raise `EngineError` for a layer's hooks that an engine would have to call."""
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    if not all(isinstance(hook, ComesBack) or is_of_transformers(hook) for hook in hooks):
        name = next(name for name, one in module.named_modules() if one is layer)
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
    tensors = _tensors_of(module, component)
    return _Look(tuple(map(ref, tensors)), tuple(map(place_of, tensors)), structure_of(module), _samples(tensors))


def structure_of(module: torch.nn.Module) -> tuple[tuple[int, type], ...]:
    """What tells a module's own layers from others, whatever adapters are around them: the object and class of each."""
    return tuple((id(layer), type(layer)) for layer in layers_of(module)[0])


def _tensors_of(module: torch.nn.Module, component: Component) -> list[torch.Tensor]:
    """The parameters and buffers that a component computes with: of a VAE those of one half."""
    words = HALVES.get(component)
    children = [module] if words is None else [own for name, own in module.named_children() if f"{name}." in words]
    found: list[torch.Tensor] = []
    for layer in (layer for child in children for layer in layers_of(child)[0]):
        own = layer.__dict__
        found.extend(
            tensor for tensor in (*own["_parameters"].values(), *own["_buffers"].values()) if tensor is not None
        )
    return found


def place_of(tensor: torch.Tensor) -> Place:
    """What tells a tensor, and where it lies, from others; most changes in place move its version."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


def _there(look: _Look) -> list[torch.Tensor]:
    """The tensors that a look found, as far as they are there yet."""
    return [tensor for one in look.tensors if (tensor := one()) is not None]


def _samples(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Some numbers of each tensor in the host's memory, as float64."""
    with torch.no_grad():
        found: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            if tensor.device.type == "cpu":
                found[tensor.dtype].append(some_of(tensor))
        joined = [torch.cat(rows).to(torch.float64) for rows in found.values()]
        return torch.nan_to_num(torch.cat([torch.empty(0, dtype=torch.float64), *joined]))


def some_of(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `SAMPLES` numbers in the middle of a tensor's memory: side by side, they are one access to it."""
    count = tensor.numel()
    number = min(count, SAMPLES)
    first = (count - number) // 2
    if not is_dense(tensor):
        return flat_memory(tensor)[first : first + number]
    return tensor.as_strided((number,), (1,), tensor.storage_offset() + first)


def _difference(now: _Look, before: _Look) -> str:
    """What has changed, in a few words."""
    if now.layers != before.layers:
        return "it has other layers"
    for place, former in zip(now.places, before.places, strict=False):
        if place[3] != former[3]:
            return f"it was cast to {place[3]}".replace("torch.", "")
    return "they were changed after sdtrt.accelerate"

"""Adapters of a live module (LoRA, LoHa, LoKr, …) in the weights of engines that hold none: merged, and only anew where
something has changed.

What tells of a change: an adapter's state (which are active, their scales, switched off, merged by diffusers itself),
the scale of a call, the address and version of each tensor, and four numbers in the middle of it, as peft writes past
versions (`hotswap=True`). Knows peft's layers as `models.adapters` gives them. Knows no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from sdtrt.models.adapters import (
    OwnLayer,
    active_tensors,
    counts,
    layers_of,
    loaded_names,
    merged,
    scaled,
    settle,
    state_of,
    wrapped_layers,
)
from sdtrt.models.tensor_names import own_name
from sdtrt.pipeline.parts.watch import Place, place_of, some_of

Take = Callable[[Mapping[str, torch.Tensor]], None]
Key = tuple[object, ...]


class Merging:
    """What of a module's layers is in the engines with adapters merged, and what it was merged from.

    Attributes:
        scale: by which the call that is under way multiplies the weights of adapters.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self._adapters: list[torch.nn.Module] = []
        self._layers: list[OwnLayer] = []
        self._loaded: Key = ()
        self._keys: dict[str, Key] = {}  # of the layers that are merged, by name
        self._seen: Key = ()
        self._looks = _Looks()

    @property
    def names(self) -> frozenset[str]:
        """The layers that have adapters around them, whether these count or not."""
        return frozenset(own_name(one.name) for one in self._layers)

    @property
    def counting(self) -> frozenset[str]:
        """Those of them whose adapters count: engines have other weights of them than the module."""
        return frozenset(own_name(one.name) for one in self._layers if counts(one))

    def find(self, module: torch.nn.Module) -> bool:
        """Look for layers with adapters; whether these are others than before."""
        adapters, before = layers_of(module)[1], self.names
        self._loaded = loaded_names(module)
        if adapters != self._adapters:  # of objects: most looks find what the last one did
            self._adapters, self._layers = adapters, wrapped_layers(module)
            self._looks = _Looks()  # which keeps the memory of what is gone
        for one in self._layers:
            settle(one)
        return self.names != before

    def is_changed(self, module: torch.nn.Module) -> bool:
        """Whether there are other adapters, or in another state, than when they were merged.

        Neither the module's layers nor tensors are looked at: this is asked at each step.
        """
        return self._loaded != loaded_names(module) or (bool(self._layers) and self._seen != self._state())

    def forget(self) -> None:
        """Take engines to have none of the adapters in them: the module's own weights were copied."""
        self._keys.clear()

    def merge(self, module: torch.nn.Module, take: Take) -> None:
        """Merge adapters where something has changed since, and hand over the tensors that result, layer by layer.

        Raises:
            EngineError: where peft can't merge one.
        """
        if not self._layers:
            return
        with scaled(module, self.scale):
            layers = [one for one in self._layers if counts(one)]
            keys = self._keys_of(layers)
            self._keys = {name: key for name, key in self._keys.items() if name in keys}
            for one in layers:
                if self._keys.get(one.name) != keys[one.name]:
                    self._keys.pop(one.name, None)
                    take({own_name(name): tensor for name, tensor in merged(one).items()})
                    self._keys[one.name] = keys[one.name]
        self._seen = self._state()

    def release(self) -> None:
        """Keep nothing of the module."""
        self._adapters, self._layers, self._looks = [], [], _Looks()
        self._keys.clear()

    def _state(self) -> Key:
        return (float(self.scale), *map(state_of, self._layers))

    def _keys_of(self, layers: Sequence[OwnLayer]) -> dict[str, Key]:
        """What each layer is merged from."""
        tensors = [active_tensors(one) for one in layers]
        looks = iter(self._looks.take([tensor for own in tensors for tensor in own]))
        return {
            one.name: (state_of(one), *(next(looks) for _ in own)) for one, own in zip(layers, tensors, strict=True)
        }


class _Looks:
    """Looks at many tensors at once: where each lies, and a few of its numbers; a GPU is waited for once."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._groups: list[list[int]] = []
        self._views: list[torch.Tensor] = []

    def take(self, tensors: Sequence[torch.Tensor]) -> list[tuple[Place, bytes]]:
        """The place of each tensor, and the numbers as they lie in memory."""
        places = [place_of(tensor) for tensor in tensors]
        if places != self._places:
            self._places = places
            self._views = [some_of(tensor.detach()) for tensor in tensors]
            self._groups = _alike(tensors)
        numbers = [b""] * len(tensors)
        for group in self._groups:
            views = [self._views[number] for number in group]
            joined = torch.cat(views).cpu().view(torch.uint8).numpy().tobytes()
            end = 0
            for number, view in zip(group, views, strict=True):
                end += view.nbytes
                numbers[number] = joined[end - view.nbytes : end]
        return list(zip(places, numbers, strict=True))


def _alike(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The numbers of tensors of one dtype on one device, which are joined into one."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        groups[tensor.dtype, tensor.device].append(number)
    return list(groups.values())

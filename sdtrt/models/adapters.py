"""Layers of peft around a module's own layers: which ones they wrap, in what state they are, and what they merge to.

peft does the mathematics: a layer of its merges itself into a copy of the weights. Knows no engine, and imports no
peft: there is no layer of it before somebody else did.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtrt.common.errors import EngineError

if TYPE_CHECKING:
    import torch

FUSED = frozenset({"to_qkv", "to_kv", "to_added_qkv"})  # layers that diffusers makes of projections, beside them
_TUNERS = "peft.tuners.tuners_utils"
# What peft raises for layers that can't be merged: kinds without a way, grouped convolutions, biases without a place.
_UNMERGEABLE = (NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class OwnLayer:
    """A layer of a module, without what peft has put around it.

    Args:
        name: which it has in a module without adapters.
        path: which it has in this one, where `base_layer` may be a part of it.
        adapters: peft's layers around it, the innermost first.
    """

    name: str
    path: str
    layer: torch.nn.Module
    adapters: tuple[Any, ...] = ()


def is_adapter(layer: torch.nn.Module) -> bool:
    """Whether a layer is one of peft's that wrap others."""
    kind: type = type(layer)
    return _wraps(kind)


@functools.cache
def _wraps(kind: type) -> bool:
    """Whether layers of a class wrap others. A class of peft is there only once peft is imported."""
    tuners = sys.modules.get(_TUNERS)
    return tuners is not None and issubclass(kind, tuners.BaseTunerLayer)


def layers_of(module: torch.nn.Module) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """A module and its layers without adapters, which are listed apart; shared ones more than once.

    It takes a fifth of the time of `modules()`, which steps into adapters as well.
    """
    todo: list[torch.nn.Module] = [module]
    adapters: list[torch.nn.Module] = []
    for number, layer in enumerate(todo):
        while is_adapter(layer):
            adapters.append(layer)
            layer = layer.__dict__["_modules"]["base_layer"]
        todo[number] = layer
        todo.extend(own for own in _children(layer) if own is not None)
    return todo, adapters


def _children(layer: torch.nn.Module) -> Iterable[torch.nn.Module | None]:
    """A layer's own layers; not those that `fuse_qkv_projections` makes of others, and `unfuse` leaves there."""
    own: dict[str, Any] = layer.__dict__
    children: dict[str, torch.nn.Module | None] = own["_modules"]
    if own.get("fused_projections"):
        return [one for name, one in children.items() if name not in FUSED]
    return children.values()


def is_fused(name: str) -> bool:
    """Whether a tensor is one that `fuse_qkv_projections` made of others."""
    return not FUSED.isdisjoint(name.split("."))


def adapters_of(module: torch.nn.Module) -> list[Any]:
    """The adapters around a module's layers."""
    return list(layers_of(module)[1])


def loaded_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of the adapters that a module says to have, whose layers are not looked for."""
    return tuple(getattr(module, "peft_config", None) or ())


def has_adapters(module: torch.nn.Module) -> bool:
    """Whether any layer of a module is wrapped."""
    return bool(layers_of(module)[1])


def own_layers(module: torch.nn.Module) -> list[OwnLayer]:
    """A module's layers, as `layers_of` gives them, with their names and what is around each."""
    found = [_unwrapped(OwnLayer("", "", module))]
    for one in found:
        children = ((key, child) for key, child in one.layer._modules.items() if child is not None)
        found.extend(
            _unwrapped(OwnLayer(_joined(one.name, key), _joined(one.path, key), child)) for key, child in children
        )
    return found


def _unwrapped(one: OwnLayer) -> OwnLayer:
    """A layer without the adapters around it, which it names."""
    while is_adapter(one.layer):
        base: Any = one.layer.base_layer
        one = OwnLayer(one.name, f"{one.path}.base_layer", base, (one.layer, *one.adapters))
    return one


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def wrapped_layers(module: torch.nn.Module) -> list[OwnLayer]:
    """Those of a module's layers that have adapters around them."""
    return [one for one in own_layers(module) if one.adapters] if has_adapters(module) else []


def own_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's `state_dict()` by the names that it has without adapters, and without those' own tensors."""
    state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    if not has_adapters(module):
        return state
    names = {one.path: one.name for one in own_layers(module)}
    owners = {name: name.rpartition(".") for name in state}
    return {_joined(names[path], key): state[name] for name, (path, _, key) in owners.items() if path in names}


def foreign_layer(layers: Iterable[torch.nn.Module]) -> str | None:
    """The class of a layer that peft has put in a layer's place in another way, `ModulesToSaveWrapper`."""
    kinds = set(map(type, layers))
    return next((one.__name__ for one in kinds if one.__module__.startswith("peft.") and not _wraps(one)), None)


def state_of(layer: OwnLayer) -> tuple[Any, ...]:
    """What decides of a layer's adapters how they count, beside their tensors."""
    return tuple(map(_state, layer.adapters))


def _state(one: Any) -> tuple[Any, ...]:
    scales = getattr(one, "scaling", None)  # some kinds have none
    numbers = tuple(map(float, scales.values())) if scales else ()
    return id(one), one._disable_adapters, tuple(one.active_adapters), tuple(one.merged_adapters), *numbers


def counts(layer: OwnLayer) -> bool:
    """Whether any of a layer's adapters changes what it computes: not those that are switched off, or merged by now."""
    return any(one.active_adapters and not (one.disable_adapters or one.merged) for one in layer.adapters)


def active_tensors(layer: OwnLayer) -> list[torch.Tensor]:
    """The tensors of a layer and of its active adapters."""
    found: list[torch.Tensor] = [tensor for tensor in layer.layer._parameters.values() if tensor is not None]
    for one in layer.adapters:
        names = one.active_adapters
        for kind in one.adapter_layer_names:
            own = getattr(one, kind)
            for name in names:
                if name in own:
                    found += _tensors_of(own[name])
    return found


def _tensors_of(one: Any) -> list[torch.Tensor]:
    """The tensors of what an adapter has for a layer: a tensor, or a layer, which is asked in the quickest way."""
    own = one.__dict__.get("_parameters")
    if own is None:
        return [one]
    return [tensor for tensor in own.values() if tensor is not None] if not one._modules else list(one.parameters())


def settle(layer: OwnLayer) -> None:
    """Take adapters that are merged and switched off out of a layer's weights, as they do when they are called."""
    for one in layer.adapters:
        if one.disable_adapters and one.merged:
            one.unmerge()


def merged(layer: OwnLayer) -> dict[str, torch.Tensor]:
    """A layer's tensors with its active adapters merged, by the names that they have in a module without.

    Weights are added in float32 at least, and rounded by who takes them. The layer's own stay as they are.

    Raises:
        EngineError: where peft can't merge an adapter.
    """
    with _scratch_weights(layer) as tensors:
        for one in layer.adapters:
            if not (one.disable_adapters or one.merged):
                _merge(one, layer.name)
        return {_joined(layer.name, key): tensor.data for key, tensor in tensors.items()}


@contextmanager
def _scratch_weights(layer: OwnLayer) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Within, a layer's parameters have copies for numbers, which its adapters may be merged into."""
    import torch

    tensors = {key: tensor for key, tensor in layer.layer._parameters.items() if tensor is not None}
    kept = {key: tensor.data for key, tensor in tensors.items()}
    merged_before = [(one, list(one.merged_adapters)) for one in layer.adapters]
    try:
        for tensor in tensors.values():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.data = tensor.data.to(wide, copy=True)
        yield tensors
    finally:
        for key, tensor in tensors.items():
            tensor.data = kept[key]
        for one, names in merged_before:
            one.merged_adapters[:] = names


def _merge(adapter: Any, name: str) -> None:
    """Have peft merge one of its layers."""
    try:
        adapter.merge()
    except _UNMERGEABLE as error:
        kind = type(adapter)
        names = ", ".join(adapter.active_adapters)
        raise EngineError(
            f"peft can't merge the adapter {names} into {name}, a {kind.__module__}.{kind.__name__}: {error}",
            hint="leave that adapter out (pipe.delete_adapters), or sdtrt.restore(pipe) goes back to PyTorch",
        ) from error


@contextmanager
def scaled(module: torch.nn.Module, scale: float) -> Iterator[None]:
    """Within, a module's active adapters count so many times as much, as diffusers' UNet has it within a call."""
    if scale == 1.0 or not has_adapters(module):
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(module, scale)
    try:
        yield
    finally:
        unscale_lora_layers(module, scale)

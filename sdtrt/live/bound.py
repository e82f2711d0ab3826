"""The weights of a live module in sessions whose engines hold none. They are followed, whatever is done to the module.

A tensor of the module becomes a view of what an engine reads, where it has its dtype, device and layout: there is one
copy then, and changes in place arrive by themselves. Others (convolutions, which engines lay channels last; all, in
another precision) are copied at each picture's first step, changed or not: no change has to be noticed so, and on a GPU
a copy takes as long as reading them. A layer with adapters of peft around it has memory of its own: engines get its
weights with those merged (`merging`). Knows tensors and sessions. Knows no pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from sdtrt.backends.unchanged import same_memory
from sdtrt.common.errors import EngineError
from sdtrt.live.merging import Merging
from sdtrt.live.steps import Steps
from sdtrt.models.adapters import layers_of
from sdtrt.models.live import component_tensors
from sdtrt.pipeline.parts.watch import WAY_OUT, structure_of
from sdtrt.specs import Component


class Following(Protocol):
    """A session whose engine holds no weights."""

    def follow(self, tensors: Mapping[str, torch.Tensor], *, known: bool = False) -> None:
        """Take a model's tensors as they are now; of known ones some."""

    def share_weights(self, other: Any) -> None:
        """Compute with another session's weights."""

    def weight_views(self) -> Mapping[str, torch.Tensor]:
        """Where each tensor of the model lies."""


class _Held:
    """One tensor of a module, as it was found: to look at all of them takes less than a millisecond.

    Args:
        name: of the tensor, as the engine knows it.
        owner: the layer's own dictionary that has it.
        key: its name there.
        view: where the engine reads it.
    """

    def __init__(self, name: str, owner: Mapping[str, Any], key: str, tensor: torch.Tensor, view: torch.Tensor) -> None:
        self.name, self._owner, self._key, self.tensor, self._view = name, owner, key, tensor, view
        self.layer = name.rpartition(".")[0]
        self.is_apart = not same_memory(tensor, view)

    def is_there(self) -> bool:
        """Whether the module has this very tensor still, of the same shape; and in the engine's memory, if it was."""
        same = self._owner.get(self._key) is self.tensor and self.tensor.shape == self._view.shape
        return same and (self.is_apart or same_memory(self.tensor, self._view))


class Bound:
    """A live module's weights in the sessions of one component; of several sessions there is one copy."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self._sessions: list[Following] = []
        self._held: list[_Held] = []
        self._absent: list[tuple[Mapping[str, Any], str]] = []  # biases that layers are without
        self._steps = Steps()
        self._merging = Merging()
        self.changes = 0  # of adapters, as far as calls have met them

    def following(
        self, session: Following, module: Callable[[], torch.nn.Module | None], call: Callable[..., Any]
    ) -> Callable[..., Any]:
        """A call of a session that computes with the module's weights as they are at a picture's first step.

        What is done to adapters (loaded, other ones active, other scales, switched off, gone) counts at any step, and
        so does `cross_attention_kwargs={"scale": …}`.

        Raises:
            EngineError: where the module has other tensors than the engine, or an adapter that can't be merged.
        """
        found = module()
        assert found is not None
        if self._sessions:
            session.share_weights(self._sessions[0])
        self._sessions.append(session)
        self._held.clear()
        self.copy(found)

        def run(*args: Any, **kwargs: Any) -> Any:
            states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
            self._merging.scale, kwargs = _without_scale(kwargs)
            if (owner := module()) is not None:
                is_due, is_changed = self._steps.is_due(states), self._merging.is_changed(owner)
                self.changes += is_changed
                if is_due or is_changed:
                    self.copy(owner)
                if is_due:
                    self._steps.seen(states)
            return call(*args, **kwargs)

        return run

    def expect_another(self) -> None:
        """Take the next call for another picture's, whatever its conditioning is."""
        self._steps.expect_another()

    def look_anew(self) -> None:
        """Look at the whole module at the next call: it has another layer in the place of one."""
        self._held.clear()
        self._steps.expect_another()

    def copy(self, module: torch.nn.Module) -> None:
        """Let the engines have the module's tensors as they are now, and the module the engines' memory."""
        with torch.inference_mode(False), torch.no_grad():
            are_others = self._merging.find(module)
            if self._held and not are_others and self._is_as_it_was():
                self._copy_some()
            else:
                self._copy_all(module)
            self._merging.merge(module, self._take)

    def _is_as_it_was(self) -> bool:
        """Whether the module has the tensors that were found, and no more."""
        return all(one.is_there() for one in self._held) and all(own.get(key) is None for own, key in self._absent)

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the engines have some tensors in the place of the module's."""
        for session in self._sessions:
            views = session.weight_views()  # a VAE's other half is in none of them
            session.follow({name: tensor for name, tensor in tensors.items() if name in views}, known=True)

    def _copy_some(self) -> None:
        """Copy what has memory of its own; that of a later session's, too, where it shares no memory with the first."""
        merged = self._merging.counting
        own = [one for one in self._held if one.layer not in merged]
        for number, session in enumerate(self._sessions):
            session.follow({one.name: one.tensor for one in own if number or one.is_apart}, known=True)

    def _copy_all(self, module: torch.nn.Module) -> None:
        """Look at the whole module, and copy it; then hold it to what was found."""
        tensors = component_tensors(module, self._component)
        for session in self._sessions:
            session.follow(tensors)
        self._merging.forget()
        views = self._sessions[0].weight_views()
        self._place(tensors, views)
        names = {id(tensor): name for name, tensor in tensors.items()}
        owned = [(own, key, one) for own in _owners(module) for key, one in own.items()]
        self._absent = [(own, key) for own, key, one in owned if one is None]
        self._held = [
            _Held(names[id(one)], own, key, one, views[names[id(one)]])
            for own, key, one in owned
            if one is not None and id(one) in names
        ]

    def _place(self, tensors: Mapping[str, torch.Tensor], views: Mapping[str, torch.Tensor]) -> None:
        """Let a module's tensors lie where engines read them, but for those that adapters are merged with."""
        wrapped = self._merging.names
        for name, tensor in tensors.items():
            is_there = same_memory(tensor, views[name])
            if name.rpartition(".")[0] in wrapped:
                tensor.data = tensor.data.clone() if is_there else tensor.data
            elif not is_there and _may_be(tensor, views[name]):
                tensor.data = views[name]

    def release(self, module: torch.nn.Module | None) -> None:
        """Give the module's tensors memory of their own again, with the numbers that they have by now."""
        if self._sessions and module is not None:
            views = self._sessions[0].weight_views()
            with torch.inference_mode(False), torch.no_grad():
                for name, tensor in component_tensors(module, self._component).items():
                    if name in views and same_memory(tensor, views[name]):
                        tensor.data = tensor.data.clone()
        self._sessions.clear()
        self._held.clear()
        self._merging.release()


class Followed:
    """What stands in the place of a watch over weights that are followed: it tells of other layers alone."""

    digest = ""  # of no weights in particular

    def __init__(self, module: torch.nn.Module, component: Component, bound: Bound) -> None:
        self._component, self._bound = component, bound
        self._structure = structure_of(module)

    def look(self, module: torch.nn.Module) -> None:
        """Raise `EngineError` where the module has other layers, adapters aside."""
        if structure_of(module) != self._structure:
            raise EngineError(f"the {self._component} has other layers than its engine", hint=WAY_OUT)

    def retake(self, module: torch.nn.Module) -> None:
        """Take layers that others have replaced. Raise `EngineError` where they are of other classes."""
        now = structure_of(module)
        if [kind for _, kind in now] != [kind for _, kind in self._structure]:
            raise EngineError(f"the {self._component} has other layers than its engine", hint=WAY_OUT)
        self._structure = now

    def begin(self, module: torch.nn.Module) -> None:
        """Nothing: there is nothing to read, as weights may be any."""

    def poll(self, module: torch.nn.Module) -> None:
        """Nothing."""

    def settle(self, module: torch.nn.Module) -> None:
        """A picture is decoded: the next call is another one's."""
        self._bound.expect_another()

    def stop(self) -> bool:
        """Nothing goes on that could be ended."""
        return False

    def moved(self, module: torch.nn.Module) -> None:
        """Nothing: they may lie anywhere."""


def _without_scale(kwargs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """A call's scale of adapters, as diffusers' UNet takes it out of its keywords, and the keywords without it."""
    given = kwargs.get("cross_attention_kwargs") or {}
    if "scale" not in given:
        return 1.0, kwargs
    rest = {name: value for name, value in given.items() if name != "scale"}
    return given["scale"], {**kwargs, "cross_attention_kwargs": rest or None}


def _owners(module: torch.nn.Module) -> Iterator[Mapping[str, torch.Tensor | None]]:
    """The dictionaries of all layers that have tensors, without those of adapters."""
    for layer in dict.fromkeys(layers_of(module)[0]):
        yield layer._parameters
        yield layer._buffers


def _may_be(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether a module's tensor may lie where an engine reads it: nothing that uses the module sees a difference."""
    alike = (tensor.dtype, tensor.device, tensor.stride()) == (view.dtype, view.device, view.stride())
    return alike and not tensor.is_inference()

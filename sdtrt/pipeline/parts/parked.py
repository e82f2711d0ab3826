"""Weights that are away from the GPU while an engine has them, and how they come back.

Knows a module's parameters and layers. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakMethod, ref

import torch

KEPT_LAYERS = ("final_layer_norm",)  # pipelines call it themselves, for `clip_skip`


class Parked:
    """The parameters of a module that left the GPU.

    The module's first one stays, as it says where the module is, and so do layers that pipelines call by themselves.
    Whoever calls any other layer by itself (the decoder of a VAE) calls `wanted` first, which is to bring them back.

    Args:
        wanted: brings them back.
    """

    def __init__(self, wanted: Callable[[], None]) -> None:
        self._wanted = WeakMethod(wanted)  # its object has this one
        self._tensors: list[ref[torch.nn.Parameter]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def park(self, module: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> bool:
        """Let those of a module's tensors, given by name, leave the GPU that need not be there; whether any did."""
        first, leaving = next(module.parameters()), set()
        for name, tensor in tensors:
            kept = tensor is first or any(word in name for word in KEPT_LAYERS)
            if not kept and isinstance(tensor, torch.nn.Parameter) and is_on_gpu(tensor):
                self._tensors.append(ref(tensor))  # before it leaves: an interrupt may come between
                tensor.data = to_host(tensor.data)
                leaving.add(id(tensor))
        for layer in module.modules():
            if any(id(parameter) in leaving for parameter in layer.parameters(recurse=False)):
                self._handles.append(layer.register_forward_pre_hook(ComesBack(self._wanted)))
        return bool(leaving)

    def bring_back(self, module: torch.nn.Module) -> None:
        """Bring them back to where the module is by now."""
        device = next(module.parameters()).device
        for one in self._tensors:
            if (tensor := one()) is not None:
                tensor.data = to_device(tensor.data, device)
        self.forget()

    def forget(self) -> None:
        """Leave the tensors where they are, and their layers without hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tensors.clear()


class ComesBack:
    """What a layer calls before its own `forward` while its weights are away.

    In a copy or a pickle of the layer it moves that layer's own weights to where its input is, once.
    """

    def __init__(self, wanted: WeakMethod[Callable[[], None]] | None = None) -> None:
        self._wanted = wanted

    def __call__(self, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        """Bring the weights back."""
        if self._wanted is not None and (wanted := self._wanted()) is not None:
            wanted()
            return
        for device in {value.device for value in arguments if isinstance(value, torch.Tensor)}:
            for parameter in layer.parameters(recurse=False):
                parameter.data = to_device(parameter.data, device)
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is self]:
            del layer._forward_pre_hooks[key]

    def __deepcopy__(self, memo: object) -> ComesBack:
        return ComesBack()

    def __reduce__(self) -> tuple[type[ComesBack], tuple[()]]:
        return ComesBack, ()


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes a GPU's memory."""
    return tensor.device.type == "cuda"


def to_host(data: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers in the host's memory."""
    return data.to("cpu")


def to_device(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor's numbers on a device."""
    return data.to(device)

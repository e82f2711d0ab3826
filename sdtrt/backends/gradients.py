"""Gradients don't pass an engine: whoever asks for one hears so, instead of getting the rest of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from sdtrt.common.errors import UnservedCallError
from sdtrt.specs import Component


def refuse_gradients(component: Component, inputs: Mapping[str, Any]) -> None:
    """Raise `UnservedCallError` for inputs of an engine through which a derivative is asked for, backward or forward.

    Under `torch.no_grad()`, as in diffusers' pipelines, an input may require a gradient: none is recorded there.
    """
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and _is_followed(value)]
    if names:
        raise UnservedCallError(
            f"{', '.join(names)}: a gradient is wanted, and none passes the engine of the {component}",
            hint="call it under torch.no_grad(). For gradients sdtrt.restore(pipe) undoes sdtrt.accelerate; otherwise"
            f" {in_pytorch(component)}",
        )


def in_pytorch(*components: Component) -> str:
    """The way to what engines can't do: a component that PyTorch runs."""
    names = " and ".join(components)
    return f"open the pipeline with components= (--component) without {names}, or with the backend torch"


def _is_followed(tensor: torch.Tensor) -> bool:
    """Whether PyTorch records what is done with a tensor, to differentiate it."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None

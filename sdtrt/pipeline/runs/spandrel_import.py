"""Imports spandrel, which reads models that enlarge pictures, also where torchvision is not there.

spandrel takes two functions of torchvision, for two of its architectures. torchvision's wheel on PyPI is linked to the
CUDA part of PyTorch: beside a PyTorch for CPUs it can't be imported, and neither can diffusers while it is installed.
Knows no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

_MODULES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def import_spandrel() -> Any:
    """spandrel itself. Raises `ImportError` where it, or another package that it needs, is missing."""
    if "spandrel" in sys.modules or find_spec("torchvision") is not None:
        import spandrel

        return spandrel
    with _standing_in():
        import spandrel

        return spandrel


@contextmanager
def _standing_in() -> Iterator[None]:
    """Have what spandrel takes of torchvision be importable, for the time of a `with`."""
    made = {name: ModuleType(name) for name in _MODULES}
    functional: Any = made[_MODULES[-1]]
    functional.normalize, functional.rotate, functional.InterpolationMode = _normalize, _rotate, None
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def _normalize(tensor: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pixels `[…,C,H,W]` less a mean a channel, in multiples of a deviation a channel, as torchvision computes it."""
    less, by = (tensor.new_tensor(one)[:, None, None] for one in (mean, std))
    return (tensor - less) / by


def _rotate(*_: object, **__: object) -> None:
    raise NotImplementedError("models that paint into pictures need torchvision")  # `upscaling` refuses them all

"""Recognises a tensor that was used before and has not changed since. Knows no session and keeps no tensor alive."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

import torch

Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides
HOST = "cpu"  # NumPy arrays share memory there, and change it without a trace


@dataclass(frozen=True)
class TensorSnapshot:
    """A tensor on the GPU as it was when it was used.

    PyTorch counts the changes of a tensor, whichever view of it they are made through. It does not count what is
    written past it: through `tensor.data`, by the replay of a CUDA graph, by another library's kernel. Who does that
    passes another tensor object (`tensor.view_as(tensor)` is one, and copies nothing).

    The tensor is not kept alive, so this costs no GPU memory; a later tensor in the same place is another object.
    """

    tensor: ref[torch.Tensor]
    version: int
    place: Place

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSnapshot | None:
        """A tensor as it is now; None for one whose changes can't be seen: of inference mode, or on the CPU."""
        if tensor.is_inference() or tensor.device.type == HOST:
            return None
        return cls(ref(tensor), tensor._version, _place(tensor))

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether it is this very tensor, unchanged."""
        same = self.tensor() is tensor and tensor._version == self.version
        return same and _place(tensor) == self.place


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory: what is written to one is in the other."""
    return one.dtype == other.dtype and _place(one) == _place(other)


def _place(tensor: torch.Tensor) -> Place:
    """Where a tensor's elements lie: `tensor.data = other` is no change that PyTorch counts."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()

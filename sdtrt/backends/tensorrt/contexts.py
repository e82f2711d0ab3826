"""Execution contexts over torch tensors: where they work, what they read and write, and on which stream.

It knows one plan at a time: a session has one (`session`), or several in a row where others' kernels run in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sdtrt.backends.tensorrt.plan import LoadedPlan
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Library, Shape
from sdtrt.common.errors import EngineError
from sdtrt.specs.contract import TensorSpec


@dataclass(frozen=True)
class PlacedPlan:
    """A loaded plan, and where in a scratch memory all its contexts work, which never run at once.

    Args:
        address: of that memory on the GPU.
        size_bytes: of it, as `running.scratch_bytes` tells.
    """

    loaded: LoadedPlan
    address: int
    size_bytes: int

    def new_context(self) -> Any:
        """An execution context."""
        loaded = self.loaded
        with loaded.lock:
            return running.create_shared_context(loaded.library, loaded.engine, self.address, self.size_bytes)

    def prepare(
        self, context: Any, profile: int, shapes: Mapping[str, Shape], stream: torch.cuda.Stream
    ) -> dict[str, Shape]:
        """Tell a context the shapes of a run's inputs; returns those of its outputs."""
        return running.prepare_context(self.loaded.library, context, profile, shapes, stream.cuda_stream)

    def enqueue(self, context: Any, tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> None:
        """Put a context's run on a stream; `tensors` are all its inputs and outputs."""
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        running.set_addresses(self.loaded.library, context, addresses)
        running.enqueue(self.loaded.library, context, stream.cuda_stream)

    def require_capturable(self, context: Any, stream: torch.cuda.Stream) -> None:
        """Raise `EngineError` unless a context's next run may be captured into a CUDA graph."""
        if not running.is_capturable(self.loaded.library, context, stream.cuda_stream):
            raise EngineError("TensorRT can't be captured at this shape", hint="open the session with graphs=0")

    def information(self, context: Any) -> dict[str, Any]:
        """What TensorRT's inspector tells: layers, their data types and tactics."""
        return running.inspect(self.loaded.library, self.loaded.engine, context)


@contextmanager
def in_order(own: torch.cuda.Stream) -> Iterator[torch.cuda.Stream]:
    """A stream for TensorRT, in order with the current one: that one, but a stream of one's own for the default one.

    TensorRT would wait for the whole GPU on the default stream, twice a run.
    """
    current = torch.cuda.current_stream()
    stream = own if current.cuda_stream == 0 else current
    wait_for_current(stream)
    try:
        yield stream
    finally:  # a run that fails has left its first kernels to the GPU
        if stream != current:
            current.wait_stream(stream)


def wait_for_current(stream: torch.cuda.Stream) -> None:
    """Have a stream wait for what is on the current one: new tensors have memory that others used there."""
    current = torch.cuda.current_stream()
    if stream != current:
        stream.wait_stream(current)


def new_tensor(shape: Shape, spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """Memory on the GPU for one tensor of a contract."""
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)


def cuda_device(device: torch.device, library: Library) -> torch.device:
    """The device with its index.

    Raises:
        EngineError: where it is no GPU, or TensorRT or PyTorch can't use it.
    """
    if device.type != "cuda":
        raise EngineError(f"TensorRT runs on a GPU, not on {device}", hint="use --backend onnxruntime on a CPU")
    libraries.require_gpu(library)
    if not torch.cuda.is_available():
        raise EngineError("this PyTorch can't use the GPU", hint="install a CUDA build of PyTorch: https://pytorch.org")
    return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())

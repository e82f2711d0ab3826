"""Sessions on TensorRT without PyTorch: NumPy arrays in and out, through PyCUDA.

For programs that embed an engine. Nothing on this path imports torch; beside torch it works too, since both use the
GPU's primary context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdtrt.backends.session import Session, check_feeds
from sdtrt.backends.tensorrt.plan import LoadedPlan, choose_profile, largest, list_file, load_plan, output_shape
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Shape
from sdtrt.common.errors import EngineError
from sdtrt.specs import BackendName
from sdtrt.specs.contract import Contract, TensorSpec

Array = npt.NDArray[Any]


class PyCudaSession(Session[Array]):
    """Runs a TensorRT plan on NumPy arrays.

    A run copies the inputs to the GPU through page-locked memory, runs the engine on a stream of the session's own,
    copies the outputs back and waits for them.

    Args:
        plan: the plan file.
        contract: its inputs and outputs.
        backend: `tensorrt` or `tensorrt-rtx`.
        device: index of the GPU.
        allow_host_code: the plan is version-compatible and of one's own: it may bring the runtime that runs it.

    Raises:
        EngineError: when PyCUDA, TensorRT or a GPU is missing, or the plan can't be loaded here.
    """

    def __init__(
        self,
        plan: Path,
        contract: Contract,
        *,
        backend: BackendName = "tensorrt",
        device: int = 0,
        allow_host_code: bool = False,
    ) -> None:
        _check_dtypes(contract)
        _check_whole(plan)
        self.contract, self._backend = contract, backend
        self._library = libraries.open_library(backend)
        libraries.require_gpu(self._library)
        self._cuda = _driver()
        self._primary = _primary_context(device)
        self._loaded: LoadedPlan | None = None
        with self._on_gpu():
            self._loaded = load_plan(plan, contract, self._library, device, allow_host_code=allow_host_code)
            self._context = running.create_context(self._library, self._loaded.engine)
            self._stream = self._cuda.Stream()
            self._host = {spec.name: self._pinned(self._loaded, spec) for spec in self.inputs + self.outputs}
            self._gpu = {name: self._cuda.mem_alloc(max(array.nbytes, 1)) for name, array in self._host.items()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine once; the outputs are new arrays.

        Raises:
            EngineError: for arrays that fit neither the contract nor a profile, too little memory, or a closed session.
        """
        if self._loaded is None:
            raise EngineError("the session is closed", hint="open a new one")
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        sizes = check_feeds(self.inputs, shapes, {name: str(array.dtype) for name, array in feeds.items()})
        profile = choose_profile(self._loaded.profiles, sizes, self._backend)
        stream = self._stream
        with self._on_gpu():
            for name, array in feeds.items():
                self._send(name, array)
            results = running.prepare_context(self._library, self._context, profile, shapes, stream.handle)
            addresses = {name: int(memory) for name, memory in self._gpu.items()}
            running.set_addresses(self._library, self._context, addresses)
            running.enqueue(self._library, self._context, stream.handle)
            views = {spec.name: self._fetch(spec.name, output_shape(results, spec)) for spec in self.outputs}
            stream.synchronize()
            return {name: view.copy() for name, view in views.items()}

    def close(self) -> None:
        """Free everything that the session holds."""
        if self._loaded is None:
            return
        with self._on_gpu():
            self._stream.synchronize()
            self._context = None
            self._loaded = None
            self._host.clear()
            for memory in self._gpu.values():
                memory.free()
            self._gpu.clear()
            del self._stream
        self.let_go()

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        """Make the GPU's primary context current in this thread, and the former one again after; map memory errors."""
        self._primary.push()
        try:
            yield
        except self._cuda.MemoryError as error:
            raise EngineError(
                "the GPU has too little free memory",
                hint="end other programs on the GPU, or build for smaller sizes: a lower --batch or --height",
            ) from error
        finally:
            self._primary.pop()

    def _pinned(self, loaded: LoadedPlan, spec: TensorSpec) -> Array:
        """Page-locked memory for one tensor, for every shape that the plan takes."""
        memory: Array = self._cuda.pagelocked_empty(largest(spec, loaded.profiles), np.dtype(spec.dtype))
        return memory

    def _view(self, name: str, shape: Shape) -> Array:
        """A tensor's page-locked memory, seen in a shape."""
        return self._host[name][: int(np.prod(shape))].reshape(shape)

    def _send(self, name: str, array: Array) -> None:
        """Start one input's way to the GPU."""
        view = self._view(name, array.shape)
        view[...] = array
        self._cuda.memcpy_htod_async(self._gpu[name], view, self._stream)

    def _fetch(self, name: str, shape: Shape) -> Array:
        """Start one output's way back; it is there once the stream is done."""
        view = self._view(name, shape)
        self._cuda.memcpy_dtoh_async(view, self._gpu[name], self._stream)
        return view


def _driver() -> Any:
    """PyCUDA's driver module, initialised."""
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)  # not every build of PyCUDA says that it needs it
        import pycuda.driver as cuda
    except ImportError as error:
        raise EngineError(f"PyCUDA can't be loaded: {error}", hint='pip install "sdtrt[pycuda]"') from error
    cuda.init()
    return cuda


@cache
def _primary_context(device: int) -> Any:
    """The GPU's primary context, the one that CUDA's runtime and torch use too. Kept until the process ends."""
    return _driver().Device(device).retain_primary_context()


def _check_whole(plan: Path) -> None:
    """NumPy has nothing to run between an engine's pieces."""
    if list_file(plan).exists():
        raise EngineError(
            f"{plan} leaves some of its work to PyTorch",
            hint="build an engine that does not: sdtrt build --backend tensorrt --split-attention 0",
        )


def _check_dtypes(contract: Contract) -> None:
    """NumPy has no bfloat16."""
    for spec in (*contract.inputs, *contract.outputs):
        if spec.dtype == "bfloat16":
            raise EngineError(
                f"NumPy has no bfloat16, which {spec.name} is", hint="build the engine with --precision fp16 or fp32"
            )

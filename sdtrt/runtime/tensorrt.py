"""Sessions on TensorRT: torch tensors in and out on the current CUDA stream, a CUDA graph for each recurring shape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrt import trt_api
from sdtrt.components import CONDITIONING, Contract, TensorSpec
from sdtrt.console import Console
from sdtrt.errors import EngineError, MemoryShortage
from sdtrt.runtime.plan import LoadedPlan, choose_profile, load_plan, output_shape
from sdtrt.runtime.remembered import Remembered
from sdtrt.runtime.scratch import Scratch
from sdtrt.runtime.session import Session, check_feeds
from sdtrt.specs import Backend
from sdtrt.trt_api import Library, Shape

MAX_GRAPHS = 4  # shapes kept as CUDA graphs; each costs an execution context and its outputs
Key = tuple[tuple[str, Shape], ...]

# While one thread captures, no other may: PyTorch's allocator serves one capture at a time.
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class _Graph:
    """One shape, captured: replaying writes `outputs`. The context must outlive the graph, and not be touched."""

    context: Any
    graph: torch.cuda.CUDAGraph
    outputs: dict[str, torch.Tensor]


class TensorRTSession(Session[torch.Tensor]):
    """Runs a TensorRT plan on torch tensors.

    The work is put on the caller's current stream, in order with what else is there; nothing waits for the GPU. A
    shape's first run goes to the stream kernel by kernel; its second one is also captured into a CUDA graph, which
    later ones replay. Inputs are copied into buffers of the session's own, so a graph's addresses never change;
    outputs are new tensors each time. All contexts of a session work in one scratch memory.

    What stays the same from step to step (`CONDITIONING`) is copied once: not again while the very same tensor comes
    unchanged, as `Remembered` tells. The session keeps no such tensor alive.

    Args:
        plan: the plan file.
        contract: its inputs and outputs.
        backend: `tensorrt` or `tensorrt-rtx`.
        device: the GPU, as `torch.device("cuda")`.
        graphs: how many shapes to keep as CUDA graphs; 0 for none.
        allow_host_code: the plan is version-compatible and of one's own: it may bring the runtime that runs it.
        library: another TensorRT than the backend's usual one (a lean runtime).
        scratch: shared with other sessions, which then never run at once with this one; None for one of its own.

    Raises:
        EngineError: when the plan can't be loaded here; the message says why, the hint how to rebuild it.
    """

    def __init__(
        self,
        plan: Path,
        contract: Contract,
        *,
        backend: Backend = "tensorrt",
        device: torch.device,
        graphs: int = MAX_GRAPHS,
        allow_host_code: bool = False,
        library: Library | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.contract, self._backend, self._max_graphs = contract, backend, graphs
        self._library = library or trt_api.open_library(backend)
        self._device = _cuda_device(device, self._library)
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._seen: set[Key] = set()
        self._failed: set[Key] = set()
        self._copied: dict[str, Remembered] = {}  # what lies in the buffers
        self._scratch = scratch or Scratch()
        with torch.cuda.device(self._device), _memory_errors(plan):
            self._loaded: LoadedPlan | None = load_plan(
                plan, contract, self._library, self._device.index, allow_host_code=allow_host_code
            )
            self._scratch_bytes = trt_api.scratch_bytes(self._library, self._loaded.engine)
            self._block = self._scratch.block(self._scratch_bytes, self._device)
            self._buffers = {spec.name: self._input_buffer(self._loaded, spec) for spec in contract.inputs}
            self._context = self._new_context(self._loaded)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def graph_count(self) -> int:
        """How many shapes are held as CUDA graphs."""
        return len(self._graphs)

    @property
    def scratch_bytes(self) -> int:
        """The scratch memory that the engine needs for the largest size that it serves."""
        return self._scratch_bytes

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on the current stream; the outputs are new tensors on the session's device."""
        if self._loaded is None:
            raise EngineError("the session is closed", hint="open a new one")
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in feeds.items()}
        sizes = check_feeds(self.inputs, shapes, dtypes)
        profile = choose_profile(self._loaded.profiles, sizes, self._backend)
        key = tuple(sorted(shapes.items()))
        with torch.cuda.device(self._device), torch.no_grad(), _memory_errors(shapes), self._turn():
            for name, tensor in feeds.items():
                self._copy(name, tensor)
            outputs = self._replay(key)
            if outputs is None:
                outputs = self._launch(self._loaded, key, profile)
        return outputs

    def information(self) -> dict[str, Any]:
        """What TensorRT's inspector tells of the engine: its layers, their data types and tactics."""
        if self._loaded is None:
            raise EngineError("the session is closed", hint="open a new one")
        return trt_api.inspect(self._library, self._loaded.engine, self._context)

    def close(self) -> None:
        """Free the engine's contexts, graphs and memory, once the GPU has finished with them."""
        if self._loaded is None:
            return
        self._scratch.finish()
        self._graphs.clear()
        self._context = None
        self._buffers.clear()
        self._copied.clear()
        self._block, self._scratch = torch.empty(0), Scratch()  # the shared one is the others' to keep
        self._loaded = None
        self.let_go()

    def _turn(self) -> AbstractContextManager[None]:
        """Buffers and scratch memory to oneself, whatever stream used them last."""
        return self._scratch.turn(torch.cuda.current_stream())

    def _copy(self, name: str, tensor: torch.Tensor) -> None:
        """Copy an input to its buffer, unless it lies there already."""
        last = self._copied.pop(name, None)  # a copy that fails leaves the buffer unknown
        if last is None or not last.is_still(tensor):
            last = Remembered.of(tensor) if name in CONDITIONING else None
            self._input(name, tuple(tensor.shape)).copy_(tensor, non_blocking=True)
        if last is not None:
            self._copied[name] = last

    def _replay(self, key: Key) -> dict[str, torch.Tensor] | None:
        """Run a shape's CUDA graph, if there is one."""
        found = self._graphs.get(key)
        if found is None:
            return None
        self._graphs.move_to_end(key)
        found.graph.replay()
        return {name: tensor.clone() for name, tensor in found.outputs.items()}

    def _launch(self, loaded: LoadedPlan, key: Key, profile: int) -> dict[str, torch.Tensor]:
        """Run a shape kernel by kernel; its second time, also capture it.

        The graph gets a context that nothing else uses: NVIDIA's rule, for a graph is tied to its context's state.
        """
        if self._max_graphs > 0 and key in self._seen and key not in self._failed:
            try:
                context = self._new_context(loaded)
                outputs = self._run_on_stream(context, key, profile)  # TensorRT's preparations must precede a capture
                self._capture(context, key, outputs)
                return outputs
            except (RuntimeError, EngineError) as error:
                self._failed.add(key)
                Console().warn(f"no CUDA graph for {_described(key)}, running kernel by kernel instead: {error}")
        self._seen.add(key)
        return self._run_on_stream(self._context, key, profile)

    def _run_on_stream(self, context: Any, key: Key, profile: int) -> dict[str, torch.Tensor]:
        """Run a context once, in order with the current stream.

        Never on the default stream itself: TensorRT would wait for the whole GPU there, twice a run.
        """
        current = torch.cuda.current_stream()
        stream = self._stream if current.cuda_stream == 0 else current
        if stream is not current:
            stream.wait_stream(current)
        shapes = trt_api.prepare_context(self._library, context, profile, dict(key), stream.cuda_stream)
        outputs = {spec.name: self._new_output(shapes, spec) for spec in self.outputs}
        self._set_addresses(context, key, outputs)
        trt_api.enqueue(self._library, context, stream.cuda_stream)
        if stream is not current:
            current.wait_stream(stream)
        return outputs

    def _capture(self, context: Any, key: Key, example: Mapping[str, torch.Tensor]) -> None:
        """Capture a context that has just run into a CUDA graph with outputs of its own."""
        while len(self._graphs) >= self._max_graphs:
            torch.cuda.current_stream().synchronize()  # the one that leaves may still be running
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        outputs = {name: torch.empty_like(tensor) for name, tensor in example.items()}
        self._set_addresses(context, key, outputs)
        if not trt_api.is_capturable(self._library, context, self._stream.cuda_stream):
            raise EngineError("TensorRT can't be captured at this shape", hint="open the session with graphs=0")
        # Other threads may use the GPU meanwhile: only this thread's calls are held to the rules of a capture.
        with _CAPTURING, torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            trt_api.enqueue(self._library, context, self._stream.cuda_stream)
        self._graphs[key] = _Graph(context, graph, outputs)

    def _new_context(self, loaded: LoadedPlan) -> Any:
        """An execution context in this session's scratch memory."""
        with loaded.lock:
            return trt_api.create_shared_context(
                self._library, loaded.engine, self._block.data_ptr(), self._block.numel()
            )

    def _input_buffer(self, loaded: LoadedPlan, spec: TensorSpec) -> torch.Tensor:
        """The memory of one input, for every shape that the plan takes."""
        return torch.empty(loaded.largest(spec), dtype=getattr(torch, spec.dtype), device=self._device)

    def _input(self, name: str, shape: Shape) -> torch.Tensor:
        """One input's buffer, seen in a shape."""
        count = torch.Size(shape).numel()
        return self._buffers[name][:count].view(shape)

    def _new_output(self, shapes: Mapping[str, Shape], spec: TensorSpec) -> torch.Tensor:
        return torch.empty(output_shape(shapes, spec), dtype=getattr(torch, spec.dtype), device=self._device)

    def _set_addresses(self, context: Any, key: Key, outputs: Mapping[str, torch.Tensor]) -> None:
        addresses = {name: self._buffers[name].data_ptr() for name, _ in key}
        addresses |= {name: tensor.data_ptr() for name, tensor in outputs.items()}
        trt_api.set_addresses(self._library, context, addresses)


def _cuda_device(device: torch.device, library: Library) -> torch.device:
    """The device with its index."""
    if device.type != "cuda":
        raise EngineError(f"TensorRT runs on a GPU, not on {device}", hint="use --backend onnxruntime on a CPU")
    trt_api.require_gpu(library)
    if not torch.cuda.is_available():
        raise EngineError("this PyTorch can't use the GPU", hint="install a CUDA build of PyTorch: https://pytorch.org")
    return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())


@contextmanager
def _memory_errors(what: object) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into ours."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free = ""
        with suppress(RuntimeError):
            free = f", {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB are free"
        raise MemoryShortage(
            f"the GPU has too little memory for {what}{free}",
            hint="end other programs on the GPU, or build for smaller sizes: a lower --batch or --height",
        ) from error


def _described(key: Key) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in key)

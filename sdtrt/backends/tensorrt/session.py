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

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session, check_feeds
from sdtrt.backends.tensorrt.plan import LoadedPlan, choose_profile, largest, load_plan, output_shape, profiles_of
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Library, Shape
from sdtrt.backends.tensorrt.versions.messages import REBUILD
from sdtrt.backends.tensorrt86.memory_layout import attention_bytes, last_uses, lay_out, size_bytes
from sdtrt.backends.tensorrt86.pieces import read_pieces
from sdtrt.backends.tensorrt86.torch_kernels import compute
from sdtrt.backends.unchanged import Remembered
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.specs import Backend
from sdtrt.specs.contract import CONDITIONING, Contract, TensorSpec

MAX_GRAPHS = 4  # shapes kept as CUDA graphs; each costs an execution context and its outputs
Key = tuple[tuple[str, Shape], ...]
Contexts = dict[int, Any]  # by the number of the piece

# While one thread captures, no other may: PyTorch's allocator serves one capture at a time.
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class _Graph:
    """One shape, captured: replaying writes `outputs`. The contexts must outlive the graph, and not be touched."""

    contexts: Contexts
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

    An engine in pieces (`runtime.pieces`) has one context for each, and PyTorch's kernels (`runtime.between`) run
    between them, on the same stream and in the same graph. A first piece that takes conditioning only runs when that
    has been copied, before the graph, and what it gives stays in buffers.

    Args:
        plan: the plan file, the first where the engine is in pieces.
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
        self._library = library or libraries.open_library(backend)
        self._device = _cuda_device(device, self._library)
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._seen: set[Key] = set()
        self._failed: set[Key] = set()
        self._copied: dict[str, Remembered] = {}  # what lies in the buffers
        self._scratch = scratch or Scratch()
        self._pieces = read_pieces(plan, contract)
        self._first = int(len(self._pieces) > 1 and self._pieces[0].is_of_conditioning)  # that runs at each step
        own = [spec.name for spec in (*contract.outputs, *self._kept_specs)]
        self._last_uses = last_uses(self._pieces, own)
        # Buffers are written to at each run: made in inference mode, they could be so in that mode alone.
        with torch.cuda.device(self._device), _memory_errors(plan), torch.inference_mode(False):
            self._plans: tuple[LoadedPlan, ...] = tuple(
                load_plan(
                    piece.plan, piece.contract, self._library, self._device.index, allow_host_code=allow_host_code
                )
                for piece in self._pieces
            )
            self._profiles = profiles_of(contract, self._pieces, self._plans)
            self._work_bytes = [running.scratch_bytes(self._library, one.engine) for one in self._plans]
            self._layout = lay_out(self._pieces, own, self._work_bytes)
            self._block = self._scratch.block(self._layout.size, self._device)
            self._crossing = {name: self._placed(*place) for name, place in self._layout.places.items()}
            self._buffers = {spec.name: self._input_buffer(spec) for spec in contract.inputs}
            self._kept = {spec.name: self._new_tensor(spec.shape({}), spec) for spec in self._kept_specs}
            self._is_kept = False  # whether what lies there is of the conditioning that lies in the buffers
            self._contexts = self._new_contexts(range(len(self._plans)))
            self._stream = torch.cuda.Stream(self._device)

    @property
    def graph_count(self) -> int:
        """How many shapes are held as CUDA graphs."""
        return len(self._graphs)

    @property
    def scratch_bytes(self) -> int:
        """The memory beside its weights that the engine needs for the largest size that it serves."""
        return self._layout.size + attention_bytes(self._pieces)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on the current stream; the outputs are new tensors on the session's device.

        Raises:
            EngineError: for tensors that don't fit the contract or any profile, a closed session, or a run that fails.
            MemoryShortage: where the GPU has too little memory.
        """
        self._check_open()
        refuse_gradients(self.contract.component, feeds)
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in feeds.items()}
        sizes = check_feeds(self.inputs, shapes, dtypes)
        profile = choose_profile(self._profiles, sizes, self._backend)
        key = tuple(sorted(shapes.items()))
        with torch.cuda.device(self._device), torch.no_grad(), _memory_errors(shapes), self._turn():
            for name, tensor in feeds.items():
                self._copy(name, tensor)
            self._keep(key, profile)
            outputs = self._replay(key)
            if outputs is None:
                outputs = self._launch(key, profile)
        return outputs

    def information(self) -> list[dict[str, Any]]:
        """What TensorRT's inspector tells of each piece: its layers, their data types and tactics."""
        self._check_open()
        return [
            running.inspect(self._library, plan.engine, self._contexts[number])
            for number, plan in enumerate(self._plans)
        ]

    def close(self) -> None:
        """Free the engine's contexts, graphs and memory, once the GPU has finished with them."""
        if not self._plans:
            return
        self._scratch.finish()
        self._graphs.clear()
        self._contexts = {}
        self._buffers.clear()
        self._kept.clear()
        self._crossing.clear()
        self._copied.clear()
        self._block, self._scratch = torch.empty(0), Scratch()  # the shared one is the others' to keep
        self._plans = ()
        self.let_go()

    def _check_open(self) -> None:
        if not self._plans:
            raise EngineError("the session is closed", hint="open a new one")

    def _turn(self) -> AbstractContextManager[None]:
        """Buffers and scratch memory to oneself, whatever stream used them last."""
        return self._scratch.turn(torch.cuda.current_stream())

    def _copy(self, name: str, tensor: torch.Tensor) -> None:
        """Copy an input to its buffer, unless it lies there already."""
        last = self._copied.pop(name, None)  # a copy that fails leaves the buffer unknown
        if last is None or not last.is_still(tensor):
            last = Remembered.of(tensor) if name in CONDITIONING else None
            self._is_kept &= name not in CONDITIONING
            self._input(name, tuple(tensor.shape)).copy_(tensor, non_blocking=True)
        if last is not None:
            self._copied[name] = last

    def _keep(self, key: Key, profile: int) -> None:
        """Run the piece that takes conditioning alone, unless its outputs are those of this conditioning already."""
        if not self._is_kept and self._first:
            self._run_on_stream(self._contexts, key, profile, range(self._first))
        self._is_kept = True

    def _replay(self, key: Key) -> dict[str, torch.Tensor] | None:
        """Run a shape's CUDA graph, if there is one."""
        found = self._graphs.get(key)
        if found is None:
            return None
        self._graphs.move_to_end(key)
        found.graph.replay()
        return {name: tensor.clone() for name, tensor in found.outputs.items()}

    def _launch(self, key: Key, profile: int) -> dict[str, torch.Tensor]:
        """Run a shape kernel by kernel; its second time, also capture it.

        The graph gets contexts that nothing else uses: NVIDIA's rule, for a graph is tied to its context's state.
        """
        if self._max_graphs > 0 and key in self._seen and key not in self._failed:
            try:
                contexts = self._new_contexts(self._each_step)
                outputs = self._run_on_stream(contexts, key, profile, self._each_step)  # must precede a capture
                self._capture(contexts, key, outputs)
                return outputs
            except (RuntimeError, EngineError) as error:
                self._failed.add(key)
                Console().warn(f"no CUDA graph for {_described(key)}, running kernel by kernel instead: {error}")
        self._seen.add(key)
        return self._run_on_stream(self._contexts, key, profile, self._each_step)

    @property
    def _each_step(self) -> range:
        """The numbers of the pieces that run at each step."""
        return range(self._first, len(self._pieces))

    def _run_on_stream(self, contexts: Contexts, key: Key, profile: int, numbers: range) -> dict[str, torch.Tensor]:
        """Run the contexts of some pieces once, in order with the current stream; returns the outputs among theirs.

        Never on the default stream itself: TensorRT would wait for the whole GPU there, twice a run.
        """
        current = torch.cuda.current_stream()
        stream = self._stream if current.cuda_stream == 0 else current
        if stream is not current:
            stream.wait_stream(current)
        tensors = self._inputs_of(key)
        try:
            for number in numbers:
                piece, context = self._pieces[number], contexts[number]
                taken = {name: tuple(tensors[name].shape) for name in piece.inputs}
                shapes = running.prepare_context(self._library, context, profile, taken, stream.cuda_stream)
                for spec in piece.contract.outputs:
                    shape = output_shape(shapes, spec)
                    if spec.name not in tensors:
                        tensors[spec.name] = self._new_tensor(shape, spec)
                    elif shape != tensors[spec.name].shape:
                        raise EngineError(f"piece {number} gives {spec.name} in another size", hint=REBUILD)
                if stream is not current:
                    stream.wait_stream(current)  # for what other threads have put there with the outputs' memory
                self._enqueue(number, context, tensors, stream)
        finally:  # a run that fails has left earlier pieces to the GPU
            if stream is not current:
                current.wait_stream(stream)
        return {spec.name: tensors[spec.name] for spec in self.outputs if spec.name in tensors}

    def _enqueue(self, number: int, context: Any, tensors: dict[str, torch.Tensor], stream: torch.cuda.Stream) -> None:
        """Put a piece and what is computed after it on a stream; leave out of `tensors` what nothing later takes."""
        piece = self._pieces[number]
        specs = (*piece.contract.inputs, *piece.contract.outputs)
        addresses = {spec.name: tensors[spec.name].data_ptr() for spec in specs}
        running.set_addresses(self._library, context, addresses)
        running.enqueue(self._library, context, stream.cuda_stream)
        if piece.cuts:
            with torch.cuda.stream(stream):
                tensors |= {cut.result: compute(cut, tensors) for cut in piece.cuts}
        for name in self._last_uses[number]:
            del tensors[name]

    def _capture(self, contexts: Contexts, key: Key, example: Mapping[str, torch.Tensor]) -> None:
        """Capture contexts that have just run into a CUDA graph with outputs of its own."""
        while len(self._graphs) >= self._max_graphs:
            torch.cuda.current_stream().synchronize()  # the one that leaves may still be running
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        outputs = {name: torch.empty_like(tensor) for name, tensor in example.items()}
        if not all(running.is_capturable(self._library, one, self._stream.cuda_stream) for one in contexts.values()):
            raise EngineError("TensorRT can't be captured at this shape", hint="open the session with graphs=0")
        tensors = self._inputs_of(key) | outputs
        # Other threads may use the GPU meanwhile: only this thread's calls are held to the rules of a capture.
        # PyTorch leaves the thread on the capture's stream where the capture fails at its end: hence the first `with`.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            _CAPTURING,
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            for number, context in contexts.items():
                self._enqueue(number, context, tensors, self._stream)
        self._graphs[key] = _Graph(contexts, graph, outputs)

    def _new_contexts(self, numbers: range) -> Contexts:
        """An execution context for each of some pieces, all in this session's scratch memory."""
        return {number: self._new_context(number) for number in numbers}

    def _new_context(self, number: int) -> Any:
        loaded, address = self._plans[number], self._block.data_ptr() + self._layout.work_offsets[number]
        with loaded.lock:
            return running.create_shared_context(self._library, loaded.engine, address, self._work_bytes[number])

    def _input_buffer(self, spec: TensorSpec) -> torch.Tensor:
        """The memory of one input, for every shape that the engine takes."""
        return torch.empty(largest(spec, self._profiles), dtype=getattr(torch, spec.dtype), device=self._device)

    def _input(self, name: str, shape: Shape) -> torch.Tensor:
        """One input's buffer, seen in a shape."""
        count = torch.Size(shape).numel()
        return self._buffers[name][:count].view(shape)

    def _inputs_of(self, key: Key) -> dict[str, torch.Tensor]:
        """What has memory already: the inputs, what was made of the conditioning, what plans give to each other."""
        return {name: self._input(name, shape) for name, shape in key} | self._kept | self._crossing

    @property
    def _kept_specs(self) -> list[TensorSpec]:
        """The outputs of the piece that takes conditioning alone; none where there is no such piece."""
        return [spec for piece in self._pieces[: self._first] for spec in piece.contract.outputs]

    def _placed(self, offset: int, spec: TensorSpec) -> torch.Tensor:
        """A tensor in the scratch memory."""
        return self._block[offset : offset + size_bytes(spec)].view(getattr(torch, spec.dtype)).view(spec.shape({}))

    def _new_tensor(self, shape: Shape, spec: TensorSpec) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)


def _cuda_device(device: torch.device, library: Library) -> torch.device:
    """The device with its index."""
    if device.type != "cuda":
        raise EngineError(f"TensorRT runs on a GPU, not on {device}", hint="use --backend onnxruntime on a CPU")
    libraries.require_gpu(library)
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

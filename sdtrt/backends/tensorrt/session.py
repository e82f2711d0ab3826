"""Sessions on one TensorRT plan: torch tensors in and out on the current CUDA stream, a CUDA graph for each shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sdtrt.backends.cuda_graphs import MAX_GRAPHS, CudaGraphs, InputBuffers, Key, key_of, memory_errors
from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.graph_pool import Outputs
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session, check_tensors, shapes_of
from sdtrt.backends.tensorrt import contexts
from sdtrt.backends.tensorrt.contexts import PlacedPlan
from sdtrt.backends.tensorrt.plan import choose_profile, largest, load_plan, output_shape
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.common.errors import EngineError
from sdtrt.specs import BackendName
from sdtrt.specs.contract import Contract, TensorSpec


@dataclass(frozen=True)
class _Run:
    """One shape's run on an execution context.

    A graph gets a context that nothing else uses: NVIDIA's rule, for a graph is tied to its context's state.
    """

    plan: PlacedPlan
    context: Any
    profile: int
    inputs: Mapping[str, torch.Tensor]
    outputs: tuple[TensorSpec, ...]
    device: torch.device
    stream: torch.cuda.Stream  # the session's own

    def launch(self) -> Outputs:
        taken = {name: tuple(tensor.shape) for name, tensor in self.inputs.items()}
        with contexts.in_order(self.stream) as stream:
            shapes = self.plan.prepare(self.context, self.profile, taken, stream)
            made = {
                spec.name: contexts.new_tensor(output_shape(shapes, spec), spec, self.device) for spec in self.outputs
            }
            contexts.wait_for_current(stream)
            self.plan.enqueue(self.context, {**self.inputs, **made}, stream)
        return made

    def reserve(self, example: Outputs) -> Outputs:
        outputs = {name: torch.empty_like(tensor) for name, tensor in example.items()}
        self.plan.require_capturable(self.context, self.stream)
        return outputs

    def record(self, outputs: Outputs) -> Outputs:
        self.plan.enqueue(self.context, {**self.inputs, **outputs}, self.stream)
        return outputs


class InspectedSession(Session[torch.Tensor], Protocol):
    """What a new engine is checked by: a session that tells of its plans."""

    @property
    def graph_count(self) -> int:
        """How many shapes are held as CUDA graphs."""

    @property
    def scratch_bytes(self) -> int:
        """The memory beside its weights that the engine needs for the largest size that it serves."""

    def information(self) -> list[dict[str, Any]]:
        """What TensorRT's inspector tells of each plan: its layers, their data types and tactics."""


class TensorRTSession(Session[torch.Tensor]):
    """Runs a TensorRT plan on torch tensors.

    The work is put on the caller's current stream, in order with what else is there; nothing waits for the GPU. A
    shape's first run goes to the stream kernel by kernel; its second one is also captured into a CUDA graph, which
    later ones replay (`CudaGraphs`). Inputs are copied into buffers of the session's own (`InputBuffers`), so a graph's
    addresses never change; outputs are new tensors each time. All contexts of a session work in one scratch memory.

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
        backend: BackendName = "tensorrt",
        device: torch.device,
        graphs: int = MAX_GRAPHS,
        allow_host_code: bool = False,
        library: Library | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.contract, self._backend = contract, backend
        self._library = library or libraries.open_library(backend)
        self._device = contexts.cuda_device(device, self._library)
        self._scratch = scratch or Scratch()
        # Buffers are written to at each run: made in inference mode, they could be so in that mode alone.
        with torch.cuda.device(self._device), memory_errors(plan), torch.inference_mode(False):
            loaded = load_plan(plan, contract, self._library, self._device.index, allow_host_code=allow_host_code)
            self._work_bytes = running.scratch_bytes(self._library, loaded.engine)
            self._block = self._scratch.block(self._work_bytes, self._device)
            self._plan: PlacedPlan | None = PlacedPlan(loaded, self._block.data_ptr(), self._work_bytes)
            elements = {spec.name: largest(spec, loaded.profiles) for spec in contract.inputs}
            self._buffers = InputBuffers(contract.inputs, elements, self._device)
            self._context: Any = self._plan.new_context()
            self._graphs = CudaGraphs(graphs, self._device)

    @property
    def graph_count(self) -> int:
        """How many shapes are held as CUDA graphs."""
        return self._graphs.count

    @property
    def scratch_bytes(self) -> int:
        """The memory beside its weights that the engine needs for the largest size that it serves."""
        return self._work_bytes

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on the current stream; the outputs are new tensors on the session's device.

        Raises:
            EngineError: for tensors that don't fit the contract or any profile, a closed session, or a run that fails.
            MemoryShortage: where the GPU has too little memory.
        """
        plan = self._opened()
        refuse_gradients(self.contract.component, feeds)
        sizes = check_tensors(self.inputs, feeds)
        profile = choose_profile(plan.loaded.profiles, sizes, self._backend)
        shapes = shapes_of(feeds)
        key = key_of(shapes)
        # Buffers and scratch memory are this run's alone, whatever stream used them last.
        with (
            torch.cuda.device(self._device),
            torch.no_grad(),
            memory_errors(shapes),
            self._scratch.turn(torch.cuda.current_stream()),
        ):
            self._buffers.fill(feeds)
            return self._graphs.run(
                key,
                usual=lambda: self._run_on(plan, self._context, key, profile),
                own=lambda: self._run_on(plan, plan.new_context(), key, profile),
            )

    def information(self) -> list[dict[str, Any]]:
        """What TensorRT's inspector tells of the plan, alone in a list: its layers, their data types and tactics."""
        return [self._opened().information(self._context)]

    def close(self) -> None:
        """Free the engine's contexts, graphs and memory, once the GPU has finished with them."""
        if self._plan is None:
            return
        self._scratch.finish()
        self._graphs.clear()
        self._context = None
        self._buffers.clear()
        self._block, self._scratch = torch.empty(0), Scratch()  # the shared one is the others' to keep
        self._plan = None
        self.let_go()

    def _opened(self) -> PlacedPlan:
        """The plan; `EngineError` where the session is closed."""
        if self._plan is None:
            raise EngineError("the session is closed", hint="open a new one")
        return self._plan

    def _run_on(self, plan: PlacedPlan, context: Any, key: Key, profile: int) -> _Run:
        """A shape's run on a context."""
        inputs = self._buffers.views(key)
        return _Run(plan, context, profile, inputs, self.outputs, self._device, self._graphs.stream)

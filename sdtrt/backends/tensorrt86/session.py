"""Sessions on an engine in pieces: plans that run one after the other, and PyTorch's kernels between them.

Its parts are those of a session on one plan: input buffers and graphs (`cuda_graphs`), contexts (`tensorrt.contexts`).
Where the tensors lie that pieces give to each other, `memory_layout` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrt.backends.cuda_graphs import MAX_GRAPHS, CudaGraphs, InputBuffers, Key, key_of, memory_errors
from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.graph_pool import Outputs
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session, check_tensors, shapes_of
from sdtrt.backends.tensorrt import contexts
from sdtrt.backends.tensorrt.contexts import PlacedPlan
from sdtrt.backends.tensorrt.plan import (
    LoadedPlan,
    PlanProfile,
    choose_profile,
    largest,
    list_file,
    output_shape,
    profile_of,
)
from sdtrt.backends.tensorrt.session import InspectedSession, TensorRTSession
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt.versions.messages import REBUILD
from sdtrt.backends.tensorrt86.memory_layout import attention_bytes, last_uses, lay_out, size_bytes
from sdtrt.backends.tensorrt86.pieces import Piece, load_pieces, read_pieces
from sdtrt.backends.tensorrt86.torch_kernels import compute
from sdtrt.common.errors import EngineError
from sdtrt.specs import BackendName
from sdtrt.specs.contract import Contract, TensorSpec

PROFILE = 0  # the plans of an engine in pieces are for one size


def open_plans(
    plan: Path,
    contract: Contract,
    *,
    backend: BackendName = "tensorrt",
    device: torch.device,
    allow_host_code: bool = False,
    scratch: Scratch | None = None,
) -> InspectedSession:
    """A session on an engine of one plan or of several; arguments and errors are those of either class."""
    kind = PiecesSession if list_file(plan).exists() else TensorRTSession
    return kind(plan, contract, backend=backend, device=device, allow_host_code=allow_host_code, scratch=scratch)


@dataclass(frozen=True)
class _Step:
    """One piece of an engine, in its place.

    Args:
        number: of the piece, counted from 0.
        last_used: the tensors that nothing takes after it and its cuts.
    """

    number: int
    piece: Piece
    plan: PlacedPlan
    last_used: frozenset[str]

    def make_room(self, shapes: Mapping[str, tuple[int, ...]], tensors: Outputs, device: torch.device) -> None:
        """Add memory for those of the plan's outputs that have none yet."""
        for spec in self.piece.contract.outputs:
            shape = output_shape(shapes, spec)
            if spec.name not in tensors:
                tensors[spec.name] = contexts.new_tensor(shape, spec, device)
            elif shape != tensors[spec.name].shape:
                raise EngineError(f"piece {self.number} gives {spec.name} in another size", hint=REBUILD)

    def enqueue(self, context: Any, tensors: Outputs, stream: torch.cuda.Stream) -> None:
        """Put the plan and what is computed after it on a stream; leave out of `tensors` what nothing later takes."""
        self.plan.enqueue(context, {name: tensors[name] for name in self.piece.tensors}, stream)
        if self.piece.cuts:
            with torch.cuda.stream(stream):
                tensors |= {cut.result: compute(cut, tensors) for cut in self.piece.cuts}
        for name in self.last_used:
            del tensors[name]


@dataclass(frozen=True)
class _Run:
    """A run of some steps in a row, each on an execution context; those of a graph are nothing else's."""

    steps: Sequence[_Step]
    contexts: Sequence[Any]
    tensors: Mapping[str, torch.Tensor]  # what has memory already
    outputs: tuple[TensorSpec, ...]
    device: torch.device
    stream: torch.cuda.Stream  # the session's own

    def launch(self) -> Outputs:
        tensors = dict(self.tensors)
        with contexts.in_order(self.stream) as stream:
            for step, context in zip(self.steps, self.contexts, strict=True):
                taken = {name: tuple(tensors[name].shape) for name in step.piece.inputs}
                step.make_room(step.plan.prepare(context, PROFILE, taken, stream), tensors, self.device)
                contexts.wait_for_current(stream)
                step.enqueue(context, tensors, stream)
        return {spec.name: tensors[spec.name] for spec in self.outputs if spec.name in tensors}

    def reserve(self, example: Outputs) -> Outputs:
        return {name: torch.empty_like(tensor) for name, tensor in example.items()}

    def record(self, outputs: Outputs) -> Outputs:
        tensors = {**self.tensors, **outputs}
        for step, context in zip(self.steps, self.contexts, strict=True):
            step.enqueue(context, tensors, self.stream)
        return outputs


class PiecesSession(Session[torch.Tensor]):
    """Runs an engine in pieces (`pieces`) on torch tensors, as `TensorRTSession` runs one plan.

    Each piece has a context of its own. PyTorch's kernels (`torch_kernels`) run between them, on the same stream and in
    the same graph. A first piece that takes conditioning only runs when that has been copied, before the graph, and
    what it gives stays in buffers.

    Args:
        plan: the first plan's file.
        contract, backend, device, graphs, allow_host_code, library, scratch: as of `TensorRTSession`.

    Raises:
        EngineError: when a plan can't be loaded here, or the list of them is not one of such an engine.
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
        self._pieces = read_pieces(plan, contract)
        self._profile = profile_of_pieces(contract, self._pieces)
        self._first = int(self._pieces[0].is_of_conditioning)  # that runs at each step
        # Buffers are written to at each run: made in inference mode, they could be so in that mode alone.
        with torch.cuda.device(self._device), memory_errors(plan), torch.inference_mode(False):
            self._steps = self._place(
                load_pieces(self._pieces, self._library, self._device.index, allow_host_code=allow_host_code)
            )
            elements = {spec.name: largest(spec, [self._profile]) for spec in contract.inputs}
            self._buffers = InputBuffers(contract.inputs, elements, self._device)
            self._kept = {
                spec.name: contexts.new_tensor(spec.shape({}), spec, self._device) for spec in self._kept_specs
            }
            self._kept_of = -1  # which conditioning what lies there is of: the buffers' `conditionings`
            self._contexts = [step.plan.new_context() for step in self._steps]
            self._graphs = CudaGraphs(graphs, self._device)

    def _place(self, plans: Sequence[LoadedPlan]) -> tuple[_Step, ...]:
        """Give the plans, and what they give to each other, their places in the scratch memory."""
        own = [spec.name for spec in (*self.outputs, *self._kept_specs)]
        work_bytes = [running.scratch_bytes(self._library, one.engine) for one in plans]
        self._layout = lay_out(self._pieces, own, work_bytes)
        self._block = self._scratch.block(self._layout.size, self._device)
        self._crossing = {name: _placed(self._block, *place) for name, place in self._layout.places.items()}
        addresses = [self._block.data_ptr() + offset for offset in self._layout.work_offsets]
        places = map(PlacedPlan, plans, addresses, work_bytes)
        return tuple(map(_Step, range(len(plans)), self._pieces, places, last_uses(self._pieces, own)))

    @property
    def _kept_specs(self) -> list[TensorSpec]:
        """The outputs of the piece that takes conditioning alone; none where there is no such piece."""
        return [spec for piece in self._pieces[: self._first] for spec in piece.contract.outputs]

    @property
    def graph_count(self) -> int:
        """How many shapes are held as CUDA graphs."""
        return self._graphs.count

    @property
    def scratch_bytes(self) -> int:
        """The memory beside its weights that the engine needs."""
        return self._layout.size + attention_bytes(self._pieces)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on the current stream; the outputs are new tensors on the session's device.

        Raises:
            EngineError: for tensors that don't fit the contract or the size, a closed session, or a run that fails.
            MemoryShortage: where the GPU has too little memory.
        """
        self._check_open()
        refuse_gradients(self.contract.component, feeds)
        choose_profile([self._profile], check_tensors(self.inputs, feeds), self._backend)
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
            self._keep(key)
            each_step = self._steps[self._first :]
            return self._graphs.run(
                key,
                usual=lambda: self._run_of(each_step, self._contexts[self._first :], key),
                own=lambda: self._run_of(each_step, [step.plan.new_context() for step in each_step], key),
            )

    def _keep(self, key: Key) -> None:
        """Run the piece that takes conditioning alone, unless its outputs are those of this conditioning already."""
        if self._first and self._kept_of != self._buffers.conditionings:
            self._run_of(self._steps[: self._first], self._contexts[: self._first], key).launch()
        self._kept_of = self._buffers.conditionings

    def _run_of(self, steps: Sequence[_Step], made: Sequence[Any], key: Key) -> _Run:
        """A run of some steps on contexts of theirs."""
        tensors = self._buffers.views(key) | self._kept | self._crossing
        return _Run(steps, made, tensors, self.outputs, self._device, self._graphs.stream)

    def information(self) -> list[dict[str, Any]]:
        """What TensorRT's inspector tells of each piece: its layers, their data types and tactics."""
        self._check_open()
        return [step.plan.information(context) for step, context in zip(self._steps, self._contexts, strict=True)]

    def close(self) -> None:
        """Free the engine's contexts, graphs and memory, once the GPU has finished with them."""
        if not self._steps:
            return
        self._scratch.finish()
        self._graphs.clear()
        self._contexts = []
        self._buffers.clear()
        self._kept.clear()
        self._crossing.clear()
        self._block, self._scratch = torch.empty(0), Scratch()  # the shared one is the others' to keep
        self._steps = ()
        self.let_go()

    def _check_open(self) -> None:
        if not self._steps:
            raise EngineError("the session is closed", hint="open a new one")


def _placed(block: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    """A tensor in the scratch memory."""
    return block[offset : offset + size_bytes(spec)].view(getattr(torch, spec.dtype)).view(spec.shape({}))


def profile_of_pieces(contract: Contract, pieces: Sequence[Piece]) -> PlanProfile:
    """The profile of an engine in pieces: the one size that they are for."""
    shapes = {spec.name: spec.shape({}) for piece in pieces for spec in piece.contract.inputs}
    return profile_of(contract, {spec.name: (shapes[spec.name],) * 3 for spec in contract.inputs})

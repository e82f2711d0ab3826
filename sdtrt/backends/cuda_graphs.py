"""What sessions on a GPU share: inputs at addresses that stay, and a CUDA graph for each shape that comes again.

Both classes know torch alone. What runs is a `Run` of the session's own: it is launched first, and recorded when its
shape comes again. They don't check inputs (`session`), nor do they share memory between sessions (`scratch`), but for
that of a pool (`graph_pool`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from sdtrt.backends.graph_pool import GraphPool, Outputs, capturing
from sdtrt.backends.unchanged import TensorSnapshot
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.specs.contract import CONDITIONING, TensorSpec

MAX_GRAPHS = 4  # shapes that a session keeps as CUDA graphs; each costs outputs, and what belongs to its run
Shape = tuple[int, ...]
Key = tuple[tuple[str, Shape], ...]  # the shape of each input, by name


class InputBuffers:
    """A session's own memory for its inputs, so that the addresses in a CUDA graph never change.

    What stays the same from step to step (`CONDITIONING`) is copied once: not again while the very same tensor comes
    unchanged, as `TensorSnapshot` tells. No such tensor is kept alive.

    Args:
        specs: the inputs.
        elements: by name, how many elements an input has at its largest.
        device: the GPU.
    """

    def __init__(self, specs: Sequence[TensorSpec], elements: Mapping[str, int], device: torch.device) -> None:
        self._memory = {
            spec.name: torch.empty(elements[spec.name], dtype=getattr(torch, spec.dtype), device=device)
            for spec in specs
        }
        self._copied: dict[str, TensorSnapshot] = {}  # what lies there
        self.conditionings = 0  # how often conditioning was copied: what is made of it holds while this stays

    def fill(self, feeds: Mapping[str, torch.Tensor]) -> None:
        """Copy inputs to their buffers on the current stream, but for what lies there already."""
        for name, tensor in feeds.items():
            self._copy(name, tensor)

    def _copy(self, name: str, tensor: torch.Tensor) -> None:
        last = self._copied.pop(name, None)  # a copy that fails leaves the buffer unknown
        if last is None or not last.is_still(tensor):
            last = TensorSnapshot.of(tensor) if name in CONDITIONING else None
            self.conditionings += name in CONDITIONING
            self.view(name, tuple(tensor.shape)).copy_(tensor, non_blocking=True)
        if last is not None:
            self._copied[name] = last

    def view(self, name: str, shape: Shape) -> torch.Tensor:
        """One input's buffer, seen in a shape."""
        count = torch.Size(shape).numel()
        return self._memory[name][:count].view(shape)

    def views(self, key: Key) -> dict[str, torch.Tensor]:
        """All inputs' buffers, seen in the shapes of a run."""
        return {name: self.view(name, shape) for name, shape in key}

    def clear(self) -> None:
        """Let the memory go."""
        self._memory.clear()
        self._copied.clear()


class Run(Protocol):
    """One shape's run over the input buffers, with all that it uses. That of a graph outlives it untouched."""

    def launch(self) -> Outputs:
        """Put the run on the GPU, in order with the current stream; the outputs are new tensors."""

    def reserve(self, example: Outputs) -> Outputs:
        """Memory for the outputs of a graph, outside of its pool, once the run was launched; `record` gets it.

        Args:
            example: what `launch` has returned.

        Raises:
            EngineError: where the run can't be recorded.
        """

    def record(self, outputs: Outputs) -> Outputs:
        """Put the run on the stream that is being captured; returns the tensors that each replay writes."""


@dataclass(frozen=True)
class _Graph:
    """One shape, captured: replaying writes `outputs`."""

    run: Run
    graph: torch.cuda.CUDAGraph
    outputs: Outputs


class CudaGraphs:
    """A session's CUDA graphs, one for a shape: the shapes that ran last are kept.

    A shape's first run is launched. Its second one is launched and then captured, and later ones are replays. A shape
    that can't be captured is launched each time, which is said once.

    Args:
        most: how many shapes to keep; 0 for none.
        device: the GPU.
        pool: what the graphs share with those of other sessions; None for a pool of its own for each graph.
    """

    def __init__(self, most: int, device: torch.device, pool: GraphPool | None = None) -> None:
        self._most, self._pool = most, pool
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._seen: set[Key] = set()
        self._failed: set[Key] = set()
        self.stream = torch.cuda.Stream(device)  # that captures

    @property
    def count(self) -> int:
        """How many shapes are kept."""
        return len(self._graphs)

    def run(self, key: Key, usual: Callable[[], Run], own: Callable[[], Run]) -> Outputs:
        """Run a shape on the current stream; the outputs are new tensors.

        Args:
            key: the shape.
            usual: gives the run that is launched.
            own: gives a run that nothing else uses: a graph gets it.
        """
        outputs = self._replay(key)
        if outputs is None and self._most > 0 and key in self._seen and key not in self._failed:
            outputs = self._launch_and_capture(key, own)
        self._seen.add(key)
        return outputs if outputs is not None else usual().launch()

    def clear(self) -> None:
        """Free all graphs and what their runs use."""
        self._graphs.clear()

    def _replay(self, key: Key) -> Outputs | None:
        """Replay a shape's graph, if there is one."""
        found = self._graphs.get(key)
        if found is None:
            return None
        self._graphs.move_to_end(key)
        found.graph.replay()
        return {name: tensor.clone() for name, tensor in found.outputs.items()}

    def _launch_and_capture(self, key: Key, own: Callable[[], Run]) -> Outputs | None:
        """Run a shape and keep it as a graph; None where that fails, which is said."""
        try:
            run = own()
            outputs = run.launch()  # must precede a capture
            self._capture(key, run, outputs)
            return outputs
        except (RuntimeError, EngineError) as error:
            self._failed.add(key)
            Console().warn(f"no CUDA graph for {_described(key)}, running kernel by kernel instead: {error}")
            return None

    def _capture(self, key: Key, run: Run, example: Outputs) -> None:
        """Capture a run that was just launched."""
        while len(self._graphs) >= self._most:
            torch.cuda.current_stream().synchronize()  # the one that leaves may still be running
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        outputs = run.reserve(example)
        with capturing(graph, self.stream) if self._pool is None else self._pool.capture(graph):
            outputs = run.record(outputs)
        self._graphs[key] = _Graph(run, graph, outputs)


def key_of(shapes: Mapping[str, Shape]) -> Key:
    """The shape of a run, from those of its inputs."""
    return tuple(sorted(shapes.items()))


@contextmanager
def memory_errors(what: object) -> Iterator[None]:
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

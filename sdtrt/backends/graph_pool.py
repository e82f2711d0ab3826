"""One pool of PyTorch's GPU memory that the runs and CUDA graphs of several sessions work in, one after the other.

Knows PyTorch's allocator alone. Who runs when, `scratch` decides; what a graph is of, `cuda_graphs`.

PyTorch gives each graph a private pool of memory, for as long as the graph lives. Graphs that are captured into one
pool share it: what is free where a capture ends, the next one takes. That is sound as long as no graph runs beside
another one, and nothing in the pool is still wanted when the next one runs. So inputs, weights and outputs lie outside.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch

Outputs = dict[str, torch.Tensor]
PoolId = tuple[int, int]

# While one thread captures, or has its memory from a pool, no other may: PyTorch's allocator serves one at a time.
CAPTURING = threading.Lock()

_LIVE: weakref.WeakSet[_Pool] = weakref.WeakSet()
_WORKSPACES: dict[int, _Pool] = {}  # of cuBLAS, by GPU
_STREAMS: dict[int, list[torch.cuda.Stream]] = {}  # of pools that are gone, by GPU: cuBLAS has a workspace for each


class GraphPool:
    """Where the intermediate results lie of sessions that never run at once, as those of one pipeline.

    A run that is launched works there just as a graph does. All of it is on a stream of the pool's own, as PyTorch
    reuses memory on one stream only. It takes nothing before the first run, and serves one GPU. Callers hold the turn
    of their `Scratch` throughout.

    Args:
        expected_bytes: what the session needs that needs the most. It is taken in one piece: many small ones, as the
            first session to run would take, are of no use for a later one with large tensors.
    """

    def __init__(self, expected_bytes: int = 0) -> None:
        self._expected_bytes = expected_bytes
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._pool: _Pool | None = None

    def join(self, user: object) -> None:
        """Note who works in the pool."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """Forget a user, whose graphs are gone; the last one gives the GPU's memory back."""
        self._users.discard(user)
        if self._pool is None or self._users:
            return
        self._pool = None
        # PyTorch can't do that while anybody captures, this thread included: a session that nobody refers to any more
        # may be closed anywhere. Then the memory stays PyTorch's, until somebody needs it.
        if CAPTURING.acquire(blocking=False):
            try:
                with suppress(RuntimeError):
                    torch.cuda.empty_cache()
            finally:
                CAPTURING.release()

    def launch(self, compute: Callable[[], Outputs]) -> Outputs:
        """Compute on memory of the pool, in order with the current stream; the outputs are new tensors outside."""
        try:
            return self._launch(compute)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()  # which PyTorch itself doesn't do while a pool is in use
            return self._launch(compute)

    def _launch(self, compute: Callable[[], Outputs]) -> Outputs:
        with self._ready().in_use():
            inside = compute()
        return {name: tensor.clone() for name, tensor in inside.items()}

    @contextmanager
    def capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Within, capture into a graph, on the pool's memory."""
        pool = self._ready()
        try:
            with capturing(graph, pool.stream, pool.id):
                yield
        except BaseException:
            pool.end()
            self._pool = None  # PyTorch may refuse it from now on; graphs that are in it keep their memory
            raise

    def _ready(self) -> _Pool:
        """The pool, made where there is none yet."""
        if self._pool is None:
            self._pool = _Pool(torch.cuda.current_device())
            self._pool.reserve(self._expected_bytes)
        return self._pool


class _Pool:
    """A private pool of PyTorch's allocator on one GPU, which it has for as long as this object is there."""

    def __init__(self, index: int) -> None:
        self.id: PoolId = torch.cuda.graph_pool_handle()
        self.index = index
        self.stream = _stream(index)
        weakref.finalize(self, _STREAMS[index].append, self.stream).atexit = False
        # What lives in a pool are graphs: this one keeps it where there is no other, as in PyTorch's own graph trees.
        self._keeper = torch.cuda.CUDAGraph()
        cell = torch.empty(1, device=torch.device("cuda", index))
        with capturing(self._keeper, self.stream, self.id):
            cell.zero_()  # PyTorch warns of an empty graph
        self._cell = cell
        _LIVE.add(self)

    def reserve(self, size_bytes: int) -> None:
        """Take memory in one piece, which is free for what runs in the pool."""
        if size_bytes and _serves_launches():
            with suppress(torch.cuda.OutOfMemoryError), self.in_use():  # what runs may do with less
                torch.empty(size_bytes, dtype=torch.uint8, device=torch.device("cuda", self.index))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, this thread has memory from the pool, and works on its stream, in order with the current one."""
        if not _serves_launches():
            yield
            return
        current, workspaces = torch.cuda.current_stream(), _workspaces(self.index)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream), CAPTURING, _cache_kept_by_cudnn():
                _give_cublas_its_workspace(workspaces)
                with torch.cuda.use_mem_pool(cast(Any, self)):  # which asks for `id` alone
                    yield
        finally:  # a run that fails has left its first kernels to the GPU
            current.wait_stream(self.stream)

    def end(self) -> None:
        """End a capture that failed at its end: PyTorch leaves the pool to it then, and would do so for good."""
        allocator: Any = torch._C
        with suppress(RuntimeError):  # it has ended
            allocator._cuda_endAllocateToPool(self.index, self.id)
            allocator._cuda_releasePool(self.index, self.id)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: PoolId | None = None) -> Iterator[None]:
    """Within, capture into a graph; its memory is in a pool of its own, or in one that others are in.

    Other threads may use the GPU meanwhile: only this thread's calls are held to the rules of a capture.
    """
    # PyTorch leaves the thread on the capture's stream where the capture fails at its end: hence the first `with`.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        CAPTURING,
        torch.cuda.graph(graph, pool=cast(Any, pool), stream=stream, capture_error_mode="thread_local"),
    ):
        yield


def idle_bytes(device: torch.device) -> int:
    """What pools have of a GPU's memory that is not in use now, and that nobody else can have while they live."""
    if not _LIVE:
        return 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    pools = {one.id for one in _LIVE if one.index == index}
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment.get("segment_pool_id", ())) in pools
    )


def _stream(index: int) -> torch.cuda.Stream:
    """A stream that no other pool is on."""
    try:
        return _STREAMS.setdefault(index, []).pop()
    except IndexError:
        return torch.cuda.Stream(index)


def _serves_launches() -> bool:
    """Whether this PyTorch gives a thread memory from a pool outside of a capture: from 2.8 on, unless it is told to
    use CUDA's own allocator. Else only graphs share their memory."""
    known = hasattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool")
    return known and torch.cuda.get_allocator_backend() == "native"


@contextmanager
def _cache_kept_by_cudnn() -> Iterator[None]:
    """Within, cuDNN's search for the fastest convolution leaves PyTorch's cache: it can't be emptied in a pool."""
    settings: Any = torch._C
    before = settings._cuda_get_conv_benchmark_empty_cache()
    settings._cudnn_set_conv_benchmark_empty_cache(False)
    try:
        yield
    finally:
        settings._cudnn_set_conv_benchmark_empty_cache(before)


def _workspaces(index: int) -> _Pool:
    """A GPU's pool for cuBLAS's workspaces, for all sessions."""
    if index not in _WORKSPACES:
        _WORKSPACES[index] = _Pool(index)
    return _WORKSPACES[index]


def _give_cublas_its_workspace(workspaces: _Pool) -> None:
    """Have cuBLAS take its workspace for this thread and the current stream, if it has none: outside of the pool.

    PyTorch keeps it for good: within, it would hold the pool's memory when all graphs are gone. It lies in a pool of
    its own, which stays: PyTorch's graph trees let go all workspaces there are, while graphs here go on to use theirs.
    """
    with torch.cuda.use_mem_pool(cast(Any, workspaces)):
        square = torch.zeros(16, 16, dtype=torch.float16, device=torch.device("cuda", workspaces.index))
        torch.addmm(square[0], torch.mm(square, square), square)

"""Sessions whose CUDA graphs share memory, on a GPU made of the CPU: each run overwrites what is in the pool."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import trt_fakes
from trt_fakes import FakeCuda, fake_torch

from sdtrt.backends import cuda_graphs, graph_pool, scratch
from sdtrt.backends.cuda_graphs import CudaGraphs, key_of
from sdtrt.backends.graph_pool import GraphPool, idle_bytes
from sdtrt.backends.scratch import Scratch

MIB = 2**20
CPU = torch.device("cpu", 0)


class PoolCuda(FakeCuda):
    """A GPU whose pools are one piece of memory each: whoever asks for some gets it from the start of that."""

    def __init__(self):
        super().__init__()
        self.pools, self.emptied, self.short, self.ended = {}, 0, 0, []
        self.pool = None  # whose memory the thread has now
        self.failing = None  # the pool that no capture succeeds in

    def current_device(self):
        return 0

    def get_allocator_backend(self):
        return "native"

    def graph_pool_handle(self):
        self.pools[0, len(self.pools) + 1] = torch.full((64,), float("nan"))
        return list(self.pools)[-1]

    def empty_cache(self):
        assert self.pool is None, "PyTorch can't do that while a pool is in use"
        self.emptied += 1

    @contextmanager
    def use_mem_pool(self, pool):
        assert graph_pool.CAPTURING.locked()
        before, self.pool = self.pool, pool.id
        try:
            yield
        finally:
            self.pool = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode, pool=None):
        self.pool, self.fail_capture = pool, pool == self.failing
        try:
            with super().graph(graph, stream, capture_error_mode):
                yield
        finally:
            self.pool = None

    def new(self, count):
        """Memory of the pool that is in use, where others' results lie or their replays will write."""
        if self.short:
            self.short -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        assert self.pool is not None, "a run takes memory outside of the pool"
        return self.pools[self.pool][:count]


@pytest.fixture
def cuda(monkeypatch):
    found = PoolCuda()
    on_cpu = fake_torch(found)
    on_cpu.device = lambda *_: CPU
    on_cpu._C = SimpleNamespace(
        _cuda_endAllocateToPool=lambda *given: found.ended.append(given), _cuda_releasePool=lambda *given: None
    )
    for module in (cuda_graphs, scratch):
        monkeypatch.setattr(module, "torch", fake_torch(found))
    monkeypatch.setattr(graph_pool, "torch", on_cpu)
    monkeypatch.setattr(graph_pool, "_serves_launches", lambda: True)
    monkeypatch.setattr(graph_pool, "_cache_kept_by_cudnn", nullcontext)
    monkeypatch.setattr(graph_pool, "_give_cublas_its_workspace", lambda workspaces: None)
    for name in ("_WORKSPACES", "_STREAMS"):
        monkeypatch.setattr(graph_pool, name, {})
    return found


@dataclass
class Powers:
    """A run of two steps: what the first gives lies in the pool, and so does what the second makes of it."""

    cuda: PoolCuda
    sample: torch.Tensor
    factor: float
    pool: GraphPool
    streams: list = field(default_factory=list)

    def launch(self):
        return self.pool.launch(self.compute)

    def reserve(self, example):
        return {name: torch.empty_like(tensor) for name, tensor in example.items()}

    def record(self, outputs):
        found = self.compute()["out"]
        self.put(lambda: outputs["out"].copy_(found))
        return outputs

    def compute(self):
        self.streams.append(self.cuda.current)
        half, whole = self.cuda.new(2 * self.sample.numel()).chunk(2)
        self.put(lambda: torch.mul(self.sample, self.factor, out=half))
        self.put(lambda: torch.add(half, half * half, out=whole))
        return {"out": whole}

    def put(self, operation):
        """On the stream, or into the graph that is captured."""
        operation() if trt_fakes.capturing is None else trt_fakes.capturing.append(operation)


class Worker:
    """As much of a session as graphs need."""

    def __init__(self, cuda, factor, shared):
        self.cuda, self.factor, self.scratch = cuda, factor, shared
        self.pool = shared.pool
        self.pool.join(self)
        shared.block(0, CPU)
        self.graphs = CudaGraphs(4, CPU, self.pool)
        self.buffer = torch.empty(32)
        self.last = None

    def run(self, sample):
        view = self.buffer[: sample.numel()].copy_(sample)
        self.last = Powers(self.cuda, view, self.factor, self.pool)
        with self.scratch.turn(self.cuda.current_stream()):
            return self.graphs.run(key_of({"sample": tuple(sample.shape)}), lambda: self.last, lambda: self.last)["out"]

    def wanted(self, sample):
        return sample * self.factor + (sample * self.factor) ** 2

    def close(self):
        self.graphs.clear()
        self.pool.leave(self)


def test_graphs_replayed_in_any_order_leave_each_others_outputs_alone(cuda):
    shared = Scratch()
    some = [Worker(cuda, factor, shared) for factor in (2.0, 3.0, 5.0)]
    samples = [torch.rand(4), torch.rand(4), torch.rand(6)]
    kept = []
    for turn in range(5):
        for worker in some if turn % 2 else reversed(some):
            kept += [(worker.run(sample), worker.wanted(sample)) for sample in samples]
    assert [worker.graphs.count for worker in some] == [2, 2, 2]
    assert all(torch.equal(found, wanted) for found, wanted in kept)
    assert len(cuda.pools) == 2, "the sessions' one, and cuBLAS's"
    memory = {one.untyped_storage().data_ptr() for one in cuda.pools.values()}
    assert not memory & {found.untyped_storage().data_ptr() for found, _ in kept}


def test_a_launch_is_on_the_pools_stream_in_order_with_the_callers(cuda):
    worker = Worker(cuda, 2.0, Scratch())
    worker.run(torch.rand(4))
    (stream,) = worker.last.streams
    assert stream is worker.pool._pool.stream is not cuda.current
    assert cuda.current in stream.waited_for
    assert stream in cuda.current.waited_for


def test_what_is_expected_is_taken_in_one_piece_before_the_first_run(cuda, monkeypatch):
    taken = []
    real = torch.empty

    def empty(*given, **options):
        taken.append((given, cuda.pool))
        return real(*given, **options)

    monkeypatch.setattr(graph_pool.torch, "empty", empty)
    worker = Worker(cuda, 2.0, Scratch(3 * MIB))
    assert not taken, "nothing is taken for sessions that never run"
    for _ in range(3):
        worker.run(torch.rand(4))
    sizes = [(given, pool) for given, pool in taken if given != (1,)]
    assert sizes == [((3 * MIB,), worker.pool._pool.id)]


def test_too_little_memory_for_what_is_expected_stops_no_run(cuda, monkeypatch):
    def empty(*given, **options):
        if given == (3 * MIB,):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(*given, **options)

    monkeypatch.setattr(graph_pool.torch, "empty", empty)
    worker, sample = Worker(cuda, 2.0, Scratch(3 * MIB)), torch.rand(4)
    assert torch.equal(worker.run(sample), worker.wanted(sample))


def test_a_launch_that_runs_out_of_memory_is_tried_again_with_pytorchs_cache_given_back(cuda):
    worker, sample = Worker(cuda, 2.0, Scratch()), torch.rand(4)
    cuda.short = 1
    assert torch.equal(worker.run(sample), worker.wanted(sample))
    assert cuda.emptied == 1
    cuda.short = 2
    with pytest.raises(torch.cuda.OutOfMemoryError):
        worker.run(torch.rand(6))
    assert torch.equal(worker.run(sample), worker.wanted(sample))
    assert not graph_pool.CAPTURING.locked()


def test_the_last_to_leave_gives_the_memory_back(cuda):
    shared = Scratch()
    first, second = (Worker(cuda, factor, shared) for factor in (2.0, 3.0))
    for _ in range(2):
        for worker in (first, second):
            worker.run(torch.rand(4))
    first.close()
    assert (cuda.emptied, shared.pool._pool is None) == (0, False)
    sample = torch.rand(4)
    assert torch.equal(second.run(sample), second.wanted(sample))
    second.close()
    assert (cuda.emptied, shared.pool._pool) == (1, None)
    second.close()
    assert cuda.emptied == 1


def test_a_session_may_be_closed_while_its_thread_captures_for_another(cuda):
    """As Python closes one that nobody refers to any more, at any time."""
    worker = Worker(cuda, 2.0, Scratch())
    worker.run(torch.rand(4))
    with graph_pool.CAPTURING:
        worker.close()
    assert (cuda.emptied, worker.pool._pool) == (0, None)


def test_a_user_that_is_dropped_unclosed_holds_no_memory(cuda):
    shared = Scratch()
    dropped, stays = (Worker(cuda, factor, shared) for factor in (2.0, 3.0))
    dropped.run(torch.rand(4))
    del dropped
    stays.close()
    assert shared.pool._pool is None


def test_pools_of_several_pipelines_have_nothing_in_common(cuda):
    one, other = (Worker(cuda, factor, Scratch()) for factor in (2.0, 3.0))
    for worker in (one, other):
        worker.run(torch.rand(4))
    assert one.pool._pool.id != other.pool._pool.id
    assert one.pool._pool.stream is not other.pool._pool.stream
    stream = one.pool._pool.stream
    one.close()
    later = Worker(cuda, 5.0, Scratch())
    later.run(torch.rand(4))
    assert later.pool._pool.stream is stream, "cuBLAS has its workspace there"


def test_a_capture_that_fails_ends_in_a_new_pool_and_leaves_graphs_alone(cuda, capsys):
    shared = Scratch()
    good, bad = (Worker(cuda, factor, shared) for factor in (2.0, 3.0))
    sample = torch.rand(4)
    for _ in range(2):
        good.run(sample)
    before = shared.pool._pool.id
    bad.run(sample)
    cuda.failing = before
    assert torch.equal(bad.run(sample), bad.wanted(sample))
    assert "no CUDA graph for sample [4]" in capsys.readouterr().err
    assert cuda.ended == [(0, before)]
    other = torch.rand(6)
    for _ in range(3):
        for worker in (good, bad):
            assert torch.equal(worker.run(sample), worker.wanted(sample))
            assert torch.equal(worker.run(other), worker.wanted(other))
    assert shared.pool._pool.id != before
    assert (good.graphs.count, bad.graphs.count) == (2, 1)


def test_memory_that_is_idle_in_pools_is_counted(cuda, monkeypatch):
    segments = []
    monkeypatch.setattr(cuda, "memory_snapshot", lambda: segments, raising=False)
    worker = Worker(cuda, 2.0, Scratch())
    worker.run(torch.rand(4))
    pool = worker.pool._pool.id
    segments += [
        {"device": 0, "segment_pool_id": pool, "total_size": 5 * MIB, "allocated_size": MIB},
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 7 * MIB, "allocated_size": 0},
        {"device": 1, "segment_pool_id": pool, "total_size": 9 * MIB, "allocated_size": 0},
    ]
    assert idle_bytes(torch.device("cuda", 0)) == 4 * MIB
    worker.close()
    assert idle_bytes(torch.device("cuda", 0)) == 0

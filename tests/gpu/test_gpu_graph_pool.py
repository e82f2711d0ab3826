"""CUDA graphs of several sessions in one pool of memory, on a GPU: PyTorch's own kernels, and engines of Inductor."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import pytest
import torch
from gpu_engines import NEEDS_GPU

import sdtrt
from sdtrt.backends.cuda_graphs import CudaGraphs, InputBuffers, key_of
from sdtrt.backends.graph_pool import GraphPool, idle_bytes
from sdtrt.backends.inductor.backend import Inductor
from sdtrt.backends.scratch import Scratch
from sdtrt.specs.contract import TensorSpec

pytestmark = [*NEEDS_GPU, pytest.mark.timeout(1200)]
CUDA = torch.device("cuda")
MIB = 2**20
SIDE = 4096


@dataclass(frozen=True)
class Work:
    """A run that needs much memory meanwhile: products of large matrices, a convolution, reductions."""

    sample: torch.Tensor
    weight: torch.Tensor
    pool: GraphPool

    def launch(self):
        return self.pool.launch(self.compute)

    def reserve(self, example):
        return {name: torch.empty_like(tensor) for name, tensor in example.items()}

    def record(self, outputs):
        for name, tensor in self.compute().items():
            outputs[name].copy_(tensor)
        return outputs

    def compute(self):
        wide = self.sample @ self.weight
        deep = torch.nn.functional.gelu(wide) @ self.weight.mT
        picture = torch.nn.functional.conv2d(deep[None, None], self.weight[None, None, :3, :3], padding=1)[0, 0]
        return {"out": (picture + wide.mean(dim=1, keepdim=True)).tanh(), "mean": deep.float().mean(dim=1)}


class Worker:
    """As much of a session as graphs need."""

    def __init__(self, width, scratch, seed=0):
        generator = torch.Generator(CUDA).manual_seed(seed)
        self.weight = torch.randn(SIDE, width, generator=generator, device=CUDA, dtype=torch.float16) / 64
        self.scratch, self.pool = scratch, scratch.pool
        scratch.block(0, CUDA)
        self.buffers = InputBuffers([TensorSpec("sample", "float16", ("rows", SIDE))], {"sample": 2048 * SIDE}, CUDA)
        self.graphs = CudaGraphs(4, CUDA, self.pool)
        self.pool.join(self)

    def run(self, sample):
        key = key_of({"sample": tuple(sample.shape)})
        with self.scratch.turn(torch.cuda.current_stream()), torch.no_grad():
            self.buffers.fill({"sample": sample})
            work = Work(self.buffers.view("sample", tuple(sample.shape)), self.weight, self.pool)
            return self.graphs.run(key, usual=lambda: work, own=lambda: work)

    def plain(self, sample):
        with torch.no_grad():
            return Work(sample, self.weight, self.pool).compute()

    def close(self):
        self.scratch.finish()
        self.graphs.clear()
        self.buffers.clear()
        self.weight = None
        self.pool.leave(self)


def samples(count, rows=1024):
    generator = torch.Generator(CUDA).manual_seed(rows)
    return [torch.randn(rows, SIDE, generator=generator, device=CUDA, dtype=torch.float16) for _ in range(count)]


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def workers(*widths, shared, expected_bytes=0):
    one = Scratch(expected_bytes)
    with ExitStack() as stack:
        yield [
            stack.enter_context(closing(Worker(width, one if shared else Scratch(), seed)))
            for seed, width in enumerate(widths)
        ]


def reserved():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize("expected_bytes", [0, 256 * MIB])
def test_graphs_that_take_turns_in_a_pool_give_the_right_outputs_to_the_last_bit(expected_bytes):
    """In any order of replay, several shapes of each; and outputs stay as they are when others run."""
    inputs = [*samples(2), *samples(2, rows=512)]
    with workers(SIDE, 2 * SIDE, 3 * SIDE, shared=True, expected_bytes=expected_bytes) as some:
        expected = [[worker.plain(sample) for sample in inputs] for worker in some]
        kept = []
        for turn in range(6):
            for number, worker in sorted(enumerate(some), reverse=turn % 2 == 1):
                for which, sample in enumerate(inputs):
                    kept.append((worker.run(sample), expected[number][which]))
        assert [worker.graphs.count for worker in some] == [2, 2, 2]
        assert all(same(found, wanted) for found, wanted in kept)


def test_a_shared_pool_takes_less_than_private_ones():
    taken = {}
    for shared in (True, False):
        before = reserved()
        torch.cuda.reset_peak_memory_stats()
        with workers(2 * SIDE, 2 * SIDE, 2 * SIDE, shared=shared) as some:
            for _ in range(3):
                for worker in some:
                    worker.run(samples(1)[0])
            assert [worker.graphs.count for worker in some] == [1, 1, 1]
            taken[shared] = reserved() - before
    print(f"shared {taken[True] / MIB:.0f} MiB, private {taken[False] / MIB:.0f} MiB")  # with pytest -rP
    assert taken[True] < 0.75 * taken[False]


def test_what_is_taken_at_once_serves_those_that_come_later():
    """The small one first: what it would take by itself is in pieces that the large one can't use."""
    with workers(SIDE // 4, 4 * SIDE, shared=True, expected_bytes=512 * MIB) as (small, large):
        for worker in (small, small, large, large, small, large):
            found = worker.run(samples(1)[0])
            assert same(found, worker.plain(samples(1)[0]))
        pools = {}
        for segment in torch.cuda.memory_snapshot():
            pool = tuple(segment["segment_pool_id"])
            pools[pool] = max(pools.get(pool, 0), segment["total_size"])
        assert pools[small.pool._pool.id] == 512 * MIB, pools
        assert idle_bytes(CUDA) >= 512 * MIB, "nothing in the pool is in use between runs"


def test_the_last_to_close_gives_the_memory_back():
    with workers(SIDE, shared=True) as (worker,):  # cuBLAS's workspace stays for good, and is used again
        worker.run(samples(1)[0])
    before = reserved()
    for _ in range(3):
        with workers(SIDE, 2 * SIDE, shared=True, expected_bytes=512 * MIB) as (first, second):
            for worker in (first, second) * 2:
                worker.run(samples(1)[0])
            first.close()
            assert same(second.run(samples(1)[0]), second.plain(samples(1)[0]))
            assert torch.cuda.memory_reserved() - before >= 512 * MIB
        torch.cuda.synchronize()
        assert torch.cuda.memory_reserved() - before < 128 * MIB, "the pool is back without asking"
        assert reserved() - before <= 8 * MIB
    assert idle_bytes(CUDA) < 8 * MIB


def test_a_capture_that_fails_leaves_the_others_as_they_are():
    """A run that waits for the GPU can't be captured."""

    class Waiting(Work):
        def compute(self):
            torch.cuda.synchronize()
            return super().compute()

    (sample,) = samples(1)
    with workers(SIDE, SIDE, shared=True) as (good, bad):
        for _ in range(2):
            good.run(sample)
        key = key_of({"sample": tuple(sample.shape)})
        for _ in range(3):
            with bad.scratch.turn(torch.cuda.current_stream()), torch.no_grad():
                work = Waiting(sample, bad.weight, bad.pool)
                found = bad.graphs.run(key, usual=lambda work=work: work, own=lambda work=work: work)
            assert same(found, bad.plain(sample))
        assert (good.graphs.count, bad.graphs.count) == (1, 0)
        (other,) = samples(1, rows=512)
        for _ in range(3):
            assert same(good.run(sample), good.plain(sample))
            assert same(good.run(other), good.plain(other))
        assert good.graphs.count == 2


def test_two_threads_have_a_pool_each():
    """On streams of their own, at once: captures and runs in the one don't touch the other."""
    failures = []

    def work(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), workers(SIDE, 2 * SIDE, shared=True) as some:
            inputs = [*samples(2, rows=256 + 256 * seed), *samples(2, rows=768)]
            expected = [[worker.plain(sample) for sample in inputs] for worker in some]
            for _ in range(20):
                for number, worker in enumerate(some):
                    for which, sample in enumerate(inputs):
                        if not same(worker.run(sample), expected[number][which]):
                            failures.append((seed, number, which))
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def pictures(directory, monkeypatch, *, shared):
    """Pictures of the miniature in Inductor's engines, and what they took of the GPU's memory."""
    opens = Inductor.open
    if not shared:
        monkeypatch.setattr(Inductor, "open", lambda self, entry, device, scratch: opens(self, entry, device, None))
    before = reserved()
    torch.cuda.reset_peak_memory_stats()
    with closing(sdtrt.load("tiny", height=512, width=512, backend="inductor", engine_dir=directory.path)) as pipe:
        made = [
            pipe(
                "a red circle",
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
            for seed in (1, 2, 1, 2)
        ]
    taken = torch.cuda.max_memory_reserved() - before
    monkeypatch.undo()
    return made, taken, reserved() - before


def test_pictures_are_the_same_in_one_pool_and_in_several(directory, monkeypatch):
    """The first one is launched kernel by kernel, the second one captured, later ones are replayed."""
    pictures(directory, monkeypatch, shared=True)  # builds what is missing
    found, shared_bytes, left = pictures(directory, monkeypatch, shared=True)
    expected, private_bytes, _ = pictures(directory, monkeypatch, shared=False)
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()
    for first, later in zip(found[:2], found[2:], strict=True):
        assert (first == later).all()
    print(f"shared {shared_bytes / MIB:.0f} MiB, private {private_bytes / MIB:.0f} MiB, left {left / MIB:.0f} MiB")
    assert shared_bytes < private_bytes

"""Reads the memory of tensors while others work: threads read the host's, a GPU its own.

Knows tensors. Knows no module, and keeps none alive.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from weakref import finalize

import numpy as np
import torch
from torch.nn.functional import pad

from sdtrt.common.host import cores

BLOCK_WORDS = 512  # 4 KiB, of which a reading keeps one sum
THREAD = "sdtrt-reading"
MOST_THREADS = 4
BLOCK_BYTES = 8 * BLOCK_WORDS  # words have 8 bytes: their sums are exact, and as fast as memory is read

Numbered = tuple[int, tuple[torch.Tensor, torch.dtype]]


class Reading:
    """The sums of each 4 KiB of tensors' memory (int64), each tensor as if it had its dtype; it begins at once.

    One changed number changes one of them. Numbers that change places within 4 KiB do not.
    NumPy adds what lies in the host's memory: it takes no core beside a thread's own, reads 10 to 25 GB/s with each,
    and lets Python go on meanwhile. What lies on a GPU is added there, after what its stream has to do by now; nobody
    waits for it.
    The tensors' memory is kept until the end; `stop` is that end, and so is the end of this object.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], dtypes: Iterable[torch.dtype]) -> None:
        pairs = list(zip([tensor.detach() for tensor in tensors], dtypes, strict=True))
        self._sums: list[torch.Tensor | None] = [None] * len(pairs)
        self._failures: list[Exception] = []
        self._on_gpu = [number for number, (tensor, _) in enumerate(pairs) if is_on_gpu(tensor)]
        self._event: torch.cuda.Event | None = None
        self._stop = threading.Event()
        there = set(self._on_gpu)
        on_host = iter([(number, pair) for number, pair in enumerate(pairs) if number not in there])
        self._threads = _started(on_host, self._sums, self._failures, self._stop)
        finalize(self, self._stop.set)
        if there:
            self._ask_gpu([pairs[number] for number in self._on_gpu])

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        reads = any(thread.is_alive() for thread in self._threads)
        return not reads and (self._event is None or self._event.query())

    def wait(self) -> torch.Tensor:
        """The sums, one tensor's after another's."""
        self._join()
        if self._event is not None:
            self._event.synchronize()
        if self._failures:
            raise self._failures[0]
        assert not self._stop.is_set(), "a reading that was stopped has no sums"
        return torch.cat([torch.empty(0, dtype=torch.int64), *(one for one in self._sums if one is not None)])

    def stop(self) -> None:
        """End the threads, within a tensor."""
        self._stop.set()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _ask_gpu(self, pairs: Sequence[tuple[torch.Tensor, torch.dtype]]) -> None:
        """Let the GPU add, and have its sums copied to the host."""
        sums = [_blocks(tensor, dtype).sum(1) for tensor, dtype in pairs]
        host, self._event = _copy_soon(torch.cat(sums))
        for number, own in zip(self._on_gpu, host.split([len(one) for one in sums]), strict=True):
            self._sums[number] = own


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a GPU reads a tensor."""
    return tensor.is_cuda


def _copy_soon(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """A GPU's numbers in the host's memory, once the event is there. A copy to pinned memory waits for nothing."""
    with torch.cuda.device(numbers.device):
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


def block_sums(tensors: Iterable[torch.Tensor], dtypes: Iterable[torch.dtype]) -> torch.Tensor:
    """The sums of a `Reading`, which are waited for."""
    return Reading(tensors, dtypes).wait()


def thread_count() -> int:
    """How many threads read: a quarter of the cores, so that who launches a GPU's work has one, and at most 4."""
    return max(1, min(MOST_THREADS, cores() // 4))


def _started(
    pairs: Iterator[Numbered], sums: list[torch.Tensor | None], failures: list[Exception], stop: threading.Event
) -> list[threading.Thread]:
    """Threads that share the tensors among them; where the system gives none, they are read here."""
    started: list[threading.Thread] = []
    try:
        for _ in range(thread_count()):
            thread = threading.Thread(target=_read_host, args=(pairs, sums, failures, stop), name=THREAD)
            thread.start()
            started.append(thread)
    except RuntimeError:
        if not started:
            _read_host(pairs, sums, failures, stop)
    return started


def _read_host(
    pairs: Iterator[Numbered],
    sums: list[torch.Tensor | None],
    failures: list[Exception],
    stop: threading.Event,
) -> None:
    """Add the memory of each tensor that no other thread has taken, until `stop`."""
    try:
        for number, (tensor, dtype) in pairs:
            if stop.is_set():
                return
            sums[number] = torch.from_numpy(np.add.reduce(_blocks(tensor, dtype).numpy(), axis=1))
    except Exception as error:  # of memory: it is the waiting thread's
        failures.append(error)


def _blocks(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's memory as blocks of words `[blocks, BLOCK_WORDS]`, with zeros at the end where that takes some."""
    flat = flat_memory(tensor.to(dtype))
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    if flat.nbytes % BLOCK_BYTES:
        flat = pad(flat.view(torch.uint8), (0, -flat.nbytes % BLOCK_BYTES))
    return flat.view(torch.int64).view(-1, BLOCK_WORDS)


def flat_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers as they lie in memory, and no copy of them, as far as they lie in one block."""
    if not is_dense(tensor):
        return tensor.reshape(-1)
    return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers lie in one block of memory."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))

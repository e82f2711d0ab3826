"""The pieces of one engine, built side by side: each in a process of its own, as many as serve.

A builder is mostly one processor core that compiles. It also times kernels on the GPU, to choose among them, and others
there get in its way: on an H200 with 39 of them each took three times as long (`benchmarks/tuning.md`). Two side by
side should be enough, as one piece of Stable Diffusion 1.5's UNet holds most of the work. Processes, not threads:
nobody has shown that TensorRT 8.6 builds in several.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdtrt.backends.child import Report, run_worker
from sdtrt.backends.tensorrt.build import crashed
from sdtrt.backends.tensorrt86.build import WORKER, PieceRequest
from sdtrt.common import host
from sdtrt.common.errors import BuildMemoryShortage, MemoryShortage

MOST_BUILDERS = 2
GPU_BYTES = 2**33  # of free memory, for each builder that runs beside others: with too little, 8.6 leaves out kernels

Found = dict[int, dict[str, Any]]  # by the number of a piece: what its builder has told


def build(pieces: Sequence[PieceRequest], log: Path, report: Report) -> list[dict[str, Any]]:
    """Build pieces side by side, and where memory is too short for that, one at a time.

    Args:
        pieces: requests for pieces, in their order.
        log: gets the messages of them all, those of a piece together.

    Returns:
        What the builders have told, in the order of the pieces.

    Raises:
        BuildError, EngineError: of the first that fails; the processes of the others have ended then.
    """
    found: Found = {}
    jobs = min(most_jobs(), len(pieces))
    _give_back()
    try:
        _Crew(pieces, log, report, found).run(jobs)
    except (BuildMemoryShortage, MemoryShortage) as error:
        if jobs == 1:
            raise
        left = len(pieces) - len(found)
        report({"warn": f"{jobs} pieces side by side failed ({error.message}): building {left} one at a time"})
        _Crew(pieces, log, report, found).run(1)
    return [found[number] for number in range(len(pieces))]


def most_jobs() -> int:
    """How many builders may run side by side here."""
    room = (host.free_gpu_bytes() or 0) // GPU_BYTES if host.has_gpu() else MOST_BUILDERS
    return max(1, min(MOST_BUILDERS, host.cores(), room))


def _give_back() -> None:
    """Give the system the memory of what was split: glibc keeps it, and the builders need it."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class _Crew:
    """Builders that run side by side, and end together when one fails."""

    def __init__(self, pieces: Sequence[PieceRequest], log: Path, report: Report, found: Found) -> None:
        self._pieces, self._log, self._report, self._found = pieces, log, report, found
        self._lock = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []
        self._has_ended = False
        self._failure: BaseException | None = None  # the first: that the others were ended is no news
        self._warned: set[str] = set()

    def run(self, jobs: int) -> None:
        """Build what is not found yet, what is most work first."""
        missing = [number for number in range(len(self._pieces)) if number not in self._found]
        missing.sort(key=lambda number: _weight(self._pieces[number]), reverse=True)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {pool.submit(self._build, self._pieces[number]): number for number in missing}
                self._show()
                for future in as_completed(futures):
                    if (found := future.result()) is not None:
                        self._found[futures[future]] = found
                        self._show()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._end()
        if self._failure is not None:
            raise self._failure

    def _build(self, piece: PieceRequest) -> dict[str, Any] | None:
        """What a piece's builder tells; None where that or another one has failed."""
        if self._has_ended:
            return None
        try:
            return run_worker(
                piece, self._pass_on, worker=WORKER, leads_group=False, started=self._add, crashed=crashed
            )
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._end()
            return None
        finally:
            self._join_log(piece)

    def _add(self, child: subprocess.Popen[bytes]) -> None:
        """Take a process that was just started; one that comes too late ends."""
        with self._lock:
            self._children.append(child)
            if self._has_ended:
                child.kill()

    def _end(self) -> None:
        with self._lock:
            self._has_ended = True
            for child in self._children:
                child.kill()

    def _show(self) -> None:
        self._report({"show": f"optimising {len(self._pieces)} pieces, {len(self._found)} done"})

    def _pass_on(self, message: Mapping[str, Any]) -> None:
        """Report a builder's warning, once if several have the same; what it does just now is one of many things."""
        if "warn" not in message:
            return
        with self._lock:
            is_new = message["warn"] not in self._warned
            self._warned.add(message["warn"])
        if is_new:
            self._report(message)

    def _join_log(self, piece: PieceRequest) -> None:
        """Move a piece's messages to those of the others. Where the disk is full, they stay where they are."""
        with suppress(OSError), self._lock:
            with self._log.open("ab") as log, piece.log.open("rb") as own:
                log.write(f"\n[piece {piece.piece}]\n".encode())
                shutil.copyfileobj(own, log)
            piece.log.unlink()


def _weight(piece: PieceRequest) -> int:
    """The bytes of a piece's ONNX, which are its weights: the more, the longer it takes to build."""
    return sum(file.stat().st_size for file in piece.onnx.parent.glob(f"{piece.onnx.name}*"))

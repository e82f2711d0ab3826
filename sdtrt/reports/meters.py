"""What a benchmark reads: the clock, the memory of process and GPU, the GPU's energy counter."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

POLL_SECONDS = 0.005
PROC = Path("/proc/self")
RESET_PEAK = "5"  # what clear_refs takes to make the peak start again at what is resident now: proc(5)


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in one unit."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.samples)

    @property
    def p90(self) -> float:
        """What nine in ten don't exceed: the sample of the nearest rank, for what was not measured is not shown."""
        return sorted(self.samples)[math.ceil(len(self.samples) * 9 / 10) - 1]

    def scaled(self, factor: float) -> Timing:
        """In another unit."""
        return Timing(tuple(sample * factor for sample in self.samples))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"median": self.median, "p90": self.p90, "samples": list(self.samples)}


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], repeats: int, device: torch.device) -> Timing:
    """Seconds of each of `repeats` calls, the GPU idle before and after each."""
    samples = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return Timing(tuple(samples))


def time_queued_calls(call: Callable[[], object], repeats: int, device: torch.device) -> Timing:
    """Seconds of each of `repeats` calls that follow one another without a wait, as in a denoising loop.

    On a GPU by CUDA events: where the host is quick enough it stays out of the figures, as it does in the loop.
    """
    if device.type != "cuda":
        return time_calls(call, repeats, device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    synchronize(device)
    return Timing(tuple(one.elapsed_time(other) / 1000 for one, other in pairwise(events)))


@dataclass
class MemoryMeter:
    """The peak memory of what runs between `watching` blocks.

    On a GPU that is the growth of all memory in use on the device since the meter was made: PyTorch's own counter is
    blind to TensorRT's memory. Other programs on that GPU would disturb it. On a CPU it is the process's resident
    memory at its peak, libraries included.
    """

    device: torch.device
    base_bytes: int = 0
    gpu_peak_bytes: int = 0
    process_peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        release_memory(self.device)
        self.base_bytes = gpu_bytes(self.device)
        reset_process_peak()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Poll the device's memory meanwhile; the timed calls are no place for it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stop.clear()
        thread = threading.Thread(target=self._poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.read()

    def read(self) -> None:
        """Note what is in use now."""
        self.gpu_peak_bytes = max(self.gpu_peak_bytes, gpu_bytes(self.device) - self.base_bytes)
        self.process_peak_bytes = max(self.process_peak_bytes, process_peak_bytes())

    @property
    def peak_bytes(self) -> int:
        """The peak where the work is done."""
        return self.gpu_peak_bytes if self.device.type == "cuda" else self.process_peak_bytes

    def to_json(self) -> dict[str, int | None]:
        """Plain data; the GPU's are None on a CPU."""
        on_gpu = self.device.type == "cuda"
        return {
            "process_peak_bytes": self.process_peak_bytes,
            "gpu_peak_bytes": self.gpu_peak_bytes if on_gpu else None,
            "torch_peak_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        }

    def _poll(self) -> None:
        while self.device.type == "cuda" and not self._stop.wait(POLL_SECONDS):
            self.read()


def release_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more, so that one measurement does not carry another's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 meanwhile, in matrix products and convolutions alike (PyTorch's own defaults differ)."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def gpu_bytes(device: torch.device) -> int:
    """Memory in use on a GPU, by whomever; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def reset_process_peak() -> None:
    """Let the process's peak memory start again, where the system can do that (Linux)."""
    try:
        (PROC / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return


def process_peak_bytes() -> int:
    """The process's largest resident memory since `reset_process_peak`; elsewhere than on Linux since its start."""
    try:
        status = (PROC / "status").read_text()
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@lru_cache(maxsize=1)
def nvml() -> Any:
    """NVIDIA's management library (`pynvml`), ready to be asked; None on a machine without its driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def driver_version() -> str | None:
    """The version of NVIDIA's driver, as `580.65.06`; None without one."""
    if (library := nvml()) is None:
        return None
    try:
        return str(library.nvmlSystemGetDriverVersion())
    except library.NVMLError:
        return None


def energy_joules(device: torch.device) -> float | None:
    """The energy counter of the device that computes; None where nobody counts, as on CPUs."""
    uuid = gpu_uuid(device)
    return None if uuid is None else energy_of(uuid)


def gpu_uuid(device: torch.device) -> str | None:
    """What NVML knows a GPU by, as CUDA numbers them otherwise: `GPU-1b2c…`; None for a CPU."""
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def energy_of(uuid: str) -> float | None:
    """All that the GPU with this identifier, as in `GPU-1b2c…`, has used since the driver was loaded, in joules.

    None where a GPU does not count (before Volta).
    """
    return _thousandth("nvmlDeviceGetTotalEnergyConsumption", uuid)


def power_of(uuid: str) -> float | None:
    """What the GPU with this identifier uses now, in watts; None where it does not say."""
    return _thousandth("nvmlDeviceGetPowerUsage", uuid)


def _thousandth(function: str, uuid: str) -> float | None:
    """A figure of NVML for one GPU, which is in thousandths of the unit; None where there is none."""
    if (library := nvml()) is None:
        return None
    try:
        found: int = getattr(library, function)(library.nvmlDeviceGetHandleByUUID(uuid))
    except library.NVMLError:
        return None
    return found / 1000

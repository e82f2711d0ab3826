"""OpenVINO as a library: imported with its telemetry off, its settings, and its errors as ours.

Knows files and settings; sessions and builds are elsewhere. It writes nothing outside of what it is told to write: no
cache folder is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdtrt.common.errors import EngineError, UsageError
from sdtrt.common.files import RAISE_LIMITS
from sdtrt.engines.entry import verification_of

TELEMETRY = "openvino_telemetry"
CPU = "CPU"
DEVICE_VARIABLE = "SDTRT_OPENVINO_DEVICE"  # an environment variable, so that a server's workers have it, too
# How it says that memory is short, or that there is no thread or file to spare; it has no types of errors for that.
OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate", "std::length_error", "out of memory")
OUT_OF_LIMITS = ("Resource temporarily unavailable", "Too many open files", "pthread_create")


def load() -> Any:
    """The module `openvino`. Its import tells its maker about itself where `openvino_telemetry` is there: not here."""
    with _without_telemetry():
        import openvino

        return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Within, OpenVINO finds no telemetry package to import, and takes the stub that it has for that case."""
    if "openvino" in sys.modules or TELEMETRY in sys.modules:
        yield  # whoever imported it has decided
        return
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]


@lru_cache(maxsize=1)
def core() -> Any:
    """The process's one instance of OpenVINO, which loads a device's library when that is used first."""
    return load().Core()


def device() -> str:
    """What OpenVINO is to compute on: `CPU`, unless `choose_device` or the environment says another one."""
    return os.environ.get(DEVICE_VARIABLE) or CPU


def choose_device(name: str) -> None:
    """Compute on a device from now on, in this process and those that it starts.

    Raises:
        UsageError: where OpenVINO finds no such device.
    """
    there = core().available_devices
    if name not in {*there, *(one.partition(".")[0] for one in there)}:  # `GPU` is the first of GPU.0 and GPU.1
        raise UsageError(
            f"OpenVINO finds no device {name} here, only {', '.join(there)}",
            hint=f"use --device {there[0]}" if there else "install the driver of that device",
        )
    os.environ[DEVICE_VARIABLE] = name


def full_name() -> str:
    """What the chosen device calls itself."""
    return str(core().get_property(device(), "FULL_DEVICE_NAME"))


def settings(threads: int) -> dict[str, str]:
    """What a model is compiled and opened with: a compiled model does not keep it.

    The types in the model decide what it computes in. OpenVINO can narrow a model of fp32 itself, but at Stable
    Diffusion 1.5's size that has an error of 0.040, where an ONNX in bf16 has 0.012, as PyTorch has (`docs/cpu.md`).

    One stream, as a pipeline runs one call after the other. Threads are not pinned to cores: PyTorch computes on the
    same ones between two runs, and other processes do, too. Devices other than the CPU have neither setting, and what
    they compute in is theirs to say: a build compares it with the ONNX.
    """
    if device() != CPU:
        return {"NUM_STREAMS": "1"}
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of OpenVINO's means too little memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def reason_of(error: BaseException) -> str:
    """What an exception of OpenVINO's says: its last line, as those before it are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def mend_of(error: BaseException, model: Path) -> str:
    """What to do about an exception of OpenVINO's over a file of an entry, whose content was proven before."""
    if any(text in str(error) for text in OUT_OF_LIMITS):
        return f"{RAISE_LIMITS}, or use fewer threads: OMP_NUM_THREADS=1"
    return f"use --backend torch; {verification_of(model.parent.parent)} says whether it is damaged"


def load_error(error: BaseException, model: Path) -> EngineError:
    """The error for a file that OpenVINO can't load."""
    if is_out_of_memory(error):
        return EngineError(f"too little memory to load {model}", hint="end other programs, or use --precision bf16")
    return EngineError(f"OpenVINO can't load {model}: {reason_of(error)}", hint=mend_of(error, model))

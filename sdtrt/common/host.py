"""Facts of this machine: processor, GPU, driver, library versions. Read on demand, never at import."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "pycuda",
    "numpy",
)
VECTOR_FLAGS = frozenset({"avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "amx_tile", "asimd", "sve"})
CUDA_SUCCESS = 0
MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*: stable driver ABI
MODE_ATTRIBUTE, SHARED_MODE = 20, 0  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, CU_COMPUTEMODE_DEFAULT


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: its name, compute capability as (9, 0), memory in bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name} (compute capability {major}.{minor}, {self.memory_bytes / 2**30:.0f} GiB)"


@cache  # a server asks for them with each picture, and each look takes a millisecond
def library_version(name: str) -> str | None:
    """The installed version of a distribution, None if it is not installed. Imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def library_versions() -> dict[str, str]:
    """The versions of the installed libraries that sdtrt uses."""
    return {name: version for name in LIBRARIES if (version := library_version(name)) is not None}


def processor() -> str:
    """The processor's name and how many of its cores this process may use."""
    return f"{processor_name()}, {cores()} cores"


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's own name where the system tells, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """The vector instructions that models are laid out for; a virtual machine's processor name does not tell them."""
    return (platform.machine(), *sorted(processor_flags() & VECTOR_FLAGS))


def processor_flags() -> frozenset[str]:
    """All that the processor says it can, in Linux's words; empty where the system does not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    """One field of the first processor, as Linux tells it; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(field)), "")
    except OSError:
        return ""


@lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver shows to this process; empty without a driver. Makes no CUDA context."""
    driver = _driver()
    if driver is None:
        return ()
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != CUDA_SUCCESS:
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def open_primary_context(index: int = 0) -> bool:
    """Initialise the driver and a GPU's primary context, which all libraries in a process share; False without a GPU.

    It takes the driver seconds where nothing else uses the GPU, and does not keep Python's lock. The context stays
    until the process ends, as PyTorch keeps it. A GPU that one process at a time may use is initialised, but gets no
    context: an engine may be built in another process first.
    """
    driver = _driver()
    device, mode, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), index) != CUDA_SUCCESS:
        return False
    driver.cuDeviceGetAttribute(ctypes.byref(mode), MODE_ATTRIBUTE, device)
    if mode.value != SHARED_MODE:
        return True
    return bool(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == CUDA_SUCCESS)


def has_primary_context(index: int = 0) -> bool:
    """Whether a GPU's primary context has been made in this process."""
    driver = _driver()
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), index) != CUDA_SUCCESS:
        return False
    status = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    return bool(status == CUDA_SUCCESS and active.value)


def free_gpu_bytes(index: int = 0) -> int | None:
    """The bytes that are free on a GPU; None where that isn't known, and where one process at a time may use it.

    Makes the GPU's primary context, as only with one does the driver tell (`open_primary_context`).
    """
    if not open_primary_context(index) or not has_primary_context(index) or (driver := _driver()) is None:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != CUDA_SUCCESS:
        return None
    if driver.cuCtxPushCurrent_v2(context) != CUDA_SUCCESS:
        return None
    status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    return free.value if status == CUDA_SUCCESS else None


@lru_cache(maxsize=1)
def driver_cuda_version() -> str | None:
    """The newest CUDA version that the driver supports, as `13.0`; None without a driver."""
    driver = _driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != CUDA_SUCCESS:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU with a working driver."""
    return bool(gpus())


def facts() -> dict[str, Any]:
    """Return all facts, as plain data for reports and sidecars."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": processor(),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "driver_cuda": driver_cuda_version(),
        "versions": library_versions(),
    }


def _driver() -> ctypes.CDLL | None:
    """The CUDA driver library, initialised; None where there is no driver or no GPU behind it."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver if driver.cuInit(0) == CUDA_SUCCESS else None
    return None


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    """Ask the driver for the facts of one device."""
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR_ATTRIBUTE, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR_ATTRIBUTE, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(), (major.value, minor.value), memory.value)


def torch_sees_gpu() -> bool:
    """Whether this PyTorch can use the GPU (its CPU build can't)."""
    import torch

    return torch.cuda.is_available()

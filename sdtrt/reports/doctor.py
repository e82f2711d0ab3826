"""What this machine can run, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdtrt.backends import registry
from sdtrt.common import host
from sdtrt.common.errors import SdtrtError, command_line
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.trust import mend_of
from sdtrt.models.resolve import TINY
from sdtrt.specs import GIB, QUANTISED, BackendName

VNNI = {"avx512_vnni", "amx_tile"}  # instructions for products of int8

State = Literal["ok", "optional", "missing"]

BASE = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxscript")  # what every installation has


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is there, what was seen, and the command that mends it."""

    name: str
    state: State
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and which backends can run here."""

    findings: tuple[Finding, ...]
    backends: tuple[BackendName, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing that every user needs."""
        return all(finding.state != "missing" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"healthy": self.healthy, "host": host.facts(), **asdict(self)}


def diagnose(directory: EngineDirectory) -> Diagnosis:
    """Look at this machine and at the engine directory; changes nothing."""
    backends = (*_backends(), _automatic(), _quantised(), _pycuda())
    findings = (*_libraries(), _bytecode(), _gpu(), *backends, _directory(directory), _tiny())
    return Diagnosis(findings, tuple(backend.name for backend in registry.running_here()))


def _libraries() -> Iterable[Finding]:
    """What the base installation brings."""
    for name in BASE:
        version = host.library_version(name)
        if version is None:
            yield Finding(name, "missing", "not installed", f"pip install {name}")
        else:
            yield Finding(name, "ok", version)


def _bytecode() -> Finding:
    """Whether Python has the large libraries compiled: else it compiles thousands of modules at each start."""
    folders = [
        Path(spec.origin).parent
        for name in ("torch", "diffusers", "transformers")
        if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None
    ]
    missing = [folder for folder in folders if not _is_compiled(folder)]
    if not missing:
        return Finding("bytecode", "ok", "libraries are compiled")
    names = ", ".join(folder.name for folder in missing)
    return Finding(
        "bytecode",
        "optional",
        f"{names}: no .pyc files, so every start compiles their sources, which takes longer than all else",
        f"python -m compileall -q {command_line(*map(str, missing))}",
    )


def _is_compiled(folder: Path) -> bool:
    """Whether most of a package's own modules have bytecode of this Python; packages within it are not looked at."""
    sources = list(folder.glob("*.py"))
    compiled = [path for path in sources if Path(importlib.util.cache_from_source(path)).is_file()]
    return 2 * len(compiled) > len(sources)


def _gpu() -> Finding:
    """The GPU and its driver, and whether PyTorch can use it."""
    gpus = host.gpus()
    if not gpus:
        return Finding(
            "GPU", "optional", "no NVIDIA GPU or driver: images are made on the CPU", "install NVIDIA's driver"
        )
    detail = f"{'; '.join(map(str, gpus))}; driver for CUDA {host.driver_cuda_version()}"
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "optional", f"{detail}; this PyTorch can't use it", "pip install --force-reinstall torch")
    return Finding("GPU", "ok", detail)


def _backends() -> Iterable[Finding]:
    """What builds engines beside the base installation: there or not, whole or not, and whether it serves this GPU."""
    for backend in registry.with_engines():
        if backend.name in BASE:
            continue
        try:
            version = backend.version()
        except SdtrtError as error:
            yield Finding(backend.name, "optional", error.message, error.hint)
            continue
        problem = backend.why_not() if host.gpus() or "cpu" in backend.devices else None
        if problem is None:
            yield Finding(backend.name, "ok", version)
        else:
            yield Finding(backend.name, "optional", f"{version}: {problem.message}", problem.hint)


def _automatic() -> Finding:
    """What `--backend auto` has built here, and why."""
    name, reason = registry.expected()
    return Finding("auto", "ok", f"{name} where no engines are there: {reason}")


def _quantised() -> Finding:
    """Which precisions of 8 bits engines can compute in here."""
    backend = registry.get("inductor")
    if problem := backend.why_not():
        return Finding("8 bits", "optional", f"no engines in {' or '.join(QUANTISED)}: {problem.message}", problem.hint)
    lacking = {}
    for precision in QUANTISED:
        try:
            backend.check_precision(precision)
        except SdtrtError as error:
            lacking[precision] = error
    words = [*(one for one in QUANTISED if one not in lacking), *(error.message for error in lacking.values())]
    if backend.device() == "cpu":
        fast = "int8" if VNNI & set(host.instruction_sets()) else "neither"
        words.append(f"of these the processor has instructions for {fast}; sdtrt build says what is gained")
    hint = next((error.hint for error in lacking.values()), "")
    return Finding("8 bits", "optional" if lacking else "ok", "; ".join(words), hint)


def _pycuda() -> Finding:
    """What the torch-free runner needs."""
    version = host.library_version("pycuda")
    if version is None:
        return Finding(
            "pycuda", "optional", "not installed (only the torch-free runner needs it)", "pip install 'sdtrt[pycuda]'"
        )
    return Finding("pycuda", "ok", version)


def _directory(directory: EngineDirectory) -> Finding:
    """Whether the engine directory can be written, how much it holds and how much room is left."""
    nearest = next(path for path in (directory.path, *directory.path.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        return Finding("engine directory", "missing", f"{directory.path} can't be written", "use --engine-dir FOLDER")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Finding("engine directory", "missing", f"{directory.path}: {error.strerror}", "use --engine-dir FOLDER")
    try:
        entries, unsafe = directory.all_entries(), directory.unsafe()
    except SdtrtError as error:
        return Finding("engine directory", "missing", error.message, error.hint)
    held = sum(entry.size_bytes for entry in entries) / GIB
    free = shutil.disk_usage(nearest).free / GIB
    detail = f"{directory.path}: {len(entries)} entries, {held:.2f} GiB; {free:.0f} GiB free"
    if unsafe:
        others = f"; {len(unsafe)} more that other users can change are passed over"
        return Finding("engine directory", "optional", detail + others, f"{mend_of(unsafe)}, if nobody has")
    return Finding("engine directory", "ok", detail)


def _tiny() -> Finding:
    """The built-in miniature."""
    if (TINY / "model_index.json").is_file():
        return Finding("tiny", "ok", "the built-in miniature model is there")
    return Finding("tiny", "missing", f"{TINY} is incomplete", "pip install --force-reinstall sdtrt")

"""ONNX → engine: one function, one module for each backend that has engines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt.backends.tensorrt86.policy import pieces_key
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import BuildError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.engines.keys import export_key
from sdtrt.models.resolve import Model
from sdtrt.specs import Backend, BuildSpec

# Of builds: raise a backend's when the same request makes another engine than before (TensorRT 7: of a VAE on 8.6;
# ONNX Runtime 8: attentions fused).
FORMATS: Mapping[Backend, int] = {"tensorrt": 7, "tensorrt-rtx": 7, "onnxruntime": 8}


def backend_version(backend: Backend) -> str:
    """The installed version of a backend. Raises `BuildError` where it is not installed."""
    if backend == "onnxruntime":
        version = host.library_version("onnxruntime")
        if version is None:
            raise BuildError("ONNX Runtime is not installed", hint="pip install onnxruntime")
        return version
    from sdtrt.backends.tensorrt.versions import libraries

    return libraries.version(backend)


def host_key(backend: Backend, compute_capability: tuple[int, int] | None = None) -> dict[str, Any]:
    """What an engine is bound to on this machine: the GPU; for ONNX Runtime the processor, which decides its layouts.

    Args:
        backend: that runs the engine.
        compute_capability: the GPU that is built for ahead of time, if it is not this machine's.

    Raises:
        BuildError: for TensorRT without a `compute_capability`, where there is no NVIDIA GPU.
    """
    if backend == "onnxruntime":
        return {"processor": host.processor_name(), "instructions": list(host.instruction_sets())}
    if compute_capability is not None:
        return {"compute_capability": list(compute_capability)}
    gpus = host.gpus()
    if not gpus:
        raise BuildError(
            f"{backend} needs an NVIDIA GPU, and the driver shows none",
            hint="check nvidia-smi; without a GPU use --backend onnxruntime",
        )
    capability = {"compute_capability": list(gpus[0].compute_capability)}
    # TensorRT for RTX finishes its kernels at run time: an engine serves every GPU of its compute capability.
    return capability if backend == "tensorrt-rtx" else {"gpu": gpus[0].name, **capability}


def engine_key(model: Model, spec: BuildSpec, directory: EngineDirectory) -> dict[str, Any]:
    """The key of the engine of the weights that a model has now."""
    return key_of(spec, export_key(model, spec.export, directory))


def key_of(spec: BuildSpec, export: Mapping[str, Any]) -> dict[str, Any]:
    """The key of an engine: all that its bytes depend on. The key of its export stands for the weights."""
    return {
        "format": FORMATS[spec.backend],
        "component": spec.export.component,
        "precision": spec.export.precision,
        "backend": spec.backend,
        "backend_version": backend_version(spec.backend),
        "host": host_key(spec.backend, spec.compute_capability),
        "profiles": [asdict(profile) for profile in spec.profiles],
        "options": {
            "optimization_level": spec.optimization_level,
            "workspace_bytes": spec.workspace_bytes,
            "version_compatible": spec.version_compatible,
            "norm_plugins": spec.norm_plugins,
            **pieces_key(spec),
            **({"channels_last": True} if spec.channels_last else {}),
        },
        "export": dict(export),
    }


def build_engine(model: Model, spec: BuildSpec, directory: EngineDirectory, console: Console = QUIET) -> Entry:
    """Find or build an engine; exports the component first if that is missing.

    Its key has that of the export that it is built from: by then the model may have other weights.

    Returns:
        The entry of kind `engine`. Its `info` has the contract, the model's name, and what the build measured.

    Raises:
        BuildError: where the engine can't be built, or is not right; nothing is left of it then.
    """
    key = engine_key(model, spec, directory)
    if not spec.force and (entry := directory.find("engine", key)) is not None:
        return entry
    from sdtrt.exports.component import export_component

    onnx = export_component(model, spec.export, directory, console)
    make = partial(_make, model, spec, directory, console, onnx)
    with onnx.hold():
        return directory.obtain("engine", key_of(spec, onnx.key), make, console, force=spec.force)


def _make(
    model: Model, spec: BuildSpec, directory: EngineDirectory, console: Console, onnx: Entry, folder: Path
) -> dict[str, Any]:
    """Fill an entry's folder from a held export, and return what is known of the engine."""
    start = time.perf_counter()
    measured = _build(onnx, spec, directory, console, folder)
    return {
        "contract": onnx.info["contract"],
        "model": model.spec.name,
        "onnx": onnx.name,
        "seconds": round(time.perf_counter() - start, 3),
        **measured,
    }


def _build(
    onnx: Entry, spec: BuildSpec, directory: EngineDirectory, console: Console, folder: Path
) -> Mapping[str, Any]:
    """Let the backend build."""
    contract = stored_contract(onnx)
    source = onnx.verified("model.onnx")
    if spec.backend == "onnxruntime":
        from sdtrt.backends.onnxruntime.build import optimize

        return optimize(source, folder, contract, console)
    from sdtrt.backends.tensorrt86.build import build_plan

    gpu = host_key(spec.backend, spec.compute_capability)
    words = (spec.backend, backend_version(spec.backend), gpu.get("gpu", "sm"), *gpu["compute_capability"])
    cache = directory.timing_cache("-".join(str(word) for word in words))
    return build_plan(source, folder, contract, spec, timing_cache=cache, console=console)

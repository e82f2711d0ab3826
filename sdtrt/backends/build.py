"""Engines: their keys, and how one is found or built. What a backend does itself lies in its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt.backends import registry
from sdtrt.backends.backend import BuildJob
from sdtrt.common.console import QUIET, Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.engines.keys import Sight, source_key, steadily
from sdtrt.models.components import contract_of, part_of
from sdtrt.models.resolve import Model
from sdtrt.specs import BuildSpec


def engine_key(model: Model, spec: BuildSpec, directory: EngineDirectory) -> dict[str, Any]:
    """The key of the engine of the weights that a model has now. Raises `UsageError` for what can't be built."""
    inside = registry.get(spec.backend).weights_inside
    return key_of(spec, source_key(model, spec.export, directory, weights=inside))


def key_of(spec: BuildSpec, export: Mapping[str, Any]) -> dict[str, Any]:
    """The key of an engine: all that its bytes depend on. The key of its export stands for the weights.

    Raises:
        UsageError: for what the backend can't build.
    """
    backend = registry.get(spec.backend)
    backend.check(spec)
    return {
        "format": backend.format,
        "component": spec.export.component,
        "precision": spec.export.precision,
        "backend": backend.name,
        "backend_version": backend.version(),
        "host": backend.host_key(spec.compute_capability),
        "profiles": [asdict(profile) for profile in spec.profiles],
        "options": backend.options_key(spec),
        "export": dict(export),
    }


def build_engine(model: Model, spec: BuildSpec, directory: EngineDirectory, console: Console = QUIET) -> Entry:
    """Find or build an engine; exports the component first if that is missing.

    Its key has that of the export that it is built from: by then the model may have other weights.

    Returns:
        The entry of kind `engine`. Its `info` has the contract, the model's name, and what the build measured.

    Raises:
        UsageError: for what the backend can't build.
        BuildError: where the engine can't be built, or is not right; nothing is left of it then.
    """
    key = engine_key(model, spec, directory)
    if not spec.force and (entry := directory.find("engine", key)) is not None:
        return entry
    if registry.get(spec.backend).source == "program":
        return steadily(partial(_build_of_model, model, spec, directory, console), console)
    from sdtrt.exports.component import export_component

    onnx = export_component(model, spec.export, directory, console)
    make = partial(_make, model, spec, directory, console, onnx)
    with onnx.hold():
        return directory.obtain("engine", key_of(spec, onnx.key), make, console, force=spec.force)


def _build_of_model(model: Model, spec: BuildSpec, directory: EngineDirectory, console: Console) -> Entry:
    """Build an engine from the model itself. Raises `ModelChangedError` where its files were replaced meanwhile."""
    export = spec.export
    sight = Sight(model, (part_of(export.component),))

    def make(folder: Path) -> dict[str, Any]:
        start = time.perf_counter()
        contract = contract_of(model, export.component, export.precision)
        with sight.steady():
            measured = registry.get(spec.backend).build(BuildJob(None, folder, contract, spec, directory, console))
        facts = {"contract": contract.to_json(), "model": model.spec.name}
        return {**facts, "seconds": round(time.perf_counter() - start, 3), **measured}

    return directory.obtain("engine", engine_key(model, spec, directory), make, console, force=spec.force)


def _make(
    model: Model, spec: BuildSpec, directory: EngineDirectory, console: Console, onnx: Entry, folder: Path
) -> dict[str, Any]:
    """Fill an entry's folder from a held export, and return what is known of the engine."""
    start = time.perf_counter()
    contract, source = stored_contract(onnx), onnx.verified("model.onnx")
    job = BuildJob(source, folder, contract, spec, directory, console)
    measured = registry.get(spec.backend).build(job)
    return {
        "contract": onnx.info["contract"],
        "model": model.spec.name,
        "onnx": onnx.name,
        "seconds": round(time.perf_counter() - start, 3),
        **measured,
    }

"""Engines: their keys, and how one is found or built. What a backend does itself lies in its folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt.backends import registry
from sdtrt.backends.backend import Backend, BuildJob
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.engines.find import names_of
from sdtrt.engines.keys import EngineKey, ExportKey, Sight, source_key, steadily
from sdtrt.models.architecture import Blueprint
from sdtrt.models.components import contract_of, part_of, profiles_of, unet_batch
from sdtrt.models.live import LiveModel
from sdtrt.models.resolve import resolve_model
from sdtrt.models.source import ModelSource
from sdtrt.specs import (
    QUANTISED,
    WHOLE,
    BuildRequest,
    BuildSpec,
    ExportRequest,
    ExportSpec,
    Profile,
    ProfileRequest,
    Range,
    Sizes,
)


def engine_key(model: ModelSource, spec: BuildSpec, directory: EngineDirectory) -> EngineKey:
    """The key of the engine of the weights that a model has now. Raises `UsageError` for what can't be built."""
    inside = registry.get(spec.backend).weights_inside
    return key_of(spec, source_key(model, spec.export, directory.file_digest, weights=inside))


def key_of(spec: BuildSpec, export: ExportKey) -> EngineKey:
    """The key of an engine: all that its bytes depend on. The key of its export stands for the weights.

    Raises:
        UsageError: for what the backend can't build.
    """
    backend = registry.get(spec.backend)
    backend.check(spec)
    return EngineKey(
        format=backend.format,
        component=spec.export.component,
        precision=spec.export.precision,
        backend=backend.name,
        backend_version=backend.version(),
        host=backend.host_key(spec.compute_capability),
        profiles=spec.profiles,
        options=backend.options_key(spec),
        export=export,
    )


def build_engine(model: ModelSource, spec: BuildSpec, directory: EngineDirectory, console: Console = QUIET) -> Entry:
    """Find or build an engine; exports the component first if that is missing.

    Its key has that of the export that it is built from: by then the model may have other weights.

    Returns:
        The entry of kind `engine`. Its `info` has the contract, the model's name, and what the build measured.

    Raises:
        UsageError: for what the backend can't build.
        BuildError: where the engine can't be built, or is not right; nothing is left of it then.
    """
    key = engine_key(model, spec, directory).to_json()
    if not spec.force and (entry := directory.find("engine", key)) is not None:
        _say_gain(model, spec, entry, directory, console)
        return entry
    if registry.get(spec.backend).source == "program":
        entry = steadily(partial(_build_of_model, model, spec, directory, console), console)
        _say_gain(model, spec, entry, directory, console)
        return entry
    from sdtrt.exports.component import export_component

    onnx = export_component(model, spec.export, directory, console)
    make = partial(_make, model, spec, directory, console, onnx)
    with onnx.hold():
        key = key_of(spec, ExportKey.from_json(onnx.key)).to_json()
        return directory.obtain("engine", key, make, console, force=spec.force)


def _build_of_model(model: ModelSource, spec: BuildSpec, directory: EngineDirectory, console: Console) -> Entry:
    """Build an engine from the model itself. Raises `ModelChangedError` where its files were replaced meanwhile."""
    export = spec.export
    sight = Sight(model, (part_of(export.component),))

    def make(folder: Path) -> dict[str, Any]:
        start = time.perf_counter()
        contract = contract_of(model, export.component, export.precision, export.groups)
        blueprint = Blueprint.of(model, part_of(export.component)) if isinstance(model, LiveModel) else None
        job = BuildJob(None, folder, contract, spec, directory, console, blueprint)
        with sight.steady():
            measured = registry.get(spec.backend).build(job)
        facts = {"contract": contract.to_json(), **names_of(model.spec)}
        return {**facts, "seconds": round(time.perf_counter() - start, 3), **measured}

    return directory.obtain("engine", engine_key(model, spec, directory).to_json(), make, console, force=spec.force)


def _say_gain(model: ModelSource, spec: BuildSpec, entry: Entry, directory: EngineDirectory, console: Console) -> None:
    """Say of a quantised engine how its step compares with that of other precisions, and warn where it is slower.

    Those are the engines that are there of the same request; where none is, PyTorch's own step as the build timed it.
    """
    step = entry.info.get("step_ms")
    if spec.export.precision not in QUANTISED or not isinstance(step, float | int):
        return
    others = _steps_in_others(model, spec, entry, directory)
    if not others:
        own = entry.info.get("torch_step_ms")
        others = {"PyTorch's own bf16, not compiled": own} if isinstance(own, float | int) else {}
    if not others:
        return
    error = max((float(one["relative_l2"]) for one in entry.info.get("parity", ())), default=math.nan)
    texts = ", ".join(f"{name} {ms:.2f}" for name, ms in others.items())
    words = f"{entry.name}: {step:.2f} ms a step ({texts}), relative error {error:.2e} against fp32"
    name, best = min(others.items(), key=lambda one: one[1])
    if step >= best:
        console.warn(f"{words}: {spec.export.precision} is slower here than {name}, which is to be preferred")
    else:
        console.note(f"{words}: {best / step:.2f} times as fast as {name}")


def _steps_in_others(model: ModelSource, spec: BuildSpec, entry: Entry, directory: EngineDirectory) -> dict[str, float]:
    """The times of a step, in ms, of engines of the same request in the precisions that are not quantised."""
    found = {}
    for precision in WHOLE:
        other = replace(spec, export=replace(spec.export, precision=precision))
        key = engine_key(model, other, directory).to_json()
        if (there := directory.find("engine", key)) is not None and there.step_sizes == entry.step_sizes:
            found[precision] = there.info.get("step_ms")
    return {name: float(ms) for name, ms in found.items() if isinstance(ms, float | int)}


def _make(
    model: ModelSource, spec: BuildSpec, directory: EngineDirectory, console: Console, onnx: Entry, folder: Path
) -> dict[str, Any]:
    """Fill an entry's folder from a held export, and return what is known of the engine."""
    start = time.perf_counter()
    contract, source = stored_contract(onnx), onnx.verified("model.onnx")
    job = BuildJob(source, folder, contract, spec, directory, console)
    measured = registry.get(spec.backend).build(job)
    return {
        "contract": onnx.info["contract"],
        **names_of(model.spec),
        "onnx": onnx.name,
        **{name: onnx.info[name] for name in ("weights_digest",) if name in onnx.info},
        "seconds": round(time.perf_counter() - start, 3),
        **measured,
    }


def build_each(request: BuildRequest, directory: EngineDirectory, console: Console = QUIET) -> list[Entry]:
    """Find or build the engines of a request for each backend that runs here, and show how fast they are, on stderr.

    Raises:
        EngineError: where no backend with engines runs here.
        UsageError, BuildError: as of `build_all`.
    """
    entries = []
    for backend in registry.running_here():
        if backend.source is None:
            continue
        try:
            backend.check_precision(request.precision or backend.default_precision())
        except UsageError as error:
            console.note(f"not for {backend.name}: {error.message}")
            continue
        common = replace(request.common, backend=backend.name)
        entries += build_all(replace(request, common=common), directory, console)
    if not entries:
        raise EngineError("no backend here builds such engines", hint="run: sdtrt doctor")
    console.table(("component", "backend", "step, ms", "at", "built in, s"), map(_row, sorted(entries, key=_by_speed)))
    return entries


def _by_speed(entry: Entry) -> tuple[str, float]:
    """Components one after the other, the fastest engine of each first."""
    return entry.engine_key.component, float(entry.info.get("step_ms", math.inf))


def _row(entry: Entry) -> tuple[str, ...]:
    """What a comparison says of an engine; one of an sdtrt before this has no time of a step."""
    key, step, seconds = entry.engine_key, entry.info.get("step_ms"), entry.info.get("seconds")
    measured = (f"{step:.2f}", entry.step_sizes) if step is not None else ("", "")
    return key.component, key.backend, *measured, "" if seconds is None else f"{seconds:.0f}"


def build_all(request: BuildRequest, directory: EngineDirectory, console: Console = QUIET) -> list[Entry]:
    """Find or build the engines of a request, exporting first what is missing.

    Raises:
        UsageError: for what the backend can't build, and for an option that serves none of the components.
        BuildError: as of `build_engine`.
    """
    from sdtrt.exports.request import export_specs

    backend = registry.get(registry.choose_backend(request.common.backend, console))
    _check_early(request, backend)
    if backend.takes_any_size and (given := request.sizes.given()):
        console.note(f"{given}: without effect, as {backend.title} engines take any size")
    model = resolve_model(request.common.export.model, console)
    rows = unet_batch(1, guidance=True, editing=model.is_editing)
    sizes = request.sizes
    if model.is_editing and sizes.batch == ProfileRequest().batch:  # two rows would serve no image with guidance
        sizes = replace(sizes, batch=Range.of(rows))
    profiles = () if backend.takes_any_size else sizes.profiles(Sizes(rows, *model.default_size()))
    precision = request.precision or backend.default_precision()
    common = replace(request.common.export, precision=precision)
    exports = ExportRequest(common, request.components, request.caching)
    fitting = list(export_specs(model, exports, console, backend.precision_of))
    specs = engine_specs(request.common, fitting, backend, profiles, rows)
    return [build_engine(model, spec, directory, console) for spec in specs]


def _check_early(request: BuildRequest, backend: Backend) -> None:
    """Refuse what a backend builds of no model, before one is looked for; pieces are for some components alone."""
    common, precision = request.common, request.precision or backend.default_precision()
    profiles = () if backend.takes_any_size else request.sizes.profiles(Sizes(2, 512, 512))  # any size of a model
    export = replace(common.export, component="unet", precision=precision)
    whole = replace(common, backend=backend.name, profiles=profiles, split_attention=None, channels_last=False)
    backend.check(replace(whole, export=export))


def engine_specs(
    common: BuildSpec, exports: Sequence[ExportSpec], backend: Backend, profiles: Sequence[Profile], rows: int = 2
) -> list[BuildSpec]:
    """The engines of some components.

    Args:
        common: what is asked of each of them.
        exports: what they are made from.
        backend: what runs them.
        profiles: of the UNet; the other components' follow from them.
        rows: of the UNet an image.

    Raises:
        UsageError: for an option that serves none of the components, and for what the backend can't build.
    """
    if common.split_attention and not any(export.component == "unet" for export in exports):
        raise UsageError(
            "only the UNet leaves attention to PyTorch", hint="add --component unet, or leave --split-attention out"
        )
    if common.channels_last and not any(backend.serves("channels-last", export) for export in exports):
        raise UsageError(
            "only TensorRT's engines of UNets and VAEs in fp16 are in pieces, which can be channels-last",
            hint="use --backend tensorrt --component unet --precision fp16, or leave --channels-last out",
        )
    specs = [_engine_spec(common, export, backend, profiles, rows) for export in exports]
    for spec in specs:
        backend.check(spec)  # of all, before the first is built
    return specs


def _engine_spec(
    common: BuildSpec, export: ExportSpec, backend: Backend, profiles: Sequence[Profile], rows: int
) -> BuildSpec:
    """The engine of one component: of the options for some components only, those that serve it."""
    splits = export.component == "unet" or common.split_attention == 0  # 0 leaves nothing of any part to PyTorch
    return replace(
        common,
        export=export,
        backend=backend.name,
        profiles=profiles_of(export.component, profiles, rows),
        split_attention=common.split_attention if splits else None,
        channels_last=common.channels_last and backend.serves("channels-last", export),
    )

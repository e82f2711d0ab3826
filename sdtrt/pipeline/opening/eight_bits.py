"""Whether a preset takes engines in 8 bits: where they are all there, and builds have measured them to be faster.

Knows entries and how long a run of each took when it was built. Opens and builds none.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from sdtrt.backends import registry
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import SdtrtError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.specs import QUANTISED, GenerateSpec
from sdtrt.specs.deep_features import SHALLOW
from sdtrt.specs.presets import PRESETS

Steps = tuple[tuple[str, ...], float]  # the sizes that steps were measured at, and how long they take, in ms


def in_measured_precision(
    asked: GenerateSpec, spec: PipelineSpec, directory: EngineDirectory, console: Console
) -> PipelineSpec:
    """A settled request, in 8 bits where its preset may take them and they gain; says so.

    A precision that is asked for wins. Nothing is built in 8 bits for a preset.
    """
    if asked.quality is None or not PRESETS[asked.quality].eight_bits or asked.precision is not None:
        return spec
    if not _has_some(spec, directory):
        return spec
    own = _measured(spec, directory)
    found = {one: steps for one in QUANTISED if (steps := _measured(replace(spec, precision=one), directory))}
    faster = {one: ms for one, (sizes, ms) in found.items() if own is not None and sizes == own[0] and ms < own[1]}
    if own is None or not faster:
        reason = f"no engine in {spec.precision} was measured beside them" if own is None else "none was faster"
        console.note(f"quality {asked.quality}: {spec.precision}; there are engines in 8 bits, but {reason}")
        return spec
    best = min(faster, key=lambda one: faster[one])
    words = f"{faster[best]:.2f} ms a step, and {own[1]:.2f} in {spec.precision}"
    console.note(f"quality {asked.quality}: {best}, as builds have measured {words}")
    return replace(spec, precision=best)


def _has_some(spec: PipelineSpec, directory: EngineDirectory) -> bool:
    """Whether there is any engine of the backend in 8 bits: whose weights those are may take seconds to tell."""
    keys = (entry.key for entry in directory.entries("engine"))
    return any(key.get("backend") == spec.backend and key.get("precision") in QUANTISED for key in keys)


def _measured(spec: PipelineSpec, directory: EngineDirectory) -> Steps | None:
    """How long the UNet takes for a step of a run, in the mean; None where an engine is missing, or was not timed.

    With deep caching one step in so many is whole. Steps without guidance are taken to be as much faster.
    """
    with suppress(SdtrtError):  # it is told where the engines are needed
        registry.get(spec.backend).check_precision(spec.precision)
        entries = ensure_all(spec, directory, QUIET, allow_build=False)
        every = spec.savings.caching.interval
        shares = {"unet": 1 / every, "unet" + SHALLOW: (every - 1) / every}
        timed = [(entries[name], share) for name, share in shares.items() if name in entries]
        times = [(_step_ms(entry), share) for entry, share in timed]
        if timed and all(ms is not None for ms, _ in times):
            total = sum(ms * share for ms, share in times if ms is not None)
            return tuple(entry.step_sizes for entry, _ in timed), total
    return None


def _step_ms(entry: Entry) -> float | None:
    """How long a run of an engine took when it was built."""
    found = entry.info.get("step_ms")
    return float(found) if isinstance(found, float | int) else None

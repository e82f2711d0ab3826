"""Which backend `auto` means: the fastest of those that have all engines of a request, else what should be fastest.

Knows entries and how long a run of each took when it was built. Opens and builds none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from sdtrt.backends import registry
from sdtrt.common.console import Console
from sdtrt.common.errors import SdtrtError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models.resolve import Model
from sdtrt.pipeline.inputs.images import InitImage
from sdtrt.pipeline.opening.eight_bits import in_measured_precision
from sdtrt.pipeline.opening.engines import find_engines
from sdtrt.pipeline.opening.request import (
    EngineRequest,
    PipelineSpec,
    accepted,
    check_spec,
    resolve_request,
    settle_request,
)
from sdtrt.specs import AUTO, BackendName, Component, GenerateSpec

Found = Mapping[Component, Entry]


RequestOf = Callable[[BackendName], EngineRequest]  # the engines that a backend would need


def resolve_fastest(
    spec: GenerateSpec,
    model: Model,
    directory: EngineDirectory,
    console: Console,
    init: InitImage | None = None,
    maps: Sequence[InitImage] = (),
) -> PipelineSpec:
    """How a request runs (`resolve_request`). For `auto`: in the fastest engines that are there, which it says; where
    none are, in those of the backend that is expected to be the fastest, and why. A preset may take engines in 8 bits.

    Raises:
        EngineError, ModelError, UsageError: for what can't run.
    """
    found = _resolved(spec, model, directory, console, init, maps)
    return in_measured_precision(spec, found, directory, console)


def _resolved(
    spec: GenerateSpec,
    model: Model,
    directory: EngineDirectory,
    console: Console,
    init: InitImage | None,
    maps: Sequence[InitImage],
) -> PipelineSpec:
    """`resolve_fastest`, in the precision that is asked for, or is usual."""
    if spec.backend != AUTO:
        return resolve_request(spec, model, console, init, maps)
    usual, why = registry.expected(console)
    settled = settle_request(spec, model, console, init, maps, backend=usual)

    def on(name: BackendName) -> PipelineSpec:
        precision = spec.precision or registry.get(name).default_precision()
        found = replace(settled, backend=name, precision=precision)
        registry.check_request(name, precision)
        check_spec(found)
        return found

    name, reason = faster(usual, lambda name: on(name).engines, directory)
    console.note(f"backend: {name} ({reason or why})")
    return accepted(settled if name == usual else on(name), console)


def faster(usual: BackendName, request_of: RequestOf, directory: EngineDirectory) -> tuple[BackendName, str]:
    """The backend that `auto` takes where engines are there, and why; the reason is empty where there is no choice.

    Args:
        usual: what it takes where none are.
        request_of: raises an `SdtrtError` for a backend that can't serve.
    """
    ready = _ready(usual, request_of, directory)
    if not ready or (len(ready) == 1 and usual in ready):
        return usual, ""
    return fastest_of(usual, ready)


def _ready(usual: BackendName, request_of: RequestOf, directory: EngineDirectory) -> dict[BackendName, Found]:
    """The backends that have an engine for each component of a request; none where there is no choice.

    Weights are looked at only where there is one: their fingerprint may take seconds.
    """
    there = {str(entry.key.get("backend")) for entry in directory.entries("engine")}
    named = [one.name for one in registry.rivals(usual, there)] if there - {usual} else []
    ready: dict[BackendName, Found] = {}
    for name in named if set(named) - {usual} else ():
        with suppress(SdtrtError):  # it is told where the engine is needed
            found = find_engines(request_of(name), directory)
            whole = {component: entry for component, entry in found.items() if entry is not None}
            ready |= {name: whole} if whole and len(whole) == len(found) else {}
    return ready


def fastest_of(usual: BackendName, ready: Mapping[BackendName, Found]) -> tuple[BackendName, str]:
    """Of backends that have all engines the one whose step is the fastest, and why it is taken.

    Where steps can't be compared, as they were measured at several sizes or not at all, the usual one stays.
    """
    first = usual if usual in ready else next(iter(ready))
    if len(ready) == 1:
        return first, "its engines are there"
    decisive = _decisive(ready[first])
    steps = {name: _steps(found, decisive) for name, found in ready.items()}
    sizes = {name: [size for size, _ in own] for name, own in steps.items()}
    times = {name: sum(ms for _, ms in own) for name, own in steps.items() if own and sizes[name] == sizes[first]}
    if len(times) < 2:
        return first, f"engines of {' and '.join(ready)} are there, whose steps were not measured at one size"
    best = min(times, key=lambda name: times[name])
    others = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items() if name != best)
    return best, f"{' and '.join(decisive)}: {times[best]:.2f} ms a step, {others}"


def _decisive(found: Found) -> tuple[Component, ...]:
    """The components whose time decides: the UNet, which runs at each step; all others where it is not among them."""
    return ("unet",) if "unet" in found else tuple(sorted(found))


def _steps(found: Found, components: tuple[Component, ...]) -> list[tuple[str, float]]:
    """Of each component the size at which its step was measured, and the time; empty where one was not."""
    steps = [(found[name].step_sizes, found[name].info.get("step_ms")) for name in components]
    measured = [(sizes, float(ms)) for sizes, ms in steps if isinstance(ms, float | int)]
    return measured if len(measured) == len(steps) else []

"""Which engine of the directory serves a request: the tightest that fits, of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdtrt.common.errors import SdtrtError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import MALFORMED, Entry
from sdtrt.engines.keys import source_key
from sdtrt.models.components import precision_of
from sdtrt.models.resolve import Model
from sdtrt.specs import Component, ExportSpec, Precision, Profile, Sizes


def find_engine(
    model: Model,
    runs: Callable[[Mapping[str, Any]], bool],
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component = "unet",
    weights: bool = True,
) -> Entry | None:
    """The engine that fits a request on this machine: of the tightest profiles the newest; None if there is none.

    Args:
        runs: says of an engine's key whether this machine runs it, in the backend that is wanted.
        precision: that is asked for; the component may need another one (`precision_of`).
        sizes: of the component's own call (`sizes_of`).
        weights: whether the backend's engines hold them; others serve any weights of the architecture.
    """
    return best_fit(model, runs, precision, sizes, directory, component, directory.entries("engine"), weights)


def best_fit(
    model: Model,
    runs: Callable[[Mapping[str, Any]], bool],
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component,
    entries: Sequence[Entry],
    weights: bool = True,
) -> Entry | None:
    """Of these engines the one that `find_engine` takes."""
    precision = precision_of(model, component, precision)
    wanted = {"component": component, "precision": precision}
    export = source_key(model, ExportSpec(model.spec, component, precision), directory, weights=weights)
    fitting = [
        (looseness, -entry.created, entry)
        for entry in entries
        if all(entry.key.get(name) == value for name, value in wanted.items())
        and runs(entry.key)
        and (looseness := _fit(entry.key, export, sizes)) is not None
    ]
    if not fitting:
        return None
    best = min(fitting, key=lambda fit: fit[:2])[2]
    directory.touch(best)
    return best


def _fit(key: Mapping[str, Any], export: Mapping[str, Any], sizes: Sizes) -> float | None:
    """How loosely an engine of the right kind fits; None for other weights, or a malformed key."""
    try:
        return slack(key, sizes) if _same_weights(key["export"], export) else None
    except (SdtrtError, *MALFORMED):
        return None


def slack(key: Mapping[str, Any], sizes: Sizes) -> float | None:
    """How loosely an engine's profiles fit a size: 0 for exactly, None for not at all."""
    profiles = [Profile.from_json(data) for data in key["profiles"]]
    if not profiles:
        return 0.0
    fitting = [profile for profile in profiles if sizes in profile]
    return min((_looseness(profile, sizes) for profile in fitting), default=None)


def _looseness(profile: Profile, sizes: Sizes) -> float:
    """Distance of a size from what a profile is tuned for, then the profile's width."""
    pairs = (
        (profile.batch, sizes.batch),
        (profile.height, sizes.height),
        (profile.width, sizes.width),
        (profile.tokens, sizes.tokens),
    )
    return sum(abs(bounds.opt - value) / value + (bounds.max - bounds.min) / bounds.max for bounds, value in pairs)


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two export keys are of the same weights: exporter and opset may differ, a user's choice at build time."""
    free = {"exporter", "opset"}
    return {k: v for k, v in one.items() if k not in free} == {k: v for k, v in other.items() if k not in free}

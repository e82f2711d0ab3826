"""Which engine of the directory serves a request: the tightest that fits, of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from sdtrt.common.errors import SdtrtError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import MALFORMED, Entry
from sdtrt.engines.keys import Sight, export_key
from sdtrt.models.components import load_component, part_of, precision_of
from sdtrt.models.live import LiveModel, dtype_of, weights_digest
from sdtrt.models.source import ModelSource
from sdtrt.specs import Component, ExportSpec, Precision, Profile, Sizes


def find_engine(
    model: ModelSource,
    runs: Callable[[Mapping[str, Any]], bool],
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component = "unet",
) -> Entry | None:
    """The engine that fits a request on this machine: of the tightest profiles the newest; None if there is none.

    Args:
        runs: says of an engine's key whether this machine runs it, in the backend that is wanted.
        precision: that is asked for; the component may need another one (`precision_of`).
        sizes: of the component's own call (`sizes_of`).
    """
    return best_fit(model, runs, precision, sizes, directory, component, directory.entries("engine"))


def best_fit(
    model: ModelSource,
    runs: Callable[[Mapping[str, Any]], bool],
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component,
    entries: Sequence[Entry],
) -> Entry | None:
    """Of these engines the one that `find_engine` takes."""
    precision = precision_of(model, component, precision)
    wanted = {"component": component, "precision": precision}
    has_weights = _same_weights_as(model, component, precision, directory)
    fitting = [
        (looseness, -entry.created, entry)
        for entry in entries
        if all(entry.key.get(name) == value for name, value in wanted.items())
        and runs(entry.key)
        and (looseness := _fit(entry, has_weights, sizes)) is not None
    ]
    if not fitting:
        return None
    best = min(fitting, key=lambda fit: fit[:2])[2]
    directory.touch(best)
    return best


def _fit(entry: Entry, has_weights: Callable[[Entry], bool], sizes: Sizes) -> float | None:
    """How loosely an engine of the right kind fits; None for other weights, or a malformed key."""
    try:
        return slack(entry.key, sizes) if has_weights(entry) else None
    except (SdtrtError, *MALFORMED):
        return None


def _same_weights_as(
    model: ModelSource, component: Component, precision: Precision, directory: EngineDirectory
) -> Callable[[Entry], bool]:
    """What says of an engine whether it is of a model's weights: by its key, or for a live model by their digest."""
    export = export_key(model, ExportSpec(model.spec, component, precision), directory)
    if not isinstance(model, LiveModel):
        return lambda entry: _same_weights(entry.key["export"], export)
    digest, older = model.digest(component, precision), cache(partial(_files_are, model, component, precision))

    def has_weights(entry: Entry) -> bool:
        if "weights_digest" in entry.info:
            same_format = entry.key["export"]["format"] == export["format"]
            return same_format and bool(entry.info["weights_digest"] == digest)
        stored = model.stored
        if stored is None:
            return False
        of_files = export_key(stored, ExportSpec(stored.spec, component, precision), directory)
        return _same_weights(entry.key["export"], of_files) and older()

    return has_weights


def _files_are(model: LiveModel, component: Component, precision: Precision) -> bool:
    """Whether the files that a live model came from hold what its modules hold now; reads them."""
    assert model.stored is not None
    with Sight(model.stored, (part_of(component),)).steady():
        module = load_component(model.stored, component, dtype_of(precision))
        return weights_digest(module, component, precision) == model.digest(component, precision)


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

"""Which engine of the directory serves a request: the tightest that fits, of its weights; which one probably will.

What this machine runs is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from sdtrt.engines import digests
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import EngineKey, Sight, export_key, program_key
from sdtrt.models.components import load_component, part_of
from sdtrt.models.live import LiveModel, dtype_of, weights_digest
from sdtrt.models.source import ModelSource
from sdtrt.specs import Component, ExportSpec, Group, ModelSpec, Precision, Profile, Sizes


def best_fit(
    model: ModelSource,
    runs: Callable[[EngineKey], bool],
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component,
    entries: Sequence[Entry],
    weights: bool = True,
    groups: tuple[Group, ...] = (),
) -> Entry | None:
    """Of some engines the one that fits a request on this machine: of the tightest profiles the newest; None for none.

    Args:
        runs: says of an engine's key whether this machine runs it, in the backend that is wanted.
        precision: of the component's engine, which may be another one than is asked for.
        sizes: of the component's own call (`sizes_of`).
        weights: whether the backend's engines hold them; others serve any weights of the architecture.
        groups: optional ones of inputs, which the engine has, and no others.
    """
    spec = ExportSpec(model.spec, component, precision, groups=groups)
    has_weights = _same_weights_as(model, spec, directory) if weights else _same_program_as(model, spec)
    fitting = [
        (looseness, -entry.created, entry)
        for entry in entries
        if isinstance(key := entry.parsed_key, EngineKey)
        and (key.component, key.precision) == (component, precision)
        and runs(key)
        and (looseness := slack(key.profiles, sizes)) is not None
        and has_weights(entry, key)
    ]
    if not fitting:
        return None
    return min(fitting, key=lambda fit: fit[:2])[2]


def _same_program_as(model: ModelSource, spec: ExportSpec) -> Callable[[Entry, EngineKey], bool]:
    """What says of an engine without weights whether it serves a model: by the architecture."""
    program = program_key(model, spec)
    return lambda _entry, key: key.export == program


def _same_weights_as(
    model: ModelSource, spec: ExportSpec, directory: EngineDirectory
) -> Callable[[Entry, EngineKey], bool]:
    """What says of an engine whether it is of a model's weights: by its key, or for a live model by their digest."""
    export, component, precision = export_key(model, spec, directory.file_digest), spec.component, spec.precision
    if not isinstance(model, LiveModel):
        return lambda _entry, key: key.export.has_weights_of(export)
    digest, older = model.digest(component, precision), cache(partial(_files_are, model, component, precision))

    def has_weights(entry: Entry, key: EngineKey) -> bool:
        if "weights_digest" in entry.info:
            same = (key.export.format, key.export.groups) == (export.format, export.groups)
            return same and bool(entry.info["weights_digest"] == digest)
        stored = model.stored
        if stored is None:
            return False
        of_files = export_key(stored, replace(spec, model=stored.spec), directory.file_digest)
        return key.export.has_weights_of(of_files) and older()

    return has_weights


def _files_are(model: LiveModel, component: Component, precision: Precision) -> bool:
    """Whether the files that a live model came from hold what its modules hold now; reads them."""
    assert model.stored is not None
    with Sight(model.stored, (part_of(component),)).steady():
        module = load_component(model.stored, component, dtype_of(precision))
        return weights_digest(module, component, precision) == model.digest(component, precision)


def slack(profiles: Sequence[Profile], sizes: Sizes) -> float | None:
    """How loosely an engine's profiles fit a size: 0 for exactly, None for not at all."""
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


def names_of(model: ModelSpec) -> dict[str, Any]:
    """What an engine's entry says of its model: the name that it was given, and the LoRAs that its weights have."""
    return {"model": model.name, **({"loras": [str(one) for one in model.loras]} if model.loras else {})}


def likely(directory: EngineDirectory, model: ModelSpec, backend: str) -> list[Path]:
    """The large files of the engines that a request for a model will run in all likelihood, the largest first.

    They are those used last, one for each component. Which ones fit is known only once heavy libraries are there.

    Args:
        model: by the names that were given when the engines were built.
        backend: the engines'; any for `auto`.
    """
    found = latest(directory, model, lambda entry: backend in ("auto", entry.key.get("backend")))
    files = [(size, entry.path / name) for entry in found.values() for name, size in entry.files.items()]
    return [path for size, path in sorted(files, reverse=True) if size >= digests.MEMO_BYTES]


def latest(directory: EngineDirectory, model: ModelSpec | None, fits: Callable[[Entry], bool]) -> dict[str, Entry]:
    """For each component the engine of a model (None: of any) that was used last, of those that fit."""
    found: dict[str, Entry] = {}
    for entry in sorted(directory.entries("engine"), key=lambda entry: entry.last_used):
        is_plain = not _export_of(entry).get("groups")  # no command runs others
        if is_plain and (model is None or _is_of(entry, names_of(model))) and fits(entry):
            found[str(entry.key.get("component"))] = entry
    return found


def _is_of(entry: Entry, names: Mapping[str, Any]) -> bool:
    """Whether an engine says to be of a model, and of the same LoRAs."""
    return all(entry.info.get(name) == names.get(name) for name in ("model", "loras"))


def _export_of(entry: Entry) -> Mapping[str, Any]:
    """What an engine's key says of its export, as far as it is in order."""
    export = entry.key.get("export")
    return export if isinstance(export, Mapping) else {}

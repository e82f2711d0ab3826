"""Making room in the engine directory: which entries go, and what their going frees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EntryInUseError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.specs import PruneSpec


@dataclass(frozen=True)
class Pruned:
    """What pruning has removed (or would), what that freed, and how many killed builds' leftovers went with it."""

    removed: tuple[str, ...]
    freed_bytes: int
    leftovers: int
    dry_run: bool


def prune(
    directory: EngineDirectory, spec: PruneSpec, is_foreign: Callable[[Entry], bool], console: Console = QUIET
) -> Pruned:
    """Remove the entries that `spec` names, and what killed builds left behind.

    What is in use, or was used or made anew since it was looked at, stays, with a word.

    Args:
        is_foreign: whether this machine can't run an engine.
    """
    seen = directory.stamps()
    leftovers = len(directory.abandoned()) if spec.dry_run else directory.sweep()
    chosen = {entry.path: entry.size_bytes for entry in directory.prunable(spec, is_foreign)}
    if spec.damaged:
        checked = (one for one in directory.check() if one.state == "damaged")
        chosen |= {directory.path / one.name: one.size_bytes for one in checked}
    removed = []
    for path in chosen:
        if directory.stamp_of(path) != seen.get(path):
            console.note(f"{path.name} was used or made anew meanwhile: it stays")
            continue
        try:
            (directory.require_free if spec.dry_run else directory.remove)(path)
        except EntryInUseError as error:
            console.note(f"{error.message}: it stays")
        else:
            removed.append(path)
    freed = sum(chosen[path] for path in removed)
    return Pruned(tuple(path.name for path in removed), freed, leftovers, spec.dry_run)

"""The commands of the engine directory: list, verify, rm, prune. Knows how they speak, not how entries are kept."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer import Argument, Option

from sdtrt.cli.groups import grouped
from sdtrt.cli.options import DirectoryOptions, OutputOptions
from sdtrt.cli.render import render
from sdtrt.common.console import print_table
from sdtrt.common.errors import CacheError, UsageError
from sdtrt.engines import upkeep
from sdtrt.engines.entry import Entry, ForeignEntry, removal_of
from sdtrt.engines.trust import mend_of
from sdtrt.specs import GIB, PruneSpec, bytes_of

DAY = 86400

engines_app = typer.Typer(help="The engine directory: list, verify, remove, prune.", invoke_without_command=True)


@engines_app.callback()
@grouped
def engines(context: typer.Context, directory: DirectoryOptions, output: OutputOptions) -> None:
    """The engine directory: list, verify, remove, prune."""
    command = context.invoked_subcommand
    if command is None:
        _list(directory, output)
    elif (directory, output) != (DirectoryOptions(), OutputOptions()):
        raise UsageError(
            f"options before {command} would not reach it", hint=f"give them after it: sdtrt engines {command} ..."
        )


@engines_app.command("list")
@grouped
def list_entries(directory: DirectoryOptions, output: OutputOptions) -> None:
    """List exports and engines, with their sizes and when they were last used."""
    _list(directory, output)


@engines_app.command("rm")
@grouped
def remove_entries(
    names: Annotated[list[str], Argument(help="names, or their beginnings")],
    *,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Remove entries by name, damaged ones too."""
    found = directory.directory()
    folders = {folder.name: folder for folder in (found.folder_named(name) for name in names)}
    for folder in folders.values():  # all or none
        upkeep.require_free(found, folder)
    for folder in folders.values():
        found.remove(folder)
    render(list(folders), {"removed": list(folders)}, output)


@engines_app.command("verify")
@grouped
def verify_entries(directory: DirectoryOptions, output: OutputOptions) -> None:
    """Read every entry whole and compare it with what was published; exit 1 where one is damaged or unsafe."""
    found = directory.directory()
    with output.console().stage("verifying"):
        checked = list(upkeep.check(found))
    if output.as_json:
        print(json.dumps({"directory": str(found.path), "entries": [asdict(one) for one in checked]}, indent=2))
    elif checked:
        print_table(("name", "state", "size", "what is wrong"), [_row(one) for one in checked])
    damaged = [one.name for one in checked if one.state == "damaged"]
    if damaged:
        raise CacheError(
            f"{len(damaged)} of {len(checked)} entries are damaged: {', '.join(damaged)}",
            hint=f"{removal_of(found.path, *damaged)}; what is needed of them is made again",
        )
    if unsafe := found.unsafe():
        raise CacheError(
            f"{len(unsafe)} of {len(checked)} entries can be changed by other users: {', '.join(unsafe)}",
            hint=f"{mend_of(unsafe)}, if nobody has; else {removal_of(found.path, *unsafe)}",
        )


def _row(one: upkeep.Checked) -> tuple[str, str, str, str]:
    """Return a row of the table: one entry, and what was found of it."""
    return one.name, one.state, f"{one.size_bytes / 2**20:.1f} MiB", one.problem


@engines_app.command("prune")
@grouped
def prune_entries(
    older_than_days: Annotated[float | None, Option(help="remove what was not used for so many days")] = None,
    keep_gib: Annotated[float | None, Option(help="remove the least recently used until the rest fits")] = None,
    foreign: Annotated[bool, Option("--foreign", help="remove what this machine or this sdtrt can't load")] = False,
    damaged: Annotated[bool, Option("--damaged", help="remove what engines verify finds damaged")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="only say what would go")] = False,
    *,
    directory: DirectoryOptions,
    output: OutputOptions,
) -> None:
    """Remove entries by age, size, host or damage, and what killed builds left behind; nothing that is in use."""
    keep_bytes = None if keep_gib is None else bytes_of("--keep-gib", keep_gib)
    spec = PruneSpec(older_than_days, keep_bytes, foreign, damaged, dry_run)
    from sdtrt.backends.registry import is_foreign

    console = output.console()
    pruned = upkeep.prune(directory.directory(), spec, is_foreign, console)
    verb = "would remove" if spec.dry_run else "removed"
    size = f"{pruned.freed_bytes / GIB:.2f} GiB"
    console.note(f"{verb} {len(pruned.removed)} entries, {size}, and {pruned.leftovers} unfinished builds")
    render(pruned.removed, asdict(pruned), output)


def _list(directory: DirectoryOptions, output: OutputOptions) -> None:
    """Show all entries."""
    found = directory.directory()
    entries = found.all_entries()
    console = output.console()
    passed_over = found.warn_of_unsafe(console)
    if output.as_json:
        lists: dict[str, list[dict[str, Any]]] = {"entries": [], "foreign": []}
        for entry in entries:
            lists["entries" if isinstance(entry, Entry) else "foreign"].append(entry.to_json())
        print(json.dumps({"directory": str(found.path), **lists}, indent=2))
        return
    rows = [
        (entry.name, _made_for(entry), f"{entry.size_bytes / 2**20:.1f} MiB", _age(entry.last_used))
        for entry in entries
    ]
    if rows:
        print_table(("name", "model", "size", "last used"), rows)
    elif not passed_over:
        console.note(f"{found.path} has no engines yet: sdtrt build makes one")


def _made_for(entry: Entry | ForeignEntry) -> str:
    """The model that an entry was made for, as the list shows it."""
    return str(entry.info.get("model", "")) if isinstance(entry, Entry) else "(of another version of sdtrt)"


def _age(moment: float) -> str:
    """Say roughly how long ago a moment was."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"

"""All engines of a pipeline, by their names: its components', further ControlNets', and second ones for fewer rows.

Second ones serve the steps without guidance, where the first ones' range has not so few rows. Opens none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sdtrt.backends import registry
from sdtrt.common.console import QUIET, Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.find import slack
from sdtrt.models.components import STEPPING
from sdtrt.pipeline.opening.engines import ensure_engines, find_engines
from sdtrt.pipeline.opening.request import PROMPT_ROWS, EngineRequest, PipelineSpec


def ensure_all(
    spec: PipelineSpec,
    directory: EngineDirectory,
    console: Console = QUIET,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> dict[str, Entry]:
    """Find or build all engines of a pipeline: of each further ControlNet as well, for shallow steps, and for steps
    without guidance.

    Args:
        unet_engine: the UNet's engine, whatever weights it was built from; None to find or build the one that fits.

    Raises as of `ensure_engines`.
    """
    own = ensure_engines(spec.engines, directory, console, allow_build=allow_build, unet_engine=unet_engine)
    entries: dict[str, Entry] = dict(own.items())
    for name, request in spec.other_engines.items():
        (component,) = request.components
        entries |= {name: ensure_engines(request, directory, console, allow_build=allow_build)[component]}
    if spec.prompt_rows is None:
        return entries
    requests = {name: spec.engines for name in own if name in STEPPING} | spec.other_engines
    second = {name: for_prompt_rows(one, spec.prompt_rows) for name, one in requests.items()}
    return entries | ensure_second(second, entries, directory, console, allow_build=allow_build)


def for_prompt_rows(request: EngineRequest, rows: int) -> EngineRequest:
    """A request's engines for steps without guidance, which are of so many rows."""
    components = tuple(name for name in request.components if name in STEPPING)
    return replace(request, components=components, sizes=replace(request.sizes, batch=rows))


def ensure_second(
    requests: Mapping[str, EngineRequest],
    entries: Mapping[str, Entry],
    directory: EngineDirectory,
    console: Console = QUIET,
    *,
    allow_build: bool = True,
) -> dict[str, Entry]:
    """Find or build a second engine for each of some that does not take the rows of steps without guidance.

    Args:
        requests: of `for_prompt_rows`, by the names of the first engines.
        entries: the first engines, among others.

    Returns:
        Only second ones, by the first ones' names with `PROMPT_ROWS` behind.
    """
    found = {}
    for name, request in requests.items():
        component = entries[name].engine_key.component
        own = replace(request, components=(component,))
        if _lacks(entries[name], own):
            _note(name, own, directory, console)
            found[name + PROMPT_ROWS] = ensure_engines(own, directory, console, allow_build=allow_build)[component]
    return found


def _lacks(entry: Entry, request: EngineRequest) -> bool:
    """Whether an engine does not take the rows of a request."""
    return slack(entry.engine_key.profiles, request.sizes) is None


def _note(name: str, request: EngineRequest, directory: EngineDirectory, console: Console) -> None:
    """Say why a second engine is built, and what it costs."""
    if None not in find_engines(request, directory).values():
        return
    held = registry.get(request.backend).weights_inside
    weights = "holds the weights a second time" if held else "computes with the same weights"
    rows = f"{request.sizes.batch} row{'s' * (request.sizes.batch > 1)}"
    console.note(f"{name}: steps without guidance are of {rows}, for which a second engine {weights}")

"""The pipelines that stay open: found by what they run, opened when they are first asked for, closed for others.

Knows engines, memory, and which batches they take. Knows no requests and makes no pictures. Builds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from sdtrt.backends import registry
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models.components import part_of
from sdtrt.models.weights import WEIGHT_NAMES
from sdtrt.pipeline.opening import memory
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.open import OpenPipeline, checked_scheduler, is_lcm, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.serve.host_memory import check_host_memory
from sdtrt.specs import Savings
from sdtrt.specs.serve import ServeSpec

Found = Mapping[str, Entry]
FIRST = "first"  # of a request's pipelines, by their names: the one that begins


class MissingEngines(Exception):  # noqa: N818 (no failure: what is missing is built, and the request comes again)
    """No engine serves a request yet, not even for one picture."""


@dataclass
class Warm:
    """A pipeline that is open, what closes it, and the VAE of its previews."""

    opened: OpenPipeline
    stack: ExitStack
    preview_vae: Any = None


@dataclass(frozen=True)
class Ready:
    """A request's open pipelines, and how each of them runs so many pictures at once, by their names."""

    size: int
    warm: Mapping[str, Warm]
    specs: Mapping[str, PipelineSpec]


class OpenPipelines:
    """Opens pipelines, and closes the one that was used last long ago for another. One thread at a time uses it."""

    def __init__(self, serve: ServeSpec, directory: EngineDirectory, console: Console) -> None:
        self._serve, self._directory, self._console = serve, directory, console
        self._open: OrderedDict[object, Warm] = OrderedDict()

    def close(self) -> None:
        """Close all of them."""
        while self._close_oldest():
            pass

    def ready(self, single: Mapping[str, PipelineSpec], count: int) -> Ready:
        """A request's pipelines for so many pictures at once, or for as many as engines and memory do.

        Args:
            single: how each runs one picture, by their names; `FIRST` is among them.

        Raises:
            MissingEngines: where some are missing even for one picture.
            EngineError: that says which, where nothing is built.
            MemoryShortage: where one picture is too much.
        """
        shortage: MemoryShortage | None = None
        for size in self._sizes(single[FIRST], count):
            specs = {name: _at(one, size) for name, one in single.items()}
            found = self._find(specs)
            if found is None or (shortage is not None and size >= count):
                continue
            try:
                return Ready(min(size, count), self._opened(specs, found), specs)
            except MemoryShortage as error:
                shortage = error
        if shortage is not None:
            raise shortage
        if not self._serve.allow_build:
            for one in single.values():
                ensure_all(one, self._directory, self._console, allow_build=False)
        raise MissingEngines

    def _sizes(self, single: PipelineSpec, count: int) -> Iterator[int]:
        """Batches to look for: the smallest that holds all, then the larger ones, then those that hold fewer."""
        most = min(count, self._serve.max_batch)
        if (not single.in_engines or registry.get(single.backend).takes_any_size) and single.savings == Savings():
            yield most
            yield from (size for size in _ladder(most) if size < most)
            return
        ladder = _ladder(self._serve.max_batch)
        yield from sorted(size for size in ladder if size >= most)
        yield from (size for size in ladder if size < most)

    def _find(self, specs: Mapping[str, PipelineSpec]) -> dict[str, Found] | None:
        """The engines that all of them need; None where any is missing."""
        try:
            return {
                name: ensure_all(one, self._directory, self._console, allow_build=False) for name, one in specs.items()
            }
        except EngineError:
            return None

    def _opened(self, specs: Mapping[str, PipelineSpec], found: Mapping[str, Found]) -> dict[str, Warm]:
        """The open pipelines of these engines; those of one request stay open for each other."""
        keys = {name: _key(one, found[name]) for name, one in specs.items()}
        in_use = frozenset(keys.values())
        return {name: self._open_with(keys[name], one, found[name], in_use) for name, one in specs.items()}

    def _open_with(self, key: object, resolved: PipelineSpec, found: Found, in_use: frozenset[object]) -> Warm:
        """An open pipeline, or a new one: others are closed where memory or their number asks so."""
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= self._serve.open_models and self._close_oldest(in_use):
            pass
        while True:
            try:
                self._open[key] = self._open_new(resolved, found)
                return self._open[key]
            except MemoryShortage:
                if not self._close_oldest(in_use):
                    raise

    def _open_new(self, resolved: PipelineSpec, found: Found) -> Warm:
        check_host_memory(resolved, _bytes_of(resolved, found))
        with ExitStack() as stack:
            pipeline = open_pipeline(resolved, self._directory, self._console, allow_build=False)
            return Warm(stack.enter_context(pipeline), stack.pop_all())

    def _close_oldest(self, in_use: frozenset[object] = frozenset()) -> bool:
        """Close the pipeline that was used last long ago; False where there is none but those in use."""
        key = next((key for key in self._open if key not in in_use), None)
        if key is None:
            return False
        warm = self._open.pop(key)
        warm.stack.close()
        del warm
        memory.release()
        return True


def _ladder(most: int) -> list[int]:
    """8, 4, 2, 1: the powers of two up to a number, the largest first."""
    return [2**power for power in range(most.bit_length() - 1, -1, -1)]


def _at(single: PipelineSpec, size: int) -> PipelineSpec:
    """How so many pictures run at once, where one runs so."""
    return replace(single, images=size, sizes=replace(single.sizes, batch=single.sizes.batch * size))


def _key(resolved: PipelineSpec, found: Found) -> object:
    """What two requests have in common that one open pipeline serves: steps, scheduler and texts may differ."""
    backend = registry.get(resolved.backend)
    own = replace(resolved, steps=1, texts=(), strength=1.0, eta=None, scheduler=None, images=1)
    asks = backend.source is not None and backend.asks_for_scratch
    sizes = resolved.sizes if asks else None
    saved = resolved.savings, resolved.prompt_rows
    task = (own.img2img, own.inpaint, own.edit, own.text.in_pytorch, own.text.clip_skip, own.tile)
    lcm = own.model.is_lcm and is_lcm(resolved, checked_scheduler(resolved))
    beside = tuple(one.spec for one in (*own.others.values(), *own.adapters))
    words = tuple((one.path, one.path.stat().st_mtime_ns, one.token) for one in own.text.embeddings)
    engines = tuple(sorted((name, entry.name) for name, entry in found.items()))
    return own.model.spec, own.backend, own.precision, task, saved, lcm, beside, words, engines, sizes


def _bytes_of(resolved: PipelineSpec, found: Found) -> int:
    """The bytes of what is read to open a pipeline: its engines' files, and the weights of PyTorch's parts."""
    engines = sum(size for entry in found.values() for size in entry.files.values())
    covered = {part_of(entry.engine_key.component) for entry in found.values()}
    parts = (name for name in WEIGHT_NAMES if name in resolved.model.parts and name not in covered)
    files = (path for name in parts for path in resolved.model.stored_weight_files(name))
    return engines + sum(path.stat().st_size for path in files)

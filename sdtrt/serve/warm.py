"""Pipelines that stay open between requests, and the batches that they make. Builds nothing unless it is asked to.

Knows the rooms below as the commands do, and makes pictures by the same functions. Knows neither HTTP nor jobs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from sdtrt.backends import registry
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, MemoryShortage, ModelChangedError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models import loading
from sdtrt.models.components import part_of, text_encoders_of
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.models.weights import WEIGHT_NAMES
from sdtrt.pipeline.inputs import images, masks
from sdtrt.pipeline.inputs.text_states import plan_texts
from sdtrt.pipeline.opening import memory
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.pipeline.opening.open import OpenPipeline, checked_scheduler, is_lcm, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts import schedulers
from sdtrt.pipeline.runs.generate import Run, Sink, Stages, started
from sdtrt.pipeline.runs.jobs import ChosenJobs
from sdtrt.pipeline.runs.jobs import Job as Drawn
from sdtrt.pipeline.runs.previews import Preview, find_preview_vae, load_preview
from sdtrt.pipeline.runs.settings import settings_of
from sdtrt.serve.catalog import Catalog, short_name
from sdtrt.serve.host_memory import check_host_memory
from sdtrt.serve.requests import INIT, MASK, PictureRequest
from sdtrt.specs import GenerateSpec, ModelSpec, Savings
from sdtrt.specs.serve import OWN_VAE, ServeSpec

PREVIEW_EVERY = 2  # steps
Found = Mapping[str, Entry]


class MissingEngines(Exception):  # noqa: N818 (no failure: what is missing is built, and the request comes again)
    """No engine serves a request yet, not even for one picture."""


@dataclass(frozen=True)
class Batch:
    """Pictures that one request's settings make: each has its own prompt and seed."""

    request: PictureRequest
    jobs: tuple[Drawn, ...]


class Watcher(Sink, Protocol):
    """Who gets the pictures of a batch, and is told how far they are."""

    def begin(self, jobs: tuple[Drawn, ...]) -> None:
        """Be told which of the pictures the next call makes."""

    def show(self, step: int, pictures: Sequence[Image.Image]) -> object:
        """See what they look like after a step."""


@dataclass
class _Warm:
    """A pipeline that is open, what closes it, and the VAE of its previews."""

    opened: OpenPipeline
    stack: ExitStack
    preview_vae: Any = None


class WarmPipelines:
    """Opens pipelines when they are first asked for, and closes the one that was used last long ago for another.

    One thread at a time uses it.
    """

    def __init__(self, serve: ServeSpec, catalog: Catalog, directory: EngineDirectory, console: Console) -> None:
        self._serve, self._catalog, self._directory, self._console = serve, catalog, directory, console
        self._models: dict[ModelSpec, Model] = {}
        self._open: OrderedDict[object, _Warm] = OrderedDict()

    def make(self, batch: Batch, watcher: Watcher) -> None:
        """Make the pictures of a batch, which `watcher` gets one after the other.

        Raises:
            MissingEngines: where none of its pictures can be made before engines are built.
            SdtrtError: where they can't be made.
        """
        try:
            self._make(batch, watcher)
        except ModelChangedError:  # its files were replaced: what is open is of the old ones
            self.close()
            self._make(batch, watcher)

    def build(self, batch: Batch) -> None:
        """Build the engines that one picture of a batch needs. Raises `SdtrtError` where they can't be built."""
        _, spec = self._resolve(batch.request, batch.jobs[:1], *self._read(batch.request))
        ensure_all(spec, self._directory, self._console)

    def close(self) -> None:
        """Close all pipelines."""
        self._models.clear()
        while self._open:
            self._close_oldest()

    def facts(self, name: str) -> dict[str, Any]:
        """What clients want to know of a model. Raises `SdtrtError` where it can't be used."""
        model = self._model(self._catalog.model(name))
        height, width = model.default_size()
        task = (
            "inpaint" if model.is_inpainting else "edit" if model.is_editing else "refine" if model.is_refiner else ""
        )
        kind = "sdxl" if model.is_sdxl else "sd"
        return {"name": name, "kind": kind, "height": height, "width": width, "task": task or "generate"}

    def tokenizers(self, name: str) -> dict[str, Any]:
        """A model's tokenizers, read anew: those of a pipeline are in use."""
        model = resolve_model(self._catalog.model(name))
        names = [one.replace("text_encoder", "tokenizer") for one in text_encoders_of(model)]
        return loading.load_parts(model, names, torch.float32)

    # --- a batch -----------------------------------------------------------------------------------------------------

    def _make(self, batch: Batch, watcher: Watcher) -> None:
        init, mask = self._read(batch.request)
        for jobs in self._of_one_length(batch):
            spec, single = self._resolve(batch.request, jobs, init, mask)
            self._make_alike(spec, single, jobs, (init, mask), watcher)

    def _read(self, request: PictureRequest) -> tuple[images.InitImage | None, masks.Mask | None]:
        """The pictures that were uploaded, from the working folder."""
        if INIT not in request.uploads:
            return None, None
        init = images.read_init_image(Path(INIT), self._console)
        if MASK not in request.uploads:
            return init, None
        return init, masks.read_mask(Path(MASK), init, request.mask_blur, self._console)

    def _of_one_length(self, batch: Batch) -> Iterator[tuple[Drawn, ...]]:
        """The jobs whose texts take as many chunks of tokens: padded to more, a picture would be another one."""
        if batch.request.prompt_syntax == "plain":
            yield batch.jobs
            return
        lengths: dict[int, list[Drawn]] = {}
        for job in batch.jobs:
            spec = _of(batch.request, job).spec(self._catalog, self._serve, (job,))
            lengths.setdefault(plan_texts(spec, self._model(spec.model)).chunks, []).append(job)
        yield from map(tuple, lengths.values())

    def _resolve(
        self,
        request: PictureRequest,
        jobs: Sequence[Drawn],
        init: images.InitImage | None,
        mask: masks.Mask | None,
    ) -> tuple[GenerateSpec, PipelineSpec]:
        """The request of some jobs, and how one picture of it runs."""
        spec = _of(request, jobs[0]).spec(self._catalog, self._serve, tuple(jobs), batch=len(jobs))
        alone = replace(spec, batch_size=1)
        resolved = resolve_fastest(alone, self._model(spec.model), self._directory, self._console, init)
        return spec, resolved

    def _make_alike(
        self,
        spec: GenerateSpec,
        single: PipelineSpec,
        jobs: tuple[Drawn, ...],
        given: tuple[images.InitImage | None, masks.Mask | None],
        watcher: Watcher,
    ) -> None:
        """Make pictures that one pipeline makes, as many at once as there are engines and memory for."""
        done = 0
        while done < len(jobs):
            size, warm, resolved = self._opened(single, len(jobs) - done)
            some = ChosenJobs(jobs[done : done + size])
            self._run(replace(spec, batch_size=size), resolved, warm, some, given, watcher)
            done += size

    def _run(
        self,
        spec: GenerateSpec,
        resolved: PipelineSpec,
        warm: _Warm,
        jobs: ChosenJobs,
        given: tuple[images.InitImage | None, masks.Mask | None],
        watcher: Watcher,
    ) -> None:
        """One call of an open pipeline, with a scheduler of its own as every command has it."""
        opened, (init, mask) = replace(warm.opened, spec=resolved), given
        scheduler = checked_scheduler(resolved)
        if resolved.has_engines:
            schedulers.keep_on_host(scheduler)
        opened.pipe.scheduler = scheduler
        _check_words(opened, jobs.jobs)
        stages = Stages(opened)
        settings = nameless(settings_of(spec, opened, init, mask, (), self._directory))
        stages.check_files()
        preview = self._preview(warm, opened, watcher)
        start = started(spec, resolved, init, mask)
        watcher.begin(jobs.jobs)
        Run(spec, stages, watcher, start, (), self._console, settings, preview).make_all(jobs)

    def _preview(self, warm: _Warm, opened: OpenPipeline, watcher: Watcher) -> Preview | None:
        if self._serve.preview is None:
            return None
        if warm.preview_vae is None:
            warm.preview_vae = self._preview_vae(self._serve.preview, opened)
        return Preview(warm.preview_vae, watcher.show, PREVIEW_EVERY)

    def _preview_vae(self, name: str, opened: OpenPipeline) -> Any:
        if name == OWN_VAE:
            return opened.pipe.vae
        found = find_preview_vae(name, opened.spec.model, self._console)
        return load_preview(found, opened, lambda *_: None, PREVIEW_EVERY).vae

    # --- what is open ------------------------------------------------------------------------------------------------

    def _model(self, spec: ModelSpec) -> Model:
        if spec not in self._models:
            self._models[spec] = resolve_model(spec, self._console)
        return self._models[spec]

    def _opened(self, single: PipelineSpec, count: int) -> tuple[int, _Warm, PipelineSpec]:
        """An open pipeline for so many pictures at once, or as many as engines and memory do; and how it runs them."""
        shortage: MemoryShortage | None = None
        for size in self._sizes(single, count):
            resolved = _at(single, size)
            found = self._find(resolved)
            if found is None or (shortage is not None and size >= count):
                continue
            try:
                return min(size, count), self._open_with(resolved, found), resolved
            except MemoryShortage as error:
                shortage = error
        if shortage is not None:
            raise shortage
        if not self._serve.allow_build:
            ensure_all(single, self._directory, self._console, allow_build=False)
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

    def _find(self, resolved: PipelineSpec) -> Found | None:
        """The engines that it needs; None where any is missing."""
        try:
            return ensure_all(resolved, self._directory, self._console, allow_build=False)
        except EngineError:
            return None

    def _open_with(self, resolved: PipelineSpec, found: Found) -> _Warm:
        """The open pipeline of these engines, or a new one: others are closed where memory or their number asks so."""
        key = _key(resolved, found)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= self._serve.open_models:
            self._close_oldest()
        while True:
            try:
                self._open[key] = self._open_new(resolved, found)
                return self._open[key]
            except MemoryShortage:
                if not self._open:
                    raise
                self._close_oldest()

    def _open_new(self, resolved: PipelineSpec, found: Found) -> _Warm:
        check_host_memory(resolved, _bytes_of(resolved, found))
        with ExitStack() as stack:
            pipeline = open_pipeline(resolved, self._directory, self._console, allow_build=False)
            return _Warm(stack.enter_context(pipeline), stack.pop_all())

    def _close_oldest(self) -> None:
        _, warm = self._open.popitem(last=False)
        warm.stack.close()
        del warm
        memory.release()


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
    engines = tuple(sorted((name, entry.name) for name, entry in found.items()))
    return own.model.spec, own.backend, own.precision, task, saved, lcm, engines, sizes


def _bytes_of(resolved: PipelineSpec, found: Found) -> int:
    """The bytes of what is read to open a pipeline: its engines' files, and the weights of PyTorch's parts."""
    engines = sum(size for entry in found.values() for size in entry.files.values())
    covered = {part_of(entry.engine_key.component) for entry in found.values()}
    parts = (name for name in WEIGHT_NAMES if name in resolved.model.parts and name not in covered)
    files = (path for name in parts for path in resolved.model.stored_weight_files(name))
    return engines + sum(path.stat().st_size for path in files)


def _of(request: PictureRequest, job: Drawn) -> PictureRequest:
    """The request with a picture's own negative prompt."""
    own = request.negative_prompt if job.negative_prompt is None else job.negative_prompt
    return replace(request, negative_prompt=own)


def _check_words(opened: OpenPipeline, jobs: Sequence[Drawn]) -> None:
    """Raise `ModelError` where a tokenizer makes tokens of the texts that its encoder has not."""
    model, texts = opened.spec.model, {*opened.spec.texts, *(job.negative_prompt or "" for job in jobs)}
    for encoder in text_encoders_of(model):
        tokenizer = getattr(opened.pipe, encoder.replace("text_encoder", "tokenizer"))
        vocabulary = model.config(encoder).get("vocab_size", loading.CLIP_VOCABULARY)
        loading.check_words(tokenizer, texts, vocabulary)


def nameless(settings: Any) -> Any:
    """What a picture says of itself, with short names in the place of paths of this machine's disk."""
    if isinstance(settings, Mapping):
        return {name: nameless(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [nameless(value) for value in settings]
    is_path = isinstance(settings, str) and Path(settings).is_absolute()
    return short_name(settings) if is_path else settings

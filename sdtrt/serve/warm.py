"""The batches that a worker makes, on pipelines that stay open between them. Builds nothing unless it is asked to.

Knows the rooms below as the commands do, and makes pictures by the same functions. Knows neither HTTP nor jobs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelChangedError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import loading
from sdtrt.models.components import text_encoders_of
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.pipeline.inputs.text_states import plan_texts
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.open import OpenPipeline, checked_scheduler, reassembled
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts import schedulers
from sdtrt.pipeline.runs.generate import (
    Pictures,
    Plan,
    Run,
    Sink,
    Stages,
    adapted_pictures,
    fitted_maps,
    plan_stages,
    read_pictures,
    settings_of_all,
    started,
)
from sdtrt.pipeline.runs.jobs import ChosenJobs
from sdtrt.pipeline.runs.jobs import Job as Drawn
from sdtrt.pipeline.runs.previews import Preview, find_preview_vae, load_preview
from sdtrt.pipeline.runs.refining import Refiner
from sdtrt.pipeline.runs.upscaling import Upscaler, load_upscaler
from sdtrt.serve.beside import check_enlarged
from sdtrt.serve.catalog import Catalog, short_name
from sdtrt.serve.open_pipelines import FIRST, OpenPipelines, Ready, Warm
from sdtrt.serve.requests import PictureRequest
from sdtrt.specs import GenerateSpec, ModelSpec
from sdtrt.specs.serve import OWN_VAE, ServeSpec

PREVIEW_EVERY = 2  # steps
MOST_MODELS = 64  # that are remembered, each with its own LoRAs and adapters
REFINER, LARGER = "refiner", "larger"  # a request's pipelines beside the first one


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


@dataclass(frozen=True)
class _Asked:
    """Pictures that one call can make: their request, how one of them runs, and what they go by."""

    spec: GenerateSpec
    single: Plan
    read: Pictures

    @property
    def pipelines(self) -> dict[str, PipelineSpec]:
        """The pipelines that are opened for one picture; a second pass without engines has the first one's modules."""
        plan = self.single
        larger = plan.larger if plan.larger is not None and plan.larger.has_engines else None
        named = {FIRST: plan.first, REFINER: plan.refiner, LARGER: larger}
        return {name: one for name, one in named.items() if one is not None}


class WarmPipelines:
    """Makes the pictures of batches. One thread at a time uses it."""

    def __init__(self, serve: ServeSpec, catalog: Catalog, directory: EngineDirectory, console: Console) -> None:
        self._serve, self._catalog, self._directory, self._console = serve, catalog, directory, console
        self._models: OrderedDict[ModelSpec, Model] = OrderedDict()
        self._pipelines = OpenPipelines(serve, directory, console)
        self._enlarger: tuple[str, Any] = ("", None)  # the model that enlarged pictures last, by its path

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
        for one in self._resolve(batch.request, batch.jobs[:1]).pipelines.values():
            ensure_all(one, self._directory, self._console)

    def close(self) -> None:
        """Close all pipelines."""
        self._models.clear()
        self._pipelines.close()

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
        for jobs in self._of_one_length(batch):
            self._make_alike(self._resolve(batch.request, jobs), jobs, watcher)

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

    def _resolve(self, request: PictureRequest, jobs: Sequence[Drawn]) -> _Asked:
        """What some jobs ask for. Their pictures are in the working folder."""
        spec = _of(request, jobs[0]).spec(self._catalog, self._serve, tuple(jobs), batch=len(jobs))
        read, alone = read_pictures(spec, self._console), replace(spec, batch_size=1)
        single = plan_stages(alone, self._model(spec.model), self._directory, self._console, read)
        if single.larger is not None:
            check_enlarged((single.larger.sizes.height, single.larger.sizes.width), self._serve.limits)
        return _Asked(spec, single, read)

    def _make_alike(self, asked: _Asked, jobs: tuple[Drawn, ...], watcher: Watcher) -> None:
        """Make pictures that the same pipelines make, as many at once as there are engines and memory for."""
        done = 0
        while done < len(jobs):
            ready = self._pipelines.ready(asked.pipelines, len(jobs) - done)
            with self._stages(asked, ready) as stages:
                self._run(asked, ready, stages, ChosenJobs(jobs[done : done + ready.size]), watcher)
            done += ready.size

    def _run(self, asked: _Asked, ready: Ready, stages: Stages, jobs: ChosenJobs, watcher: Watcher) -> None:
        """One call of the open pipelines."""
        spec, read, opened = replace(asked.spec, batch_size=ready.size), asked.read, stages.first
        for one in stages.named.values():
            _check_words(one, jobs.jobs)
        plan = replace(asked.single, spec=spec, first=opened.spec)
        settings = self._nameless(settings_of_all(plan, opened, read, self._directory))
        stages.check_files()
        stages.scale_adapters([one.scale for one in spec.ip_images])
        start = started(spec, opened.spec, read.init, read.mask)
        maps = fitted_maps(read.controls, opened.spec, start)
        larger = () if plan.larger is None else fitted_maps(read.controls, plan.larger, None)
        adapted = adapted_pictures(read.adapters, opened.spec, self._console)
        shown, preview = tuple(one.pixels for one in read.pictures), self._preview(ready.warm[FIRST], opened, watcher)
        watcher.begin(jobs.jobs)
        run = Run(spec, stages, watcher, start, maps, self._console, settings, preview, shown, larger, adapted)
        run.make_all(jobs)

    @contextmanager
    def _stages(self, asked: _Asked, ready: Ready) -> Iterator[Stages]:
        """The open pipelines of a call, each with a scheduler of its own, as every command has it."""
        spec, larger = asked.spec, asked.single.larger
        opened = {name: _with_scheduler(ready.warm[name], ready.specs[name]) for name in ready.warm}
        first, refiner, upscaler = opened[FIRST], None, None
        if spec.refiner is not None:
            refiner = Refiner(opened[REFINER], spec.refiner.start)
        if spec.upscale is not None and larger is not None:
            second = opened.get(LARGER) or reassembled(first, _of_size(larger, first.spec))
            upscaler = Upscaler(second, spec.upscale, self._enlarger_of(spec, larger))
        try:
            yield Stages(first, refiner, upscaler)
        finally:
            if LARGER not in opened and larger is not None and first.spec.tile is None:
                first.pipe.vae.disable_tiling()  # the second pass had the same module

    def _enlarger_of(self, spec: GenerateSpec, larger: PipelineSpec) -> Any:
        """The model that enlarges pictures, read once; None where none does."""
        name = spec.upscale.upscaler if spec.upscale is not None else ""
        if self._enlarger[0] != name:
            self._enlarger = (name, load_upscaler(spec, larger))
        return self._enlarger[1]

    def _preview(self, warm: Warm, opened: OpenPipeline, watcher: Watcher) -> Preview | None:
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

    def _model(self, spec: ModelSpec) -> Model:
        if spec not in self._models:
            self._models[spec] = resolve_model(spec, self._console)
            if len(self._models) > MOST_MODELS:
                self._models.popitem(last=False)
        return self._models[spec]

    def _nameless(self, settings: Mapping[str, Any]) -> Any:
        """What a picture says of itself, with the server's names in the place of paths of this machine's disk."""
        return nameless(settings, self._catalog.names)


def _with_scheduler(warm: Warm, resolved: PipelineSpec) -> OpenPipeline:
    """An open pipeline that runs as a request says."""
    opened, scheduler = replace(warm.opened, spec=resolved), checked_scheduler(resolved)
    if resolved.has_engines:
        schedulers.keep_on_host(scheduler)
    opened.pipe.scheduler = scheduler
    return opened


def _of_size(larger: PipelineSpec, first: PipelineSpec) -> PipelineSpec:
    """A second pass over as many pictures as the first one makes."""
    return replace(larger, images=first.images, sizes=replace(larger.sizes, batch=first.sizes.batch))


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
        vocabulary += sum(len(one.words(encoder)) for one in opened.spec.text.embeddings)
        loading.check_words(tokenizer, texts, vocabulary)


def nameless(settings: Any, names: Mapping[str, str]) -> Any:
    """Plain data with short names in the place of paths: those that are known, else a path's last part."""
    if isinstance(settings, Mapping):
        return {name: nameless(value, names) for name, value in settings.items()}
    if isinstance(settings, list):
        return [nameless(value, names) for value in settings]
    if not isinstance(settings, str):
        return settings
    return names.get(settings) or (short_name(settings) if Path(settings).is_absolute() else settings)

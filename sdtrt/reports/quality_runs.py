"""The pictures that are compared: requests on open pipelines, one after the other, with their latents at the end.

It opens, times and makes. It compares nothing and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from sdtrt.backends.native import NATIVE
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import Model
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.pipeline.opening.memory import out_of_memory
from sdtrt.pipeline.opening.open import OpenPipeline, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.reports.losses import Array, Picture
from sdtrt.reports.meters import Timing, release_memory, tf32, time_calls
from sdtrt.reports.verify_runs import asked_of, call_of, seed_of, start_of
from sdtrt.specs import GenerateSpec


@dataclass(frozen=True)
class Way:
    """One way to make a request's pictures, settled.

    Args:
        image: the request, of which the pictures are made.
        spec: how it runs.
    """

    image: GenerateSpec
    spec: PipelineSpec

    def in_fp32(self) -> Way:
        """The same in plain PyTorch, without any engine."""
        return replace(self, spec=replace(self.spec, backend=NATIVE, precision="fp32", components=None))


def settle_way(image: GenerateSpec, model: Model, directory: EngineDirectory, console: Console) -> Way:
    """How a request runs. Raises what `resolve_fastest` raises."""
    asked = asked_of(image, model)
    return Way(asked, resolve_fastest(asked, model, directory, console, start_of(asked, model)))


@contextmanager
def opened_way(way: Way, directory: EngineDirectory, console: Console) -> Iterator[OpenPipeline]:
    """Its pipeline, with TF32 off; nothing of it is left in memory behind the `with`."""
    with tf32(False):
        with open_pipeline(way.spec, directory, console, allow_build=way.image.allow_build) as opened:
            yield opened
        del opened  # or its UNet would stay where it is
        release_memory(way.spec.device)


def make_pictures(way: Way, opened: OpenPipeline, name: str, console: Console) -> list[Picture]:
    """A picture of each prompt, in batches of the size that the pipeline was opened for."""
    made: list[Picture] = []
    numbered = list(enumerate(way.image.prompts, seed_of(way.image)))
    for first in range(0, len(numbered), way.spec.images):
        batch = numbered[first : first + way.spec.images]
        full = [*batch, *[batch[-1]] * (way.spec.images - len(batch))]  # engines may take full batches alone
        call = call_of(way.image, way.spec, tuple(text for _, text in full), tuple(seed for seed, _ in full))
        latents = _Latents()
        bar = f"{name}, {len(made) + 1} to {len(made) + len(batch)} of {len(numbered)}"
        with console.bar(bar, call.count_unet_calls(opened)) as advance, out_of_memory(opened.spec):
            pixels = call.run(opened, advance=advance, preview=latents)
        made += [Picture(*pair) for pair in zip(latents.last, np.asarray(pixels), strict=True)][: len(batch)]
    return made


def time_way(way: Way, opened: OpenPipeline, repeats: int, warmups: int) -> Timing:
    """Seconds of whole pipeline calls, of a batch of the first prompts, from the texts to PIL's pictures."""
    prompts = (way.image.prompts * way.spec.images)[: way.spec.images]
    seeds = tuple(range(seed_of(way.image), seed_of(way.image) + way.spec.images))
    call = partial(call_of(way.image, way.spec, prompts, seeds).run, opened, output_type="pil")
    with out_of_memory(opened.spec):
        for _ in range(warmups):
            call()
        return time_calls(call, repeats, way.spec.device)


class _Latents:
    """Keeps the latents behind a pipeline's last step; changes none of its tensors."""

    def __init__(self) -> None:
        self.last: Array = np.empty(0)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        assert isinstance(latents, torch.Tensor)
        self.last = latents.detach().float().cpu().numpy()
        return {}

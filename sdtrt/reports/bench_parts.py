"""Times the parts of an open pipeline, each called as the pipeline does. Knows no baseline and makes no report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import ControlNetCall, unet_call
from sdtrt.models.components import contract_of
from sdtrt.models.controlnets import PART
from sdtrt.pipeline.opening.open import OpenPipeline
from sdtrt.pipeline.opening.request import PROMPT_ROWS, PipelineSpec
from sdtrt.reports.meters import Timing, synchronize, time_queued_calls
from sdtrt.specs import SAMPLE_PROMPT
from sdtrt.specs.contract import Contract
from sdtrt.specs.groups import RESIDUAL_SCALES

# How long one component is timed, in seconds, and between how many calls: a UNet on a CPU takes seconds a call.
COMPONENT_SECONDS, MIN_CALLS, MAX_CALLS = 2.0, 3, 50


def parts_of(opened: OpenPipeline) -> dict[str, Callable[[], object]]:
    """One call of each part, as the pipeline makes it."""
    pipe, spec, batch = opened.pipe, opened.spec, opened.spec.images
    contract = contract_of(spec.model, "unet", spec.precision, spec.engines.groups_of("unet"))
    feeds = _feeds(contract, spec)
    unet, latents = unet_call(pipe.unet, contract), feeds["sample"][:batch]
    fewer = {name: tensor[: spec.prompt_rows] for name, tensor in feeds.items()}
    image = torch.rand(batch, 3, spec.sizes.height, spec.sizes.width, device=spec.device, dtype=spec.parts_dtype)
    guided = spec.sizes.batch > batch

    def decode() -> None:
        with _widened(opened) as dtype:
            pipe.vae.decode(latents.to(dtype), return_dict=False)

    def encode() -> None:
        with _widened(opened) as dtype:
            for row in range(batch):  # diffusers encodes images one by one, each with its own generator
                pipe.vae.encode(image[row : row + 1].to(dtype), return_dict=False)

    parts: dict[str, Callable[[], object]] = {
        "text_encoder": lambda: pipe.encode_prompt(
            prompt=[SAMPLE_PROMPT] * batch,
            device=spec.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        ),
        "unet": lambda: unet(*feeds.values()),
        **_controlnets(opened),
        "vae_decoder": decode,
    }
    parts |= {} if spec.prompt_rows is None else {f"unet{PROMPT_ROWS}": lambda: unet(*fewer.values())}
    return parts | ({"vae_encoder": encode} if spec.img2img else {})


def _feeds(contract: Contract, spec: PipelineSpec) -> dict[str, torch.Tensor]:
    """A component's inputs where the pipeline runs; its tensors have the pipeline's dtype."""
    feeds = {name: tensor.to(spec.device) for name, tensor in seeded_feeds(contract, spec.sizes).items()}
    for name in feeds.keys() - {"timestep", "time_ids", RESIDUAL_SCALES}:
        feeds[name] = feeds[name].to(spec.parts_dtype)
    return feeds


def _controlnets(opened: OpenPipeline) -> dict[str, Callable[[], object]]:
    """One call of each ControlNet, but for a union, whose inputs no contract has."""
    spec = opened.spec
    if PART not in spec.model.parts or spec.is_union:
        return {}
    nets = getattr(opened.pipe.controlnet, "nets", [opened.pipe.controlnet])
    feeds = _feeds(contract_of(spec.model, "controlnet", spec.precision), spec)
    return {
        name: partial(ControlNetCall(net), *feeds.values())
        for name, net in zip((PART, *spec.others), nets, strict=True)
    }


@contextmanager
def _widened(opened: OpenPipeline) -> Iterator[torch.dtype]:
    """Have the VAE compute as the pipeline does, in the dtype that is given; as it was afterwards.

    diffusers' pipelines of SDXL widen one in fp16 that would overflow (`force_upcast`) for each call of it.
    """
    vae, own = opened.pipe.vae, opened.pipe.vae.dtype
    widen = opened.spec.model.is_sdxl and own == torch.float16 and vae.config.force_upcast
    try:
        yield (vae.float() if widen else vae).dtype
    finally:
        if widen:
            vae.to(own)


@torch.no_grad()  # as in the pipeline
def time_component(call: Callable[[], object], device: torch.device) -> Timing:
    """Seconds of one call, after a warm-up of three: TensorRT and PyTorch capture graphs on the way."""
    for _ in range(MIN_CALLS - 1):
        call()
    start = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - start
    repeats = min(MAX_CALLS, max(MIN_CALLS, int(COMPONENT_SECONDS / max(once, 1e-6))))
    return time_queued_calls(call, repeats, device)

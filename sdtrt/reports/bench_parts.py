"""Times the parts of an open pipeline, each called as the pipeline does. Knows no baseline and makes no report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import unet_call
from sdtrt.models.components import contract_of
from sdtrt.pipeline.open import OpenPipeline
from sdtrt.pipeline.request import PROMPT_ROWS
from sdtrt.reports.meters import Timing, synchronize, time_queued_calls
from sdtrt.specs import SAMPLE_PROMPT

# How long one component is timed, in seconds, and between how many calls: a UNet on a CPU takes seconds a call.
COMPONENT_SECONDS, MIN_CALLS, MAX_CALLS = 2.0, 3, 50


def parts_of(opened: OpenPipeline) -> dict[str, Callable[[], object]]:
    """One call of each part, as the pipeline makes it."""
    pipe, spec, batch = opened.pipe, opened.spec, opened.spec.images
    contract = contract_of(spec.model, "unet", spec.precision)
    feeds = {name: tensor.to(spec.device) for name, tensor in seeded_feeds(contract, spec.sizes).items()}
    for name in feeds.keys() - {"timestep", "time_ids"}:
        feeds[name] = feeds[name].to(spec.parts_dtype)
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
        "vae_decoder": decode,
    }
    parts |= {} if spec.prompt_rows is None else {f"unet{PROMPT_ROWS}": lambda: unet(*fewer.values())}
    return parts | ({"vae_encoder": encode} if spec.img2img else {})


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

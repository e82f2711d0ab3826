"""How large the inputs of a UNet's linear layers get, in a few pictures that diffusers' own pipeline makes.

It knows models and diffusers. It does not know what the numbers are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import ExportError, UsageError
from sdtrt.models.components import text_encoders_of
from sdtrt.models.live import LiveModel
from sdtrt.models.loading import load_parts
from sdtrt.models.resolve import Model
from sdtrt.models.source import ModelSource
from sdtrt.specs import Group
from sdtrt.specs.calibration import Calibration

PLAIN_CHANNELS = 4  # of latents alone: what text-to-image UNets take
GUIDANCE_SCALE = 7.5


def check_calibration(model: ModelSource, groups: Sequence[Group], precision: str) -> None:
    """Raise `UsageError` for a model whose UNet text alone makes no picture of, so that nothing can be gathered."""
    config = model.config("unet")
    stored = _stored(model)
    reasons = {
        "its UNet takes images beside the latents": config["in_channels"] != PLAIN_CHANNELS,
        "its UNet takes a guidance scale": config.get("time_cond_proj_dim") is not None,
        "it is a refiner": model.is_sdxl and "text_encoder" not in model.parts,
        "it has IP-Adapters": any(group.startswith("ip_adapter") for group in groups),
        "its tokenizers are not on this machine": not isinstance(stored, Model),
    }
    if reason := next((words for words, holds in reasons.items() if holds), None):
        raise UsageError(
            f"no ONNX graph of {model.name} is written in {precision}: it is scaled by pictures of text alone, and"
            f" {reason}",
            hint=f"use --backend inductor --precision {precision}, which scales its inputs while it runs",
        )


def _stored(model: ModelSource) -> ModelSource | None:
    """A model as it lies on the disk; None where it does not."""
    return model.stored if isinstance(model, LiveModel) else model


def largest_inputs(
    model: ModelSource,
    unet: torch.nn.Module,
    layers: Sequence[str],
    calibration: Calibration,
    console: Console = QUIET,
) -> dict[str, float]:
    """The largest absolute number that each layer of a UNet gets, by the layers' names.

    Runs on the GPU where PyTorch sees one, else on the CPU. Nothing is added by ControlNets or the like.

    Args:
        unet: of the model, on the CPU; it is what it was afterwards.

    Raises:
        ExportError: where a number is not finite.
    """
    found = {name: torch.zeros(()) for name in layers}
    words = f"{len(calibration.prompts)} pictures of {calibration.steps} steps"
    with console.stage(f"calibrating unet by {words}"), _on_device(unet) as device, ExitStack() as stack:
        for name in layers:
            handle = unet.get_submodule(name).register_forward_pre_hook(partial(_note, found, name))
            stack.callback(handle.remove)
        _paint(_pipeline(model, unet, device), model, calibration)
    sizes = {name: float(size) for name, size in found.items()}
    if wrong := [name for name, size in sizes.items() if not size < float("inf")]:
        raise ExportError(
            f"the input of {wrong[0]} is not finite in a picture of the model's own", hint="use --precision fp16"
        )
    return sizes


def _note(found: dict[str, Tensor], name: str, _layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep the largest number of a layer's input: on its device, so that nobody waits for it."""
    size = inputs[0].detach().float().abs().amax()
    found[name] = torch.maximum(found[name].to(size.device), size)


@contextmanager
def _on_device(unet: torch.nn.Module) -> Iterator[torch.device]:
    """The UNet where its pictures are made: on a GPU as it is, on a CPU in fp32, which holds all of its numbers."""
    dtype = next(unet.parameters()).dtype
    on_gpu = host.torch_sees_gpu()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.nn.Module.to(unet, device, dtype if on_gpu else torch.float32)  # diffusers' own `to` warns
    try:
        yield device
    finally:
        torch.nn.Module.to(unet, "cpu", dtype)


def _pipeline(model: ModelSource, unet: torch.nn.Module, device: torch.device) -> Any:
    """diffusers' own pipeline around a UNet, without a VAE; text and scheduler are of the model as it is stored."""
    stored = _stored(model)
    assert isinstance(stored, Model)
    encoders = text_encoders_of(stored)
    names = [*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders), "scheduler"]
    parts = load_parts(stored, names, next(unet.parameters()).dtype)
    for name in encoders:
        parts[name].to(device)
    if stored.is_sdxl:
        return diffusers.StableDiffusionXLPipeline(vae=None, unet=unet, **parts, add_watermarker=False)
    none = {"vae": None, "safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionPipeline(unet=unet, **parts, **none, requires_safety_checker=False)


def _paint(pipe: Any, model: ModelSource, calibration: Calibration) -> None:
    """Make the pictures' latents, each from noise of its own."""
    height, width = model.default_size()
    pipe.vae_scale_factor = model.vae_scale_factor  # which it would ask the VAE for
    pipe.set_progress_bar_config(disable=True)
    for seed, prompt in enumerate(calibration.prompts):
        pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=calibration.steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )

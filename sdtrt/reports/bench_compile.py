"""PyTorch's compiler in a diffusers pipeline, in the forms that users write; what sdtrt is compared with.

Knows a pipeline's modules, and changes what their `forward` runs. Times nothing, and knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdtrt.specs import BaselineName

COMPILED: tuple[BaselineName, ...] = (
    "torch-compile",
    "torch-compile-max",
    "torch-compile-regional",
    "torch-compile-unet",
)


def compile_pipeline(
    pipe: Any, name: BaselineName, device: torch.device, graphed: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Compile a pipeline's parts in the form that a baseline is named for.

    `torch-compile` is the strongest form known: all parts are compiled, QKV projections fused, layouts channels last,
    and one CUDA graph runs a UNet step. `torch-compile-max` has the UNet's kernels tuned as well. `-regional` compiles
    a UNet's repeated blocks, which takes a tenth of the time. `-unet` is what most write: the UNet alone, in the
    compiler's own CUDA graphs.

    Args:
        graphed: puts a UNet's `forward` into one CUDA graph.
    """
    torch.compiler.reset()
    unet = pipe.unet.to(memory_format=torch.channels_last)
    if name == "torch-compile-unet":
        unet.forward = compiled_forward(unet.forward, device)
        return
    unet.fuse_qkv_projections()
    if name == "torch-compile-regional":
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        forward = unet.forward
    else:
        tuned = name == "torch-compile-max" and device.type == "cuda"
        mode = "max-autotune-no-cudagraphs" if tuned else "default"
        forward = torch.compile(unet.forward, mode=mode, fullgraph=True, dynamic=False)
    unet.forward = graphed(forward) if device.type == "cuda" else forward
    _compile_others(pipe)


def _compile_others(pipe: Any) -> None:
    """Compile the VAE and the text encoders, whose calls are few: no graph of theirs would pay."""
    vae = pipe.vae.to(memory_format=torch.channels_last)
    vae.fuse_qkv_projections()
    for half in (vae.encoder, vae.decoder):
        half.forward = torch.compile(half.forward, dynamic=False)
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipe, name, None)) is not None:
            encoder.forward = torch.compile(encoder.forward, dynamic=False)


def compiled_forward(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A UNet's `forward` in the compiler's own CUDA graphs, its outputs copied: later calls write over the own ones."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled = torch.compile(forward, mode=mode, dynamic=False)

    def call(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return (compiled(*args, **kwargs, return_dict=False)[0].clone(),)

    return call

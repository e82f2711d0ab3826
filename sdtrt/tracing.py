"""diffusers modules as an exporter may trace them: tensors in, one tensor out, one graph for every size.

diffusers itself stays as it is: what hinders a trace is replaced on the one module, for as long as the trace takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional

from sdtrt.components import BATCH, LATENT_HEIGHT, LATENT_WIDTH, TOKENS, Contract

# Sizes to trace with: all different, so that no axis is taken for another; batch above 1, as `torch.export` makes a
# constant of 0 and 1. Small, as the TorchScript exporter runs the module once.
TRACE_SIZES = {BATCH: 2, LATENT_HEIGHT: 10, LATENT_WIDTH: 14, TOKENS: 7}

# `UNet2DConditionModel.forward` passes the sizes of its skip connections to the upsamplers only where a latent side is
# not a multiple of 2**num_upsamplers, and a trace keeps the branch that it took. No side is a multiple of 2**40.
ALWAYS_FORWARD_SIZES = 40


class UNetCall(torch.nn.Module):
    """A `UNet2DConditionModel` with the contract's inputs and output as its signature."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """sample [B,C,H,W], timestep [B], encoder_hidden_states [B,S,D] and SDXL's two → out_sample [B,C,H,W]."""
        added = None
        if text_embeds is not None:  # diffusers joins it with fp32 embeddings; the dynamo exporter forgets to widen it
            added = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return output


def example_inputs(contract: Contract) -> tuple[Tensor, ...]:
    """Inputs to trace with, in the contract's order."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.rand(spec.shape(TRACE_SIZES), generator=generator).to(getattr(torch, spec.dtype))
        for spec in contract.inputs
    )


@contextmanager
def traceable(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The UNet, for the time of a `with` such that its trace is right at every size, and in half precision finite."""
    with ExitStack() as stack:
        stack.enter_context(_attribute(unet, "num_upsamplers", ALWAYS_FORWARD_SIZES))
        for module in unet.modules():
            if _overflows(module):
                stack.enter_context(_attribute(module, "processor", _attend_in_fp32))
            if _is_plain(module):
                stack.enter_context(_attribute(module, "forward", partial(_upsample, module)))
        yield unet


@contextmanager
def _attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute for the time of a `with`."""
    missing = object()
    before = target.__dict__.get(name, missing)
    object.__setattr__(target, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(target, name)
        else:
            object.__setattr__(target, name, before)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a module is an upsampler of the kind that `_upsample` stands in for."""
    return (
        isinstance(module, Upsample2D) and module.norm is None and not module.use_conv_transpose and module.interpolate
    )


def _upsample(module: Any, hidden_states: Tensor, output_size: Any = None) -> Tensor:
    """`Upsample2D.forward` without its work-arounds for large tensors.

    Those compare sizes in Python, which `torch.export` turns into limits (batch below 64) or fails at.
    """
    if output_size is None:
        hidden_states = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
    else:
        hidden_states = functional.interpolate(hidden_states, size=output_size, mode="nearest")
    if not module.use_conv:
        return hidden_states
    convolved: Tensor = (module.conv if module.name == "conv" else module.Conv2d_0)(hidden_states)
    return convolved


def _overflows(module: torch.nn.Module) -> bool:
    """Whether a module is an attention whose QKᵀ leaves fp16, as its model's `upcast_attention` says (SD 2.1)."""
    if not (isinstance(module, Attention) and module.upcast_attention) or module.to_q.weight.dtype == torch.float32:
        return False
    extras = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "residual_connection")
    return not any(getattr(module, extra) for extra in extras)  # those of transformer blocks have none of them


def _attend_in_fp32(
    attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
) -> Tensor:
    """Attention `[B,S,C]` with QKᵀ and softmax in fp32; all else, and so most of the work, in the module's precision.

    diffusers' own processor ignores `upcast_attention`, as PyTorch's fused kernels sum in fp32 anyway. In a graph there
    is no fused kernel: the product is a tensor of its own, and infinite beyond 65504.
    """
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    batch, heads = hidden_states.shape[0], attention.heads
    width = attention.to_q.weight.shape[0] // heads
    query, key, value = (
        projection(states).view(batch, -1, heads, width).transpose(1, 2)
        for projection, states in (
            (attention.to_q, hidden_states),
            (attention.to_k, context),
            (attention.to_v, context),
        )
    )
    scores = (query.float() * attention.scale) @ key.float().transpose(-1, -2)
    attended = scores.softmax(dim=-1).to(value.dtype) @ value
    output: Tensor = attention.to_out[0](attended.transpose(1, 2).reshape(batch, -1, heads * width))
    output = output / attention.rescale_output_factor
    return output

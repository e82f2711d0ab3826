"""A UNet with IP-Adapters, as an exporter may trace it: image tokens and the adapters' scales are tensors that come in.

diffusers' own processors ask `if scale == 0` of a Python number, which a trace would keep for good. Those that stand in
for them, for the time of a call, multiply by a tensor. With `as_diffusers` a call computes by diffusers' own: that is
what engines are held against.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdtrt.exports.attributes import attribute
from sdtrt.models.image_prompts import attentions_of
from sdtrt.specs.contract import Contract
from sdtrt.specs.image_prompts import image_prompt_names


class ImagePromptCall(torch.nn.Module):
    """A call of a UNet whose contract has image prompts, as its last inputs.

    Args:
        inner: takes the contract's other inputs, in its order.
        unet: what it calls, with layers of IP-Adapters.
        contract: names the inputs.
        as_diffusers: compute by diffusers' own processors, which can't be traced.
    """

    def __init__(
        self, inner: torch.nn.Module, unet: torch.nn.Module, contract: Contract, *, as_diffusers: bool
    ) -> None:
        super().__init__()
        self.unet = inner.unet  # of the shallow program some layers
        self._inner, self._whole = (inner,), (unet,)  # no submodules: the UNet's tensors have one name each
        self._count, self._as_diffusers = len(image_prompt_names(contract)), as_diffusers

    def forward(self, *inputs: Tensor) -> Any:
        """What the inner call takes, each adapter's tokens [B,T,D], the scales [adapters, layers] → what that gives."""
        usual, (*tokens, scales) = inputs[: -self._count], inputs[-self._count :]
        with ExitStack() as stack:
            # diffusers makes this pair of the text and the images' tokens, and processors take it apart
            stack.enter_context(attribute(self._whole[0], "process_encoder_hidden_states", partial(_pair, tokens)))
            for index, attention in enumerate(attentions_of(self._whole[0])):
                stack.enter_context(self._scaled(attention, scales[:, index]))
            return self._inner[0].forward(*usual)

    def _scaled(self, attention: Any, scales: Tensor) -> Any:
        """What has an attention count its adapters by so much, while it is entered."""
        own = attention._modules["processor"]
        if self._as_diffusers:
            return attribute(own, "scale", [float(one) for one in scales])
        widens = "processor" in attention.__dict__  # `traceable` has put its own there, which computes in fp32
        return attribute(attention, "processor", partial(_attend, own, scales, widens=widens))


def _pair(
    tokens: list[Tensor], encoder_hidden_states: Tensor, added_cond_kwargs: object
) -> tuple[Tensor, list[Tensor]]:
    return encoder_hidden_states, tokens


def _attend(
    own: Any,
    scales: Tensor,
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: tuple[Tensor, list[Tensor]],
    widens: bool = False,
    **unused: Any,
) -> Tensor:
    """Attention [B,S,C] over the text, and to that, scaled, over each adapter's tokens; as diffusers computes it.

    Args:
        own: the processor that has the adapters' layers.
        scales: [adapters].
        widens: compute scores in fp32.
    """
    text, images = encoder_hidden_states
    query = attention.to_q(hidden_states)
    kernel = partial(_heads_attend, attention.heads, query.float() if widens else query)
    if hasattr(attention, "to_kv"):
        key, value = attention.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attention.to_k(text), attention.to_v(text)
    result = kernel(key, value).to(query.dtype)
    for index, tokens in enumerate(images):
        attended = kernel(own.to_k_ip[index](tokens), own.to_v_ip[index](tokens)).to(query.dtype)
        result = result + scales[index].to(query.dtype) * attended
    output: Tensor = attention.to_out[0](result) / attention.rescale_output_factor
    return output


def _heads_attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B,S,C] of heads side by side in C, in the dtype of the queries."""
    batch, width = query.shape[0], query.shape[-1] // heads
    q, k, v = (one.to(query.dtype).view(batch, -1, heads, width).transpose(1, 2) for one in (query, key, value))
    attended = functional.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).reshape(batch, -1, heads * width)

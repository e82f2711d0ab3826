"""diffusers modules as an exporter may trace them: tensors in, tensors out, one graph for every size.

diffusers itself stays as it is: what hinders a trace is replaced on the one module, for as long as the trace takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional

from sdtrt.common.errors import ExportError
from sdtrt.exports.attributes import attribute
from sdtrt.exports.deep_features import ShallowCall, WholeCall
from sdtrt.exports.fp16_recipe import WIDE_LAYERS, convolve_in_fp32, wide_convolutions
from sdtrt.exports.free_u import FreeUCall
from sdtrt.exports.image_prompts import ImagePromptCall
from sdtrt.models.components import VAE_HALVES
from sdtrt.models.image_prompts import attentions_of
from sdtrt.specs.contract import (
    ADDED_CONDITIONING,
    BATCH,
    GUIDANCE_EMBEDDING,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    TOKENS,
    Contract,
    latent_sides,
)
from sdtrt.specs.deep_features import attends, given_feature, taken_feature
from sdtrt.specs.groups import FREE_U, adapter_names, residual_names
from sdtrt.specs.image_prompts import image_prompt_names

# Sizes to trace with: all different, so that no axis is taken for another; batch above 1, as `torch.export` makes a
# constant of 0 and 1. Small, as the TorchScript exporter runs the module once, and few CPUs have convolutions in fp16:
# a VAE, which works on pixels, is traced at fewer latents than a UNet, whose lowest level is to have more than one.
TRACE_SIZES = {BATCH: 2, TOKENS: 7, **latent_sides(10, 14), IMAGE_HEIGHT: 80, IMAGE_WIDTH: 112}
VAE_TRACE_SIZES = {BATCH: 2, LATENT_HEIGHT: 3, LATENT_WIDTH: 5, IMAGE_HEIGHT: 24, IMAGE_WIDTH: 40}

# `UNet2DConditionModel.forward` passes the sizes of its skip connections to the upsamplers only where a latent side is
# not a multiple of 2**num_upsamplers, and a trace keeps the branch that it took. No side is a multiple of 2**40.
ALWAYS_FORWARD_SIZES = 40

# What the causal mask adds to the attention of tokens that lie ahead: as good as minus infinity to a softmax, and every
# precision has it.
MASKED = -1e4

USUAL_INPUTS = ["sample", "timestep", "encoder_hidden_states"]  # of every UNet

Outputs = Tensor | tuple[Tensor, ...]


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


class NamedUNetCall(torch.nn.Module):
    """A `UNet2DConditionModel` whose contract has more inputs than `UNetCall`: a guidance embedding,
    the residuals of ControlNets or T2I-Adapters.

    Args:
        contract: names the inputs, which come in its order.
    """

    def __init__(self, unet: torch.nn.Module, contract: Contract) -> None:
        super().__init__()
        self.unet = unet
        self.names = [spec.name for spec in contract.inputs]
        self.residuals, self.adapters = residual_names(contract), adapter_names(contract)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The contract's inputs, the residuals last → out_sample [B,C,H,W]."""
        given = dict(zip(self.names, inputs, strict=True))
        added = None
        if "text_embeds" in given:
            added = {"text_embeds": given["text_embeds"].float(), "time_ids": given["time_ids"]}
        more: dict[str, Any] = {}
        if self.residuals:
            *down, middle = (given[name] for name in self.residuals)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        if self.adapters:
            more["down_intrablock_additional_residuals"] = [given[name] for name in self.adapters]
        output: Tensor = self.unet(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            timestep_cond=given.get(GUIDANCE_EMBEDDING),
            added_cond_kwargs=added,
            **more,
            return_dict=False,
        )[0]
        return output


class ControlNetCall(torch.nn.Module):
    """A `ControlNetModel` with the contract's inputs and outputs as its signature."""

    def __init__(self, controlnet: torch.nn.Module) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `UNetCall` takes, control_image [B,3,8H,8W] and residual_scales → the residuals, the middle's last."""
        *usual, image, scales = inputs
        sample, timestep, states, *added = usual
        names = {"text_embeds": added[0].float(), "time_ids": added[1]} if added else None
        down, middle = self.controlnet(
            sample, timestep, states, controlnet_cond=image, added_cond_kwargs=names, return_dict=False
        )
        return tuple(one * scales[index].to(one.dtype) for index, one in enumerate((*down, middle)))


def unet_call(unet: torch.nn.Module, contract: Contract, *, as_diffusers: bool = False) -> torch.nn.Module:
    """A UNet with a contract's inputs and output as its signature.

    Args:
        as_diffusers: compute IP-Adapters and FreeU by diffusers' own code, which can't be traced.
    """
    if pictures := image_prompt_names(contract):
        others = replace(contract, inputs=tuple(one for one in contract.inputs if one.name not in pictures))
        inner = _freed_call(unet, others, as_diffusers=as_diffusers)
        return ImagePromptCall(inner, unet, contract, as_diffusers=as_diffusers)
    if attentions_of(unet) and attends(contract):  # they would take the text's last tokens for an image's
        raise ExportError(
            "the unet has layers of IP-Adapters, and its contract no inputs for them",
            hint='as in ExportSpec(groups=("ip_adapter:4",)), the number of tokens of each adapter',
        )
    return _freed_call(unet, contract, as_diffusers=as_diffusers)


def _freed_call(unet: torch.nn.Module, contract: Contract, *, as_diffusers: bool) -> torch.nn.Module:
    """A UNet with a contract's inputs and output as its signature, but for image prompts: FreeU's numbers are last."""
    others = tuple(one for one in contract.inputs if one.name != FREE_U)
    plain = _plain_call(unet, replace(contract, inputs=others))
    return plain if others == contract.inputs else FreeUCall(plain, unet, as_diffusers=as_diffusers)


def _plain_call(unet: torch.nn.Module, contract: Contract) -> torch.nn.Module:
    """A UNet with a contract's inputs and outputs as its signature, but for image prompts and FreeU."""
    if taken_feature(contract):
        return ShallowCall(unet, contract)
    if given_feature(contract):
        return WholeCall(_plain_call(unet, replace(contract, outputs=contract.outputs[:1])), unet, contract)
    is_usual = [spec.name for spec in contract.inputs] in (USUAL_INPUTS, [*USUAL_INPUTS, *ADDED_CONDITIONING])
    return UNetCall(unet) if is_usual else NamedUNetCall(unet, contract)


class TextEncoderCall(torch.nn.Module):
    """A CLIP text encoder with the contract's inputs and outputs as its signature.

    It walks the layers itself: how transformers makes its causal mask changes from version to version, and few of the
    ways can be traced. `reference` is the encoder's own way, which the result is checked against.
    """

    def __init__(self, encoder: torch.nn.Module, contract: Contract) -> None:
        super().__init__()
        self.text: Any = getattr(encoder, "text_model", encoder)
        self.projection: Any = getattr(encoder, "text_projection", None)
        self.outputs = [spec.name for spec in contract.outputs]
        self.eos: int = self.text.config.eos_token_id
        weight = self.text.final_layer_norm.weight
        tokens = contract.inputs[0].shape(TRACE_SIZES)[1]
        self.mask = torch.full((tokens, tokens), MASKED, dtype=weight.dtype).triu(1)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """input_ids [B,S] → the contract's outputs."""
        states = self.text.embeddings.token_embedding(input_ids) + self.text.embeddings.position_embedding.weight
        penultimate = states
        for layer in self.text.encoder.layers:
            penultimate = states
            states = states + self._attend(layer.self_attn, layer.layer_norm1(states))
            states = states + layer.mlp(layer.layer_norm2(states))
        found = {"penultimate_hidden_state": penultimate, "last_hidden_state": self.text.final_layer_norm(states)}
        if self.projection is not None:
            found["text_embeds"] = self.projection(self._pooled(found["last_hidden_state"], input_ids))
        return tuple(found[name] for name in self.outputs)

    def _attend(self, attention: Any, states: Tensor) -> Tensor:
        """Causal self-attention, the queries scaled before their product with the keys."""

        tokens, width = states.shape[1:]

        def heads(projected: Tensor) -> Tensor:
            return projected.reshape(-1, tokens, attention.num_heads, width // attention.num_heads).transpose(1, 2)

        queries, keys = heads(attention.q_proj(states) * attention.scale), heads(attention.k_proj(states))
        weights = torch.softmax(queries @ keys.transpose(2, 3) + self.mask, dim=-1)
        joined = (weights @ heads(attention.v_proj(states))).transpose(1, 2).reshape(-1, tokens, width)
        projected: Tensor = attention.out_proj(joined)
        return projected

    def _pooled(self, states: Tensor, ids: Tensor) -> Tensor:
        """The states [B,D] of each row's first end token, by a product with zeros and a one.

        transformers' rule: where the end token's id is 2, a mistake in old configurations, it is the highest id of a
        row; a row without one has its first token's states. TensorRT 8.6 has no ArgMax of whole numbers.
        """
        is_end = ids == (ids.amax(dim=1, keepdim=True) if self.eos == 2 else self.eos)
        tokens = ids.shape[1]
        scores = is_end.to(torch.float32) * torch.arange(tokens, 0.0, -1.0) + torch.tensor([0.5] + [0.0] * (tokens - 1))
        chosen = (scores == scores.amax(dim=1, keepdim=True)).to(states.dtype)
        return (chosen.unsqueeze(1) @ states).squeeze(1)


class VaeDecoderCall(torch.nn.Module):
    """The half of an `AutoencoderKL` or `AutoencoderTiny` that makes images of latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = getattr(vae, "post_quant_conv", None), vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B,C,H,W] → image [B,3,8H,8W]."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        image: Tensor = self.decoder(latents)
        return image


class VaeEncoderCall(torch.nn.Module):
    """The half of an `AutoencoderKL` or `AutoencoderTiny` that makes latents of images."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, getattr(vae, "quant_conv", None)

    def forward(self, image: Tensor) -> Tensor:
        """image [B,3,8H,8W] → moments [B,2C,H,W]: mean and log-variance; of a tiny VAE the latents [B,C,H,W]."""
        moments: Tensor = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)


def component_call(module: torch.nn.Module, contract: Contract) -> torch.nn.Module:
    """The part of a module that is a component, with the contract's inputs and outputs as its signature."""
    if contract.component == "unet":
        return unet_call(module, contract)
    if contract.component == "controlnet":
        return ControlNetCall(module)
    if contract.component == "vae_decoder":
        return VaeDecoderCall(module)
    if contract.component == "vae_encoder":
        return VaeEncoderCall(module)
    return TextEncoderCall(module, contract)


def reference(module: torch.nn.Module, contract: Contract) -> Callable[..., Outputs]:
    """The contract's function of a module as diffusers and transformers themselves compute it, in their own way."""
    own: Any = module
    if contract.component == "unet":
        return unet_call(module, contract, as_diffusers=True)
    if contract.component == "controlnet":
        return ControlNetCall(module)
    if contract.component == "vae_decoder":
        return lambda latents: own.decode(latents).sample
    if contract.component == "vae_encoder":
        return lambda image: _encoded(own.encode(image))
    return partial(_encode_text, own, contract)


def _encoded(result: Any) -> Tensor:
    """What a VAE's encoder gives: a distribution's mean and log-variance, or a tiny VAE's latents themselves."""
    encoded: Tensor = result.latents if hasattr(result, "latents") else result.latent_dist.parameters
    return encoded


def _encode_text(encoder: Any, contract: Contract, input_ids: Tensor) -> tuple[Tensor, ...]:
    """What diffusers' pipelines take of a text encoder's result."""
    result = encoder(input_ids.long(), output_hidden_states=True)
    found = {"last_hidden_state": result.last_hidden_state, "penultimate_hidden_state": result.hidden_states[-2]}
    if contract.component == "text_encoder_2":
        found["text_embeds"] = result.text_embeds
    return tuple(found[spec.name] for spec in contract.outputs)


def example_inputs(contract: Contract) -> tuple[Tensor, ...]:
    """Inputs to trace with, in the contract's order."""
    generator = torch.Generator().manual_seed(0)
    sizes = VAE_TRACE_SIZES if contract.component in VAE_HALVES else TRACE_SIZES
    return tuple(
        torch.rand(spec.shape(sizes), generator=generator).mul(spec.below or 1).to(getattr(torch, spec.dtype))
        for spec in contract.inputs
    )


@contextmanager
def traceable(
    module: torch.nn.Module, *, wide_layers: int = WIDE_LAYERS, upcast: bool = True
) -> Iterator[torch.nn.Module]:
    """A UNet or VAE, for the time of a `with` such that its trace is right at every size, and faithful in fp16.

    Args:
        wide_layers: of how many layers the convolutions of an fp16 UNet compute in fp32, see `wide_convolutions`.
        upcast: spell out in fp32 the attentions that need it (`_overflows`); PyTorch's fused kernels don't.
    """
    with ExitStack() as stack:
        stack.enter_context(attribute(module, "num_upsamplers", ALWAYS_FORWARD_SIZES))
        for part in module.modules():
            if upcast and _overflows(part):
                stack.enter_context(attribute(part, "processor", _attend_in_fp32))
            if _is_plain(part):
                stack.enter_context(attribute(part, "forward", partial(_upsample, part)))
        for convolution in wide_convolutions(module, wide_layers).values():
            stack.enter_context(attribute(convolution, "forward", partial(convolve_in_fp32, convolution)))
        yield module


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

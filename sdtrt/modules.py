"""The facades: what diffusers sees in place of a component that an engine runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sdtrt.components import ADDED_CONDITIONING, CONDITIONING, Contract, is_tiny_vae
from sdtrt.errors import EngineError
from sdtrt.runtime.remembered import Remembered
from sdtrt.runtime.session import Session


class UNetFacade(torch.nn.Module):
    """A `UNet2DConditionModel` for diffusers' pipelines, run by an engine.

    It holds no weights. Tensors may come in any floating-point dtype: they are cast to the engine's, and the result is
    cast back, so that guidance and scheduler keep the pipeline's precision. The last conditioning's cast is kept (a
    fraction of a megabyte an image): the same tensor at the next step needs no other, and no copy in the session.

    Args:
        session: runs the engine; who opened it closes it.
        contract: the engine's inputs and outputs.
        config: the UNet's diffusers configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the session takes its tensors.
    """

    def __init__(
        self, session: Session[torch.Tensor], contract: Contract, config: Mapping[str, Any], device: torch.device
    ) -> None:
        super().__init__()
        self.session = session
        self.contract = contract
        # diffusers' own name: pipelines for old models assign it to mend the configuration.
        self._internal_dict = FrozenDict({**_default_config(UNet2DConditionModel), **config})
        self._device = device
        self._dtypes = {spec.name: _torch_dtype(spec.dtype) for spec in contract.inputs}
        self._casts: dict[str, _Cast] = {}
        if config.get("addition_embed_type") == "text_time":
            width = config["projection_class_embeddings_input_dim"]
            # SDXL's pipelines read the width of the added conditioning from the layer that takes it.
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def config(self) -> FrozenDict:
        """The UNet's configuration, with attribute access as in diffusers."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the engine's latents."""
        return self._dtypes["sample"]

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self._device

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predict the noise (or velocity) in `sample`, as `UNet2DConditionModel.forward` does.

        Args:
            sample: latents `[B,C,H,W]`.
            timestep: a number, a tensor without dimensions, or `[1]` or `[B]`, of any dtype.
            encoder_hidden_states: the prompt's embedding `[B,S,D]`.
            added_cond_kwargs: SDXL's `text_embeds [B,P]` and `time_ids [B,6]`.

        Returns:
            `[B,C,H,W]` in the dtype of `sample`.

        Raises:
            EngineError: where an argument is used that the engine has no input for, or the session refuses one.
        """
        _refuse_unsupported(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
        )
        feeds = {
            "sample": sample,
            "timestep": _per_row(timestep, sample),
            "encoder_hidden_states": encoder_hidden_states,
            **self._added(added_cond_kwargs or {}),
        }
        output = self.session.run({name: self._as_engine_takes_it(name, tensor) for name, tensor in feeds.items()})
        noise = output[self.contract.outputs[0].name].to(sample.dtype)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _as_engine_takes_it(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One input's cast; the same tensor again where the input comes at every step and is unchanged."""
        if name not in CONDITIONING:
            return _cast(tensor, self._device, self._dtypes[name])
        kept, stream = self._casts.pop(name, None), _current_stream(self._device)
        if kept is None or kept.stream != stream or not kept.source.is_still(tensor):
            source, result = Remembered.of(tensor), _cast(tensor, self._device, self._dtypes[name])
            if source is None or result is tensor:
                return result
            kept = _Cast(source, stream, result)
        self._casts[name] = kept
        return kept.result

    def _added(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The added conditioning that the engine takes; refuse any other, and a missing one."""
        wanted = [name for name in ADDED_CONDITIONING if name in self._dtypes]
        unknown = {name: value for name, value in given.items() if name not in wanted}
        _refuse_unsupported(**unknown)
        missing = [name for name in wanted if given.get(name) is None]
        if missing:
            raise EngineError(
                f"the unet needs {' and '.join(missing)} in added_cond_kwargs",
                hint="use a Stable Diffusion XL pipeline with this engine",
            )
        return {name: given[name] for name in wanted}


@dataclass(frozen=True)
class _Cast:
    """What a cast gave, and the CUDA stream that it was made on: on others it may not be there yet."""

    source: Remembered
    stream: int
    result: torch.Tensor


class TextEncoderFacade(torch.nn.Module):
    """A CLIP text encoder for diffusers' pipelines, run by an engine. It holds no weights.

    Args:
        session: runs the engine; who opened it closes it.
        config: the encoder's configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the session takes its tensors.
        dtype: of the pipeline: what the embeddings are cast to.
    """

    def __init__(
        self, session: Session[torch.Tensor], config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        from transformers import CLIPTextConfig

        self.session = session
        self.config = CLIPTextConfig.from_dict(dict(config))
        self.device, self.dtype = device, dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EncodedText:
        """Encode prompts, as `CLIPTextModel.forward` does.

        Args:
            input_ids: `[B,S]`, of any whole-number dtype, padded to the encoder's full length.
            output_hidden_states: taken as it comes: the engine's states are there in any case.

        Raises:
            EngineError: where an argument is used that the engine has no input for, or the session refuses the ids.
        """
        _refuse_unsupported(
            "text encoder",
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_attentions=output_attentions or None,
        )
        outputs = _run(self.session, self.device, input_ids)
        return EncodedText({name: tensor.to(self.dtype) for name, tensor in outputs.items()})


@dataclass(frozen=True)
class EncodedText:
    """Of what a text encoder gives, that which the engine gives, under the names and numbers that diffusers asks for.

    Args:
        tensors: by the names of the contract.
    """

    tensors: Mapping[str, torch.Tensor]

    def __getitem__(self, index: int) -> torch.Tensor:
        """`[0]`, the result itself: pooled text of a `CLIPTextModelWithProjection`, else the last hidden states."""
        if index != 0:
            raise _no_state(f"result {index}")
        return self.tensors["text_embeds" if "text_embeds" in self.tensors else "last_hidden_state"]

    def __getattr__(self, name: str) -> torch.Tensor:
        """A tensor by its name, `last_hidden_state`."""
        tensors: Mapping[str, torch.Tensor] = self.__dict__.get("tensors", {})
        if name not in tensors:
            raise AttributeError(name)
        return tensors[name]

    @property
    def hidden_states(self) -> _HiddenStates:
        """Each layer's states, of which SDXL's pipelines take the last but one."""
        return _HiddenStates(self.tensors["penultimate_hidden_state"])


@dataclass(frozen=True)
class _HiddenStates:
    """Stands in for a tuple of all layers' states, of which an engine gives one."""

    penultimate: torch.Tensor

    def __getitem__(self, index: int) -> torch.Tensor:
        if index != -2:
            raise _no_state(f"hidden states {index}")
        return self.penultimate


def _no_state(what: str) -> EngineError:
    return EngineError(
        f"the engine of the text encoder does not give {what}",
        hint="use --backend torch for clip_skip and the states of other layers",
    )


class VaeFacade(torch.nn.Module):
    """An `AutoencoderKL` (or `AutoencoderTiny`) for diffusers' pipelines: each half is an engine's, PyTorch's, or none.

    Args:
        config: the VAE's configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the sessions take their tensors.
        decoder, encoder: run the engines; who opened them closes them.
        rest: the PyTorch VAE for the half that has no engine; None where nothing will ask for that half.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        *,
        decoder: Session[torch.Tensor] | None = None,
        encoder: Session[torch.Tensor] | None = None,
        rest: Any = None,
    ) -> None:
        super().__init__()
        self.config = FrozenDict(_tiny_config(config) if is_tiny_vae(config) else _full_config(config))
        self.device = device
        self.decoder_session, self.encoder_session, self.rest = decoder, encoder, rest

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder: SDXL's pipelines ask for it before they decode, to widen an fp16 one."""
        if self.decoder_session is None and self.rest is not None:
            dtype: torch.dtype = self.rest.dtype
            return dtype
        session = self.decoder_session or self.encoder_session
        assert session is not None, "a VAE without engines needs no facade"
        return _torch_dtype(session.inputs[0].dtype)

    @property
    def post_quant_conv(self) -> torch.nn.Module:
        """The layer that SDXL's pipelines read the decoder's dtype from, once they have widened it."""
        layer: torch.nn.Module = self._half("decoder").post_quant_conv
        return layer

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents `[B,C,H,W]` → images `[B,3,8H,8W]` in the engine's dtype or that of `z`, whichever is wider."""
        if self.decoder_session is None:
            decoded: DecoderOutput | tuple[torch.Tensor] = self._half("decoder").decode(z, return_dict=return_dict)
            return decoded
        (image,) = _run(self.decoder_session, self.device, z).values()
        image = image.to(torch.promote_types(image.dtype, z.dtype))
        return DecoderOutput(sample=image) if return_dict else (image,)

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | AutoencoderTinyOutput | tuple[DiagonalGaussianDistribution | torch.Tensor]:
        """Images `[B,3,8H,8W]` → the distribution of their latents (a tiny VAE's: them), in the dtype of `x`."""
        if self.encoder_session is None:
            encoded: AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]
            encoded = self._half("encoder").encode(x, return_dict=return_dict)
            return encoded
        (given,) = _run(self.encoder_session, self.device, x).values()
        if is_tiny_vae(self.config):
            latents = given.to(x.dtype)
            return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)
        distribution = DiagonalGaussianDistribution(given.to(x.dtype))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _half(self, name: str) -> Any:
        """The PyTorch VAE, for the half that no engine runs."""
        if self.rest is None:
            raise EngineError(
                f"this pipeline was opened without the VAE's {name}",
                hint="open it for img2img to encode images" if name == "encoder" else "use --backend torch",
            )
        return self.rest


def _run(session: Session[torch.Tensor], device: torch.device, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run an engine on tensors in the order of its inputs, each cast to what the engine takes."""
    pairs = zip(session.inputs, tensors, strict=True)
    return session.run({spec.name: _cast(tensor, device, _torch_dtype(spec.dtype)) for spec, tensor in pairs})


def _cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """An input as an engine takes it: its dtype, on its device, contiguous."""
    return tensor.to(device=device, dtype=dtype).contiguous()


def _default_config(cls: Any) -> dict[str, Any]:
    """The configuration of a diffusers model that sets nothing: old models' files leave newer entries out."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: value.default for name, value in parameters.items() if value.default is not inspect.Parameter.empty}


def _full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A full VAE's configuration, whole."""
    return {**_default_config(AutoencoderKL), **config}


def _tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tiny VAE's configuration, whole, with what its class itself adds to what is stored."""
    whole = {**_default_config(AutoencoderTiny), **config}
    return whole | {"block_out_channels": whole["decoder_block_out_channels"], "force_upcast": False}


def _current_stream(device: torch.device) -> int:
    """The handle of a GPU's current CUDA stream; 0 on a CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _torch_dtype(name: str) -> torch.dtype:
    """`float16` → `torch.float16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _per_row(timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
    """The timestep as float32 `[B]`: int64 on the way in would be narrowed by TensorRT 8.6, float16 would round."""
    tensor = torch.as_tensor(timestep).to(torch.float32)
    if tensor.numel() == 1 and tensor.device.type == "cpu":  # as an argument of the kernel: nothing to copy or wait for
        return torch.full((sample.shape[0],), tensor.item(), device=sample.device)
    tensor = tensor.to(sample.device)
    return tensor.reshape(-1).expand(sample.shape[0])


def _refuse_unsupported(part: str = "unet", /, **arguments: object) -> None:
    """Raise `EngineError` naming the arguments that are in use."""
    used = [name for name, value in arguments.items() if value is not None]
    if used:
        raise EngineError(
            f"the engine of the {part} has no input for {', '.join(used)}",
            hint="use --backend torch for ControlNet, IP-Adapter, LoRA scales and attention masks",
        )

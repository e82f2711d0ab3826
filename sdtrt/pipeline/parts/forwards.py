"""What the `forward` methods of Stable Diffusion's parts take and give, with an engine to compute it.

They know tensors and arguments, and nothing of modules: any module's `forward` can be one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.session import Session
from sdtrt.backends.unchanged import TensorSnapshot
from sdtrt.common.errors import EngineError, NotInEngineError, UnservedCallError
from sdtrt.pipeline.parts.residuals import adapter_feeds, residual_feeds
from sdtrt.specs.contract import ADDED_CONDITIONING, CONDITIONING, GUIDANCE_EMBEDDING, Contract
from sdtrt.specs.groups import FREE_U, adapter_names, residual_names
from sdtrt.specs.image_prompts import image_prompt_names

ADAPTER = "down_intrablock_additional_residuals"  # what diffusers passes T2I-Adapters' tensors as


class UNetForward:
    """`UNet2DConditionModel.forward`, run by an engine.

    Tensors may come in any floating-point dtype: they are cast to the engine's, and the result is cast back, so that
    guidance and scheduler keep the pipeline's precision. The last conditioning's cast is kept (a fraction of a megabyte
    an image): the same tensor at the next step needs no other, and no copy in the session.

    Args:
        session: runs the engine; who opened it closes it.
        contract: the engine's inputs and outputs.
        device: where the session takes its tensors.
        way_out: what runs a call that the engine has no input for.
    """

    def __init__(
        self,
        session: Session[torch.Tensor],
        contract: Contract,
        device: torch.device,
        way_out: str = "use --backend torch",
    ) -> None:
        self.session, self.contract = session, contract
        self._device, self._way_out = device, way_out
        self._dtypes = {spec.name: torch_dtype(spec.dtype) for spec in contract.inputs}
        self._casts: dict[str, _Cast] = {}

    @property
    def has_residuals(self) -> bool:
        """Whether the engine has inputs for what ControlNets give."""
        return bool(residual_names(self.contract))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the engine's latents."""
        return self._dtypes["sample"]

    def __call__(
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
            sample: latents `[B,C,H,W]`; of inpainting models with the mask and the masked image's latents.
            timestep: a number, a tensor without dimensions, or `[1]` or `[B]`, of any dtype.
            encoder_hidden_states: the prompt's embedding `[B,S,D]`.
            timestep_cond: a guidance scale's embedding `[B,T]`, for an engine of a consistency model.
            added_cond_kwargs: SDXL's `text_embeds [B,P]` and `time_ids [B,6]`.
            down_block_additional_residuals, mid_block_additional_residual: what ControlNets add, both or neither.
            down_intrablock_additional_residuals: what T2I-Adapters add.

        Returns:
            `[B,C,H,W]` in the dtype of `sample`.

        Raises:
            EngineError: where an argument is used that the engine has no input for, or the session refuses one.
        """
        self.refuse(
            class_labels=class_labels,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            encoder_attention_mask=encoder_attention_mask,
            **self._unusable(down_block_additional_residuals, mid_block_additional_residual),
            **({} if adapter_names(self.contract) else {ADAPTER: down_intrablock_additional_residuals}),
        )
        residuals = residual_feeds(
            self.contract, sample, down_block_additional_residuals, mid_block_additional_residual
        )
        residuals |= adapter_feeds(self.contract, sample, down_intrablock_additional_residuals)
        added = dict(added_cond_kwargs or {})
        more = {**residuals, **self._guidance(timestep_cond, sample), **self._free_u(added.pop(FREE_U, None), sample)}
        feeds = self.feeds(sample, timestep, encoder_hidden_states, added, more)
        noise = self.evaluate(feeds, timestep, encoder_hidden_states).to(sample.dtype)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def evaluate(
        self, feeds: dict[str, torch.Tensor], timestep: torch.Tensor | float, states: torch.Tensor
    ) -> torch.Tensor:
        """The noise `[B,C,H,W]` in the engine's dtype.

        Args:
            feeds: the engine's inputs.
            timestep, states: of the call, as its pipeline passes them: they tell one run's steps from another's.
        """
        return self.session.run(feeds)[self.contract.outputs[0].name]

    def _unusable(self, down: tuple[torch.Tensor, ...] | None, middle: torch.Tensor | None) -> dict[str, object]:
        """The residuals of a call, by diffusers' names, where the engine has no inputs for them or half is missing."""
        if self.has_residuals and (down is None) == (middle is None):
            return {}
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def feeds(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added: Mapping[str, torch.Tensor],
        more: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The engine's inputs, of the arguments that diffusers' pipelines call a UNet with."""
        given = {"sample": sample, "encoder_hidden_states": encoder_hidden_states, **self._added(added), **more}
        refuse_gradients(self.contract.component, {**given, "timestep": timestep})
        given["timestep"] = _per_row(timestep, sample)
        return {name: self._as_engine_takes_it(name, tensor) for name, tensor in given.items()}

    def _as_engine_takes_it(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One input's cast; the same tensor again where the input comes at every step and is unchanged."""
        if name not in CONDITIONING:
            return _cast(tensor, self._device, self._dtypes[name])
        kept, stream = self._casts.pop(name, None), _current_stream(self._device)
        if kept is None or kept.stream != stream or not kept.source.is_still(tensor):
            source, result = TensorSnapshot.of(tensor), _cast(tensor, self._device, self._dtypes[name])
            if source is None or result is tensor:
                return result
            kept = _Cast(source, stream, result)
        self._casts[name] = kept
        return kept.result

    def refuse(self, **arguments: object) -> None:
        """Raise `EngineError` naming the arguments that are in use."""
        _refuse_unsupported(self.contract.component, self._way_out, **arguments)

    def _guidance(self, given: torch.Tensor | None, sample: torch.Tensor) -> dict[str, torch.Tensor]:
        """A guidance scale's embedding as the engine takes it; zeros where a call has none.

        They add nothing, as the layer that takes them has no bias. Refuse one that the engine has no input for.
        """
        spec = next((one for one in self.contract.inputs if one.name == GUIDANCE_EMBEDDING), None)
        if spec is None:
            self.refuse(timestep_cond=given)
            return {}
        rows = sample.shape[0]
        if given is None:
            return {spec.name: sample.new_zeros((rows, int(spec.dims[1])))}
        return {spec.name: given if given.shape[0] == rows else given.expand(rows, -1)}

    def _free_u(self, given: torch.Tensor | None, sample: torch.Tensor) -> dict[str, torch.Tensor]:
        """FreeU's numbers as the engine takes them; ones, which change nothing, where a call has none."""
        if FREE_U not in self._dtypes:
            self.refuse(free_u=given)
            return {}
        return {FREE_U: sample.new_ones(4) if given is None else given}

    def _added(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The added conditioning that the engine takes; refuse any other, and a missing one."""
        names = (*ADDED_CONDITIONING, *image_prompt_names(self.contract))
        wanted = [name for name in names if name in self._dtypes]
        unknown = {name: value for name, value in given.items() if name not in wanted}
        self.refuse(**unknown)
        missing = [name for name in wanted if given.get(name) is None]
        if missing:
            raise EngineError(
                f"the {self.contract.component} needs {' and '.join(missing)} in added_cond_kwargs",
                hint="use a Stable Diffusion XL pipeline with this engine",
            )
        return {name: given[name] for name in wanted}


@dataclass(frozen=True)
class _Cast:
    """What a cast gave, and the CUDA stream that it was made on: on others it may not be there yet."""

    source: TensorSnapshot
    stream: int
    result: torch.Tensor


class TextForward:
    """`CLIPTextModel.forward`, run by an engine.

    Args:
        session: runs the engine; who opened it closes it.
        device: where the session takes its tensors.
        dtype: of the pipeline: what the embeddings are cast to.
        way_out: what runs a call that the engine has no input for.
    """

    def __init__(
        self,
        session: Session[torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        way_out: str = "use --backend torch",
    ) -> None:
        self.session, self._device, self._dtype, self._way_out = session, device, dtype, way_out

    def __call__(
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
            self._way_out,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_attentions=output_attentions or None,
        )
        outputs = run(self.session, self._device, input_ids)
        return EncodedText({name: tensor.to(self._dtype) for name, tensor in outputs.items()})


@dataclass(frozen=True)
class EncodedText:
    """Of what a text encoder gives, that which the engine gives, under the names and numbers that diffusers asks for.

    Args:
        tensors: by the names of the contract.
    """

    tensors: Mapping[str, torch.Tensor]

    def __getitem__(self, index: int | str) -> torch.Tensor:
        """A tensor by its name; `[0]`, the result itself: the pooled text of a `CLIPTextModelWithProjection`, of others
        the last hidden states.
        """
        if isinstance(index, str):
            return self.__getattr__(index)
        if index != 0:
            raise _no_state(f"result {index}")
        return self.tensors["text_embeds" if "text_embeds" in self.tensors else "last_hidden_state"]

    def __getattr__(self, name: str) -> torch.Tensor:
        """A tensor by its name, `last_hidden_state`."""
        tensors: Mapping[str, torch.Tensor] = self.__dict__.get("tensors", {})
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in tensors:
            raise _no_state(name)
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


def _no_state(what: str) -> NotInEngineError:
    return NotInEngineError(
        f"the engine of the text encoder does not give {what}",
        hint="use --backend torch for clip_skip and the states of other layers",
    )


def run(session: Session[torch.Tensor], device: torch.device, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run an engine on tensors in the order of its inputs, each cast to what the engine takes."""
    pairs = list(zip(session.inputs, tensors, strict=True))
    refuse_gradients(session.contract.component, {spec.name: tensor for spec, tensor in pairs})
    return session.run({spec.name: _cast(tensor, device, torch_dtype(spec.dtype)) for spec, tensor in pairs})


def _cast(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """An input as an engine takes it: its dtype, on its device, contiguous."""
    return tensor.to(device=device, dtype=dtype).contiguous()


def _current_stream(device: torch.device) -> int:
    """The handle of a GPU's current CUDA stream; 0 on a CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def torch_dtype(name: str) -> torch.dtype:
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


def _refuse_unsupported(part: str, way_out: str, /, **arguments: object) -> None:
    """Raise `UnservedCallError` naming the arguments that are in use."""
    used = [name for name, value in arguments.items() if value is not None]
    if used:
        raise UnservedCallError(
            f"the engine of the {part} has no input for {', '.join(used)}",
            hint=f"{way_out} for ControlNet, IP-Adapter, LoRA scales and attention masks",
        )

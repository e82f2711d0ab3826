"""The facades: what diffusers sees in place of a component that an engine runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sdtrt.components import Contract
from sdtrt.errors import EngineError
from sdtrt.runtime.session import Session

# What the inputs of an engine beyond those of every UNet are called in diffusers' `added_cond_kwargs`.
ADDED_INPUTS = ("text_embeds", "time_ids")


class UNetFacade(torch.nn.Module):
    """A `UNet2DConditionModel` for diffusers' pipelines, run by an engine.

    It holds no weights. Tensors may come in any floating-point dtype: they are cast to the engine's, and the result is
    cast back, so that guidance and scheduler keep the pipeline's precision.

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
        self._internal_dict = FrozenDict({**_default_config(), **config})
        self._device = device
        self._dtypes = {spec.name: _torch_dtype(spec.dtype) for spec in contract.inputs}
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
        output = self.session.run({name: self._cast(name, tensor) for name, tensor in feeds.items()})
        noise = output[self.contract.outputs[0].name].to(sample.dtype)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One input as the engine takes it: its dtype, on its device, contiguous."""
        return tensor.to(device=self._device, dtype=self._dtypes[name]).contiguous()

    def _added(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The added conditioning that the engine takes; refuse any other, and a missing one."""
        wanted = [name for name in ADDED_INPUTS if name in self._dtypes]
        unknown = {name: value for name, value in given.items() if name not in wanted}
        _refuse_unsupported(**unknown)
        missing = [name for name in wanted if given.get(name) is None]
        if missing:
            raise EngineError(
                f"the unet needs {' and '.join(missing)} in added_cond_kwargs",
                hint="use a Stable Diffusion XL pipeline with this engine",
            )
        return {name: given[name] for name in wanted}


def _default_config() -> dict[str, Any]:
    """The configuration of a `UNet2DConditionModel` that sets nothing: old models' files leave newer entries out."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: value.default for name, value in parameters.items() if value.default is not inspect.Parameter.empty}


def _torch_dtype(name: str) -> torch.dtype:
    """`float16` → `torch.float16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _per_row(timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
    """The timestep as float32 `[B]`: int64 on the way in would be narrowed by TensorRT 8.6, float16 would round."""
    tensor = torch.as_tensor(timestep, device=sample.device).to(torch.float32)
    return tensor.reshape(-1).expand(sample.shape[0])


def _refuse_unsupported(**arguments: object) -> None:
    """Raise `EngineError` naming the arguments that are in use."""
    used = [name for name, value in arguments.items() if value is not None]
    if used:
        raise EngineError(
            f"the engine of the unet has no input for {', '.join(used)}",
            hint="use --backend torch for ControlNet, IP-Adapter, LoRA scales and attention masks",
        )

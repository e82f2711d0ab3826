"""What the `forward` of a ControlNet takes and gives, with an engine to compute it. Knows tensors, and no module."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput

from sdtrt.backends.session import Session
from sdtrt.pipeline.parts.forwards import UNetForward
from sdtrt.specs.groups import CONTROL_IMAGE, RESIDUAL_SCALES

WEAKEST = -1.0  # the power of ten that the first residual is scaled with in guess mode


class ControlNetForward:
    """`ControlNetModel.forward`, run by an engine.

    Args:
        session: runs the engine; who opened it closes it.
        device: where the session takes its tensors.
        way_out: what runs a call that the engine has no input for.
    """

    def __init__(self, session: Session[torch.Tensor], device: torch.device, way_out: str) -> None:
        self.session, self._device = session, device
        self._usual = UNetForward(session, session.contract, device, way_out)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: torch.Tensor | float = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[list[torch.Tensor], torch.Tensor]:
        """What a UNet's skip connections and middle block get added, as `ControlNetModel.forward` gives it.

        Args:
            sample: latents `[B,C,H,W]`.
            controlnet_cond: the control image `[B,3,8H,8W]`.
            conditioning_scale: the strength, which the residuals are multiplied by.
            guess_mode: scale the residuals from a tenth for the first to all for the middle block's.

        Raises:
            EngineError: where an argument is used that the engine has no input for, or the session refuses one.
        """
        self._usual.refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
        )
        scales = self._scales(conditioning_scale, guess_mode)
        own = {CONTROL_IMAGE: controlnet_cond, RESIDUAL_SCALES: scales}
        feeds = self._usual.feeds(sample, timestep, encoder_hidden_states, added_cond_kwargs or {}, own)
        found = self.session.run(feeds)
        *down, middle = (found[spec.name].to(sample.dtype) for spec in self.session.contract.outputs)
        if not return_dict:
            return down, middle
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=middle)

    def _scales(self, scale: torch.Tensor | float, guess_mode: bool) -> torch.Tensor:
        """What each residual is multiplied by, `[13]` for SD 1.x, as diffusers scales it."""
        count = len(self.session.contract.outputs)
        if guess_mode:
            return torch.logspace(WEAKEST, 0, count, device=self._device) * scale
        return torch.ones(count, device=self._device) * scale

"""What diffusers sees in place of a ControlNet that an engine runs, and of several, engines' and PyTorch's.

Knows facades and diffusers' classes. Knows no file and no engine's entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.configuration_utils import FrozenDict

from sdtrt.backends.session import Session
from sdtrt.pipeline.parts.control_forward import ControlNetForward
from sdtrt.pipeline.parts.facades import DiffusersFacade, default_config
from sdtrt.pipeline.parts.forwards import torch_dtype


class ControlNetFacade(DiffusersFacade):
    """A `ControlNetModel` for diffusers' pipelines, run by an engine: its `forward` is a `ControlNetForward`.

    Pipelines ask whether it is a `ControlNetModel`, and it says so.

    Args:
        session: runs the engine; who opened it closes it.
        config: the ControlNet's diffusers configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the session takes its tensors.
    """

    def __init__(self, session: Session[torch.Tensor], config: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(ControlNetModel, session.contract.component)
        self.session = session
        self.forward = ControlNetForward(session, device, "use --backend torch")
        self._internal_dict = FrozenDict({**default_config(ControlNetModel), **config})
        self.device, self.dtype = device, torch_dtype(session.inputs[0].dtype)

    @property  # type: ignore[misc]  # it can't be set, as a module's own can
    def __class__(self) -> type:
        """What `isinstance` asks, beside the type."""
        made: type = ControlNetModel
        return made

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Engines need no slicing: they have the memory for the sizes that they were built for."""


class _Several(MultiControlNetModel):  # type: ignore[misc]  # diffusers is not typed
    """Several ControlNets, whose dtype and device are the first one's: those of engines have no parameters to ask."""

    @property
    def dtype(self) -> torch.dtype:
        """What control images are cast to."""
        dtype: torch.dtype = self.nets[0].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where they take their tensors."""
        device: torch.device = self.nets[0].device
        return device


def together(nets: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Several ControlNets as one part of a pipeline: diffusers sums their residuals."""
    made: torch.nn.Module = _Several(list(nets))
    return made

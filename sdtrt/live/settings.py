"""What the parts of an accelerated pipeline have in common: what was asked for, and where engines are looked for.

Knows the pipeline's modules, which it does not keep alive. Opens and runs no engine.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import ref

import torch

from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.live import LiveModel
from sdtrt.models.resolve import Model
from sdtrt.pipeline.opening.request import EngineRequest
from sdtrt.specs import COMPONENTS, BackendName, Component, Group, ModelSpec, Precision, Savings, Sizes

OnMiss = Literal["build", "torch", "error"]
ON_MISS: tuple[str, ...] = ("build", "torch", "error")


@dataclass(frozen=True)
class Settings:
    """What the parts of an accelerated pipeline have in common.

    Args:
        spec: of the model: its name.
        stored: the model in files that the pipeline was loaded from, where it lies on this machine.
        modules: the pipeline's, which are not kept alive.
        precision: that is asked for; a component may have another (`Backend.precision_of`).
        on_miss: what happens at a call that no engine has the size of.
        lock: the parts' engines share memory, and run one at a time.
        savings: what of a run's work is left out.
        deep_groups: of the UNet's engine, where a deep feature is kept.
    """

    spec: ModelSpec
    stored: Model | None
    modules: Mapping[str, ref[torch.nn.Module]]
    backend: BackendName
    precision: Precision
    directory: EngineDirectory
    device: torch.device
    on_miss: OnMiss
    console: Console
    lock: threading.RLock
    savings: Savings = field(default_factory=Savings)
    deep_groups: tuple[Group, ...] = ()

    @property
    def model(self) -> LiveModel:
        """The model as the pipeline has it now."""
        modules = {name: module for name, one in self.modules.items() if (module := one()) is not None}
        return LiveModel(self.spec, modules, self.stored)

    def of(self, name: str) -> Settings:
        """Those of one part: of a further ControlNet (`controlnet_2`) they have it in the place of the first one."""
        if name in COMPONENTS:
            return self
        return replace(self, modules={**self.modules, "controlnet": self.modules[name]})

    def request(self, sizes: Sizes, component: Component, groups: tuple[Group, ...]) -> EngineRequest:
        """The engine for a call of one component; `sizes` are that call's."""
        images = sizes.batch
        return EngineRequest(self.model, self.backend, self.precision, sizes, (component,), images, self.device, groups)

"""The backend `torch`: diffusers' own modules. It has no engines; engines are compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sdtrt.backends.backend import Backend, BuildJob, Device, refuse_quantised
from sdtrt.common import host
from sdtrt.common.errors import EngineError
from sdtrt.specs import Precision

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session
    from sdtrt.engines.entry import Entry

NATIVE = "torch"


class Native(Backend):
    """PyTorch on the GPU where it can use one, else on the CPU."""

    title: ClassVar[str] = "PyTorch"
    devices: ClassVar[tuple[Device, ...]] = ("cuda", "cpu")

    def device(self) -> Device:
        return "cuda" if host.torch_sees_gpu() else "cpu"

    def why_not(self) -> None:
        return None  # sdtrt itself needs it

    def version(self) -> str:
        return str(host.library_version("torch"))

    def default_precision(self) -> Precision:
        return "fp16" if host.torch_sees_gpu() else "fp32"

    def check_precision(self, precision: str) -> None:
        refuse_quantised(self.title, precision)

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        raise AssertionError("`check` refuses it")

    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        raise EngineError(f"{entry.name} is for {self.name}, which has no engines", hint=entry.removal)

"""What ONNX Runtime on the CPU gives as a backend. Its library is imported inside functions only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sdtrt.backends.backend import (
    Backend,
    BuildJob,
    Device,
    Source,
    installed_version,
    refuse_quantised,
    refuse_tensorrt_options,
)
from sdtrt.common import host
from sdtrt.common.errors import UsageError
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.specs import BuildSpec, Precision

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session


class OnnxRuntime(Backend):
    """Engines that serve every size, on the processor that they were optimised for."""

    title: ClassVar[str] = "ONNX Runtime"
    format: ClassVar[int] = 8  # attentions fused
    source: ClassVar[Source | None] = "onnx"
    devices: ClassVar[tuple[Device, ...]] = ("cpu",)
    takes_any_size: ClassVar[bool] = True

    def version(self) -> str:
        return installed_version(self.title, "onnxruntime", "onnxruntime")

    def default_precision(self) -> Precision:
        return "fp32"

    def check_precision(self, precision: str) -> None:
        if precision == "bf16":
            raise UsageError(
                "ONNX Runtime's CPU provider does not compute in bf16", hint="use --precision fp32 with this backend"
            )
        refuse_quantised(self.title, precision)

    def check(self, spec: BuildSpec) -> None:
        super().check(spec)
        refuse_tensorrt_options(f"{self.title} engines have", spec)

    def host_key(self, compute_capability: tuple[int, int] | None = None) -> dict[str, Any]:
        """The processor, which decides an optimised model's layouts."""
        return {"processor": host.processor_name(), "instructions": list(host.instruction_sets())}

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        from sdtrt.backends.onnxruntime.build import optimize

        return optimize(job.onnx, job.folder, job.contract, job.console)

    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        from sdtrt.backends.onnxruntime.session import ONNXRUNTIME_FILE, OnnxRuntimeSession

        contract = stored_contract(entry)
        return OnnxRuntimeSession(entry.verified(ONNXRUNTIME_FILE), contract)

"""What OpenVINO gives as a backend: engines compiled for one processor. Its library is imported in functions only."""

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
    require_one_profile,
)
from sdtrt.common import host
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.models.components import STEPPING
from sdtrt.models.source import ModelSource
from sdtrt.specs import BuildSpec, Component, Precision

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})  # of processors that multiply in bf16; others would emulate it


class OpenVino(Backend):
    """Engines for one range of sizes, on the processor (or OpenVINO's other device) that they were compiled for."""

    title: ClassVar[str] = "OpenVINO"
    format: ClassVar[int] = 2  # since 2 the weights are in the one file
    source: ClassVar[Source | None] = "onnx"
    devices: ClassVar[tuple[Device, ...]] = ("cpu",)

    def is_automatic(self, device: str) -> bool:
        return False

    def version(self) -> str:
        return installed_version(self.title, "openvino", "'sdtrt[openvino]'")

    def default_precision(self) -> Precision:
        return "fp32" if _on_cpu() else "fp16"

    def choose_device(self, name: str) -> None:
        """Compute on one of OpenVINO's devices: `CPU`, `GPU`, `GPU.1`, `NPU`."""
        from sdtrt.backends.openvino import library

        self.version()
        library.choose_device(name)

    def device_title(self) -> str | None:
        from sdtrt.backends.openvino import library

        return None if _on_cpu() else f"OpenVINO {library.device()}"

    def precision_of(self, model: ModelSource, component: Component, precision: Precision) -> Precision:
        """fp32 for what runs once an image: there bf16 wins little time, and a picture has as many bits as bf16."""
        if not _on_cpu():
            return super().precision_of(model, component, precision)
        return precision if component in STEPPING else "fp32"

    def check_precision(self, precision: str) -> None:
        refuse_quantised(self.title, precision)
        if not _on_cpu():
            return
        if precision not in ("fp32", "bf16"):
            raise UsageError(
                f"OpenVINO computes in fp32 or bf16 on a CPU, not in {precision}", hint="use --precision fp32 or bf16"
            )
        if precision == "bf16" and not host.processor_flags() & BF16_FLAGS:
            raise UsageError(
                f"{host.processor_name()} has no instructions for bf16 ({' or '.join(sorted(BF16_FLAGS))})",
                hint="use --precision fp32",
            )

    def check(self, spec: BuildSpec) -> None:
        super().check(spec)
        refuse_tensorrt_options(f"{self.title} has", spec)
        require_one_profile(self.title, spec)

    def host_key(self, compute_capability: tuple[int, int] | None = None) -> dict[str, Any]:
        """The processor, which decides a compiled model's layouts and kernels; or another device, by its full name."""
        from sdtrt.backends.openvino import library

        if not _on_cpu():
            return {"device": library.device(), "device_name": library.full_name()}
        bf16 = sorted(host.processor_flags() & BF16_FLAGS)
        return {
            "processor": host.processor_name(),
            "instructions": list(host.instruction_sets()),
            "bf16_instructions": bf16,
        }

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        from sdtrt.backends.openvino.build import build

        (profile,) = job.spec.profiles
        return build(job.onnx, job.folder, job.contract, profile, job.console)

    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        from sdtrt.backends.openvino.session import OPENVINO_FILE, OpenVinoSession

        model = entry.verified(OPENVINO_FILE)
        if not self.runs_here()(entry.engine_key):  # OpenVINO itself may take it, and crash
            raise EngineError(
                f"{entry.name} was compiled for another processor or version of OpenVINO than this one",
                hint=f"build it here: sdtrt build --backend {self.name}; {entry.removal} drops that one",
            )
        return OpenVinoSession(model, stored_contract(entry))


def _on_cpu() -> bool:
    """Whether OpenVINO computes on the processor."""
    from sdtrt.backends.openvino import library

    return library.device() == library.CPU

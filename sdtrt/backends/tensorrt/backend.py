"""What TensorRT and TensorRT for RTX give as backends. The libraries are imported inside functions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdtrt.backends.backend import Backend, BuildJob, Device, Loader, Source
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common import host
from sdtrt.common.errors import BuildError, SdtrtError, UsageError
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.engines.keys import EngineKey
from sdtrt.models.components import graph_precision
from sdtrt.models.source import ModelSource
from sdtrt.specs import QUANTISED, BuildSpec, Component, ExportSpec, Precision

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session

FP8_SINCE = (8, 9)  # the compute capability that has products of fp8
AHEAD_OF_TIME = "tensorrt-rtx"  # finishes its kernels at run time: an engine serves all of one compute capability


class TensorRT(Backend):
    """Engines of one plan each, for one GPU and the sizes of their profiles."""

    title: ClassVar[str] = "TensorRT"
    format: ClassVar[int] = 7  # of a VAE on 8.6
    source: ClassVar[Source | None] = "onnx"
    devices: ClassVar[tuple[Device, ...]] = ("cuda",)
    loads_ahead: ClassVar[bool] = True

    @property
    def modules(self) -> tuple[str, ...]:
        return libraries.MODULES.get(self.name, ())

    def why_not(self) -> SdtrtError | None:
        try:
            library = libraries.open_library(self.name)
            libraries.require_gpu(library)
            libraries.require_builder(library)
        except SdtrtError as error:
            return error
        return None

    def version(self) -> str:
        return libraries.version(self.name)

    def default_precision(self) -> Precision:
        return "fp16"

    def precision_of(self, model: ModelSource, component: Component, precision: Precision) -> Precision:
        """As of ONNX graphs: the UNet's alone is in 8 bits, and what runs beside it in fp16."""
        return graph_precision(model, component, precision)

    def check(self, spec: BuildSpec) -> None:
        super().check(spec)
        self._check_quantised(spec)
        if not spec.profiles:
            raise UsageError(f"{self.name} engines need a profile", hint="use --height 512 --width 512")

    def _check_quantised(self, spec: BuildSpec) -> None:
        """Raise `UsageError` for 8 bits that a component's graph, or the GPU that is built for, does not have."""
        precision, component = spec.export.precision, spec.export.component
        if precision in QUANTISED and component != "unet":
            raise UsageError(
                f"the {component} has no {self.name} engine in {precision}",
                hint=f"build it with --precision {self.default_precision()}, which runs beside a UNet in {precision}",
            )
        built_for = spec.compute_capability or next((gpu.compute_capability for gpu in host.gpus()), None)
        if precision == "fp8" and built_for is not None and built_for < FP8_SINCE:
            raise UsageError(
                f"fp8 needs a GPU of compute capability {_dotted(FP8_SINCE)} or later, and {_dotted(built_for)} is"
                " built for",
                hint="use --precision int8 or fp16",
            )

    def serves(self, option: str, export: ExportSpec) -> bool:
        return option == "compute-capability" and self.name == AHEAD_OF_TIME

    def host_key(self, compute_capability: tuple[int, int] | None = None) -> dict[str, Any]:
        """The GPU, or its compute capability alone."""
        if compute_capability is not None:
            return {"compute_capability": list(compute_capability)}
        gpus = host.gpus()
        if not gpus:
            raise BuildError(
                f"{self.name} needs an NVIDIA GPU, and the driver shows none",
                hint="check nvidia-smi; without a GPU use --backend onnxruntime",
            )
        capability = {"compute_capability": list(gpus[0].compute_capability)}
        return capability if self.name == AHEAD_OF_TIME else {"gpu": gpus[0].name, **capability}

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        from sdtrt.backends.tensorrt.build import build_plan

        return build_plan(
            job.onnx, job.folder, job.contract, job.spec, timing_cache=self.timing_cache(job), console=job.console
        )

    def timing_cache(self, job: BuildJob) -> Path:
        """The file of kernel timings for this version and the GPU that is built for."""
        gpu = self.host_key(job.spec.compute_capability)
        words = (self.name, self.version(), gpu.get("gpu", "sm"), *gpu["compute_capability"])
        return job.directory.timing_cache("-".join(str(word) for word in words))

    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        from sdtrt.backends.tensorrt.session import TensorRTSession

        contract = stored_contract(entry)
        plan, compatible = self.proven_plan(entry)
        return TensorRTSession(
            plan, contract, backend=self.name, device=device, allow_host_code=compatible, scratch=scratch
        )

    def loader(self, entry: Entry, wanted: Callable[[], bool]) -> Loader:
        from sdtrt.backends.tensorrt.plan import load_plan

        contract, library = stored_contract(entry), libraries.open_library(self.name)
        plan, compatible = self.proven_plan(entry, ahead=wanted)
        return lambda device: load_plan(plan, contract, library, device, allow_host_code=compatible)

    def proven_plan(self, entry: Entry, *, ahead: Callable[[], bool] | None = None) -> tuple[Path, bool]:
        """The plan of a held entry, proven with all that is named after it, and whether it may bring its own runtime.

        Raises:
            CacheError: where a file is not what was published.
        """
        from sdtrt.backends.tensorrt.plan import TENSORRT_FILE

        plan = entry.verified(TENSORRT_FILE, ahead=ahead)
        key = entry.parsed_key
        return plan, isinstance(key, EngineKey) and key.is_version_compatible


def _dotted(capability: tuple[int, int]) -> str:
    """(8, 9) → `8.9`."""
    return ".".join(map(str, capability))

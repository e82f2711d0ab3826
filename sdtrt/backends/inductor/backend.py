"""What PyTorch's Inductor gives as a backend: engines free of weights. PyTorch is imported inside functions only."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from sdtrt.backends.backend import (
    Backend,
    BuildJob,
    Device,
    Source,
    installed_version,
    refuse_tensorrt_options,
    require_one_profile,
)
from sdtrt.common import host
from sdtrt.common.errors import BuildError, EngineError, SdtrtError, UsageError
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.models.components import STEPPING
from sdtrt.models.source import ModelSource
from sdtrt.specs import QUANTISED, BuildSpec, Component, Precision

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session

GPUS_WITH = {"int8": (8, 0), "fp8": (8, 9)}  # the compute capability that has products of 8 bits, and bf16 beside them


class Inductor(Backend):
    """Engines that serve every checkpoint of an architecture: code alone, compiled for one GPU or processor."""

    title: ClassVar[str] = "PyTorch Inductor"
    format: ClassVar[int] = 1
    source: ClassVar[Source | None] = "program"
    devices: ClassVar[tuple[Device, ...]] = ("cuda", "cpu")
    weights_inside: ClassVar[bool] = False
    asks_for_scratch: ClassVar[bool] = True
    expectation: ClassVar[str] = "measured on an H200: faster than TensorRT 8.6, and sooner built"

    def device(self) -> Device:
        # The driver is asked first: without a GPU nothing that lists engines imports PyTorch for this.
        return "cuda" if host.gpus() and host.torch_sees_gpu() else "cpu"

    def is_automatic(self, device: str) -> bool:
        return device == "cuda"  # on a CPU it compiles for minutes, to no gain that is known

    def why_not(self) -> SdtrtError | None:
        from sdtrt.backends.inductor.build import require_compiler

        try:
            require_compiler()
        except SdtrtError as error:
            return error
        if self.device() == "cuda" and find_spec("triton") is None:
            return BuildError(
                "Triton is not installed, which PyTorch compiles for GPUs with", hint="pip install triton"
            )
        return None

    def version(self) -> str:
        return installed_version("PyTorch", "torch", "torch")

    def default_precision(self) -> Precision:
        return "fp16" if self.device() == "cuda" else "fp32"

    def check_precision(self, precision: str) -> None:
        """Raise `UsageError` for products of 8 bits that this machine's GPU does not have."""
        since = GPUS_WITH.get(precision)
        if since is None or self.device() == "cpu":  # every processor has them, if only one number after the other
            return
        gpu = host.gpus()[0]
        if gpu.compute_capability < since:
            raise UsageError(
                f"{precision} needs a GPU of compute capability {_dotted(since)} or later,"
                f" and the {gpu.name} has {_dotted(gpu.compute_capability)}",
                hint="use --precision fp16" if precision == "int8" else "use --precision int8 or fp16",
            )

    def precision_of(self, model: ModelSource, component: Component, precision: Precision) -> Precision:
        """What runs once an image gains nothing by 8 bits, and keeps what it computes in by default.

        A VAE's engines in fp16 keep within it (`exports.scaled_vae`).
        """
        return self.default_precision() if precision in QUANTISED and component not in STEPPING else precision

    def check(self, spec: BuildSpec) -> None:
        super().check(spec)
        if spec.export.precision in QUANTISED and spec.export.component not in STEPPING:
            raise UsageError(
                f"the {spec.export.component} has no engine in {spec.export.precision}: it runs once an image",
                hint=f"build it with --precision {self.default_precision()}, which runs beside a quantised UNet",
            )
        refuse_tensorrt_options(f"{self.title} has", spec)
        require_one_profile(self.title, spec)

    def host_key(self, compute_capability: tuple[int, int] | None = None) -> dict[str, Any]:
        """The processor, and the GPU where there is one, with what compiles for it."""
        # The C++ in a package for a GPU, too, is compiled for this very processor (`-march=native`).
        processor = {"processor": host.processor_name(), "instructions": list(host.instruction_sets())}
        if self.device() == "cpu":
            return processor
        import torch

        gpu = host.gpus()[0]
        facts = {"gpu": gpu.name, "compute_capability": list(gpu.compute_capability), **processor}
        return {**facts, "cuda": torch.version.cuda, "triton": _triton_version()}

    def options_key(self, spec: BuildSpec) -> dict[str, Any]:
        from sdtrt.backends.inductor.build import OPTIONS, recipe_of

        return {**super().options_key(spec), "compiler": dict(OPTIONS), "recipe": recipe_of(spec.export)}

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        from sdtrt.backends.inductor.build import Request, build_package, recipe_of

        (profile,) = job.spec.profiles
        export, folder = job.spec.export, job.folder.resolve()
        recipe = recipe_of(export)
        request = Request(export, profile, job.contract, folder, self.device(), job.blueprint, recipe=recipe)
        return build_package(request, job.console)

    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        from sdtrt.backends.inductor.session import InductorSession
        from sdtrt.backends.inductor.weights import CONSTANTS_FILE, FIXED_FILE, PACKAGE_FILE, read_constants, read_fixed

        if not self.runs_here()(entry.engine_key):  # PyTorch itself warns at most, and runs it
            raise EngineError(
                f"{entry.name} was compiled for another machine or version of PyTorch than this one",
                hint=f"build it here: sdtrt build --backend {self.name}; {entry.removal} drops that one",
            )
        contract = stored_contract(entry)
        package = entry.verified(PACKAGE_FILE)  # and so its companions: the list of constants, and those of its own
        constants = read_constants(entry.file(CONSTANTS_FILE))
        fixed = read_fixed(package.with_name(FIXED_FILE), constants)
        (profile,) = entry.engine_key.profiles
        return InductorSession(package, constants, fixed, contract, profile, device=device, scratch=scratch)


def _dotted(capability: tuple[int, int]) -> str:
    """(8, 9) → `8.9`."""
    return ".".join(map(str, capability))


def _triton_version() -> str | None:
    """The version of Triton, which comes under one of two names."""
    return host.library_version("triton") or host.library_version("pytorch-triton")

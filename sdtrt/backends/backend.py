"""What each backend gives: why it can't run here, its version, what it builds from, how it builds, opens and loads.

Knows no backend by its name: `registry` lists them. Each lies in a folder of its own, whose `backend.py` imports
libraries inside functions only, so that asking costs no import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, SdtrtError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import EngineKey
from sdtrt.models.architecture import Blueprint
from sdtrt.models.components import precision_of
from sdtrt.models.source import ModelSource
from sdtrt.specs import QUANTISED, BuildSpec, Component, ExportSpec, Group, Precision
from sdtrt.specs.calibration import Calibration
from sdtrt.specs.choices import MAX_DIGITS
from sdtrt.specs.contract import Contract

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session

Source = Literal["onnx", "program"]
Device = Literal["cuda", "cpu"]
Loader = Callable[[int], object]  # from a GPU's index to what is loaded on it


@dataclass(frozen=True)
class BuildJob:
    """One engine to be made, once its source is there.

    Args:
        source: the exported component, proven; None for an engine that is built from the model itself (`program`).
        folder: where the engine's files go: a draft of the engine directory.
        contract: the component's inputs and outputs.
        spec: what was asked for.
        directory: the engine directory, for what builders keep beside entries.
        blueprint: of the model's part, where that lives in a pipeline and no process of a builder's can read it.
    """

    source: Path | None
    folder: Path
    contract: Contract
    spec: BuildSpec
    directory: EngineDirectory
    console: Console
    blueprint: Blueprint | None = None

    @property
    def onnx(self) -> Path:
        """The exported component, for a backend that builds from ONNX."""
        assert self.source is not None
        return self.source


class Backend(ABC):
    """One way to run a model's components.

    Attributes:
        title: its name in sentences.
        format: a number in each key; raised where the same request makes another engine than before.
        source: what its engines are built from; None for a backend without engines.
        devices: what it may run on.
        weights_inside: whether its engines hold a model's weights; others get them when they are opened, serve every
            model of an architecture, and take other weights while they run.
        expectation: why `auto` expects its engines to be the fastest, as far as that was measured.
        takes_any_size: whether an engine serves every size, so that builds need no profile.
        asks_for_scratch: whether its engines ask PyTorch for the memory of a run's intermediate results, as much as the
            run's size takes; else they are told where to work, in a block for the largest size. Sessions share either.
        loads_ahead: whether `loader` has something to load before a session is opened.
    """

    title: ClassVar[str]
    format: ClassVar[int] = 0
    source: ClassVar[Source | None] = None
    devices: ClassVar[tuple[Device, ...]]
    weights_inside: ClassVar[bool] = True
    expectation: ClassVar[str] = ""
    takes_any_size: ClassVar[bool] = False
    asks_for_scratch: ClassVar[bool] = False
    loads_ahead: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def modules(self) -> tuple[str, ...]:
        """What may be imported ahead of its first use: the first of these that is installed."""
        return ()

    def device(self) -> Device:
        """Where a pipeline with this backend's engines runs on this machine."""
        return self.devices[0]

    def choose_device(self, name: str) -> None:
        """Compute on one of its library's own devices from now on. Raises `UsageError` where it has no such choice."""
        raise UsageError(f"{self.title} has no --device {name}", hint="leave --device out, or use --backend openvino")

    def device_title(self) -> str | None:
        """What was chosen by `choose_device`, for a picture's text; None where PyTorch's device says it all."""
        return None

    def is_automatic(self, device: str) -> bool:
        """Whether `auto` has its engines built on a device where no engines are there yet."""
        return device in self.devices

    def why_not(self) -> SdtrtError | None:
        """Why it can't build and run engines on this machine; None if it can: it is installed, if it says no more."""
        try:
            self.version()
        except SdtrtError as error:
            return error
        return None

    @abstractmethod
    def version(self) -> str:
        """The installed version. Raises `BuildError` or `EngineError` where it is not installed."""

    @abstractmethod
    def default_precision(self) -> Precision:
        """What it computes in unless asked."""

    def check_precision(self, precision: str) -> None:  # noqa: B027  # most compute in every precision
        """Raise `UsageError` for a precision that it never computes in."""

    def check_groups(self, groups: Sequence[Group]) -> None:  # noqa: B027  # most take any
        """Raise `UsageError` for optional groups of a UNet's inputs that its engines can't have."""

    def precision_of(self, model: ModelSource, component: Component, precision: Precision) -> Precision:
        """The precision of a component's engine where `precision` is asked for: a VAE may not fit into fp16."""
        return precision_of(model, component, precision)

    def check(self, spec: BuildSpec) -> None:
        """Raise `UsageError` for what it can't build."""
        if self.source is None:
            raise UsageError(
                f"the {self.name} backend has no engines to build", hint="leave --backend out, or use tensorrt"
            )
        if spec.compute_capability is not None and not self.serves("compute-capability", spec.export):
            raise UsageError(
                f"{self.name} builds for the GPU it runs on, not for a named compute capability",
                hint="use --backend tensorrt-rtx, or leave --compute-capability out",
            )
        if self.source != "onnx" and spec.export.calibration != Calibration():
            raise UsageError(
                f"{self.title} scales its inputs while it runs, and is not calibrated",
                hint="leave --calibration-prompt out",
            )
        self.check_precision(spec.export.precision)
        self.check_groups(spec.export.groups)

    def serves(self, option: str, export: ExportSpec) -> bool:
        """Whether an option of `sdtrt build` means anything for engines of an export."""
        return False

    def host_key(self, compute_capability: tuple[int, int] | None = None) -> dict[str, Any]:
        """What an engine is bound to on this machine.

        Args:
            compute_capability: the GPU that is built for ahead of time, if it is not this machine's.

        Raises:
            BuildError: where there is no such thing here.
        """
        return {}

    def options_key(self, spec: BuildSpec) -> dict[str, Any]:
        """The part of an engine's key that its build options decide. Engines of all times have these four."""
        return {
            "optimization_level": spec.optimization_level,
            "workspace_bytes": spec.workspace_bytes,
            "version_compatible": spec.version_compatible,
            "norm_plugins": spec.norm_plugins,
        }

    @abstractmethod
    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Fill `job.folder`; returns what was measured, for the entry's `info`. Raises `BuildError`."""

    @abstractmethod
    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        """Open an engine whose entry is held. Raises `CacheError`, `EngineError`."""

    def loader(self, entry: Entry, wanted: Callable[[], bool]) -> Loader:
        """Check an engine's files ahead of its session, and return the function that loads them onto a GPU.

        A session that is opened while the result exists shares it.

        Args:
            entry: of an engine that runs here; the caller holds it.
            wanted: whether the engine is still wanted; once it is not, the check is given up.

        Raises:
            CacheError, EngineError: as of `open`.
        """
        raise AssertionError(f"{self.name} loads nothing ahead")

    def runs_here(self) -> Callable[[EngineKey], bool]:
        """What says of an engine's key whether this sdtrt runs it, on this machine and in the installed version."""
        wanted = (self.format, self.name, self.host_key())
        version = self.version()

        def runs(key: EngineKey) -> bool:
            return (key.format, key.backend, key.host) == wanted and _runs_in(version, key)

        return runs


def refuse_quantised(title: str, precision: str) -> None:
    """Raise `UsageError` for a precision of 8 bits, which one backend alone has engines in."""
    if precision in QUANTISED:
        raise UsageError(
            f"{title} has no engines in {precision}", hint=f"use --backend inductor --precision {precision}"
        )


def refuse_tensorrt_options(who: str, spec: BuildSpec) -> None:
    """Raise `UsageError` for build options that TensorRT alone knows; `who` begins what is said, `OpenVINO has`."""
    limited = spec.optimization_level is not None or spec.workspace_bytes is not None
    in_pieces = bool(spec.split_attention) or spec.channels_last
    if limited or spec.version_compatible or not spec.norm_plugins or in_pieces:
        raise UsageError(
            f"{who} no optimization level, workspace, version compatibility, plugins or pieces",
            hint="leave those options out, or use --backend tensorrt",
        )


def require_one_profile(title: str, spec: BuildSpec) -> None:
    """Raise `UsageError` for several profiles in one engine."""
    if len(spec.profiles) != 1:
        raise UsageError(
            f"{title} builds an engine for one profile, got {len(spec.profiles)}",
            hint="build one engine after the other, or one for a range: --height 512:512:768",
        )


def installed_version(title: str, package: str, install: str) -> str:
    """The version of a library. Raises `BuildError` with the command that installs it, where it is missing."""
    version = host.library_version(package)
    if version is None:
        raise BuildError(f"{title} is not installed", hint=f"pip install {install}")
    return version


def _runs_in(version: str, key: EngineKey) -> bool:
    """Whether a version runs an engine: the one that built it; where the plan is version-compatible, later ones too."""
    built = key.backend_version
    return built == version or (key.is_version_compatible and _numbers(built) < _numbers(version))


def _numbers(version: str) -> tuple[int, ...]:
    """`10.13.3.9.post1` → (10, 13, 3, 9)."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal() and len(part) <= MAX_DIGITS)

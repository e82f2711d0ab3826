"""The requests that `export` and `build` take: the model, a component, an engine, and several of them at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sdtrt.common.errors import UsageError
from sdtrt.specs.calibration import Calibration
from sdtrt.specs.choices import (
    COMPONENTS,
    DEFAULT_MODEL,
    EXPORTERS,
    PRECISIONS,
    QUANTISED,
    BackendName,
    Component,
    Exporter,
    Group,
    Precision,
    check_choice,
    check_group,
    check_output,
)
from sdtrt.specs.savings import DeepCaching
from sdtrt.specs.sizes import Profile, ProfileRequest

# The opset that each exporter writes by default. 17 is the newest that TensorRT 8.6 reads, and the first with layer
# normalisation as one operator: spelled out, it costs 8.6 a quarter of a step (benchmarks/tuning.md). The dynamo
# exporter starts at 18.
DEFAULT_OPSETS: dict[Exporter, int] = {"torchscript": 17, "dynamo": 18}
QUANTISED_OPSET = 19  # the first whose QuantizeLinear has bf16 and fp8


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA, and how much it counts.

    Args:
        name: a file, its folder, or a hub id.
        weight: 1 for what it was trained to; below 0 for the opposite.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("a LoRA without a name was given", hint="as in --lora style.safetensors:0.8")
        if not math.isfinite(self.weight):
            raise UsageError(f"the weight of {self.name} must be a number, got {self.weight}", hint="use 1, or 0.8")
        object.__setattr__(self, "weight", float(self.weight))  # 1 and 1.0 are one weight, and one fingerprint

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME` or `NAME:WEIGHT`."""
        name, colon, weight = text.rpartition(":")
        try:
            return cls(name, float(weight)) if colon and name else cls(text)
        except ValueError:
            return cls(text)

    def __str__(self) -> str:
        short = f"{self.weight:g}"
        weight = short if float(short) == self.weight else repr(self.weight)
        return self.name if self.weight == 1 and ":" not in self.name else f"{self.name}:{weight}"


@dataclass(frozen=True)
class ModelSpec:
    """A model, and what may be done to get it.

    Args:
        name: `tiny`, a diffusers folder, a hub id, or a single-file checkpoint.
        revision: hub revision (branch, tag or commit).
        variant: weight variant such as `fp16` (as in `diffusion_pytorch_model.fp16.safetensors`).
        config: diffusers folder or hub id that holds the configuration of a single-file checkpoint.
        allow_pickle: name of the pickle file that the user trusts (pickle runs code when it is read).
        offline: never ask the hub.
        vae: a VAE in the place of the model's own: its folder (or a model's), a hub id, or a file that holds one.
        loras: that are merged into the model's weights.
        ip_adapters: that are put into its UNet, each a file, its folder, or a hub id.
        controlnet: a ControlNet beside the model: its folder, a hub id, or a file.
        t2i_adapter: a T2I-Adapter beside the model: its folder or a hub id.
    """

    name: str = DEFAULT_MODEL
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    allow_pickle: str | None = None
    offline: bool = False
    vae: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    controlnet: str | None = None
    t2i_adapter: str | None = None

    def __post_init__(self) -> None:
        if wrong := [one for one in self.loras if not isinstance(one, LoraSpec)]:
            raise UsageError(
                f"each of a model's loras must be a LoraSpec, got {wrong[0]!r}",
                hint='as in loras=(LoraSpec("style.safetensors", 0.8),)',
            )
        if isinstance(self.ip_adapters, str) or not all(isinstance(one, str) and one for one in self.ip_adapters):
            raise UsageError(
                f"a model's ip_adapters must be names, got {self.ip_adapters!r}",
                hint='as in ip_adapters=("ip-adapter_sd15.safetensors",)',
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        loras = tuple(LoraSpec(**one) for one in data["loras"])
        return cls(**{**data, "loras": loras, "ip_adapters": tuple(data["ip_adapters"])})


@dataclass(frozen=True)
class ExportSpec:
    """A component to be written as ONNX.

    Args:
        opset: None for the exporter's default (`DEFAULT_OPSETS`).
        groups: optional groups of inputs that a UNet is to have (`controlnet`, `t2i_adapter`, `ip_adapter:4`).
        calibration: what a graph in 8 bits is scaled by; means nothing to others.
        output: a `.onnx` file to write instead of an entry in the engine directory.
        force: export again even if the engine directory has it.
    """

    model: ModelSpec = ModelSpec()
    component: Component = "unet"
    precision: Precision = "fp16"
    exporter: Exporter = "torchscript"
    opset: int | None = None
    output: Path | None = None
    overwrite: bool = False
    force: bool = False
    groups: tuple[Group, ...] = ()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        check_choice("component", self.component, COMPONENTS)
        self._check_groups()
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("exporter", self.exporter, EXPORTERS)
        check_output(self.output)
        lowest, highest = {"torchscript": (14, 20), "dynamo": (18, 23)}[self.exporter]
        if self.precision in QUANTISED and self.resolved_opset < QUANTISED_OPSET:
            raise UsageError(
                f"opset {self.opset} has no {self.precision} beside bf16", hint=f"use --opset {QUANTISED_OPSET}"
            )
        if not lowest <= self.resolved_opset <= highest:
            raise UsageError(
                f"the {self.exporter} exporter writes opsets {lowest} to {highest}, got {self.opset}",
                hint=f"use --opset {DEFAULT_OPSETS[self.exporter]}",
            )

    def _check_groups(self) -> None:
        """Raise `UsageError` for groups that there are not, or that can't be exported."""
        for name in self.groups:
            check_group(name)
        if self.groups and self.component != "unet":
            raise UsageError(
                f"the {self.component} has no group {self.groups[0]}", hint="ask for it with the component unet"
            )
        if self.groups and self.exporter == "dynamo":  # it does not know that a side is half another, rounded up
            raise UsageError(
                f"the dynamo exporter writes no group {self.groups[0]}", hint="use the torchscript exporter"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, of a spec without output."""
        model, calibration = ModelSpec.from_json(data["model"]), Calibration.from_json(data["calibration"])
        return cls(**{**data, "model": model, "groups": tuple(data["groups"]), "calibration": calibration})

    @property
    def resolved_opset(self) -> int:
        """The opset that is written."""
        default = QUANTISED_OPSET if self.precision in QUANTISED else DEFAULT_OPSETS[self.exporter]
        return self.opset if self.opset is not None else default


@dataclass(frozen=True)
class BuildSpec:
    """An engine to be built. What its backend refuses is told where the spec is used (`BackendName.check`).

    Args:
        export: what the engine is made from.
        backend: what runs it (`torch` has no engines).
        profiles: the sizes it accepts; one entry a profile. Empty for a backend that takes any size (ONNX Runtime).
        optimization_level: TensorRT's builder effort, 0 to 5; None for the version's own default (1 on 8.6).
        workspace_bytes: cap on the builder's scratch memory; None for no cap.
        compute_capability: the GPU to build for ahead of time, as (8, 9); TensorRT for RTX only. None for this GPU.
        version_compatible: a plan that later TensorRT versions (lean runtimes) can load too.
        norm_plugins: let TensorRT 8.6 normalise by its plugin; later versions don't need it.
        split_attention: from how many tokens on the UNet's self-attentions are left to PyTorch's kernels, 0 for none,
            nor a VAE's large norms; None for what gained on an H200.
        channels_last: what an engine's pieces give to each other lies channels last in memory.
        force: build again even if the engine directory has it.
    """

    export: ExportSpec
    backend: BackendName
    profiles: tuple[Profile, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    version_compatible: bool = False
    norm_plugins: bool = True
    split_attention: int | None = None
    channels_last: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"optimization level must be 0 to 5, got {self.optimization_level}", hint="use --optimization-level 3"
            )
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError("the workspace must be more than nothing", hint="use --workspace-gib 8")
        if self.split_attention is not None and self.split_attention < 0:
            raise UsageError(
                f"self-attention has no {self.split_attention} tokens", hint="use --split-attention 2048, or 0 for none"
            )


@dataclass(frozen=True)
class ExportRequest:
    """Some or all of a model's components, to be written as ONNX.

    Args:
        common: what is asked of each; its component, and where that would overflow its precision, are each one's own.
        components: none for all that the model's pipeline needs.
        caching: what the UNet's two programs are for, which stand in the place of one; off for that one.
    """

    common: ExportSpec
    components: tuple[Component, ...] = ()
    caching: DeepCaching = DeepCaching()

    def __post_init__(self) -> None:
        for name in self.components:
            check_choice("component", name, COMPONENTS)
        if self.components and "unet" not in self.components and self.common.calibration != Calibration():
            raise UsageError("only the UNet is calibrated", hint="leave --calibration-prompt out")
        if self.common.output is not None and len(self.components) != 1:
            raise UsageError(
                f"--output takes one component, got {len(self.components) or 'all'}",
                hint="as in --component unet --output unet.onnx",
            )


@dataclass(frozen=True)
class BuildRequest:
    """Engines of some or all of a model's components.

    Args:
        common: what is asked of each; component, precision and profiles are each one's own. Its backend may be `auto`,
            or `all` for each that runs here (`build_each`).
        components: none for all that the model's pipeline needs.
        precision: None for the backend's default.
        sizes: what the engines are to accept.
        caching: as of `ExportRequest`.
    """

    common: BuildSpec
    components: tuple[Component, ...] = ()
    precision: Precision | None = None
    sizes: ProfileRequest = field(default_factory=ProfileRequest)
    caching: DeepCaching = DeepCaching()

    def __post_init__(self) -> None:
        if self.precision not in QUANTISED and self.common.export.calibration != Calibration():
            raise UsageError(
                f"an engine in {self.precision or 'the default precision'} is not calibrated",
                hint="use --precision int8 or fp8, or leave --calibration-prompt out",
            )

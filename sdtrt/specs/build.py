"""What is asked of an export and of a build: the model, the component, the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtrt.common.errors import UsageError
from sdtrt.specs.choices import (
    BACKENDS,
    COMPONENTS,
    DEFAULT_MODEL,
    EXPORTERS,
    PRECISIONS,
    Backend,
    Component,
    Exporter,
    Precision,
    check_choice,
    check_output,
    check_precision,
)
from sdtrt.specs.sizes import Profile

IN_PIECES: tuple[Component, ...] = ("unet", "vae_decoder", "vae_encoder")  # what 8.6 leaves some of to PyTorch

# The opset that each exporter writes by default. 17 is the newest that TensorRT 8.6 reads, and the first with layer
# normalisation as one operator: spelled out, it costs 8.6 a quarter of a step (benchmarks/tuning.md). The dynamo
# exporter starts at 18.
DEFAULT_OPSETS: dict[Exporter, int] = {"torchscript": 17, "dynamo": 18}


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and what may be done to get it.

    Args:
        name: `tiny`, a diffusers folder, a hub id, or a single-file checkpoint.
        revision: hub revision (branch, tag or commit).
        variant: weight variant such as `fp16` (as in `diffusion_pytorch_model.fp16.safetensors`).
        config: diffusers folder or hub id that holds the configuration of a single-file checkpoint.
        allow_pickle: name of the pickle file that the user trusts (pickle runs code when it is read).
        offline: never ask the hub.
        vae: a VAE in the place of the model's own: its folder (or a model's), a hub id, or a file that holds one.
    """

    name: str = DEFAULT_MODEL
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    allow_pickle: str | None = None
    offline: bool = False
    vae: str | None = None


@dataclass(frozen=True)
class ExportSpec:
    """A component to be written as ONNX.

    Args:
        opset: None for the exporter's default (`DEFAULT_OPSETS`).
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

    def __post_init__(self) -> None:
        check_choice("component", self.component, COMPONENTS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("exporter", self.exporter, EXPORTERS)
        check_output(self.output)
        lowest, highest = {"torchscript": (14, 20), "dynamo": (18, 23)}[self.exporter]
        if not lowest <= self.resolved_opset <= highest:
            raise UsageError(
                f"the {self.exporter} exporter writes opsets {lowest} to {highest}, got {self.opset}",
                hint=f"use --opset {DEFAULT_OPSETS[self.exporter]}",
            )

    @property
    def resolved_opset(self) -> int:
        """The opset that is written."""
        return self.opset if self.opset is not None else DEFAULT_OPSETS[self.exporter]


def may_be_in_pieces(backend: Backend, export: ExportSpec) -> bool:
    """Whether engines of an export may be several plans, with PyTorch between them: in fp16, and for one size."""
    return backend == "tensorrt" and export.precision == "fp16" and export.component in IN_PIECES


@dataclass(frozen=True)
class BuildSpec:
    """An engine to be built.

    Args:
        export: what the engine is made from.
        backend: what runs it (`torch` has no engines).
        profiles: the sizes it accepts; one entry a profile. Empty for a backend that takes any size (ONNX Runtime).
        optimization_level: TensorRT's builder effort, 0 to 5; None for the version's own default (1 on 8.6).
        workspace_bytes: cap on the builder's scratch memory; None for no cap.
        compute_capability: the GPU to build for ahead of time, as (8, 9); TensorRT for RTX only. None for this GPU.
        version_compatible: a plan that later TensorRT versions (lean runtimes) can load too.
        norm_plugins: let TensorRT 8.6 normalise by its plugin (see `build.group_norm`); later versions don't need it.
        split_attention: from how many tokens on the UNet's self-attentions are left to PyTorch's kernels (see
            `build.splitting`), 0 for none, nor a VAE's large norms; None for what gained on an H200
            (`trt_api.building.split_tokens`).
        channels_last: what an engine's pieces give to each other lies channels last in memory (see
            `build.splitting.channels_last`).
        force: build again even if the engine directory has it.
    """

    export: ExportSpec
    backend: Backend
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
        check_choice("backend", self.backend, BACKENDS)
        if self.backend == "torch":
            raise UsageError("the torch backend has no engines to build", hint="use --backend onnxruntime or tensorrt")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"optimization level must be 0 to 5, got {self.optimization_level}", hint="use --optimization-level 3"
            )
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError("the workspace must be more than nothing", hint="use --workspace-gib 8")
        if self.compute_capability is not None and self.backend != "tensorrt-rtx":
            raise UsageError(
                f"{self.backend} builds for the GPU it runs on, not for a named compute capability",
                hint="use --backend tensorrt-rtx, or leave --compute-capability out",
            )
        check_precision(self.backend, self.export.precision)
        limited = self.optimization_level is not None or self.workspace_bytes is not None
        in_pieces = bool(self.split_attention) or self.channels_last
        changed = self.version_compatible or not self.norm_plugins or in_pieces
        if self.backend == "onnxruntime" and (limited or changed):
            raise UsageError(
                "ONNX Runtime engines have no optimization level, workspace, version compatibility, plugins or pieces",
                hint="leave those options out, or use --backend tensorrt",
            )
        if self.backend != "onnxruntime" and not self.profiles:
            raise UsageError(f"{self.backend} engines need a profile", hint="use --height 512 --width 512")
        if self.split_attention is not None and self.split_attention < 0:
            raise UsageError(
                f"self-attention has no {self.split_attention} tokens", hint="use --split-attention 2048, or 0 for none"
            )
        if self.split_attention and not self._is_splittable("unet"):
            raise UsageError(
                "only TensorRT UNets in fp16 that need not be version-compatible leave attention to PyTorch",
                hint="leave --split-attention out",
            )
        if self.split_attention and not self._is_of_one_size:
            raise UsageError(
                "an engine that leaves attention to PyTorch is for one fixed size",
                hint="use --batch 2 --height 512 --width 512, or leave --split-attention out",
            )
        if self.channels_last and (self.split_attention == 0 or not (self.can_split or self.can_split_norms)):
            raise UsageError(
                "only engines in pieces can be channels-last: TensorRT's of UNets and VAEs, in fp16 and of one size,"
                " that need not be version-compatible",
                hint="leave --channels-last out",
            )

    @property
    def can_split(self) -> bool:
        """Whether attention can be left to PyTorch at all."""
        return self._is_splittable("unet") and self._is_of_one_size

    @property
    def can_split_norms(self) -> bool:
        """Whether group normalisations can be left to PyTorch at all: those of either half of a VAE."""
        return self._is_splittable("vae_decoder", "vae_encoder") and self._is_of_one_size

    def _is_splittable(self, *components: Component) -> bool:
        fits = self.export.component in components and may_be_in_pieces(self.backend, self.export)
        return fits and not self.version_compatible

    @property
    def _is_of_one_size(self) -> bool:
        return [profile.minimum == profile.maximum for profile in self.profiles] == [True]

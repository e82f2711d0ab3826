"""The options of `export` and `build`, which become requests of the same names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from typer import Option

from sdtrt.cli.options import BackendOptions
from sdtrt.common.errors import UsageError
from sdtrt.specs import (
    COMPONENTS,
    DEFAULT_OPSETS,
    DEFAULT_TOKENS,
    EXPORTERS,
    MAX_DIGITS,
    BuildRequest,
    BuildSpec,
    Component,
    Exporter,
    ExportRequest,
    ExportSpec,
    ModelSpec,
    Precision,
    ProfileRequest,
    Range,
    bytes_of,
)
from sdtrt.specs.calibration import Calibration

RANGE = "N or MIN:OPT:MAX"
OPSETS = " or ".join(str(opset) for opset in DEFAULT_OPSETS.values())


@dataclass(frozen=True)
class ExporterOptions:
    """These options say which components are written as ONNX, and how."""

    component: Annotated[
        list[str] | None, Option(help=f"one of {', '.join(COMPONENTS)}; give it again for more; by default all")
    ] = None
    exporter: Annotated[str, Option(help=f"PyTorch exporter: {' or '.join(EXPORTERS)}")] = "torchscript"
    opset: Annotated[
        int | None, Option(help=f"ONNX opset; by default {OPSETS}, by exporter; below 17 TensorRT 8.6 is slower")
    ] = None
    force: Annotated[bool, Option("--force", help="make it again even if it is there")] = False
    calibration_prompt: Annotated[
        list[str] | None,
        Option(
            metavar="TEXT",
            help="in 8 bits on TensorRT: a picture of this says how large numbers get; give it again for more;"
            " by default four of sdtrt's own",
        ),
    ] = None

    def request(
        self, model: ModelSpec, precision: str, *, output: Path | None = None, overwrite: bool = False
    ) -> ExportRequest:
        """The exports that are asked for."""
        common = ExportSpec(
            model=model,
            precision=cast(Precision, precision),
            exporter=cast(Exporter, self.exporter),
            opset=self.opset,
            output=output,
            overwrite=overwrite,
            force=self.force,
            calibration=Calibration(tuple(self.calibration_prompt)) if self.calibration_prompt else Calibration(),
        )
        return ExportRequest(common, cast("tuple[Component, ...]", tuple(self.component or ())))


@dataclass(frozen=True)
class ProfileOptions:
    """These options say which sizes an engine accepts."""

    batch: Annotated[
        str, Option(help=f"UNet batch, {RANGE}; guidance makes it twice the images, so the other parts get half of it")
    ] = "2"
    height: Annotated[str | None, Option("--height", "-H", help=f"pixels, {RANGE}; by default the model's own")] = None
    width: Annotated[str | None, Option("--width", "-W", help=f"pixels, {RANGE}; by default the model's own")] = None
    tokens: Annotated[str, Option(help=f"prompt tokens, {RANGE}")] = str(DEFAULT_TOKENS)
    profile: Annotated[
        list[str] | None, Option(help="as batch=2,height=512,width=512:512:768; give it again for several profiles")
    ] = None

    def request(self) -> ProfileRequest:
        """The sizes that are asked for."""
        return ProfileRequest(
            batch=Range.parse(self.batch, "--batch"),
            height=None if self.height is None else Range.parse(self.height, "--height"),
            width=None if self.width is None else Range.parse(self.width, "--width"),
            tokens=Range.parse(self.tokens, "--tokens"),
            profile=tuple(self.profile or ()),
        )


@dataclass(frozen=True)
class BuildOptions:
    """These options say how TensorRT builds."""

    optimization_level: Annotated[
        int | None, Option(help="TensorRT's builder effort, 0 to 5; by default its own, on 8.6: 1")
    ] = None
    workspace_gib: Annotated[float | None, Option(help="cap on the builder's scratch memory")] = None
    compute_capability: Annotated[
        str | None, Option(metavar="X.Y", help="build ahead of time for this GPU (tensorrt-rtx)")
    ] = None
    version_compatible: Annotated[
        bool, Option("--version-compatible", help="a plan that later TensorRT versions can load too")
    ] = False
    norm_plugins: Annotated[
        bool,
        Option(help="TensorRT 8.6: normalise by its plugin, which is faster; without, results repeat to the bit"),
    ] = True
    split_attention: Annotated[
        int | None,
        Option(
            metavar="TOKENS",
            help="TensorRT 8.6, fixed size only: UNet self-attentions with at least TOKENS tokens run in PyTorch;"
            " 0: everything stays in TensorRT, the VAE's norms too (default 2048)",
        ),
    ] = None
    channels_last: Annotated[
        bool,
        Option(
            help="TensorRT 8.6: what an engine's pieces give to each other lies channels last: 2 % less time in the"
            " UNet's upper levels; no whole pipeline has been timed"
        ),
    ] = False

    def request(self, exports: ExportRequest, backend: BackendOptions, sizes: ProfileRequest) -> BuildRequest:
        """The engines that are asked for."""
        common = BuildSpec(
            export=exports.common,
            backend=backend.backend,
            optimization_level=self.optimization_level,
            workspace_bytes=None if self.workspace_gib is None else bytes_of("--workspace-gib", self.workspace_gib),
            compute_capability=self._capability(),
            version_compatible=self.version_compatible,
            norm_plugins=self.norm_plugins,
            split_attention=self.split_attention,
            channels_last=self.channels_last,
            force=exports.common.force,
        )
        precision = cast("Precision | None", backend.precision)
        return BuildRequest(common, exports.components, precision, sizes, exports.caching)

    def _capability(self) -> tuple[int, int] | None:
        """`8.9` → (8, 9)."""
        text = self.compute_capability
        if text is None:
            return None
        major, dot, minor = text.partition(".")
        if not (dot and all(part.isdecimal() and len(part) <= MAX_DIGITS for part in (major, minor))):
            raise UsageError(f"--compute-capability must be X.Y, got {text!r}", hint="as in --compute-capability 8.9")
        return int(major), int(minor)

"""ONNX → engine for TensorRT 8.6, in a process of its own (`worker`): one plan, or pieces that are plans.

It adds to `tensorrt.build` what is asked of the process for one piece. The pieces are built by further processes, which
the first one starts (`parallel_build`); they are of its process group, which ends as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sdtrt.backends.tensorrt import build
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt86 import policy
from sdtrt.backends.tensorrt86.pieces import piece_file
from sdtrt.common.console import Console
from sdtrt.specs import BuildSpec
from sdtrt.specs.contract import Contract

if TYPE_CHECKING:
    from sdtrt.backends.tensorrt.session import InspectedSession

WORKER = "sdtrt.backends.tensorrt86.worker"  # the module that a child serves by


@dataclass(frozen=True)
class PieceRequest(Request):
    """What the process that builds one piece needs to know: `onnx` and `contract` are the piece's.

    Args:
        piece: its number, counted from 0.
        channels_last: its inputs and outputs that lie channels last in memory.
    """

    piece: int
    channels_last: tuple[str, ...] = ()

    @classmethod
    def of(cls, whole: Request, onnx: Path, contract: Contract, piece: int, channels_last: tuple[str, ...]) -> Self:
        """A piece of an engine that is asked for."""
        others = (whole.spec, whole.timing_cache, whole.verbose)
        return cls(onnx, whole.folder, contract, *others, piece, channels_last)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the pipe."""
        return {**super().to_json(), "piece": self.piece, "channels_last": self.channels_last}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        one = Request.from_json(data)
        return cls.of(one, one.onnx, one.contract, data["piece"], tuple(data["channels_last"]))

    @property
    def plan(self) -> Path:
        """Where the piece's plan goes."""
        return piece_file(super().plan, self.piece)

    @property
    def log(self) -> Path:
        """Where TensorRT's messages go for as long as the piece is built."""
        whole = super().log
        return whole.with_name(f"{whole.name}.{self.piece}")


def build_plan(
    onnx_path: Path,
    folder: Path,
    contract: Contract,
    spec: BuildSpec,
    *,
    timing_cache: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Build an engine into `folder/engine.plan`, as `tensorrt.build.build_plan` does.

    Where something is left to PyTorch, it is several plans and a list of them (`pieces`).

    Returns:
        What is known of the engine: as there, `pieces` may be more than 1, and of several there is `piece_seconds`.
    """
    request = Request(onnx_path.resolve(), folder.resolve(), contract, spec, timing_cache, console.verbose)
    build.check_request(request)
    policy.check_library(spec)
    build.announce(request, console)
    if (alone := policy.faster_alone(spec)) is not None:
        options = f"--batch {alone.batch} --height {alone.height} --width {alone.width}"
        console.note(f"TensorRT 8.6 is faster with an engine for each size, such as sdtrt build {options}")
    with console.activity("building the engine") as show:
        return build.build_in_child(request, console, show, WORKER)


def open_built(request: Request) -> InspectedSession:
    """A session on what a request has made: one plan, or pieces."""
    import torch

    from sdtrt.backends.tensorrt86.session import open_plans

    spec, device = request.spec, torch.device("cuda")
    return open_plans(
        request.plan, request.contract, backend=spec.backend, device=device, allow_host_code=spec.version_compatible
    )

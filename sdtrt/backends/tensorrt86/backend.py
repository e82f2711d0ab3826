"""TensorRT as a backend where the library may be 8.6: engines in several plans, with PyTorch between them.

The day that 8.6 is dropped this class becomes `tensorrt.backend.TensorRT` in the registry, and this folder goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.backends.backend import BuildJob, Loader
from sdtrt.backends.tensorrt.backend import TensorRT
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt86 import policy
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.specs import BuildSpec, ExportSpec, Group

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.session import Session


class TensorRT86(TensorRT):
    """What TensorRT gives, and what 8.6 needs besides."""

    def check(self, spec: BuildSpec) -> None:
        super().check(spec)
        policy.check_pieces(spec)

    def check_precision(self, precision: str) -> None:
        policy.check_precision(self.name, precision)

    def check_groups(self, groups: Sequence[Group]) -> None:
        policy.check_groups(self.name, groups)

    def serves(self, option: str, export: ExportSpec) -> bool:
        if option == "channels-last":
            return policy.may_be_in_pieces(self.name, export)
        return super().serves(option, export)

    def options_key(self, spec: BuildSpec) -> dict[str, Any]:
        return super().options_key(spec) | policy.pieces_key(spec)

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        from sdtrt.backends.tensorrt86.build import build_plan

        return build_plan(
            job.onnx, job.folder, job.contract, job.spec, timing_cache=self.timing_cache(job), console=job.console
        )

    def open(self, entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
        from sdtrt.backends.tensorrt86.session import open_plans

        contract = stored_contract(entry)
        plan, compatible = self.proven_plan(entry)
        return open_plans(plan, contract, backend=self.name, device=device, allow_host_code=compatible, scratch=scratch)

    def loader(self, entry: Entry, wanted: Callable[[], bool]) -> Loader:
        from sdtrt.backends.tensorrt86.pieces import load_pieces, read_pieces

        contract, library = stored_contract(entry), libraries.open_library(self.name)
        plan, compatible = self.proven_plan(entry, ahead=wanted)
        return lambda device: load_pieces(read_pieces(plan, contract), library, device, allow_host_code=compatible)

    def proven_plan(self, entry: Entry, *, ahead: Callable[[], bool] | None = None) -> tuple[Path, bool]:
        """Raises `EngineError` also for a list of pieces that is not the entry's: nobody has checked its content."""
        from sdtrt.backends.tensorrt86.pieces import check_list

        plan, compatible = super().proven_plan(entry, ahead=ahead)
        check_list(entry, plan)
        return plan, compatible

"""Running engines: one protocol (`session`), one module for each backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrt.backends.onnxruntime.session import ONNXRUNTIME_FILE
from sdtrt.backends.session import Session
from sdtrt.backends.tensorrt.plan import TENSORRT_FILE
from sdtrt.backends.tensorrt86.pieces import check_list, load_pieces, read_pieces
from sdtrt.common.errors import EngineError
from sdtrt.engines.entry import Entry, stored_contract

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch
    from sdtrt.backends.tensorrt.plan import LoadedPlan


def open_session(entry: Entry, device: torch.device, scratch: Scratch | None = None) -> Session[torch.Tensor]:
    """Open an engine of the engine directory.

    Args:
        entry: an entry of the kind `engine`.
        device: where its inputs and outputs live: `cpu` for ONNX Runtime, a CUDA device for TensorRT.
        scratch: what TensorRT sessions that never run at once share; None for a session on its own.

    The entry is not removed before the session is closed.

    Raises:
        CacheError: where a file of it is not what was published, or it has been removed.
        EngineError: where it can't be loaded on this machine, saying why and how to rebuild it.
    """
    hold = entry.hold()
    try:
        session = _open(entry, device, scratch)
    except BaseException:
        hold.close()
        raise
    session.keep(hold)
    return session


def plan_loader(entry: Entry, wanted: Callable[[], bool]) -> Callable[[int], tuple[LoadedPlan, ...]]:
    """Check a TensorRT engine's files ahead of its session, and return the function that loads its plans.

    A session that is opened while these plans exist shares them.

    Args:
        entry: of an engine that runs here; the caller holds it.
        wanted: whether the engine is still wanted; once it is not, the check is given up.

    Returns:
        A function that takes the current GPU's index and returns the loaded plans.

    Raises:
        CacheError, EngineError: as of `open_session`.
    """
    from sdtrt.backends.tensorrt.versions import libraries

    contract, library = stored_contract(entry), libraries.open_library(entry.key["backend"])
    plan, compatible = _proven_plan(entry, ahead=wanted)

    def load(device: int) -> tuple[LoadedPlan, ...]:
        return load_pieces(read_pieces(plan, contract), library, device, allow_host_code=compatible)

    return load


def _proven_plan(entry: Entry, *, ahead: Callable[[], bool] | None = None) -> tuple[Path, bool]:
    """The plan of a held entry, proven to the last of its pieces, and whether it may bring its own runtime."""
    plan = entry.verified(TENSORRT_FILE, ahead=ahead)  # and the other pieces and their list, named after it
    check_list(entry, plan)
    return plan, bool(entry.key.get("options", {}).get("version_compatible"))


def _open(entry: Entry, device: torch.device, scratch: Scratch | None) -> Session[torch.Tensor]:
    """Open an engine whose entry is held."""
    contract = stored_contract(entry)
    backend = entry.key.get("backend")
    if backend == "onnxruntime":
        from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession

        return OnnxRuntimeSession(entry.verified(ONNXRUNTIME_FILE), contract)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from sdtrt.backends.tensorrt86.session import open_plans

        plan, compatible = _proven_plan(entry)
        return open_plans(plan, contract, backend=backend, device=device, allow_host_code=compatible, scratch=scratch)
    raise EngineError(f"{entry.name} is for an unknown backend, {backend!r}", hint=entry.removal)

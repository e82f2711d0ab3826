"""From an engine of the engine directory to a session that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdtrt.backends import registry
from sdtrt.backends.session import Session
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import Sight
from sdtrt.models.components import load_component, part_of
from sdtrt.models.loading import stored_tensors
from sdtrt.models.resolve import Model
from sdtrt.models.source import ModelSource

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.scratch import Scratch


def open_session(
    entry: Entry, device: torch.device, scratch: Scratch | None = None, model: ModelSource | None = None
) -> Session[torch.Tensor]:
    """Open an engine of the engine directory.

    Args:
        entry: an entry of the kind `engine`.
        device: where its inputs and outputs live: `cpu` for ONNX Runtime, a CUDA device for TensorRT.
        scratch: what TensorRT sessions that never run at once share; None for a session on its own.
        model: whose weights the engine is to compute with, where it holds none; None where `set_weights` follows.

    The entry is not removed before the session is closed.

    Raises:
        CacheError: where a file of it is not what was published, or it has been removed.
        EngineError: where it can't be loaded on this machine, saying why and how to rebuild it; or for other weights.
        ModelError: where the weights can't be read.
    """
    hold = entry.hold()
    try:
        session = _open(entry, device, scratch, model)
    except BaseException:
        hold.close()
        raise
    session.keep(hold)
    return session


def open_beside(
    entry: Entry, device: torch.device, scratch: Scratch | None, first: Session[torch.Tensor]
) -> Session[torch.Tensor]:
    """Open a second engine of a component; one that holds no weights computes with those of the first one's session.

    Raises as of `open_session`.
    """
    session = open_session(entry, device, scratch)
    try:
        if not registry.get(entry.engine_key.backend).weights_inside:
            compute_with(session, first)
    except BaseException:
        session.close()
        raise
    return session


def compute_with(session: Any, first: Any) -> None:
    """Have a session compute with another one's weights, or with some of them; what lies otherwise in it is copied.

    Args:
        session, first: of one component, whose engines hold no weights.
    """
    session.share_weights(first)
    views = session.weight_views()
    session.follow({name: view for name, view in first.weight_views().items() if name in views})


def _open(
    entry: Entry, device: torch.device, scratch: Scratch | None, model: ModelSource | None
) -> Session[torch.Tensor]:
    """Open an engine whose entry is held."""
    name = entry.key.get("backend")
    try:
        backend = registry.get(str(name))
    except UsageError as error:
        raise EngineError(f"{entry.name} is for an unknown backend, {name!r}", hint=entry.removal) from error
    session = backend.open(entry, device, scratch)
    if model is not None and not backend.weights_inside:
        try:
            _give_weights(session, model)
        except BaseException:
            session.close()
            raise
    return session


def _give_weights(session: Session[torch.Tensor], model: ModelSource) -> None:
    """Have a session compute with a model's weights, which nobody replaces while they are read.

    What is stored goes to where the engine has it, and is cast and looked at there: on a GPU that takes no time. Where
    a number is not finite then, all of it is done once more by what says which. A part that LoRAs or IP-Adapters
    change is never stored: they are put into it when it is loaded.
    """
    import torch

    component = session.contract.component
    part = part_of(component)
    with Sight(model, (part,)).steady():
        if isinstance(model, Model) and model.is_stored(part) and session.take_stored(stored_tensors(model, part)):
            return
        dtype = getattr(torch, session.contract.outputs[0].dtype)
        session.set_weights(load_component(model, component, dtype))

"""The session protocol, and the checks that every session makes before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from sdtrt.common.errors import EngineError
from sdtrt.specs.contract import Contract, TensorSpec

if TYPE_CHECKING:
    import torch

    Weights = torch.nn.Module | Mapping[str, torch.Tensor]

ArrayT = TypeVar("ArrayT")
SessionT = TypeVar("SessionT", bound="Session[Any]")


class Session(Protocol[ArrayT]):
    """Runs one engine: named arrays in, named arrays out.

    A session is a context manager; `close` frees its memory and may be called twice. Outputs never alias a buffer that
    a later run overwrites. A session serves one thread at a time; other threads open their own. Backends derive from
    this class, which has what they share.
    """

    contract: Contract
    _hold: IO[bytes] | None = None

    def keep(self, hold: IO[bytes]) -> None:
        """Keep what keeps the engine's entry from being removed (`Entry.hold`) until the session is closed."""
        self._hold = hold

    def let_go(self) -> None:
        """Let go what `keep` was given; a part of every `close`."""
        if self._hold is not None:
            self._hold.close()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes: names, dtypes and symbolic shapes."""
        return self.contract.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns."""
        return self.contract.outputs

    def run(self, feeds: Mapping[str, ArrayT]) -> dict[str, ArrayT]:
        """Run the engine once. Raises `EngineError` where a name, dtype or shape does not fit."""

    def set_weights(self, weights: Weights) -> None:
        """Compute with other weights from the next run on.

        Args:
            weights: the part of a model that the component is of, or its `state_dict()`.

        Raises:
            EngineError: where the engine holds its weights, or these are not of its architecture.
        """
        raise EngineError(
            f"the engine of the {self.contract.component} holds its weights",
            hint="use --backend inductor, whose engines take other weights while they run",
        )

    def take_stored(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """As `set_weights`, of tensors in any floating dtype; says whether all numbers are finite in the engine's."""
        self.set_weights(tensors)
        return True

    def close(self) -> None:
        """Free everything that the session holds."""

    def __enter__(self: SessionT) -> SessionT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_feeds(
    specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> dict[str, int]:
    """Check the names, dtypes, ranks and dimensions of a run's inputs against the engine's contract.

    Args:
        specs: the engine's inputs.
        shapes: the shape of each array given, by name.
        dtypes: the dtype of each array given, by name, as in `TensorSpec.dtype` (`float16`).

    Returns:
        The value of each symbolic dimension, by its name.

    Raises:
        EngineError: where anything does not fit, naming it.
    """
    wanted = {spec.name for spec in specs}
    if set(shapes) != wanted:
        given = ", ".join(sorted(shapes)) or "nothing"
        raise EngineError(
            f"the engine takes {', '.join(spec.name for spec in specs)}; got {given}",
            hint="pass exactly the engine's inputs: sdtrt inspect ENGINE lists them",
        )
    sizes: dict[str, int] = {}
    for spec in specs:
        _check_one(spec, shapes[spec.name], dtypes[spec.name], sizes)
    return sizes


def check_tensors(specs: Sequence[TensorSpec], feeds: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """`check_feeds` of torch tensors."""
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in feeds.items()}
    return check_feeds(specs, shapes_of(feeds), dtypes)


def shapes_of(feeds: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor given, by name."""
    return {name: tuple(tensor.shape) for name, tensor in feeds.items()}


def _check_one(spec: TensorSpec, shape: tuple[int, ...], dtype: str, sizes: dict[str, int]) -> None:
    """Check one input, and note its symbolic dimensions in `sizes`."""
    if dtype != spec.dtype:
        raise EngineError(f"{spec.name} must be {spec.dtype}, got {dtype}", hint=f"cast {spec.name} to {spec.dtype}")
    fits = len(shape) == len(spec.dims)
    for dim, value in zip(spec.dims, shape, strict=False):
        fits = fits and value >= 1 and value == (sizes.setdefault(dim, value) if isinstance(dim, str) else dim)
    if not fits:
        wanted = ", ".join(str(dim) for dim in spec.dims)
        known = ", ".join(f"{name} = {value}" for name, value in sizes.items()) or "none yet"
        raise EngineError(
            f"{spec.name} must have the shape [{wanted}], got {list(shape)}",
            hint=f"dimensions of one name must agree between inputs (so far: {known})",
        )

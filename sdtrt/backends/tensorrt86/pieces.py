"""An engine in pieces: plans that follow each other, and what PyTorch computes between them.

Of a UNet that is self-attentions, of a VAE's halves their large group normalisations.

A first piece that takes nothing but conditioning gives the same at each step: it runs when that changes.

`engine.plan` is the first piece or the whole. Where there are more, `engine.plan.json` lists them. Its name, and those
of the others, begin with the first one's: so an entry's check of that one covers them all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdtrt.backends.tensorrt.plan import LoadedPlan, list_file, load_plan
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt.versions.messages import REBUILD
from sdtrt.common.errors import MALFORMED, EngineError
from sdtrt.common.files import read_small_file
from sdtrt.engines.entry import SIDECAR_BYTES, Entry
from sdtrt.specs.contract import CONDITIONING, ITEM_BYTES, Attention, Contract, TensorSpec


@dataclass(frozen=True)
class Normalization:
    """One group normalisation, without a scale and a shift.

    Args:
        source: name of what is normalised, `[B,C,H,W]`.
        result: name of what comes of it, of the same shape.
        groups: of channels; C is a multiple.
        epsilon: what is added to a group's variance.
    """

    source: str
    result: str
    groups: int
    epsilon: float

    @property
    def sources(self) -> tuple[str, ...]:
        """As an attention has them."""
        return (self.source,)

    def gives(self, there: Mapping[str, TensorSpec]) -> TensorSpec:
        """The result's name, dtype and shape, given the tensors available so far.

        Raises:
            ValueError: where it can't be computed from these.
        """
        source = there.get(self.source)
        sound = self.groups > 0 and math.isfinite(self.epsilon) and self.epsilon > 0
        if source is None or not sound or len(source.dims) != 4:
            raise ValueError(f"{self.result} can't be computed")
        _check_fixed(source)
        if source.shape({})[1] % self.groups:
            raise ValueError(f"{self.source} has no {self.groups} groups of channels")
        return replace(source, name=self.result)


Cut = Attention | Normalization


@dataclass(frozen=True)
class Piece:
    """One plan, and what comes after it.

    Args:
        plan: its file.
        contract: what it takes and gives; of one among several, with fixed sizes.
        cuts: to be computed after it.
    """

    plan: Path
    contract: Contract
    cuts: tuple[Cut, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it takes."""
        return tuple(spec.name for spec in self.contract.inputs)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what it takes, then of what it gives."""
        return (*self.inputs, *(spec.name for spec in self.contract.outputs))

    @property
    def is_of_conditioning(self) -> bool:
        """Whether it takes conditioning alone, so that its outputs stay the same from step to step."""
        return not self.cuts and all(name in CONDITIONING for name in self.inputs)


def piece_file(plan: Path, number: int) -> Path:
    """Where a piece lies, counted from 0."""
    return plan.with_name(f"{plan.name}.{number}") if number else plan


def write_pieces(plan: Path, pieces: Sequence[Piece]) -> None:
    """Write the list of an engine's pieces."""
    data = [
        {
            "contract": piece.contract.to_json(),
            "attentions": [asdict(cut) for cut in piece.cuts if isinstance(cut, Attention)],
            "normalizations": [asdict(cut) for cut in piece.cuts if isinstance(cut, Normalization)],
        }
        for piece in pieces
    ]
    list_file(plan).write_text(json.dumps(data))


def read_pieces(plan: Path, contract: Contract) -> tuple[Piece, ...]:
    """An engine's pieces in order: one, the plan itself, where there is no list.

    Raises:
        EngineError: where the list is not one of an engine with this contract.
    """
    file = list_file(plan)
    if not file.exists():
        return (Piece(plan, contract),)
    try:
        data = json.loads(read_small_file(file, SIDECAR_BYTES))
        pieces = tuple(_piece(piece_file(plan, number), entry) for number, entry in enumerate(data))
        _check(pieces, contract)
    except (*MALFORMED, OSError) as error:
        raise EngineError(f"{file} does not list the engine's pieces: {error}", hint=REBUILD) from error
    return pieces


def check_list(entry: Entry, plan: Path) -> None:
    """Refuse a list of pieces that is not the entry's: nobody has checked its content."""
    if list_file(plan).name not in entry.files and list_file(plan).exists():
        raise EngineError(f"{list_file(plan)} is not among the files of {entry.name}", hint=entry.removal)


def load_pieces(
    pieces: Sequence[Piece], library: Library, device: int, *, allow_host_code: bool = False
) -> tuple[LoadedPlan, ...]:
    """Load an engine's plans onto the current GPU, or share those that this process has loaded already (`load_plan`).

    Raises:
        EngineError: when one can't be loaded here, or is another component's.
    """
    return tuple(
        load_plan(piece.plan, piece.contract, library, device, allow_host_code=allow_host_code) for piece in pieces
    )


def _piece(plan: Path, data: Mapping[str, Any]) -> Piece:
    attentions = tuple(
        Attention(
            sources=tuple(str(name) for name in one["sources"]),
            result=str(one["result"]),
            heads=int(one["heads"]),
            width=int(one["width"]),
            scale=float(one["scale"]),
            tokens=one["tokens"],
        )
        for one in data["attentions"]
    )
    normalizations = tuple(
        Normalization(
            source=str(one["source"]),
            result=str(one["result"]),
            groups=int(one["groups"]),
            epsilon=float(one["epsilon"]),
        )
        for one in data.get("normalizations", ())  # lists of before there were such have none
    )
    return Piece(plan, Contract.from_json(data["contract"]), (*attentions, *normalizations))


def _check(pieces: Sequence[Piece], contract: Contract) -> None:
    """Raise `ValueError` unless the pieces follow each other and are one engine with that contract."""
    if len(pieces) < 2:
        raise ValueError(f"{len(pieces)} are listed")
    there: dict[str, TensorSpec] = {}
    wanted = {spec.name: spec for spec in contract.inputs}
    ends = {spec.name for spec in (*contract.inputs, *contract.outputs)}
    for piece in pieces:
        for spec in piece.contract.inputs:
            _check_same(spec, there.setdefault(spec.name, spec) if spec.name in wanted else there.get(spec.name))
        for spec in piece.contract.outputs:
            _check_fixed(spec)
            _check_new(spec.name, there, wanted)
            there[spec.name] = spec
        before = dict(there)  # cuts after one piece take nothing of each other
        for cut in piece.cuts:
            _check_new(cut.result, there, ends)
            there[cut.result] = cut.gives(before)
    made = {spec.name: spec for piece in pieces for spec in piece.contract.outputs}
    for spec, found in [(spec, there) for spec in contract.inputs] + [(spec, made) for spec in contract.outputs]:
        if spec.name not in found:
            raise ValueError(f"no piece has {spec.name}")
        if (found[spec.name].dtype, len(found[spec.name].dims)) != (spec.dtype, len(spec.dims)):
            raise ValueError(f"{spec.name} is not what the engine takes or gives")


def _check_same(spec: TensorSpec, made: TensorSpec | None) -> None:
    """Raise `ValueError` unless a piece takes what was made, in one fixed size."""
    if made is None:
        raise ValueError(f"nothing makes {spec.name}")
    if (spec.dtype, spec.dims) != (made.dtype, made.dims):
        raise ValueError(f"{spec.name} is not taken as it is made")
    _check_fixed(spec)


def _check_new(name: str, there: Collection[str], others: Collection[str]) -> None:
    """Raise `ValueError` for a name that something has: it would lie in a place of another size."""
    if name in there or name in others:
        raise ValueError(f"{name} is made twice")


def _check_fixed(spec: TensorSpec) -> None:
    """Raise `ValueError` unless a tensor has one size, in bytes too."""
    if spec.dtype not in ITEM_BYTES or not all(isinstance(dim, int) and dim > 0 for dim in spec.dims):
        raise ValueError(f"{spec.name} has no fixed size")

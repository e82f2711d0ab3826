"""An engine in pieces: plans that follow each other, and the self-attentions that PyTorch computes between them.

`engine.plan` is the first piece or the whole. Where there are more, `engine.plan.json` lists them. Its name, and those
of the others, begin with the first one's: so an entry's check of that one covers them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdtrt.cache import MALFORMED
from sdtrt.components import Contract
from sdtrt.errors import EngineError
from sdtrt.trt_api import REBUILD


@dataclass(frozen=True)
class Attention:
    """One self-attention, softmax(scale · q kᵀ) v for each head.

    Args:
        sources: names of the queries, keys and values `[B,S,C]`, the heads side by side in C; or of one tensor
            `[B,S,3C]` of all three.
        result: name of the result `[B,S,C]`.
        heads, width: C is their product.
        scale: of the product of queries and keys.
        tokens: S, where the sizes are fixed.
    """

    sources: tuple[str, ...]
    result: str
    heads: int
    width: int
    scale: float
    tokens: int | None = None


@dataclass(frozen=True)
class Piece:
    """One plan, and what comes after it.

    Args:
        plan: its file.
        contract: what it takes and gives; of one among several, with fixed sizes.
        attentions: to be computed after it.
    """

    plan: Path
    contract: Contract
    attentions: tuple[Attention, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it takes."""
        return tuple(spec.name for spec in self.contract.inputs)


def piece_file(plan: Path, number: int) -> Path:
    """Where a piece lies, counted from 0."""
    return plan.with_name(f"{plan.name}.{number}") if number else plan


def list_file(plan: Path) -> Path:
    """Where the list of an engine's pieces lies, if there are several."""
    return plan.with_name(f"{plan.name}.json")


def write_pieces(plan: Path, pieces: Sequence[Piece]) -> None:
    """Write the list of an engine's pieces."""
    data = [
        {"contract": piece.contract.to_json(), "attentions": [asdict(attention) for attention in piece.attentions]}
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
        data = json.loads(file.read_text())
        pieces = tuple(_piece(piece_file(plan, number), entry) for number, entry in enumerate(data))
        _check_order(pieces, contract)
    except (*MALFORMED, IndexError, OSError) as error:
        raise EngineError(f"{file} does not list the engine's pieces: {error}", hint=REBUILD) from error
    return pieces


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
    return Piece(plan, Contract.from_json(data["contract"]), attentions)


def _check_order(pieces: Sequence[Piece], contract: Contract) -> None:
    """Raise `ValueError` unless all inputs are used, each tensor is there when it is taken, and outputs at the end."""
    there = {spec.name for spec in contract.inputs}
    if unused := there - {name for piece in pieces for name in piece.inputs}:
        raise ValueError(f"nothing takes {', '.join(sorted(unused))}")
    for piece in pieces:
        missing = set(piece.inputs) - there
        there |= {spec.name for spec in piece.contract.outputs}
        for attention in piece.attentions:
            missing |= set(attention.sources) - there
            there.add(attention.result)
        if missing:
            raise ValueError(f"nothing makes {', '.join(sorted(missing))}")
    if missing := {spec.name for spec in contract.outputs} - there:
        raise ValueError(f"nothing makes {', '.join(sorted(missing))}")


def last_uses(pieces: Sequence[Piece], kept: Sequence[str]) -> tuple[frozenset[str], ...]:
    """For each piece, the tensors that nothing after it and its attentions takes, but for those to be kept."""
    uses = [
        {*piece.inputs, *(name for one in piece.attentions for name in (*one.sources, one.result))}
        | {spec.name for spec in piece.contract.outputs}
        for piece in pieces
    ]
    later: set[str] = set(kept)
    found: list[frozenset[str]] = []
    for used in reversed(uses):
        found.append(frozenset(used - later))
        later |= used
    return tuple(reversed(found))

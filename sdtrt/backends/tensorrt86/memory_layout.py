"""Which memory an engine's pieces need at which step, and where it lies in one block: `lay_out`.

A step is what runs at once: each plan is one, and what PyTorch computes after it is the next.

What plans alone write and read may lie channels last (`cut.channels_last`). That changes nothing here: it
has as many bytes, and they are all that is asked of such a tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdtrt.backends.tensorrt86.pieces import Normalization, Piece
from sdtrt.specs.contract import ITEM_BYTES, Attention, TensorSpec

ALIGNMENT = 512  # bytes, as PyTorch allocates on a GPU; TensorRT asks for 256


@dataclass(frozen=True)
class Layout:
    """Where the tensors that cross between plans, and each plan's own scratch memory, lie in one block; all in bytes.

    Args:
        places: a tensor's name → its offset and its spec.
        work_offsets: for each plan, where its own scratch memory begins.
        size: of the block.
    """

    places: Mapping[str, tuple[int, TensorSpec]]
    work_offsets: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class _Span:
    """Memory in use from a first to a last step: each plan is a step, and what PyTorch computes after it the next."""

    size: int
    first: int
    last: int

    def meets(self, other: _Span) -> bool:
        return self.first <= other.last and other.first <= self.last


def lay_out(pieces: Sequence[Piece], own: Collection[str], work_bytes: Sequence[int]) -> Layout:
    """Place the tensors that cross between plans, and each plan's own scratch memory, in one block of memory.

    The tensors are plans' outputs and the results of normalisations; a normalisation writes over its source where
    nothing else takes that afterwards. Results of attentions are not placed: PyTorch's kernels allocate them. What is
    never in use at the same step may share memory. The largest are placed first, so a plan that needs much scratch
    memory while few tensors cross may add nothing to the block.

    Args:
        pieces: of one engine, with fixed sizes where they are several.
        own: names of tensors that have memory elsewhere.
        work_bytes: the scratch memory that each plan needs for itself.
    """
    specs = {spec.name: spec for made, _ in _made(pieces) for spec in made if spec.name not in own}
    steps = _steps(pieces)
    homes = _homes(pieces, steps, specs)
    used: defaultdict[str, list[int]] = defaultdict(list)
    for name in specs:
        used[homes.get(name, name)] += steps[name]
    spans: dict[str | int, _Span] = {
        number: _Span(_aligned(size), 2 * number, 2 * number) for number, size in enumerate(work_bytes)
    }
    spans |= {name: _Span(_aligned(size_bytes(specs[name])), min(found), max(found)) for name, found in used.items()}
    offsets = _offsets(spans)
    return Layout(
        places={name: (offsets[homes.get(name, name)], spec) for name, spec in specs.items()},
        work_offsets=tuple(offsets[number] for number in range(len(pieces))),
        size=max(offsets[key] + span.size for key, span in spans.items()),
    )


def last_uses(pieces: Sequence[Piece], kept: Collection[str]) -> tuple[frozenset[str], ...]:
    """For each piece, the tensors that nothing takes after it and its cuts; never those in `kept`."""
    ends = {name: steps[-1] // 2 for name, steps in _steps(pieces).items() if name not in kept}
    return tuple(frozenset(name for name, end in ends.items() if end == number) for number in range(len(pieces)))


def _steps(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """The steps that make or take each tensor, in order."""
    steps: defaultdict[str, list[int]] = defaultdict(list)
    for number, piece in enumerate(pieces):
        for spec in (*piece.contract.inputs, *piece.contract.outputs):
            steps[spec.name].append(2 * number)
        for cut in piece.cuts:
            for name in (*cut.sources, cut.result):
                steps[name].append(2 * number + 1)
    return steps


def _homes(pieces: Sequence[Piece], steps: Mapping[str, Sequence[int]], placed: Collection[str]) -> dict[str, str]:
    """Result of a normalisation → the tensor whose place it is written to, where nothing takes its source later."""
    homes: dict[str, str] = {}
    for number, piece in enumerate(pieces):
        for cut in piece.cuts:
            if not isinstance(cut, Normalization) or cut.source not in placed:
                continue
            if [step for step in steps[cut.source] if step > 2 * number] == [2 * number + 1]:
                homes[cut.result] = homes.get(cut.source, cut.source)
    return homes


def _offsets(spans: Mapping[str | int, _Span]) -> dict[str | int, int]:
    """An offset for each span, the largest chosen first; spans in use at the same step don't overlap."""
    offsets: dict[str | int, int] = {}
    for key, span in sorted(spans.items(), key=lambda item: (-item[1].size, item[1].first, str(item[0]))):
        taken = [(at, at + spans[other].size) for other, at in offsets.items() if spans[other].meets(span)]
        offsets[key] = _first_gap(sorted(taken), span.size)
    return offsets


def _made(pieces: Sequence[Piece]) -> Iterator[tuple[list[TensorSpec], list[TensorSpec]]]:
    """For each piece: its outputs and the results of normalisations after it; the results of attentions after it."""
    there: dict[str, TensorSpec] = {}
    for piece in pieces:
        there |= {spec.name: spec for spec in (*piece.contract.inputs, *piece.contract.outputs)}
        found = [(cut, cut.gives(there)) for cut in piece.cuts]
        there |= {spec.name: spec for _, spec in found}
        normalized = [spec for cut, spec in found if isinstance(cut, Normalization)]
        yield [*piece.contract.outputs, *normalized], [spec for cut, spec in found if isinstance(cut, Attention)]


def _first_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Where so many bytes fit between places in order, or after them."""
    offset = 0
    for begin, end in taken:
        if begin - offset >= size:
            break
        offset = max(offset, end)
    return offset


def _aligned(size: int) -> int:
    """A size in bytes after which the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def size_bytes(spec: TensorSpec) -> int:
    """The bytes of a tensor of fixed size."""
    return math.prod(spec.shape({})) * ITEM_BYTES[spec.dtype]


def attention_bytes(pieces: Sequence[Piece]) -> int:
    """The most bytes that the results of the attentions after one piece take."""
    return max(sum(map(size_bytes, attended)) for _, attended in _made(pieces))

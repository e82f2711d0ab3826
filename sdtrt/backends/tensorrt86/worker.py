"""The process that builds an engine for TensorRT 8.6: whole, or in pieces that processes of their own build.

It knows what is cut and why an engine may be built whole after all. What it shares with later versions is the worker's
of `tensorrt`: how it is asked and answers, and how a network becomes a plan.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtrt.backends.child import Report, answer
from sdtrt.backends.tensorrt import worker
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.checking import check
from sdtrt.backends.tensorrt.versions import building, libraries, weak_typing
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt.versions.network import Draft
from sdtrt.backends.tensorrt86 import cut as cutting
from sdtrt.backends.tensorrt86 import norm_plugin, parallel_build, policy, precision
from sdtrt.backends.tensorrt86.build import PieceRequest, open_built
from sdtrt.backends.tensorrt86.cut import Slice
from sdtrt.backends.tensorrt86.pieces import Cut, Piece, piece_file, write_pieces
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.exports import onnx_file
from sdtrt.exports.attention import find_attentions
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs import BuildSpec
from sdtrt.specs.contract import CONDITIONING, Contract

# Cuts that nobody has asked for: each makes a plan more. Stable Diffusion XL has 10 attentions at its largest
# resolution, and 60 at the next.
MOST_CUTS = 16


def serve() -> None:
    """Answer one request, for an engine or for a piece of one (`child.answer`)."""
    answer(_build_any)


def _build_any(data: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """What is known of the engine or the piece that some JSON asks for."""
    if "piece" in data:
        return build_piece_here(PieceRequest.from_json(data), report)
    return build_here(Request.from_json(data), report)


class _PiecesError(Exception):
    """An engine in pieces could not be made; in one piece it may."""

    def __init__(self, error: BuildError | EngineError) -> None:
        self.error = error


def build_piece_here(request: PieceRequest, report: Report) -> dict[str, Any]:
    """Build the plan of one piece in this process: its `seconds` and `precision`."""
    library = libraries.open_library(request.spec.backend)
    with worker.logged(library, request):
        seconds, precision = _build_plan(library, request, report)
    return {"seconds": seconds, "precision": precision}


def build_here(request: Request, report: Report) -> dict[str, Any]:
    """Build and check an engine in this process; where nobody has asked for pieces and they fail, in one piece."""
    library = libraries.open_library(request.spec.backend)
    with worker.logged(library, request):
        try:
            return _build_and_check(library, request, report)
        except _PiecesError as failed:
            error = failed.error
            if without := _way_out(request.spec):
                raise type(error)(error.message, hint=f"{error.hint}; {without}") from failed
            loss = "takes more of the GPU's memory" if policy.splits_norms(request.spec) else "runs slower"
            report({"warn": f"the engine failed in pieces ({error.message}): building it in one, which {loss}"})
        whole = replace(request, spec=replace(request.spec, split_attention=0))
        return _build_and_check(library, whole, report)


def _way_out(spec: BuildSpec) -> str | None:
    """How to do without pieces, or without what was asked of them; None where nobody has asked for either."""
    if spec.channels_last:
        return "as by default: sdtrt build --no-channels-last"
    return "in one piece: sdtrt build --split-attention 0" if spec.split_attention else None


def _build_and_check(library: Library, request: Request, report: Report) -> dict[str, Any]:
    """Raises `_PiecesError` where an engine of several pieces can't be built or is not right."""
    worker.remove_plans(request)
    info = _build(library, request, report)

    def check_it() -> dict[str, Any]:
        read = precision.read_precision
        return check(library, request, report, info["precision"], open_engine=open_built, read=read)

    with _as_pieces(info["pieces"]):
        return info | worker.timed_check(report, check_it)


@contextmanager
def _as_pieces(count: int) -> Iterator[None]:
    """Turn failures of an engine in several pieces into `_PiecesError`."""
    try:
        yield
    except (BuildError, EngineError) as error:
        if count == 1:
            raise
        raise _PiecesError(error) from error


def _build(library: Library, request: Request, report: Report) -> dict[str, Any]:
    """Cut, parse and build; write the plan files and the timing cache."""
    report({"show": "reading the ONNX"})
    with tempfile.TemporaryDirectory(prefix=".pieces-", dir=request.folder) as folder:
        sources = _sources(request, Path(folder), report)
        channels_last = _channels_last(request, sources, report)
        with _as_pieces(len(sources)):
            if len(sources) > 1:
                measured = _build_pieces(request, sources, channels_last, report)
            else:
                seconds, found = _build_plan(library, request, report)
                measured = {"build_seconds": round(seconds, 3), "precision": found}
    return {
        "library": library.name,
        "profiles": [str(profile) for profile in request.spec.profiles],
        "pieces": len(sources),
        **({"channels_last": len(channels_last)} if request.spec.channels_last else {}),
        "plan_bytes": sum(source.piece.plan.stat().st_size for source in sources),
        **measured,
    }


def _channels_last(request: Request, sources: Sequence[_Source], report: Report) -> frozenset[str]:
    """What lies channels last between an engine's pieces; says so where that is asked for and nothing does."""
    if not request.spec.channels_last:
        return frozenset()
    found = cutting.channels_last([source.piece for source in sources], request.contract)
    if not found:
        report({"warn": "no plan of this engine gives another one what could lie channels last: nothing does"})
    return found


def _build_pieces(
    request: Request, sources: Sequence[_Source], channels_last: Collection[str], report: Report
) -> dict[str, Any]:
    """Build an engine's pieces side by side and list them; how long it took, and what is known of the precision."""
    whole = replace(request, spec=replace(request.spec, split_attention=0, channels_last=False))
    pieces = [
        PieceRequest.of(
            whole,
            source.onnx,
            source.piece.contract,
            number,
            tuple(name for name in source.piece.tensors if name in channels_last),
        )
        for number, source in enumerate(sources)
    ]
    start = time.perf_counter()
    found = parallel_build.build(pieces, request.log, report)
    seconds = time.perf_counter() - start
    write_pieces(request.plan, [source.piece for source in sources])
    return {
        "build_seconds": round(seconds, 3),
        "piece_seconds": [round(one["seconds"], 3) for one in found],
        "precision": found[0]["precision"],
    }


@dataclass(frozen=True)
class _Source:
    """One piece of an engine, or the whole, and the ONNX that it is built from."""

    onnx: Path
    piece: Piece


def _sources(request: Request, folder: Path, report: Report) -> tuple[_Source, ...]:
    """What to build: the exported model, or its slices between what is left to PyTorch, written to a folder."""
    slices = _slices(request, report)
    if not slices:
        return (_Source(request.onnx, Piece(request.plan, request.contract)),)
    found: list[_Source] = []
    while slices:  # one at a time: saving one copies its weights
        one, number = slices.pop(0), len(found)
        onnx = folder / f"{number}.onnx"
        onnx_file.save(one.model, one.weights, onnx)
        contract = Contract(request.contract.component, request.contract.precision, one.inputs, one.outputs)
        found.append(_Source(onnx, Piece(piece_file(request.plan, number), contract, one.cuts)))
    return tuple(found)


def _slices(request: Request, report: Report) -> list[Slice]:
    """The exported model's slices; none where it is built as it is. Says why, where slices were asked for."""
    spec, asked = request.spec, bool(request.spec.split_attention)
    tokens, norms = policy.split_tokens(spec), policy.splits_norms(spec)
    if not (tokens or norms):
        return []
    model, weights = onnx_file.load_split(request.onnx)
    cutting.freeze(model, weights, request.contract.input_shapes(spec.profiles[0].optimum))
    facts = GraphIndex(model, weights)
    cuts: Sequence[Cut]
    if tokens:
        cuts = cutting.choose(find_attentions(facts), tokens, None if asked else MOST_CUTS)
    else:
        cuts = cutting.choose_norms(facts)
    if not cuts:
        if asked:
            report({"warn": f"no self-attention is of {tokens} tokens or more: none is left to PyTorch"})
        return []
    try:
        slices = list(cutting.split(model, weights, facts, cuts, CONDITIONING))
        cutting.check_fixed(slices)
    except ValueError as error:
        if asked:
            raise BuildError(str(error), hint="leave attention to TensorRT: --split-attention 0") from error
        kept = "group normalisations are left to TensorRT, which takes more of the GPU's memory"
        report({"warn": f"{kept if norms else 'attention is left to TensorRT, which is slower here'}: {error}"})
        return []
    return slices


def _build_plan(library: Library, request: Request, report: Report) -> worker.Found:
    """Build one plan: a piece's, or that of an engine in one."""
    draft = _parse(library, request)
    if isinstance(request, PieceRequest):
        weak_typing.lay_channels_last(draft, request.channels_last)
    return worker.build_network(draft, request, report, precision.fp32_nodes(library, request))


def _parse(library: Library, request: Request) -> Draft:
    """The network of an ONNX; on 8.6 with group normalisations by its plugin, where that is asked for and serves."""
    onnx = request.onnx
    if request.spec.export.precision != "fp16" or not _plugin_serves(library, request.spec):
        return building.parse_onnx(library, onnx)
    model, weights = onnx_file.load_split(onnx)
    if norm_plugin.use_plugin(model, weights) == 0:
        return building.parse_onnx(library, onnx)
    is_piece = isinstance(request, PieceRequest)
    place = onnx.parent if is_piece else request.folder  # which goes, whoever ends this process
    with tempfile.TemporaryDirectory(prefix=".plugins-", dir=place) as folder:
        changed = Path(folder) / onnx.name
        onnx_file.save(model, weights, changed)
        del model, weights
        return building.parse_onnx(library, changed)  # the network has its own copy of the weights then


def _plugin_serves(library: Library, spec: BuildSpec) -> bool:
    """Whether group normalisations may be left to 8.6's plugin."""
    fits = all(profile.batch.max <= norm_plugin.MAX_BATCH for profile in spec.profiles)
    wanted = spec.norm_plugins and not spec.version_compatible
    return wanted and fits and weak_typing.has_plugin(library, norm_plugin.OPERATOR)

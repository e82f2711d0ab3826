"""The process that builds TensorRT plans: parse, build, check; a request on its stdin, reports in JSON lines."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtrt.backends.tensorrt.build import Report, Request
from sdtrt.backends.tensorrt.checking import check
from sdtrt.backends.tensorrt.versions import building, libraries, network, weak_typing
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt.versions.network import Draft
from sdtrt.backends.tensorrt86 import cut as cutting
from sdtrt.backends.tensorrt86 import norm_plugin, parallel_build, policy
from sdtrt.backends.tensorrt86.cut import Part
from sdtrt.backends.tensorrt86.pieces import Cut, Piece, piece_file, write_pieces
from sdtrt.backends.tensorrt86.precision import float32_nodes
from sdtrt.common.errors import BuildError, BuildMemoryShortage, EngineError, SdtrtError
from sdtrt.exports import onnx_file
from sdtrt.exports.attention import find_attentions
from sdtrt.exports.onnx_index import Facts
from sdtrt.specs import BuildSpec
from sdtrt.specs.contract import CONDITIONING, Contract

SHOW_SECONDS = 0.2  # between two lines of progress
# Cuts that nobody has asked for: each makes a plan more. Stable Diffusion XL has 10 attentions at its largest
# resolution, and 60 at the next.
MOST_CUTS = 16
LOCK_SECONDS = 60  # a timing cache is written in a moment: who holds it for longer is stopped or hangs


def serve() -> None:
    """Read a request from stdin, build, and report in JSON lines on stdout. What libraries print goes to stderr."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def report(message: Mapping[str, Any]) -> None:
        with lock:
            reports.write(json.dumps(message) + "\n")

    try:
        request = Request.from_json(json.loads(sys.stdin.buffer.readline()))
        threading.Thread(target=_die_with_parent, daemon=True).start()
        report({"result": build_here(request, report)})
    except SdtrtError as error:
        report({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except MemoryError:
        hint = "end other programs, or build for a smaller --batch, --height and --width"
        report({"error": BuildMemoryShortage.__name__, "message": "too little memory on the CPU", "hint": hint})
    except Exception:
        report({"bug": traceback.format_exc()})
    reports.flush()
    os._exit(0)  # the result is out: no tidying by TensorRT's and CUDA's destructors, which crash at times


def _die_with_parent() -> None:
    """End this process when stdin ends: the parent is gone."""
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(1)


class _PiecesError(Exception):
    """An engine in pieces could not be made; in one piece it may."""

    def __init__(self, error: BuildError | EngineError) -> None:
        self.error = error


def build_here(request: Request, report: Report) -> dict[str, Any]:
    """Build and check a plan in this process; where nobody has asked for pieces and they fail, in one piece.

    A request for a piece is for its plan alone: `seconds` and `precision` are told of it.
    """
    library = libraries.open_library(request.spec.backend)
    with request.log.open("a") as file, library.log.copied_to(file, verbose=request.verbose):
        if request.piece is not None:
            seconds, precision = _build_piece(library, request, report)
            return {"seconds": seconds, "precision": precision}
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
    for plan in request.folder.glob(f"{request.plan.name}*"):
        plan.unlink()  # of an earlier build, in a folder that is kept
    info = _build(library, request, report)
    report({"show": "checking"})
    start = time.perf_counter()
    with _as_pieces(info["pieces"]):
        info |= check(library, request, report, info["precision"])
    return info | {"check_seconds": round(time.perf_counter() - start, 3)}


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
    """Parse and build; write the plan files and the timing cache. The builder's memory is free again after this."""
    report({"show": "reading the ONNX"})
    with tempfile.TemporaryDirectory(prefix=".pieces-", dir=request.folder) as folder:
        sources = _sources(request, Path(folder), report)
        channels_last = _channels_last(request, sources, report)
        with _as_pieces(len(sources)):
            if len(sources) > 1:
                measured = _build_pieces(request, sources, channels_last, report)
            else:
                seconds, precision = _build_piece(library, request, report)
                measured = {"build_seconds": round(seconds, 3), "precision": precision}
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
    whole = replace(request.spec, split_attention=0, channels_last=False)
    pieces = [
        replace(
            request,
            onnx=source.onnx,
            contract=source.piece.contract,
            spec=whole,
            piece=number,
            channels_last=tuple(name for name in source.piece.tensors if name in channels_last),
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
    """What to build: the exported model, or its parts between what is left to PyTorch, written to a folder."""
    parts = _parts(request, report)
    if not parts:
        return (_Source(request.onnx, Piece(request.plan, request.contract)),)
    found: list[_Source] = []
    while parts:  # one at a time: saving a part copies its weights
        part, number = parts.pop(0), len(found)
        onnx = folder / f"{number}.onnx"
        onnx_file.save(part.model, part.weights, onnx)
        contract = Contract(request.contract.component, request.contract.precision, part.inputs, part.outputs)
        found.append(_Source(onnx, Piece(piece_file(request.plan, number), contract, part.cuts)))
    return tuple(found)


def _parts(request: Request, report: Report) -> list[Part]:
    """The exported model's parts; none where it is built as it is. Says why, where parts were asked for."""
    spec, asked = request.spec, bool(request.spec.split_attention)
    tokens, norms = policy.split_tokens(spec), policy.splits_norms(spec)
    if not (tokens or norms):
        return []
    model, weights = onnx_file.load_split(request.onnx)
    cutting.freeze(model, weights, request.contract.input_shapes(spec.profiles[0].optimum))
    facts = Facts(model, weights)
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
        parts = list(cutting.split(model, weights, facts, cuts, CONDITIONING))
        cutting.check_fixed(parts)
    except ValueError as error:
        if asked:
            raise BuildError(str(error), hint="leave attention to TensorRT: --split-attention 0") from error
        kept = "group normalisations are left to TensorRT, which takes more of the GPU's memory"
        report({"warn": f"{kept if norms else 'attention is left to TensorRT, which is slower here'}: {error}"})
        return []
    return parts


def _build_piece(library: Library, request: Request, report: Report) -> tuple[float, Mapping[str, Any]]:
    """Build one plan; the seconds that took, and what is known of its precision."""
    spec, contract = request.spec, request.contract
    draft = _parse(library, request)
    _check_inputs(draft, contract)
    weak_typing.lay_channels_last(draft, request.channels_last)
    shapes = [contract.profile_shapes(profile) for profile in spec.profiles]
    config = building.configure(draft, spec, shapes, _fp32_nodes(draft, request))
    for warning in draft.warnings:
        report({"warn": warning})
    if not building.read_timing_cache(config, request.timing_cache):
        report({"warn": f"{request.timing_cache} is of another TensorRT or GPU: starting a new timing cache"})
    report({"show": "optimising"})  # all that 8.6 tells until it is done
    monitor = building.watch_progress(library, config, _throttled(report))
    start = time.perf_counter()
    plan = building.serialize(draft, config)
    seconds = time.perf_counter() - start
    del monitor
    with request.plan.open("wb") as file:
        file.write(plan)
    _keep_timings(request.timing_cache, request.folder, config, report)
    return seconds, _network_precision(draft)


def _parse(library: Library, request: Request) -> Draft:
    """The network of an ONNX; on 8.6 with group normalisations by its plugin, where that is asked for and serves."""
    onnx = request.onnx
    if request.spec.export.precision != "fp16" or not _plugin_serves(library, request.spec):
        return building.parse_onnx(library, onnx)
    model, weights = onnx_file.load_split(onnx)
    if norm_plugin.use_plugin(model, weights) == 0:
        return building.parse_onnx(library, onnx)
    place = request.folder if request.piece is None else onnx.parent  # which goes, whoever ends this process
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


def _fp32_nodes(draft: Draft, request: Request) -> frozenset[str]:
    """The ONNX's nodes that compute in fp32, where the network's types don't say so by themselves."""
    if draft.library.has("strong typing") or request.spec.export.precision == "fp32":
        return frozenset()
    return float32_nodes(request.onnx)


def _throttled(report: Report) -> Callable[[str], bool]:
    """Report the builder's steps, at most a few a second. Never asks it to stop: the parent ends the process."""
    last = 0.0

    def show(text: str) -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last >= SHOW_SECONDS:
            last = now
            report({"show": text})
        return True

    return show


def _check_inputs(draft: Draft, contract: Contract) -> None:
    """Hold the network's inputs against the contract."""
    wanted = {spec.name: spec.dtype for spec in contract.inputs}
    found = network.network_inputs(draft)
    if found != wanted:
        raise BuildError(f"the ONNX takes {found}, and not {wanted}", hint="export it again: sdtrt export --force")


def _network_precision(draft: Draft) -> dict[str, Any]:
    """What a strongly typed network computes in; nothing is known of a weakly typed one before it is built."""
    if not draft.library.has("strong typing"):
        return {}
    return {"layers": network.network_precisions(draft), "read_from": "network"}


def _keep_timings(file: Path | None, folder: Path, config: Any, report: Report) -> None:
    """Add a build's timings to what is kept, in one step; what can't be written costs time, nothing else.

    They are first written to `folder`, which goes where somebody ends this process.
    """
    if file is None:
        return
    draft = folder / f"{file.name}.{os.getpid()}"
    try:
        with _alone_with(file, report):
            if data := building.timing_cache_bytes(config, building.kept_timings(file)):
                draft.write_bytes(data)
                draft.replace(file)
    except OSError:
        with suppress(OSError):
            draft.unlink()


@contextmanager
def _alone_with(file: Path, report: Report) -> Iterator[None]:
    """Keep out builds that end at the same time; where there is no lock to be had, the last one's timings are kept."""
    from filelock import FileLock

    path = file.with_name(f"{file.name}.lock")
    lock = FileLock(path, timeout=LOCK_SECONDS)
    try:
        if path.is_symlink():  # older versions of filelock make the file that it points to
            raise OSError(f"{path} is a link")
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # also where the file system has no locks
        report({"warn": f"no lock on TensorRT's timings ({error}): those of another build may be lost"})
    try:
        yield
    finally:
        lock.release()

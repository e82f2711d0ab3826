"""The process that builds a TensorRT plan: parse, build, check; a request on its stdin, reports in JSON lines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdtrt.backends.child import Report, answer
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.checking import check
from sdtrt.backends.tensorrt.versions import building, libraries
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt.versions.network import Draft, network_inputs, network_precisions
from sdtrt.common.errors import BuildError
from sdtrt.specs.contract import Contract

SHOW_SECONDS = 0.2  # between two lines of progress
LOCK_SECONDS = 60  # a timing cache is written in a moment: who holds it for longer is stopped or hangs

Found = tuple[float, Mapping[str, Any]]  # the seconds that a build took, and what is known of its precision


def serve() -> None:
    """Answer one request for a plan (`answer`)."""
    answer(lambda data, report: build_here(Request.from_json(data), report))


def build_here(request: Request, report: Report) -> dict[str, Any]:
    """Build and check a plan in this process."""
    library = libraries.open_library(request.spec.backend)
    with logged(library, request):
        remove_plans(request)
        report({"show": "reading the ONNX"})
        seconds, precision = build_network(building.parse_onnx(library, request.onnx), request, report)
        info = {
            "library": library.name,
            "profiles": [str(profile) for profile in request.spec.profiles],
            "pieces": 1,
            "plan_bytes": request.plan.stat().st_size,
            "build_seconds": round(seconds, 3),
            "precision": precision,
        }
        return info | timed_check(report, lambda: check(library, request, report, precision))


@contextmanager
def logged(library: Library, request: Request) -> Iterator[None]:
    """Copy TensorRT's messages to a request's log."""
    with request.log.open("a") as file, library.log.copied_to(file, verbose=request.verbose):
        yield


def remove_plans(request: Request) -> None:
    """Remove the plans of an earlier build, in a folder that is kept."""
    for plan in request.folder.glob(f"{request.plan.name}*"):
        plan.unlink()


def timed_check(report: Report, check_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a check finds, and how long it took."""
    report({"show": "checking"})
    start = time.perf_counter()
    return check_it() | {"check_seconds": round(time.perf_counter() - start, 3)}


def build_network(draft: Draft, request: Request, report: Report, fp32_nodes: Collection[str] = ()) -> Found:
    """Build the plan of a network and write it, with the timing cache. The builder's memory is free again after this.

    Args:
        fp32_nodes: the ONNX's nodes that compute in fp32, where the network's types don't say so by themselves.
    """
    spec, contract = request.spec, request.contract
    _check_inputs(draft, contract)
    shapes = [contract.profile_shapes(profile) for profile in spec.profiles]
    config = building.configure(draft, spec, shapes, fp32_nodes)
    for warning in draft.warnings:
        report({"warn": warning})
    if not building.read_timing_cache(config, request.timing_cache):
        report({"warn": f"{request.timing_cache} is of another TensorRT or GPU: starting a new timing cache"})
    report({"show": "optimising"})  # all that 8.6 tells until it is done
    monitor = building.watch_progress(draft.library, config, _throttled(report))
    start = time.perf_counter()
    plan = building.serialize(draft, config)
    seconds = time.perf_counter() - start
    del monitor
    with request.plan.open("wb") as file:
        file.write(plan)
    _keep_timings(request.timing_cache, request.folder, config, report)
    return seconds, _network_precision(draft)


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
    found = network_inputs(draft)
    if found != wanted:
        raise BuildError(f"the ONNX takes {found}, and not {wanted}", hint="export it again: sdtrt export --force")


def _network_precision(draft: Draft) -> dict[str, Any]:
    """What a strongly typed network computes in; nothing is known of a weakly typed one before it is built."""
    if not draft.library.has("strong typing"):
        return {}
    return {"layers": network_precisions(draft), "read_from": "network"}


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

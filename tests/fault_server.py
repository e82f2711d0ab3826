"""A server that forks: each request runs a real export, build or generation in a process of its own, and may kill it.

Imports take seconds, jobs on the smallest model tenths of one: so the imports are made once, here, and every job runs
in a fork. Requests and replies are lines of JSON on stdin and stdout. A request names a job, its folder, and a fault:

    {"kill_at": N}          SIGKILL to itself before its N-th operation on a file in the folder (from 1)
    {"kill_after": S}       SIGKILL from outside after S seconds, wherever it is then
    {"kill_counting": true} SIGKILL to itself while it holds the lock of tqdm's progress bars
    {"interrupt_after": S}  SIGINT from outside after S seconds
    {"fail_at": N, "errno": E}  the N-th operation on a file fails with that error
    {"limit": BYTES}        no file may grow beyond that
    {"unprivileged": true}  even root must obey permissions

A reply's "end" is done, error, interrupted, killed, bug, or hung: then with the stacks of what did not end.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import json
import multiprocessing
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import factories
import torch
from tqdm import tqdm

from sdtrt.backends import build as engine_build
from sdtrt.backends.open import open_session
from sdtrt.common.console import QUIET
from sdtrt.common.errors import SdtrtError
from sdtrt.engines import directory as engine_directory
from sdtrt.engines import upkeep
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports import component as component_export
from sdtrt.exports import to_file
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.runs import generate
from sdtrt.specs import BuildSpec, ExportSpec, GenerateSpec, ModelSpec, Sizes

UNET = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
SIZES = Sizes(2, 64, 64)
PROMPT = "a red circle"
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.utime")
PATIENCE_SECONDS = 60


# ------------------------------------------------------------------------------------------------------------- jobs


def make_export(model: ModelSpec, folder: Path) -> str:
    """Export into the engine directory, again even if it is there."""
    spec = ExportSpec(model, precision="fp32", force=True)
    entry = component_export.export_component(resolve_model(model), spec, EngineDirectory(folder / "engines"))
    return factories.sha256_of(entry.verified("model.onnx"))


def make_file(model: ModelSpec, folder: Path) -> str:
    """Export to a file that is there already."""
    spec = ExportSpec(model, precision="fp32", output=folder / "out" / "unet.onnx", overwrite=True)
    return factories.sha256_of(to_file.export_file(resolve_model(model), spec))


def make_engine(model: ModelSpec, folder: Path) -> str:
    """Build, exporting first if that is missing; then run the engine."""
    directory = EngineDirectory(folder / "engines")
    spec = BuildSpec(ExportSpec(model, precision="fp32"), "onnxruntime")
    entry = engine_build.build_engine(resolve_model(model), spec, directory)
    with open_session(entry, torch.device("cpu")) as session:
        outputs = session.run(seeded_feeds(session.contract, SIZES))
    return hashlib.sha256(outputs["out_sample"].numpy().tobytes()).hexdigest()


def make_images(model: ModelSpec, folder: Path) -> str:
    """Two images into a folder, the engine built if it is missing."""
    report = generate.generate(_request(model, num_images=2, output=folder / "out"), _directory(folder), QUIET)
    return ",".join(factories.sha256_of(image.path) for image in report.images)


def make_image(model: ModelSpec, folder: Path) -> str:
    """One image in place of another."""
    output = folder / "out" / "again.png"
    generate.generate(_request(model, output=output, overwrite=True), _directory(folder), QUIET)
    return factories.sha256_of(output)


def crowd(model: ModelSpec, folder: Path, count: int = 8) -> dict[str, list[str]]:
    """Many processes at once that want the same engine; what each got, and what was made."""
    start, replies = multiprocessing.get_context("fork").Barrier(count), []
    for _ in range(count):
        reader, writer = os.pipe()
        if os.fork() == 0:
            made = _note_what_is_made()
            start.wait()
            with os.fdopen(writer, "w") as pipe:
                json.dump({"result": make_engine(model, folder), "made": made}, pipe)
            os._exit(0)
        os.close(writer)
        replies.append(os.fdopen(reader))
    found = [json.load(pipe) for pipe in replies]
    return {"results": [one["result"] for one in found], "made": [name for one in found for name in one["made"]]}


def _note_what_is_made() -> list[str]:
    """A list that gets the backend or kind of every entry that this process makes from now on."""
    made: list[str] = []
    publish = engine_directory.publish

    def noted(path: Path, kind: str, key: Mapping[str, Any], *rest: Any, **more: Any) -> Any:
        made.append(str(key.get("backend", kind)))
        return publish(path, kind, key, *rest, **more)

    engine_directory.publish = noted
    return made


def check(model: ModelSpec, folder: Path) -> list[list[str]]:
    """What is there now: every entry with its state, every file with its digest."""
    found = [[one.name, one.state] for one in upkeep.check(EngineDirectory(folder / "engines"))]
    files = sorted(path for path in (folder / "out").iterdir() if path.is_file())
    for path in files:
        if path.name.startswith(".sdtrt-"):  # a killed process's draft: hidden, and nobody's file
            path.unlink()
            continue
        found.append([path.name, factories.sha256_of(path)])
    return found


def sweep(model: ModelSpec, folder: Path) -> int:
    """Remove what killed jobs have left."""
    return upkeep.sweep(_directory(folder))


JOBS: dict[str, Callable[[ModelSpec, Path], Any]] = {
    "export": make_export,
    "file": make_file,
    "build": make_engine,
    "images": make_images,
    "image": make_image,
    "crowd": crowd,
    "check": check,
    "sweep": sweep,
}


def _directory(folder: Path) -> EngineDirectory:
    return EngineDirectory(folder / "engines")


def _request(model: ModelSpec, **values: Any) -> GenerateSpec:
    return GenerateSpec((PROMPT,), model, "onnxruntime", steps=1, height=64, width=64, seed=1, **values)


# ----------------------------------------------------------------------------------------------------------- faults


def inject(fault: Mapping[str, Any], folder: Path) -> Callable[[], int]:
    """Arrange for a fault in this process; returns what counts the operations so far."""
    count = 0
    inside = str(folder)

    def operation(path: str | None) -> None:
        nonlocal count
        count += 1
        if count == fault.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if count == fault.get("fail_at"):
            raise OSError(fault["errno"], os.strerror(fault["errno"]), path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            reads = event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str) and path.startswith(inside) and not (reads and "fail_at" in fault):
                operation(path)

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        operation(None)
        fsync(descriptor)

    if "limit" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
    if fault.get("unprivileged"):
        _drop_capabilities()
    if fault.get("kill_counting"):
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    os.fsync = counted_fsync
    return lambda: count


def _drop_capabilities() -> None:
    """Make root obey permissions, as everybody does."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


# ----------------------------------------------------------------------------------------------------------- server


def run_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in this process with its fault; what it ended with. Interrupts count only while the job runs."""
    folder = Path(request["folder"])
    start = time.perf_counter()
    operations = inject(request.get("fault") or {}, folder)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        result = _end_of(JOBS[request["job"]], ModelSpec(request["model"]), folder)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        result = {"end": "interrupted"}
    return result | {"operations": operations(), "seconds": time.perf_counter() - start}


def _end_of(job: Callable[[ModelSpec, Path], Any], model: ModelSpec, folder: Path) -> dict[str, Any]:
    """What a job ends with, but for an interrupt."""
    try:
        return {"end": "done", "value": job(model, folder)}
    except SdtrtError as error:
        return {"end": "error", "type": type(error).__name__, "message": error.message, "hint": error.hint}
    except KeyboardInterrupt:
        raise
    except BaseException:
        return {"end": "bug", "trace": traceback.format_exc()}


def run_forked(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in a fork, with its fault; `killed` where it said nothing any more."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile("w+") as stacks:
        child = os.fork()
        if child == 0:
            os.close(reader)
            faulthandler.dump_traceback_later(PATIENCE_SECONDS - 2, file=stacks)
            reply = json.dumps(run_here(request)).encode()
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(reply)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            ended = _strike(child, pipe, request.get("fault") or {})
            reply = pipe.read()
        os.waitpid(child, 0)
        if not ended:
            stacks.seek(0)
            return {"end": "hung", "trace": stacks.read()}
    return json.loads(reply) if reply else {"end": "killed"}


def _strike(child: int, pipe: IO[bytes], fault: Mapping[str, Any]) -> bool:
    """Send the signal that a fault asks for, when it is time, and kill a fork that hangs; whether it did not hang."""
    for name, number in (("kill_after", signal.SIGKILL), ("interrupt_after", signal.SIGINT)):
        if name in fault and not _speaks(pipe, fault[name]):
            os.kill(child, number)
    if _speaks(pipe, PATIENCE_SECONDS):
        return True
    os.kill(child, signal.SIGKILL)
    return False


def _speaks(pipe: IO[bytes], seconds: float) -> bool:
    return bool(select.select([pipe], [], [], seconds)[0])


def part_progress_bars() -> None:
    """Give each fork a lock of its own for tqdm's bars: one for all stays held where a fork is killed with it."""
    tqdm.monitor_interval = 0  # nor a thread in the server, which could hold the lock while it forks
    tqdm.set_lock(threading.RLock())


def prepare(model: Path, folder: Path) -> None:
    """Make the model, run every job once (so that everything is imported)."""
    torch.set_num_threads(1)
    factories.sd1_folder(model, cross_attention_dim=factories.TEXT_WIDTH, **UNET)
    (folder / "out").mkdir(parents=True)
    for job in ("export", "file", "build", "images", "image", "check"):
        JOBS[job](ModelSpec(str(model)), folder)
    shutil.rmtree(folder)


def main() -> None:
    """Serve until stdin ends."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model = Path(sys.argv[1])
    part_progress_bars()
    prepare(model, model.with_name("prepared"))
    reports.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = {"model": str(model), **json.loads(line)}
        reports.write(json.dumps(run_forked(request)) + "\n")


if __name__ == "__main__":
    main()

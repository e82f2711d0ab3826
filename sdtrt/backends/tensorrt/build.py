"""ONNX → TensorRT plan, in a process of its own (`worker`): what is asked of it, and what it tells.

TensorRT's builder is one C++ call of minutes, which 8.6 can't be asked to
leave: there, a process can be ended at once (Ctrl-C) and all its memory comes back; and should the builder crash, it
takes nothing with it. The parent sends the request through the child's stdin and keeps that open: when the parent
dies, however it dies, the child sees the end of stdin and goes too.

A child that starts further ones leads a group of processes, which ends as a whole.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from sdtrt.backends.tensorrt.plan import TENSORRT_FILE
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.versions.messages import OUT_OF_MEMORY
from sdtrt.common import errors, interrupts
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, BuildMemoryShortage, SdtrtError
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile
from sdtrt.specs.contract import Contract

LOG_FILE = "build.log"
WORKER = "sdtrt.backends.tensorrt.worker"  # the module that a child serves by

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What the building process needs to know."""

    onnx: Path
    folder: Path
    contract: Contract
    spec: BuildSpec
    timing_cache: Path | None
    verbose: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the pipe."""
        paths = {name: str(getattr(self, name)) for name in ("onnx", "folder")}
        cache = None if self.timing_cache is None else str(self.timing_cache)
        spec = asdict(replace(self.spec, export=replace(self.spec.export, output=None)))
        contract = self.contract.to_json()
        return {**paths, "contract": contract, "spec": spec, "timing_cache": cache, "verbose": self.verbose}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        spec, capability = data["spec"], data["spec"]["compute_capability"]
        export = ExportSpec(**spec["export"] | {"model": ModelSpec(**spec["export"]["model"])})
        profiles = tuple(Profile.from_json(profile) for profile in spec["profiles"])
        tuples = {"profiles": profiles, "compute_capability": capability and tuple(capability)}
        return cls(
            onnx=Path(data["onnx"]),
            folder=Path(data["folder"]),
            contract=Contract.from_json(data["contract"]),
            spec=BuildSpec(**spec | tuples | {"export": export}),
            timing_cache=data["timing_cache"] and Path(data["timing_cache"]),
            verbose=data["verbose"],
        )

    @property
    def plan(self) -> Path:
        """Where the plan goes."""
        return self.folder / TENSORRT_FILE

    @property
    def log(self) -> Path:
        """Where TensorRT's messages go."""
        return self.folder / LOG_FILE


def build_plan(
    onnx_path: Path,
    folder: Path,
    contract: Contract,
    spec: BuildSpec,
    *,
    timing_cache: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Build a plan into `folder/engine.plan`, TensorRT's messages into `folder/build.log`, and check the plan.

    Args:
        onnx_path: the exported ONNX model; external data lies beside it.
        folder: an entry's folder.
        contract: of the model.
        timing_cache: kernel timings of earlier builds, read and then added to; None for none.

    Returns:
        What is known of the engine: `precision` (computing layers by precision, and where that was read), `parity`
        with the ONNX for each profile, `pieces` (how many plans: 1), `build_seconds`, `unchecked` (why the engine was
        not run, else None), `plan_bytes` and `scratch_bytes` (what a session takes of the GPU's memory; the latter only
        where the engine was run), ...

    Raises:
        BuildError, EngineError: where it can't be built or is not right. `folder` is then to be thrown away.
    """
    request = Request(onnx_path.resolve(), folder.resolve(), contract, spec, timing_cache, console.verbose)
    check_request(request)
    announce(request, console)
    with console.activity("building the engine") as show:
        return build_in_child(request, console, show)


def announce(request: Request, console: Console) -> None:
    """Say what is going to be built."""
    spec, contract = request.spec, request.contract
    sizes = "; ".join(map(contract.describe, spec.profiles))
    console.note(f"{spec.backend} {spec.export.precision} engine of the {contract.component} for {sizes}")


def check_request(request: Request) -> None:
    """Raise what can be known before any work: no GPU, a precision that the library lacks."""
    spec = request.spec
    library = libraries.open_library(spec.backend)
    libraries.require_builder(library)
    if spec.export.precision == "bf16" and not library.has("bfloat16"):
        raise BuildError(f"{library.name} has no bf16", hint="use --precision fp16")
    if not library.has("named compute capability"):
        libraries.require_gpu(library)


def build_in_child(
    request: Request, console: Console, show: Callable[[str], None], worker: str = WORKER
) -> dict[str, Any]:
    """Build in a process of its own, and tell the console what that tells.

    Args:
        show: gets what the process does just now.
        worker: the module that serves there.

    Raises:
        SdtrtError: the process's own. The log is kept then, and the console told where.
    """

    def report(message: Mapping[str, Any]) -> None:
        show(message["show"]) if "show" in message else console.warn(message["warn"])

    try:
        return run_worker(request, report, worker=worker)
    except SdtrtError:
        _keep_log(request.log, console)
        raise


def run_worker(
    request: Request,
    report: Report,
    *,
    worker: str = WORKER,
    leads_group: bool = True,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
) -> dict[str, Any]:
    """Run a module's `serve` in a process of its own and follow it; end it whenever this function is left.

    Args:
        report: gets what the process shows and warns of.
        worker: the module.
        leads_group: the process has a group of its own, with all that it starts: a Ctrl-C at the terminal, which goes
            to a whole group, is for the parent to handle. Else it stays in this process's group, and goes with that.
        started: gets the process itself, before it has its request.

    Returns:
        What the process has found.

    Raises:
        SdtrtError: the process's own; `BuildError` where it died without a word.
    """
    with request.log.open("ab") as log, ExitStack() as stack:
        with interrupts.held():  # until it is known to whoever ends this process
            child = stack.enter_context(_start(log, worker, leads_group=leads_group))
            end = partial(_end, child, with_group=leads_group)
            stack.enter_context(interrupts.undoing(partial(_end_and_wait, child, end)))
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            started(child)
            _send(request, child.stdin)
            result = _follow(child.stdout, report)
        finally:
            end()
    if result is None:
        raise _crash(child.returncode, request.log)
    return result


def _start(log: IO[bytes], worker: str, *, leads_group: bool) -> subprocess.Popen[bytes]:
    """Start a process in which a module serves; what it prints goes into the log."""
    code = f"from {worker} import serve; serve()"
    paths = os.pathsep.join(path for path in sys.path if path)  # the child finds what this process finds
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:] = [p for p in sys.path if p]; {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        start_new_session=leads_group,
    )


def _end(child: subprocess.Popen[bytes], *, with_group: bool) -> None:
    """Kill a process; with its group, those that it has started too."""
    if with_group and os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # it is gone already
            os.killpg(child.pid, signal.SIGKILL)  # nobody has waited for it yet: the number is still its own
    child.kill()


def _end_and_wait(child: subprocess.Popen[bytes], end: Callable[[], None]) -> None:
    """End a process and wait until it writes no more. Not `Popen.wait`: a signal may land where that holds its lock."""
    end()
    if os.name == "posix":
        with suppress(ChildProcessError):
            os.waitpid(child.pid, 0)


def _keep_log(log: Path, console: Console) -> None:
    """Save the log of a failed build from the folder that is about to go, and say where it is."""
    with suppress(OSError):  # a full disk may be why the build failed, and that is what is to be told
        with tempfile.NamedTemporaryFile("wb", prefix="sdtrt-build-", suffix=".log", delete=False) as kept:
            for file in sorted(log.parent.glob(f"{log.name}*")):  # and of pieces, where nobody was left to join them
                kept.write(file.read_bytes())
        console.warn(f"the build failed; TensorRT's log is in {kept.name}")


def _send(request: Request, pipe: IO[bytes]) -> None:
    """Give the child its request; a child that has died already tells why on its stderr."""
    try:
        pipe.write(json.dumps(request.to_json()).encode() + b"\n")
        pipe.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            pipe.close()  # now: what is left in its buffer would fail again when `Popen` closes it


def _follow(pipe: IO[bytes], report: Report) -> dict[str, Any] | None:
    """Pass on what the child reports; returns its result, None if it ends without one."""
    for line in pipe:
        message = json.loads(line)
        if "show" in message or "warn" in message:
            report(message)
        elif "error" in message:
            raise getattr(errors, message["error"])(message["message"], hint=message["hint"])
        elif "bug" in message:
            raise RuntimeError(f"the build process failed:\n{message['bug']}")
        elif "result" in message:
            return dict(message["result"])
    return None


def _crash(code: int, log: Path) -> BuildError:
    """The error for a build process that ended without a word."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = " | ".join(lines[-3:])[-600:]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    killed = " (the system ends processes that use too much memory this way)" if name == "SIGKILL" else ""
    short = killed or re.search(rf"{OUT_OF_MEMORY}|bad_alloc", last)
    return (BuildMemoryShortage if short else BuildError)(
        f"TensorRT's builder died ({name}){killed}; its last words: {last or 'none'}",
        hint="try a lower --batch, --height or --optimization-level, or update TensorRT and the driver",
    )

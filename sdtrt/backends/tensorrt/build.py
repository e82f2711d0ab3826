"""ONNX → TensorRT plan, in a process of its own (`build.worker`): what is asked of it, and what it tells.

TensorRT's builder is one C++ call of minutes, which 8.6 can't be asked to
leave: there, a process can be ended at once (Ctrl-C) and all its memory comes back; and should the builder crash, it
takes nothing with it. The parent sends the request through the child's stdin and keeps that open: when the parent
dies, however it dies, the child sees the end of stdin and goes too.

The pieces of one engine are built by such processes too, which the first one starts (`build.crew`). They are of its
process group, which ends as a whole.
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
from typing import IO, Any

from sdtrt.backends.tensorrt.plan import TENSORRT_FILE
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.versions.messages import OUT_OF_MEMORY
from sdtrt.backends.tensorrt86 import policy
from sdtrt.backends.tensorrt86.pieces import piece_file
from sdtrt.common import errors, interrupts
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, BuildMemoryShortage, SdtrtError
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile
from sdtrt.specs.contract import Contract

LOG_FILE = "build.log"

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What the building process needs to know.

    Args:
        piece: which piece of the engine `onnx` and `contract` are, counted from 0; None for the whole engine.
        channels_last: of a piece, the inputs and outputs that lie channels last in memory.
    """

    onnx: Path
    folder: Path
    contract: Contract
    spec: BuildSpec
    timing_cache: Path | None
    verbose: bool
    piece: int | None = None
    channels_last: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the pipe."""
        paths = {name: str(getattr(self, name)) for name in ("onnx", "folder")}
        cache = None if self.timing_cache is None else str(self.timing_cache)
        spec = asdict(replace(self.spec, export=replace(self.spec.export, output=None)))
        contract = self.contract.to_json()
        others = {"timing_cache": cache, "verbose": self.verbose, "piece": self.piece}
        return {**paths, "contract": contract, "spec": spec, **others, "channels_last": self.channels_last}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
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
            piece=data["piece"],
            channels_last=tuple(data["channels_last"]),
        )

    @property
    def plan(self) -> Path:
        """Where the plan goes."""
        return piece_file(self.folder / TENSORRT_FILE, self.piece or 0)

    @property
    def log(self) -> Path:
        """Where TensorRT's messages go; those of a piece for as long as it is built."""
        return self.folder / (LOG_FILE if self.piece is None else f"{LOG_FILE}.{self.piece}")


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

    Where something is left to PyTorch these are several (`runtime.pieces`).

    Args:
        onnx_path: the exported ONNX model; external data lies beside it.
        folder: an entry's folder.
        contract: of the model.
        timing_cache: kernel timings of earlier builds, read and then added to; None for none.

    Returns:
        What is known of the engine: `precision` (computing layers by precision, and where that was read), `parity`
        with the ONNX for each profile, `pieces` (how many plans), `build_seconds` of them all and, of several,
        `piece_seconds` of each, `unchecked` (why the engine was not run, else None), `plan_bytes` and `scratch_bytes`
        (what a session takes of the GPU's memory; the latter only where the engine was run), ...

    Raises:
        BuildError, EngineError: where it can't be built or is not right. `folder` is then to be thrown away.
    """
    request = Request(onnx_path.resolve(), folder.resolve(), contract, spec, timing_cache, console.verbose)
    check_request(request)
    sizes = "; ".join(map(contract.describe, spec.profiles))
    console.note(f"{spec.backend} {spec.export.precision} engine of the {contract.component} for {sizes}")
    if (alone := policy.faster_alone(spec)) is not None:
        options = f"--batch {alone.batch} --height {alone.height} --width {alone.width}"
        console.note(f"TensorRT 8.6 is faster with an engine for each size, such as sdtrt build {options}")
    with console.activity("building the engine") as show:
        return _build_in_child(request, console, show)


def check_request(request: Request) -> None:
    """Raise what can be known before any work: no GPU, a precision that the library lacks."""
    spec = request.spec
    library = libraries.open_library(spec.backend)
    libraries.require_builder(library)
    if spec.export.precision == "bf16" and not library.has("bfloat16"):
        raise BuildError(f"{library.name} has no bf16", hint="use --precision fp16")
    if spec.split_attention and not library.has("weak typing"):
        raise BuildError(
            f"{library.name} does not leave attention to PyTorch: only 8.6 gains by it",
            hint="leave --split-attention out",
        )
    if spec.channels_last and not library.has("weak typing"):
        raise BuildError(
            f"{library.name} builds no engines in pieces, which alone can be channels-last: only 8.6 gains by pieces",
            hint="leave --channels-last out",
        )
    if not library.has("named compute capability"):
        libraries.require_gpu(library)


def _build_in_child(request: Request, console: Console, show: Callable[[str], None]) -> dict[str, Any]:
    """Run `worker.serve` in a process of its own, and tell the console what that tells."""

    def report(message: Mapping[str, Any]) -> None:
        show(message["show"]) if "show" in message else console.warn(message["warn"])

    try:
        return run_worker(request, report)
    except SdtrtError:
        _keep_log(request.log, console)
        raise


def run_worker(
    request: Request, report: Report, started: Callable[[subprocess.Popen[bytes]], None] = lambda child: None
) -> dict[str, Any]:
    """Run `worker.serve` in a process of its own and follow it; end it whenever this function is left.

    Args:
        report: gets what the process shows and warns of.
        started: gets the process itself, before it has its request.

    Returns:
        What the process has found.

    Raises:
        SdtrtError: the process's own; `BuildError` where it died without a word.
    """
    with request.log.open("ab") as log, ExitStack() as stack:
        with interrupts.held():  # until it is known to whoever ends this process
            child = stack.enter_context(_start(log, leads_group=request.piece is None))
            end = partial(_end, child, with_group=request.piece is None)
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


def _start(log: IO[bytes], *, leads_group: bool) -> subprocess.Popen[bytes]:
    """Start a process that serves; what it prints goes into the log."""
    code = "from sdtrt.backends.tensorrt.worker import serve; serve()"
    paths = os.pathsep.join(path for path in sys.path if path)  # the child finds what this process finds
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:] = [p for p in sys.path if p]; {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        start_new_session=leads_group,  # a Ctrl-C at the terminal is for the parent to handle
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

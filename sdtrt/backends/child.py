"""A build in a process of its own: it can be ended at once, all its memory comes back, and a crash takes nothing along.

The parent sends a request through the child's stdin and keeps that open: when the parent dies, however it dies, the
child sees the end of stdin and goes too. The child reports in JSON lines on its stdout. A child that starts further
ones leads a group of processes, which ends as a whole.

Knows no backend: what is asked, and what serves it, are the caller's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from sdtrt.common import errors, interrupts
from sdtrt.common.errors import BuildError, BuildMemoryShortage, SdtrtError

Report = Callable[[Mapping[str, Any]], None]
_OUT_OF_MEMORY = r"(?i)out of memory|bad_alloc|MemoryError"


class ChildRequest(Protocol):
    """What a child is asked for."""

    @property
    def log(self) -> Path:
        """Where what the child and its libraries print goes."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the pipe."""


def run_worker(
    request: ChildRequest,
    report: Report,
    *,
    worker: str,
    leads_group: bool = True,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
    environment: Mapping[str, str] | None = None,
    crashed: Callable[[int, Path], BuildError] | None = None,
) -> dict[str, Any]:
    """Run a module's `serve` in a process of its own and follow it; end it whenever this function is left.

    Args:
        report: gets what the process shows and warns of.
        worker: the module.
        leads_group: the process has a group of its own, with all that it starts: a Ctrl-C at the terminal, which goes
            to a whole group, is for the parent to handle. Else it stays in this process's group, and goes with that.
        started: gets the process itself, before it has its request.
        environment: of the process; None for this process's own.
        crashed: the error for a process that ended without a word, from its exit code and its log.

    Returns:
        What the process has found.

    Raises:
        SdtrtError: the process's own; `BuildError` where it died without a word.
    """
    with request.log.open("ab") as log, ExitStack() as stack:
        with interrupts.held():  # until it is known to whoever ends this process
            child = stack.enter_context(_start(log, worker, environment, leads_group=leads_group))
            end = partial(end_child, child, with_group=leads_group)
            stack.enter_context(interrupts.undoing(partial(_end_and_wait, child, end)))
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            started(child)
            send(request, child.stdin)
            result = _follow(child.stdout, report)
        finally:
            end()
    if result is None:
        raise (crashed or crash)(child.returncode, request.log)
    return result


def _start(
    log: IO[bytes], worker: str, environment: Mapping[str, str] | None, *, leads_group: bool
) -> subprocess.Popen[bytes]:
    """Start a process in which a module serves; what it prints goes into the log."""
    code = f"from {worker} import serve; serve()"
    paths = os.pathsep.join(path for path in sys.path if path)  # the child finds what this process finds
    own = os.environ if environment is None else environment
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:] = [p for p in sys.path if p]; {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**own, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        start_new_session=leads_group,
    )


def end_child(child: subprocess.Popen[bytes], *, with_group: bool) -> None:
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


def send(request: ChildRequest, pipe: IO[bytes]) -> None:
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


def crash(
    code: int,
    log: Path,
    *,
    who: str = "the build process",
    hint: str = "try a lower --batch, --height or --width",
    out_of_memory: str = _OUT_OF_MEMORY,
) -> BuildError:
    """The error for a build process that ended without a word.

    Args:
        code: its exit code.
        log: its log.
        who: died.
        out_of_memory: the words (a regular expression) by which a log tells of too little memory.
    """
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = " | ".join(lines[-3:])[-600:]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    killed = " (the system ends processes that use too much memory this way)" if name == "SIGKILL" else ""
    short = killed or re.search(out_of_memory, last)
    return (BuildMemoryShortage if short else BuildError)(
        f"{who} died ({name}){killed}; its last words: {last or 'none'}", hint=hint
    )


# --- in the child ------------------------------------------------------------------------------------------------


def answer(build: Callable[[Mapping[str, Any], Report], dict[str, Any]]) -> None:
    """Read a request from stdin, build, and report in JSON lines on stdout. What libraries print goes to stderr.

    Args:
        build: gets the request's JSON and what it may report to; returns what is known of the engine.
    """
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def report(message: Mapping[str, Any]) -> None:
        with lock:
            reports.write(json.dumps(message) + "\n")

    try:
        data = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_die_with_parent, daemon=True).start()
        report({"result": build(data, report)})
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
    """End this process when stdin ends: the parent is gone. With its group, if it leads one: compilers go too."""
    while sys.stdin.buffer.read(4096):
        pass
    if os.name == "posix" and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)

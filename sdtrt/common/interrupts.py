"""Ctrl-C, SIGTERM and SIGHUP end a process on the spot: first what is under way is undone, then the signal ends it.

They raise nothing. An exception may land where a library catches all, loses it in a callback, or makes another error
of it, and then the command would go on. What must not stay behind is registered (`undoing`) instead; it is undone
wherever the signal lands. In a program that imports sdtrt nobody listens here: signals are that program's own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERRUPTED = 130  # what a shell shows after Ctrl-C
MESSAGE = "interrupted"
HINT = "nothing half-done was left; finished images were kept"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE_S = 2.0  # for the main thread's answer: it may be in C code for minutes

_undone: list[Callable[[], object]] = []
_held = 0
_asked = 0  # the number of the first signal; 0 before any
_ending = threading.Lock()  # taken by the thread that ends the process, for good
_ender = 0


def listen() -> None:
    """End the process at each of `SIGNALS` from here on; call it in the main thread.

    What the process was told to ignore (by `nohup`, or in a shell's background) it goes on ignoring.
    """
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _heed)
    with suppress(OSError, RuntimeError):  # no file or thread to spare: the main thread listens alone
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=_watch, args=(reading,), name="sdtrt-signals", daemon=True).start()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def stop_listening() -> None:
    """Let the signals end the process as they end any: all is said, and nothing is under way."""
    for number in SIGNALS:
        if signal.getsignal(number) is _heed:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


@contextmanager
def undoing(action: Callable[[], object]) -> Iterator[None]:
    """Within, a signal that ends the process does this first; what was registered later is undone earlier.

    Register before there is anything to undo. The action must bear that there is nothing yet, or nothing any more.
    """
    _undone.append(action)
    try:
        yield
    finally:
        _undone.remove(action)


@contextmanager
def held() -> Iterator[None]:
    """Within, signals wait: for a few renames that belong together."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _asked and not _held:
            _end(_asked)


def _heed(number: int, frame: Any) -> None:
    """Python's own handler runs this in the main thread, between two of its instructions."""
    global _asked
    _asked = _asked or number
    if not _held and _ender != threading.get_ident():
        _end(_asked)


def _watch(pipe: int) -> None:
    """End the process where the main thread does not come to it."""
    while number := next(iter(os.read(pipe, 1)), 0):
        if number in SIGNALS:
            time.sleep(PATIENCE_S)
            while _held:
                time.sleep(0.01)
            _end(number)


def _end(number: int) -> NoReturn:
    """Undo what is under way, say so, and end by the signal."""
    global _ender
    if not _ending.acquire(blocking=False):
        while True:  # another thread is at it
            time.sleep(60)
    _ender = threading.get_ident()
    for action in reversed(tuple(_undone)):
        with suppress(BaseException):  # the others are to be undone, too
            action()
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    with suppress(OSError):  # not through `sys.stderr`, which may be in the middle of a write
        os.write(2, f"error: {MESSAGE}{by}\nhint: {HINT}\n".encode())
    _die(number)


def _die(number: int) -> NoReturn:
    """End by a signal, so that who waits for the process sees which; a shell shows it as 128 and its number."""
    if os.name != "nt":
        with suppress(Exception):
            _reset(number)
            os.kill(os.getpid(), number)
            time.sleep(1)  # not reached, unless the signal is blocked
    os._exit(128 + number)


def _reset(number: int) -> None:
    """Give a signal its default action again, which Python lets the main thread alone do."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.SIG_DFL)
    else:
        import ctypes

        ctypes.CDLL(None).signal(number, None)  # SIG_DFL


def _forget() -> None:
    """In a forked child: what is under way is its parent's to undo, and the parent's watch is not to be woken."""
    _undone.clear()
    with suppress(ValueError):
        stop_listening()

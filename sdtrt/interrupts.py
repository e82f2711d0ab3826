"""Ctrl-C ends the command wherever it lands: in Python, in libraries' C code, in callbacks whose errors go nowhere."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # what shells expect after Ctrl-C
MESSAGE = "interrupted"
HINT = "nothing half-done was left; finished images were kept"

_pressed = False


def listen() -> None:
    """Remember each Ctrl-C from here on, and give it again where Python would print it and go on.

    Where the process was told to ignore Ctrl-C (`nohup`, a shell's background), it goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)
        sys.unraisablehook = _give_again


def _remember(number: int, frame: Any) -> None:
    global _pressed
    _pressed = True
    signal.default_int_handler(number, frame)


def _give_again(lost: Any) -> None:
    """Python's hook for errors that nobody can catch, as in `__del__`, weak references and the import system's own."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _thread.start_new_thread(_press, ())  # from here it would be lost again; `threading` takes locks
    else:
        sys.__unraisablehook__(lost)


def _press() -> None:
    time.sleep(0.01)  # the hook has returned
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main:  # unlike `interrupt_main`, it wakes who sleeps or waits
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextmanager
def heeded() -> Iterator[None]:
    """Within, what fails once Ctrl-C was pressed raises `KeyboardInterrupt`.

    Libraries' C code makes other errors of it: PyTorch a `ValueError`, where the sequence was that a tensor is made of.
    """
    try:
        yield
    except Exception as error:
        if _pressed:
            raise KeyboardInterrupt from error
        raise

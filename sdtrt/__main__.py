"""`python -m sdtrt`, and the command `sdtrt`: it listens to signals first, then opens streams, then loads the rest."""

import _signal  # type: ignore[import-not-found]  # built in: `signal` takes milliseconds to import

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until `listen`: ends the process, as the other signals do

import io
import os
import sys
from typing import Any

from sdtrt.common import interrupts


def open_closed_streams() -> None:
    """Give each standard stream that was closed the null device, under its own number, which no file gets then.

    Without, Python's `file=sys.stderr` is `file=None`, which is stdout. Children inherit these, too.
    """
    for name in ("stdin", "stdout", "stderr"):  # in this order each gets the lowest number that is free: its own
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: PTH123, SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


class _Lossy(io.FileIO):
    """A file descriptor that loses what it can't take, as on a full disk or for a reader that has left."""

    def write(self, data: Any, /) -> int:
        """Bytes taken or lost: what is left of them is written the next time."""
        try:
            taken = super().write(data)
        except OSError:
            taken = None
        return memoryview(data).nbytes if taken is None else taken  # None: a pipe that is full and does not wait


def make_stderr_lossy() -> None:
    """Let no note or warning end the work that it is about: what stderr can't take is lost, from any library too."""
    stderr = sys.stderr
    if os.name == "nt" or not isinstance(stderr, io.TextIOWrapper):  # Windows' consoles are no plain descriptors
        return
    stderr.flush()
    raw = _Lossy(stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stderr.encoding, errors=stderr.errors, line_buffering=True
    )


def main() -> None:
    """Run the command line; ends the process."""
    open_closed_streams()  # first: what is opened later must not get their numbers
    interrupts.listen()
    make_stderr_lossy()
    try:
        from sdtrt.common.leftovers import private_caches

        with private_caches():
            from sdtrt.cli.main import main as run

            run()
    finally:
        interrupts.stop_listening()


if __name__ == "__main__":
    main()

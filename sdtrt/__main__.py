"""`python -m sdtrt`, and the command `sdtrt`: Ctrl-C is no traceback, not even while Python still loads or winds up."""

import os
import signal
import sys

INTERRUPTED = 130  # what shells expect after Ctrl-C


def open_closed_streams() -> None:
    """Give each standard stream that was closed the null device, under its own number, which no file gets then.

    Without, Python's `file=sys.stderr` is `file=None`, which is stdout. Children inherit these, too.
    """
    for name in ("stdin", "stdout", "stderr"):  # in this order each gets the lowest number that is free: its own
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: PTH123, SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def main() -> None:
    """Run the command line; ends the process."""
    try:
        open_closed_streams()
        from sdtrt.cli import main as run

        run()
    except KeyboardInterrupt:  # before the command line could say it, or while it did
        print("error: interrupted\nhint: nothing half-done was left; finished images were kept", file=sys.stderr)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said
    # Everything is tidied up. Libraries that were interrupted in their C code would make Python's own exit a signal's.
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()

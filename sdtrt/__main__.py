"""`python -m sdtrt`, and the command `sdtrt`: Ctrl-C is no traceback, not even while Python still loads or winds up."""

import os
import signal
import sys

INTERRUPTED = 130  # what shells expect after Ctrl-C


def main() -> None:
    """Run the command line; ends the process."""
    try:
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

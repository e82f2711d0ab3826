"""`python -m sdtrt`, and the command `sdtrt`: Ctrl-C is no traceback, not even while Python still loads or winds up."""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    try:
        from sdtrt.cli import main as run

        run()
    except KeyboardInterrupt:  # before the command line could say it, or while it did
        print("error: interrupted\nhint: nothing half-done was left; finished images were kept", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result is out


if __name__ == "__main__":
    main()

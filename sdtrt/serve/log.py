"""A server's log: one JSON object a line on stderr. No prompt, picture or key is ever in it."""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO


class Log:
    """Writes events.

    Args:
        stream: None for stderr.
        quiet: leave out what is no warning.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream, self._quiet, self._lock = stream, quiet, threading.Lock()

    def info(self, event: str, **facts: Any) -> None:
        """Say what happened."""
        if not self._quiet:
            self._write("info", event, facts)

    def warn(self, event: str, **facts: Any) -> None:
        """Say what may be wrong."""
        self._write("warning", event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """Say what is wrong."""
        self._write("error", event, facts)

    def _write(self, level: str, event: str, facts: dict[str, Any]) -> None:
        said = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event}
        with self._lock:
            print(json.dumps({**said, **facts}, default=str), file=self._stream or sys.stderr, flush=True)

"""A server of sdtrt in a process of its own, for scripts and benchmarks that ask one.

Knows how it is started, when it is ready, and how it is ended. What it is asked is for others to say.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

READY_WITHIN_S = 600  # engines may have to be built first
ENDED_WITHIN_S = 120


@contextmanager
def serving(
    *words: str, log: IO[str] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port that is ready, and its address.

    Args:
        words: options of `sdtrt serve`.
        log: what gets its stderr; by default it goes where this program's goes.
        environment: variables that it has besides this program's.
    """
    command = [sys.executable, "-m", "sdtrt", "serve", "--port", "0", *words]
    own = os.environ | (environment or {})
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=own)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        until = time.monotonic() + READY_WITHIN_S
        while not _is_ready(url):
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server does not become ready: its log says why")
            time.sleep(0.2)
        yield server, url
    finally:
        server.terminate()
        server.wait(ENDED_WITHIN_S)


def _is_ready(url: str) -> bool:
    """Whether a server takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=30) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False

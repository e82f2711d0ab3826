"""How long a fuzz target runs: a few examples in CI, or as long as `SDTRT_FUZZ_SECONDS` says; what it may end with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
from hypothesis import HealthCheck, Verbosity, given, settings
from hypothesis import seed as seeded

from sdtrt.common.errors import SdtrtError

SECONDS = float(os.environ.get("SDTRT_FUZZ_SECONDS", "0"))
FIRST_SEED = int(os.environ.get("SDTRT_FUZZ_SEED", "0"))
ROUND = 200  # examples of one round of a long run


def fuzz(examples: int = 50, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a test many inputs. Fixtures come first among its parameters, and are shared by all examples."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
        short = settings(max_examples=examples, **quiet)(given(**strategies)(test))
        if not SECONDS:
            return short

        @wraps(short)
        def long(*arguments: Any, **fixtures: Any) -> None:
            start, rounds = time.monotonic(), 0
            while time.monotonic() - start < SECONDS:
                one = settings(max_examples=ROUND, verbosity=Verbosity.quiet, **quiet)(given(**strategies)(test))
                seeded(FIRST_SEED + rounds)(one)(*arguments, **fixtures)
                rounds += 1
            print(f"{test.__name__}: {rounds} rounds of up to {ROUND} examples in {time.monotonic() - start:.0f} s")

        return pytest.mark.timeout(0)(long)

    return decorate


@contextmanager
def only_clean_errors() -> Iterator[None]:
    """Nothing but `SdtrtError`, with something said in both lines."""
    caught = None
    try:
        yield
    except SdtrtError as error:
        caught = error
    if caught is not None:
        assert caught.message.isprintable()
        assert caught.hint.isprintable()
        assert caught.message
        assert caught.hint

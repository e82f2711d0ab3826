"""What the system refuses of the engine directory, as errors that say what to do. It looks at no entry."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtrt.common.errors import CacheError
from sdtrt.common.files import EXHAUSTED, FULL, MORE_FILES, limit_hint

REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, *FULL, *EXHAUSTED)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn failures to look into the engine directory into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error, "read") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the engine directory refuses into an error that says what to do; other failures stay what they are."""
    try:
        yield
    except OSError as error:
        inside = Path(str(error.filename or path)).is_relative_to(path)
        if error.errno == errno.ENOENT and error.filename and inside:
            raise vanished(path, error.filename) from error
        if error.errno not in REFUSALS or not inside:
            raise
        raise refusal(path, error, "written") from error


def vanished(path: Path, gone: Path | str) -> CacheError:
    """The error for what is gone from the engine directory while it is being made."""
    return CacheError(
        f"{gone} has vanished: something else removes from the engine directory {path}",
        hint="run the command again, and leave what is in .building to it until it ends",
    )


def refusal(path: Path, error: OSError, wanted: str) -> CacheError:
    """The error for what the engine directory refuses: to be `read` or `written`."""
    if error.errno in EXHAUSTED:
        return CacheError(f"too many files are open to use the engine directory {path}", hint=MORE_FILES)
    space = "free some space there, or " if error.errno in FULL else ""
    elsewhere = f"{space}name another folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR"
    return CacheError(
        f"the engine directory {path} can't be {wanted}: {error.strerror}", hint=limit_hint(error) or elsewhere
    )

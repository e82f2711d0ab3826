"""How an entry comes to be: made in a draft, sealed, renamed into place."""

from __future__ import annotations

import hashlib
import json
import platform
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt import __version__
from sdtrt.common.files import (
    delete,
    fsync,
    sha256_file,
)
from sdtrt.common.interrupts import held, undoing
from sdtrt.engines.entry import (
    FORMAT,
    SIDECAR,
    seal_of,
)
from sdtrt.engines.locks import exclusively
from sdtrt.engines.trust import (
    OTHERS,
)

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]

Make = Callable[[Path], Mapping[str, Any]]


def replace(target: Path, draft: Path) -> None:
    """Rename a draft into place. What was there is moved aside first, and comes back if that fails."""
    old = draft.with_name(f"{draft.name}-old")  # its key's lock is held, so no other process takes it for a leftover
    remove = partial(delete_unless_used, old)  # the new entry is in place: what is left of the old one is swept later
    with undoing(remove):
        with held():
            try:
                with suppress(FileNotFoundError):
                    target.rename(old)
                draft.rename(target)
            except BaseException:
                with suppress(OSError):  # nothing to put back; the first failure is the one to tell
                    old.rename(target)
                raise
        remove()


def delete_unless_used(folder: Path) -> None:
    with suppress(OSError), exclusively(folder) as free:
        if free:
            delete(folder)


def seal(folder: Path, kind: str, key: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write the sidecar over what `folder` holds, and flush everything to the disk."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    sidecar = {"format": FORMAT, "kind": kind, "key": key, "info": info, "files": files}
    sidecar |= {"created": time.time(), "sdtrt": __version__}
    sidecar = json.loads(json.dumps(sidecar, allow_nan=False))  # as it will be read: keys as text, lists for tuples
    sidecar["seal"] = seal_of(sidecar)
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)
        fsync(path)
    fsync(folder)

"""The engine directory: key, find, publish, list, prune.

    ENGINE_DIR/
      unet-onnx-fp16-1f0c…/       an entry: its files and `entry.json`, which holds the key they were made for
      .building/                  entries being made; renamed into place when they are complete
      .locks/  .timing/           one lock a key; TensorRT's timing caches
      .digests.json               sha256 of large weight files, by path, size and time

An entry is found by its key alone, and only if everything in its sidecar fits; what is wrong, partial or foreign is
never loaded. It is made in `.building`, flushed to disk, then renamed: readers see all of it or nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdtrt import __version__
from sdtrt.console import QUIET, Console
from sdtrt.errors import CacheError
from sdtrt.specs import PruneSpec

FORMAT = 1  # of keys and sidecars: entries of another format are foreign
SIDECAR = "entry.json"
ENVIRONMENT_VARIABLE = "SDTRT_ENGINE_DIR"
MEMO_BYTES = 32 * 2**20  # files smaller than this are hashed anew each time: it takes milliseconds

REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

Make = Callable[[Path], Mapping[str, Any]]


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_digest(kind: str, key: Mapping[str, Any]) -> str:
    """sha256 (hex) of an entry's kind and key."""
    return hashlib.sha256(canonical_json({"format": FORMAT, "kind": kind, "key": key}).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def default_directory() -> Path:
    """The engine directory when none is named: $SDTRT_ENGINE_DIR, `./engines` if it is there, the user's cache."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    if Path("engines").is_dir():
        return Path("engines")
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sdtrt" / "engines"


@dataclass(frozen=True)
class Entry:
    """One published entry.

    Args:
        path: its folder.
        kind: `onnx` or `engine`.
        key: what it was made for (plain JSON data).
        info: what is known of it (plain JSON data): contract, parity, times.
        files: name → size in bytes.
        created: seconds since the epoch.
    """

    path: Path
    kind: str
    key: Mapping[str, Any]
    info: Mapping[str, Any]
    files: Mapping[str, int]
    created: float

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.path.name

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of its key."""
        return key_digest(self.kind, self.key)

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(self.files.values())

    @property
    def last_used(self) -> float:
        """Seconds since the epoch (the sidecar's time stamp, which every use renews)."""
        return (self.path / SIDECAR).stat().st_mtime

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        facts = {"name": self.name, "path": str(self.path), "kind": self.kind, "size_bytes": self.size_bytes}
        return facts | {"created": self.created, "last_used": self.last_used, "key": self.key, "info": self.info}

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        if name not in self.files:
            raise CacheError(f"{self.path} has no {name}", hint=f"remove it: sdtrt engines rm {self.name}")
        return self.path / name


class EngineDirectory:
    """The one directory that holds exports and engines. Nothing is created before something is published.

    Raises:
        CacheError: when `path` is no directory, or can't be written where it must.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if self.path.exists() and not self.path.is_dir():
            raise CacheError(
                f"the engine directory {path} is a file",
                hint="name a folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR",
            )

    def find(self, kind: str, key: Mapping[str, Any]) -> Entry | None:
        """The entry of a key, or None. Marks it as used."""
        entry = self._read(self.path / _entry_name(kind, key))
        if entry is None or entry.digest != key_digest(kind, key):
            return None
        self.touch(entry)
        return entry

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All whole entries (of one kind), by name."""
        if not self.path.is_dir():
            return []
        folders = sorted(path for path in self.path.iterdir() if path.is_dir() and not path.name.startswith("."))
        found = (self._read(folder) for folder in folders)
        return [entry for entry in found if entry is not None and kind in (None, entry.kind)]

    def named(self, name: str) -> Entry:
        """The entry with this name, or the only one whose name begins so. Raises `CacheError`."""
        entries = self.entries()
        found = [entry for entry in entries if entry.name == name] or [e for e in entries if e.name.startswith(name)]
        if len(found) == 1:
            return found[0]
        wrong = "no entry" if not found else f"{len(found)} entries"
        raise CacheError(
            f"{self.path} has {wrong} named {name!r}",
            hint=f"sdtrt engines list --engine-dir {self.path} shows the names",
        )

    def obtain(
        self, kind: str, key: Mapping[str, Any], make: Make, console: Console = QUIET, *, force: bool = False
    ) -> Entry:
        """The entry of a key: the one there is, or a new one.

        Args:
            kind: `onnx` or `engine`.
            key: what identifies it (plain JSON data; it must have `component` and `precision`).
            make: fills the folder that it is given and returns the entry's `info`. If it fails, nothing is left.
            console: says so when another process is making the same entry.
            force: make it again even if it is there.

        Two processes that want one key: one makes it, the other waits, then finds it.
        """
        if not force and (entry := self.find(kind, key)) is not None:
            return entry
        with self._writing(), self._locked(key_digest(kind, key), console):
            if not force and (entry := self.find(kind, key)) is not None:
                return entry
            return self._publish(kind, key, make)

    def touch(self, entry: Entry) -> None:
        """Mark an entry as used now (pruning goes by it); a read-only directory stays as it is."""
        with suppress(OSError):
            os.utime(entry.path / SIDECAR)

    def remove(self, entry: Entry) -> None:
        """Delete an entry. It vanishes at once (renamed first), then its space is freed."""
        with self._writing():
            self._discard(entry.path)

    def prunable(self, spec: PruneSpec, is_foreign: Callable[[Entry], bool]) -> list[Entry]:
        """The entries that `spec` names, least recently used first; `is_foreign` says which this machine can't load."""
        entries = sorted(self.entries(), key=lambda entry: entry.last_used)
        limit = time.time() - 86400 * spec.older_than_days if spec.older_than_days is not None else None
        excess = sum(entry.size_bytes for entry in entries) - spec.keep_bytes if spec.keep_bytes is not None else 0
        chosen = []
        for entry in entries:
            old = limit is not None and entry.last_used < limit
            if old or excess > 0 or (spec.foreign and is_foreign(entry)):
                chosen.append(entry)
                excess -= entry.size_bytes
        return chosen

    def abandoned(self) -> list[Path]:
        """Folders that a killed build left behind: those of no process that still holds its lock."""
        building = self.path / ".building"
        folders = building.iterdir() if building.is_dir() else iter(())
        return [folder for folder in folders if not self._is_locked(folder.name.split("-")[0])]

    def sweep(self) -> int:
        """Delete what killed builds left behind; returns how many folders that were."""
        leftovers = self.abandoned()
        for folder in leftovers:
            shutil.rmtree(folder, ignore_errors=True)
        return len(leftovers)

    def timing_cache(self, name: str) -> Path:
        """Where a builder keeps its timing cache: one file for each TensorRT version and GPU."""
        folder = self.path / ".timing"
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
        return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".cache")

    def file_digest(self, path: Path) -> str:
        """sha256 of a file; that of a large one is remembered for as long as its path, size and times stay the same."""
        path = path.resolve()
        stat = path.stat()
        if stat.st_size < MEMO_BYTES:
            return sha256_file(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        memo = self._read_digests()
        known = memo.get(str(path))
        if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        digest = sha256_file(path)
        with suppress(OSError):  # a memo that can't be written costs time, nothing else
            self.path.mkdir(parents=True, exist_ok=True)
            _write_atomically(self._digests, json.dumps(memo | {str(path): {"stamp": stamp, "sha256": digest}}))
        return digest

    @property
    def _digests(self) -> Path:
        return self.path / ".digests.json"

    def _read_digests(self) -> dict[str, Any]:
        """The memo of file digests; empty where there is none or it can't be read as one."""
        with suppress(OSError, ValueError):
            memo = json.loads(self._digests.read_text())
            if isinstance(memo, dict):
                return memo
        return {}

    def _read(self, folder: Path) -> Entry | None:
        """The entry in a folder; None unless its sidecar is of this format and all its files are there at full size."""
        try:
            data = json.loads((folder / SIDECAR).read_text())
            entry = Entry(folder, data["kind"], data["key"], data["info"], _sizes(data["files"]), data["created"])
            whole = data["format"] == FORMAT and folder.name == _entry_name(entry.kind, entry.key)
            return entry if whole and all(_has_size(folder / n, size) for n, size in entry.files.items()) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _publish(self, kind: str, key: Mapping[str, Any], make: Make) -> Entry:
        """Make an entry in a temporary folder, then rename it into place."""
        building = self.path / ".building"
        building.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{key_digest(kind, key)}-", dir=building))
        target = self.path / _entry_name(kind, key)
        try:
            info = make(draft)
            _seal(draft, kind, key, info)
            if target.exists():
                self._discard(target)
            draft.rename(target)
            _fsync(self.path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        entry = self._read(target)
        if entry is None:
            raise CacheError(f"{target} vanished while it was published", hint="run the command again")
        return entry

    def _discard(self, folder: Path) -> None:
        """Rename a folder out of sight, then delete it."""
        trash = self.path / ".building" / f"trash-{time.time_ns()}"
        trash.parent.mkdir(exist_ok=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the directory refuses into an error that says what to do; other failures stay what they are."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from error
        try:
            yield
        except OSError as error:
            if error.errno not in REFUSALS or not str(error.filename or self.path).startswith(str(self.path)):
                raise
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> CacheError:
        return CacheError(
            f"the engine directory {self.path} can't be written: {error.strerror}",
            hint="free some space there, or name another folder: --engine-dir FOLDER",
        )

    @contextmanager
    def _locked(self, digest: str, console: Console) -> Iterator[None]:
        """Hold the key's lock; if another process holds it, say so and wait. The system frees a dead holder's lock."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._lock_file(digest), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            with console.stage("waiting for another process that is making the same entry"):
                lock.acquire(timeout=-1)
        try:
            yield
        finally:
            lock.release()

    def _is_locked(self, digest: str) -> bool:
        """Whether some process is making the entry of this key."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._lock_file(digest), timeout=0):
                return False
        except Timeout:
            return True

    def _lock_file(self, digest: str) -> Path:
        folder = self.path / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{digest}.lock"


def _entry_name(kind: str, key: Mapping[str, Any]) -> str:
    """A folder name that people can read and that no two keys share."""
    words = (key["component"], key.get("backend", kind), key["precision"], key_digest(kind, key)[:16])
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(word)) for word in words)


def _sizes(files: Mapping[str, Any]) -> dict[str, int]:
    """File sizes of a sidecar; a name that leaves the folder makes the whole sidecar invalid."""
    if any(name in ("", ".", "..") or Path(name).name != name for name in files):
        raise ValueError("a sidecar names a file outside its folder")
    return {name: int(facts["size_bytes"]) for name, facts in files.items()}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _seal(folder: Path, kind: str, key: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write the sidecar over what `folder` holds, and flush everything to the disk."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    sidecar = {"format": FORMAT, "kind": kind, "key": key, "info": info, "files": files}
    sidecar |= {"created": time.time(), "sdtrt": __version__}
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, allow_nan=False) + "\n")
    for path in folder.iterdir():
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    """Flush a file or folder to the disk (folders can't be opened on Windows, and need not be)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)

"""The engine directory: key, find, publish, list, prune.

    ENGINE_DIR/
      unet-onnx-fp16-1f0c…/       an entry: its files and `entry.json`, which holds the key they were made for
      .building/                  entries being made; renamed into place when they are complete
      .locks/  .timing/           one lock a key; TensorRT's timing caches
      .digests.json               sha256 of large weight files, by path, size and time

An entry is found by its key alone, and only if everything in its sidecar fits; what is wrong, partial or foreign is
never loaded, and a file is loaded only if its content is what was published. An entry is made in `.building`, flushed
to disk, then renamed: readers see all of it or nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
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

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, *FULL)

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
        digests: name → sha256 (hex) of the content that was published.
        created: seconds since the epoch.
    """

    path: Path
    kind: str
    key: Mapping[str, Any]
    info: Mapping[str, Any]
    files: Mapping[str, int]
    digests: Mapping[str, str]
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
        try:
            return (self.path / SIDECAR).stat().st_mtime
        except OSError:  # another process has removed the entry meanwhile
            return self.created

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        facts = {"name": self.name, "path": str(self.path), "kind": self.kind, "size_bytes": self.size_bytes}
        return facts | {"created": self.created, "last_used": self.last_used, "key": self.key, "info": self.info}

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        if name not in self.files:
            raise CacheError(f"{self.path} has no {name}", hint=self._mend)
        return self.path / name

    def verified(self, name: str) -> Path:
        """The path of one of its files, once its content and that of its companions (`NAME.data`) is proven.

        Reads them whole: about a second for 2 GB.

        Raises:
            CacheError: when one can't be read, or is not what was published.
        """
        path = self.file(name)
        for companion in sorted(other for other in self.files if other.startswith(name)):
            self._verify(self.path / companion)
        return path

    def _verify(self, path: Path) -> None:
        """Compare a file's content with its digest."""
        try:
            intact = sha256_file(path) == self.digests[path.name]
        except OSError as error:
            raise CacheError(f"{path} can't be read: {error.strerror}", hint=self._mend) from error
        if not intact:
            raise CacheError(f"{path} is damaged: its content is not what was published", hint=self._mend)

    @property
    def _mend(self) -> str:
        """What to do about an entry that is not right."""
        command = shlex.join(["sdtrt", "engines", "rm", self.name, "--engine-dir", str(self.path.parent)])
        return f"{command}; the next run makes it again"


class EngineDirectory:
    """The one directory that holds exports and engines. Nothing is created before something is published.

    Raises:
        CacheError: when `path` is no directory, or can't be read or written where it must.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        with self._reading():
            status = _status(self.path)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise CacheError(
                f"the engine directory {path} is a file",
                hint="name a folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR",
            )

    def find(self, kind: str, key: Mapping[str, Any]) -> Entry | None:
        """The entry of a key, or None. Marks it as used."""
        folder = self.path / _entry_name(kind, key)
        with self._reading():
            if _status(folder, follow=False) is None:
                return None
        entry = self._read(folder)
        if entry is None or entry.digest != key_digest(kind, key):
            return None
        self.touch(entry)
        return entry

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All whole entries (of one kind), by name."""
        with self._reading():
            folders = [path for path in _listing(self.path) if not path.name.startswith(".")]
            folders = [folder for folder in folders if _status(folder, follow=False)]  # a refusal is no empty directory
        found = (self._read(folder) for folder in folders)
        return [entry for entry in found if entry is not None and kind in (None, entry.kind)]

    def named(self, name: str) -> Entry:
        """The entry with this name, or the only one whose name begins so. Raises `CacheError`."""
        entries = self.entries()
        found = [entry for entry in entries if entry.name == name]
        if name and not found:
            found = [entry for entry in entries if entry.name.startswith(name)]
        if len(found) == 1:
            return found[0]
        wrong = f"{len(found)} entries that begin with" if found else "no entry named"
        raise CacheError(
            f"{self.path} has {wrong} {name!r}",
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
        """Delete an entry, if it is still there. It vanishes at once (renamed first), then its space is freed."""
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
        """What killed builds left behind: all that belongs to no process that still holds its lock. Changes nothing."""
        with self._reading():
            leftovers = _listing(self.path / ".building")
            return [path for path in leftovers if not self._is_locked(path.name.split("-")[0])]

    def sweep(self) -> int:
        """Delete what killed builds left behind; returns how many folders and files that were."""
        leftovers = self.abandoned()
        for path in leftovers:
            try:
                _delete(path)
            except OSError as error:
                raise self._refusal(error, "written") from error
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
        status = path.stat()
        if status.st_size < MEMO_BYTES:
            return sha256_file(path)
        # The time of the last change, too: whoever rewrites a file can set back its modification time, but not that.
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
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
            sizes, digests = _sizes(data["files"]), _digests(data["files"])
            created = float(data["created"])
            entry = Entry(folder, data["kind"], data["key"], data["info"], sizes, digests, created)
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
            draft.chmod(stat.S_IMODE(self.path.stat().st_mode))  # as readable as the directory that it goes into
            _replace(target, draft)
            _fsync(self.path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        entry = self._read(target)
        if entry is None:
            raise CacheError(f"{target} vanished while it was published", hint="run the command again")
        return entry

    def _discard(self, folder: Path) -> None:
        """Rename a folder out of sight, then delete it; one that another process has removed is gone already."""
        trash = self.path / ".building" / f"trash-{time.time_ns()}"
        trash.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn failures to look into the directory into an error that says what to do."""
        try:
            yield
        except OSError as error:
            raise self._refusal(error, "read") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the directory refuses into an error that says what to do; other failures stay what they are."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error, "written") from error
        try:
            yield
        except OSError as error:
            inside = Path(str(error.filename or self.path)).is_relative_to(self.path)
            if error.errno not in REFUSALS or not inside:
                raise
            raise self._refusal(error, "written") from error

    def _refusal(self, error: OSError, wanted: str) -> CacheError:
        """The error for what the directory refuses: to be `read` or `written`."""
        space = "free some space there, or " if error.errno in FULL else ""
        return CacheError(
            f"the engine directory {self.path} can't be {wanted}: {error.strerror}",
            hint=f"{space}name another folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR",
        )

    @contextmanager
    def _locked(self, digest: str, console: Console) -> Iterator[None]:
        """Hold the key's lock; if another process holds it, say so and wait. The system frees a dead holder's lock."""
        from filelock import FileLock, Timeout

        file = self._lock_file(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=0)
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
        """Whether some process is making the entry of this key. Creates nothing."""
        from filelock import FileLock

        file = self._lock_file(digest)
        if _status(file) is None:
            return False
        try:
            with FileLock(file, timeout=0):
                return False
        except OSError:  # `Timeout` is one; a lock that this user may not even try may be held
            return True

    def _lock_file(self, digest: str) -> Path:
        return self.path / ".locks" / f"{digest}.lock"


def _entry_name(kind: str, key: Mapping[str, Any]) -> str:
    """A folder name that people can read and that no two keys share."""
    words = (key["component"], key.get("backend", kind), key["precision"], key_digest(kind, key)[:16])
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(word)) for word in words)


def _sizes(files: Mapping[str, Any]) -> dict[str, int]:
    """File sizes of a sidecar; a name that leaves the folder makes the whole sidecar invalid."""
    if any(name in ("", ".", "..") or Path(name).name != name for name in files):
        raise ValueError("a sidecar names a file outside its folder")
    return {name: int(facts["size_bytes"]) for name, facts in files.items()}


def _digests(files: Mapping[str, Any]) -> dict[str, str]:
    """File digests of a sidecar."""
    return {name: str(facts["sha256"]) for name, facts in files.items()}


def _status(path: Path, *, follow: bool = True) -> os.stat_result | None:
    """What is known of a path, None if nothing is there. Raises where that can't be told (`Path.exists` may not)."""
    try:
        return path.stat(follow_symlinks=follow)
    except FileNotFoundError:
        return None


def _listing(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is no folder."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # another process is deleting it, too
        shutil.rmtree(path, ignore_errors=True)


def _replace(target: Path, draft: Path) -> None:
    """Rename a draft into place. What was there is moved aside first, and comes back if that fails."""
    old = draft.with_name(f"{draft.name}-old")  # its key's lock is held, so no other process takes it for a leftover
    try:
        with suppress(FileNotFoundError):
            target.rename(old)
        draft.rename(target)
    except BaseException:
        with suppress(OSError):  # nothing to put back; the first failure is the one to tell
            old.rename(target)
        raise
    with suppress(OSError):  # the new entry is in place: what is left of the old one is swept later
        _delete(old)


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
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise

"""One entry of the engine directory: its folder, the sidecar that describes it, and what proves both.

A sidecar (`entry.json`) holds the key that an entry was made for, what is known of it, and the digest of each file; a
seal over all that tells whether it is what was published.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from sdtrt.common.errors import MALFORMED, CacheError, EngineError, command_line
from sdtrt.common.files import limit_hint, lock, open_regular, read_small_file, same_file
from sdtrt.engines.digests import digest_of, digests_ahead
from sdtrt.engines.keys import EngineKey, ExportKey, parse_key
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Contract

SOME_SIZES = Sizes(batch=2, height=64, width=64)

FORMAT = 1  # of keys and sidecars: entries of another format are foreign
SIDECAR = "entry.json"
SIDECAR_BYTES = 2**24  # at most, of a sidecar or other JSON of the engine directory: far more than any needs
_NAME = re.compile(r"([A-Za-z0-9._]+-){3}[0-9a-f]{16}")  # of an entry's folder


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_digest(kind: str, key: Mapping[str, Any]) -> str:
    """sha256 (hex) of an entry's kind and key."""
    return hashlib.sha256(canonical_json({"format": FORMAT, "kind": kind, "key": key}).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One published entry.

    Args:
        path: its folder.
        kind: `onnx` or `engine`.
        key: what it was made for (plain JSON data, as they lie on the disk and are digested).
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

    @cached_property
    def parsed_key(self) -> EngineKey | ExportKey | None:
        """Its key, parsed; None where it is not one that this version of sdtrt writes for its kind."""
        return parse_key(self.kind, self.key)

    @property
    def engine_key(self) -> EngineKey:
        """The key of an engine.

        Raises:
            EngineError: where it is not one that this version of sdtrt writes.
        """
        if isinstance(self.parsed_key, EngineKey):
            return self.parsed_key
        raise EngineError(f"{self.name} does not say what it was built for", hint=self.removal)

    @property
    def step_sizes(self) -> str:
        """The size that an engine's `info["step_ms"]` is of: the best one of its profile, unless the entry says."""
        profiles = self.engine_key.profiles
        return str(self.info.get("step_sizes") or (profiles[0].optimum if profiles else ""))

    @property
    def removal(self) -> str:
        """The command that removes it."""
        return removal_of(self.path.parent, self.name)

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(self.files.values())

    @property
    def last_used(self) -> float:
        """Seconds since the epoch (the sidecar's time stamp, which every use renews)."""
        return used_last(self.path, self.created)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        facts = {"name": self.name, "path": str(self.path), "kind": self.kind, "size_bytes": self.size_bytes}
        return facts | {"created": self.created, "last_used": self.last_used, "key": self.key, "info": self.info}

    def file(self, name: str) -> Path:
        """The path of one of its files.

        Raises:
            CacheError: where it has none of that name.
        """
        if name not in self.files:
            raise CacheError(f"{self.path} has no {name}", hint=self._mend)
        return self.path / name

    def verified(self, name: str, *, ahead: Callable[[], bool] | None = None) -> Path:
        """The path of one of its files, once its content and that of its companions (`NAME.data`) is proven.

        Args:
            name: of the file.
            ahead: of a use that comes later: says whether it still does. What is hashed serves that one, too
                (`digests_ahead`).

        Reads them whole: a second for 2 GB (`benchmarks/reliability.md`). A note that a file was found right once
        would not do: a bit that flips on the disk changes neither its time nor its size. What this process has hashed
        ahead, seconds ago (`hash_ahead`), does.

        Raises:
            CacheError: when one can't be read, or is not what was published.
        """
        path = self.file(name)
        companions = [self.path / other for other in sorted(self.files) if other.startswith(name)]
        with self._reading(path):
            digest = digests_ahead(companions, ahead) if ahead else digest_of
        for companion in companions:
            self.verify_file(companion, digest)
        return path

    def verify_file(self, path: Path, digest: Callable[[Path], str] = digest_of) -> None:
        """Compare the content of one of its files with its digest.

        Raises:
            CacheError: when it can't be read, or is not what was published.
        """
        with self._reading(path):
            intact = digest(path) == self.digests[path.name]
        if not intact and self._is_replaced():
            raise CacheError(f"another process has made {self.path} anew", hint="run the command again")
        if not intact:
            raise CacheError(f"{path} is damaged: its content is not what was published", hint=self._mend)

    def _is_replaced(self) -> bool:
        """Whether another entry of the same key lies there by now: nothing is wrong with that one."""
        try:
            return entry_of(self.path, read_sidecar(self.path)).digests != self.digests
        except (OSError, UnfitError, *MALFORMED):
            return False

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Turn failures to read a file into `CacheError`; a limit that was met says nothing of the file."""
        try:
            yield
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            mend = self._mend if gone else f"{verification_of(self.path.parent)} says what is damaged"
            raise CacheError(f"{path} can't be read: {error.strerror}", hint=limit_hint(error) or mend) from error

    def hold(self) -> IO[bytes]:
        """Keep the entry from being removed (`engines rm` and `prune` leave it) until what this returns is closed.

        Raises:
            CacheError: when another process has removed it, or is just removing it.
        """
        path = self.path / SIDECAR
        try:
            file = open_regular(path, follow=False)
        except OSError as error:
            mend = limit_hint(error) or "run the command again"
            raise CacheError(f"{path} can't be read: {error.strerror}", hint=mend) from error
        if lock(file, shared=True) and same_file(file, path):
            return file
        file.close()
        raise CacheError(f"another process has removed {self.path}", hint="run the command again to make it anew")

    @property
    def _mend(self) -> str:
        """What to do about an entry that is not right."""
        return f"{self.removal}; the next run makes it again"


@dataclass(frozen=True)
class ForeignEntry:
    """An entry of another format, as another version of sdtrt makes it: nothing of it is read, but it takes room."""

    path: Path

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.path.name

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all that lies in its folder."""
        return size_of(self.path)

    @property
    def last_used(self) -> float:
        """Seconds since the epoch; 0 where another process has removed it meanwhile."""
        return used_last(self.path, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        facts = {"name": self.name, "path": str(self.path), "size_bytes": self.size_bytes}
        return facts | {"last_used": self.last_used}


def used_last(folder: Path, otherwise: float) -> float:
    """When an entry was used last: its sidecar's time stamp, which every use renews."""
    try:
        return (folder / SIDECAR).lstat().st_mtime
    except OSError:  # another process has removed the entry meanwhile
        return otherwise


def size_of(folder: Path) -> int:
    """Bytes of all the files below a folder, as far as that can be told, and through no link."""
    total = 0
    with suppress(OSError):
        for above, _, names in () if folder.is_symlink() else os.walk(folder):
            total += sum(Path(above, name).lstat().st_size for name in names)
    return total


class UnfitError(Exception):
    """Why a folder holds no entry that may be used; `foreign`: it is well, but of another format."""

    def __init__(self, reason: str, *, foreign: bool = False) -> None:
        super().__init__(reason)
        self.foreign = foreign


def verification_of(directory: Path) -> str:
    """The command that reads all entries of an engine directory and says which are damaged."""
    return command_line("sdtrt", "engines", "verify", "--engine-dir", str(directory))


def removal_of(directory: Path, *names: str) -> str:
    """The command that removes entries of an engine directory."""
    return command_line("sdtrt", "engines", "rm", *names, "--engine-dir", str(directory))


def entry_name(kind: str, key: Mapping[str, Any]) -> str:
    """A folder name that people can read and that no two keys share."""
    words = (key["component"], key.get("backend", kind), key["precision"], key_digest(kind, key)[:16])
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(word)) for word in words)


def is_entry_name(name: str) -> bool:
    """Whether a folder's name is one that sdtrt gives to entries."""
    return _NAME.fullmatch(name) is not None


def is_published(path: Path, digest: str) -> bool:
    """Whether a folder has the name of the entry with this key digest."""
    return path.name.endswith(f"-{digest[:16]}")


def entry_of(folder: Path, data: Any) -> Entry:
    """The entry that a sidecar describes. Raises `UnfitError`, or one of `MALFORMED`."""
    if data["format"] != FORMAT or "seal" not in data:
        raise UnfitError("it was made by another version of sdtrt", foreign=True)
    if data["seal"] != seal_of(data):
        raise UnfitError(f"{SIDECAR} is damaged: its content is not what was published")
    if not (isinstance(data["info"], dict) and isinstance(data["key"], dict)):
        raise TypeError("key and info must be objects")
    sizes, digests = _sizes(data["files"]), _digests(data["files"])
    entry = Entry(folder, data["kind"], data["key"], data["info"], sizes, digests, float(data["created"]))
    if folder.name != entry_name(entry.kind, entry.key):
        raise UnfitError("its name is not that of its key")
    if "onnx" in entry.info and entry.info["onnx"] != entry_name("onnx", entry.key["export"]):
        raise UnfitError("it was built from another export than its key says")
    return entry


def _sizes(files: Mapping[str, Any]) -> dict[str, int]:
    """File sizes of a sidecar; a name that leaves the folder makes the whole sidecar invalid."""
    if any(name in ("", ".", "..") or Path(name).name != name for name in files):
        raise ValueError("a sidecar names a file outside its folder")
    return {name: int(facts["size_bytes"]) for name, facts in files.items()}


def _digests(files: Mapping[str, Any]) -> dict[str, str]:
    """File digests of a sidecar."""
    return {name: str(facts["sha256"]) for name, facts in files.items()}


def seal_of(sidecar: Mapping[str, Any]) -> str:
    """sha256 (hex) of all that a sidecar says."""
    content = {name: value for name, value in sidecar.items() if name != "seal"}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def read_sidecar(folder: Path) -> Any:
    """What the sidecar in a folder holds, as it is written there. Raises `OSError`, or one of `MALFORMED`."""
    return json.loads(read_small_file(folder / SIDECAR, SIDECAR_BYTES, follow=False))


def stored_contract(entry: Entry) -> Contract:
    """What an entry's inputs and outputs are. Raises `EngineError` where its sidecar does not say it."""
    try:
        contract = Contract.from_json(entry.info["contract"])
        contract.input_shapes(SOME_SIZES)
        contract.output_shapes(SOME_SIZES)
        words = [word for spec in (*contract.inputs, *contract.outputs) for word in (spec.name, spec.dtype)]
        if not all(isinstance(word, str) for word in (contract.component, contract.precision, *words)):
            raise TypeError("names and dtypes must be text")
        return contract
    except MALFORMED as error:
        raise EngineError(f"{entry.name} does not say what its inputs and outputs are", hint=entry.removal) from error

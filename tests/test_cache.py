"""The engine directory: finding, publishing, waiting, removing; nothing wrong or partial is ever loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from sdtrt.cache import SIDECAR, EngineDirectory, canonical_json, default_directory, key_digest
from sdtrt.errors import CacheError
from sdtrt.specs import PruneSpec

KEY = {"component": "unet", "precision": "fp32", "weights": "abc"}


def write(content: bytes = b"engine"):
    def make(folder):
        (folder / "model.onnx").write_bytes(content)
        return {"model": "test"}

    return make


@pytest.fixture
def directory(tmp_path):
    return EngineDirectory(tmp_path / "engines")


def test_nothing_is_created_by_looking(directory):
    assert directory.find("onnx", KEY) is None
    assert directory.entries() == []
    assert not directory.path.exists()


def test_obtain_makes_once_then_finds(directory):
    made = directory.obtain("onnx", KEY, write())
    assert made.file("model.onnx").read_bytes() == b"engine"
    assert made.info == {"model": "test"}
    assert directory.obtain("onnx", dict(reversed(KEY.items())), lambda folder: pytest.fail("made twice")) == made
    assert directory.find("engine", KEY) is None
    assert directory.find("onnx", KEY | {"weights": "abd"}) is None


def test_force_replaces(directory):
    directory.obtain("onnx", KEY, write(b"old"))
    assert directory.obtain("onnx", KEY, write(b"new!"), force=True).file("model.onnx").read_bytes() == b"new!"
    assert len(directory.entries()) == 1


def test_failure_leaves_nothing(directory):
    def make(folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directory.obtain("onnx", KEY, make)
    assert directory.entries() == []
    assert list((directory.path / ".building").iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["truncate", "remove", "link", "lie", "garbage", "no sidecar", "format", "rename", "escape"]
)
def test_a_damaged_entry_is_never_found(directory, damage):
    entry = directory.obtain("onnx", KEY, write())
    sidecar = entry.path / SIDECAR
    data = json.loads(sidecar.read_text())
    if damage == "truncate":
        entry.file("model.onnx").write_bytes(b"eng")
    elif damage == "remove":
        entry.file("model.onnx").unlink()
    elif damage == "link":
        entry.file("model.onnx").rename(directory.path / "elsewhere")
        (entry.path / "model.onnx").symlink_to(directory.path / "elsewhere")
    elif damage == "lie":
        sidecar.write_text(json.dumps(data | {"key": KEY | {"weights": "other"}}))
    elif damage == "garbage":
        sidecar.write_bytes(b"\xff\x00{")
    elif damage == "no sidecar":
        sidecar.unlink()
    elif damage == "format":
        sidecar.write_text(json.dumps(data | {"format": 0}))
    elif damage == "rename":
        entry.path.rename(entry.path.with_name("unet-onnx-fp32-0000000000000000"))
    elif damage == "escape":
        sidecar.write_text(json.dumps(data | {"files": {"../elsewhere": {"size_bytes": 0}}}))
    assert directory.find("onnx", KEY) is None
    assert directory.entries() == []
    assert directory.obtain("onnx", KEY, write(b"again")).file("model.onnx").read_bytes() == b"again"


def test_a_file_is_no_engine_directory(tmp_path):
    (tmp_path / "engines").write_text("x")
    with pytest.raises(CacheError) as caught:
        EngineDirectory(tmp_path / "engines")
    assert "--engine-dir" in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="needs /proc")
def test_a_directory_that_cannot_be_made_is_an_error_with_a_hint():
    with pytest.raises(CacheError) as caught:
        EngineDirectory(Path("/proc/engines")).obtain("onnx", KEY, write())
    assert "--engine-dir" in caught.value.hint


def test_failures_of_the_maker_keep_their_own_type(directory):
    def make(folder):
        raise FileNotFoundError(2, "no such file", "/somewhere/weights.safetensors")

    with pytest.raises(FileNotFoundError):
        directory.obtain("onnx", KEY, make)


def _slow(path, queue):
    def make(folder):
        queue.put("made")
        time.sleep(0.5)
        (folder / "model.onnx").write_bytes(b"x")
        return {}

    queue.put(EngineDirectory(path).obtain("onnx", KEY, make).name)


def test_of_two_processes_one_makes_and_the_other_waits(directory):
    context = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    queue = context.Queue()
    processes = [context.Process(target=_slow, args=(directory.path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    said = [queue.get(timeout=5) for _ in range(3)]
    assert said.count("made") == 1
    assert len(set(said) - {"made"}) == 1


def test_sweep_removes_what_dead_builds_left(directory):
    directory.obtain("onnx", KEY, write())
    orphan = directory.path / ".building" / (key_digest("onnx", KEY) + "-dead")
    orphan.mkdir()
    assert directory.sweep() == 1
    assert not orphan.exists()
    assert len(directory.entries()) == 1


def test_named_takes_an_unambiguous_beginning(directory):
    one = directory.obtain("onnx", KEY, write())
    directory.obtain("onnx", KEY | {"weights": "z"}, write())
    assert directory.named(one.name) == one
    assert directory.named(one.name[:-4]) == one
    for name in ("unet", "nothing"):
        with pytest.raises(CacheError):
            directory.named(name)


def test_remove(directory):
    entry = directory.obtain("onnx", KEY, write())
    directory.remove(entry)
    assert directory.entries() == []
    assert not entry.path.exists()


def test_prune_goes_by_last_use_then_size(directory):
    old, new = (directory.obtain("onnx", KEY | {"weights": w}, write(b"1234")) for w in "ab")
    os.utime(old.path / SIDECAR, (time.time() - 10 * 86400,) * 2)
    keep = lambda entry: False  # noqa: E731
    assert directory.prunable(PruneSpec(older_than_days=5), keep) == [old]
    assert directory.prunable(PruneSpec(keep_bytes=4), keep) == [old]
    assert directory.prunable(PruneSpec(keep_bytes=0), keep) == [old, new]
    assert directory.prunable(PruneSpec(), keep) == []
    assert directory.prunable(PruneSpec(foreign=True), lambda entry: entry == new) == [new]
    directory.find("onnx", old.key)  # a use renews it
    assert directory.prunable(PruneSpec(older_than_days=5), keep) == []


def test_digest_of_a_large_file_is_remembered_until_it_changes(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.cache.MEMO_BYTES", 1)
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    first = directory.file_digest(weights)
    monkeypatch.setattr("sdtrt.cache.sha256_file", lambda path: pytest.fail("hashed again"))
    assert directory.file_digest(weights) == first
    monkeypatch.undo()
    weights.write_bytes(b"another")
    assert directory.file_digest(weights) != first


def test_canonical_json_does_not_depend_on_order():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'


def test_default_directory_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDTRT_ENGINE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_directory().parent == tmp_path / "cache" / "sdtrt"
    (tmp_path / "engines").mkdir()
    assert default_directory().name == "engines"
    monkeypatch.setenv("SDTRT_ENGINE_DIR", str(tmp_path / "named"))
    assert default_directory() == tmp_path / "named"

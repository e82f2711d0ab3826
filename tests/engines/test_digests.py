"""Hashing ahead of use: what is asked for is the digest of the file as it is now, whoever has hashed it."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from factories import sha256_of as right

from sdtrt.common import files as files_module
from sdtrt.common.errors import CacheError
from sdtrt.common.files import sha256_file
from sdtrt.engines import digests, find
from sdtrt.engines.digests import digest_of, digests_ahead, hash_ahead
from sdtrt.specs import ModelSpec


@pytest.fixture(autouse=True)
def _nothing_ahead():
    digests._AHEAD.clear()
    yield
    digests._AHEAD.clear()


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, and by which thread."""
    calls = []

    def noting(path):
        calls.append((path.name, threading.current_thread().name))
        return sha256_file(path)

    monkeypatch.setattr(digests, "sha256_file", noting)
    return calls


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(os.urandom(1000))
    return path


def wait(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def hash_all_ahead(*paths):
    hash_ahead(lambda: paths)
    wait(lambda: len(digests._AHEAD) == len(paths) and all(future.done() for future in digests._AHEAD.values()))


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250])
def test_files_of_any_length(size, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CHUNK_BYTES", 100)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert sha256_file(path) == right(path)


def test_a_digest_is_there_before_it_is_asked_for_and_good_for_one_use(file, hashed):
    hash_all_ahead(file)
    assert digest_of(file) == right(file)
    assert hashed == [(file.name, "sdtrt-ahead")]
    assert digest_of(file) == right(file)
    assert hashed[1:] == [(file.name, threading.current_thread().name)]


def test_a_file_that_was_written_since_is_hashed_anew(file, hashed):
    hash_all_ahead(file)
    time_stamp = file.stat().st_mtime_ns
    with file.open("r+b") as opened:
        opened.write(b"\0\0\0\0")
    os.utime(file, ns=(time_stamp, time_stamp))  # who sets that back can't set back the time of the change
    assert digest_of(file) == right(file)
    assert len(hashed) == 2


def test_a_file_that_was_replaced_is_hashed_anew(file):
    hash_all_ahead(file)
    other = file.with_name("other")
    other.write_bytes(os.urandom(1000))
    other.replace(file)
    assert digest_of(file) == right(file)


def test_a_digest_under_way_is_waited_for_and_one_not_begun_is_not(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    begun, go = threading.Event(), threading.Event()

    def slowly(path):
        if threading.current_thread().name == "sdtrt-ahead":
            begun.set()
            assert go.wait(10)
        return sha256_file(path)

    for path in (first, second):
        path.write_bytes(path.name.encode())
    monkeypatch.setattr(digests, "sha256_file", slowly)
    hash_ahead(lambda: [first, second])
    assert begun.wait(10)
    assert digest_of(second) == right(second), "with the first one still under way"
    threading.Timer(0.05, go.set).start()
    assert digest_of(first) == right(first)


def test_what_fails_ahead_is_the_commands_to_meet(file, capfd):
    def refuse():
        raise CacheError("the engine directory is not safe", hint="")

    for hashing in (refuse, lambda: [file.with_name("not there"), file]):
        hash_ahead(hashing)
    wait(lambda: not [thread for thread in threading.enumerate() if thread.name == "sdtrt-ahead"])
    assert digest_of(file) == right(file)
    with pytest.raises(OSError, match="not there"):
        digest_of(file.with_name("not there"))
    assert capfd.readouterr() == ("", "")


def test_a_read_error_reaches_who_asks(file, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(digests, "sha256_file", fail)
    hash_all_ahead(file)
    with pytest.raises(OSError, match="Input/output error"):
        digest_of(file)


def test_a_read_error_of_the_background_alone_fails_nothing(file, monkeypatch):
    real = digests.sha256_file

    def fail_there(path):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(24, "Too many open files")
        return real(path)

    monkeypatch.setattr(digests, "sha256_file", fail_there)
    hash_all_ahead(file)
    assert digest_of(file) == right(file)


# ----------------------------------------------------------------------------------------------- in an engine directory


@pytest.fixture
def directory(directory, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 500)
    return directory


def publish(directory, component, number, *, model="one", backend="tensorrt", size=1000, kind="engine"):
    """An entry that was used at the time `number`."""

    def make(folder: Path):
        (folder / "engine.plan").write_bytes(os.urandom(size))
        (folder / "layers.json").write_bytes(b"{}")
        return {"model": model}

    key = {"component": component, "precision": "fp16", "backend": backend, "number": number}
    entry = directory.obtain(kind, key, make)
    os.utime(entry.path / "entry.json", (number, number))
    return entry


def test_likely_are_the_models_engines_used_last_the_largest_first(directory):
    publish(directory, "unet", 1, size=9000)
    decoder = publish(directory, "vae_decoder", 2)
    unet = publish(directory, "unet", 3, size=2000)
    slow = publish(directory, "unet", 4, backend="onnxruntime", size=2500)
    publish(directory, "unet", 5, model="another")
    publish(directory, "unet", 6, kind="onnx")
    publish(directory, "text_encoder", 7, size=100)  # hashed in no time
    plans = {entry.name: entry.path / "engine.plan" for entry in (unet, decoder, slow)}
    assert find.likely(directory, ModelSpec("one"), "tensorrt") == [plans[unet.name], plans[decoder.name]]
    assert find.likely(directory, ModelSpec("one"), "auto") == [plans[slow.name], plans[decoder.name]]
    assert find.likely(directory, ModelSpec("none"), "auto") == []


def test_an_entry_damaged_after_it_was_hashed_ahead_is_found(directory):
    entry = publish(directory, "unet", 1)
    hash_all_ahead(*find.likely(directory, ModelSpec("one"), "auto"))
    assert entry.verified("engine.plan") == entry.path / "engine.plan"
    hash_all_ahead(*find.likely(directory, ModelSpec("one"), "auto"))
    with (entry.path / "engine.plan").open("r+b") as opened:
        opened.write(b"\0\0\0\0")
    with pytest.raises(CacheError, match="damaged"):
        entry.verified("engine.plan")


# ------------------------------------------------------------------------------------------- for who opens files ahead


def test_what_was_proven_ahead_is_good_for_one_more_use(tmp_path, hashed):
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes(file.name.encode())
    hash_all_ahead(files[0])
    digest = digests_ahead(files, lambda: True)
    assert [digest(file) for file in files] == [right(file) for file in files]
    assert [digest_of(file) for file in files] == [right(file) for file in files]
    assert sorted(name for name, _ in hashed) == ["one", "two"]


def test_whoever_asks_first_hashes_and_the_other_gives_up(tmp_path, monkeypatch, hashed):
    """Not begun with: `digest_of` does not wait for what lies before it."""
    first, second = tmp_path / "first", tmp_path / "second"
    go = threading.Event()
    noting = digests.sha256_file

    def slowly(path):
        assert path == second or go.wait(10)
        return noting(path)

    for path in (first, second):
        path.write_bytes(path.name.encode())
    monkeypatch.setattr(digests, "sha256_file", slowly)
    digest = digests_ahead([first, second], lambda: True)
    assert digest_of(second) == right(second)
    with pytest.raises(CancelledError):
        digest(second)
    go.set()
    assert digest(first) == right(first)
    assert sorted(name for name, _ in hashed) == ["first", "second"]


def test_nobody_waits_for_what_is_not_wanted(file, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slowly(path):
        begun.set()
        assert go.wait(10)
        return sha256_file(path)

    monkeypatch.setattr(digests, "sha256_file", slowly)
    digest = digests_ahead([file], lambda: not begun.is_set())
    with pytest.raises(CancelledError):
        digest(file)
    go.set()
    assert digest_of(file) == right(file)

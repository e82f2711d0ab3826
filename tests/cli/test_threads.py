"""What a process is given: few threads, as in containers, little memory, no docstrings."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdtrt.cli import prewarm
from sdtrt.common import files, threads
from sdtrt.common.errors import CacheError
from sdtrt.engines import digests
from sdtrt.engines.entry import Entry
from sdtrt.exports.onnx_run import mend_of


@pytest.fixture
def no_threads(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_nothing_is_looked_at_ahead_where_no_thread_is_to_be_had(no_threads, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    digests.hash_ahead(lambda: [file])
    assert digests.digests_ahead([file], lambda: True)(file) == files.sha256_file(file)
    assert prewarm.wake_gpu().result() is False


def test_libraries_compute_in_one_thread_where_there_are_no_more(no_threads, monkeypatch):
    for name in (*threads.VARIABLES, "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "7")
    assert threads.make_do()
    assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "1"


def test_nothing_is_changed_where_there_are_enough():
    before = dict(os.environ)
    assert not threads.make_do()
    assert dict(os.environ) == before


@pytest.mark.parametrize("said", ["pthread_create failed", "Too many open files", "indices element out of data bounds"])
def test_no_hint_removes_an_engine_that_is_not_proven_to_be_damaged(said):
    hint = mend_of(RuntimeError(said), Path("engines/name/engine.onnx"))
    assert " rm " not in hint
    assert "--force" not in hint


def test_a_file_that_no_limit_lets_open_is_not_called_damaged(tmp_path, monkeypatch):
    entry = Entry(tmp_path, "engine", {}, {}, {"file": 1}, {"file": ""}, 0.0)

    def refuse(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr("sdtrt.engines.entry.digest_of", refuse)
    with pytest.raises(CacheError, match="can't be read: Too many open files") as caught:
        entry.verify_file(tmp_path / "file", refuse)
    assert "ulimit -n" in caught.value.hint
    assert "damaged" not in f"{caught.value.message} {caught.value.hint}"


def test_python_without_docstrings_is_refused_in_two_lines():
    ended = subprocess.run(
        [sys.executable, "-OO", "-m", "sdtrt", "--help"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert [line.split(":")[0] for line in ended.stderr.splitlines()] == ["error", "hint"]


def test_too_little_memory_for_the_imports_is_said_in_two_lines(tmp_path):
    limit = (900 * 2**20,) * 2
    ended = subprocess.run(
        [sys.executable, "-m", "sdtrt", "txt2img", "-p", "x", "-b", "torch", "-o", str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    assert ended.returncode == 1
    assert [line.split(":")[0] for line in ended.stderr.splitlines()][-2:] == ["error", "hint"]
    assert "Traceback" not in ended.stderr

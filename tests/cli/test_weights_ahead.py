"""What is read before a request's engines ask for it: which files, that nothing is hashed twice, and when it begins."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdtrt.cli import weights_ahead
from sdtrt.cli.weights_ahead import read_ahead
from sdtrt.engines import digests
from sdtrt.models.resolve import TINY
from sdtrt.specs import GenerateSpec, LoraSpec, ModelSpec

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {path.resolve() for path in TINY.glob("*/*.safetensors")}


@pytest.fixture
def read(monkeypatch):
    """The files that are read whole."""
    files, real = [], weights_ahead.read_file
    monkeypatch.setattr(weights_ahead, "read_file", lambda path: (files.append(path), real(path)))
    return files


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, each as if it were large, and by which thread."""
    calls, hash_file = [], digests.sha256_file
    monkeypatch.setattr(digests, "MEMO_BYTES", 1)
    monkeypatch.setattr(
        digests, "sha256_file", lambda path: calls.append((path, threading.current_thread().name)) or hash_file(path)
    )
    digests._AHEAD.clear()
    yield calls
    digests._AHEAD.clear()


def publish(directory, backend, component="unet", number=1):
    """An engine that is there."""

    def make(folder):
        (folder / "engine.pt2").write_bytes(b"code")
        return {"model": "another"}

    key = {"component": component, "precision": "fp16", "backend": backend, "number": number}
    return directory.obtain("engine", key, make)


def ahead(directory, backend="inductor", model="tiny", loras=()):
    """All that the background does for a request."""
    read_ahead(GenerateSpec(("a red circle",), ModelSpec(str(model), loras=loras), backend), directory)
    while threads := [one for one in threading.enumerate() if one.name == weights_ahead.THREAD]:
        threads[0].join(10)
        assert not threads[0].is_alive()


def test_all_weights_are_read_and_the_package_used_last(directory, read):
    old, new = publish(directory, "inductor"), publish(directory, "inductor", number=2)
    os.utime(old.path / "entry.json", (1, 1))
    publish(directory, "onnxruntime", "vae_decoder")
    ahead(directory)
    assert set(read) == {*WEIGHTS, new.path / "engine.pt2"}


@pytest.mark.parametrize(
    ("backend", "there", "reads"),
    [
        ("inductor", None, True),
        ("torch", None, True),
        ("onnxruntime", "inductor", False),
        ("tensorrt", "inductor", False),
        ("auto", "inductor", True),
        ("auto", "tensorrt", False),
        ("auto", None, False),  # it builds first
    ],
)
def test_weights_are_read_where_they_are_in_no_engine(directory, read, backend, there, reads):
    if there is not None:
        publish(directory, there)
    ahead(directory, backend)
    assert (set(read) >= WEIGHTS) == reads


def test_what_nobody_has_hashed_is_hashed_once_by_the_background(directory, read, hashed):
    ahead(directory)
    assert {path for path, _ in hashed} == WEIGHTS
    assert {thread for _, thread in hashed} == {weights_ahead.THREAD}
    assert not read
    found = {path: directory.file_digest(path) for path in WEIGHTS}
    assert len(hashed) == len(WEIGHTS)
    ahead(directory)
    assert len(hashed) == len(WEIGHTS), "it is known now"
    assert set(read) == WEIGHTS
    digests._AHEAD.clear()
    assert found == {path: digests.sha256_file(path) for path in WEIGHTS}


def test_a_file_that_changes_after_it_was_hashed_ahead_is_hashed_anew(directory, hashed, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(b"one")
    ahead(directory, model=file)
    assert [path for path, _ in hashed] == [file]
    file.write_bytes(b"another")
    assert directory.file_digest(file) == digests.sha256_file(file)


def test_what_is_not_there_is_left_for_the_command_to_meet(directory, read, recwarn):
    ahead(directory, model="owner/no-such-model")
    ahead(directory, model=directory.path / "none.safetensors")
    assert not read
    assert not recwarn.list


def test_a_lora_that_is_not_there_yet_holds_nothing_up(directory, read):
    ahead(directory, loras=(LoraSpec("owner/no-such-lora"),))
    assert set(read) == set(WEIGHTS)


@pytest.mark.slow
def test_it_is_done_while_python_imports(tmp_path):
    """Seen from outside, in a real command; PyTorch runs the model, as no compiler is to run here."""
    words = ["txt2img", "--backend", "torch", "--steps", "1", "a red circle", "--output", str(tmp_path / "a.png")]
    marks = tmp_path / "marks.json"
    command = [sys.executable, str(ROOT / "benchmarks/startup_marks.py"), "command", str(marks), *words]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "SDTRT_ENGINE_DIR": str(tmp_path / "engines")}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    spans = json.loads(marks.read_text())["spans"]
    reads = [span for span in spans if span["thread"] == weights_ahead.THREAD and span["name"].startswith("read ")]
    (torch,) = (span for span in spans if span["name"] == "import torch")
    (opened,) = (span for span in spans if span["name"] == "the pipeline is opened")
    assert len(reads) == len(WEIGHTS)
    assert min(span["begin"] for span in reads) < torch["end"]
    assert max(span["end"] for span in reads) < opened["begin"]

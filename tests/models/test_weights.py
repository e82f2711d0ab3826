"""Weight files: headers, damaged files, and pickle's rules."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import types

import pytest
import torch
from safetensors.torch import save_file

from sdtrt.common.errors import ModelError
from sdtrt.models.weights import MAX_JSON_BYTES, TensorInfo, read_header, read_json, read_pickle, read_tensors

TENSORS = {"a.weight": torch.arange(12, dtype=torch.float16).reshape(3, 4), "ids": torch.arange(5)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_header_tells_names_dtypes_and_shapes(file):
    header = read_header(file)
    assert header == {"a.weight": TensorInfo("float16", (3, 4), 24), "ids": TensorInfo("int64", (5,), 40)}
    assert header["a.weight"].elements == 12
    assert {name: info.is_floating_point for name, info in header.items()} == {"a.weight": True, "ids": False}


def test_reads_only_what_is_named(file):
    tensors = read_tensors(file, ["a.weight"])
    assert list(tensors) == ["a.weight"]
    assert torch.equal(tensors["a.weight"], TENSORS["a.weight"])


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.999])
def test_says_that_a_file_is_truncated(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated: its header promises \d+ bytes, it has \d+"):
        read_header(file)


def header_of(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x00" * 4, "not a safetensors file"),
        (b"GIF89a" * 100, "not a safetensors file"),
        (struct.pack("<Q", 2**60) + b"{", "not a safetensors file"),
        (struct.pack("<Q", 20) + b"{this is no JSON    }", "not a safetensors file"),
        (header_of({"a": {"dtype": "F32"}}), "not a safetensors file"),
        (header_of({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}) + b"12345678", "not a safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"\x00" * 100, "pickle file"),
        (b"<!DOCTYPE html><title>Sign in</title>" + b" " * 100, "web page"),
    ],
)
def test_says_what_a_wrong_file_is(tmp_path, content, message):
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert "wrong.safetensors" in caught.value.message
    assert caught.value.hint


def test_says_why_a_file_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match=r"can't read .*: it is no regular file"):
        read_header(tmp_path)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({str(number): ENTRY for number in range(50_001)}, "names 50001 tensors, more than 50000"),
        ({"__metadata__": {"notes": "x" * (16 << 20)}}, "names 167[0-9]+ bytes, more than 16777216"),
    ],
)
def test_a_header_of_more_tensors_than_any_model_has_is_refused_at_once(tmp_path, entries, message):
    path = tmp_path / "large.safetensors"
    path.write_bytes(header_of(entries) + b"1234")
    start = time.process_time()
    with pytest.raises(ModelError, match=message):
        read_header(path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1, -1]},
        {"shape": [1] * 100_000},
        {"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]},
        {"shape": [2**70], "dtype": "FLOAT16"},
    ],
)
def test_a_shape_that_no_tensor_has_is_refused(tmp_path, change):
    (tmp_path / "x.safetensors").write_bytes(header_of({"a": ENTRY | change}) + b"1234")
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b" " * (MAX_JSON_BYTES + 1))
    for name, message in (("fifo", "it is no reg"), ("endless", "it is no reg"), ("large", "it is larger than")):
        with pytest.raises(ModelError, match=f"can't read .*/{name}: {message}"):
            read_json(tmp_path / name)
    for name in ("fifo", "endless"):
        with pytest.raises(ModelError, match=f"can't read .*/{name}: it is no regular file"):
            read_header(tmp_path / name)


def test_a_link_to_a_file_is_read(tmp_path):
    """The hub's cache is made of links."""
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_reads_a_pickle_without_running_its_code_where_it_can(tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "model.ckpt")
    tensors = read_pickle(tmp_path / "model.ckpt")
    assert torch.equal(tensors["ids"], TENSORS["ids"])


class TrainingState:
    """What old checkpoints drag along: an object of the framework that trained them."""


def test_reads_an_old_pickle_with_foreign_objects(tmp_path):
    torch.save({"state_dict": TENSORS, "callbacks": TrainingState()}, tmp_path / "model.ckpt")
    assert list(read_pickle(tmp_path / "model.ckpt")) == list(TENSORS)


class Foreign:
    """Of a package that is not installed, once its module is gone."""


class ForeignList(list):
    """The same, and pickled item by item."""


def test_reads_a_pickle_that_names_packages_which_are_not_installed(tmp_path, monkeypatch):
    """Lightning's checkpoints have the classes of their callbacks as keys."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    for cls in (Foreign, ForeignList):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    foreign = Foreign()
    foreign.best = ForeignList([1, 2, 3])
    torch.save({"state_dict": TENSORS, "callbacks": {Foreign: foreign}}, tmp_path / "model.ckpt")
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert torch.equal(read_pickle(tmp_path / "model.ckpt")["ids"], TENSORS["ids"])


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x02}q\x00."])
def test_a_pickle_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.ckpt"):
        read_pickle(path)

"""ONNX Runtime: what it says when a file is damaged or memory is short, and that it says it once."""

from __future__ import annotations

import shlex
import time

import factories
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from sdtrt.backends.onnxruntime import build
from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.common.console import QUIET
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.exports import parity
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Contract, TensorSpec, text_encoder_contract, unet_contract

# x [1] expanded to any size: one node that asks for as much memory as the test wants.
EXPAND = Contract(
    "unet",
    "fp32",
    (TensorSpec("x", "float32", (1,)), TensorSpec("shape", "int64", (2,))),
    (TensorSpec("y", "float32", ("rows", "columns")),),
)
PETABYTE = (2**24, 2**24)  # elements of four bytes
OVERFLOW = (2**34, 2**34)  # more bytes than 64 bits count


@pytest.fixture
def entry_file(tmp_path):
    """`EXPAND` as an entry's model, in a folder that a shell would split."""
    folder = tmp_path / "my engines" / "unet-onnxruntime-fp32-0123456789abcdef"
    folder.mkdir(parents=True)
    values = {
        "x": helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        "shape": helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        "y": helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"]),
    }
    node = helper.make_node("Expand", ["x", "shape"], ["y"])
    graph = helper.make_graph([node], "expand", [values["x"], values["shape"]], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "engine.onnx")
    return folder / "engine.onnx"


def feeds(shape):
    return {"x": torch.ones(1), "shape": torch.tensor(shape)}


def assert_removes_nothing(hint, file):
    assert shlex.join(["sdtrt", "engines", "verify", "--engine-dir", str(file.parent.parent)]) in hint
    assert " rm " not in hint


@pytest.mark.parametrize("shape", [PETABYTE, OVERFLOW], ids=["allocation", "overflow"])
def test_too_little_memory_is_a_memory_error_and_no_log_line(shape, entry_file, capfd):
    with OnnxRuntimeSession(entry_file, EXPAND) as session:
        assert session.run(feeds((2, 3)))["y"].shape == (2, 3)
        with pytest.raises(MemoryError, match="x"):
            session.run(feeds(shape))
    assert capfd.readouterr() == ("", "")


def test_another_failure_is_an_engine_error_and_no_log_line(entry_file, capfd):
    with OnnxRuntimeSession(entry_file, EXPAND) as session, pytest.raises(EngineError) as caught:
        session.run(feeds((-1, -1)))
    assert_removes_nothing(caught.value.hint, entry_file)
    assert capfd.readouterr() == ("", "")


def test_an_engine_that_cannot_be_loaded_is_to_be_verified_and_not_removed_unproven(entry_file, capfd):
    entry_file.write_bytes(b"not a model")
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeSession(entry_file, EXPAND)
    assert_removes_nothing(caught.value.hint, entry_file)
    assert capfd.readouterr() == ("", "")


def test_too_little_memory_to_load_does_not_blame_the_file(entry_file, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", raising(RuntimeError("std::bad_alloc")))
    with pytest.raises(EngineError, match="too little memory") as caught:
        OnnxRuntimeSession(entry_file, EXPAND)
    assert "rm" not in caught.value.hint.split()


def test_an_export_that_cannot_be_optimised_is_to_be_verified_and_not_removed_unproven(entry_file, tmp_path):
    entry_file.write_bytes(b"not a model")
    with pytest.raises(BuildError, match="can't optimise") as caught:
        build.optimize(entry_file, tmp_path, EXPAND, QUIET)
    assert_removes_nothing(caught.value.hint, entry_file)


def test_too_little_memory_to_build_does_not_blame_the_export(entry_file, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", raising(RuntimeError("Failed to allocate memory")))
    with pytest.raises(BuildError, match="too little memory") as caught:
        build.optimize(entry_file, tmp_path, EXPAND, QUIET)
    assert "rm" not in caught.value.hint.split()


def test_a_draft_that_does_not_run_is_not_named_in_a_hint(entry_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "seeded_feeds", lambda contract, sizes: feeds((-1, -1)))
    with pytest.raises(BuildError, match="can't be used") as caught:
        build.optimize(entry_file, tmp_path, EXPAND, QUIET)
    assert "--backend torch" in caught.value.hint


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("place", ["runtime", "build", "parity"])
def test_onnx_runtime_logs_nothing_that_it_raises(place, entry_file, tmp_path, monkeypatch):
    levels = []
    real = onnxruntime.InferenceSession

    def watch(path, options, **rest):
        levels.append(options.log_severity_level)
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    if place == "runtime":
        OnnxRuntimeSession(entry_file, EXPAND).close()
    elif place == "build":
        build._save_optimized(entry_file, tmp_path / "engine.onnx", entry_file)
    else:
        parity._open(entry_file)
    assert levels == [4]


def test_inputs_of_checks_are_one_function_and_plausible_for_sdxl():
    assert seeded_feeds is seeded_feeds
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    made = seeded_feeds(unet_contract(config, "fp16"), Sizes(2, 128, 96))
    assert made["time_ids"].tolist() == [[128, 96, 0, 0, 128, 96]] * 2
    assert made["sample"].dtype == torch.float16
    again = seeded_feeds(unet_contract(config, "fp16"), Sizes(2, 128, 96), seed=0)
    assert all(np.array_equal(made[name], again[name]) for name in made)


def test_a_session_lets_the_cores_go_after_a_run(tmp_path):
    """The least of five waits after a run, in processor time: other processes don't matter."""
    module = factories.small_text_encoder()
    contract = text_encoder_contract(module.config.to_dict(), "fp32")
    write_onnx(module, contract, tmp_path / "model.onnx")
    with OnnxRuntimeSession(tmp_path / "model.onnx", contract, threads=3) as session:
        assert min(_processor_seconds_after(session) for _ in range(5)) < 0.01


def _processor_seconds_after(session):
    session.run(seeded_feeds(session.contract, Sizes(4, 64, 64)))
    start = time.process_time()
    time.sleep(0.05)
    return time.process_time() - start

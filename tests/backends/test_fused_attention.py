"""Attentions as one operator of ONNX Runtime each (`onnxruntime.fused_attention`), and engines with them."""

import math
import os
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
from factories import SMALL, small_text_encoder, small_unet, small_vae

from sdtrt.backends.onnxruntime import build, fused_attention
from sdtrt.backends.onnxruntime.fused_attention import OPERATOR, fuse
from sdtrt.backends.onnxruntime.session import ONNXRUNTIME_FILE, OnnxRuntimeSession
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import BuildError, CacheError
from sdtrt.common.metrics import relative_l2
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports import onnx_file
from sdtrt.exports.attention import check, find_attentions
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs import Sizes
from sdtrt.specs.contract import Attention, text_encoder_contract, unet_contract, vae_contract

KEY = {"component": "unet", "precision": "fp32", "backend": "onnxruntime"}
ODD = Sizes(3, 72, 104, tokens=154)
UNETS = {
    "sd1": ("sd1", SMALL, 2 * 4),
    "sd2-upcast": ("sd2", {"layers_per_block": 1, "upcast_attention": True}, 2 * 10),
    "sdxl": ("sdxl", {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]}, 2 * 11),
}


def export_unet(name, precision, folder):
    kind, overrides, count = UNETS[name]
    unet = small_unet(kind, **overrides)
    contract = unet_contract(dict(unet.config), precision)
    write_onnx(unet.half() if precision == "fp16" else unet, contract, folder / "model.onnx")
    return folder / "model.onnx", contract, count


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A small UNet's export, and its contract."""
    return export_unet("sd1", "fp32", tmp_path_factory.mktemp("export"))[:2]


def operators(file):
    return [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]


def outputs(file, contract, sizes):
    with OnnxRuntimeSession(file, contract, optimized=False) as session:
        return next(iter(session.run(seeded_feeds(contract, sizes)).values())).double().numpy()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("sd1", "fp32"),
        pytest.param("sdxl", "fp32", marks=pytest.mark.slow),
        pytest.param("sd2-upcast", "fp16", marks=pytest.mark.slow),
    ],
)
def test_all_attentions_of_a_unet_are_one_operator_each_and_compute_the_same(name, precision, tmp_path):
    source, contract, count = export_unet(name, precision, tmp_path)
    (tmp_path / "entry").mkdir()
    found = build.optimize(source, tmp_path / "entry", contract, QUIET)
    assert found["fused_attentions"] == count
    assert [file.name for file in (tmp_path / "entry").iterdir()] == [ONNXRUNTIME_FILE]
    engine = tmp_path / "entry" / ONNXRUNTIME_FILE
    made = operators(engine)
    assert (made.count(OPERATOR), made.count("Softmax")) == (count, 0)
    for sizes in (ODD, Sizes(2, 128, 128)):
        error = relative_l2(outputs(engine, contract, sizes), outputs(source, contract, sizes))
        assert error < (1e-5 if precision == "fp32" else 5e-3)


def test_the_attention_of_a_vae_is_fused(tmp_path):
    vae = small_vae()
    contract = vae_contract(dict(vae.config), "fp32", "vae_decoder")
    write_onnx(vae, contract, tmp_path / "model.onnx")
    (tmp_path / "entry").mkdir()
    assert build.optimize(tmp_path / "model.onnx", tmp_path / "entry", contract, QUIET)["fused_attentions"] == 1


def test_attention_with_a_mask_is_left_alone(tmp_path):
    encoder = small_text_encoder()
    contract = text_encoder_contract(encoder.config.to_dict(), "fp32")
    write_onnx(encoder, contract, tmp_path / "model.onnx")
    assert fuse(tmp_path / "model.onnx", tmp_path, 0, QUIET) == (tmp_path / "model.onnx", 0)
    (tmp_path / "entry").mkdir()
    assert "fused_attentions" not in build.optimize(tmp_path / "model.onnx", tmp_path / "entry", contract, QUIET)
    assert "Softmax" in operators(tmp_path / "entry" / ONNXRUNTIME_FILE)


def test_cross_attention_is_found_where_it_is_asked_for_and_held_against_its_nodes(unet):
    facts = GraphIndex(*onnx_file.load_split(unet[0]))
    own, every = find_attentions(facts), find_attentions(facts, cross=True)
    assert ["attn1" in one.result for one in own] == [True] * 4
    others = [one for one in every if one not in own]
    assert ["attn2" in one.result for one in others] == [True] * 4
    for one in every:
        assert check(facts, one, facts.opset) < 1e-5
        with pytest.raises(ValueError, match="is not what the graph computes"):
            check(facts, replace(one, scale=1.1 * one.scale), facts.opset)


def misread(monkeypatch, source, count):
    """So many of the attentions that are found have another scale than their nodes."""
    found = find_attentions(GraphIndex(*onnx_file.load_split(source)), cross=True)
    wrong = [replace(one, scale=math.e * one.scale) for one in found[:count]]
    monkeypatch.setattr(fused_attention, "find_attentions", lambda *_, **__: [*wrong, *found[count:]])


def test_an_attention_that_is_not_what_it_seemed_is_left_and_the_others_are_not(unet, tmp_path, monkeypatch, capsys):
    source, contract = unet
    misread(monkeypatch, source, 1)
    info = build.optimize(source, tmp_path, contract, Console(quiet=True))
    assert info["fused_attentions"] == 7
    assert info["parity"]["relative_l2"] < 1e-5
    said = capsys.readouterr().err
    assert said.startswith("warning: an attention is kept as it was exported")
    assert "is not what the graph computes" in said
    made = operators(tmp_path / ONNXRUNTIME_FILE)
    assert (made.count(OPERATOR), made.count("Softmax")) == (7, 1)


def test_a_model_that_differs_is_optimised_as_it_was_exported_and_that_is_said(unet, tmp_path, monkeypatch, capsys):
    source, contract = unet
    misread(monkeypatch, source, 8)
    monkeypatch.setattr(fused_attention, "check", lambda *_: 0.0)
    monkeypatch.setattr(build, "EXTERNAL_BYTES", 0)  # the first attempt leaves two files
    info = build.optimize(source, tmp_path, contract, Console(quiet=True))
    assert "fused_attentions" not in info
    assert info["parity"]["relative_l2"] < 1e-5
    assert OPERATOR not in operators(tmp_path / ONNXRUNTIME_FILE)
    assert capsys.readouterr().err.startswith("warning: attention is kept as it was exported")


def test_a_model_that_the_operator_fails_in_is_optimised_as_it_was_exported(unet, tmp_path, monkeypatch, capsys):
    """Seven heads are not what any of its widths has."""
    found = find_attentions(GraphIndex(*onnx_file.load_split(unet[0])), cross=True)
    heads = [replace(one, heads=7) for one in found]
    monkeypatch.setattr(fused_attention, "find_attentions", lambda *_, **__: heads)
    monkeypatch.setattr(fused_attention, "check", lambda *_: 0.0)
    info = build.optimize(unet[0], tmp_path, unet[1], Console(quiet=True))
    assert "fused_attentions" not in info
    assert OPERATOR not in operators(tmp_path / ONNXRUNTIME_FILE)
    said = capsys.readouterr().err
    assert said.startswith("warning: attention is kept as it was exported")
    assert "it fails: ONNX Runtime failed at" in said


def test_a_graph_whose_types_cannot_be_inferred_is_left_and_that_is_said(unet, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise onnx.shape_inference.InferenceError("[ShapeInferenceError] no such type")

    monkeypatch.setattr(fused_attention, "GraphIndex", fail)
    assert fused_attention.fuse(unet[0], tmp_path, 2**30, Console(quiet=True)) == (unet[0], 0)
    assert "no such type" in capsys.readouterr().err


def test_a_model_that_gives_no_numbers_at_one_size_is_no_engine(unet, tmp_path, monkeypatch):
    differences = iter([1e-7, math.nan] * 2)
    monkeypatch.setattr(build, "compare", lambda *_: {"relative_l2": next(differences)})
    with pytest.raises(BuildError, match="differs from its ONNX: relative L2 nan"):
        build.optimize(unet[0], tmp_path, unet[1], QUIET)


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(28, "No space left on device")])
def test_what_may_pass_ends_the_build_and_makes_no_slower_engine(error, unet, tmp_path, monkeypatch):
    """The engine would be found from then on."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(onnx_file, "save", fail)
    with pytest.raises((BuildError, OSError), match=r"memory|space"):
        build.optimize(unet[0], tmp_path, unet[1], QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "error"), [(4096, OSError), (2**40, BuildError)])
def test_a_save_that_fails_with_the_disk_full_ends_the_build(free, error, unet, tmp_path, monkeypatch):
    """ONNX Runtime says the same of both; with room left the model is tried as it was exported, which fails, too."""

    def fail(*_, **__):
        (tmp_path / ONNXRUNTIME_FILE).write_bytes(b"the first part")
        raise RuntimeError("INVALID_PROTOBUF : Protobuf serialization failed.")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(error, match=r"No space left on device|serialization failed"):
        build.optimize(unet[0], tmp_path, unet[1], QUIET)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.parametrize("apart", [False, True])
def test_a_disk_that_the_optimised_model_fills_publishes_no_slower_engine(apart, unet, tmp_path, monkeypatch):
    """There is room for the model with its attentions fused, and for a part of what ONNX Runtime makes of it."""
    source, contract = unet
    monkeypatch.setattr(build, "EXTERNAL_BYTES", 0 if apart else 2**30)
    size_bytes = int(1.7 * source.stat().st_size)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", tmp_path]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        directory = EngineDirectory(tmp_path / "engines")

        def make(folder):
            return build.optimize(source, folder, contract, QUIET)

        with pytest.raises(CacheError, match="can't be written: No space left on device") as caught:
            directory.obtain("engine", KEY, make)
        assert caught.value.hint.startswith("free some space there")
        assert directory.entries() == []
        subprocess.run(["mount", "-o", f"remount,size={4 * size_bytes}", tmp_path], check=True)
        assert directory.obtain("engine", KEY, make).info["fused_attentions"] == 8
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("kinds", [{"query": 16}, {"result": 10}, {"query": 16, "key": 16, "value": 16, "result": 16}])
def test_what_the_operator_has_no_types_for_is_left(kinds):
    """16 is bfloat16, 10 fp16; the others are fp32."""
    attention = Attention(("query", "key", "value"), "result", 2, 8, 1.0)
    types = dict.fromkeys(("query", "key", "value", "result"), 1)
    fused_attention._check_types(SimpleNamespace(types=types), attention)
    for wrong in (types | kinds, {}):
        with pytest.raises(ValueError, match="fp32, or all fp16"):
            fused_attention._check_types(SimpleNamespace(types=wrong), attention)


@pytest.mark.parametrize("apart", [False, True])
def test_a_large_models_weights_are_in_a_file_of_their_own(apart, unet, tmp_path, monkeypatch):
    """Whether the export has them so or not."""
    source, contract = unet
    if apart:
        model, weights = onnx_file.load_split(source)
        source = tmp_path / "model.onnx"
        onnx_file.save(model, weights, source, inline_bytes=0)
    monkeypatch.setattr(build, "EXTERNAL_BYTES", 2**20)
    (tmp_path / "entry").mkdir()
    assert build.optimize(source, tmp_path / "entry", contract, QUIET)["fused_attentions"] == 8
    files = {file.name: file.stat().st_size for file in (tmp_path / "entry").iterdir()}
    assert set(files) == {ONNXRUNTIME_FILE, f"{ONNXRUNTIME_FILE}.data"}
    assert files[ONNXRUNTIME_FILE] < 2**20 < files[f"{ONNXRUNTIME_FILE}.data"]
    moved = (tmp_path / "entry").rename(tmp_path / "published")
    engine = moved / ONNXRUNTIME_FILE
    assert relative_l2(outputs(engine, contract, ODD), outputs(source, contract, ODD)) < 1e-5

"""Cutting a UNet at its self-attentions (`build.splitting`), and the pieces with PyTorch's between them."""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factories import SMALL, small_unet
from onnx import numpy_helper
from test_benchmarks import run

from sdtrt import onnx_graph, trt_api
from sdtrt.build import group_norm, splitting
from sdtrt.build import tensorrt as build
from sdtrt.build.splitting import FLOATS, Facts, check, choose, find_attentions, freeze, split
from sdtrt.components import unet_contract
from sdtrt.console import QUIET
from sdtrt.export import write_onnx
from sdtrt.metrics import relative_l2
from sdtrt.parity import seeded_feeds
from sdtrt.runtime.onnxruntime import OnnxRuntimeSession
from sdtrt.runtime.pieces import list_file, read_pieces, write_pieces
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Sizes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from segments import OnnxRuntimeSegments, read_segments, write_segments

SIZES = Sizes(2, 64, 96)
OTHER = Sizes(1, 128, 64, tokens=154)
UNETS = {
    "sd1": ("sd1", {"layers_per_block": 1}),
    "sd2-upcast": ("sd2", {"layers_per_block": 1, "upcast_attention": True}),
    "sdxl": ("sdxl", {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]}),
    "small": ("sd1", SMALL),
    "plugin": ("sd1", SMALL | {"block_out_channels": (320, 320)}),  # a width that 8.6's plugin for norms serves
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports: name, precision → file, contract."""
    made = {}

    def export(name, precision):
        if (name, precision) not in made:
            kind, overrides = UNETS[name]
            unet = small_unet(kind, **overrides)
            contract = unet_contract(dict(unet.config), precision)
            path = tmp_path_factory.mktemp("export") / "model.onnx"
            write_onnx(unet.half() if precision == "fp16" else unet, contract, path)
            made[name, precision] = path, contract
        return made[name, precision]

    return export


def difference(source, folder, contract, sizes):
    """How far the pieces in a folder are from the whole model, as relative L2 error."""
    feeds = seeded_feeds(contract, sizes)
    with OnnxRuntimeSession(source, contract, optimized=False) as session, ExitStack() as stack:
        expected = session.run(feeds)["out_sample"]
        found = OnnxRuntimeSegments(read_segments(folder), "flash", stack).run(feeds)
    return relative_l2(found.float().numpy(), expected.float().numpy())


@pytest.mark.parametrize(("name", "joined"), [("sd1", False), ("sd2-upcast", True), ("sdxl", True)])
def test_pieces_are_the_whole_model_in_fp16(exported, tmp_path, name, joined):
    source, contract = exported(name, "fp16")
    write_segments(source, tmp_path, contract, SIZES, 0, "joined" if joined else "separate")
    attentions = [one for segment in read_segments(tmp_path) for one in segment.attentions]
    assert len(attentions) == {"sd1": 3 + 1 + 6, "sd2-upcast": 3 + 1 + 6, "sdxl": 1 + 2 + 2 + 4 + 2}[name]
    assert {len(one.sources) for one in attentions} == {1 if joined else 3}
    assert difference(source, tmp_path, contract, SIZES) < 1e-2


def test_pieces_are_the_whole_model_exactly_in_fp32(exported, tmp_path):
    source, contract = exported("small", "fp32")
    write_segments(source, tmp_path, contract, SIZES, None, "separate")
    assert len(read_segments(tmp_path)) == 1 + 3
    assert difference(source, tmp_path, contract, SIZES) < 1e-5


def test_pieces_of_a_dynamic_model_serve_other_sizes(exported, tmp_path, monkeypatch):
    """Arithmetic on shapes is repeated in each piece, from the tensors that it starts from."""
    source, contract = exported("small", "fp32")
    monkeypatch.setattr("segments.freeze", lambda *_: None)
    write_segments(source, tmp_path, contract, SIZES, 0, "joined")
    for sizes in (SIZES, OTHER):
        assert difference(source, tmp_path, contract, sizes) < 1e-5


def test_only_floating_point_crosses_and_weights_are_where_they_are_needed(exported, tmp_path):
    source, _ = exported("small", "fp16")
    model, weights = onnx_graph.load_split(source)
    facts = Facts(model, weights)
    pieces = split(model, weights, facts, find_attentions(facts))
    for before, after in pairwise(pieces):
        assert {one.result for one in before.attentions} <= {spec.name for spec in after.inputs}
    for piece in pieces:
        values = [*piece.model.graph.input, *piece.model.graph.output]
        assert {value.type.tensor_type.elem_type for value in values} <= set(FLOATS)
        taken = {name for node in piece.model.graph.node for name in node.input}
        assert set(piece.weights) <= taken
    homes = [name for piece in pieces for name in piece.weights]
    assert len(homes) == len(set(homes)) == len(weights)
    for number, piece in enumerate(pieces):
        onnx_graph.save(piece.model, piece.weights, tmp_path / f"{number}.onnx")
        onnx.checker.check_model(tmp_path / f"{number}.onnx", full_check=True)


def test_norm_plugins_and_fp32_nodes_are_found_in_pieces_as_in_the_whole(exported, tmp_path):
    source, contract = exported("plugin", "fp16")
    found = {}
    for name in ("whole", "joined"):
        write_segments(source, tmp_path / name, contract, SIZES, 0, name)
        files = [segment.onnx for segment in read_segments(tmp_path / name)]
        norms = sum(group_norm.use_plugin(*onnx_graph.load_split(file)) for file in files)
        wide = sorted(node for file in files for node in onnx_graph.float32_nodes(file))
        found[name] = norms, wide
    assert found["whole"] == found["joined"]
    norms, wide = found["whole"]
    assert norms == group_norm.use_plugin(*onnx_graph.load_split(source)) > 10
    assert set(wide) == onnx_graph.float32_nodes(source)


def test_the_largest_resolution_is_cut_and_cross_attention_is_not(exported):
    source, contract = exported("sd1", "fp16")
    model, weights = onnx_graph.load_split(source)
    freeze(model, weights, contract.input_shapes(SIZES))
    assert not any(node.op_type == "Shape" for node in model.graph.node)
    found = find_attentions(Facts(model, weights))
    assert len(found) == 10
    assert all("attn1" in one.result for one in found)
    assert {(one.tokens, one.heads, one.width) for one in found} == {(96, 2, 16), (24, 2, 16), (6, 2, 32), (2, 2, 32)}
    assert [one.tokens for one in choose(found, None)] == [96] * 3
    assert [one.tokens for one in choose(found, 20)] == [96, 24, 24, 24, 96, 96]
    assert {one.scale for one in found} == {16**-0.5, 32**-0.5}


def test_what_was_read_is_held_against_what_the_graph_computes(exported):
    source, _ = exported("small", "fp16")
    facts = Facts(*onnx_graph.load_split(source))
    attention = find_attentions(facts)[0]
    assert check(facts, attention, 17) < 2e-3
    for wrong in (replace(attention, scale=1.1 * attention.scale), replace(attention, heads=4, width=8)):
        with pytest.raises(ValueError, match="is not what the graph computes"):
            check(facts, wrong, 17)


def test_attention_over_windows_of_the_tokens_is_left_alone(exported):
    """Its nodes are the same but for the sizes in its reshapes."""
    source, contract = exported("small", "fp16")
    model, weights = onnx_graph.load_split(source)
    freeze(model, weights, contract.input_shapes(SIZES))
    first, *others = find_attentions(Facts(model, weights))
    for node in model.graph.node:
        name = node.output[0]
        if node.op_type == "Reshape" and name.startswith(first.result.rpartition("/")[0]):
            heads = 4 if name != first.result else 3
            shape = [2 * 4, 96 // 4, first.heads, first.width] if heads == 4 else [2, 96, first.heads * first.width]
            node.input[1] = f"{name}.windows"
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(shape), node.input[1]))
    del model.graph.value_info[:]
    assert find_attentions(Facts(model, weights)) == others


@pytest.fixture
def cut(exported, tmp_path, monkeypatch):
    """What the build makes pieces of: graphs and the list that an engine has of them."""
    monkeypatch.setattr(splitting, "MIN_TOKENS", 90)
    source, contract = exported("small", "fp16")
    spec = BuildSpec(ExportSpec(), "tensorrt", (Profile.of(SIZES),), split_attention=True)
    return build.Request(source, tmp_path, contract, spec, None, False)


def test_the_build_lists_its_pieces(cut, tmp_path):
    sources = build._sources(cut, tmp_path, [].append)
    assert len(sources) == 1 + 3
    assert [source.piece.plan.name for source in sources] == ["engine.plan", *(f"engine.plan.{n}" for n in (1, 2, 3))]
    pieces = [source.piece for source in sources]
    write_pieces(cut.plan, pieces)
    assert list(read_pieces(cut.plan, cut.contract)) == pieces
    assert json.loads(list_file(cut.plan).read_text())[0]["attentions"][0]["tokens"] == 96


def test_an_engine_without_large_attentions_is_one_plan_and_says_so(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "MIN_TOKENS", 97)
    said = []
    (source,) = build._sources(cut, tmp_path, said.append)
    assert source.onnx == cut.onnx
    assert said == [{"warn": "no self-attention is of 97 tokens or more: none is left to PyTorch"}]


@pytest.mark.slow
def test_the_build_makes_a_plan_of_each_piece_and_leaves_nothing_else(cut, tmp_path):
    """As TensorRT 8.6 would be asked to, with the real builder of TensorRT for RTX, as that needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    rtx = BuildSpec(ExportSpec(), "tensorrt-rtx", (Profile.of(SIZES),), compute_capability=(8, 9))
    object.__setattr__(rtx, "split_attention", True)  # which is refused, as it gains nothing there
    request = replace(cut, spec=rtx)
    found = build._build(trt_api.open_library("tensorrt-rtx"), request, [].append)
    pieces = read_pieces(request.plan, request.contract)
    assert found["pieces"] == len(pieces) == 4
    assert found["plan_bytes"] == sum(piece.plan.stat().st_size for piece in pieces)
    wanted = {request.plan.name, *(f"engine.plan.{n}" for n in (1, 2, 3)), list_file(request.plan).name}
    assert {path.name for path in tmp_path.iterdir()} == wanted


@pytest.mark.slow
def test_tensorrt_takes_every_piece(cut, tmp_path):
    """The real builder, of TensorRT for RTX, as that needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    rtx = BuildSpec(ExportSpec(), "tensorrt-rtx", (Profile.of(SIZES),), compute_capability=(8, 9))
    for number, source in enumerate(build._sources(cut, tmp_path, [].append)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = build.build_plan(source.onnx, folder, source.piece.contract, rtx, timing_cache=None, console=QUIET)
        assert found["plan_bytes"] > 0
        assert found["precision"]["layers"]["fp16"] > 0


@pytest.mark.slow
def test_the_benchmark_on_a_cpu(tmp_path):
    report, folder = tmp_path / "report.json", tmp_path / "folder"
    common = ("--model", "tiny", "--backend", "onnxruntime", "--height", "64", "--width", "64", "--folder", folder)
    run("segments.py", *common, "--build-only")
    assert not report.exists()
    run("segments.py", *common, "--repeats", "1", "--attention-alone", "no", "--output", report)
    found = json.loads(report.read_text())
    whole, separate, joined = found["rows"]
    assert [row["variant"] for row in found["rows"]] == ["whole", "separate", "joined"]
    assert len(found["pieces"]["whole"]) == 1 < len(found["pieces"]["separate"])
    assert max(separate["relative_l2_to_whole"] + joined["relative_l2_to_whole"]) < 1e-2
    assert 0 < whole["worst_ratio_to_pytorch_fp16"] < 3
    assert torch.tensor([row["step_ms"] for row in found["rows"]]).min() > 0

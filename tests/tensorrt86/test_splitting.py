"""Cutting a UNet at its self-attentions (`cut`), and the pieces with PyTorch's between them."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from factories import SMALL, small_unet
from onnx import numpy_helper
from trt_fakes import fake_library

from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.backends.tensorrt import build as plan_build
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.plan import list_file
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt86 import cut as cutting
from sdtrt.backends.tensorrt86 import norm_plugin, parallel_build, policy, worker
from sdtrt.backends.tensorrt86.build import PieceRequest, build_plan
from sdtrt.backends.tensorrt86.cut import FLOATS, choose, freeze, split
from sdtrt.backends.tensorrt86.pieces import read_pieces, write_pieces
from sdtrt.backends.tensorrt86.precision import float32_nodes
from sdtrt.backends.tensorrt86.torch_kernels import compute
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import BuildError
from sdtrt.common.metrics import relative_l2
from sdtrt.exports import attention as attentions
from sdtrt.exports import onnx_file
from sdtrt.exports.attention import check, find_attentions
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range, Sizes
from sdtrt.specs.contract import unet_contract

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


def cut_up(source, folder, contract, tokens):
    """What a build makes pieces of, at `SIZES`: attentions over so many tokens and more are PyTorch's."""
    spec = BuildSpec(ExportSpec(), "tensorrt", (Profile.of(SIZES),))
    object.__setattr__(spec, "split_attention", tokens)  # which is refused for fp32
    return worker._sources(Request(source, folder, contract, spec, None, False), folder, [].append)


def difference(source, pieces, contract, sizes):
    """How far pieces, with PyTorch's attention between them, are from the whole model, as relative L2 error."""
    feeds = seeded_feeds(contract, sizes)
    with OnnxRuntimeSession(source, contract, optimized=False) as session:
        expected = session.run(feeds)["out_sample"]
    tensors = dict(feeds)
    for one in pieces:
        with OnnxRuntimeSession(one.onnx, one.piece.contract, optimized=False) as session:
            tensors |= session.run({name: tensors[name] for name in one.piece.inputs})
        tensors |= {cut.result: compute(cut, tensors) for cut in one.piece.cuts}
    return relative_l2(tensors["out_sample"].float().numpy(), expected.float().numpy())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("small", 1 + 1 + 2),
        pytest.param("sd1", 3 + 1 + 6, marks=pytest.mark.slow),
        pytest.param("sd2-upcast", 10, marks=pytest.mark.slow),
        pytest.param("sdxl", 1 + 2 + 2 + 4 + 2, marks=pytest.mark.slow),
    ],
)
def test_pieces_are_the_whole_model_in_fp16(exported, tmp_path, name, count):
    source, contract = exported(name, "fp16")
    pieces = cut_up(source, tmp_path, contract, 1)
    attentions = [one for source in pieces for one in source.piece.cuts]
    assert len(attentions) == count
    assert {len(one.sources) for one in attentions} == {1}  # queries, keys and values by one product
    assert difference(source, pieces, contract, SIZES) < 1e-2


def test_pieces_are_the_whole_model_exactly_in_fp32(exported, tmp_path):
    source, contract = exported("small", "fp32")
    pieces = cut_up(source, tmp_path, contract, 90)
    assert len(pieces) == 1 + 1 + 3
    assert difference(source, pieces, contract, SIZES) < 1e-5


def test_pieces_of_a_dynamic_model_serve_other_sizes(exported, tmp_path, monkeypatch):
    """Arithmetic on shapes is repeated in each piece, from the tensors that it starts from."""
    source, contract = exported("small", "fp32")
    for name in ("freeze", "check_fixed"):
        monkeypatch.setattr(cutting, name, lambda *_: None)
    monkeypatch.setattr(cutting, "choose", lambda found, *_: found)
    pieces = cut_up(source, tmp_path, contract, 1)
    assert len(pieces) > 1
    for sizes in (SIZES, OTHER):
        assert difference(source, pieces, contract, sizes) < 1e-5


def test_only_floating_point_crosses_and_weights_are_where_they_are_needed(exported, tmp_path):
    source, _ = exported("small", "fp16")
    model, weights = onnx_file.load_split(source)
    facts = GraphIndex(model, weights)
    pieces = split(model, weights, facts, find_attentions(facts))
    for before, after in pairwise(pieces):
        assert {one.result for one in before.cuts} <= {spec.name for spec in after.inputs}
    for piece in pieces:
        values = [*piece.model.graph.input, *piece.model.graph.output]
        assert {value.type.tensor_type.elem_type for value in values} <= set(FLOATS)
        taken = {name for node in piece.model.graph.node for name in node.input}
        assert set(piece.weights) <= taken
    homes = [name for piece in pieces for name in piece.weights]
    assert len(homes) == len(set(homes)) == len(weights)
    for number, piece in enumerate(pieces):
        onnx_file.save(piece.model, piece.weights, tmp_path / f"{number}.onnx")
        onnx.checker.check_model(tmp_path / f"{number}.onnx", full_check=True)


@pytest.mark.slow
def test_norm_plugins_and_fp32_nodes_are_found_in_pieces_as_in_the_whole(exported, tmp_path):
    source, contract = exported("plugin", "fp16")
    files = [one.onnx for one in cut_up(source, tmp_path, contract, 1)]
    assert len(files) > 1
    norms = sum(norm_plugin.use_plugin(*onnx_file.load_split(file)) for file in files)
    assert norms == norm_plugin.use_plugin(*onnx_file.load_split(source)) > 10
    assert {node for file in files for node in float32_nodes(file)} == float32_nodes(source)


def test_the_largest_resolution_is_cut_and_cross_attention_is_not(exported):
    source, contract = exported("sd1", "fp16")
    model, weights = onnx_file.load_split(source)
    freeze(model, weights, contract.input_shapes(SIZES))
    assert not any(node.op_type == "Shape" for node in model.graph.node)
    found = find_attentions(GraphIndex(model, weights))
    assert len(found) == 10
    assert all("attn1" in one.result for one in found)
    assert {(one.tokens, one.heads, one.width) for one in found} == {(96, 2, 16), (24, 2, 16), (6, 2, 32), (2, 2, 32)}
    assert [one.tokens for one in choose(found, 25)] == [96] * 3
    assert [one.tokens for one in choose(found, 20)] == [96, 24, 24, 24, 96, 96]
    assert [one.tokens for one in choose(found, 20, most=5)] == [96] * 3  # whole resolutions only
    assert choose(found, 20, most=2) == []
    assert choose(found, 97) == []
    assert {one.scale for one in found} == {16**-0.5, 32**-0.5}


def test_what_was_read_is_held_against_what_the_graph_computes(exported):
    source, _ = exported("small", "fp16")
    facts = GraphIndex(*onnx_file.load_split(source))
    attention = find_attentions(facts)[0]
    assert check(facts, attention, 17) < 2e-3
    for wrong in (replace(attention, scale=1.1 * attention.scale), replace(attention, heads=4, width=8)):
        with pytest.raises(ValueError, match="is not what the graph computes"):
            check(facts, wrong, 17)


def test_attention_over_windows_of_the_tokens_is_left_alone(exported):
    """Its nodes are the same but for the sizes in its reshapes."""
    source, contract = exported("small", "fp16")
    model, weights = onnx_file.load_split(source)
    freeze(model, weights, contract.input_shapes(SIZES))
    first, *others = find_attentions(GraphIndex(model, weights))
    for node in model.graph.node:
        name = node.output[0]
        if node.op_type == "Reshape" and name.startswith(first.result.rpartition("/")[0]):
            heads = 4 if name != first.result else 3
            shape = [2 * 4, 96 // 4, first.heads, first.width] if heads == 4 else [2, 96, first.heads * first.width]
            node.input[1] = f"{name}.windows"
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(shape), node.input[1]))
    del model.graph.value_info[:]
    assert find_attentions(GraphIndex(model, weights)) == others


@pytest.fixture
def cut(exported, tmp_path):
    """A request for an engine in pieces."""
    source, contract = exported("small", "fp16")
    spec = BuildSpec(ExportSpec(), "tensorrt", (Profile.of(SIZES),), split_attention=90)
    return Request(source, tmp_path, contract, spec, None, False)


def test_the_build_lists_its_pieces(cut, tmp_path):
    sources = worker._sources(cut, tmp_path, [].append)
    assert len(sources) == 1 + 1 + 3
    names = ["engine.plan", *(f"engine.plan.{n}" for n in (1, 2, 3, 4))]
    assert [source.piece.plan.name for source in sources] == names
    pieces = [source.piece for source in sources]
    write_pieces(cut.plan, pieces)
    assert list(read_pieces(cut.plan, cut.contract)) == pieces
    assert json.loads(list_file(cut.plan).read_text())[1]["attentions"][0]["tokens"] == 96


@pytest.mark.parametrize(
    "name", ["sd1", *(pytest.param(one, marks=pytest.mark.slow) for one in ("sd2-upcast", "sdxl"))]
)
def test_the_first_piece_projects_the_text_for_all_cross_attentions(exported, tmp_path, name):
    source, contract = exported(name, "fp16")
    first, *others = (one.piece for one in cut_up(source, tmp_path, contract, 1))
    assert first.is_of_conditioning
    assert not any(piece.is_of_conditioning for piece in others)
    assert first.inputs == ("encoder_hidden_states",)
    assert not any("encoder_hidden_states" in piece.inputs for piece in others)
    attentions = sum(name.endswith("attn2") for name, _ in small_unet(UNETS[name][0], **UNETS[name][1]).named_modules())
    assert len(first.contract.outputs) == 2 * attentions  # keys and values
    assert all(spec.dims[:2] == (2, 77) for spec in first.contract.outputs)


def test_an_engine_without_large_attentions_is_one_plan_and_says_so_where_others_were_asked_for(cut, tmp_path):
    said = []
    (source,) = worker._sources(replace(cut, spec=replace(cut.spec, split_attention=97)), tmp_path, said.append)
    assert source.onnx == cut.onnx
    assert said == [{"warn": "no self-attention is of 97 tokens or more: none is left to PyTorch"}]
    assert len(worker._sources(replace(cut, spec=replace(cut.spec, split_attention=0)), tmp_path, said.append)) == 1
    assert len(said) == 1


def weakly_typed(monkeypatch, answer):
    library = SimpleNamespace(has=lambda feature: feature == "weak typing" and answer)
    monkeypatch.setattr(libraries, "open_library", lambda _: library)


@pytest.mark.parametrize(("is_8", "tokens"), [(True, policy.SPLIT_TOKENS), (False, 0)])
def test_only_8_6_leaves_attention_to_pytorch_by_default_and_for_one_size(cut, monkeypatch, is_8, tokens):
    weakly_typed(monkeypatch, is_8)
    default = replace(cut.spec, split_attention=None)
    assert policy.split_tokens(default) == tokens
    assert policy.split_tokens(replace(default, version_compatible=True)) == 0
    assert policy.split_tokens(replace(default, profiles=default.profiles * 2)) == 0
    assert policy.split_tokens(replace(default, split_attention=0)) == 0
    assert policy.split_tokens(replace(default, export=ExportSpec(component="vae_decoder"))) == 0


@pytest.mark.parametrize("is_8", [True, False])
def test_the_build_says_where_an_engine_for_each_size_is_faster(cut, tmp_path, capsys, monkeypatch, is_8):
    weakly_typed(monkeypatch, is_8)
    monkeypatch.setattr(plan_build, "check_request", lambda request: None)  # there is no GPU
    monkeypatch.setattr(plan_build, "build_in_child", lambda request, console, show, worker: {})
    large, small = (Profile.of(Sizes(2, height, 512)) for height in (512, 248))  # 31 * 64 tokens are too few
    several, dynamic = (small, large), (replace(large, batch=Range(1, 2, 4)),)
    default = replace(cut.spec, split_attention=None)
    faster = [replace(default, profiles=profiles) for profiles in (several, dynamic)]
    of_small = (replace(small, width=Range(256, 512, 768)),)
    others = [replace(default, profiles=profiles) for profiles in ((large,), (small, small), of_small)]
    others += [replace(faster[0], version_compatible=True), replace(faster[0], split_attention=0)]
    others += [replace(faster[0], export=ExportSpec(component="vae_decoder"))]
    for spec in (*faster, *others):
        build_plan(cut.onnx, tmp_path, cut.contract, spec, timing_cache=None, console=Console())
        said = "such as sdtrt build --batch 2 --height 512 --width 512" in capsys.readouterr().err
        assert said is (is_8 and spec in faster)


def test_by_default_only_so_many_are_cut(cut, tmp_path, monkeypatch):
    weakly_typed(monkeypatch, True)
    monkeypatch.setattr(policy, "SPLIT_TOKENS", 1)
    default = replace(cut, spec=replace(cut.spec, split_attention=None))
    assert len(worker._sources(default, tmp_path, [].append)) > 2 + 3
    monkeypatch.setattr(worker, "MOST_CUTS", 3)
    assert len(worker._sources(default, tmp_path, [].append)) == 2 + 3
    asked = replace(cut, spec=replace(cut.spec, split_attention=1))
    assert len(worker._sources(asked, tmp_path, [].append)) > 2 + 3


def test_what_can_not_be_cut_is_whole_by_default_and_refused_where_it_was_asked_for(cut, tmp_path, monkeypatch):
    weakly_typed(monkeypatch, True)
    monkeypatch.setattr(policy, "SPLIT_TOKENS", 90)
    monkeypatch.setattr(attentions, "CHECK_TOLERANCE", 0.0)
    with pytest.raises(BuildError, match="is not what the graph computes") as caught:
        worker._sources(cut, tmp_path, [].append)
    assert "--split-attention 0" in caught.value.hint
    said = []
    (source,) = worker._sources(replace(cut, spec=replace(cut.spec, split_attention=None)), tmp_path, said.append)
    assert source.onnx == cut.onnx
    assert "attention is left to TensorRT, which is slower here" in said[0]["warn"]


@pytest.fixture
def no_pieces(monkeypatch):
    """A TensorRT that builds whole engines only; what is built of them."""
    built = []

    def build(library, request, report):
        request.plan.write_bytes(b"plan")
        if isinstance(request, PieceRequest) and request.piece:
            raise BuildError("no kernel fits", hint="raise --workspace-gib")
        built.append(request.plan.name)
        return 1.0, {}

    def run_here(request, report, **_):
        request.log.write_text("[ERROR] no kernel\n")
        return worker.build_piece_here(request, report)

    monkeypatch.setattr(worker, "_build_plan", build)
    monkeypatch.setattr(parallel_build, "run_worker", run_here)
    monkeypatch.setattr(parallel_build, "most_jobs", lambda: 1)
    monkeypatch.setattr(worker, "check", lambda *_, **__: {})
    monkeypatch.setattr(libraries, "open_library", lambda _: fake_library("tensorrt 8.6.1"))
    monkeypatch.setattr(policy, "SPLIT_TOKENS", 90)
    return built


def test_where_pieces_fail_that_nobody_asked_for_the_engine_is_built_whole(cut, no_pieces):
    said = []
    info = worker.build_here(replace(cut, spec=replace(cut.spec, split_attention=None)), said.append)
    assert info["pieces"] == 1
    assert no_pieces == ["engine.plan"]  # the largest piece came first, and failed
    assert [word["warn"] for word in said if "warn" in word] == [
        "the engine failed in pieces (no kernel fits): building it in one, which runs slower"
    ]
    assert [path.name for path in cut.folder.glob("engine.plan*")] == ["engine.plan"]
    assert "\n[piece 2]\n[ERROR] no kernel\n" in (cut.folder / "build.log").read_text()
    assert not list(cut.folder.glob("build.log.*"))


def test_where_pieces_fail_that_were_asked_for_the_hint_is_to_do_without(cut, no_pieces):
    with pytest.raises(BuildError, match="no kernel fits") as caught:
        worker.build_here(cut, [].append)
    assert "raise --workspace-gib" in caught.value.hint
    assert "sdtrt build --split-attention 0" in caught.value.hint


def test_where_a_whole_engine_fails_nothing_is_said_of_pieces(cut, no_pieces, monkeypatch):
    def fail(*_):
        raise BuildError("no kernel fits", hint="raise --workspace-gib")

    monkeypatch.setattr(worker, "_build_plan", fail)
    with pytest.raises(BuildError, match="no kernel fits") as caught:
        worker.build_here(replace(cut, spec=replace(cut.spec, split_attention=0)), [].append)
    assert caught.value.hint == "raise --workspace-gib"


@pytest.mark.slow
def test_the_build_makes_a_plan_of_each_piece_and_leaves_nothing_else(cut, tmp_path):
    """As TensorRT 8.6 would be asked to, with the real builder of TensorRT for RTX, as that needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    rtx = BuildSpec(ExportSpec(), "tensorrt-rtx", (Profile.of(SIZES),), compute_capability=(8, 9))
    object.__setattr__(rtx, "split_attention", 90)  # which is refused, as it gains nothing there
    request = replace(cut, spec=rtx)
    found = worker._build(libraries.open_library("tensorrt-rtx"), request, [].append)
    pieces = read_pieces(request.plan, request.contract)
    assert found["pieces"] == len(pieces) == 5
    assert found["plan_bytes"] == sum(piece.plan.stat().st_size for piece in pieces)
    plans = (request.plan.name, *(f"engine.plan.{n}" for n in (1, 2, 3, 4)))
    wanted = {*plans, list_file(request.plan).name, request.log.name}
    assert {path.name for path in tmp_path.iterdir()} == wanted


@pytest.mark.slow
def test_tensorrt_takes_every_piece(cut, tmp_path):
    """The real builder, of TensorRT for RTX, as that needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    rtx = BuildSpec(ExportSpec(), "tensorrt-rtx", (Profile.of(SIZES),), compute_capability=(8, 9))
    for number, source in enumerate(worker._sources(cut, tmp_path, [].append)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = build_plan(source.onnx, folder, source.piece.contract, rtx, timing_cache=None, console=QUIET)
        assert found["plan_bytes"] > 0
        assert found["precision"]["layers"]["fp16"] > 0

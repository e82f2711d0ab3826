"""Cutting a VAE's decoder at its largest group normalisation (`build.normalizations`), which is PyTorch's then."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import small_vae
from onnx import numpy_helper
from test_group_norm import trained
from test_splitting import no_pieces, weakly_typed  # noqa: F401  # a fixture
from trt_fakes import fake_library

from sdtrt import onnx_graph, trt_api
from sdtrt.build import splitting, worker
from sdtrt.build.attentions import Facts
from sdtrt.build.normalizations import check, find_normalizations
from sdtrt.build.splitting import choose_norms, freeze, split
from sdtrt.build.tensorrt import Request
from sdtrt.components import vae_contract
from sdtrt.export import write_onnx
from sdtrt.metrics import relative_l2
from sdtrt.parity import seeded_feeds
from sdtrt.runtime.between import compute, normalize
from sdtrt.runtime.onnxruntime import OnnxRuntimeSession
from sdtrt.runtime.pieces import Normalization, list_file, read_pieces, write_pieces
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range, Sizes

SIZES = Sizes(2, 64, 96)
LARGEST = "/decoder/up_blocks.3/resnets.0/norm1/Reshape_1_output_0"  # 16 channels of all pixels; the next have 8
OPEN_LIBRARY = trt_api.open_library
SD15 = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports of small decoders: configuration → file, contract."""
    made = {}

    def export(**config):
        key = json.dumps(config)
        if key not in made:
            vae = trained(small_vae(**config)).half()
            contract = vae_contract(dict(vae.config), "fp16", "vae_decoder")
            path = tmp_path_factory.mktemp("decoder") / "model.onnx"
            write_onnx(vae, contract, path)
            made[key] = path, contract
        return made[key]

    return export


def frozen(path, contract, sizes=SIZES):
    model, weights = onnx_graph.load_split(path)
    freeze(model, weights, contract.input_shapes(sizes))
    return model, weights, Facts(model, weights)


def spec_of(**changes):
    export = ExportSpec(component="vae_decoder")
    return BuildSpec(**{"export": export, "backend": "tensorrt", "profiles": (Profile.of(SIZES),)} | changes)


@pytest.fixture
def cut(exported, tmp_path, monkeypatch):
    """A request for a decoder's engine on 8.6, small as it is."""
    monkeypatch.setattr(splitting, "NORM_BYTES", 1)
    weakly_typed(monkeypatch, True)
    path, contract = exported()
    return Request(path, tmp_path, contract, spec_of(), None, False)


def test_the_pieces_are_the_whole_decoder(cut, tmp_path):
    said = []
    sources = worker._sources(cut, tmp_path, said.append)
    assert said == []
    (norm,) = sources[0].piece.cuts
    assert (norm.result, norm.groups, norm.epsilon) == (LARGEST, 8, pytest.approx(1e-6))
    assert len(sources) == 2
    assert sources[1].piece.cuts == ()
    assert not any(source.piece.is_of_conditioning for source in sources)
    # What is added around the block crosses as it was before it: the cut has that written anyway.
    assert [spec.name for spec in sources[0].piece.contract.outputs] == [norm.source]
    assert set(sources[1].piece.inputs) == {norm.source, norm.result}
    feeds = seeded_feeds(cut.contract, SIZES)
    with OnnxRuntimeSession(cut.onnx, cut.contract, optimized=False) as session:
        expected = session.run(feeds)["image"]
    tensors = dict(feeds)
    for one in sources:
        with OnnxRuntimeSession(one.onnx, one.piece.contract, optimized=False) as session:
            tensors |= session.run({name: tensors[name] for name in one.piece.inputs})
        tensors |= {norm.result: torch.empty_like(tensors[norm.source]) for norm in one.piece.cuts}
        for norm in one.piece.cuts:
            assert compute(norm, tensors) is tensors[norm.result]
    assert relative_l2(tensors["image"].float().numpy(), expected.float().numpy()) < 5e-3


def test_scale_and_shift_stay_in_the_next_piece(cut, tmp_path):
    _, after = worker._sources(cut, tmp_path, [].append)
    model, _ = onnx_graph.load_split(after.onnx)
    (taker,) = (node for node in model.graph.node if LARGEST in node.input)
    assert taker.op_type == "Mul"
    operators = [node.op_type for node in model.graph.node]
    whole, _ = onnx_graph.load_split(cut.onnx)
    assert operators.count("InstanceNormalization") == sum(
        "up_blocks.3" in node.name or "conv_norm_out" in node.name
        for node in whole.graph.node
        if node.op_type == "InstanceNormalization"
    ) - 1  # fmt: skip


def test_the_list_of_the_pieces_is_read_as_it_was_written(cut, tmp_path):
    pieces = [source.piece for source in worker._sources(cut, tmp_path, [].append)]
    write_pieces(cut.plan, pieces)
    assert list(read_pieces(cut.plan, cut.contract)) == pieces
    assert json.loads(list_file(cut.plan).read_text())[0]["normalizations"][0]["groups"] == 8


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"block_out_channels": (16, 16, 16, 16)}, "too many are the largest"),
        ({"block_out_channels": (8, 12, 16, 16), "norm_num_groups": 4}, "the next are two thirds of it"),
    ],
)
def test_where_no_norm_stands_out_none_is_cut(exported, monkeypatch, config, why):
    monkeypatch.setattr(splitting, "NORM_BYTES", 1)
    facts = frozen(*exported(**config))[2]
    assert len(find_normalizations(facts)) > 20
    assert choose_norms(facts) == [], why


def test_what_holds_few_megabytes_is_not_worth_a_cut(cut, tmp_path, monkeypatch):
    facts = frozen(cut.onnx, cut.contract)[2]
    size = 2 * 16 * 64 * 96 * 2
    assert [one.result for one in choose_norms(facts)] == [LARGEST]
    monkeypatch.setattr(splitting, "NORM_BYTES", size)
    assert [one.result for one in choose_norms(facts)] == [LARGEST]
    monkeypatch.setattr(splitting, "NORM_BYTES", size + 1)
    assert choose_norms(facts) == []
    said = []
    (source,) = worker._sources(cut, tmp_path, said.append)
    assert source.onnx == cut.onnx
    assert said == []


def test_who_leaves_a_norm_to_pytorch(monkeypatch):
    """8.6, for one fixed size in fp16; not where the plan is to be version-compatible, and of the decoder only."""
    weakly_typed(monkeypatch, True)
    assert trt_api.splits_norms(spec_of())
    assert not trt_api.splits_norms(spec_of(split_attention=0))  # nothing is to be left to PyTorch
    ranged = Profile(Range.of(1), Range(64, 96, 128), Range(64, 96, 128))
    for other in (
        {"version_compatible": True},
        {"backend": "tensorrt-rtx"},
        {"profiles": (Profile.of(SIZES),) * 2},
        {"profiles": (ranged,)},
        {"export": ExportSpec(component="vae_decoder", precision="fp32")},
        {"export": ExportSpec(component="vae_encoder")},
        {"export": ExportSpec(component="unet")},
    ):
        assert not trt_api.splits_norms(spec_of(**other)), other
    weakly_typed(monkeypatch, False)
    assert not trt_api.splits_norms(spec_of())


def test_what_was_read_is_held_against_what_the_graph_computes(exported):
    facts = frozen(*exported())[2]
    found = find_normalizations(facts)
    assert all(check(facts, one, 17) < 2e-3 for one in found)
    norm = next(one for one in found if one.result == LARGEST)
    for wrong in (replace(norm, groups=4), replace(norm, groups=16), replace(norm, epsilon=2e-6)):
        with pytest.raises(ValueError, match="is not what the graph computes"):
            check(facts, wrong, 17)


def change_scale(model):
    """Make one group's scale of the largest norm another."""
    norm = LARGEST.replace("Reshape_1_output_0", "InstanceNormalization")
    node = next(node for node in model.graph.node if node.name == norm)
    scale = np.ones(8, np.float16)
    scale[3] = 1.02
    node.input[1] = "other_scale"
    model.graph.initializer.append(numpy_helper.from_array(scale, "other_scale"))


def test_an_instance_normalisation_with_scales_of_its_own_is_not_cut_out(cut, tmp_path):
    model, weights, _ = frozen(cut.onnx, cut.contract)
    change_scale(model)
    facts = Facts(model, weights)
    with pytest.raises(ValueError, match="is not what the graph computes"):
        split(model, weights, facts, choose_norms(facts))
    model, weights = onnx_graph.load_split(cut.onnx)
    change_scale(model)
    onnx_graph.save(model, weights, tmp_path / "other.onnx")
    said = []
    (source,) = worker._sources(replace(cut, onnx=tmp_path / "other.onnx"), tmp_path, said.append)
    assert source.onnx == tmp_path / "other.onnx"
    assert "a group normalisation is left to TensorRT, which takes more of the GPU's memory" in said[0]["warn"]


def test_where_the_pieces_fail_the_decoder_is_built_whole(cut, no_pieces, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trt_api, "open_library", lambda _: fake_library("tensorrt 8.6.1"))
    said = []
    info = worker.build_here(cut, said.append)
    assert info["pieces"] == 1
    assert no_pieces[-1] == "engine.plan"
    assert [word["warn"] for word in said if "warn" in word] == [
        "the engine failed in pieces (no kernel fits): building it in one, which takes more of the GPU's memory"
    ]
    assert [path.name for path in cut.folder.glob("engine.plan*")] == ["engine.plan"]


def test_the_build_makes_a_plan_of_each_piece(cut, monkeypatch):
    """As 8.6 would be asked to, with the real builder of TensorRT for RTX, as that needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(trt_api, "open_library", OPEN_LIBRARY)
    monkeypatch.setattr(trt_api, "splits_norms", lambda spec: True)  # which it gains nothing by
    request = replace(cut, spec=spec_of(backend="tensorrt-rtx", compute_capability=(8, 9)))
    said = []
    found = worker.build_here(request, said.append)
    pieces = read_pieces(request.plan, request.contract)
    assert found["pieces"] == len(pieces) == len(found["piece_seconds"]) == 2
    assert [cut.result for piece in pieces for cut in piece.cuts] == [LARGEST]
    assert found["plan_bytes"] == sum(piece.plan.stat().st_size for piece in pieces)
    assert found["precision"]["layers"]["fp16"] > 0
    assert not any("pieces" in message.get("warn", "") for message in said)
    assert {path.name for path in request.folder.iterdir()} == {
        "build.log", "engine.plan", "engine.plan.1", "engine.plan.json"
    }  # fmt: skip


@pytest.mark.slow
def test_of_stable_diffusion_1_5_at_512_it_is_the_first_norm_at_full_size(exported, tmp_path, monkeypatch):
    weakly_typed(monkeypatch, True)
    path, contract = exported(**SD15)
    spec = spec_of(profiles=(Profile.of(Sizes(1, 512, 512)),))
    sources = worker._sources(Request(path, tmp_path, contract, spec, None, False), tmp_path, [].append)
    assert len(sources) == 2
    (norm,) = sources[0].piece.cuts
    assert (norm.result, norm.groups) == (LARGEST, 32)
    assert [spec.dims for spec in sources[0].piece.contract.outputs] == [(1, 256, 512, 512)]


FAR = [(0, 1), (0.5, 1e-3), (40, 0.1), (1000, 1), (40000, 30)]  # means, and deviations from them


@pytest.mark.parametrize(("mean", "deviation"), FAR)
def test_normalising_is_as_good_as_pytorchs_own(mean, deviation):
    """Also far from zero, where the variance is a small difference of large numbers, and where nothing varies."""
    given = mean + deviation * torch.randn(2, 32, 24, 20, generator=torch.Generator().manual_seed(0))
    given[:, :4] = 7
    norm, given = Normalization("x", "y", 8, 1e-6), given.half()
    out = torch.empty_like(given)
    assert normalize(norm, given, out) is out
    expected = torch.nn.functional.group_norm(given.double(), 8, eps=1e-6)
    assert relative_l2(out.double().numpy(), expected.numpy()) < 5e-4
    assert (out[:, :4] == 0).all()


def test_what_is_far_from_the_mean_does_not_overflow():
    """65504 is the largest number in fp16: from 20000 to -60000 it is further, though each of them is one."""
    given = torch.full((1, 4, 64, 64), 20000.0).half()
    given[0, 0, 0, :5] = -60000
    out = normalize(Normalization("x", "y", 1, 1e-6), given, torch.empty_like(given))
    expected = torch.nn.functional.group_norm(given.double(), 1, eps=1e-6)
    assert relative_l2(out.double().numpy(), expected.numpy()) < 5e-4

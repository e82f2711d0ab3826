"""Cutting a VAE's halves at their large group normalisations (`group_norms`), which are PyTorch's then."""

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

from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.plan import list_file
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt86 import cut as cutting
from sdtrt.backends.tensorrt86 import policy, worker
from sdtrt.backends.tensorrt86.cut import choose_norms, freeze, split
from sdtrt.backends.tensorrt86.group_norms import check, find_normalizations, sizes_of_norms
from sdtrt.backends.tensorrt86.memory_layout import lay_out, size_bytes
from sdtrt.backends.tensorrt86.pieces import Normalization, read_pieces, write_pieces
from sdtrt.backends.tensorrt86.torch_kernels import compute, normalize
from sdtrt.common.metrics import relative_l2
from sdtrt.exports import onnx_file
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range, Sizes
from sdtrt.specs.contract import vae_contract

SIZES = Sizes(2, 64, 96)
LARGEST = "/decoder/up_blocks.3/resnets.0/norm1/Reshape_1_output_0"  # 16 channels of all pixels; the next 6 have 8
OPEN_LIBRARY = libraries.open_library
SD15 = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports of halves of small VAEs: component and configuration → file, contract."""
    made = {}

    def export(component="vae_decoder", **config):
        key = component + json.dumps(config)
        if key not in made:
            vae = trained(small_vae(**config)).half()
            contract = vae_contract(dict(vae.config), "fp16", component)
            path = tmp_path_factory.mktemp(component) / "model.onnx"
            write_onnx(vae, contract, path)
            made[key] = path, contract
        return made[key]

    return export


def frozen(path, contract, sizes=SIZES):
    model, weights = onnx_file.load_split(path)
    freeze(model, weights, contract.input_shapes(sizes))
    return model, weights, GraphIndex(model, weights)


def spec_of(component="vae_decoder", **changes):
    export = ExportSpec(component=component)
    return BuildSpec(**{"export": export, "backend": "tensorrt", "profiles": (Profile.of(SIZES),)} | changes)


@pytest.fixture
def request_of(exported, tmp_path, monkeypatch):
    """Requests for engines of a VAE's halves on 8.6, small as they are."""
    monkeypatch.setattr(cutting, "NORM_BYTES", 1)
    weakly_typed(monkeypatch, True)
    return lambda component: Request(
        *exported(component)[:1], tmp_path, exported(component)[1], spec_of(component), None, False
    )


@pytest.fixture
def cut(request_of):
    """A request for a decoder's engine."""
    return request_of("vae_decoder")


def pieces_of(sources):
    return [source.piece for source in sources]


def norms_of(sources):
    return [norm for piece in pieces_of(sources) for norm in piece.cuts]


def run_as_sessions_do(sources, contract, feeds):
    """ONNX Runtime and PyTorch in turn, on tensors that lie where `lay_out` says; each plan spoils what it works in."""
    pieces, own = pieces_of(sources), [spec.name for spec in contract.outputs]
    work = [1000 * (5 + number % 3) for number in range(len(pieces))]
    layout = lay_out(pieces, own, work)
    block = torch.empty(layout.size, dtype=torch.uint8)
    tensors = dict(feeds)
    for name, (offset, spec) in layout.places.items():
        tensors[name] = block[offset : offset + size_bytes(spec)].view(torch.float16).view(spec.shape({}))
    for source, offset, size in zip(sources, layout.work_offsets, work, strict=True):
        block[offset : offset + size] = 0xFF  # NaN in fp16
        with OnnxRuntimeSession(source.onnx, source.piece.contract, optimized=False) as session:
            found = session.run({name: tensors[name] for name in source.piece.inputs})
        block[offset : offset + size] = 0xFF
        for name, tensor in found.items():
            tensors.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        for norm in source.piece.cuts:
            assert compute(norm, tensors) is tensors[norm.result]
    return tensors


@pytest.mark.parametrize(("component", "count"), [("vae_decoder", 13), ("vae_encoder", 7)])
def test_the_pieces_are_the_whole(component, count, request_of, tmp_path):
    said, request = [], request_of(component)
    sources = worker._sources(request, tmp_path, said.append)
    assert said == []
    assert all((norm.groups, norm.epsilon) == (8, pytest.approx(1e-6)) for norm in norms_of(sources))
    assert [len(piece.cuts) for piece in pieces_of(sources)] == [1] * count + [0]
    assert not any(piece.is_of_conditioning for piece in pieces_of(sources))
    feeds = seeded_feeds(request.contract, SIZES)
    with OnnxRuntimeSession(request.onnx, request.contract, optimized=False) as session:
        expected = session.run(feeds)
    found = run_as_sessions_do(sources, request.contract, feeds)
    for name, tensor in expected.items():
        assert relative_l2(found[name].float().numpy(), tensor.float().numpy()) < 5e-3


def test_of_a_decoder_those_of_the_two_upper_resolutions_are_cut(cut, tmp_path):
    sources = worker._sources(cut, tmp_path, [].append)
    facts = frozen(cut.onnx, cut.contract)[2]
    names = [norm.result.removesuffix("/Reshape_1_output_0") for norm in norms_of(sources)]
    block = [f"resnets.{number}/norm{which}" for number in range(3) for which in (1, 2)]
    upper = [f"/decoder/up_blocks.{level}/{name}" for level in (2, 3) for name in block]
    assert names == [*upper, "/decoder/conv_norm_out"]
    largest = max(sizes_of_norms(facts))
    cut_at = [facts.bytes_of(norm.source) / largest for norm in norms_of(sources)]
    assert cut_at == [0.25] * 6 + [1] + [0.5] * 6
    left = sum(operators_of(source.onnx).count("InstanceNormalization") for source in sources)
    assert left == operators_of(cut.onnx).count("InstanceNormalization") - 13


def test_what_is_added_around_a_resnet_crosses_as_small_as_it_gets(cut, tmp_path):
    """In place of what is normalised, what its shortcut makes of it: half the channels. So the norm has its place."""
    pieces = pieces_of(worker._sources(cut, tmp_path, [].append))
    (number,) = (number for number, piece in enumerate(pieces) if LARGEST in [norm.result for norm in piece.cuts])
    (norm,) = pieces[number].cuts
    upsampled, shortcut = sorted(pieces[number].contract.outputs, key=size_bytes, reverse=True)
    assert upsampled.name == norm.source
    assert size_bytes(shortcut) * 2 == size_bytes(upsampled)
    assert not any(norm.source in piece.inputs for piece in pieces)
    layout = lay_out(pieces, ["image"], [0] * len(pieces))
    assert layout.places[norm.source][0] == layout.places[norm.result][0]
    assert layout.size == 2 * size_bytes(upsampled)  # with the piece before: its upsampled image, and what that is of


def test_scale_and_shift_stay_in_the_next_piece(cut, tmp_path):
    sources = worker._sources(cut, tmp_path, [].append)
    for norm, after in zip(norms_of(sources), sources[1:], strict=True):
        model, _ = onnx_file.load_split(after.onnx)
        (taker,) = (node for node in model.graph.node if norm.result in node.input)
        assert taker.op_type == "Mul"


def operators_of(path):
    return [node.op_type for node in onnx_file.load_split(path)[0].graph.node]


def test_the_list_of_the_pieces_is_read_as_it_was_written(cut, tmp_path):
    pieces = [source.piece for source in worker._sources(cut, tmp_path, [].append)]
    write_pieces(cut.plan, pieces)
    assert list(read_pieces(cut.plan, cut.contract)) == pieces
    assert json.loads(list_file(cut.plan).read_text())[0]["normalizations"][0]["groups"] == 8


@pytest.mark.parametrize(
    ("config", "least", "count"),
    [
        ({}, 1 / 4, 13),  # half of what 13 have; the largest is one by itself, of twice as much
        ({"block_out_channels": (16, 16, 16, 16)}, 1, 7),  # those of the next resolution hold a quarter
        ({"block_out_channels": (16, 16, 16, 16), "layers_per_block": 7}, None, 0),  # 17 are the largest
        ({"layers_per_block": 4}, 1 / 2, 11),  # of 10 more a quarter, which would be too many
    ],
)
def test_all_of_a_size_are_cut_from_half_of_the_second_largest_on(exported, monkeypatch, config, least, count):
    monkeypatch.setattr(cutting, "NORM_BYTES", 1)
    facts = frozen(*exported(**config))[2]
    largest, chosen = max(sizes_of_norms(facts)), choose_norms(facts)
    assert len(chosen) == count
    if chosen:
        assert min(facts.bytes_of(norm.source) for norm in chosen) == least * largest
        assert len([size for size in sizes_of_norms(facts) if size >= least * largest]) == count


@pytest.mark.parametrize(("most", "count"), [(13, 13), (12, 7), (7, 7), (6, 1)])
def test_there_are_only_so_many(cut, monkeypatch, most, count):
    """One is the largest, six are of half its size, and six more of a quarter: of each size all or none."""
    facts = frozen(cut.onnx, cut.contract)[2]
    monkeypatch.setattr(cutting, "MOST_NORMS", most)
    assert len(choose_norms(facts)) == count


def test_where_one_of_them_is_of_another_form_none_is_cut(cut, monkeypatch):
    model, weights, facts = frozen(cut.onnx, cut.contract)
    assert len(choose_norms(facts)) == 13
    join = next(node for node in model.graph.node if node.output[0].startswith("/decoder/conv_norm_out/Reshape_1"))
    join.op_type = "Identity"
    del join.input[1]
    assert choose_norms(GraphIndex(model, weights)) == []


def test_what_holds_few_megabytes_is_not_worth_a_cut(cut, tmp_path, monkeypatch):
    facts = frozen(cut.onnx, cut.contract)[2]
    size = 2 * 16 * 64 * 96 * 2
    for least, count in ((size // 4, 13), (size // 4 + 1, 7), (size // 2 + 1, 1), (size, 1), (size + 1, 0)):
        monkeypatch.setattr(cutting, "NORM_BYTES", least)
        assert len(choose_norms(facts)) == count
    said = []
    (source,) = worker._sources(cut, tmp_path, said.append)
    assert source.onnx == cut.onnx
    assert said == []


def test_who_leaves_a_norm_to_pytorch(monkeypatch):
    """Halves of a VAE on 8.6, for one fixed size in fp16; not where the plan is to be version-compatible."""
    weakly_typed(monkeypatch, True)
    assert policy.splits_norms(spec_of())
    assert policy.splits_norms(spec_of("vae_encoder"))
    assert not policy.splits_norms(spec_of(split_attention=0))  # nothing is to be left to PyTorch
    ranged = Profile(Range.of(1), Range(64, 96, 128), Range(64, 96, 128))
    for other in (
        {"version_compatible": True},
        {"backend": "tensorrt-rtx"},
        {"profiles": (Profile.of(SIZES),) * 2},
        {"profiles": (ranged,)},
        {"export": ExportSpec(component="vae_decoder", precision="fp32")},
        {"export": ExportSpec(component="text_encoder")},
        {"export": ExportSpec(component="unet")},
    ):
        assert not policy.splits_norms(spec_of(**other)), other
    weakly_typed(monkeypatch, False)
    assert not policy.splits_norms(spec_of())


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
    facts = GraphIndex(model, weights)
    with pytest.raises(ValueError, match="is not what the graph computes"):
        split(model, weights, facts, choose_norms(facts))
    model, weights = onnx_file.load_split(cut.onnx)
    change_scale(model)
    onnx_file.save(model, weights, tmp_path / "other.onnx")
    said = []
    (source,) = worker._sources(replace(cut, onnx=tmp_path / "other.onnx"), tmp_path, said.append)
    assert source.onnx == tmp_path / "other.onnx"
    assert "group normalisations are left to TensorRT, which takes more of the GPU's memory" in said[0]["warn"]


def test_where_the_pieces_fail_the_decoder_is_built_whole(cut, no_pieces, monkeypatch):  # noqa: F811
    monkeypatch.setattr(libraries, "open_library", lambda _: fake_library("tensorrt 8.6.1"))
    said = []
    info = worker.build_here(cut, said.append)
    assert info["pieces"] == 1
    assert no_pieces[-1] == "engine.plan"
    assert [word["warn"] for word in said if "warn" in word] == [
        "the engine failed in pieces (no kernel fits): building it in one, which takes more of the GPU's memory"
    ]
    assert [path.name for path in cut.folder.glob("engine.plan*")] == ["engine.plan"]


@pytest.mark.slow
@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_the_build_makes_a_plan_of_each_piece(component, request_of, monkeypatch):
    """As 8.6 would be asked to, with the real builder of TensorRT for RTX, as that needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(libraries, "open_library", OPEN_LIBRARY)
    monkeypatch.setattr(policy, "splits_norms", lambda spec: True)  # which it gains nothing by
    spec = spec_of(component, backend="tensorrt-rtx", compute_capability=(8, 9))
    request = replace(request_of(component), spec=spec)
    said = []
    found = worker.build_here(request, said.append)
    pieces = read_pieces(request.plan, request.contract)
    count = {"vae_decoder": 14, "vae_encoder": 8}[component]
    assert found["pieces"] == len(pieces) == len(found["piece_seconds"]) == count
    assert sum(len(piece.cuts) for piece in pieces) == count - 1
    assert found["plan_bytes"] == sum(piece.plan.stat().st_size for piece in pieces)
    assert found["precision"]["layers"]["fp16"] > 0
    assert not any("pieces" in message.get("warn", "") for message in said)
    plans = ["engine.plan", *(f"engine.plan.{number}" for number in range(1, count))]
    assert {path.name for path in request.folder.iterdir()} == {"build.log", "engine.plan.json", *plans}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "count", "crossing"), [("vae_decoder", 13, 256), ("vae_encoder", 7, 208)], ids=["decoder", "encoder"]
)
def test_what_crosses_of_stable_diffusion_1_5_at_512(component, count, crossing, exported, tmp_path, monkeypatch):
    weakly_typed(monkeypatch, True)
    path, contract = exported(component, **SD15)
    spec = spec_of(component, profiles=(Profile.of(Sizes(1, 512, 512)),))
    sources = worker._sources(Request(path, tmp_path, contract, spec, None, False), tmp_path, [].append)
    assert len(sources) == count + 1
    assert len(norms_of(sources)) == count
    assert {norm.groups for norm in norms_of(sources)} == {32}
    pieces, own = pieces_of(sources), [spec.name for spec in contract.outputs]
    assert lay_out(pieces, own, [0] * len(pieces)).size == crossing * 2**20


FAR = [(0, 1), (0.5, 1e-3), (40, 0.1), (1000, 1), (40000, 30)]  # means, and deviations from them


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("mean", "deviation"), FAR)
def test_normalising_is_as_good_as_pytorchs_own(mean, deviation, in_place):
    """Also far from zero, where the variance is a small difference of large numbers, and where nothing varies."""
    given = mean + deviation * torch.randn(2, 32, 24, 20, generator=torch.Generator().manual_seed(0))
    given[:, :4] = 7
    norm, given = Normalization("x", "y", 8, 1e-6), given.half()
    expected = torch.nn.functional.group_norm(given.double(), 8, eps=1e-6)
    out = given.view(given.shape) if in_place else torch.empty_like(given)
    assert normalize(norm, given, out) is out
    assert relative_l2(out.double().numpy(), expected.numpy()) < 5e-4
    assert (out[:, :4] == 0).all()


def test_what_is_far_from_the_mean_does_not_overflow():
    """65504 is the largest number in fp16: from 20000 to -60000 it is further, though each of them is one."""
    given = torch.full((1, 4, 64, 64), 20000.0).half()
    given[0, 0, 0, :5] = -60000
    out = normalize(Normalization("x", "y", 1, 1e-6), given, torch.empty_like(given))
    expected = torch.nn.functional.group_norm(given.double(), 1, eps=1e-6)
    assert relative_l2(out.double().numpy(), expected.numpy()) < 5e-4

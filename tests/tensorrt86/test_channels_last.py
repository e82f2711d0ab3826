"""`build --channels-last`: what TensorRT's plans give to each other lies channels last, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from factories import checked_spec, small_unet, small_vae
from onnx import TensorProto, helper, numpy_helper
from piece_fakes import three_pieces, two_pieces
from test_splitting import no_pieces  # noqa: F401  # a fixture
from trt_fakes import fake_library, recorder

from sdtrt.backends import build as engine_build
from sdtrt.backends import registry
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import building, libraries, weak_typing
from sdtrt.backends.tensorrt.versions.network import Draft
from sdtrt.backends.tensorrt86 import cut as cutting
from sdtrt.backends.tensorrt86 import parallel_build, policy, worker
from sdtrt.backends.tensorrt86.build import PieceRequest
from sdtrt.backends.tensorrt86.pieces import Piece
from sdtrt.common.errors import BuildError, UsageError
from sdtrt.exports.component import write_onnx
from sdtrt.exports.onnx_file import ELEM_TYPES
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range, Sizes
from sdtrt.specs.contract import Attention, Contract, TensorSpec, unet_contract, vae_contract

SIZES = Sizes(2, 64, 96)
OPEN_LIBRARY = libraries.open_library
STATIC = (Profile.of(SIZES),)
CUT_TOKENS = 90


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A UNet's export: 16 and 32 channels, three self-attentions over 96 tokens."""
    module = small_unet("sd1", layers_per_block=1).half()
    contract = unet_contract(dict(module.config), "fp16")
    path = tmp_path_factory.mktemp("unet") / "model.onnx"
    write_onnx(module, contract, path)
    return path, contract


@pytest.fixture
def asked(unet, tmp_path):
    """A request for it in pieces, channels last."""
    spec = BuildSpec(ExportSpec(), "tensorrt", STATIC, split_attention=CUT_TOKENS, channels_last=True)
    return Request(*_at(unet, tmp_path), spec, None, False)


def _at(exported, folder):
    return exported[0], folder, exported[1]


def crossing(sources):
    """By name, what one plan makes and another one takes: the shape, and whether PyTorch's attention takes it."""
    pieces = [source.piece for source in sources]
    taken = {name for piece in pieces for name in piece.inputs}
    cut = {name for piece in pieces for one in piece.cuts for name in one.sources}
    made = [spec for piece in pieces if not piece.is_of_conditioning for spec in piece.contract.outputs]
    return {spec.name: (spec.shape({}), spec.name in cut) for spec in made if spec.name in taken}


# ---------------------------------------------------------------------------------------------------- which tensors


def test_images_that_cross_between_a_unets_plans_and_nothing_else(asked, tmp_path):
    sources = worker._sources(asked, tmp_path, [].append)
    found = cutting.channels_last([source.piece for source in sources], asked.contract)
    images = {name for name, (shape, _) in crossing(sources).items() if len(shape) == 4 and shape[1] % 8 == 0}
    assert found == images
    assert len(found) > 3
    assert len(crossing(sources)) > len(found)  # residuals of tokens, the timestep's embedding
    assert sources[0].piece.is_of_conditioning
    assert not found & set(sources[0].piece.tensors)


def test_what_is_normalised_between_a_vaes_plans_is_pytorchs_and_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda _: fake_library("tensorrt 8.6.1"))
    monkeypatch.setattr(cutting, "NORM_BYTES", 1)
    vae = small_vae().half()
    contract = vae_contract(dict(vae.config), "fp16", "vae_decoder")
    write_onnx(vae, contract, tmp_path / "model.onnx")
    spec = BuildSpec(ExportSpec(component="vae_decoder"), "tensorrt", STATIC, channels_last=True)
    sources = worker._sources(Request(tmp_path / "model.onnx", tmp_path, contract, spec, None, False), tmp_path, print)
    pieces = [source.piece for source in sources]
    found = cutting.channels_last(pieces, contract)
    cuts = [cut for piece in pieces for cut in piece.cuts]
    assert len(cuts) > 5
    assert not found & {name for cut in cuts for name in (cut.source, cut.result)}
    direct = {name for name, (_, is_cut) in crossing(sources).items() if not is_cut}
    assert found == direct != set()  # residuals
    assert set(crossing(sources)) - direct  # some that are normalised are residuals, too


def image(name, *dims, dtype="float16"):
    return TensorSpec(name, dtype, dims)


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        (image("x", 2, 8, 4, 4), True),
        (image("x", 2, 320, 64, 64), True),
        (image("x", 2, 12, 4, 4), False),  # would be padded to 16: more bytes than `memory_layout` counts
        (image("x", 2, 8, 4, 4, dtype="float32"), False),
        (image("x", 2, 8, 16), False),
        (image("x", "batch", 8, 4, 4), False),
    ],
)
def test_only_images_in_fp16_that_need_no_padding(spec, fits):
    end = image("out", 2, 8, 4, 4)
    contract = Contract("unet", "fp16", (image("in", 2, 8, 4, 4),), (end,))
    first = Piece(None, Contract("unet", "fp16", contract.inputs, (spec,)))
    second = Piece(None, Contract("unet", "fp16", (spec,), (end,)))
    assert cutting.channels_last([first, second], contract) == ({"x"} if fits else set())
    assert cutting.channels_last([Piece(None, contract)], contract) == set()


def test_what_someone_else_looks_into_stays_as_it_is():
    """The engine's own output that a plan takes as well, the source of a cut, and what nobody takes."""
    names = ("plain", "end", "source", "idle")
    specs = {name: image(name, 2, 8, 4, 4) for name in names}
    contract = Contract("unet", "fp16", (image("in", 2, 8, 4, 4),), (specs["end"],))
    cut = Attention(("source",), "result", 2, 4, 1.0)
    first = Piece(None, Contract("unet", "fp16", contract.inputs, tuple(specs.values())), (cut,))
    taken = tuple(specs[name] for name in ("plain", "end", "source"))
    second = Piece(None, Contract("unet", "fp16", (*taken, image("result", 2, 8, 4, 4)), ()))
    assert cutting.channels_last([first, second], contract) == {"plain"}


def test_what_is_made_of_the_text_alone_stays_as_it_is():
    """It runs once for a text, and what it gives is kept in memory of its own."""
    text, kept, end = image("encoder_hidden_states", 2, 8, 4, 4), image("kept", 2, 8, 4, 4), image("out", 2, 8, 4, 4)
    contract = Contract("unet", "fp16", (text, image("in", 2, 8, 4, 4)), (end,))
    first = Piece(None, Contract("unet", "fp16", (text,), (kept,)))
    second = Piece(None, Contract("unet", "fp16", (contract.inputs[1], kept), (end,)))
    assert cutting.channels_last([first, second], contract) == set()


def test_tensors_of_few_channels_stay_as_they_are(tmp_path):
    """Those of the stand-in engines have 4."""
    for pieces in (two_pieces(tmp_path / "plan"), three_pieces(tmp_path / "plan")):
        assert cutting.channels_last(pieces, pieces[-1].contract) == set()


# --------------------------------------------------------------------------------------- what TensorRT 8.6 is asked


@pytest.fixture
def networks(monkeypatch):
    """A TensorRT 8.6 with its real names, in this process: file → name → format mask of its network's ends."""
    library, made = fake_library("tensorrt 8.6.1"), {}
    dtypes = {"float16": "HALF", "float32": "FLOAT"}
    names = {number: dtypes[name] for name, number in ELEM_TYPES.items() if name in dtypes}

    def parse(_, path):
        graph = onnx.load(path, load_external_data=False).graph

        def ends(values):
            types = ((value.name, names[value.type.tensor_type.elem_type]) for value in values)
            return [
                recorder(library.module, "ITensor", name=name, dtype=library.module.DataType[dtype])
                for name, dtype in types
            ]

        inputs, outputs = ends(graph.input), ends(graph.output)
        made[path.name] = inputs + outputs
        network = recorder(
            library.module,
            "INetworkDefinition",
            num_layers=0,
            num_inputs=len(inputs),
            num_outputs=len(outputs),
            get_input=lambda index: inputs[index],
            get_output=lambda index: outputs[index],
        )
        config = recorder(library.module, "IBuilderConfig", add_optimization_profile=lambda optimization: 0)
        makers = {
            "create_builder_config": lambda: config,
            "create_optimization_profile": lambda: recorder(library.module, "IOptimizationProfile"),
        }
        return Draft(library, recorder(library.module, "Builder", **makers), network, None)

    def run_here(request, report, **_):
        request.log.touch()
        sent = PieceRequest.from_json(json.loads(json.dumps(request.to_json())))
        return worker.build_piece_here(sent, report)

    monkeypatch.setattr(libraries, "open_library", lambda _: library)
    monkeypatch.setattr(building, "parse_onnx", parse)
    monkeypatch.setattr(building, "serialize", lambda draft, config: b"plan")
    monkeypatch.setattr(building, "timing_cache_bytes", lambda config, kept: b"")
    monkeypatch.setattr(parallel_build, "run_worker", run_here)
    monkeypatch.setattr(parallel_build, "most_jobs", lambda: 1)
    monkeypatch.setattr(worker, "check", lambda *_, **__: {})
    return made


def masks(networks):
    """File → name → what was set of formats."""
    return {
        file: {tensor.name: vars(tensor)["allowed_formats"] for tensor in tensors if "allowed_formats" in vars(tensor)}
        for file, tensors in networks.items()
    }


def test_who_gives_and_who_takes_such_a_tensor_are_told_the_same_and_nobody_else(asked, networks, tmp_path):
    sources = worker._sources(asked, tmp_path, [].append)
    wanted = cutting.channels_last([source.piece for source in sources], asked.contract)
    hwc8 = 1 << int(libraries.open_library("tensorrt").module.TensorFormat.HWC8)
    info = worker.build_here(asked, [].append)
    assert info["channels_last"] == len(wanted) > 3
    told = masks(networks)
    assert len(told) == info["pieces"] == len(sources) > 3
    for number, source in enumerate(sources):
        assert told[f"{number}.onnx"] == {name: hwc8 for name in source.piece.tensors if name in wanted}
    for name in wanted:
        assert sum(name in found for found in told.values()) >= 2


def test_by_default_no_format_is_asked_for(asked, networks):
    info = worker.build_here(replace(asked, spec=replace(asked.spec, channels_last=False)), [].append)
    assert info["pieces"] > 3
    assert "channels_last" not in info
    assert not any(masks(networks).values())


def test_where_nothing_can_be_the_build_says_so(asked, networks):
    """No attention is as large as that: one plan."""
    said = []
    info = worker.build_here(replace(asked, spec=replace(asked.spec, split_attention=1000)), said.append)
    assert (info["pieces"], info["channels_last"]) == (1, 0)
    assert any("nothing does" in word.get("warn", "") for word in said)
    assert not any(masks(networks).values())


def test_where_such_pieces_fail_the_hint_is_to_do_without(asked, no_pieces):  # noqa: F811
    spec = replace(asked.spec, split_attention=None)
    with pytest.raises(BuildError, match="no kernel fits") as caught:
        worker.build_here(replace(asked, spec=spec), [].append)
    assert "raise --workspace-gib" in caught.value.hint
    assert "sdtrt build --no-channels-last" in caught.value.hint
    assert no_pieces == []  # an engine in one piece is not what was asked for


def test_later_versions_have_no_pieces(asked, monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda _: fake_library("tensorrt 10.13.3.9"))
    with pytest.raises(BuildError, match="builds no engines in pieces") as caught:
        policy.check_library(replace(asked.spec, split_attention=None))
    assert "--channels-last" in caught.value.hint


# -------------------------------------------------------------------------------------------------- the real builder


@pytest.fixture
def rtx():
    pytest.importorskip("tensorrt_rtx")
    return OPEN_LIBRARY("tensorrt-rtx")


def write_convolutions(path, channels=16):
    """Two convolutions in fp16, from `x` to `y`."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.normal(size=(channels, channels, 3, 3)).astype(np.float16), f"w{number}")
        for number in range(2)
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["middle"], pads=[1] * 4),
        helper.make_node("Conv", ["middle", "w1"], ["y"], pads=[1] * 4),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, (2, channels, 32, 32)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_the_real_builder_takes_such_formats_on_inputs_and_outputs(rtx, tmp_path):
    write_convolutions(tmp_path / "model.onnx")
    spec = BuildSpec(ExportSpec(), "tensorrt-rtx", STATIC, compute_capability=(8, 9), optimization_level=0)
    shape = ((2, 16, 32, 32),) * 3
    plans = {}
    for names in ((), ("x", "y"), ("y",)):
        draft = building.parse_onnx(rtx, tmp_path / "model.onnx")
        weak_typing.lay_channels_last(draft, names)
        ends = {"x": draft.network.get_input(0), "y": draft.network.get_output(0)}
        only = 1 << int(rtx.module.TensorFormat.HWC8)
        assert {name: ends[name].allowed_formats == only for name in ends} == {name: name in names for name in ends}
        plans[names] = bytes(building.serialize(draft, building.configure(draft, spec, [{"x": shape}])))
    assert len(set(plans.values())) == 3


@pytest.mark.slow
def test_the_real_builder_takes_every_piece_of_a_unet(rtx, asked, tmp_path):
    """As 8.6 would be asked to, with TensorRT for RTX, as that needs no GPU."""
    spec = BuildSpec(ExportSpec(), "tensorrt-rtx", STATIC, compute_capability=(8, 9), optimization_level=0)
    sources = worker._sources(asked, tmp_path, [].append)
    wanted = cutting.channels_last([source.piece for source in sources], asked.contract)
    for number, source in enumerate(sources):
        names = tuple(name for name in source.piece.tensors if name in wanted)
        request = PieceRequest(source.onnx, tmp_path, source.piece.contract, spec, None, False, number, names)
        found = worker.build_piece_here(request, [].append)
        assert found["precision"]["layers"]["fp16"] > 0


# ------------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "onnxruntime", "profiles": ()},
        {"backend": "tensorrt-rtx"},
        {"profiles": STATIC * 2},
        {"profiles": (Profile(Range(1, 2, 4), Range.of(512), Range.of(512)),)},
        {"version_compatible": True},
        {"split_attention": 0},
        {"export": ExportSpec(precision="fp32")},
        {"export": ExportSpec(component="text_encoder")},
    ],
)
def test_what_is_never_in_pieces_is_never_channels_last(wrong):
    with pytest.raises(UsageError):
        checked_spec(
            **({"export": ExportSpec(), "backend": "tensorrt", "profiles": STATIC} | wrong), channels_last=True
        )


def test_the_option_is_for_those_parts_that_may_be_in_pieces():
    components = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    exports = [ExportSpec(component=name) for name in components]
    exports.append(ExportSpec(component="vae_decoder", precision="fp32"))  # as of SDXL
    plain, backend = BuildSpec(ExportSpec(), "tensorrt"), registry.get("tensorrt")
    asked = replace(plain, channels_last=True)
    specs = engine_build.engine_specs(asked, exports, backend, STATIC)
    assert [spec.channels_last for spec in specs] == [False, True, True, True, False]
    specs = engine_build.engine_specs(plain, exports, backend, STATIC)
    assert not any(spec.channels_last for spec in specs)
    with pytest.raises(UsageError, match="are in pieces"):
        engine_build.engine_specs(asked, exports[:1], backend, STATIC)


def test_both_kinds_fit_a_request_and_the_newer_one_is_taken(directory, monkeypatch):
    from factories import find_engine

    from sdtrt.common import host
    from sdtrt.models.resolve import resolve_model
    from sdtrt.specs import ModelSpec

    gpu = host.Gpu("Fake", (9, 0), 2**30)
    monkeypatch.setattr(host, "gpus", lambda: (gpu,))
    monkeypatch.setattr(libraries, "open_library", lambda _: fake_library("tensorrt 8.6.1"))
    model = resolve_model(ModelSpec("tiny"))
    spec = BuildSpec(ExportSpec(model.spec), "tensorrt", STATIC)
    last = replace(spec, channels_last=True)
    plain_key, last_key = (engine_build.engine_key(model, one, directory).to_json() for one in (spec, last))
    assert "channels_last" not in plain_key["options"]  # engines of before have the key that they had
    assert last_key["options"] == plain_key["options"] | {"channels_last": True}

    def obtain(key):
        return directory.obtain("engine", key, lambda folder: {})

    def find():
        return find_engine(model, "tensorrt", "fp16", SIZES, directory)

    plain = obtain(plain_key)
    assert find() == plain
    channels_last = obtain(last_key)
    assert find() == channels_last != plain


def test_a_plan_that_would_lay_out_what_it_does_not_have_is_a_bug(tmp_path, networks):
    write_convolutions(tmp_path / "model.onnx")
    draft = building.parse_onnx(libraries.open_library("tensorrt"), tmp_path / "model.onnx")
    with pytest.raises(AssertionError):
        weak_typing.lay_channels_last(draft, ("x", "z"))

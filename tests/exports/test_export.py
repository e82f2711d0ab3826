"""Export: the graph is the contract's, plain and reproducible; it is right at every size; bad input leaves nothing."""

from __future__ import annotations

import errno
import json
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import factories
import numpy as np
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from exports import DTYPES, EACH_BY_BOTH, EACH_EXPORTER, computing_in_fp32, exported_unet, make, module_of
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from sdtrt.common.console import Console
from sdtrt.common.errors import ExportError, OutputError, UsageError
from sdtrt.common.metrics import relative_l2
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.keys import export_key
from sdtrt.exports import component as component_export
from sdtrt.exports import fp16_recipe, onnx_file, tracing
from sdtrt.exports.component import export_component, write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.parity import TOLERANCES, check_onnx
from sdtrt.exports.to_file import export_file
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import DEFAULT_OPSETS, ExportSpec, ModelSpec, Sizes
from sdtrt.specs.contract import Contract, unet_contract

SMALLEST = factories.SMALLEST["sd1"]
FEW_SIZES = (Sizes(1, 128, 128), Sizes(5, 72, 104, tokens=154))


@pytest.fixture(scope="module")
def exported(shared):
    """Exports by kind, precision and exporter (`exports.exported_unet`)."""
    return partial(exported_unet, shared)


# --- right at every size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "exporter"), EACH_BY_BOTH)
def test_fp16_graph_computes_what_pytorch_does(exported, kind, exporter):
    it = exported(kind, "fp16", exporter)
    report = check_onnx(it.path, it.unet, it.contract)
    assert {check.sizes.batch for check in report.checks} == {1, 2, 5}
    assert any(check.sizes.tokens > 77 for check in report.checks)
    assert any(check.sizes.height % 64 and check.sizes.width % 64 for check in report.checks)
    assert report.worst.relative_l2 < 2e-3  # PyTorch's own fp16 is 1.5e-3 from fp32
    assert report.worst.cosine > 0.999995


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_other_precisions(exported, precision):
    it = exported("sd1", precision)
    report = check_onnx(it.path, it.unet, it.contract, FEW_SIZES)
    assert report.worst.relative_l2 < {"fp32": 1e-5, "bf16": 5e-4}[precision]


# 4 levels: the sides leave every remainder modulo 8, in both directions and in different pairs.
LATENTS = [(8, 9), (9, 16), (10, 15), (11, 12), (12, 33), (13, 13), (14, 10), (15, 64), (18, 8), (40, 20), (64, 64)]


def test_fp32_graph_is_right_at_every_remainder(exported):
    it = exported("sd1", "fp32")
    sizes = [Sizes(1 + i % 3, 8 * h, 8 * w, tokens=1 + 30 * i) for i, (h, w) in enumerate(LATENTS)]
    assert check_onnx(it.path, it.unet, it.contract, sizes).worst.relative_l2 < 5e-5


def test_a_graph_for_even_sizes_only_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "ALWAYS_FORWARD_SIZES", 0)  # the branch that upsamples by two, whatever the size
    monkeypatch.setattr(tracing, "TRACE_SIZES", {"batch": 2, "latent_height": 16, "latent_width": 24, "tokens": 7})
    it = make(tmp_path, precision="fp32", **SMALLEST)
    check_onnx(it.path, it.unet, it.contract, [Sizes(1, 128, 192)])
    with pytest.raises(ExportError):
        check_onnx(it.path, it.unet, it.contract, [Sizes(1, 136, 192)])


def test_a_wrong_graph_is_caught(tmp_path):
    it = make(tmp_path, precision="fp32", **SMALLEST)
    model = it.model
    tensor = next(t for t in model.graph.initializer if t.name == "unet.conv_in.weight")
    tensor.CopyFrom(numpy_helper.from_array(1.001 * numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    onnx.save(model, it.path)
    with pytest.raises(ExportError, match="off by") as caught:
        check_onnx(it.path, it.unet, it.contract, FEW_SIZES)
    assert "--exporter" in caught.value.hint


def test_fp16_overflow_is_said_so(tmp_path):
    unet = factories.small_unet("sd1", **SMALLEST)
    unet.conv_in.weight.mul_(6e4)  # finite in fp16, but the activations are not
    contract = unet_contract(unet.config, "fp16")
    torch.nn.Module.to(unet, torch.float16)
    path = tmp_path / "model.onnx"
    write_onnx(unet, contract, path)
    with pytest.raises(ExportError, match="infinite or NaN") as caught:
        check_onnx(path, unet, contract, FEW_SIZES)
    assert "--precision fp32" in caught.value.hint


def overflowing_unet():
    """A UNet of SD 2.1's kind whose self-attention leaves fp16: every token attends to itself, by far.

    Queries and keys are one scaled rotation of the (normalised) tokens, so |QKᵀ| is about 127 000, yet the softmax is
    so clear that the rounding of fp16 changes nothing.
    """
    unet = factories.small_unet("sd2", upcast_attention=True, **{**SMALLEST, "attention_head_dim": 1})
    generator = torch.Generator().manual_seed(0)
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            rotation = torch.nn.init.orthogonal_(torch.empty(module.to_q.weight.shape), generator=generator)
            module.to_q.weight.copy_(150 * rotation)
            module.to_k.weight.copy_(150 * rotation)
    return unet


@pytest.mark.parametrize(
    ("exporter", "upcast"),
    [("torchscript", False), ("torchscript", True), pytest.param("dynamo", True, marks=pytest.mark.slow)],
)
def test_attention_that_overflows_is_computed_in_fp32(tmp_path, monkeypatch, exporter, upcast):
    unet = overflowing_unet()
    contract = unet_contract(unet.config, "fp16")
    torch.nn.Module.to(unet, torch.float16)
    if not upcast:
        monkeypatch.setattr(tracing, "_overflows", lambda module: False)
    path = tmp_path / "model.onnx"
    write_onnx(unet, contract, path, exporter=exporter, opset=DEFAULT_OPSETS[exporter])
    feeds = {name: tensor.numpy() for name, tensor in seeded_feeds(contract, Sizes(2, 64, 72, tokens=8)).items()}
    with np.errstate(all="ignore"):
        # ONNX's own evaluator rounds each tensor to its type; ONNX Runtime keeps fp32 between fp16 nodes on a CPU.
        actual = ReferenceEvaluator(str(path)).run(None, feeds)[0]
    expected = tracing.UNetCall(unet.float())(*(torch.from_numpy(array).float() for array in feeds.values())).numpy()
    if not upcast:
        assert not np.isfinite(actual).all()
        return
    assert relative_l2(actual, expected) < TOLERANCES["fp16"]
    check_onnx(path, unet.half(), contract, FEW_SIZES)  # ONNX Runtime runs the graph with the casts in it, too


def test_checking_leaves_the_module_as_it_was(exported):
    it = exported()
    before = {name: value.clone() for name, value in it.unet.state_dict().items()}
    check_onnx(it.path, it.unet, it.contract, FEW_SIZES[:1])
    after = it.unet.state_dict()
    assert all(after[name].dtype == torch.float16 and torch.equal(value, after[name]) for name, value in before.items())


def test_inputs_of_the_check_are_those_of_a_denoising_loop(exported):
    inputs = seeded_feeds(exported("sdxl").contract, Sizes(5, 80, 96))
    assert inputs["timestep"].dtype == torch.float32
    assert (inputs["timestep"] % 1 != 0).any()
    assert inputs["timestep"].max() > 900
    assert inputs["time_ids"][0].tolist() == [80, 96, 0, 0, 80, 96]
    assert set(TOLERANCES) == set(DTYPES)


# --- the contract's, and plain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "exporter"), EACH_BY_BOTH)
def test_inputs_and_outputs_are_the_contracts(exported, kind, exporter):
    it = exported(kind, "fp16", exporter)
    for values, specs in ((it.model.graph.input, it.contract.inputs), (it.model.graph.output, it.contract.outputs)):
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            assert value.name == spec.name
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == np.dtype(spec.dtype)
            assert tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim) == spec.dims


def test_the_file_says_what_it_is(exported):
    it = exported("sdxl")
    said = {item.key: item.value for item in it.model.metadata_props}
    assert (said["sdtrt.component"], said["sdtrt.precision"]) == ("unet", "fp16")
    assert Contract.from_json(json.loads(said["sdtrt.contract"])) == it.contract
    assert [(entry.domain, entry.version) for entry in it.model.opset_import] == [("", 17)]


@pytest.mark.parametrize("exporter", EACH_EXPORTER)
def test_nothing_of_this_machine_is_in_the_file(exported, exporter):
    it = exported("sd1", "fp16", exporter)
    content = it.path.read_bytes()
    for trace in (b"site-packages", b".py", str(Path(torch.__file__).parent).encode(), str(it.path.parent).encode()):
        assert trace not in content
    items = (*it.model.graph.node, *it.model.graph.initializer, *it.model.graph.input, *it.model.graph.output)
    assert not any(item.doc_string or item.metadata_props for item in items)
    assert not it.model.graph.value_info


@pytest.mark.parametrize(("kind", "exporter"), EACH_BY_BOTH)
def test_the_graph_is_plain(exported, kind, exporter):
    it = exported(kind, "fp16", exporter)
    graph = it.model.graph
    operators = [node.op_type for node in graph.node]
    # The timestep's embedding is computed in fp32 and cast once; SDXL's added one likewise, with the pooled text. The
    # others are of the convolutions in fp32: their inputs and outputs, no weights.
    wide = [node for node in graph.node if node.op_type == "Conv" and node.input[1].endswith(".fp32")]
    around = {node.output[0] for node in wide} | {node.input[0] for node in wide}
    casts = [node for node in graph.node if node.op_type == "Cast" and not around & {node.input[0], node.output[0]}]
    assert len(casts) == (3 if kind == "sdxl" else 1)
    assert not {"Identity", "CastLike", "Sqrt", "SequenceAt", "SplitToSequence", "If", "Loop"} & set(operators)
    assert operators.count("Resize") == sum(1 for name, _ in it.unet.named_modules() if name.endswith("upsamplers.0"))
    parameters = dict(it.unet.named_parameters())
    stored = sum(len(tensor.raw_data) for tensor in graph.initializer)
    widened = sum(2 * module.weight.numel() for module in fp16_recipe.wide_convolutions(it.unet).values())
    assert stored <= sum(2 * value.numel() for value in parameters.values()) + widened + 4096
    suffixes = re.compile(r"\.(T|fp32)$")
    names = {suffixes.sub("", tensor.name.removeprefix("unet.")) for tensor in graph.initializer}
    assert {name for name, value in parameters.items() if value.dim() > 1} <= names


@pytest.mark.parametrize("exporter", EACH_EXPORTER)
def test_the_timestep_is_embedded_in_fp32(exported, exporter):
    """fp16 has 999 * 0.944 right to a quarter of a radian only. Builders that choose precisions are told so by name."""
    made = exported("sd1", exporter=exporter)
    operators = {node.name: node.op_type for node in made.model.graph.node}
    kept = computing_in_fp32(made.path)
    assert sorted(operators[name] for name in kept if operators[name] != "Conv") == ["Cos", "Mul", "Sin"]


@pytest.mark.parametrize("exporter", EACH_EXPORTER)
def test_convolutions_near_the_output_compute_in_fp32(exported, exporter):
    """Those and no others, on the fp16 weights as they are: TensorRT 8.6 adds up in fp16 otherwise."""
    made = exported("sd1", exporter=exporter)
    weights = {tensor.name: tensor for tensor in made.model.graph.initializer}
    kept = computing_in_fp32(made.path)
    wide = {node.input[1] for node in made.model.graph.node if node.op_type == "Conv" and node.name in kept}
    expected = fp16_recipe.wide_convolutions(made.unet)
    assert wide == {f"unet.{name}.weight.fp32" for name in expected}
    for name, module in expected.items():
        stored = numpy_helper.to_array(weights[f"unet.{name}.weight.fp32"])
        assert stored.dtype == np.float32
        assert np.array_equal(stored, module.weight.detach().float().numpy())


@pytest.mark.parametrize(("layers", "down"), [(1, []), (fp16_recipe.WIDE_LAYERS, [(0, 0)]), (5, [(0, 0), (1, 0)])])
def test_which_convolutions_compute_in_fp32(layers, down, monkeypatch):
    """Of a UNet with Stable Diffusion 1's blocks of two layers on the way down and three on the way up."""
    monkeypatch.setattr(fp16_recipe, "NARROW_CHANNELS", 0)
    unet = factories.small_unet("sd1", layers_per_block=2).half()
    names = {re.sub(r"\.(conv|proj)[^.]*$", "", name) for name in fp16_recipe.wide_convolutions(unet, layers)}
    last = len(unet.up_blocks) - 1
    up = [(last, 2), (last, 1), (last, 0), (last - 1, 2), (last - 1, 1)][:layers]
    assert {name for name in names if ".resnets." in name} == {
        *(f"up_blocks.{block}.resnets.{index}" for block, index in up),
        *(f"down_blocks.{block}.resnets.{index}" for block, index in down),
    }
    assert {"conv_in", "conv_out", f"up_blocks.{last}.attentions.2"} <= names
    assert [name for name in names if "samplers" in name] == ["down_blocks.0.downsamplers.0"] * (layers > 3)
    assert not [name for name in names if "mid_block" in name]
    assert not fp16_recipe.wide_convolutions(unet, 0)


def test_narrow_convolutions_all_compute_in_fp32():
    unet = factories.small_unet(
        "sd1", **factories.SMALL | {"block_out_channels": (64, 320), "layers_per_block": 1}
    ).half()
    wide = fp16_recipe.wide_convolutions(unet, 1)
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and max(module.in_channels, module.out_channels) < 320:
            assert name in wide
    assert not any("mid_block" in name for name in wide)


@pytest.mark.slow
def test_more_or_no_layers_in_fp32(tmp_path, exported, monkeypatch):
    monkeypatch.setattr(fp16_recipe, "NARROW_CHANNELS", 0)
    made = exported("sd1")
    counts = []
    for layers in (0, 1, 5):
        path = tmp_path / f"{layers}.onnx"
        write_onnx(made.unet, made.contract, path, wide_layers=layers)
        operators = {node.name: node.op_type for node in onnx.load(path).graph.node}
        counts.append(sum(operators[name] == "Conv" for name in computing_in_fp32(path)))
    assert counts[0] == 0 < counts[1] < counts[2]
    assert not fp16_recipe.wide_convolutions(exported("sd1", "bf16").unet)


@pytest.mark.parametrize(("kind", "exporter"), EACH_BY_BOTH)
def test_queries_and_keys_are_scaled_before_their_product(exported, kind, exporter):
    graph = exported(kind, "fp16", exporter).model.graph
    makers = {name: node for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    for softmax in softmaxes:
        product = makers[softmax.input[0]]
        assert product.op_type == "MatMul"
        assert [makers[name].op_type for name in product.input] == ["Mul", "Mul"]
        for name in product.input:
            scale = next(i for i in makers[name].input if i not in makers or makers[i].op_type == "Constant")
            assert scale


@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_exporting_twice_gives_the_same_bytes_and_says_nothing(tmp_path, exported, exporter, capfd):
    before = exported("sd1", "fp16", exporter)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = make(tmp_path, exporter=exporter, **(SMALLEST if exporter == "dynamo" else {}))
    assert factories.sha256_of(again.path) == factories.sha256_of(before.path)
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")


def test_large_weights_go_into_one_file_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT_BYTES", 2**20)
    it = make(tmp_path, **SMALLEST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert it.path.stat().st_size < 2**20
    graph = onnx.load(it.path, load_external_data=False).graph
    external = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
    assert {entry["location"] for entry in external} == {"model.onnx.data"}
    assert all(int(entry["offset"]) % 4096 == 0 for entry in external)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (it.path, tmp_path / "model.onnx.data"):
        path.rename(moved / path.name)
    check_onnx(moved / "model.onnx", it.unet, it.contract, FEW_SIZES)


def test_export_leaves_diffusers_and_the_module_as_they_were(exported):
    unet = exported().unet
    assert unet.num_upsamplers == 3
    assert not any("forward" in vars(module) for module in unet.modules())


def test_export_leaves_attention_as_it_was(tmp_path):
    it = make(tmp_path, "sd2", upcast_attention=True, **SMALLEST)
    processors = {type(module.processor).__name__ for module in it.unet.modules() if isinstance(module, Attention)}
    assert processors == {"AttnProcessor2_0"}


@pytest.mark.slow
def test_attention_is_upcast_only_where_the_model_asks_for_it_in_half_precision(tmp_path):
    def operators_of(precision, **asked):
        write_onnx(*module_of("sd2", precision, **asked, **SMALLEST), tmp_path / "narrow.onnx", wide_layers=0)
        return [node.op_type for node in onnx.load(tmp_path / "narrow.onnx").graph.node]

    operators = {"plain": operators_of("fp16")}
    for precision in ("fp16", "fp32"):
        operators[precision] = operators_of(precision, upcast_attention=True)
    casts = {name: found.count("Cast") for name, found in operators.items()}
    assert casts == {"plain": 1, "fp32": 0, "fp16": 1 + 3 * operators["fp16"].count("Softmax")}


# --- what can't be exported ------------------------------------------------------------------------------------------


def test_infinite_weights_are_named(tmp_path):
    unet = factories.small_unet("sd1", **SMALLEST)
    unet.conv_out.weight[0, 0, 0, 0] = 1e6
    torch.nn.Module.to(unet, torch.float16)
    with pytest.raises(ExportError, match=r"conv_out\.weight") as caught:
        write_onnx(unet, unet_contract(unet.config, "fp16"), tmp_path / "model.onnx")
    assert "--precision fp32" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("exporter", "other"),
    [("torchscript", "dynamo"), pytest.param("dynamo", "torchscript", marks=pytest.mark.slow)],
)
def test_a_failing_exporter_names_cause_and_other_exporter(tmp_path, exporter, other):
    unet = factories.small_unet("sd1", **SMALLEST)

    def broken(*args, **kwargs):
        raise RuntimeError("no such operator")

    unet.mid_block.forward = broken
    with pytest.raises(ExportError, match="no such operator") as caught:
        write_onnx(
            unet,
            unet_contract(unet.config, "fp32"),
            tmp_path / "m.onnx",
            exporter=exporter,
            opset=DEFAULT_OPSETS[exporter],
        )
    assert other in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    assert unet.num_upsamplers == 1


# --- entries and files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder whose UNet is the smallest that has everything."""
    folder = factories.sd1_folder(tmp_path_factory.mktemp("models") / "smallest", **SMALLEST)
    return resolve_model(ModelSpec(str(folder)))


@pytest.fixture
def spec(tiny_model):
    return ExportSpec(tiny_model.spec)


def test_an_entry_is_made_once(tmp_path, tiny_model, spec, monkeypatch):
    directory = EngineDirectory(tmp_path / "engines")
    entry = export_component(tiny_model, spec, directory)
    assert entry.kind == "onnx"
    assert list(entry.files) == ["model.onnx"]
    assert Contract.from_json(entry.info["contract"]) == unet_contract(tiny_model.config("unet"), "fp16")
    assert entry.info["parity"]["checks"][1]["sizes"] == {"batch": 2, "height": 72, "width": 104, "tokens": 77}
    assert entry.info["sha256"] == {"model.onnx": factories.sha256_of(entry.file("model.onnx"))}
    json.dumps(entry.info)
    monkeypatch.setattr(component_export, "write_onnx", None)  # a second export would fail
    assert export_component(tiny_model, spec, directory).path == entry.path


@pytest.mark.parametrize(
    "change", [{"precision": "fp32"}, {"exporter": "dynamo"}, {"opset": 16}], ids=lambda change: next(iter(change))
)
def test_what_changes_the_graph_changes_the_key(tmp_path, tiny_model, spec, change):
    digest = EngineDirectory(tmp_path).file_digest
    assert export_key(tiny_model, replace(spec, **change), digest) != export_key(tiny_model, spec, digest)


def test_the_key_goes_by_weights_not_by_name(tmp_path, tiny_model, spec):
    directory = EngineDirectory(tmp_path / "engines")
    keys = []
    for name, seed in (("same", 0), ("other", 1)):
        folder = factories.sd1_folder(tmp_path / name, seed=seed, **SMALLEST)
        keys.append(export_key(resolve_model(ModelSpec(str(folder))), spec, directory.file_digest))
    assert keys[0] == export_key(tiny_model, spec, directory.file_digest)
    assert keys[1] != keys[0]


def test_a_failed_check_publishes_nothing(tmp_path, tiny_model, spec, monkeypatch):
    def fail(*args, **kwargs):
        raise ExportError("off", hint="none")

    monkeypatch.setattr(component_export, "check_onnx", fail)
    directory = EngineDirectory(tmp_path / "engines")
    with pytest.raises(ExportError):
        export_component(tiny_model, spec, directory)
    assert directory.entries() == []
    with pytest.raises(ExportError):
        export_file(tiny_model, replace(spec, output=tmp_path / "out" / "unet.onnx"))
    assert list((tmp_path / "out").iterdir()) == []


def test_export_to_a_file(tmp_path, tiny_model, spec, monkeypatch, capfd):
    spec = replace(spec, output=tmp_path / "new" / "unet.onnx")
    assert export_file(tiny_model, spec, Console()) == spec.output
    assert [path.name for path in spec.output.parent.iterdir()] == ["unet.onnx"]
    onnx.checker.check_model(str(spec.output))
    out, err = capfd.readouterr()
    assert out == ""
    assert "exporting unet as fp16 ONNX" in err
    assert " s\n" in err  # elapsed times
    assert "relative L2" in err

    before = factories.sha256_of(spec.output)
    with pytest.raises(UsageError, match="exists") as caught:
        export_file(tiny_model, spec)
    assert "--overwrite" in caught.value.hint

    monkeypatch.setattr(onnx_file, "INLINE_LIMIT_BYTES", 0)
    export_file(tiny_model, replace(spec, overwrite=True))
    assert sorted(path.name for path in spec.output.parent.iterdir()) == ["unet.onnx", "unet.onnx.data"]
    monkeypatch.undo()
    export_file(tiny_model, replace(spec, overwrite=True))  # the data file of the one before goes with it
    assert [path.name for path in spec.output.parent.iterdir()] == ["unet.onnx"]
    assert factories.sha256_of(spec.output) == before


def test_a_full_disk_is_an_output_error(tmp_path, tiny_model, spec, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_file, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        export_file(tiny_model, replace(spec, output=tmp_path / "unet.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs_are_refused_before_any_work(tmp_path, tiny_model, spec, monkeypatch):
    monkeypatch.setattr(component_export, "load_component", None)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError) as caught:
        export_file(tiny_model, replace(spec, output=file / "unet.onnx"))
    assert "--output" in caught.value.hint
    for wrong in (tmp_path, tmp_path / "unet.pb"):
        with pytest.raises(UsageError, match=r"\.onnx file"):
            export_file(tiny_model, replace(spec, output=wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("wrong", "better"),
    [
        ("foo.txt", "foo.onnx"),
        ("new", "new/unet.onnx"),
        ("folder.onnx", "folder.onnx/unet.onnx"),
        ("file", "file.onnx"),
    ],
)
def test_the_hint_for_a_bad_output_is_one_that_works(wrong, better, tmp_path, tiny_model, spec):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"\.onnx file") as caught:
        export_file(tiny_model, replace(spec, output=tmp_path / wrong))
    assert caught.value.hint == f"use --output {tmp_path / better}"

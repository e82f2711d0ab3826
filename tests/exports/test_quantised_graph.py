"""ONNX graphs in 8 bits: what is written, what ONNX Runtime makes of it, what TensorRT builds of it, and the keys."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import partial

import exports
import factories
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from trt_fakes import fake_library

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine, engine_key
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.worker import build_here
from sdtrt.common import host
from sdtrt.common.console import QUIET
from sdtrt.common.errors import ExportError, UsageError
from sdtrt.engines.find import best_fit
from sdtrt.engines.keys import EngineKey, export_key
from sdtrt.exports import onnx_file
from sdtrt.exports.calibration import check_calibration, largest_inputs
from sdtrt.exports.component import write_onnx
from sdtrt.exports.onnx_run import open_model
from sdtrt.exports.parity import check_onnx, runnable
from sdtrt.exports.quantised import layers_to_quantise
from sdtrt.exports.quantised_graph import add_pairs
from sdtrt.models.components import contract_of, load_component
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.inspection import inspect_engine
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile, Sizes
from sdtrt.specs.calibration import KEPT, Calibration

BOTH = pytest.mark.parametrize("kind", ["int8", "fp8"])
ERRORS = {"int8": (0.004, 0.025), "fp8": (0.02, 0.06)}  # of a product of normal numbers
QUICK = Calibration(("a red circle on a blue background",), steps=2)
PROFILE = Profile.of(Sizes(2, 128, 128))
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed"
)


@pytest.fixture(scope="module")
def model():
    return resolve_model(ModelSpec("tiny"))


# ------------------------------------------------------------------------------------------------------------ pairs


def products(layers=("a", "b"), dtype=TensorProto.BFLOAT16):
    """A graph in which linear layers take one input: its nodes and its weights apart, as exports have them."""
    random = np.random.default_rng(0)
    sizes = np.array([0.01, 1, 1, 100])  # of a weight's outputs
    arrays = {f"unet.{name}.weight.T": random.normal(size=(64, 4)) * sizes for name in layers}
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}.out"], name=name) for name in arrays]
    outputs = [helper.make_tensor_value_info(f"{name}.out", dtype, [None, 4]) for name in arrays]
    tensors = [numpy_helper.from_array(one.astype(ml_dtypes.bfloat16), name) for name, one in arrays.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", dtype, [None, 64])], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    weights = {tensor.name: np.frombuffer(tensor.raw_data, np.uint8) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return model, weights


def computed(model, weights, path, x):
    """What ONNX Runtime makes of a bf16 graph, in fp32."""
    onnx_file.widen_bfloat16(model, weights)
    onnx_file.save(model, weights, path)
    return open_model(path, as_it_is=True).run(None, {"x": x})


@BOTH
def test_a_product_is_what_it_was_but_for_8_bits(kind, tmp_path):
    x = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    wanted = computed(*products(), tmp_path / "wide.onnx", x)
    model, weights = products()
    add_pairs(model, weights, dict.fromkeys("ab", float(np.abs(x).max())), kind)
    assert {data.nbytes for data in weights.values()} == {64 * 4}, "8 bits a number"
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 1, "one input, rounded once"
    assert kinds.index("QuantizeLinear") < kinds.index("MatMul")
    for found, right in zip(computed(model, weights, tmp_path / "narrow.onnx", x), wanted, strict=True):
        errors = np.linalg.norm(found - right, axis=0) / np.linalg.norm(right, axis=0)
        whole = np.linalg.norm(found - right) / np.linalg.norm(right)
        assert ERRORS[kind][0] < whole < ERRORS[kind][1]
        if kind == "int8":  # a scale an output: those of small weights lose no more than the others
            assert errors.max() < ERRORS[kind][1]


def test_what_is_larger_than_in_calibration_is_cut(tmp_path):
    model, weights = products(["a"])
    add_pairs(model, weights, {"a": 1.0}, "int8")
    at_most, beyond = (
        computed(*map_copy(model, weights), tmp_path / f"{value}.onnx", np.full((1, 64), value, np.float32))
        for value in (1.0, 50.0)
    )
    assert np.allclose(at_most[0], beyond[0], rtol=0.02)


def map_copy(model, weights):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy, dict(weights)


def test_a_layer_without_a_product_is_named():
    """It would stay in 16 bits without a word. One that the graph has not at all is of another program."""
    model, weights = products(["a", "b"])
    model.graph.node[1].op_type = "Gemm"
    with pytest.raises(ExportError, match="no product of b, which was to be in int8"):
        add_pairs(model, weights, {"a": 1.0, "b": 1.0}, "int8")
    with pytest.raises(ExportError, match="no product of c"):
        add_pairs(*products(["a"]), {"c": 1.0}, "int8")
    model, weights = products(["a"])
    add_pairs(model, weights, {"a": 1.0, "deeper": 1.0}, "int8")
    assert [node.op_type for node in model.graph.node][-1] == "MatMul"


# ------------------------------------------------------------------------------------------------------------- keys


def spec_of(model, precision="int8", calibration=QUICK, backend="tensorrt-rtx"):
    export = ExportSpec(model.spec, "unet", precision, calibration=calibration)
    return BuildSpec(export, backend, (PROFILE,), optimization_level=0, compute_capability=(8, 9))


def test_the_calibration_is_in_the_key_of_8_bits_and_in_no_other(model, directory):
    key = partial(export_key, model, digest=directory.file_digest)
    export = ExportSpec(model.spec, "unet", "int8")
    found = key(export).to_json()
    assert found["calibration"]["kept"] == list(KEPT)
    assert found["opset"] == 19
    for other in (Calibration(("a",)), Calibration(steps=3), Calibration(kept=("*.ff.*",))):
        assert key(replace(export, calibration=other)).to_json() != found
        plain = replace(export, precision="fp16")
        assert key(replace(plain, calibration=other)).to_json() == key(plain).to_json()
    assert "calibration" not in key(replace(export, precision="fp16")).to_json()


def test_other_prompts_are_the_same_weights_and_other_layers_are_not(model, directory):
    keys = [
        export_key(model, ExportSpec(model.spec, "unet", "int8", calibration=one), directory.file_digest)
        for one in (Calibration(), QUICK, Calibration(kept=("*.ff.*",)))
    ]
    assert [one.has_weights_of(keys[0]) for one in keys] == [True, True, False]
    assert not keys[0].has_weights_of(replace(keys[0], precision="fp8"))


@pytest.mark.parametrize(
    "damage", [{"steps": "5"}, {"steps": 0}, {"prompts": []}, {"prompts": [5]}, {"kept": [None]}, {"more": 1}]
)
def test_a_damaged_calibration_is_no_key(model, directory, damage, monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library("tensorrt_rtx 1.7.1.116"))
    data = json.loads(json.dumps(engine_key(model, spec_of(model), directory).to_json()))
    assert EngineKey.from_json(data).export.calibration == QUICK
    data["export"]["calibration"] |= damage
    with pytest.raises((UsageError, TypeError, ValueError)):
        EngineKey.from_json(data)


# ---------------------------------------------------------------------------------------------------------- refused


def test_fp8_is_refused_for_a_gpu_without_it(model, monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library("tensorrt_rtx 1.7.1.116"))
    backend = registry.get("tensorrt-rtx")
    backend.check(spec_of(model, "fp8"))
    backend.check(replace(spec_of(model, "int8"), compute_capability=(8, 6)))
    with pytest.raises(UsageError, match=r"compute capability 8\.9 or later, and 8\.6 is built for"):
        backend.check(replace(spec_of(model, "fp8"), compute_capability=(8, 6)))
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("NVIDIA A100", (8, 0), 2**36),))
    with pytest.raises(UsageError, match=r"8\.0 is built for"):
        backend.check(replace(spec_of(model, "fp8"), compute_capability=None))


def test_what_runs_beside_the_unet_is_in_fp16(model, monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library("tensorrt_rtx 1.7.1.116"))
    backend = registry.get("tensorrt-rtx")
    own = {name: backend.precision_of(model, name, "fp8") for name in ("unet", "text_encoder", "vae_decoder")}
    assert own == {"unet": "fp8", "text_encoder": "fp16", "vae_decoder": "fp16"}
    spec = spec_of(model)
    with pytest.raises(UsageError, match="text_encoder has no tensorrt-rtx engine in int8"):
        backend.check(replace(spec, export=replace(spec.export, component="text_encoder")))


def test_models_that_text_alone_makes_no_picture_of_are_refused(tmp_path, model):
    folder = factories.inpainting_folder(tmp_path / "inpaint", "sd1", **factories.SMALLEST["sd1"])
    check_calibration(model, ("controlnet",), "int8")
    with pytest.raises(UsageError, match="its UNet takes images beside the latents") as caught:
        check_calibration(resolve_model(ModelSpec(str(folder))), (), "int8")
    assert caught.value.hint.startswith("use --backend inductor --precision int8")
    with pytest.raises(UsageError, match="it has IP-Adapters"):
        check_calibration(model, ("ip_adapter:4",), "int8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("build", "--precision", "fp16"), "an engine in fp16 is not calibrated"),
        (("build", "--precision", "int8", "--backend", "inductor"), "and is not calibrated"),
        (("build", "--precision", "int8", "--component", "vae_decoder"), "only the UNet is calibrated"),
        (("export",), "a graph in fp16 is not calibrated"),
        (("export", "--precision", "int8", "--opset", "17"), "opset 17 has no int8"),
    ],
)
def test_prompts_that_nothing_is_calibrated_by_are_refused(run, tmp_path, arguments, words):
    more = () if "--opset" in arguments else ("--calibration-prompt", "a lighthouse")
    code, _, told = run(*arguments, *more, "--engine-dir", str(tmp_path))
    assert (code, words in told) == (2, True), told


# ------------------------------------------------------------------------------------------------------- real graphs


@needs_rtx
@pytest.mark.slow
@BOTH
def test_tensorrt_builds_what_onnx_runtime_runs(kind, tmp_path):
    """SDXL's kind, by a real TensorRT, without a GPU; scales of one seeded input, which is what is checked."""
    unet, _ = exports.module_of("sdxl", "bf16", **factories.SMALLEST["sdxl"])
    contract = replace(exports.module_of("sdxl", "bf16", **factories.SMALLEST["sdxl"])[1], precision=kind)
    layers = layers_to_quantise(unet, KEPT)
    largest = dict.fromkeys(layers, 5.0)
    path = tmp_path / "model.onnx"
    write_onnx(unet, contract, path, opset=19, largest=largest)
    report = check_onnx(path, unet, contract, [Sizes(2, 128, 128)])
    assert 0.001 < report.worst.relative_l2 < report.tolerance
    assert report.computed_in == "fp32"
    spec = replace(spec_of(resolve_model(ModelSpec("tiny")), kind), profiles=(PROFILE,))
    info = build_here(Request(path, tmp_path, contract, spec, None, False), lambda message: None)
    found = info["precision"]["layers"]
    assert found[kind] >= len(layers) // 3, "to_q, to_k and to_v take one input"
    assert found["bf16"] > 50
    assert info["plan_bytes"] > 100_000


@needs_rtx
@pytest.mark.slow
def test_an_engine_is_calibrated_built_and_found(model, directory):
    """The whole way, of the built-in model; a request without prompts of its own finds it, and its error is bounded."""
    entry = build_engine(model, spec_of(model), directory, QUIET)
    assert entry.info["precision"]["layers"]["int8"] > 20
    assert inspect_engine(entry).kept == KEPT
    there = directory.entries("engine")
    find = partial(best_fit, model, directory=directory, component="unet", entries=there, sizes=PROFILE.optimum)
    assert find(lambda key: True, "int8") == entry
    assert find(lambda key: True, "fp8") is None
    (onnx_entry,) = directory.entries("onnx")
    steps = list(real_steps(model, "a large yellow square on a green background"))
    with runnable(onnx_entry.file("model.onnx"), contract_of(model, "unet", "int8")) as (path, _):
        session = open_model(path, as_it_is=True)
        errors = []
        for feeds, wanted in steps:
            found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})[0]
            errors.append(float(np.linalg.norm(found - wanted.numpy()) / wanted.norm()))
    assert 0.001 < sum(errors) / len(errors) < 0.02


def real_steps(model, prompt, steps=5):
    """What the UNet gets in a picture's steps, and gives, in fp32."""
    unet, seen = load_component(model, "unet", torch.float32), []

    def note(_module, inputs, named, result):
        latents, timestep = inputs
        rows = timestep.float().expand(latents.shape[0]).contiguous()
        states = named["encoder_hidden_states"]
        seen.append(({"sample": latents, "timestep": rows, "encoder_hidden_states": states}, result[0]))

    with torch.inference_mode():
        unet.register_forward_hook(note, with_kwargs=True)
        assert largest_inputs(model, unet, ["mid_block.attentions.0.proj_in"], Calibration((prompt,), steps))
    return seen

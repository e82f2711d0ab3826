"""Engines in 8 bits, as far as nothing has to be compiled: what is rounded, what is asked for, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import factories
import pytest
import torch
from test_inductor import CPU, PROFILE, key_of, spec_of
from trt_fakes import fake_library

from sdtrt.backends import build as building
from sdtrt.backends import registry
from sdtrt.backends.inductor.build import KEPT
from sdtrt.backends.inductor.weights import CONSTANTS_FILE, Constant, Weights, read_constants, write_constants
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.exports.program import Recipe, export_program
from sdtrt.exports.quantised import LARGEST, QuantisedLinear, layers_to_quantise, quantise, quantised_rows
from sdtrt.models.components import components_of, contract_of, load_component
from sdtrt.models.resolve import resolve_model
from sdtrt.reports import doctor
from sdtrt.reports.inspection import inspect_engine
from sdtrt.specs import BuildRequest, BuildSpec, ExportSpec, GenerateSpec, ModelSpec, Thresholds, VerifySpec

BOTH = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
ERRORS = {torch.int8: 0.012, torch.float8_e4m3fn: 0.045}  # of a product of normal numbers: 0.008 and 0.037
H200 = host.Gpu("NVIDIA H200", (9, 0), 2**37)
A100 = host.Gpu("NVIDIA A100", (8, 0), 2**36)
T4 = host.Gpu("Tesla T4", (7, 5), 2**34)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return resolve_model(ModelSpec("tiny"))


# ------------------------------------------------------------------------------------------------------- arithmetic


@BOTH
def test_each_row_is_rounded_by_a_scale_of_its_own(dtype):
    """So that a row of large numbers costs another one nothing."""
    numbers = normal(3, 64) * torch.tensor([[1e-4], [1.0], [1e4]])
    rows, scales = quantised_rows(numbers, dtype)
    assert (rows.dtype, scales.dtype, scales.shape) == (dtype, torch.float32, (3, 1))
    assert torch.equal(rows.float().abs().amax(1), torch.full((3,), LARGEST[dtype]))
    errors = (rows.float() * scales - numbers).norm(dim=1) / numbers.norm(dim=1)
    assert errors.max() < ERRORS[dtype]
    assert errors.max() < 1.5 * errors.min()


@BOTH
def test_a_row_of_zeros_stays_one_and_what_is_not_finite_is_seen_in_its_scale(dtype):
    numbers = torch.zeros(3, 16)
    numbers[1, 3], numbers[2, 3] = torch.nan, torch.inf
    rows, scales = quantised_rows(numbers, dtype)
    assert not rows[0].float().any()
    assert scales.isfinite().flatten().tolist() == [True, False, False]


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_the_linear_one_does_but_for_8_bits(dtype, bias):
    linear = torch.nn.Linear(64, 32, bias=bias).bfloat16()
    states = normal(2, 40, 64).bfloat16()
    with torch.inference_mode():
        found, wanted = QuantisedLinear(linear, dtype)(states), linear.float()(states.float())
    assert (found.dtype, found.shape) == (torch.bfloat16, wanted.shape)
    assert 0.004 < float((found.float() - wanted).norm() / wanted.norm()) < ERRORS[dtype]


def test_candidates_are_the_linear_layers_of_transformers():
    """Not those of timesteps, of few rows, nor convolutions; and not what is kept."""
    unet = factories.small_unet("sdxl")
    found = layers_to_quantise(unet)
    assert found
    assert all(".attentions." in name and type(unet.get_submodule(name)) is torch.nn.Linear for name in found)
    assert not any("time_emb" in name or "add_embedding" in name for name in found)
    assert layers_to_quantise(unet, ["*.attn2.*", "*.proj_*"]) == [
        name for name in found if ".attn2." not in name and ".proj_" not in name
    ]
    quantise(unet, found, "int8")
    assert not layers_to_quantise(unet)


# --------------------------------------------------------------------------------------------------------- weights

SOURCES = ("a.to_q.weight", "a.to_k.weight", "a.to_v.weight")


def given(seed=1, dtype=torch.bfloat16):
    tensors = {name: normal(16, 32, seed=10 * seed + number).to(dtype) for number, name in enumerate(SOURCES)}
    return tensors | {"a.to_out.0.bias": normal(16, seed=seed).to(dtype)}


def constants(dtype):
    joined = torch.cat([given()[name] for name in SOURCES])
    rows, scales = quantised_rows(joined, dtype)
    bias = Constant.of("a.to_out.0.bias", given()["a.to_out.0.bias"], ("a.to_out.0.bias",))
    return (
        Constant.of("a.to_qkv.weight", rows, SOURCES).made_of("bfloat16", scales=False),
        Constant.of("a.to_qkv.weight_scale", scales, SOURCES).made_of("bfloat16", scales=True),
        bias,
    )


@BOTH
def test_weights_are_rounded_when_they_are_given_and_given_anew(dtype):
    """Into the same memory: a package, and a graph captured over it, have its address."""
    weights = Weights(constants(dtype), {}, CPU)
    places = {name: tensor.data_ptr() for name, tensor in weights.tensors.items()}
    for seed in (1, 2):
        weights.fill(given(seed))
        weights.check()
        rows, scales = quantised_rows(torch.cat([given(seed)[name] for name in SOURCES]), dtype)
        assert torch.equal(weights.tensors["a.to_qkv.weight"].view(torch.uint8), rows.view(torch.uint8))
        assert torch.equal(weights.tensors["a.to_qkv.weight_scale"], scales)
    one = {"a.to_k.weight": 3 * given(2)["a.to_k.weight"]}
    weights.follow(one, known=True)
    assert torch.equal(weights.tensors["a.to_qkv.weight_scale"][16:32], quantised_rows(*one.values(), dtype)[1])
    assert torch.equal(weights.tensors["a.to_qkv.weight_scale"][:16], scales[:16])
    assert {name: tensor.data_ptr() for name, tensor in weights.tensors.items()} == places
    assert set(weights.views()) == set(given())


@BOTH
def test_they_are_held_to_the_dtype_of_the_model_that_the_engine_is_of(dtype):
    weights = Weights(constants(dtype), {}, CPU)
    with pytest.raises(EngineError, match=r"to_k.weight: float32 \[16, 32\] instead of bfloat16 \[16, 32\]"):
        weights.fill(given() | {"a.to_k.weight": given()["a.to_k.weight"].float()})
    weights.fill(given())
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    exact = {name: tensor.float() * (1 + 2**-10) for name, tensor in given().items()}  # what bf16 does not tell
    weights.fill(exact, casts=True)
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), "16 bits are what is rounded"
    assert weights.are_finite()
    for value in (torch.nan, torch.inf):
        weights.fill(given() | {"a.to_k.weight": torch.full((16, 32), value, dtype=torch.bfloat16)})
        assert not weights.are_finite()


def test_sessions_of_one_model_share_them():
    one, other = (Weights(constants(torch.int8), {}, CPU) for _ in range(2))
    other.share(one)
    one.fill(given(3))
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor)
    other.fill(given(4))
    assert torch.equal(one.tensors["a.to_qkv.weight_scale"], other.tensors["a.to_qkv.weight_scale"])


@BOTH
def test_rows_in_8_bits_are_no_weights_of_an_engine_in_16(dtype):
    """They would be taken for whole numbers up to 127, without a word: their scales lie elsewhere."""
    eight = Weights(constants(dtype), {}, CPU)
    eight.fill(given())
    sixteen = Weights(tuple(Constant.of(name, tensor, (name,)) for name, tensor in given().items()), {}, CPU)
    with pytest.raises(EngineError, match="lies in 8 bits in the one engine") as caught:
        sixteen.follow(eight.views())
    assert "--force" in caught.value.hint


def test_a_list_of_constants_says_which_are_rounded_and_others_are_written_as_ever(tmp_path):
    write_constants(tmp_path, constants(torch.int8))
    assert read_constants(tmp_path / CONSTANTS_FILE) == constants(torch.int8)
    plain = json.loads((tmp_path / CONSTANTS_FILE).read_text())[2]
    assert set(plain) == {"name", "shape", "dtype", "strides", "device", "sources"}


# ---------------------------------------------------------------------------------------------------------- programs


@pytest.mark.slow
def test_a_programs_rows_and_scales_are_made_of_the_models_own_weights(model):
    contract = contract_of(model, "unet", "int8")
    module = load_component(model, "unet", torch.bfloat16)
    tensors = dict(module.state_dict())
    kept = ("*.attn2.to_kv",)
    program = export_program(module, contract, PROFILE, device=CPU, recipe=Recipe(quantised="int8", kept=kept))
    named = {name for names in program.sources.values() for name in names}
    assert named == set(tensors)
    assert program.rows
    assert not any("attn2.to_kv" in name for name in program.rows)
    for name in program.rows:
        joined = torch.cat([tensors[source] for source in program.sources[name]])
        rows, scales = quantised_rows(joined, torch.int8)
        assert torch.equal(program.weights[name], rows), name
        assert torch.equal(program.weights[f"{name}_scale"], scales), name
        assert f"{name}_scale" in program.scales


# -------------------------------------------------------------------------------------------------------------- keys


def test_which_layers_are_kept_is_in_the_key_and_in_no_other_precisions(model, directory, monkeypatch):
    recipe = key_of(model, spec_of(model, precision="fp8"), directory)["options"]["recipe"]
    assert recipe["quantised"] == "fp8"
    assert isinstance(recipe["kept"], list)
    before = [json.dumps(key_of(model, spec_of(model, precision=one), directory)) for one in ("int8", "bf16", "fp32")]
    monkeypatch.setitem(KEPT, "int8", ("*.ff.*",))
    after = [json.dumps(key_of(model, spec_of(model, precision=one), directory)) for one in ("int8", "bf16", "fp32")]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]
    assert "quantised" not in before[1] + before[2]


def test_what_runs_once_an_image_keeps_the_default_precision(model, directory, monkeypatch):
    backend = registry.get("inductor")
    for component in components_of(model):
        own = backend.precision_of(model, component, "int8")
        assert own == ("int8" if component == "unet" else backend.default_precision())
    built = []
    monkeypatch.setattr(building, "build_engine", lambda model, spec, *_: built.append(spec.export))
    common = BuildSpec(ExportSpec(model.spec), "inductor", ())
    building.build_all(BuildRequest(common, (), "fp8"), directory)
    precisions = {one.component: one.precision for one in built}
    assert precisions.pop("unet") == "fp8"
    assert set(precisions.values()) == {backend.default_precision()}


def test_inspect_shows_which_layers_are_in_16_bits(model, directory, capsys):
    for precision, kept in (("int8", KEPT["int8"]), ("bf16", ())):
        contract = contract_of(model, "unet", precision).to_json()
        entry = fake_engine(model, directory, precision, contract=contract)
        report = inspect_engine(entry)
        report.print()
        assert report.kept == kept
        assert (", ".join(kept) in capsys.readouterr().out) or not kept
        assert {one.dtype for one in report.outputs} == {"bfloat16"}


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch", "tensorrt", "tensorrt-rtx"])
def test_other_backends_name_the_one_that_does(name, monkeypatch):
    """TensorRT as 8.6: later ones have both."""
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library("tensorrt 8.6.1"))
    for precision in ("int8", "fp8"):
        with pytest.raises(UsageError, match=f"no engines in {precision}") as caught:
            registry.check_request(name, precision)
        assert caught.value.hint.startswith(f"use --backend inductor --precision {precision}")


@pytest.mark.parametrize(
    ("gpu", "precision", "message"),
    [
        (H200, "int8", None),
        (H200, "fp8", None),
        (A100, "int8", None),
        (A100, "fp8", "compute capability 8.9 or later, and the NVIDIA A100 has 8.0"),
        (T4, "int8", "compute capability 8.0 or later, and the Tesla T4 has 7.5"),
    ],
)
def test_a_gpu_without_such_products_is_told_so_before_a_build(monkeypatch, directory, gpu, precision, message):
    monkeypatch.setattr(host, "gpus", lambda: (gpu,))
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    backend = registry.get("inductor")
    monkeypatch.setattr(type(backend), "why_not", lambda self: None)
    (found,) = (one for one in doctor.diagnose(directory).findings if one.name == "8 bits")
    assert (precision in found.detail.split("; ")) == (message is None)
    if message is None:
        backend.check_precision(precision)
        return
    assert (message in found.detail, found.state) == (True, "optional")
    with pytest.raises(UsageError, match=message) as caught:
        backend.check_precision(precision)
    assert "--precision" in caught.value.hint


def test_a_text_encoder_has_no_such_engine(model):
    with pytest.raises(UsageError, match="text_encoder has no engine in int8"):
        registry.get("inductor").check(spec_of(model, "text_encoder", "int8"))


@pytest.mark.parametrize("output", [(), ("--output", "text.onnx")])
def test_no_graph_is_written(run, output, tmp_path):
    """Of what runs once an image."""
    own = ("--component", "text_encoder", *output)
    code, _, told = run("export", "--precision", "fp8", *own, "--engine-dir", str(tmp_path))
    assert code == 2
    assert "no ONNX graph of the text_encoder is written in fp8" in told
    assert "export it in fp16, which runs beside a UNet in fp8" in told


# -------------------------------------------------------------------------------------------------------------- gain


def fake_engine(model, directory, precision, **info):
    """The entry of an engine whose step took so long when it was built."""
    spec = spec_of(model, precision=precision)
    facts = {"step_sizes": str(PROFILE.optimum), **info}
    return directory.obtain("engine", key_of(model, spec, directory), lambda folder: facts)


@pytest.mark.parametrize(
    ("own", "others", "words"),
    [
        (12.0, {"fp32": 30.0, "bf16": 18.0}, "12.00 ms a step (fp32 30.00, bf16 18.00), relative error 9.00e-03"),
        (12.0, {"fp32": 30.0, "bf16": 18.0}, "1.50 times as fast as bf16"),
        (20.0, {"fp32": 30.0, "bf16": 18.0}, "int8 is slower here than bf16, which is to be preferred"),
        (20.0, {}, "int8 is slower here than PyTorch's own bf16, not compiled"),
    ],
)
def test_a_build_says_what_is_gained(model, directory, capsys, own, others, words):
    """Also where the engine is there already."""
    for precision, step in others.items():
        fake_engine(model, directory, precision, step_ms=step)
    parity = [{"relative_l2": 0.009}]
    entry = fake_engine(model, directory, "int8", step_ms=own, torch_step_ms=15.0, parity=parity)
    spec = spec_of(model, precision="int8")
    assert building.build_engine(model, spec, directory, Console()) == entry
    assert words in " ".join(capsys.readouterr().err.split())


def test_other_precisions_say_nothing(model, directory, capsys):
    entry = fake_engine(model, directory, "bf16", step_ms=10.0)
    assert building.build_engine(model, spec_of(model, precision="bf16"), directory, Console()) == entry
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------ verify


def test_8_bits_have_thresholds_of_their_own_which_a_user_may_set():
    spec = VerifySpec(GenerateSpec(("x",)))
    assert spec.thresholds_of("bf16") == Thresholds()
    for precision in ("int8", "fp8"):
        own = spec.thresholds_of(precision)
        assert 0.9 < own.min_cosine < 0.9999
        assert own.max_noise_ratio > 2
        assert replace(spec, limits={"min_cosine": 0.9999}).thresholds_of(precision) == replace(own, min_cosine=0.9999)
    with pytest.raises(UsageError, match="--min-cosine"):
        VerifySpec(GenerateSpec(("x",)), limits={"min_cosine": 2.0})

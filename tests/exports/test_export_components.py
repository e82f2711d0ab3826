"""Export of text encoders and VAE: right at every size by either exporter, and plain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import factories
import numpy as np
import onnx
import pytest
import torch
from exports import DTYPES, made_once
from onnx import numpy_helper

from sdtrt.common.errors import ExportError
from sdtrt.exports import tracing
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.parity import check_onnx
from sdtrt.specs import DEFAULT_OPSETS, Sizes
from sdtrt.specs.contract import Contract, text_encoder_contract, vae_contract

NAMES = ["text", "pooled text", "vae_decoder", "vae_encoder"]
SMALL_VAE = {"layers_per_block": 1}
SIZES = Sizes(3, 72, 104)


def make(name, precision, **overrides):
    """A module and the contract of its component."""
    if name.startswith("vae"):
        module = factories.small_vae(**{**SMALL_VAE, **overrides})
        contract = vae_contract(module.config, precision, name)
    else:
        pooled = name == "pooled text"
        activation = {"hidden_act": "gelu" if pooled else "quick_gelu"}
        module = factories.small_text_encoder(projection=pooled, **{**activation, **overrides})
        component = "text_encoder_2" if pooled else "text_encoder"
        contract = text_encoder_contract(module.config.to_dict(), precision, component)
    torch.nn.Module.to(module, DTYPES[precision])
    return module, contract


@dataclass(frozen=True)
class Exported:
    path: object
    module: torch.nn.Module
    contract: Contract

    @property
    def graph(self):
        return onnx.load(self.path).graph


@pytest.fixture(scope="module")
def exported(shared):
    """Exports, each made once in a test run, and a module like the one that was exported."""

    def get(name, precision="fp16", exporter="torchscript"):
        module, contract = make(name, precision)
        write = partial(write_onnx, module, contract, exporter=exporter, opset=DEFAULT_OPSETS[exporter])
        return Exported(made_once(shared / f"{name}-{precision}-{exporter}.onnx", write), module, contract)

    return get


BOTH = [
    pytest.param(name, exporter, marks=[pytest.mark.slow] if exporter == "dynamo" and name != "pooled text" else [])
    for name in NAMES
    for exporter in ("torchscript", "dynamo")
]
LIMITS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 5e-4}


@pytest.mark.parametrize(("name", "exporter"), BOTH)
def test_fp16_graph_computes_what_diffusers_does(exported, name, exporter):
    """Against the module's own forward, not the one that is traced."""
    it = exported(name, "fp16", exporter)
    report = check_onnx(it.path, it.module, it.contract)
    assert report.worst.relative_l2 < LIMITS["fp16"]
    assert {check.sizes.batch for check in report.checks} == {1, 2, 5}
    assert len(report.checks) == (5 if name.startswith("vae") else 3), "sizes that are one to a text encoder count once"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_other_precisions(exported, name, precision):
    it = exported(name, precision)
    assert check_onnx(it.path, it.module, it.contract).worst.relative_l2 < LIMITS[precision]


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_the_vae_is_right_at_every_remainder(exported, name):
    it = exported(name, "fp32")
    sizes = [Sizes(1 + i % 3, 8 * (1 + i), 8 * (17 - 2 * i)) for i in range(9)]
    assert check_onnx(it.path, it.module, it.contract, sizes).worst.relative_l2 < 1e-5


@pytest.mark.parametrize(("name", "exporter"), BOTH)
def test_inputs_and_outputs_are_the_contracts(exported, name, exporter):
    it = exported(name, "fp16", exporter)
    for values, specs in ((it.graph.input, it.contract.inputs), (it.graph.output, it.contract.outputs)):
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            assert value.name == spec.name
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == np.dtype(spec.dtype)
            assert tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim) == spec.dims


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_plain(exported, name):
    """Of a text encoder, no shape is computed at run time; of a VAE, those around its one attention alone."""
    it = exported(name)
    operators = [node.op_type for node in it.graph.node]
    assert not {"Identity", "If", "Loop", "ArgMax", "GatherND", "CumSum", "Trilu"} & set(operators)
    if name.startswith("vae"):
        assert operators.count("Softmax") == 1
        assert "Cast" not in operators
        unused = "encoder." if name == "vae_decoder" else "decoder."
        assert not any(tensor.name.startswith(unused) for tensor in it.graph.initializer)
    else:
        assert operators.count("Softmax") == 3
        assert not {"Shape", "Slice", "Concat", "ConstantOfShape"} & set(operators)


def test_export_leaves_the_module_as_it_was(tmp_path):
    module, contract = make("vae_decoder", "fp16")
    write_onnx(module, contract, tmp_path / "model.onnx")
    assert not any("forward" in vars(part) for part in module.modules())
    assert not hasattr(module, "num_upsamplers")


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_the_same_whatever_sizes_it_is_traced_with(name, exported, tmp_path, monkeypatch):
    larger = {"batch": 3, "latent_height": 10, "latent_width": 14, "image_height": 80, "image_width": 112, "tokens": 9}
    for sizes in ("TRACE_SIZES", "VAE_TRACE_SIZES"):
        monkeypatch.setattr(tracing, sizes, larger)
    module, contract = make(name, "fp16")
    write_onnx(module, contract, tmp_path / "model.onnx")
    assert factories.sha256_of(tmp_path / "model.onnx") == factories.sha256_of(exported(name).path)


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_graph_that_looks_ahead_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "MASKED", 0.0)
    module, contract = make("text", "fp32")
    write_onnx(module, contract, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="off by"):
        check_onnx(tmp_path / "model.onnx", module, contract)


def test_a_wrong_second_output_is_caught(tmp_path, exported):
    it = exported("pooled text", "fp32")
    model = onnx.load(it.path)
    tensor = next(t for t in model.graph.initializer if "text_projection" in t.name or "projection" in t.name)
    tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="off by"):
        check_onnx(tmp_path / "model.onnx", it.module, it.contract)


def row(*ids, tokens=77, pad):
    return [*ids, *[pad] * (tokens - len(ids))]


@pytest.mark.parametrize("legacy", [False, True], ids=["end token", "its id is 2, as in old configurations"])
def test_the_text_is_pooled_where_transformers_pools_it(legacy):
    """At the first end token, wherever it is, padded with itself or with zeros; at the start where there is none."""
    vocabulary = factories.clip_vocabulary()
    start, end = vocabulary[factories.START], vocabulary[factories.END]
    module, contract = make("pooled text", "fp32", **({"eos_token_id": 2} if legacy else {}))
    ids = [
        row(start, 5, 6, end, pad=end),
        row(start, 5, 6, 7, 8, end, pad=0),
        row(end, pad=end),
        [start, *range(75), end],
        row(start, 9, end, 4, end, pad=1),
    ]
    if not legacy:
        ids.append([start, *range(76)])
    ids = torch.tensor(ids, dtype=torch.int32)
    expected = tracing.reference(module, contract)(ids)
    got = tracing.component_call(module, contract)(ids)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_token_ids_of_the_check_end_as_prompts_do():
    _, contract = make("pooled text", "fp16")
    ids = seeded_feeds(contract, SIZES)["input_ids"]
    last = len(factories.clip_vocabulary()) - 1
    assert ids.dtype == torch.int32
    assert (ids.min() >= 0, ids.max()) == (True, last)
    lengths = (ids != last).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    assert all((line[length:] == last).all() for line, length in zip(ids, lengths, strict=True))


def test_latents_and_pixels_of_the_check_are_of_the_size_that_a_pipeline_gives():
    latents = seeded_feeds(make("vae_decoder", "fp32")[1], SIZES)["latents"]
    assert 5 < latents.std() < 6
    image = seeded_feeds(make("vae_encoder", "fp32")[1], SIZES)["image"]
    assert -1 <= image.min() < -0.9 < 0.9 < image.max() <= 1


# --- hard models -----------------------------------------------------------------------------------------------------


def test_a_vae_that_overflows_in_fp16_is_said_so_and_right_in_fp32(tmp_path):
    """SDXL's trouble, provoked by scaled weights: finite in fp32, beyond fp16's range on the way."""

    def overflowing(precision):
        module, contract = make("vae_decoder", precision)
        module.decoder.conv_in.weight.mul_(3e4)
        path = tmp_path / f"{precision}.onnx"
        write_onnx(module, contract, path)
        return path, module, contract

    with pytest.raises(ExportError, match="infinite or NaN values at"):
        check_onnx(*overflowing("fp16"))
    assert check_onnx(*overflowing("fp32")).worst.relative_l2 < 1e-4

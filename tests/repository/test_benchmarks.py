"""The scripts in `benchmarks/` that run without a GPU, on the built-in model."""

import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from benchmark_scripts import module, run, run_python
from factories import ONE_LEVEL, sd1_folder
from onnx import TensorProto, helper

from sdtrt.backends import registry
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import ModelSpec

SIZE = ("--model", "tiny", "--height", "64", "--width", "64")


lowering, packages, startup, startup_marks = map(module, ("lowering", "packages", "startup", "startup_marks"))


def graph_of_opset_18(path, *more, **resize):
    """Write a graph with what opset 18 changed and what 8.6 misreads: half of the channels, made twice as large."""
    nodes = [
        helper.make_node("Split", ["x"], ["first", "second"], axis=1, num_outputs=2),
        helper.make_node("Resize", ["second", "", "scales"], ["larger"], name="resize", mode="linear", **resize),
        helper.make_node("Shape", ["larger"], ["both"], start=-3, end=-1),
        helper.make_node("Shape", ["larger"], ["from"], start=3),
        helper.make_node("Shape", ["larger"], ["until"], end=1),
        helper.make_node("Shape", ["larger"], ["sizes"]),
        helper.make_node("Constant", [], ["ones"], value_ints=[1, 1]),
        helper.make_node("Constant", [], ["third"], value_int=2),
        helper.make_node("Gather", ["sizes", "third"], ["height"]),
        helper.make_node("Div", ["from", "height"], ["one"]),
        helper.make_node("Concat", ["ones", "until", "both", "from", "one"], ["shape"], axis=0),
        helper.make_node("Reshape", ["larger", "shape"], ["shaped"]),
        *more,
    ]
    values = {"x": [1, 4, 4, 4], "first": [1, 2, 4, 4], "shaped": [None] * 7}
    x, *outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items())
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, 2, 2])
    graph = helper.make_graph(nodes, "graph", [x], outputs, [scales])
    opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_a_lowered_graph_computes_what_it_did(lowering, tmp_path):
    path = graph_of_opset_18(tmp_path / "model.onnx", antialias=0, keep_aspect_ratio_policy="stretch")
    given = {"x": np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4)}
    before = onnxruntime.InferenceSession(path).run(None, given)
    assert before[1].shape == (1, 1, 1, 2, 8, 8, 1)
    lowering.lower_opset(path)
    model = onnx.load(path)
    assert [opset.version for opset in model.opset_import] == [1, 17]
    assert "Constant" not in {node.op_type for node in model.graph.node}
    assert [one.name for node in model.graph.node for one in node.attribute] == ["axis", "mode", "axis"]
    for one, other in zip(onnxruntime.InferenceSession(path).run(None, given), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


REDUCTION = helper.make_node("ReduceMean", ["x", "ones"], ["mean"])  # 17 has its axes as an attribute
BRANCH = helper.make_node("If", ["x"], [], name="branch", then_branch=helper.make_graph([], "then", [], []))


@pytest.mark.parametrize(
    ("more", "attributes", "words"),
    [
        ([], {"antialias": 1}, "resize: antialias can't be said in opset 17"),
        ([], {"keep_aspect_ratio_policy": "not_larger"}, "resize: keep_aspect_ratio_policy can't be said in opset 17"),
        ([REDUCTION], {}, "can't be said in opset 17: .*ReduceMean"),
        ([BRANCH], {}, "branch: nodes inside of a node"),
    ],
    ids=["antialias", "aspect ratio", "axes", "branch"],
)
def test_what_opset_17_cannot_say_is_not_lowered(more, attributes, words, lowering, tmp_path):
    path = graph_of_opset_18(tmp_path / "model.onnx", *more, **attributes)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"(?s){words}"):
        lowering.lower_opset(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_start_up_is_of_whole_processes_with_engines_that_are_there(tmp_path, tiny_engines):
    report, directory = tmp_path / "report.json", {"SDTRT_ENGINE_DIR": str(tmp_path / "engines")}
    shutil.copytree(tiny_engines, tmp_path / "engines")
    size = (*SIZE, "--backend", "onnxruntime")
    first = ("txt2img", *size, "--prompt", "a red circle", "--steps", "1", "--output", tmp_path / "first.png")
    run_python("-m", "sdtrt", *first, "--no-build", **directory)
    run("startup.py", *size, "--repeats", "1", "--output", report, **directory)
    found = json.loads(report.read_text())
    assert len(found["seconds"]["samples"]) == 1
    assert 0.5 < found["seconds"]["median"] < 60
    spans = {span["name"]: span for span in found["timeline"]["spans"]}
    order = ["import sdtrt.cli.commands", "import torch", "import diffusers", "import onnxruntime", "open unet"]
    order += [
        "the pipeline is opened",
        "the first call of the UNet",
        "the first call of the VAE",
        "the image is written",
    ]
    ends = [spans[name]["end"] for name in order]
    assert ends == sorted(ends)
    assert found["timeline"]["first_step_s"]["median"] == pytest.approx(spans["the first call of the UNet"]["end"])
    assert ends[-1] < found["timeline"]["whole"]["median"]
    assert "import onnx" not in spans
    assert found["timeline"]["modules_compiled"]["median"] == 0
    assert found["no_bytecode"]["median"] > found["seconds"]["median"]
    assert found["floors"]["torch"]["end"]["median"] < found["floors"]["diffusers"]["end"]["median"]
    assert len(found["imports"]["slowest"]) == 25
    assert str(tmp_path) not in json.dumps({**found, "command": ""})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler")
def test_an_inductor_engine_is_measured_with_all_its_promises(tmp_path):
    """Two engines are compiled: this takes minutes."""
    model = sd1_folder(tmp_path / "model", **ONE_LEVEL)
    report = tmp_path / "report.json"
    sizes = ("--height", "64", "--width", "64", "--profile", "batch=2:2:4")
    run("packages.py", "--model", model, *sizes, "--changes", "20", "--output", report, timeout_s=1700)
    found = json.loads(report.read_text())
    assert found["errors"] == {}
    assert [one["what"] for one in found["promises"] if not one["held"] and not one["what"].endswith(", s")] == []
    assert found["build"]["package_bytes"] == found["build"]["info"]["package_bytes"]
    assert len(found["open"]["open_s"]["samples"]) == 3
    checkpoints = {row["checkpoint"]: row for row in found["checkpoints"]["checkpoints"]}
    assert checkpoints.keys() == {"A", "B", "A+LoRA"}
    assert all(row["engine"]["cosine"] > 0.999999 for row in checkpoints.values())
    assert checkpoints["B"]["differs_from_a"] > checkpoints["A+LoRA"]["differs_from_a"] > 1e-3
    assert found["changes"]["b_differs"]
    assert len(found["changes"]["from_file_s"]["samples"]) == 3
    assert found["parameters"]["parameters"] > 100
    assert [(row["fixed"], row["batch"]) for row in found["rows"]] == [(True, 2), (False, 2), (False, 4)]


def test_memory_that_grows_after_the_first_tenth_is_found(packages):
    assert packages.growth([50, *[100] * 19]) == 0
    assert packages.growth([10, 90, *[100] * 18]) == 0
    assert packages.growth([100] * 19 + [102]) == pytest.approx(0.02)
    assert packages.growth([0] * 20) is None


def test_a_lora_changes_the_projections_of_attentions_alone(packages):
    generator = torch.Generator().manual_seed(0)
    names = ("a.to_q.weight", "a.to_out.0.weight", "text.q_proj.weight", "a.to_q.bias", "conv.weight")
    state = {name: torch.randn(32 if name.endswith("bias") else (32, 16), generator=generator) for name in names}
    merged = packages._with_lora(state, torch.device("cpu"))
    for name in names[:3]:
        update = merged[name] - state[name]
        assert torch.linalg.matrix_rank(update, rtol=1e-4) == packages.LORA_RANK
        assert update.norm() / state[name].norm() == pytest.approx(0.1, rel=1e-3)
    assert all(merged[name] is state[name] for name in names[3:])


def test_each_batch_has_an_engine_and_each_profile_one_more(packages):
    asked = SimpleNamespace(height=None, width=96, batches="1,4", profile=["batch=2:2:8", "batch=8"], component="unet")
    model = resolve_model(ModelSpec("tiny"))
    found = [str(profile) for profile in packages.profiles_of(asked, model)]
    rest = "height 128, width 96, tokens 77"
    assert found == [f"batch 2, {rest}", f"batch 8, {rest}", f"batch 2:2:8, {rest}"]


def test_all_that_is_timed_lies_where_its_name_says(startup_marks, tmp_path):
    """What isn't there is left out without a word, so that older versions can be timed: nothing else would tell."""
    marks = startup_marks.Marks(tmp_path / "marks.json")
    for nothing_ahead in (False, True):
        for name, wraps in startup_marks.wraps_of(marks, nothing_ahead).items():
            for attribute in wraps:
                owner = importlib.import_module(name)
                for part in attribute.split("."):
                    owner = vars(owner)[part]
                assert owner.__module__ == name, f"{name}.{attribute} comes from {owner.__module__}"


def test_a_request_that_no_engine_runs_has_no_timeline(startup, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["startup.py", *SIZE, "--backend", "torch", "--output", str(report)])
    with pytest.raises(SystemExit):
        startup.main()
    assert "name a --backend other than torch" in capsys.readouterr().err
    assert not report.exists()
    with pytest.raises(RuntimeError, match="name a --backend other than torch"):
        startup.command_timeline([{"spans": [{"name": "import torch", "begin": 0.1, "end": 1.2}]}])


# --- 8 bits ----------------------------------------------------------------------------------------------------------

quantised_layers, quantised_step = map(module, ("quantised_layers", "quantised_step"))


def test_a_layers_kind_is_its_name_within_its_block(quantised_layers):
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert quantised_layers.kind_of(f"{block}.attn2.to_kv") == "attn2.to_kv"
    assert quantised_layers.kind_of("mid_block.attentions.0.proj_in") == "proj_in"


@pytest.mark.parametrize(
    ("int8", "fp8", "words"),
    [
        ((5.0, 0.01), (4.0, 0.04), "2 rows: take fp8 kept: default, 2.50 times as fast as bf16, error 0.040"),
        ((5.0, 0.01), (4.0, 0.06), "2 rows: take int8 kept: default, 2.00 times as fast as bf16, error 0.010"),
        ((12.0, 0.01), (11.0, 0.04), "2 rows: stay in 16 bits (fp8 kept: default, 0.91 times as fast"),
        ((5.0, 0.2), (4.0, 0.2), "2 rows: nothing to choose from"),
    ],
)
def test_the_fastest_list_within_the_error_is_taken(quantised_step, int8, fp8, words):
    def row(title, step, error):
        return {"rows": 2, "title": title, "precision": title[:4].strip(), "step_ms": step, "relative_l2": error}

    rows = [row("bf16", 10.0, 0.005), row("fp16", 10.5, 0.001), {"rows": 2, "title": "fp8 kept: none", "error": "no"}]
    rows += [row("int8 kept: default", *int8), row("fp8 kept: default", *fp8)]
    assert quantised_step.choices(rows, 0.05)[0].startswith(words)

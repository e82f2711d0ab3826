"""The scripts in `benchmarks/` that run without a GPU, on the built-in model."""

import importlib
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from benchmark_scripts import module, run, run_python
from onnx import TensorProto, helper

SIZE = ("--model", "tiny", "--height", "64", "--width", "64")


lowering, startup, startup_marks = map(module, ("lowering", "startup", "startup_marks"))


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
def test_start_up_is_of_whole_processes_with_engines_that_are_there(tmp_path):
    report, directory = tmp_path / "report.json", {"SDTRT_ENGINE_DIR": str(tmp_path / "engines")}
    size = (*SIZE, "--backend", "onnxruntime")
    first = ("txt2img", *size, "--prompt", "a red circle", "--steps", "1", "--output", tmp_path / "first.png")
    run_python("-m", "sdtrt", *first, **directory)
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

"""The scripts in `benchmarks/` that run without a GPU, on the built-in model."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from factories import SMALL, small_unet
from onnx import TensorProto, helper

from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.common.errors import BuildError, ExportError
from sdtrt.exports.fp16_recipe import WIDE_LAYERS
from sdtrt.specs import Sizes

ROOT = Path(__file__).resolve().parents[2]
SIZE = ("--model", "tiny", "--height", "64", "--width", "64")


def run_python(*arguments, **variables):
    """Run Python; it must end well."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def run(script, *arguments, **variables):
    """Run a benchmark."""
    run_python(ROOT / "benchmarks" / script, *arguments, **variables)


def module(name):
    """A fixture: one of `benchmarks/` as a module."""

    @pytest.fixture(name=name)
    def load(monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)

    return load


tuning, lowering, fidelity, startup = map(module, ("tuning", "lowering", "fidelity", "startup"))
startup_marks = module("startup_marks")


@pytest.fixture
def tune(tuning, tmp_path, monkeypatch):
    """Run `tuning.py` on a small UNet; its engines are the exports, in ONNX Runtime on the CPU."""

    def export(*arguments, opset, real=tuning.write_onnx, **options):
        if opset == 16:
            raise ExportError("no such operator", hint="use another")
        real(*arguments, opset=opset, **options)

    def build(onnx, folder, contract, spec, **_):
        built.append(folder.name)
        if spec.optimization_level == 2:
            raise BuildError("no kernel fits", hint="raise --workspace-gib")
        return {"build_seconds": 1.5, "pieces": 1}

    built, report = [], tmp_path / "report.json"
    monkeypatch.setattr(tuning, "make_unet", lambda: small_unet("sd1", **SMALL).half().eval())
    monkeypatch.setattr(tuning, "SIZES", Sizes(2, 64, 96))
    monkeypatch.setattr(tuning, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(tuning, "write_onnx", export)
    monkeypatch.setattr(tuning, "build_plan", build)
    monkeypatch.setattr(tuning, "kernels", lambda call: [])
    monkeypatch.setattr(
        tuning,
        "open_plans",
        lambda plan, contract, device: OnnxRuntimeSession(plan.with_name("model.onnx"), contract),
    )

    def run_it(*arguments):
        """The rows by variant, if any, and what was built in this call."""
        built.clear()
        report.unlink(missing_ok=True)
        command = ["tuning.py", "--folder", str(tmp_path / "folder"), "--output", str(report), "--variants", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        tuning.main()
        rows = json.loads(report.read_text())["rows"] if report.exists() else []
        return {row.pop("variant"): row for row in rows}, list(built)

    return run_it


def test_variants_that_fail_are_rows_with_their_errors(tune):
    rows, built = tune("product", "opset-16", "level-2", "two-profiles")
    assert sorted(built) == ["level-2", "product", "two-profiles"]
    assert rows["opset-16"] == {"error": "no such operator; use another"}
    assert rows["level-2"] == {"error": "no kernel fits; raise --workspace-gib"}
    for name in ("product", "two-profiles"):
        assert 0 < rows[name]["worst_ratio_to_pytorch_fp16"] < 10
        assert rows[name]["build"]["build_seconds"] == 1.5


def test_what_was_built_in_an_earlier_run_is_measured_and_what_was_not_is_said(tune):
    assert tune("product", "level-2", "--build-only") == ({}, ["product", "level-2"])
    rows, built = tune("product", "level-2", "whole", "--no-build")
    assert built == []
    assert rows["product"]["step_ms"]
    assert rows["level-2"]["error"].startswith("no kernel fits")
    assert rows["whole"] == {"error": "not built"}
    assert tune("product", "level-2", "whole")[1] == ["whole"]  # what has failed is not tried again


@pytest.mark.slow
def test_exports_are_checked_without_a_gpu(tune, tmp_path):
    rows, built = tune("product", "opset-14", "opset-16", "dynamo", "channels-last", "--check")
    assert built == []
    assert "error" in rows.pop("opset-16")
    assert all(row["relative_l2"] < 2e-3 and row["pieces"] == 1 for row in rows.values())  # no attention is so large
    assert rows["channels-last"]["channels_last"] == 0
    written = {name: onnx.load(tmp_path / "folder" / name / "model.onnx", load_external_data=False) for name in rows}
    opsets = {name: model.opset_import[0].version for name, model in written.items()}
    assert opsets == {**dict.fromkeys(rows, 17), "opset-14": 14}  # 8.6 reads up to 17


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


def test_a_convolution_by_itself_is_as_good_as_pytorchs(fidelity, tmp_path):
    asked = argparse.Namespace(backend="onnxruntime", folder=tmp_path, repeats=2)
    row = fidelity.measure_convolution(8, 16, 32, asked)
    assert (row["channels"], row["out_channels"], row["side"]) == (8, 16, 32)
    assert 0 < row["relative_l2"] < 1.1 * row["pytorch_fp16_relative_l2"] < 1e-3
    assert len(row["step_us"]["samples"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("0", (0, True, None, False)),
        ("5-native", (5, False, None, False)),
        ("2-whole", (2, True, 0, False)),
        ("2-1024-last", (2, True, 1024, True)),
    ],
)
def test_what_a_variants_name_says(fidelity, tmp_path, name, found):
    variant = fidelity.Variant.of(name, tmp_path)
    assert (variant.layers, variant.plugins, variant.split, variant.channels_last) == found
    assert variant.onnx == tmp_path / name / "model.onnx"


@pytest.mark.slow
def test_the_ablation_goes_on_where_an_earlier_run_has_built(tmp_path):
    folder, report = tmp_path / "folder", tmp_path / "report.json"
    common = (*SIZE, "--backend", "onnxruntime", "--repeats", "2", "--folder", folder, "--output", report)
    run("fidelity.py", "layers", *common, "--variants", "0", "--build-only")
    assert not report.exists()
    kept = (folder / "0" / "engine.onnx").stat().st_mtime_ns
    run("fidelity.py", "layers", *common, "--variants", "0", f"{WIDE_LAYERS}-native")
    assert (folder / "0" / "engine.onnx").stat().st_mtime_ns == kept
    none, default = json.loads(report.read_text())["rows"]
    assert (none["layers"], none["norm_plugins"]) == (0, True)
    assert (default["layers"], default["norm_plugins"]) == (WIDE_LAYERS, False)
    assert none["fp32_operators"] < default["fp32_operators"]
    assert min(none["cosine"] + default["cosine"]) > 0.9999
    assert default["step_ms"]["median"] > 0


@pytest.mark.slow
def test_noise_near_the_output_counts_most(tmp_path):
    """More layers in fp32 leave less of the error, and the default leaves less than half of it on a trained model."""
    report = tmp_path / "report.json"
    run("fidelity.py", "noise", *SIZE, "--output", report)
    found = json.loads(report.read_text())
    left = found["share_left_by_layers"]
    assert left[0] == 1
    assert all(less <= more + 1e-9 for more, less in pairwise(left))
    assert left[WIDE_LAYERS] < 0.5
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)


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

"""The scripts in `benchmarks/` that run without a GPU, on the built-in model."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from sdtrt.tracing import WIDE_LAYERS

ROOT = Path(__file__).resolve().parents[1]
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
    run("startup.py", *size, "--repeats", "2", "--output", report, **directory)
    found = json.loads(report.read_text())
    assert len(found["seconds"]["samples"]) == 2
    assert 0.5 < found["seconds"]["median"] < 60
    spans = {span["name"]: span for span in found["timeline"]["spans"]}
    order = ["import sdtrt.cli", "import torch", "import diffusers", "import onnxruntime", "open unet"]
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
def test_a_request_that_no_engine_runs_has_no_timeline(tmp_path):
    report = tmp_path / "report.json"
    with pytest.raises(AssertionError, match="name a --backend other than torch"):
        run("startup.py", *SIZE, "--backend", "torch", "--repeats", "1", "--output", report)
    assert not report.exists()

"""The benchmarks of what TensorRT 8.6 alone needs, as far as they run without a GPU."""

import argparse
import json
import sys
from itertools import pairwise

import onnx
import pytest
import torch
from benchmark_scripts import module, run
from factories import SMALL, small_unet

from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.common.errors import BuildError, ExportError
from sdtrt.exports.fp16_recipe import WIDE_LAYERS
from sdtrt.specs import Sizes

SIZE = ("--model", "tiny", "--height", "64", "--width", "64")

tuning, fidelity = map(module, ("tuning", "fidelity"))


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


@pytest.mark.slow
def test_variants_that_fail_are_rows_with_their_errors(tune):
    rows, built = tune("product", "opset-16", "level-2", "two-profiles")
    assert sorted(built) == ["level-2", "product", "two-profiles"]
    assert rows["opset-16"] == {"error": "no such operator; use another"}
    assert rows["level-2"] == {"error": "no kernel fits; raise --workspace-gib"}
    for name in ("product", "two-profiles"):
        assert 0 < rows[name]["worst_ratio_to_pytorch_fp16"] < 10
        assert rows[name]["build"]["build_seconds"] == 1.5


@pytest.mark.slow
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

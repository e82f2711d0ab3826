"""`benchmarks/cpu_step.py` on a text encoder: both sides run, take turns, and the figures are of the right size."""

from __future__ import annotations

import json
import math

import factories
import pytest
from benchmark_scripts import run

from sdtrt.exports.component import write_onnx
from sdtrt.specs.contract import text_encoder_contract


@pytest.mark.slow
def test_an_engine_and_openvinos_own_take_turns(tmp_path):
    module = factories.small_text_encoder()
    contract = text_encoder_contract(module.config.to_dict(), "fp32")
    write_onnx(module, contract, tmp_path / "model.onnx")
    run("cpu_step.py", tmp_path / "model.onnx", "--own", "f32", "--repeats", "2", "--output", tmp_path / "step.json")
    found = json.loads((tmp_path / "step.json").read_text())
    assert {name: len(times) for name, times in found["seconds"].items()} == {"sdtrt": 2, "openvino": 2}
    assert all(0 < found["least"][name] <= found["median"][name] < math.inf for name in found["least"])
    assert found["sizes"].startswith("batch 2, 512x512")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []

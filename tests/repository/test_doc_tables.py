"""The tables of README.md and docs/ come from their sources, and a test says when they don't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "doc_tables.py"
EMPTY = "# Title\n\n<!-- table: founding -->\n<!-- /table -->\n\nThe rest.\n"


def row(backend, precision, median, **more):
    return {
        "task": "txt2img",
        "backend": backend,
        "precision": precision,
        "steps": 50,
        "height": 512,
        "width": 512,
        "batch": 1,
        "latency_s": {"median": median, "p90": median, "samples": [median]},
        "unet_step_ms": {"median": median * 20, "samples": [median * 20]},
        "speedup": 3.9 / median,
        **more,
    }


def report(*rows):
    return {
        "command": "python benchmarks/founding.py",
        "host": {"gpus": [{"name": "NVIDIA Made Up"}], "processor": "Some CPU, 2 cores"},
        "versions": {"torch": "2.0", "tensorrt": "8.6.1", "onnxruntime": "1.0", "driver": "580.1"},
        "rows": list(rows),
    }


@pytest.fixture
def project(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text(EMPTY)
    return tmp_path


def write(project, data, name="founding"):
    (project / "benchmarks" / f"{name}.json").write_text(json.dumps(data))


def run(project, *arguments):
    command = [sys.executable, str(SCRIPT), "--root", str(project), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def readme(project):
    return (project / "README.md").read_text()


def test_the_pages_of_this_repository_agree_with_their_sources():
    result = run(REPOSITORY, "--check")
    assert result.returncode == 0, result.stderr


def test_a_report_becomes_a_table_which_then_agrees(project):
    write(project, report(row("torch", "fp32", 3.9), row("tensorrt", "fp16", 0.5)))
    assert run(project, "--check").returncode == 1
    assert readme(project) == EMPTY
    assert run(project).returncode == 0
    text = readme(project)
    assert "| task | size | steps | PyTorch fp32, s | TensorRT fp16, s | speed-up | UNet step, ms |\n" in text
    assert "| txt2img | 512×512 | 50 | 3.900 | 0.500 | 7.8× | 10.00 |\n" in text
    assert "NVIDIA Made Up, driver 580.1, torch 2.0, tensorrt 8.6.1; `python benchmarks/founding.py`" in text
    assert "(benchmarks/founding.json)" in text
    assert text.endswith("<!-- /table -->\n\nThe rest.\n")
    assert run(project, "--check").returncode == 0


def test_a_figure_that_is_changed_in_either_place_is_found(project):
    write(project, report(row("torch", "fp32", 3.9), row("tensorrt", "fp16", 0.5)))
    run(project)
    text = readme(project)
    (project / "README.md").write_text(text.replace("0.500", "0.400"))
    result = run(project, "--check")
    assert result.returncode == 1
    assert result.stderr.startswith("error: README.md disagrees")
    (project / "README.md").write_text(text)
    write(project, report(row("torch", "fp32", 3.9), row("tensorrt", "fp16", 0.6)))
    assert run(project, "--check").returncode == 1


def test_several_baselines_have_a_column_each_and_failed_ones_say_so(project):
    failed = row("torch", "fp16", 1.0, variant="compiled", latency_s=None, unet_step_ms=None, speedup=None)
    rows = (row("torch", "fp32", 3.9, variant="TF32 off"), row("torch", "fp32", 2.0, variant="TF32 on"), failed)
    other = row("tensorrt", "fp16", 0.8, task="img2img", width=768, unet_step_ms=9.0)
    write(project, report(*rows, row("tensorrt", "fp16", 0.5, unet_step_ms=8.125), other))
    run(project)
    text = readme(project)
    assert "| PyTorch fp32, s | PyTorch fp32 TF32 on, s | PyTorch fp16 compiled, s | TensorRT fp16, s |" in text
    assert "| txt2img | 512×512 | 50 | 3.900 | 2.000 | failed | 0.500 | 7.8× | 8.12 |" in text
    assert "| img2img | 768×512 | 50 | – | – | – | 0.800 | 4.9× | 9.00 |" in text


def test_what_sdtrt_bench_reports_first_stands_last(project):
    write(project, report(row("tensorrt", "fp16", 0.5), row("torch", "fp32", 3.9)))
    run(project)
    assert "| txt2img | 512×512 | 50 | 3.900 | 0.500 | 7.8× | 10.00 |" in readme(project)


def test_without_a_report_nothing_is_claimed(project):
    run(project)
    assert "<!-- table: founding -->\nNot measured yet.\n<!-- /table -->" in readme(project)
    write(project, report(row("torch", "fp32", 3.9)))
    assert run(project, "--check").returncode == 1


def test_a_readme_without_a_block_is_an_error(project):
    (project / "README.md").write_text("# Title\n")
    result = run(project, "--check")
    assert result.returncode == 1
    assert "no table block" in result.stderr

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


def bench_row(median, batch=1, backend="inductor", **more):
    figures = {
        "images_per_s": batch / median,
        "energy_per_image_j": 75.25,
        "peak_bytes": 2_500_000_000,
        "speedup": None,
    }
    return row(backend, "fp16", median, **{"baseline": None, "batch": batch, **figures, **more})


ROWS = "# Title\n\n<!-- rows: one two -->\n<!-- /table -->\n"


def test_all_rows_of_several_reports_stand_in_one_table(project):
    (project / "README.md").write_text(ROWS)
    strong = {"backend": "torch", "variant": "compiled", "baseline": "torch-compile", "energy_per_image_j": None}
    write(
        project,
        report(bench_row(0.32), bench_row(0.4, **strong), bench_row(0.8, **{**strong, "variant": "graph"})),
        "one",
    )
    old = {"energy_per_image_j": None, "energy_j": 602.0}  # of a call, as in reports before there were pictures'
    write(project, report(bench_row(2.0, 8, steps=20, **old), bench_row(1, **{**strong, "latency_s": None})), "two")
    assert run(project).returncode == 0
    text = readme(project)
    assert "| txt2img | 512×512 | 50 | 1 | **inductor fp16** | 0.320 | 3.12 | 6.40 | 75.2 | 2.5 | 0.80 |\n" in text
    assert "| txt2img | 512×512 | 50 | 1 | PyTorch fp16 compiled | 0.400 | 2.50 | 8.00 | – | 2.5 |  |\n" in text
    assert "| txt2img | 512×512 | 20 | 8 | **inductor fp16** | 2.000 | 4.00 | 40.00 | 75.2 | 2.5 | – |\n" in text
    assert text.count("PyTorch fp16 compiled | failed |") == 1
    assert text.count("[raw figures](benchmarks/one.json)") == text.count("[raw figures](benchmarks/two.json)") == 1
    assert run(project, "--check").returncode == 0


def test_of_several_reports_those_that_there_are_are_shown(project):
    (project / "README.md").write_text(ROWS)
    run(project)
    assert "Not measured yet." in readme(project)
    write(project, {**report(bench_row(0.5)), "command": None, "note": "figures as they were written down"}, "two")
    assert run(project).returncode == 0
    assert "| **inductor fp16** | 0.500 |" in readme(project)
    assert "figures as they were written down; [raw figures](benchmarks/two.json)" in readme(project)


def timing(*samples):
    return {"median": samples[len(samples) // 2], "p90": max(samples), "samples": list(samples)}


def test_a_report_of_an_engine_becomes_its_figures_and_its_steps(project):
    (project / "README.md").write_text("<!-- engine: packages -->\n<!-- /table -->\n")
    checkpoint = {"engine": {"relative_l2": 7e-4, "cosine": 0.9999991}, "eager": {"relative_l2": 1e-3}}
    changes = {"from_file_s": timing(0.4, 0.5, 0.75), "from_memory_s": timing(0.01), "a_is_back_to_the_last_bit": True}
    memory = {"process": {"growth": 0.0012}, "gpu": {"growth": None}}
    steps = [("batch 2", 2, 6.0), ("batch 8", 8, 20.5), ("batch 2:2:8", 2, 6.25), ("batch 2:2:8", 8, 21.0)]
    made = report(
        *({"profile": name, "batch": batch, "width": 512, "height": 512, "step_ms": ms} for name, batch, ms in steps),
        {"profile": "batch 16", "error": "out of memory"},
    )
    parts = {
        "build": {"build_s": 122.4, "package_bytes": 6_600_000},
        "open": {name: timing(1.5) for name in ("open_s", "without_weights_s", "first_run_s")},
        "checkpoints": {"checkpoints": [{"checkpoint": "B", **checkpoint}]},
        "changes": {"changes": 200, "memory": memory, **changes},
        "parameters": {"parameters": 3, "not_followed": ["conv_out.bias"]},
    }
    write(project, {**made, **parts, "model": "sd15", "component": "unet", "precision": "fp16"}, "packages")
    assert run(project).returncode == 0
    text = readme(project)
    assert text.startswith(
        "<!-- engine: packages -->\n\n| sd15: unet, fp16 |  |\n| --- | --- |\n| built in, s | 122 |\n"
    )
    assert "| package, MB | 6.6 |\n" in text
    assert "| error with B; PyTorch's own | 7.0e-04; 1.0e-03 (cosine 0.999999) |\n" in text
    assert "| weights changed from a file, s: median, most | 0.50, 0.75 |\n" in text
    assert "| first output after 200 changes | equal to the last bit |\n" in text
    assert "| growth of memory after the first tenth of them | process 0.12% |\n" in text
    assert "| parameters followed, each changed alone | 2 of 3 |\n" in text
    assert "| engine for | 2 rows, 512×512, ms | 8 rows, 512×512, ms |\n" in text
    assert "| batch 8 | – | 20.50 |\n" in text
    assert "| batch 2:2:8 | 6.25 | 21.00 |\n" in text
    assert "| batch 16 | – | – |\n" in text
    assert run(project, "--check").returncode == 0


def test_the_variants_of_a_recipe_are_listed_the_fastest_first(project):
    (project / "README.md").write_text("<!-- recipe: recipe -->\n<!-- /table -->\n")
    made = report(
        {"variant": "failed", "error": "out of memory"},
        {"variant": "slow", "step_ms": 6.625, "of_pytorch": 0.5, "build_s": 12.4},
        {"variant": "fast", "step_ms": 5.9, "of_pytorch": None, "build_s": 30.0},
    )
    write(project, {**made, "component": "unet", "precision": "fp16", "sizes": "batch 2"}, "recipe")
    assert run(project).returncode == 0
    lines = [line for line in readme(project).splitlines() if line.startswith("| ")]
    assert lines[0] == "| unet, fp16, batch 2 | step, ms | error / PyTorch's | built, s |"
    assert lines[2:] == ["| fast | 5.90 | – | 30 |", "| slow | 6.62 | 0.50 | 12 |", "| failed | out of memory |  |  |"]
    assert run(project, "--check").returncode == 0


def test_a_readme_without_a_block_is_an_error(project):
    (project / "README.md").write_text("# Title\n")
    result = run(project, "--check")
    assert result.returncode == 1
    assert "no table block" in result.stderr


def test_a_table_of_losses_has_what_was_computed(project):
    def choice(name, speedup, **lost):
        mean = {"relative_l2": 0.25, "psnr_db": 20.0, "ssim": 0.75, "lpips": None, "clip_loss": None}
        scores = {"kind": 98.0 - lost.get("kind", 0), "all_right": 96.0}
        return {"choice": name, "speedup": speedup, "mean": mean, "scores": scores, "scores_lost": lost}

    same = {"model": "tiny", "backend": "onnxruntime", "precision": "fp32", "width": 128, "height": 128, "steps": 50}
    rows = [choice("exact", 1.0, kind=0.0, all_right=0.0), choice("high", 1.3, kind=1.5, all_right=0.0)]
    write(project, {**report(*rows), **same, "prompts": 100}, "curve")
    (project / "README.md").write_text(
        "<!-- quality: curve -->\n<!-- /table -->\n<!-- presets: x -->\n<!-- /table -->\n"
    )
    assert run(project).returncode == 0
    page = readme(project)
    head = "| choice | speed-up | latents' rel. L2 | PSNR, dB | SSIM | kind, points lost |"
    assert head in page
    assert "| `high` | 1.30 | 0.250 | 20.0 | 0.750 | 1.5 |" in page
    said = "Right in the exact pictures, in percent: kind 98, all right 96. No choice lost anything of all right."
    assert f"128×128, 50 steps, 100 prompts. {said}" in page
    assert "| `exact` | nothing |" in page


def test_a_table_of_losses_has_the_time_of_a_call_where_it_was_measured_alone(project):
    mean = {"relative_l2": 0.25, "psnr_db": None, "ssim": None, "lpips": None, "clip_loss": None}
    row = {"choice": "high", "speedup": 1.3, "mean": mean, "latency_s": {"median": 0.2812}, "prompts": ["a star"]}
    same = {"model": "tiny", "backend": "inductor", "precision": "fp16", "width": 128, "height": 128, "steps": 50}
    write(project, {**report(row), **same}, "curve")
    (project / "README.md").write_text("<!-- quality: curve -->\n<!-- /table -->\n")
    assert run(project).returncode == 0
    assert "| choice | call, s | speed-up | latents' rel. L2 |" in readme(project)
    assert "| `high` | 0.281 | 1.30 | 0.250 |" in readme(project)
    assert "128×128, 50 steps, 1 prompt.\n" in readme(project)

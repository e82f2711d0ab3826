"""What a command leaves outside of its output and the engine directory: nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
TELLING = ("onnxruntime", "openvino", "diffusers", "transformers", "huggingface_hub")  # some import the first

COMMANDS = [
    "txt2img -p x --steps 2 -o x.png -b torch",  # diffusers imports ONNX Runtime
    pytest.param("txt2img -p x --steps 2 -o x.png", marks=pytest.mark.slow),
    pytest.param("img2img -p x -i init.png --steps 2 -o x.png", marks=pytest.mark.slow),
    pytest.param("export --component vae_decoder --output x.onnx", marks=pytest.mark.slow),
    pytest.param("export --component vae_decoder --exporter dynamo --output x.onnx", marks=pytest.mark.slow),
    pytest.param("build -b onnxruntime", marks=pytest.mark.slow),
    pytest.param("txt2img -p x --steps 2 -o x.png -b openvino", marks=pytest.mark.slow),
    pytest.param("verify -b onnxruntime --steps 2 -o report", marks=pytest.mark.slow),
    pytest.param("bench -b onnxruntime --steps 2 --warmups 1 --repeats 1", marks=pytest.mark.slow),
    pytest.param("inspect", marks=pytest.mark.slow),
    "doctor",
    "engines verify",
    "engines prune",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_leaves_nothing_but_its_output(words, tmp_path, engine_dir):
    work, precious = tmp_path / "work", tmp_path / "precious"
    folders = {"HOME": "home", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "TMPDIR": "tmp"}
    for name in ("work", *folders.values()):
        (tmp_path / name).mkdir()
    Image.new("RGB", (128, 128), "red").save(work / "init.png")
    precious.write_text("kept")
    (tmp_path / "tmp" / ".ses").symlink_to(precious)  # ONNX Runtime's telemetry writes through it
    unset = ("ORT_DISABLE_TELEMETRY", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {name: str(tmp_path / folder) for name, folder in folders.items()}
    environment |= {"PYTHONPATH": str(REPOSITORY), "SDTRT_ENGINE_DIR": str(engine_dir)}
    command = [sys.executable, "-m", "sdtrt", *words.split()]
    ended = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    left = [path for folder in folders.values() for path in (tmp_path / folder).rglob("*") if path.name != ".ses"]
    assert left == []
    assert precious.read_text() == "kept"
    assert {path.name for path in work.iterdir()} <= {"init.png", "x.png", "x.onnx", "x.onnx.data", "report"}


def test_telemetry_is_off_whatever_the_environment_says():
    code = "import sdtrt, os; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "0"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "1 1\n"


@pytest.mark.parametrize(
    "path", [*REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("benchmarks/*.py"), *REPOSITORY.glob("tests/f*.py")]
)
def test_no_program_imports_what_tells_before_it_is_told_not_to(path):
    """Tests begin with conftest.py."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append((node.module or "").split(".")[0])
    telling = min((names.index(name) for name in TELLING if name in names), default=len(names))
    assert telling == len(names) or {"sdtrt", "factories"} & set(names[:telling]), names[telling]

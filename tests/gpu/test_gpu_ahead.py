"""What is begun in the background for a GPU, beside PyTorch's and TensorRT's own use of it, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_engines
import numpy as np
import pytest
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT
from PIL import Image

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]

TOGETHER = """
import ctypes, sys, threading
from pathlib import Path
from sdtrt.cli.prewarm import start_gpu
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs import GenerateSpec
start_gpu(GenerateSpec(("x",), backend="tensorrt"), EngineDirectory(Path("no such folder")))
import torch
assert float(torch.ones(2, device="cuda").sum()) == 2  # at once: the background may still be at work
for thread in threading.enumerate():
    if thread.name.startswith("sdtrt-"):
        thread.join()
assert {"tensorrt", "tensorrt_lean"} & set(sys.modules), "TensorRT was not imported"
driver, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0 and active.value == 1
from sdtrt.backends.tensorrt.versions import libraries
library = libraries.open_library("tensorrt")
assert library.module.Runtime(library.logger) is not None
assert float(torch.ones(3, device="cuda").sum()) == 3
"""
FAILS = """
from pathlib import Path
from sdtrt.cli.prewarm import start_gpu
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs import GenerateSpec
start_gpu(GenerateSpec(("x",)), EngineDirectory(Path("no such folder")))
raise SystemExit(3)
"""
# A whole command. It writes which plans were deserialised, and by which thread, to the file that is named first.
COMMAND = """
import json, sys, threading
from pathlib import Path
from sdtrt.backends.tensorrt.versions import running
from sdtrt.cli.main import main
calls, load, marks = [], running.load_engine, Path(sys.argv.pop(1))
def noting(library, plan, **options):
    calls.append([plan.parent.name, plan.name, threading.current_thread().name])
    return load(library, plan, **options)
running.load_engine = noting
try:
    main()
finally:
    marks.write_text(json.dumps(calls))
"""


@pytest.mark.parametrize(("script", "code"), [(TOGETHER, 0), (FAILS, 3)])
def test_a_process_goes_on_beside_it_and_ends_well(script, code):
    done = run(script)
    assert done.returncode == code, done.stderr[-2000:]


def run(script, *arguments):
    """A script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("size", [128, 512])
def test_a_command_loads_its_plans_once_while_python_imports(size, directory, tmp_path):
    """The second time: by then the engine is the one that was used last. At 512 it is in pieces."""
    gpu_engines.engine("split" if size == 512 else "dynamic", directory)
    words = [
        "txt2img",
        "-p",
        "a red circle on a blue background",
        "-b",
        "tensorrt",
        "--component",
        "unet",
        "--no-build",
    ]
    words += ["-H", size, "-W", size, "--steps", 2, "--seed", 1, "--json", "--engine-dir", directory.path]
    for number in range(2):
        done = run(COMMAND, tmp_path / "calls.json", *words, "-o", tmp_path / f"{number}.png")
        assert done.returncode == 0, done.stderr[-2000:]
    name = json.loads(done.stdout)["engine"]["name"]
    plans = [file for file in directory.named(name).files if file.startswith("engine.plan") and file[-4:] != "json"]
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert sorted(call[:2] for call in calls) == sorted([name, plan] for plan in plans)
    assert {call[2] for call in calls} <= {"sdtrt-tensorrt", "MainThread"}  # whichever came first
    print(f"loaded by {calls}")
    one, other = (np.asarray(Image.open(tmp_path / f"{number}.png")).astype(int) for number in range(2))
    assert one.shape == (size, size, 3)
    assert np.abs(one - other).max() <= 2  # normalised by atomics

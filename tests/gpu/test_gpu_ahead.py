"""What is begun in the background for a GPU, beside PyTorch's and TensorRT's own use of it, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]

TOGETHER = """
import ctypes, sys, threading
from sdtrt.ahead import start_gpu
start_gpu("tensorrt")
import torch
assert float(torch.ones(2, device="cuda").sum()) == 2  # at once: the background may still be at work
for thread in threading.enumerate():
    if thread.name.startswith("sdtrt-"):
        thread.join()
assert {"tensorrt", "tensorrt_lean"} & set(sys.modules), "TensorRT was not imported"
driver, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0 and active.value == 1
from sdtrt import trt_api
library = trt_api.open_library("tensorrt")
assert library.module.Runtime(library.logger) is not None
assert float(torch.ones(3, device="cuda").sum()) == 3
"""
FAILS = "from sdtrt.ahead import start_gpu; start_gpu('auto'); raise SystemExit(3)"


@pytest.mark.parametrize(("script", "code"), [(TOGETHER, 0), (FAILS, 3)])
def test_a_process_goes_on_beside_it_and_ends_well(script, code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-2000:]

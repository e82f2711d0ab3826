"""What is begun in the background for a GPU: with a driver compiled here, and a library that notes its import."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.cli import prewarm
from sdtrt.common import host

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static int said = 0;
int cuInit(unsigned flags) {
    if (!said++) { usleep(300000); fprintf(stderr, "driver: %s\\n", getenv("CUDA_MODULE_LOADING")); }
    return 0;
}
int cuDeviceGetCount(int *count) { *count = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
static int active = 0;
int cuDevicePrimaryCtxRetain(void **context, int device) {
    active = 1; fprintf(stderr, "driver: context\\n"); return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *found) { *found = active; return 0; }
"""


def wait():
    """Wait for all threads that were begun."""
    for thread in threading.enumerate():
        if thread.name.startswith("sdtrt-"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A TensorRT by another name, as a backend's only one; it notes the thread that imports it."""
    name = "library_of_test_ahead"
    (tmp_path / f"{name}.py").write_text("import threading\nthread = threading.current_thread().name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        libraries, "MODULES", {"tensorrt": ("no_such_library", name), "tensorrt-rtx": ("not_this_one",)}
    )
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def known(value):
    """What `wake_gpu` has found."""
    future = Future()
    future.set_result(value)
    return future


@pytest.mark.parametrize("backend", ["tensorrt", "auto"])
def test_tensorrt_is_imported_in_the_background(library, backend):
    prewarm.import_tensorrt(backend, known(True))
    wait()
    assert sys.modules[library].thread == "sdtrt-tensorrt"


def test_it_waits_for_the_gpu(library):
    gpu = Future()
    prewarm.import_tensorrt("tensorrt", gpu)
    time.sleep(0.05)
    assert library not in sys.modules
    gpu.set_result(True)
    wait()
    assert library in sys.modules


@pytest.mark.parametrize(
    ("backend", "gpu"), [("tensorrt", False), ("tensorrt-rtx", True), ("torch", True), ("onnxruntime", True)]
)
def test_without_a_gpu_or_for_another_backend_nothing_is_imported(library, backend, gpu):
    prewarm.import_tensorrt(backend, known(gpu))
    wait()
    assert library not in sys.modules


@pytest.mark.parametrize(("wanted", "comes"), [({"tensorrt"}, True), ({"inductor"}, False), (set(), False)])
def test_for_auto_it_comes_where_its_engines_are_there(library, wanted, comes):
    prewarm.import_tensorrt("auto", known(True), wanted=wanted)
    wait()
    assert (library in sys.modules) == comes


@pytest.mark.parametrize("there", [True, False])
def test_what_computes_is_loaded_in_the_background(monkeypatch, there):
    threads, convolve = [], torch.nn.functional.conv2d

    def noting(*arguments, **options):
        result = convolve(*arguments, **options)
        threads.append(threading.current_thread().name)
        return result

    monkeypatch.setattr(torch.nn.functional, "conv2d", noting)
    prewarm.start_libraries(known(there), device="cpu")
    wait()
    assert threads == ["sdtrt-libraries"] * there


def test_without_a_context_of_the_gpu_nothing_is_computed_on_it(monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(host, "has_primary_context", lambda index: False)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("a context is made"))
    prewarm.start_libraries(known(True))
    wait()
    assert not recwarn.list


def test_a_library_that_fails_is_left_for_the_command_to_meet(library, tmp_path, recwarn):
    (tmp_path / f"{library}.py").write_text("raise OSError('libnvinfer.so.8: cannot open shared object file')\n")
    prewarm.import_tensorrt("tensorrt", known(True))
    wait()
    assert library not in sys.modules
    assert not recwarn.list


def test_a_driver_that_fails_is_no_gpu_and_nobody_waits_for_it(library, monkeypatch):
    monkeypatch.setattr(host, "open_primary_context", lambda: 1 // 0)
    gpu = prewarm.wake_gpu()
    prewarm.import_tensorrt("tensorrt", gpu)
    wait()
    assert isinstance(gpu.exception(), ZeroDivisionError)
    assert library not in sys.modules


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(("setting", "expected"), [(None, "LAZY"), ("EAGER", "EAGER")])
def test_a_process_that_fails_at_once_ends_well_while_the_driver_starts(tmp_path, setting, expected):
    """A real driver library as far as the linker is concerned; and wrong usage never comes to it."""
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run([*command, tmp_path / "driver.c"], check=True)
    variables = {key: value for key, value in os.environ.items() if key != "CUDA_MODULE_LOADING"}
    variables |= {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    variables |= {"CUDA_MODULE_LOADING": setting} if setting else {}
    words = ["txt2img", "--prompt", "x", "--backend", "tensorrt", "--init-image", "a.png"]
    usage = subprocess.run([sys.executable, "-m", "sdtrt", *words], env=variables, capture_output=True, text=True)
    assert (usage.returncode, "driver" in usage.stderr) == (
        2,
        False,
    )  # what is wrong with the words costs no GPU's time
    script = "from sdtrt.cli.prewarm import wake_gpu; wake_gpu(); raise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == f"driver: {expected}\ndriver: context\n"
    script = """
from sdtrt.cli import prewarm as ahead; from sdtrt.common import host
assert not host.has_primary_context()
assert ahead.wake_gpu().result()
assert host.has_primary_context()
"""
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

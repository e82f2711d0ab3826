"""What the doctor finds: present, optional or missing, each with the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys

import pytest

from sdtrt.backends import registry
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common import host
from sdtrt.common.errors import EngineError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.reports import doctor

RTX = host.Gpu("Some RTX", (8, 9), 24 * 2**30)


def finding(diagnosis, name):
    return next(found for found in diagnosis.findings if found.name == name)


def test_a_cpu_alone_is_healthy(directory, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: ())
    diagnosis = doctor.diagnose(directory)
    assert diagnosis.healthy
    assert set(diagnosis.backends) - {"inductor", "openvino"} == {"onnxruntime", "torch"}, "a compiler, an extra"
    assert finding(diagnosis, "GPU").state == "optional"
    assert not directory.path.exists(), "looking makes nothing"


def test_a_missing_library_is_named_with_its_install(directory, monkeypatch):
    real = host.library_version
    monkeypatch.setattr(host, "library_version", lambda name: None if name == "onnxruntime" else real(name))
    diagnosis = doctor.diagnose(directory)
    assert not diagnosis.healthy
    assert finding(diagnosis, "onnxruntime").mend == "pip install onnxruntime"
    assert "onnxruntime" not in diagnosis.backends


def test_an_extra_that_is_missing_is_named_with_its_install(directory, monkeypatch):
    real = host.library_version
    monkeypatch.setattr(host, "library_version", lambda name: None if name == "openvino" else real(name))
    found = finding(doctor.diagnose(directory), "openvino")
    assert (found.state, found.mend) == ("optional", "pip install 'sdtrt[openvino]'")


def test_libraries_that_are_compiled_at_each_start_are_named(directory, monkeypatch, tmp_path):
    """PYTHONPYCACHEPREFIX moves all bytecode: in an empty folder there is none, until the command is followed."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    found = finding(doctor.diagnose(directory), "bytecode")
    assert (found.state, found.detail.partition(":")[0]) == ("optional", "torch, diffusers, transformers")
    python, *arguments = shlex.split(found.mend)
    assert (python, arguments[:3]) == ("python", ["-m", "compileall", "-q"])
    variables = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-l", *arguments[3:]], env=variables, check=False)
    assert finding(doctor.diagnose(directory), "bytecode").state == "ok"


def test_a_gpu_that_pytorch_cannot_use_is_said_so(directory, monkeypatch):
    import torch

    monkeypatch.setattr(host, "gpus", lambda: (RTX,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = finding(doctor.diagnose(directory), "GPU")
    assert "Some RTX (compute capability 8.9, 24 GiB)" in found.detail
    assert "torch" in found.mend


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize(("capability", "state"), [((8, 9), "ok"), ((9, 0), "optional")])
def test_tensorrt_for_rtx_serves_the_gpus_that_it_serves(directory, monkeypatch, capability, state):
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("A GPU", capability, 2**34),))
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    diagnosis = doctor.diagnose(directory)
    assert finding(diagnosis, "tensorrt-rtx").state == state
    assert ("tensorrt-rtx" in diagnosis.backends) == (state == "ok")


def test_a_tensorrt_that_cannot_be_loaded_is_a_finding_and_no_end(directory, monkeypatch):
    def broken(backend):
        raise EngineError(
            f"{backend} is installed but can't be loaded: no libcublas", hint="pip install --force-reinstall"
        )

    monkeypatch.setattr(libraries, "open_library", broken)
    found = finding(doctor.diagnose(directory), "tensorrt")
    assert (found.state, found.mend) == ("optional", "pip install --force-reinstall")
    assert "no libcublas" in found.detail


def test_an_engine_directory_that_cannot_be_written_is_not_healthy(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    diagnosis = doctor.diagnose(EngineDirectory(resolve.TINY.parent / "engines"))
    assert finding(diagnosis, "engine directory").state == "missing"
    assert "--engine-dir" in finding(diagnosis, "engine directory").mend
    assert not diagnosis.healthy


def test_it_says_what_auto_builds_here_and_why(directory, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: ())
    assert finding(doctor.diagnose(directory), "auto").detail.startswith("onnxruntime where no engines are there: no")
    monkeypatch.setattr(host, "gpus", lambda: (RTX,))
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    monkeypatch.setattr(type(registry.get("inductor")), "why_not", lambda self: None)
    assert finding(doctor.diagnose(directory), "auto").detail.startswith("inductor where no engines are there: Some")


def test_json_has_the_host(directory):
    report = doctor.diagnose(directory).to_json()
    assert report["host"]["versions"]["torch"] == host.library_version("torch")

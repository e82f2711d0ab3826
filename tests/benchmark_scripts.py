"""How tests run the scripts of `benchmarks/`: as programs, and as modules."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments, timeout_s=240, **variables):
    """Run Python; it must end well."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def run(script, *arguments, **variables):
    """Run a benchmark."""
    run_python(ROOT / "benchmarks" / script, *arguments, **variables)


def module(name):
    """A fixture: one of `benchmarks/` as a module."""

    @pytest.fixture(name=name)
    def load(monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)

    return load

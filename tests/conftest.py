"""What several test modules share: one small random model, and one engine directory, so that engines are built once.

Fixtures import what is large: the process of pytest-xdist that hands out the tests runs none, and starts without it.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import os
import signal
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Jobs in the background ignore it, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models are small; more threads only wait for each other where the cores are shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _stderr_of_each_test():
    """The console that tests share writes to the stderr of its first warning, which a capturing test closes."""
    from sdtrt.common.console import QUIET

    yield
    QUIET._rich = None


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of this test run, the same one for all processes of pytest-xdist."""
    return of_the_run(tmp_path_factory)


def of_the_run(tmp_path_factory):
    """The same folder, for fixtures that serve files in which `shared` is another."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """A diffusers folder in Stable Diffusion 1.x format with small random weights; tests must not change it."""
    import factories

    return factories.sd1_folder(tmp_path_factory.mktemp("models") / "sd1", layers_per_block=1)


@pytest.fixture(scope="session")
def smallest(tmp_path_factory):
    """The same with a UNet of two resolutions: what engines are built of, as that takes a third of the time."""
    import factories

    return factories.sd1_folder(tmp_path_factory.mktemp("models") / "smallest", **factories.SMALLEST["sd1"])


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory):
    """The engine directory that tests share; it gains engines and must lose none."""
    return tmp_path_factory.mktemp("shared") / "engines"


@pytest.fixture(scope="session")
def tiny_engines(shared):
    """An engine directory with all that the built-in model has in ONNX Runtime, built once in a test run: to be copied.

    They are built as a user does it, by the command, and serve any size.
    """
    from benchmark_scripts import run_python
    from exports import made_once

    def build(draft):
        run_python("-m", "sdtrt", "build", "--quiet", "--backend", "onnxruntime", "--engine-dir", draft)

    return made_once(shared / "tiny-engines", build)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small CLIP tokenizer for the pipelines that a file's tests make in memory."""
    import factories

    return factories.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def directory(tmp_path):
    """An engine directory of the test's own, which is not there yet."""
    from sdtrt.engines.directory import EngineDirectory

    return EngineDirectory(tmp_path / "engines")


@pytest.fixture
def probed_once(tmp_path_factory):
    """What Inductor's builds find out of this processor is found out once in a test run: seconds of each build."""
    import compiled

    with compiled.probed_once(of_the_run(tmp_path_factory)):
        yield


@pytest.fixture
def compiled_once(tmp_path_factory):
    """The same, and of a key Inductor compiles one package in a test run."""
    import compiled

    with compiled.compiled_once(of_the_run(tmp_path_factory)):
        yield


@pytest.fixture
def folder(tmp_path, engine_dir, monkeypatch):
    """An empty working folder; the engine directory is the tests' shared one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDTRT_ENGINE_DIR", str(engine_dir))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process (torch is loaded already); returns exit code, stdout and stderr."""
    from sdtrt.cli.main import main

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdtrt", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture
def on_the_cpu(request, monkeypatch):
    """The same tests everywhere: a GPU is used by those that ask for one."""
    import torch

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

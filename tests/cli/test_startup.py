"""Imports without the search for reference cycles, and everything as before afterwards."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrt.cli.prewarm import quick_imports

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _unfrozen():
    yield
    gc.unfreeze()
    gc.enable()


def test_cycles_are_searched_again_afterwards_but_not_in_what_was_imported():
    before = gc.get_freeze_count()
    with quick_imports():
        assert not gc.isenabled()
        kept = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_an_import_that_fails_leaves_it_on():
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_who_had_it_off_keeps_it_off():
    gc.disable()
    with quick_imports():
        pass
    assert not gc.isenabled()


# Nothing of that is needed to make images where engines are there; the first brings the onnx package.
EXPORTING = {"sdtrt.exports.component", "sdtrt.exports.onnx_file"}


def imported(name, found):
    """Add a module of sdtrt to `found`, and all those that come with it when it is imported."""
    parent = name.rpartition(".")[0]
    folder = ROOT / name.replace(".", "/")
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if name in found or not path.is_file():
        return
    found.add(name)
    imported(parent, found)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for one in names:
            imported(one, found)


def test_what_makes_images_names_no_exporter_at_its_beginning():
    found = set()
    imported("sdtrt.pipeline.runs.generate", found)
    assert found > {"sdtrt", "sdtrt.pipeline.opening.open", "sdtrt.engines.directory", "sdtrt.specs"}
    assert not EXPORTING & found
    imported("sdtrt.exports.to_file", found)
    assert found > EXPORTING, "the search finds what is there"


@pytest.mark.slow
def test_what_makes_images_imports_no_exporter():
    script = f"import sys, sdtrt.pipeline.runs.generate; print(sorted({EXPORTING} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""Imports without the search for reference cycles, and everything as before afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from sdtrt.cli.prewarm import quick_imports


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


def test_what_makes_images_imports_no_exporter():
    """Nothing of that is needed where engines are there; `sdtrt.exports.component` brings the onnx package."""
    exporting = "{'sdtrt.exports.component', 'sdtrt.exports.onnx_file'}"
    script = f"import sys, sdtrt.pipeline.generate; print(sorted({exporting} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

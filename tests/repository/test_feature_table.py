"""The table of features is what the tests' marks say, and no mark says what its test does not look for."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

MARKED = """
@pytest.mark.feature("Text to image", "sd1 sdxl", "onnxruntime inductor")
def test_it():
    pass

@pytest.mark.feature("Text to image", "sd2", "tensorrt86", error="no such UNet")
@pytest.mark.feature("Text to image", "sd2", "inductor", pytorch="runs it")
def test_other():
    with pytest.raises(EngineError, match="no such UNet"):
        pass
    assert "PyTorch runs it" in said
"""


@pytest.fixture
def feature_table(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return importlib.import_module("feature_table")


@pytest.fixture
def run(feature_table):
    def ran(root, *arguments):
        return feature_table.main(["--root", str(root), *arguments])

    return ran


@pytest.fixture
def project(tmp_path, monkeypatch, feature_table):
    """A repository with one page and one file of tests."""
    monkeypatch.setattr(feature_table, "FEATURES", ("Text to image",))
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs" / "features.md").write_text("# F\n\n<!-- features -->\n<!-- /features -->\n\nThe rest.\n")

    def made(text):
        (tmp_path / "tests" / "test_some.py").write_text(text)
        return tmp_path

    return made


def test_the_page_of_this_repository_is_what_its_tests_say(run):
    assert run(REPOSITORY, "--check") == 0


def test_marks_become_a_table_which_then_agrees(project, run, capsys):
    root = project(MARKED)
    assert run(root, "--check") == 1
    assert "run python scripts/feature_table.py" in capsys.readouterr().err
    assert run(root) == 0
    text = (root / "docs" / "features.md").read_text()
    works = "works: SD 1.x, XL"
    row = f"| Text to image | {works} | – | {works}; PyTorch: SD 2.x (1) | – | refused: SD 2.x (2) |\n"
    assert row in text
    assert "1. PyTorch runs it: `runs it`.\n2. An error: `no such UNet`.\n" in text
    assert text.endswith("<!-- /features -->\n\nThe rest.\n")
    assert run(root, "--check") == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MARKED.replace('match="no such UNet"', "match=NAME"), "no test in this file looks for 'no such UNet'"),
        (MARKED.replace("sd1", "sd3"), "unknown kind 'sd3'; known: sd1, sd2, sdxl"),
        (MARKED.replace("inductor", "ncnn"), "unknown backend 'ncnn'"),
        (MARKED.replace("Text to", "Text"), "unknown feature 'Text image'; known: Text to image"),
        (MARKED.replace("pytorch=", "torch="), "unknown outcome 'torch'"),
        (MARKED.replace('"sd2"', "KIND"), "as plain strings"),
        ("", "no test proves Text to image"),
    ],
)
def test_marks_that_can_not_be_are_named(project, run, text, words, capsys):
    assert run(project(text)) == 1
    assert words in capsys.readouterr().err

"""What docstrings and comments name is there: no other tool reads them when a module moves."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("sdtrt", "benchmarks", "scripts", "tests")
MENTION = re.compile(r"`([a-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`")
ELSEWHERE = {*sys.stdlib_module_names, "torch", "onnxruntime", "diffusers", "transformers", "pycuda", "trt"}
FILES = ("json", "md", "py", "plan", "data", "onnx", "cpp", "txt", "safetensors", "toml")


def defined(tree: ast.Module) -> set[str]:
    """The names that a module's code gives to something, at any depth."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return found | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@cache
def modules() -> dict[str, set[str]]:
    """The product's modules and folders by their own names, with what is in them; several may share a name."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in (REPOSITORY / folder).rglob("*.py"):
            found.setdefault(path.stem, set()).update(defined(ast.parse(path.read_text(encoding="utf-8"))))
            found.setdefault(path.parent.name, set()).add(path.stem)
    for path in (REPOSITORY / "sdtrt").rglob("*/"):
        found.setdefault(path.parent.name, set()).add(path.name)
    return found


def is_there(mention: str, own: set[str]) -> bool:
    """Whether a dotted name means a module's something, a variable of the file that says so, a file, or a library's."""
    first, *rest = mention.split(".")
    if first in ELSEWHERE or first in own or rest[-1] in FILES:
        return True
    known = modules()
    return first in known and all(name in known.get(owner, {name}) for owner, name in pairwise([first, *rest]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_text_names_is_there(folder):
    missing = []
    for path in (REPOSITORY / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - modules().keys()
        missing += [f"{path.name}: {mention}" for mention in MENTION.findall(text) if not is_there(mention, own)]
    assert missing == []


def test_a_module_that_is_gone_is_noticed():
    assert is_there("parity.check_onnx", set())
    assert is_there("exports.parity.check_onnx", set())
    assert not is_there("comparing.check_onnx", set())
    assert not is_there("parity.check_everything", set())

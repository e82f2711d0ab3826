"""The table of kinds of errors in docs/troubleshooting.md has words that errors have."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
_TABLE = PAGE.split("## Every error")[0].split("## Kinds")[1]
KINDS = re.findall(r"^\| (`[^|]+) \| [^|]+ \| [^|]+ \|$", _TABLE, re.MULTILINE)
LEAST = 3 / 4  # of the rows below that table are of one of its kinds


@cache
def said():
    """What errors and other texts say, as far as the code has it in one place, with … for what differs."""
    found = []
    for path in (ROOT / "sdtrt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def words():
    return [word for row in KINDS for word in re.findall(r"`([^`]+)`", row)]


def test_there_are_kinds():
    assert len(KINDS) >= 15


@pytest.mark.parametrize("word", words())
def test_errors_have_the_words_by_which_their_kind_is_told(word):
    assert word in said(), f"no error says {word!r} any more"


def test_most_errors_of_the_table_are_of_a_kind():
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)`", PAGE.split("<!-- table: failures -->")[1], re.MULTILINE)
    without = [row for row in rows if not any(word in row for word in words())]
    assert len(without) <= (1 - LEAST) * len(rows), without

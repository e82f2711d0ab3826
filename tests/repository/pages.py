"""README.md and docs/ as tests read them: their fenced blocks, their prose, their links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [README, *DOCS]

_BLOCK = re.compile(r"(?:^<!-- (?P<comment>[^\n]*) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_NO_PROSE = re.compile(r"^```.*?^```$|<!--.*?-->|^#[^\n]*$|^\|[^\n]*$|!\[[^\]]*\]\([^)]*\)", re.M | re.S)
_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_BOUNDARY = re.compile(r"(?<=[.!?])\**\s+(?=[A-Z0-9*\[…]|sdtrt|diffusers|$)|\n\s*\n|\n\s*(?:[-*]|\d+\.) ")


@dataclass(frozen=True)
class Block:
    """A fenced block. `excuse` says why it is not run; None for one that is."""

    page: Path
    number: int
    language: str
    text: str
    excuse: str | None

    @property
    def name(self) -> str:
        """How tests call it."""
        return f"{self.page.stem}-{self.number}-{self.language}"


def blocks() -> Iterator[Block]:
    """The `sh` and `python` blocks of all pages."""
    for page in PAGES:
        for number, found in enumerate(_BLOCK.finditer(page.read_text(encoding="utf-8")), 1):
            if found["language"] in ("sh", "python"):
                yield Block(page, number, found["language"], found["text"], _excuse(found["comment"] or ""))


def _excuse(comment: str) -> str | None:
    """Why a block is not run: the comment before it says so. `.ci/run` runs the test command."""
    if comment == "test-command":
        return "it is what runs this test"
    _, marked, reason = comment.partition("not run: ")
    return reason if marked else None


def prose(page: Path) -> str:
    """A page without code, tables, headings, comments, pictures and the targets of links."""
    return _LINK.sub(r"\g<text>", _CODE.sub("…", _NO_PROSE.sub("", page.read_text(encoding="utf-8"))))


def sentences(page: Path) -> list[str]:
    """The sentences of a page; an item of a list is one at least."""
    return [" ".join(piece.split()) for piece in _BOUNDARY.split(prose(page)) if piece and piece.strip()]


def words(text: str) -> list[str]:
    """The words of a text: what has a letter or a digit."""
    return [word for word in text.split() if re.search(r"\w", word)]


def links(page: Path) -> list[str]:
    """The targets of a page's links within the repository."""
    targets = (found["target"] for found in _LINK.finditer(page.read_text(encoding="utf-8")))
    return [target for target in targets if "://" not in target]

"""Reads prompts as web UIs write them: weights in brackets, BREAK, and chunks of as many tokens as an encoder takes.

The rules are those of stable-diffusion-webui, so that its prompts mean the same here. Knows tokenizers and no encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrt.common.errors import UsageError

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies by
COMMA, BACK = ",</w>", 20  # a full chunk ends at a comma, where one is among so many tokens before its end
MOST_BRACKETS = 100  # that are open at once
MOST_WEIGHT = 1000
_PARTS = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)|[^\\()\[\]:]+|[\\:]")
_BREAK = re.compile(r"\bBREAK\b")
# What web UIs take for more than text, and nothing here does.
_OTHERS = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>]+>|\[[^\[\]:|]*:(?:[^\[\]:|]*:)?\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\]|\[[^\[\]|]*\|[^\[\]]*\]|\bAND\b"
)

Token = tuple[int, float]  # and its weight
Group = list[Token]  # which stays together: the vectors of an embedding


@dataclass
class _Piece:
    text: str
    weight: float = 1.0


def check_syntax(text: str) -> None:
    """Raise `UsageError` for what web UIs read in a prompt, and this does not."""
    if found := _OTHERS.search(text):
        raise UsageError(
            f"--prompt-syntax webui reads weights and BREAK, not {found[0][:40]!r}",
            hint="take that out of the prompt (--lora takes a LoRA), or use --prompt-syntax plain for text as it is",
        )


def sections(text: str) -> list[list[tuple[str, float]]]:
    """The texts of a prompt with their weights, in the sections that BREAK parts.

    Raises:
        UsageError: for more open brackets than anybody means.
    """
    pieces: list[_Piece] = []
    rounds: list[int] = []  # where brackets that are open begin
    squares: list[int] = []
    for part in _PARTS.findall(text):
        if part in ("(", "["):
            (rounds if part == "(" else squares).append(len(pieces))
            if max(len(rounds), len(squares)) > MOST_BRACKETS:
                raise UsageError(f"a prompt opens more than {MOST_BRACKETS} brackets", hint="close some, or write \\(")
        elif part[0] == ":" and part[-1] == ")" and rounds:
            _multiply(pieces[rounds.pop() :], _weight(part[1:-1]))
        elif part == ")" and rounds:
            _multiply(pieces[rounds.pop() :], ROUND)
        elif part == "]" and squares:
            _multiply(pieces[squares.pop() :], SQUARE)
        else:
            pieces.append(_Piece(part[1:] if len(part) == 2 and part[0] == "\\" else part))
    for starts, weight in ((rounds, ROUND), (squares, SQUARE)):
        for start in starts:
            _multiply(pieces[start:], weight)
    return _parted(pieces)


def _weight(text: str) -> float:
    weight = float(text)
    if abs(weight) > MOST_WEIGHT:
        raise UsageError(
            f"the weight {text.strip()[:40]} is beyond {MOST_WEIGHT}", hint="weights are from 0.5 to 1.5, usually"
        )
    return weight


def _multiply(pieces: Sequence[_Piece], weight: float) -> None:
    for piece in pieces:
        piece.weight *= weight


def _parted(pieces: Sequence[_Piece]) -> list[list[tuple[str, float]]]:
    """The pieces between BREAKs, without the spaces beside these; neighbours of one weight are one text."""
    found: list[list[tuple[list[str], float]]] = [[]]
    for piece in pieces:
        first, *rest = _BREAK.split(piece.text)
        texts = [
            first.rstrip() if rest else first,
            *(text.strip() for text in rest[:-1]),
            *(one.lstrip() for one in rest[-1:]),
        ]
        for number, text in enumerate(texts):
            if number:
                found.append([])
            if found[-1] and found[-1][-1][1] == piece.weight:
                found[-1][-1][0].append(text)
            elif text:
                found[-1].append(([text], piece.weight))
    return [[("".join(texts), weight) for texts, weight in own] for own in found]


def chunks_of(tokenizer: Any, text: str) -> list[list[Token]]:
    """A prompt's tokens in chunks that fit a text encoder, without start, end and padding; at least one chunk."""
    room = tokenizer.model_max_length - 2
    comma = tokenizer.get_vocab().get(COMMA, -1)
    parted = sections(text)
    found: list[list[Token]] = []
    for number, section in enumerate(parted, 1):
        groups = [group for text, weight in section for group in _groups(tokenizer, text, weight)]
        if groups or number < len(parted) or not found:
            found += _cut(groups, room, comma)
    return found


def _cut(groups: Sequence[Group], room: int, comma: int) -> Iterator[list[Token]]:
    """Chunks of at most so many tokens, which end at a comma where there is one near the end."""
    own: list[Token] = []
    last = -1  # where the last comma is
    for group in groups:
        if group[0][0] == comma:
            last = len(own)
        elif len(own) == room and last >= 0 and room - last <= BACK:
            yield own[: last + 1]
            own, last = own[last + 1 :], -1
        if len(own) + len(group) > room:
            yield own
            own, last = [], -1
        own.extend(group)
    yield own


def _groups(tokenizer: Any, text: str, weight: float) -> Iterator[Group]:
    """A text's tokens; those of an embedding of several vectors stay together."""
    group: Group = []
    first = ""
    names = tokenizer.added_tokens_encoder
    for number in ids_of(tokenizer, text):
        name = tokenizer.convert_ids_to_tokens(number)
        if group and name in names and name == f"{first}_{len(group)}":
            group.append((number, weight))
            continue
        if group:
            yield group
        group, first = [(number, weight)], name
    if group:
        yield group


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The numbers of a text's tokens, with as many for an embedding as it has vectors."""
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    whole = TextualInversionLoaderMixin()._maybe_convert_prompt(text, tokenizer)
    found: list[int] = tokenizer(whole, truncation=False, add_special_tokens=False).input_ids
    return found

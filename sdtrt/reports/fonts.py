"""Fonts for the pictures that commands make, by the letters that a text has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageFont

from sdtrt.common.errors import printable

NOBODYS = "\U0010ffff"  # a code point without a letter: fonts draw an empty box, or nothing


def legible(text: str, size: int) -> tuple[str, Any]:
    """A text and a font of `size` pixels to draw it with: the first one that has all its letters.

    Where no font has them all, those that the last one lacks are written as their escapes.
    """
    text = printable(text)
    for font in _fonts(size):
        lacking = {letter for letter in text if not _has(font, letter)}
        if not lacking:
            return text, font
    return "".join(ascii(letter)[1:-1] if letter in lacking else letter for letter in text), font


def _fonts(size: int) -> Iterator[Any]:
    """Pillow's own, which has little beside ASCII, and DejaVu Sans, as matplotlib brings it or the system has it."""
    yield ImageFont.load_default(size)
    found = importlib.util.find_spec("matplotlib")
    places = (found and found.submodule_search_locations) or ()
    files: list[str | Path] = [Path(place) / "mpl-data/fonts/ttf/DejaVuSans.ttf" for place in places]
    for file in (*files, "DejaVuSans.ttf"):
        try:
            yield ImageFont.truetype(file, size)
        except OSError:
            continue


def _has(font: Any, letter: str) -> bool:
    """Whether a font has a letter, or draws what it draws for none."""
    if letter.isspace():
        return True
    mask, box = font.getmask(letter), font.getmask(NOBODYS)
    return (mask.size, bytes(mask)) != (box.size, bytes(box))

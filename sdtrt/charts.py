"""A bar chart as an image, with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, ROW, BAR, MARGIN, GAP = 1200, 34, 22, 24, 12  # pixels
FONT_SIZE, TITLE_SIZE = 18, 22
OURS, OTHERS, INK, PAPER = "#2f7d4f", "#a9b4c0", "#20262d", "#ffffff"
MAX_BAR_SHARE = 0.86  # of the room beside the labels: the longest bar's figure stands behind it


@dataclass(frozen=True)
class Bar:
    """One bar: None is drawn as the word in `note`."""

    label: str
    value: float | None
    note: str
    highlighted: bool = False


@dataclass(frozen=True)
class Group:
    """Bars that may be compared with one another, on a scale of their own."""

    title: str
    bars: tuple[Bar, ...]


def bar_chart(groups: Sequence[Group]) -> Image.Image:
    """Horizontal bars from zero, one group below the other."""
    font, title_font = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(TITLE_SIZE)
    heights = [TITLE_SIZE + GAP + ROW * len(group.bars) + MARGIN for group in groups]
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(image)
    labels = [bar.label for group in groups for bar in group.bars]
    left = MARGIN + GAP + max((draw.textlength(label, font) for label in labels), default=0)
    top = MARGIN
    for group, height in zip(groups, heights, strict=True):
        draw.text((MARGIN, top), group.title, INK, title_font)
        _draw_bars(draw, group.bars, left, top + TITLE_SIZE + GAP, font)
        top += height
    return image


def _draw_bars(draw: ImageDraw.ImageDraw, bars: Sequence[Bar], left: float, top: float, font: Any) -> None:
    """The bars of one group, the longest as long as there is room for."""
    largest = max((bar.value for bar in bars if bar.value is not None), default=1.0) or 1.0
    room = (WIDTH - MARGIN - left) * MAX_BAR_SHARE
    for number, bar in enumerate(bars):
        y = top + number * ROW
        draw.text((left - GAP, y + BAR / 2), bar.label, INK, font, anchor="rm")
        end = left
        if bar.value is not None:
            end = left + max(1.0, room * bar.value / largest)
            draw.rectangle((left, y, end, y + BAR), OURS if bar.highlighted else OTHERS)
        draw.text((end + GAP, y + BAR / 2), bar.note, INK, font, anchor="lm")

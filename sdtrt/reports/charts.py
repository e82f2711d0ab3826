"""A bar chart as an image; Pillow alone does for names in ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sdtrt.reports.fonts import legible

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
    heights = [TITLE_SIZE + GAP + ROW * len(group.bars) + MARGIN for group in groups]
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(image)
    labels = [legible(bar.label, FONT_SIZE) for group in groups for bar in group.bars]
    left = MARGIN + GAP + max((draw.textlength(label, font) for label, font in labels), default=0)
    top = MARGIN
    for group, height in zip(groups, heights, strict=True):
        _write(draw, (MARGIN, top), group.title, size=TITLE_SIZE)
        _draw_bars(draw, group.bars, left, top + TITLE_SIZE + GAP)
        top += height
    return image


def _draw_bars(draw: ImageDraw.ImageDraw, bars: Sequence[Bar], left: float, top: float) -> None:
    """The bars of one group, the longest as long as there is room for."""
    largest = max((bar.value for bar in bars if bar.value is not None), default=1.0) or 1.0
    room = (WIDTH - MARGIN - left) * MAX_BAR_SHARE
    for number, bar in enumerate(bars):
        y = top + number * ROW
        _write(draw, (left - GAP, y + BAR / 2), bar.label, anchor="rm")
        end = left
        if bar.value is not None:
            end = left + max(1.0, room * bar.value / largest)
            draw.rectangle((left, y, end, y + BAR), OURS if bar.highlighted else OTHERS)
        _write(draw, (end + GAP, y + BAR / 2), bar.note, anchor="lm")


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, size: int = FONT_SIZE, anchor: str = "la"
) -> None:
    """A line of text."""
    line, font = legible(text, size)
    draw.text(place, line, INK, font, anchor=anchor)

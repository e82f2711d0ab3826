"""The pictures of `verify`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from sdtrt.reports import fonts
from sdtrt.reports.charts import Bar, Group, bar_chart
from sdtrt.reports.fonts import NOBODYS, legible
from sdtrt.reports.verify_pictures import comparison, error_plot


def test_the_comparison_shows_both_images_and_their_difference_enlarged(tmp_path):
    expected = np.full((64, 96, 3), 0.5, dtype=np.float32)
    actual = expected.copy()
    actual[:, 48:] += 0.01
    path = tmp_path / "picture.png"
    path.write_bytes(comparison(actual, expected, "engine"))
    with Image.open(path) as picture:
        width, height = picture.size
        sheet = np.asarray(picture).astype(int)
    assert (width, height) == (3 * 96 * 4, 64 * 4 + 24)
    middle = 24 + 128
    assert [tuple(sheet[middle, x]) for x in (100, 384 + 100, 768 + 100)] == [(128,) * 3, (128,) * 3, (0,) * 3]
    assert sheet[middle, 384 + 300, 0] == 130
    assert sheet[middle, 768 + 300, 0] > 240  # 0.01, made a hundred times as large


def test_pictures_of_broken_engines_can_be_drawn(tmp_path):
    expected = np.zeros((64, 64, 3), dtype=np.float32)
    comparison(np.full_like(expected, np.nan), expected, "engine")
    comparison(expected, expected, "engine")
    nothing = (math.nan, math.nan)
    (tmp_path / "plot.png").write_bytes(error_plot((9, 1), nothing, nothing, "engine"))
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 300


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn, each with the font."""
    found = []
    own = ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, **options):
        found.append((text, font))
        own(self, xy, text, fill=fill, font=font, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def is_box(font, letter):
    return bytes(font.getmask(letter)) == bytes(font.getmask(NOBODYS))


def test_no_letter_of_a_picture_is_an_empty_box(drawn):
    """Pillow's own font has no multiplication sign and no accents."""
    pixels = np.zeros((64, 96, 3), dtype=np.float32)
    comparison(pixels + 0.01, pixels, "engine")
    bar_chart([Group("modèle txt2img, 512×512: seconds", (Bar("onnxruntime fp32 · ours", 1.5, "1.5", True),))])
    texts = [text for text, _ in drawn]
    assert texts[:3] == ["PyTorch fp32", "engine", "difference × 100"]
    assert "modèle txt2img, 512×512: seconds" in texts
    assert not [letter for text, font in drawn for letter in text if is_box(font, letter) and letter != " "]
    assert is_box(ImageFont.load_default(14), "×")


def test_letters_that_no_font_has_are_escaped(monkeypatch):
    assert legible("中 é", 14)[0] == r"\u4e2d é"
    first = next(fonts._fonts(14))
    monkeypatch.setattr(fonts, "_fonts", lambda size: iter([first]))  # without matplotlib
    assert legible("a × b", 14) == (r"a \xd7 b", first)

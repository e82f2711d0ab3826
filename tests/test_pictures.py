"""The pictures of `verify`."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from sdtrt.pictures import comparison, error_plot


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

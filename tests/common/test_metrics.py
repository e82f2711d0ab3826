"""Metrics against values computed by hand, and their behaviour at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtrt.common.metrics import cosine, count_non_finite, max_abs, psnr, relative_l2, ssim

ALL = [relative_l2, cosine, max_abs, lambda a, e: psnr(a, e, data_range=1)]
vectors = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=20)


def test_values_by_hand():
    actual, expected = [3.0, 5.0], [3.0, 4.0]
    assert relative_l2(actual, expected) == pytest.approx(1 / 5)
    assert max_abs(actual, expected) == 1
    assert cosine([1, 0], [1, 1]) == pytest.approx(math.sqrt(0.5))
    assert cosine([1, 2], [-1, -2]) == pytest.approx(-1)
    # one of four 8-bit values is off by 10: MSE 25, 10·log10(255² / 25)
    assert psnr([10, 0, 0, 0], [0, 0, 0, 0], data_range=255) == pytest.approx(34.1514, abs=1e-4)
    assert psnr([0.1], [0.0], data_range=1) == pytest.approx(20)


@given(vectors)
def test_equal_arrays_are_best(values):
    assert relative_l2(values, values) == 0
    assert max_abs(values, values) == 0
    assert cosine(values, values) == pytest.approx(1)
    assert psnr(values, values, data_range=1) == math.inf


def test_zero_arrays():
    assert relative_l2([0.0], [0.0]) == 0
    assert relative_l2([1.0], [0.0]) == math.inf
    assert cosine([0.0], [0.0]) == 1
    assert cosine([1.0], [0.0]) == 0


def test_fp16_is_summed_without_overflow_or_loss():
    big = np.full(1000, 300, dtype=np.float16)  # 300² overflows fp16
    assert relative_l2(big, big / 2) == pytest.approx(1)
    assert cosine(big, big / 2) == pytest.approx(1)
    integers = np.array([0, 255], dtype=np.uint8)  # a difference that wraps around in uint8
    assert max_abs(integers, integers[::-1]) == 255


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_never_look_good(metric, bad):
    with np.errstate(invalid="ignore"):
        value = metric([bad, 1.0], [1.0, 1.0])
    assert not math.isfinite(value)
    assert metric is not ALL[3] or not value > 0  # an infinite PSNR would mean "equal"


@pytest.mark.parametrize("metric", ALL)
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match="shapes"):
        metric(np.zeros((2, 1)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="empty"):
        metric([], [])


def test_structural_similarity_by_hand():
    # of two even images the variances are 0: (2·a·e + C1) / (a² + e² + C1), C1 = (0.01·range)²
    actual, expected = np.full((16, 24, 3), 0.4), np.full((16, 24, 3), 0.5)
    wanted = (2 * 0.4 * 0.5 + 1e-4) / (0.4**2 + 0.5**2 + 1e-4)
    assert ssim(actual, expected, data_range=1) == pytest.approx(wanted)
    assert ssim(255 * actual, 255 * expected, data_range=255) == pytest.approx(wanted)


def test_structural_similarity_of_noise_is_low_and_of_equal_images_one():
    one, other = np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)
    assert ssim(one, one, data_range=1) == 1
    assert abs(ssim(one, other, data_range=1)) < 0.1
    with pytest.raises(ValueError, match="shapes"):
        ssim(one, other[:16], data_range=1)


def test_psnr_is_that_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    one, other = np.random.default_rng(0).random((2, 16, 16, 3))
    assert psnr(one, other, data_range=1) == pytest.approx(peak_signal_noise_ratio(one, other, data_range=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_never_similar(bad):
    image = np.zeros((16, 16, 3))
    spoiled = image.copy()
    spoiled[3, 4, 1] = bad
    assert count_non_finite(spoiled) == 1
    assert count_non_finite(image.astype(np.float16)) == 0
    assert math.isnan(ssim(spoiled, image, data_range=1))

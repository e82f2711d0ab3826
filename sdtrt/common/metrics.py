"""Measure how far two arrays are apart, and how alike they are.

All take arrays of one shape and compute in float64, so that fp16 inputs don't overflow and the order of summation
doesn't matter. A non-finite input gives a non-finite (or NaN) result: it never looks like a good one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sdtrt.common.errors import SdtrtError

FloatArray = npt.NDArray[np.float64]


def relative_l2(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Relative L2 error, `‖actual − expected‖₂ / ‖expected‖₂`; 0 is best. Two zero arrays have error 0."""
    a, e = _pair(actual, expected)
    difference, size = float(np.linalg.norm(a - e)), float(np.linalg.norm(e))
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def cosine(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Cosine similarity, `⟨actual, expected⟩ / (‖actual‖₂ ‖expected‖₂)`; 1 is best.

    Two zero arrays have 1, a zero array and another one 0.
    """
    a, e = _pair(actual, expected)
    sizes = float(np.linalg.norm(a)), float(np.linalg.norm(e))
    if 0 in sizes:
        return 1.0 if sizes == (0, 0) else 0.0
    return float(a @ e) / (sizes[0] * sizes[1])


def max_abs(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Largest absolute difference, `maxᵢ |actualᵢ − expectedᵢ|`, in the arrays' own unit; 0 is best."""
    a, e = _pair(actual, expected)
    return float(np.max(np.abs(a - e)))


def psnr(actual: npt.ArrayLike, expected: npt.ArrayLike, *, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB, `10·log₁₀(data_range² / MSE)`; infinity for equal arrays.

    Args:
        data_range: the span of possible values: 255 for 8-bit images, 1 for images in [0, 1], 2 for [−1, 1].
    """
    a, e = _pair(actual, expected)
    mean_square = float(np.mean((a - e) ** 2))
    if mean_square == 0:
        return math.inf
    if mean_square == math.inf:
        return -math.inf
    return 10 * math.log10(data_range**2 / mean_square)


def ssim(actual: npt.ArrayLike, expected: npt.ArrayLike, *, data_range: float) -> float:
    """Structural similarity of two colour images `[H,W,3]`, at most 1 (equal); by scikit-image.

    With Gaussian weights of σ = 1.5 over 11×11 pixels, as Wang et al. (2004) define it; the mean over the channels.

    Args:
        data_range: the span of possible values, as for `psnr`.

    Raises:
        SdtrtError: where scikit-image is not installed.
    """
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    _pair(a, e)
    if count_non_finite(a) or count_non_finite(e):
        return math.nan
    similarity = require_ssim()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(similarity(a, e, data_range=data_range, channel_axis=-1, **options))


def require_ssim() -> Any:
    """scikit-image's function, for those who want to know early that it is missing. Raises `SdtrtError`."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise SdtrtError("structural similarity needs scikit-image", hint="pip install scikit-image") from error
    return structural_similarity


def count_non_finite(values: npt.ArrayLike) -> int:
    """Count the values that are NaN or infinite."""
    array: npt.NDArray[Any] = np.asarray(values)
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def _pair(actual: npt.ArrayLike, expected: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both arrays, flat and in float64."""
    a: npt.NDArray[Any] = np.asarray(actual)
    e: npt.NDArray[Any] = np.asarray(expected)
    if a.shape != e.shape:
        raise ValueError(f"can't compare arrays of shapes {a.shape} and {e.shape}")
    if a.size == 0:
        raise ValueError("can't compare empty arrays")
    return a.astype(np.float64).ravel(), e.astype(np.float64).ravel()

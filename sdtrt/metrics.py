"""How far two arrays are apart, and how alike they are.

All take arrays of one shape and compute in float64, so that fp16 inputs don't overflow and the order of summation
doesn't matter. A non-finite input gives a non-finite (or NaN) result: it never looks like a good one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

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


def _pair(actual: npt.ArrayLike, expected: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both arrays, flat and in float64."""
    a: npt.NDArray[Any] = np.asarray(actual)
    e: npt.NDArray[Any] = np.asarray(expected)
    if a.shape != e.shape:
        raise ValueError(f"can't compare arrays of shapes {a.shape} and {e.shape}")
    if a.size == 0:
        raise ValueError("can't compare empty arrays")
    return a.astype(np.float64).ravel(), e.astype(np.float64).ravel()

"""What `verify` shows: two images and their difference side by side, and the error over the timesteps, as PNGs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sdtrt.reports.fonts import legible

PANEL_PIXELS = 320  # a side: smaller pictures are shown enlarged
CAPTION_PIXELS, CAPTION_SIZE = 24, 14
SEPARATOR = " | "  # between captions: one font for all
MAX_GAIN = 1024  # of the difference that is shown

Array = npt.NDArray[Any]


def gradient(height: int, width: int) -> Image.Image:
    """A picture that is always the same, for models that make none from text alone: colours that change smoothly."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((255 * np.stack([across, down, 1 - across * down], axis=-1)).astype(np.uint8))


def half(height: int, width: int) -> Image.Image:
    """A mask that is always the same: the left half, in white."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, (width + 1) // 2, height))
    return mask


def comparison(actual: Array, expected: Array, label: str) -> bytes:
    """A PNG: the reference, the engine's image, and their difference, made large enough to be seen, side by side."""
    return differences([(expected, actual)], "PyTorch fp32", label)


def differences(pairs: Sequence[tuple[Array, Array]], expected_label: str, label: str) -> bytes:
    """A PNG: a line for each pair of a reference and an image, and their difference, enlarged alike in all lines."""
    lines = [(expected, np.nan_to_num(actual)) for expected, actual in pairs]
    found = [np.nan_to_num(np.abs(np.nan_to_num(actual) - expected), posinf=1) for expected, actual in pairs]
    largest = max(float(difference.max()) for difference in found)
    gain = min(MAX_GAIN, max(1, int(1 / largest))) if largest > 0 else 1
    rows = [(*line, difference * gain) for line, difference in zip(lines, found, strict=True)]
    return sheet(rows, (expected_label, label, f"difference × {gain}"))


def sheet(rows: Sequence[Sequence[Array]], captions: Sequence[str]) -> bytes:
    """A PNG of pictures `[H,W,3]` of one size, in rows, with a caption above each column."""
    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-PANEL_PIXELS // width))
    size = (len(captions) * width * factor, len(rows) * height * factor + CAPTION_PIXELS)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    text, font = legible(SEPARATOR.join(captions), CAPTION_SIZE)
    for column, caption in enumerate(text.split(SEPARATOR)):
        draw.text((column * width * factor + 4, CAPTION_PIXELS / 2), caption, fill="black", font=font, anchor="lm")
    for line, row in enumerate(rows):
        for column, pixels in enumerate(row):
            eight_bits = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
            enlarged = Image.fromarray(eight_bits).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            picture.paste(enlarged, (column * width * factor, line * height * factor + CAPTION_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def error_plot(timesteps: Sequence[float], errors: Sequence[float], floor: Sequence[float], label: str) -> bytes:
    """A PNG: relative L2 error over timesteps, the engine's and PyTorch's own in half precision (`floor`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.semilogy(timesteps, errors, marker=".", label=label)
    axes.semilogy(timesteps, floor, marker=".", linestyle="--", label="PyTorch in half precision")
    axes.invert_xaxis()  # as the run goes: from noise to image
    axes.set(xlabel="timestep", ylabel="relative L2 error against PyTorch fp32")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

"""Pictures that clients send: base64 or files, refused by their header before anything is decoded.

Knows bytes and their headers. A worker decodes them, as the commands do.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings

from PIL import Image, UnidentifiedImageError

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs.images import INIT_FORMATS, MAX_PROPORTION


def decode(text: str, what: str, pixels: int) -> bytes:
    """The file of a picture that came as base64, with or without `data:image/png;base64,` before it.

    Raises:
        UsageError: for what is no base64, and as of `check`.
    """
    _, _, body = text.partition(",") if text.startswith("data:") else ("", "", text)
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{what} is no base64: {error}", hint="send the file's bytes as base64") from error
    return check(data, what, pixels)


def check(data: bytes, what: str, pixels: int) -> bytes:
    """The same bytes, of a picture in a format that is read, of so many pixels at most.

    Raises:
        UsageError: for any other.
    """
    hint = "send a PNG, JPEG or WebP file"
    if not data:
        raise UsageError(f"{what} is empty", hint=hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            formats = [name for name in INIT_FORMATS if name in Image.OPEN]
            with Image.open(io.BytesIO(data), formats=formats) as image:
                width, height = image.size
    except UnidentifiedImageError as error:
        raise UsageError(f"{what} is in no image format that sdtrt reads", hint=hint) from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{what} is too large: it has too many pixels", hint="scale it down first") from error
    except Exception as error:  # Pillow's readers of headers raise anything on damaged data
        raise UsageError(f"{what} can't be read: {type(error).__name__}", hint=hint) from error
    if width * height > pixels:
        raise UsageError(
            f"{what} is too large: {width}x{height} is more than {pixels} pixels", hint="scale it down first"
        )
    if max(width, height) > MAX_PROPORTION * min(width, height):
        raise UsageError(f"{what} is too long: {width}x{height}", hint="cut it to the part that matters first")
    return data


def mask_of_alpha(data: bytes) -> bytes:
    """A mask as OpenAI has it, where what is transparent is made anew, as one that is white there.

    Raises:
        UsageError: for a picture without transparency.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not image.has_transparency_data:
                raise UsageError(
                    "the mask has no transparency, which says what is made anew",
                    hint="send a PNG with an alpha channel",
                )
            alpha = image.convert("RGBA").getchannel("A")
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"the mask can't be read: {type(error).__name__}", hint="send a PNG file") from error
    buffer = io.BytesIO()
    alpha.point(lambda level: 255 - level).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

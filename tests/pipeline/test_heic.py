"""HEIC images: read by pillow-heif where it is installed, and refused with the mend where it is not."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs.images import is_heic, read_init_image

HEADER = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"


def test_heic_is_known_by_its_brands():
    assert is_heic(HEADER)
    assert is_heic(b"\0\0\0\x18ftypmif1\0\0\0\0heicmif1")
    assert not is_heic(b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1")
    assert not is_heic(b"\0\0\0\x18ftypavif\0\0\0\0avifmif1")
    assert not is_heic(b"\x89PNG\r\n\x1a\n")
    assert not is_heic(b"")


def test_without_its_library_the_error_names_the_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "photo.heic"
    path.write_bytes(HEADER)
    with pytest.raises(UsageError, match=r"photo\.heic is a HEIC image, and pillow-heif is not installed") as caught:
        read_init_image(path)
    assert "pip install" in caught.value.hint
    assert "sdtrt[heif]" in caught.value.hint


def test_a_heic_image_is_read_upright_and_a_damaged_one_refused(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32], pixels[32:] = (200, 30, 30), (30, 30, 200)
    path = tmp_path / "photo.HEIC"
    heif.from_pillow(Image.fromarray(pixels)).save(path, quality=90)
    found = np.asarray(read_init_image(path).pixels).astype(int)
    assert found.shape == pixels.shape
    assert np.abs(found - pixels).mean() < 8
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"can't be read|in no image format"):
        read_init_image(path)

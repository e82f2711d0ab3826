"""Image files: the init image as it is read, results as they are encoded, and the text that they carry."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import UsageError, quote
from sdtrt.specs import MAX_PIXELS, SIZE_MULTIPLE

if TYPE_CHECKING:
    from PIL import ImageCms

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# JPEG's pixels are as close as its name allows; PNG's and WebP's are exact.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}
# What an init image may be. Pillow knows more: some run other programs (Ghostscript), most are read by nobody else.
INIT_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA")
MAX_FIELDS_LENGTH = 4096  # of the line of fields: what takes longer than it is worth to search
MAX_INIT_PIXELS = 2**26  # 8192x8192: far above what a diffusion model takes, far below what exhausts memory
MAX_PROPORTION = 128  # one side to the other: beyond it is no picture, and decoders take memory by the row
# Colour space of a profile (ICC.1:2022, table 19) → the pixels that it is about.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
HEADER_BYTES = 64  # of a file: what its format is known by
HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
AVIF_BRANDS = frozenset((b"avif", b"avis"))
USER_COMMENT_CODE = b"UNICODE\0"  # EXIF's prefix for UTF-16 text

# As in AUTOMATIC1111's stable-diffusion-webui, modules/infotext_utils.py.
_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Metadata:
    """The text that an image carries.

    Args:
        parameters: the form that Stable Diffusion web UIs read (`format_parameters`).
        details: everything needed to repeat the image, as plain data.
    """

    parameters: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Parameters:
    """A web UI's text, taken apart."""

    prompt: str
    negative_prompt: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class InitImage:
    """The image that img2img starts from: where it was, sha256 (hex) of its file, its RGB pixels; what it is called."""

    path: Path
    sha256: str
    pixels: Image.Image
    what: str = "init image"

    def result_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The result's (height, width): as asked, else the image's own, rounded down to a multiple of 8.

        Raises:
            UsageError: for an image with a side of less than 8 pixels, unless that side is asked for.
        """
        sides = []
        for name, asked, own in (("height", height, self.pixels.height), ("width", width, self.pixels.width)):
            side = asked if asked is not None else own - own % SIZE_MULTIPLE
            if side == 0:
                raise UsageError(
                    f"{self.what} {self.path} has a {name} of {own} pixels, less than {SIZE_MULTIPLE}",
                    hint="give --height and --width to enlarge it, best to the model's own size",
                )
            if side > MAX_PIXELS:
                raise UsageError(
                    f"{self.what} {self.path} has a {name} of {own} pixels, more than {MAX_PIXELS}",
                    hint="give --height and --width to scale it down, best to the model's own size",
                )
            sides.append(side)
        return sides[0], sides[1]

    def fitted(self, height: int, width: int) -> Image.Image:
        """The pixels at exactly this size (Lanczos; the proportions change where the size's do)."""
        if self.pixels.size == (width, height):
            return self.pixels
        return self.pixels.resize((width, height), Image.Resampling.LANCZOS)


def encode_image(image: Image.Image, image_format: str, metadata: Metadata) -> bytes:
    """The bytes of an image file with its text in it; the same for the same input, always (no dates).

    A PNG has the text chunks `parameters` and `sdtrt`; JPEG and WebP have the EXIF tags `UserComment` (as web UIs do)
    and `ImageHistory`.
    """
    parameters = metadata.parameters.replace("\0", "")
    details = json.dumps(metadata.details, sort_keys=True)
    options = dict(SAVE_OPTIONS[image_format])
    if image_format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", parameters)
        text.add_text("sdtrt", details)
        options["pnginfo"] = text
    else:
        options["exif"] = _exif(details, parameters)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _exif(history: str, comment: str) -> bytes:
    """EXIF with two texts.

    Pillow writes `UserComment` as bytes; what web UIs read it with (piexif) takes the standard's type alone.

    Source: Exif 2.32 (CIPA DC-008), sections 4.5.2 and 4.6.2: little-endian TIFF, each entry of a directory a tag, a
    type, a count, and the value's offset.
    """
    ascii_type, long_type, undefined_type = 2, 4, 7
    first = history.ljust(4).encode("ascii") + b"\0"  # an entry would hold four bytes itself
    second = USER_COMMENT_CODE + comment.encode("utf-16-be")
    directory, start = 38, 56  # behind the header's 8 bytes and two entries; behind the directory of one entry
    padding = bytes(len(first) % 2)  # values begin at even offsets
    behind = start + len(first) + len(padding)
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 2)
    tiff += struct.pack("<HHII", ExifTags.IFD.Exif, long_type, 1, directory)
    tiff += struct.pack("<HHIII", ExifTags.Base.ImageHistory, ascii_type, len(first), start, 0)
    tiff += struct.pack("<H", 1)
    tiff += struct.pack("<HHIII", ExifTags.Base.UserComment, undefined_type, len(second), behind, 0)
    return b"Exif\0\0" + tiff + first + padding + second


def format_parameters(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """The text that Stable Diffusion web UIs read; a field that is None is left out."""
    last = ", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value is not None)
    negative = f"{_NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return "\n".join(part for part in (prompt, negative, last) if part)


def _quote(value: object) -> str:
    """A field's value, as a JSON string where it would be misread otherwise (the web UI's own rule)."""
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    plain = text and text == text.strip() and not re.search('[,:\n"]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquote(text: str) -> str:
    """The inverse of `_quote`; text that only looks quoted stays as it is."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except json.JSONDecodeError:
        return text


def parse_parameters(text: str) -> Parameters:
    """Take apart what `format_parameters` or a web UI wrote."""
    *lines, last = text.split("\n")
    fields = {name: _unquote(value) for name, value in _FIELD.findall(last)} if len(last) <= MAX_FIELDS_LENGTH else {}
    if len(fields) < 3:  # the web UI's rule: less is a line of the prompt
        lines, fields = [*lines, last], {}
    start = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).removeprefix(" ")
    return Parameters("\n".join(lines[:start]), negative, fields)


def read_metadata(path: Path) -> Metadata | None:
    """The text that an image of ours (or, without details, of a web UI) carries; None where there is none.

    Raises:
        UsageError: for a file that is no image, is damaged, or is larger than `MAX_INIT_PIXELS`.
    """
    try:
        parameters, details = _read_texts(path)
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        raise UsageError(f"image {path} can't be read: {error}", hint="name a PNG, JPEG or WebP file") from error
    return None if parameters is None else Metadata(parameters, _details(details))


def _read_texts(path: Path) -> tuple[str | None, str | None]:
    """An image's `parameters` and `sdtrt` texts. Raises anything."""
    with warnings.catch_warnings(), Image.open(path, formats=_formats()) as image:
        warnings.simplefilter("ignore")
        if problem := _problem_of(*image.size):
            raise ValueError(problem)
        if image.format == "PNG":
            image.load()  # text may come after the pixels
            return image.info.get("parameters"), image.info.get("sdtrt")
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        parameters = comment.removeprefix(USER_COMMENT_CODE).decode("utf-16-be", "replace") if comment else None
        return parameters, exif.get(ExifTags.Base.ImageHistory)


def _details(text: str | None) -> dict[str, Any]:
    """The JSON object in a text; empty where it holds none (anybody may write such a text)."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        details = json.loads(text or "")
        if isinstance(details, dict):
            return details
    return {}


def _formats() -> list[str]:
    """The formats of `INIT_FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in INIT_FORMATS if name in Image.OPEN]


def _formats_of(file: BinaryIO, path: Path, what: str) -> list[str]:
    """The formats that a file may be in: for HEIC that one, which another library reads, imported for it alone.

    Raises:
        UsageError: where that library is not installed.
    """
    if not is_heic(file.read(HEADER_BYTES)):
        file.seek(0)
        return _formats()
    file.seek(0)
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UsageError(
            f"{what} {path} is a HEIC image, and pillow-heif is not installed",
            hint='pip install "sdtrt[heif]", or pip install pillow-heif; or save it as PNG or JPEG',
        ) from error
    register_heif_opener()
    return ["HEIF"]


def is_heic(header: bytes) -> bool:
    """Whether a file's first bytes are HEIC's: the brands of its first box (ISO/IEC 23008-12, annex B.4).

    AVIF, which Pillow reads itself, may have the general brand first, and then its own beside.
    """
    size, brands = int.from_bytes(header[:4], "big"), (header[8:12], header[16:])
    if header[4:8] != b"ftyp":
        return False
    compatible = [brands[1][start : start + 4] for start in range(0, max(0, size - 16), 4)]
    return brands[0] in HEIC_BRANDS or (brands[0] in (b"mif1", b"msf1") and not AVIF_BRANDS & {*compatible})


def read_parameters(path: Path) -> Parameters | None:
    """The web UI's text in an image file, taken apart; None where there is none."""
    metadata = read_metadata(path)
    return None if metadata is None else parse_parameters(metadata.parameters)


def read_init_image(path: Path, console: Console = QUIET, what: str = "init image") -> InitImage:
    """Read an init image as sRGB: upright as its EXIF says, transparency flattened on white, first frame.

    Colours are converted from the profile that the file carries, which is said; a profile that can't be used is
    warned of, and the colours are taken for sRGB.

    Args:
        what: it is called in messages, as the option is; a mask is read in the same way.

    Raises:
        UsageError: for a file that is missing, no image, damaged, larger than `MAX_INIT_PIXELS`, of sides more unlike
            than `MAX_PROPORTION`, or of pixels whose range is unknown (floating-point, 32-bit or signed integers).
    """
    hint = f"give --{what.replace(' ', '-')} a PNG, JPEG or WebP file"
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"{what} {path} {problem}", hint=hint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as file, Image.open(file, formats=_formats_of(file, path, what)) as image:
                _check_header(path, image, what)
                pixels = _to_rgb(ImageOps.exif_transpose(image), console, what)
                file.seek(0)  # the digest is of the file whose pixels these are, whatever has its name by now
                return InitImage(path, hashlib.file_digest(file, "sha256").hexdigest(), pixels, what)
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(
            f"{what} {path} can't be read: {error.strerror}", hint=f"run: chmod +r {quote(str(path))}"
        ) from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{what} {path} is too large: {error}", hint="scale it down first") from error
    except UnidentifiedImageError as error:
        raise UsageError(f"{what} {path} is in no image format that sdtrt reads", hint=hint) from error
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        raise UsageError(f"{what} {path} can't be read: {error}", hint=hint) from error


def _check_header(path: Path, image: Image.Image, what: str) -> None:
    """Refuse an image by its header, before its pixels are decoded."""
    kind = None
    if image.mode == "F":  # white may be 1, 255 or anything: Pillow clips to 0 to 255, black where it is 1
        kind = "floating-point pixels"
    elif image.mode == "I" and image.format == "TIFF":  # white may be 255, 65535 or anything
        kind = "pixels of 32-bit or signed integers"
    if kind is not None:
        raise UsageError(
            f"{what} {path} has {kind}, whose range is unknown",
            hint="save it with 8 or 16 bits a channel first, as PNG for instance",
        )
    if problem := _problem_of(*image.size):
        raise UsageError(
            f"{what} {path} is {problem}",
            hint="scale it down first" if problem.startswith("too large") else "cut it to the part that matters first",
        )


def _problem_of(width: int, height: int) -> str | None:
    """Why an image of that size is not decoded; None where it is."""
    if width * height > MAX_INIT_PIXELS:
        return f"too large: {width}x{height} is more than {MAX_INIT_PIXELS} pixels"
    if max(width, height) > MAX_PROPORTION * min(width, height):
        return f"too long: of {width}x{height} pixels, one side is more than {MAX_PROPORTION} times the other"
    return None


def _to_rgb(image: Image.Image, console: Console, what: str) -> Image.Image:
    """Any mode as sRGB: 16-bit grey scaled rather than clipped, transparency flattened on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if not profile and _is_adobe_rgb(image):
        console.warn(f"the {what} is in Adobe RGB without a profile: its colours are taken for sRGB, and come out dull")
    rgb = _to_srgb(image, profile, console, what) if profile else image.convert("RGB")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF says that a camera wrote Adobe RGB, which has no profile then (DCF 2.0: interoperability `R03`)."""
    return image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"


def _to_srgb(image: Image.Image, profile: bytes, console: Console, what: str) -> Image.Image:
    """The pixels in sRGB, by the colour profile that came with them (alpha is dropped)."""
    from PIL import ImageCms  # most images have no profile

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _profile_mode(image, source)
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, target, mode, "RGB")
        pixels = image if image.mode == mode else image.convert(mode)
        converted = pixels if mode == "RGB" and _keeps_colours(transform) else transform.apply(pixels)
        name = ImageCms.getProfileDescription(source).strip()
    except (OSError, ValueError, ImageCms.PyCMSError, ImportError) as error:  # the last: Pillow may be built without
        console.warn(f"the {what}'s colour profile can't be used: its colours are taken for sRGB ({error})")
        return image.convert("RGB")
    if converted is not pixels:
        console.note(f"{what}: colours converted to sRGB from its profile, {name or 'which has no name'}")
    return converted


def _profile_mode(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> str:
    """The mode of the pixels that a profile is about. Raises `ValueError` where these are none such."""
    space = profile.profile.xcolor_space.strip()
    mode = PROFILE_MODES.get(space)
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and len(image.getbands()) > 2):
        raise ValueError(f"it is for {space} pixels, these are {image.mode}")
    return mode


def _keeps_colours(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform does nothing but round: that of an sRGB profile, whatever its name."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, len(levels), 3)
    converted = np.asarray(transform.apply(Image.fromarray(cube)))
    return bool(np.abs(converted.astype(int) - cube).max() <= 1)

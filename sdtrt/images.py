"""Images in and out: the init image, where results go, how they are written, and the text that they carry."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import tempfile
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from sdtrt.digests import sha256_file
from sdtrt.errors import OutputError, UsageError
from sdtrt.files import fsync, rename_to_free
from sdtrt.specs import SIZE_MULTIPLE

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
SLUG_LENGTH = 60  # characters, and
SLUG_BYTES = 160  # bytes in UTF-8: with seed, number and suffix well below a file name's limit of 255
JPEG_TEXT_BYTES = 60_000  # JPEG keeps all of its EXIF in one segment of 65,533 bytes
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
    """The image that img2img starts from: where it was, sha256 (hex) of its file, its RGB pixels."""

    path: Path
    sha256: str
    pixels: Image.Image

    def result_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The result's (height, width): as asked, else the image's own, rounded down to a multiple of 8."""
        sides = []
        for name, asked, own in (("height", height, self.pixels.height), ("width", width, self.pixels.width)):
            side = asked if asked is not None else own - own % SIZE_MULTIPLE
            if side == 0:
                raise UsageError(
                    f"init image {self.path} has a {name} of {own} pixels, less than {SIZE_MULTIPLE}",
                    hint="give --height and --width to enlarge it, best to the model's own size",
                )
            sides.append(side)
        return sides[0], sides[1]

    def fitted(self, height: int, width: int) -> Image.Image:
        """The pixels at exactly this size (Lanczos; the proportions change where the size's do)."""
        if self.pixels.size == (width, height):
            return self.pixels
        return self.pixels.resize((width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class OutputPlan:
    """Where images go: one file, or a folder with a name made for each image."""

    folder: Path
    file: Path | None
    overwrite: bool

    def save(self, image: Image.Image, metadata: Metadata, *, prompt: str, seed: int) -> Path:
        """Write one image whole or not at all, and return its path.

        Raises:
            OutputError: where it can't be written, or the file has come into being meanwhile.
        """
        suffix = ".png" if self.file is None else self.file.suffix.lower()
        data = encode_image(image, FORMATS[suffix], metadata)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.file is not None:
                return _publish(data, self.file, overwrite=self.overwrite)
            return _publish_fresh(data, self.folder, f"{slug(prompt)}-{seed}", suffix)
        except FileExistsError:
            raise _exists(self.file or self.folder) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from error


def plan_output(output: Path | None, *, count: int, overwrite: bool, texts: Sequence[str] = ()) -> OutputPlan:
    """Decide where `count` images go, and find everything that is wrong with it before any work is done.

    Args:
        output: a file (`.png`, `.jpg`, `.jpeg`, `.webp`), or a folder, neither of which needs to exist; None for the
            current folder.
        texts: the prompts that the images will carry.

    Raises:
        UsageError: for a file that can't be what was asked for.
        OutputError: for a place that can't be written to.
    """
    try:
        plan = _plan(output or Path(), count, overwrite, texts)
        _check_writable(plan.folder)
    except OSError as error:
        raise _unwritable(output or Path(), error) from error
    return plan


def check_files(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise `OutputError` unless files of these names can be written into `folder`, before any work is done."""
    try:
        _check_writable(folder)
        for name in names:
            if _is_taken(folder / name) and not (overwrite and (folder / name).is_file()):
                raise _exists(folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_files(folder: Path, contents: Mapping[str, bytes], *, overwrite: bool) -> list[Path]:
    """Write files into a folder, each whole or not at all, and return their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_publish(data, folder / name, overwrite=overwrite) for name, data in contents.items()]
    except FileExistsError as error:
        raise _exists(Path(str(error))) from None
    except OSError as error:
        raise _unwritable(folder, error) from error


def _plan(output: Path, count: int, overwrite: bool, texts: Sequence[str]) -> OutputPlan:
    """The plan, from what the path is and what it looks like."""
    if output.is_dir() or (not output.suffix and not _is_taken(output)):
        return OutputPlan(output, None, overwrite)
    if output.suffix.lower() not in FORMATS:
        if output.exists() and not output.suffix:
            raise OutputError(f"output {output} is a file, not a folder", hint=f"use --output {output}.png or a folder")
        raise UsageError(
            f"unknown image format {output.suffix!r} of output {output}",
            hint=f"use --output {output.with_suffix('.png')}, .jpg or .webp; for a folder of that name: mkdir {output}",
        )
    if count > 1:
        raise UsageError(
            f"{count} images don't fit into the one file {output}",
            hint=f"use --output {output.with_suffix('')} (a folder)",
        )
    if _is_taken(output) and not (overwrite and output.is_file()):
        raise _exists(output)
    if FORMATS[output.suffix.lower()] == "JPEG" and any(_jpeg_bytes(text) > JPEG_TEXT_BYTES for text in texts):
        raise UsageError(f"{output} can't carry a prompt so long", hint=f"use --output {output.with_suffix('.png')}")
    return OutputPlan(output.parent, output, overwrite)


def _jpeg_bytes(text: str) -> int:
    """Bytes that a prompt takes of a JPEG's EXIF: once in UTF-16, once in JSON."""
    return len(text.encode("utf-16-be")) + len(json.dumps(text))


def _exists(path: Path) -> OutputError:
    """The error for a path that is taken."""
    if _is_taken(path) and not path.is_file():
        return OutputError(f"output {path} exists and is not a regular file", hint="give another --output")
    return OutputError(f"output {path} exists", hint="give another --output, or --overwrite to replace it")


def _unwritable(path: Path, error: OSError) -> OutputError:
    """The error for a place that the system refuses."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENAMETOOLONG:
        return OutputError(f"the name of output {path} is too long", hint="give a shorter --output")
    if error.errno == errno.ENOSPC:
        return OutputError(f"no space left for output in {path}", hint="free some space, or give another --output")
    return OutputError(f"can't write to {path}: {reason}", hint="give an --output in a folder that you can write to")


def _check_writable(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, or in the nearest folder above it that exists; leaves no trace."""
    present = folder
    while not _is_taken(present):
        present = present.parent
    if not present.is_dir():
        raise OutputError(f"can't write to {folder}: {present} is not a folder", hint="give another --output")
    with tempfile.TemporaryFile(dir=present):
        pass


def slug(prompt: str) -> str:
    """A file name's beginning from a prompt: lower-case words of letters and digits of any script."""
    text = unicodedata.normalize("NFC", prompt[: 8 * SLUG_LENGTH]).lower()
    words = "-".join(re.findall(r"[^\W_]+", text))[:SLUG_LENGTH]
    return words.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "image"


def _is_taken(path: Path) -> bool:
    """Whether there is anything at `path`, a dangling link too; raises `OSError` where the system won't say."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def save_new(data: bytes, folder: Path, stem: str, suffix: str = ".png") -> Path:
    """Write a file whole or not at all under a new name that begins with `stem`, and return its path.

    Raises:
        OutputError: where it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _publish_fresh(data, folder, stem, suffix)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _publish_fresh(data: bytes, folder: Path, stem: str, suffix: str) -> Path:
    """Write under the first free name of `stem`, `stem-2`, `stem-3`, … in `folder`."""
    number = 1
    while True:
        name = f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}"
        try:
            return _publish(data, folder / name, overwrite=False)
        except FileExistsError:
            number += 1


def _publish(data: bytes, path: Path, *, overwrite: bool) -> Path:
    """Write `path` whole or not at all; unless `overwrite`, raise `FileExistsError` where there is anything.

    A link that is to be overwritten is replaced itself; what it points to stays as it is.
    """
    if not overwrite and _is_taken(path):
        raise FileExistsError(path)
    temporary = path.parent / f".sdtrt-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            rename_to_free(temporary, path)
        fsync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return path


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
        exif = Image.Exif()
        exif[ExifTags.Base.ImageHistory] = details
        comment = USER_COMMENT_CODE + parameters.encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {int(ExifTags.Base.UserComment): comment}
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


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
        if image.width * image.height > MAX_INIT_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is more than {MAX_INIT_PIXELS} pixels")
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


def read_parameters(path: Path) -> Parameters | None:
    """The web UI's text in an image file, taken apart; None where there is none."""
    metadata = read_metadata(path)
    return None if metadata is None else parse_parameters(metadata.parameters)


def read_init_image(path: Path) -> InitImage:
    """Read an init image as RGB: upright as its EXIF says, transparency flattened on white, first frame.

    Raises:
        UsageError: for a file that is missing, no image, damaged, larger than `MAX_INIT_PIXELS`, or of floating-point
            pixels.
    """
    hint = "give --init-image a PNG, JPEG or WebP file"
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"init image {path} {what}", hint=hint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                _check_header(path, image)
                return InitImage(path, sha256_file(path), _to_rgb(ImageOps.exif_transpose(image)))
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"init image {path} can't be read: {error.strerror}", hint=f"run: chmod +r {path}") from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"init image {path} is too large: {error}", hint="scale it down first") from error
    except UnidentifiedImageError as error:
        raise UsageError(f"init image {path} is in no image format that sdtrt reads", hint=hint) from error
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        raise UsageError(f"init image {path} can't be read: {error}", hint=hint) from error


def _check_header(path: Path, image: Image.Image) -> None:
    """Refuse an image by its header, before its pixels are decoded."""
    if image.mode == "F":  # white may be 1, 255 or anything: Pillow clips to 0 to 255, black where it is 1
        raise UsageError(
            f"init image {path} has floating-point pixels, whose range is unknown",
            hint="save it with 8 or 16 bits a channel first, as PNG for instance",
        )
    width, height = image.size
    if width * height > MAX_INIT_PIXELS:
        raise UsageError(
            f"init image {path} is too large: {width}x{height} is more than {MAX_INIT_PIXELS} pixels",
            hint="scale it down first",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: 16-bit grey scaled rather than clipped, transparency flattened on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")

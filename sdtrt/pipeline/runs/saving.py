"""Where results go and how files are written: each whole or not at all, and nothing that is there is lost unasked."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from sdtrt.common import interrupts
from sdtrt.common.console import Console
from sdtrt.common.errors import OutputError, UsageError, quote
from sdtrt.common.files import fsync, make_folders, rename_to_free
from sdtrt.pipeline.inputs.images import FORMATS, Metadata, encode_image

SLUG_LENGTH = 60  # characters, and
SLUG_BYTES = 160  # bytes in UTF-8: with seed, number and suffix well below a file name's limit of 255
JPEG_TEXT_BYTES = 60_000  # JPEG keeps all of its EXIF in one segment of 65,533 bytes


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
            make_folders(self.folder)
            if self.file is not None:
                return _publish(data, self.file, overwrite=self.overwrite)
            return _publish_fresh(data, self.folder, f"{slug(prompt)}-{seed}", suffix)
        except FileExistsError:
            raise _exists(self.file or self.folder) from None
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    @contextmanager
    def preview(self, prompt: str, console: Console) -> Iterator[PreviewFile]:
        """A file beside the images that shows what is being made; it is gone at the end.

        It is named after the output file or the prompt, and takes no other file's place.
        """
        file = PreviewFile(self.folder, slug(prompt) if self.file is None else self.file.stem, console)
        with interrupts.undoing(file.remove):
            try:
                yield file
            finally:
                file.remove()


class PreviewFile:
    """A PNG that shows what is being made, `NAME.preview.png`: it comes into being with the first picture."""

    def __init__(self, folder: Path, stem: str, console: Console) -> None:
        self._folder, self._stem, self._console = folder, f"{stem}.preview", console
        self.path: Path | None = None

    def show(self, pictures: Sequence[Image.Image]) -> None:
        """Put pictures of one size into the file, side by side. Raises `OutputError` where it can't be written."""
        width, height = pictures[0].size
        sheet = Image.new("RGB", (width * len(pictures), height))
        for number, picture in enumerate(pictures):
            sheet.paste(picture, (number * width, 0))
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", compress_level=1)
        if self.path is None:
            self.path = save_new(buffer.getvalue(), self._folder, self._stem)
            self._console.note(f"preview: {self.path}")
            return
        try:
            _publish(buffer.getvalue(), self.path, overwrite=True)
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def remove(self) -> None:
        """Take it away."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def plan_output(output: Path | None, *, count: int, overwrite: bool, texts: Iterable[str] = ()) -> OutputPlan:
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
            if _is_taken(folder / name) and not (overwrite and _may_be_replaced(folder / name)):
                raise _exists(folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_files(folder: Path, contents: Mapping[str, bytes], *, overwrite: bool) -> list[Path]:
    """Write files into a folder, each whole or not at all, and return their paths.

    Raises:
        OutputError: where one is there and not to be overwritten, or the folder can't be written.
    """
    try:
        make_folders(folder)
        return [_publish(data, folder / name, overwrite=overwrite) for name, data in contents.items()]
    except FileExistsError as error:
        raise _exists(Path(str(error))) from None
    except OSError as error:
        raise _unwritable(folder, error) from error


def _plan(output: Path, count: int, overwrite: bool, texts: Iterable[str]) -> OutputPlan:
    """The plan, from what the path is and what it looks like."""
    if output.is_dir() or (not output.suffix and not _is_taken(output)):
        return OutputPlan(output, None, overwrite)
    if output.suffix.lower() not in FORMATS:
        if output.exists() and not output.suffix:
            raise OutputError(
                f"output {output} is a file, not a folder", hint=f"use --output {quote(f'{output}.png')} or a folder"
            )
        raise UsageError(
            f"unknown image format {output.suffix!r} of output {output}",
            hint=f"use --output {quote(str(output.with_suffix('.png')))}, .jpg or .webp; for a folder of that name:"
            f" mkdir {quote(str(output))}",
        )
    if count > 1:
        raise UsageError(
            f"{count} images don't fit into the one file {output}",
            hint=f"use --output {quote(str(output.with_suffix('')))} (a folder)",
        )
    if _is_taken(output) and not (overwrite and _may_be_replaced(output)):
        raise _exists(output)
    if FORMATS[output.suffix.lower()] == "JPEG" and any(_jpeg_bytes(text) > JPEG_TEXT_BYTES for text in texts):
        raise UsageError(
            f"{output} can't carry a prompt so long", hint=f"use --output {quote(str(output.with_suffix('.png')))}"
        )
    return OutputPlan(output.parent, output, overwrite)


def _jpeg_bytes(text: str) -> int:
    """Bytes that a prompt takes of a JPEG's EXIF: once in UTF-16, once in JSON."""
    return len(text.encode("utf-16-be")) + len(json.dumps(text))


def _exists(path: Path) -> OutputError:
    """The error for a path that is taken."""
    if _is_taken(path) and not _may_be_replaced(path):
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


def _may_be_replaced(path: Path) -> bool:
    """Whether `--overwrite` is about what lies there: a file, or a link, which is replaced itself."""
    return path.is_file() or path.is_symlink()


def save_new(data: bytes, folder: Path, stem: str, suffix: str = ".png") -> Path:
    """Write a file whole or not at all under a new name that begins with `stem`, and return its path.

    Raises:
        OutputError: where it can't be written.
    """
    try:
        make_folders(folder)
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
    remove = partial(temporary.unlink, missing_ok=True)
    with interrupts.undoing(remove):
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
            remove()
    return path

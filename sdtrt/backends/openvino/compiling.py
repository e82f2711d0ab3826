"""Compile a model and write it to a file through OpenVINO's C interface (`openvino/c/*.h`, which its wheel has).

The Python interface gives a compiled model as bytes, of which it makes three copies on the way: 10 GB for the UNet of
Stable Diffusion. The C interface writes a file. It knows paths and settings; no contract.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from sdtrt.backends.openvino import library


def compile_to_file(source: Path, target: Path, device: str, settings: Mapping[str, str]) -> None:
    """Compile a model and write the result.

    Args:
        source: a model in OpenVINO's own form, its weights beside it.
        target: the file to write; OpenVINO doesn't say where the disk is full.
        settings: OpenVINO's properties, as text.

    Raises:
        RuntimeError: with OpenVINO's own words, where it fails.
    """
    words = [word.encode() for pair in settings.items() for word in pair]
    count = ctypes.c_size_t(len(words))
    with (
        _made("core", "ov_core_create") as core,
        _made("model", "ov_core_read_model", core, _text(source), None) as model,
        _made("compiled_model", "ov_core_compile_model", core, model, device.encode(), count, after=words) as compiled,
    ):
        _call("ov_compiled_model_export_model", compiled, _text(target))


@contextmanager
def _made(kind: str, function: str, *arguments: object, after: Sequence[bytes] = ()) -> Iterator[ctypes.c_void_p]:
    """What a function makes and gives through its last argument (or the one before `after`); it is freed at the end."""
    made = ctypes.c_void_p()
    _call(function, *arguments, ctypes.byref(made), *after)
    try:
        yield made
    finally:
        free = getattr(_interface(), f"ov_{kind}_free")
        free.restype = None
        free(made)


def _call(function: str, *arguments: object) -> None:
    """Call a function of the C interface. Raises `RuntimeError` with OpenVINO's own words where it fails."""
    if getattr(_interface(), function)(*arguments):
        raise RuntimeError((_interface().ov_get_last_err_msg() or b"").decode(errors="replace"))


@lru_cache(maxsize=1)
def _interface() -> ctypes.CDLL:
    """The library, which lies beside those that the Python interface has loaded. Calls let other threads run."""
    folder = Path(library.load().__file__).parent / "libs"
    (path,) = [*folder.glob("libopenvino_c.so*"), *folder.glob("openvino_c.dll"), *folder.glob("libopenvino_c.*dylib")]
    interface = ctypes.CDLL(str(path))
    interface.ov_get_last_err_msg.restype = ctypes.c_char_p
    return interface


def _text(path: Path) -> bytes:
    """A path as C takes it."""
    return str(path).encode(errors="surrogateescape")

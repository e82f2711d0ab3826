"""Weight files: what a safetensors header says without reading a tensor, and the tensors themselves.

Format: 8 bytes of little-endian header size, that many bytes of JSON (name → dtype, shape, data offsets), then the data
(https://huggingface.co/docs/safetensors). Pickle files run code when they are read, so callers ask the user first.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdtrt.common.errors import ModelError, first_line, quote
from sdtrt.common.files import limit_hint, open_regular, read_small_file
from sdtrt.specs import ModelSpec

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

WEIGHT_NAMES = {  # part → the stem of its weight files: (safetensors, pickle)
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "controlnet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "adapter": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}

MAX_JSON_BYTES = 4 << 20  # of one configuration file; the largest known, an index of shards, has a tenth
MAX_TENSORS = 50_000  # of one part; SDXL's whole checkpoint has 2,500
_MAX_HEADER_BYTES = 16 << 20  # a header of so many tensors, and their training's notes
_MAX_RANK = 8
_MAX_ELEMENTS = 1 << 48  # of a tensor: what shapes are computed with stays below PyTorch's integers
_MAX_SHARDS = 1000
_DTYPES: dict[str, tuple[str, int]] = {  # safetensors' name → torch's name, bytes
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_FOREIGN_STARTS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the weights", "run git lfs pull in the model's folder"),
    b"PK\x03\x04": ("a pickle file in a zip, not safetensors", "convert it to safetensors, or give it its true suffix"),
    b"\x80\x02": ("a pickle file, not safetensors", "convert it to safetensors, or give it its true suffix"),
    b"<!DOCTYPE": ("a web page, not the weights", "download the file again; the site may want you to log in"),
    b"<html": ("a web page, not the weights", "download the file again; the site may want you to log in"),
}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: dtype as torch spells it, shape, and its bytes on disk."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds weights rather than indices."""
        return self.dtype.startswith(("float", "bfloat"))


def is_pickle(path: Path) -> bool:
    """Whether the file's suffix is one of pickle's."""
    return path.suffix.lower() in PICKLE_SUFFIXES


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds: name → dtype, shape and size; no tensor is read.

    Raises:
        ModelError: if the file can't be read, is no safetensors file, or is truncated.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            plausible = length >= 2 and start[8:9] == b"{" and (length <= _MAX_HEADER_BYTES or 8 + length <= size)
            file.seek(8)
            header = file.read(length) if plausible and length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise ModelError(
            f"can't read {path}: {error.strerror}", hint=f"check it with ls -l {quote(str(path))}"
        ) from error
    if not plausible:
        raise _not_safetensors(path, start)
    if length > _MAX_HEADER_BYTES:
        raise _too_large(path, f"{length} bytes", f"{_MAX_HEADER_BYTES}")
    if len(header) < length:
        raise _truncated(path, 8 + length, size)
    entries, end = _parse_header(path, header, start)
    if size < 8 + length + end:
        raise _truncated(path, 8 + length + end, size)
    return entries


def check_headers(files: Iterable[Path]) -> None:
    """Raise `ModelError` for a file whose header can't be read; pickle files have none."""
    for file in files:
        if not is_pickle(file):
            read_header(file)


def _parse_header(path: Path, header: bytes, start: bytes) -> tuple[dict[str, TensorInfo], int]:
    """The tensors that a header names, and where the last of them ends."""
    try:
        values = json.loads(header)
        values.pop("__metadata__", None)
        if len(values) > MAX_TENSORS:
            raise _too_large(path, f"{len(values)} tensors", f"{MAX_TENSORS}")
        entries = {name: _tensor_info(value) for name, value in values.items()}
        return entries, max((value["data_offsets"][1] for value in values.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise _not_safetensors(path, start) from error


def _tensor_info(entry: dict[str, Any]) -> TensorInfo:
    """One entry of the header."""
    first, last = entry["data_offsets"]
    if len(entry["shape"]) > _MAX_RANK:
        raise ValueError(f"{len(entry['shape'])} dimensions")
    shape = tuple(int(size) for size in entry["shape"])
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise ValueError(f"{shape} is the shape of no tensor")
    dtype, itemsize = _DTYPES.get(entry["dtype"], (str(entry["dtype"]).upper(), 0))  # in capitals no dtype of torch's
    if itemsize and math.prod(shape) * itemsize != last - first:
        raise ValueError(f"{shape} of {dtype} does not take {last - first} bytes")
    return TensorInfo(dtype, shape, last - first)


def _truncated(path: Path, wanted: int, size: int) -> ModelError:
    return ModelError(
        f"{path} is truncated: its header promises {wanted} bytes, it has {size}",
        hint="download or copy the file again",
    )


def _too_large(path: Path, what: str, most: str) -> ModelError:
    return ModelError(
        f"the header of {path} names {what}, more than {most}",
        hint="pass a file in safetensors format, or download it again",
    )


def _not_safetensors(path: Path, start: bytes) -> ModelError:
    """The error for a file that is something else, saying what where its first bytes tell."""
    if not start:
        return ModelError(f"{path} is empty", hint="download or copy the file again")
    for magic, (what, hint) in _FOREIGN_STARTS.items():
        if start.startswith(magic):
            return ModelError(f"{path} is {what}", hint=hint)
    return ModelError(
        f"{path} is not a safetensors file", hint="pass a file in safetensors format, or download it again"
    )


def read_tensors(path: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Read the named tensors of a safetensors file, and nothing else of it.

    Raises:
        ModelError: if the file can't be read or lacks one of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"can't read {path}: {error}", hint="download or copy the file again") from error


def read_tensor_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of tensors by name, as PyTorch saves them; none of its code runs.

    Raises:
        ModelError: if it can't be read, or holds anything else.
    """
    import torch

    tensors = read_saved(path)
    if not isinstance(tensors, dict) or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        raise ModelError(f"{path} holds no tensors by name", hint="download or copy the file again")
    return tensors


def read_saved(path: Path, data: bytes | None = None) -> Any:
    """What PyTorch saved, on the CPU; none of its code runs. A file is mapped into memory where its version allows it.

    Args:
        data: the file's bytes, where they have been read already.

    Raises:
        ModelError: if it can't be read.
    """
    import pickle

    import torch

    try:
        if data is not None:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of old versions of PyTorch
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ModelError(f"can't read {path}: {first_line(error)}", hint="download or copy the file again") from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a pickle checkpoint that the user trusts; tries without running its code first.

    Raises:
        ModelError: if it can't be read or holds no tensors by name.
    """
    import pickle

    import torch

    try:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # old checkpoints hold objects of their training framework
            data = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_lenient_pickle())
    except Exception as error:  # unpickling may raise anything
        reason = first_line(error)
        raise ModelError(
            f"can't read {path}: {reason}", hint="convert it to safetensors, or download it again"
        ) from error
    while isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    tensors = data if isinstance(data, dict) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no weights", hint="pass a Stable Diffusion checkpoint")
    return tensors


class _Stub:
    """Stands for what a pickle names and this machine lacks: takes whatever it is given, and keeps nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def extend(self, _items: Any) -> None:
        """What unpickling calls for the items of a list."""

    append = extend


def _lenient_pickle() -> ModuleType:
    """The pickle module, but what a file names of packages that are not installed is a stub.

    Lightning's checkpoints hold the callbacks of their training beside the weights.
    """
    import pickle

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return super().find_class(module, name)
            except (ImportError, AttributeError):
                return type(name, (_Stub,), {"__module__": module})

    lenient = ModuleType("pickle")
    vars(lenient).update(
        vars(pickle), Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load()
    )
    return lenient


def read_infos(path: Path) -> dict[str, TensorInfo]:
    """Name, dtype and shape of a weight file's tensors; a pickle has no header, and is read whole for it.

    Raises:
        ModelError: as of `read_header` and `read_pickle`.
    """
    if not is_pickle(path):
        return read_header(path)
    return {
        name: TensorInfo(str(value.dtype).removeprefix("torch."), tuple(value.shape), value.nbytes)
        for name, value in read_pickle(path).items()
    }


def weight_patterns(spec: ModelSpec, part: str, subfolder: str) -> list[str]:
    """What to fetch of a hub model to load one part, whose files lie in `subfolder` (empty: at the top)."""
    stem, pickle_stem = WEIGHT_NAMES[part]
    variant = f".{spec.variant}" if spec.variant else ""
    digits = "[0-9]" * 5
    place = f"{subfolder}/" if subfolder else ""
    patterns = [
        f"{place}config.json",
        f"{place}{stem}{variant}.safetensors",
        f"{place}{stem}{variant}-{digits}-of-{digits}.safetensors",
        f"{place}{stem}-{digits}-of-{digits}{variant}.safetensors",
    ]
    pickle_name = f"{place}{pickle_stem}{variant}.bin"
    if allows(spec, pickle_name):
        patterns.append(pickle_name)
    return patterns


def is_wanted(spec: ModelSpec, part: str, subfolder: str, name: str) -> bool:
    """Whether a file of a hub model has weights of a part, in the variant that is asked for."""
    _config, *weights = weight_patterns(spec, part, subfolder)
    return any(fnmatchcase(name, pattern) for pattern in weights)


def find_weights(folder: Path, spec: ModelSpec, part: str, *, strict: bool) -> tuple[Path, ...]:
    """The weight files of a part that are there.

    Args:
        folder: of the part's files.
        strict: whether a shard that is missing is an error (it is not where it can be fetched).

    Raises:
        ModelError: for a missing shard, if `strict`, and for an index of shards that can't be read or is none.
    """
    stem, pickle_stem = WEIGHT_NAMES[part]
    variant = f".{spec.variant}" if spec.variant else ""
    index = folder / f"{stem}.safetensors.index{variant}.json"
    if index.is_file():
        shards = _shards(index)
        missing = [shard for shard in shards if not shard.is_file()]
        if missing and strict:
            raise ModelError(f"{missing[0]} is missing: {index.name} names it", hint="download or copy the model again")
        return () if missing else shards
    single = folder / f"{stem}{variant}.safetensors"
    if single.is_file():
        return (single,)
    pickle = folder / f"{pickle_stem}{variant}.bin"
    return (pickle,) if pickle.is_file() and allows(spec, f"{part}/{pickle.name}") else ()


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names; they lie beside it."""
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not 1 <= len(names) <= _MAX_SHARDS or any(
        Path(name).name != name or not name.endswith(".safetensors") for name in names
    ):
        raise ModelError(f"{index} is no index of safetensors files", hint="download or copy the model again")
    return tuple(index.parent / name for name in names)


def allows(spec: ModelSpec, name: str) -> bool:
    """Whether the user allowed this pickle file: by name, by path, or all of the model's by the model's name."""
    return spec.allow_pickle is not None and spec.allow_pickle in (name, Path(name).name, spec.name)


def read_model_file(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a small file of a model, once: a regular one of at most `limit` bytes, or what a link to one leads to.

    Raises:
        ModelError: naming the file, where it is missing, larger, or something that never ends.
    """
    try:
        return read_small_file(path, limit)
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", hint="download or copy the model again") from error
    except OSError as error:
        mend = limit_hint(error) or "download or copy the file again"
        raise ModelError(f"can't read {path}: {error.strerror}", hint=mend) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise `ModelError` naming the file."""
    try:
        data = json.loads(read_model_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"can't read {path}: {error}", hint="download or copy the file again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object", hint="download or copy the file again")
    return data

"""Fuzzing that looks at which lines an input reaches, for what is parsed in Python: only clean errors, as in test_fuzz.

    pip install atheris
    python tests/coverage_fuzz.py sidecar -max_total_time=600

Targets: `sidecar` (an entry's JSON), `parameters` and `png` (what a picture says of its making), `safetensors` (a
checkpoint's header). Inputs that reached something new lie in the folder that follows the target, if one is named;
the options are libFuzzer's.
"""

from __future__ import annotations

import io
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris
from PIL import Image

with atheris.instrument_imports(include=["sdtrt"]):
    from fuzzing import only_clean_errors

    from sdtrt.engines import directory as engine_directory
    from sdtrt.engines import upkeep
    from sdtrt.engines.entry import SIDECAR, Entry
    from sdtrt.models import checkpoints, weights
    from sdtrt.pipeline.inputs import images
    from sdtrt.specs import PruneSpec

PLACE = Path(tempfile.mkdtemp(prefix="sdtrt-fuzz-"))
DIRECTORY = engine_directory.EngineDirectory(PLACE / "engines")
HEAD_BYTES = 33  # a PNG's signature and first chunk
KINDS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
HEADER = b'{"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"b": "c"}}'
PARAMETERS = b"a cat\nNegative prompt: a dog\nSteps: 20, Sampler: PNDM, CFG scale: 7.5, Seed: 1, Size: 64x64"


def make_entry() -> Entry:
    """A sealed entry."""

    def make(folder: Path) -> dict[str, object]:
        (folder / "model.onnx").write_bytes(b"graph")
        return {"contract": {"component": "unet"}, "sha256": {}}

    return DIRECTORY.obtain("onnx", {"component": "unet", "precision": "fp32", "opset": 17}, make)


def make_png() -> bytes:
    """A picture without texts."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


ENTRY, PNG = make_entry(), make_png()


def sidecar(data: bytes) -> None:
    """An entry's JSON, in a directory that is listed, checked and pruned."""
    (ENTRY.path / SIDECAR).write_bytes(data)
    for entry in DIRECTORY.entries():
        entry.to_json()
        assert entry.size_bytes >= 0
    list(upkeep.check(DIRECTORY))
    upkeep.prunable(DIRECTORY, PruneSpec(older_than_days=1, keep_bytes=10), lambda entry: False)


def parameters(data: bytes) -> None:
    """The text that Stable Diffusion web UIs write and read."""
    images.parse_parameters(data.decode("utf-8", "replace"))


def png(data: bytes) -> None:
    """A picture with such texts in it; the first byte chooses the kind of chunk."""
    kind, body = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path = PLACE / "picture.png"
    path.write_bytes(PNG[:HEAD_BYTES] + chunk + PNG[HEAD_BYTES:])
    for read in (images.read_metadata, images.read_parameters, images.read_init_image):
        with only_clean_errors():
            read(path)


def safetensors(data: bytes) -> None:
    """A checkpoint's header, with the length that it has."""
    path = PLACE / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    infos = weights.read_header(path)
    checkpoints.check_checkpoint(path, infos)
    checkpoints.inferred_repo(infos)


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "sidecar": (sidecar, [(ENTRY.path / SIDECAR).read_bytes()]),
    "parameters": (parameters, [PARAMETERS]),
    "png": (png, [b"\0parameters\0" + PARAMETERS, b'\0sdtrt\0{"seed": 1, "prompt": "a cat"}']),
    "safetensors": (safetensors, [HEADER + bytes(12)]),
}


def main() -> None:
    """Fuzz one target until libFuzzer ends, which it does with an input that fails."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [FOLDER] [-max_total_time=SECONDS]")
    target, examples = TARGETS[sys.argv.pop(1)]
    seeds = PLACE / "seeds"
    seeds.mkdir()
    for number, example in enumerate(examples):
        (seeds / str(number)).write_bytes(example)
    atheris.Setup([*sys.argv, str(seeds)], only_clean_errors()(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The first bytes of a plan: what they say before TensorRT reads the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtrt.backends.tensorrt.versions.libraries import Library, Version


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of a plan say: the library's version, and the plan's length where it is known."""

    version: Version
    size_bytes: int | None


HEADER_BYTES = 28
TENSORRT_MAGIC, RTX_MAGIC = b"ftrt", b"vtrt"


def read_header(plan: Path) -> PlanHeader | None:
    """The header of a plan file, None if it is no plan.

    Both libraries begin with four letters, a layout number (32 bits, 0 so far) and have the version in 4 bytes at byte
    24 (where trtexec --getPlanVersionOnly reads it). TensorRT for RTX and TensorRT 8.6 have the file's length in 64
    bits at byte 16; of later TensorRTs no plan was at hand to look at.
    """
    with plan.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES or head[:4] not in (TENSORRT_MAGIC, RTX_MAGIC):
        return None
    if head[4:8] != bytes(4):  # another layout than the one known
        return PlanHeader((), None)
    version = tuple(head[24:28])
    has_length = head[:4] == RTX_MAGIC or version[:2] == (8, 6)
    return PlanHeader(version, int.from_bytes(head[16:24], "little") if has_length else None)


def is_of_another_version(library: Library, header: PlanHeader) -> bool:
    """Whether a plan was built by another minor version. Plans of TensorRT for RTX may run in later ones."""
    known = library.family != "tensorrt_rtx" and bool(header.version)
    return known and header.version[:2] != library.version[:2]

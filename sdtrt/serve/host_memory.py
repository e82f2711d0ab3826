"""Whether this machine has the memory for a model, asked before it is read. GPUs are asked where engines are opened."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sdtrt.common.errors import MemoryShortage
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.specs import GIB

_FACTS = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """What the system can give without swapping; None where it doesn't say."""
    with suppress(OSError, ValueError):
        for line in _FACTS.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return None


def check_host_memory(spec: PipelineSpec, needed: int) -> None:
    """Raise `MemoryShortage` where a model that runs on the CPU takes more memory than there is.

    Args:
        needed: bytes that are read of it.
    """
    free = available_bytes()
    if spec.device.type != "cpu" or free is None or needed <= free:
        return
    raise MemoryShortage(
        f"{spec.model.name} takes {needed / GIB:.2f} GiB of memory, and {free / GIB:.2f} are free",
        hint="ask for another model, or later",
    )

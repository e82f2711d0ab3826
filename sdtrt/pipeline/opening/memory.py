"""What a request's engines need of a GPU's memory, what is free, and which size would fit."""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch

from sdtrt.backends import registry
from sdtrt.backends.graph_pool import idle_bytes
from sdtrt.common.errors import MemoryShortage
from sdtrt.engines.entry import Entry
from sdtrt.models.components import (
    sizes_of,
)
from sdtrt.pipeline.opening.request import first_of
from sdtrt.specs import (
    COMPONENTS,
    SIZE_MULTIPLE,
    BackendName,
    Component,
    Precision,
    Sizes,
)

ALLOWANCE_BYTES = 2**28  # for execution contexts, inputs and outputs, latents, TensorRT's and PyTorch's own kernels
PADDING = 1.05  # of tensors that PyTorch has: with what it rounds up, SDXL's weights take 1.04 times their size
NameT = TypeVar("NameT", bound=str)
MAX_BYTES = 2**50  # what a sidecar says beyond that is nonsense
STEPS = (64, SIZE_MULTIPLE)  # sides that are suggested are multiples of the first, where that leaves anything


class Request(Protocol):
    """What is asked of a GPU's memory: a `PipelineSpec`, or what a live pipeline is accelerated for."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def backend(self) -> BackendName:
        """What runs it."""

    @property
    def precision(self) -> Precision:
        """What it computes in."""

    @property
    def sizes(self) -> Sizes:
        """Of the UNet's call."""

    @property
    def images(self) -> int:
        """Made at once."""


@dataclass(frozen=True)
class Demand:
    """What sessions take of a GPU's memory, in bytes.

    Args:
        fixed: weights, and an allowance for what else there is.
        scratch: for intermediate results. Shared by the engines, and enough for the largest size that they serve,
            whatever is asked for; where engines ask PyTorch for it, for the request's size.
        wanted: of that, what engines for exactly the request's size would take.
    """

    fixed: int = 0
    scratch: int = 0
    wanted: float = 0.0

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.scratch


def demand_of(entries: Mapping[str, Entry], sizes: Sizes, images: int) -> Demand:
    """What the sessions of a pipeline's engines take. Engines that don't say it (older ones) are left out.

    A second engine that holds no weights has the first one's.

    Args:
        sizes: of the UNet's call.
        images: made at once.
    """
    fixed = scratch = 0
    wanted = 0.0
    for name, entry in entries.items():
        weights, work = _figure(entry, "plan_bytes"), _figure(entry, "scratch_bytes")
        if weights is not None and work is not None:
            backend = registry.get(entry.engine_key.backend)
            asks = backend.asks_for_scratch
            if backend.weights_inside or first_of(name) == name:
                fixed += math.ceil(weights * PADDING) if asks else weights
            component = cast(Component, name) if name in COMPONENTS else entry.engine_key.component
            own = work * _share(entry, sizes_of(component, sizes, images))
            wanted = max(wanted, own)
            scratch = max(scratch, math.ceil(own) if asks else work)
    return Demand(fixed + ALLOWANCE_BYTES, scratch, wanted) if fixed else Demand()


def pool_bytes(spec: Request, entries: Mapping[str, Entry] | Mapping[Component, Entry]) -> int:
    """What a pipeline's engines ask PyTorch for, those that do, at the request's size."""
    asking: dict[str, Entry] = {
        name: one for name, one in entries.items() if registry.get(one.engine_key.backend).asks_for_scratch
    }
    return demand_of(asking, spec.sizes, spec.images).scratch


def weights_of(entries: Iterable[Entry]) -> int:
    """The bytes of engines' weights, as far as they say it."""
    return sum(_figure(entry, "plan_bytes") or 0 for entry in entries)


def by_scratch(entries: Mapping[NameT, Entry]) -> list[NameT]:
    """Components in the order in which to open their engines: the most scratch memory first, as they share it."""
    return sorted(entries, key=lambda name: _figure(entries[name], "scratch_bytes") or 0, reverse=True)


def _figure(entry: Entry, name: str) -> int | None:
    """A number of bytes that a sidecar has; None where it has no sensible one."""
    value = entry.info.get(name)
    return value if type(value) is int and 0 <= value <= MAX_BYTES else None


def _share(entry: Entry, sizes: Sizes) -> float:
    """A size's share of the largest that an engine serves: scratch memory grows about so."""
    profiles = entry.engine_key.profiles
    largest = max((one.batch.max * one.height.max * one.width.max for one in profiles), default=0)
    volume = sizes.batch * sizes.height * sizes.width
    return volume / max(largest, volume)


def free_bytes(device: torch.device) -> int | None:
    """What the GPU has for this process, PyTorch's idle cache included; None on a CPU, and where it isn't known.

    What open pipelines have for their intermediate results is theirs.
    """
    if device.type != "cuda":
        return None
    with suppress(RuntimeError):  # no context on that GPU: opening the first session says why
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - idle_bytes(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return None


def fitting(demand: Demand, free: int, sizes: Sizes, images: int) -> tuple[int, Sizes] | None:
    """How many images at once would fit, and at which size; None where not even the weights do.

    It is the request's own size where engines for that alone would do; else fewer images, at last one in a smaller size
    of the same shape. The batch of what is returned is the UNet's.
    """
    if free <= demand.fixed or not demand.wanted:
        return None
    share = (free - demand.fixed) / demand.wanted
    rows = sizes.batch // images
    count = min(images, int(images * share))
    if count:
        return count, replace(sizes, batch=rows * count)
    side = math.sqrt(share * images)
    for step in STEPS:
        height, width = (int(pixels * side) // step * step for pixels in (sizes.height, sizes.width))
        if height and width:
            return 1, replace(sizes, batch=rows, height=height, width=width)
    return None


def release() -> None:
    """Give back what a failed run has left: reference cycles, and PyTorch's cache on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU


def check_memory(spec: Request, entries: Mapping[str, Entry], loaded: Collection[Path] = ()) -> None:
    """Refuse a request whose engines can't fit in the GPU's memory, with a size that would.

    Args:
        loaded: folders of those whose plans lie there already.
    """
    free = free_bytes(spec.device)
    if free is None:
        return
    free += weights_of(entry for entry in entries.values() if entry.path in loaded)
    demand = demand_of(entries, spec.sizes, spec.images)
    if demand.total <= free:
        return
    size = f"{spec.sizes.width}x{spec.sizes.height} pixels" + f", {spec.images} at once" * (spec.images > 1)
    need, left = (f"{count / 2**30:.2f} GiB" for count in (demand.total, free))
    raise MemoryShortage(
        f"the engines for {size} need {need} of GPU memory, and {left} are free",
        hint=_what_fits(spec, demand, free),
    )


def _what_fits(spec: Request, demand: Demand, free: int) -> str:
    """The hint for engines that are too large for the GPU."""
    found = fitting(demand, free, spec.sizes, spec.images)
    if found is None:
        smaller = "use --precision fp16, " if spec.precision == "fp32" else ""
        return f"end other programs on the GPU, {smaller}or use a GPU with more memory: the weights alone take too much"
    count, sizes = found
    side = f"--height {sizes.height} --width {sizes.width}"
    words = [f"--batch-size {count}"] * (count < spec.images) + [side] * (sizes.height < spec.sizes.height)
    fits = f"use {' '.join(words)}" if words else "that size fits"
    if demand.scratch <= demand.wanted:
        return f"{fits}, or end other programs on the GPU"
    build = f"sdtrt build --batch {sizes.batch} {side}"
    return f"{fits} with engines for nothing larger ({build}), or end other programs on the GPU"


@contextmanager
def out_of_memory(spec: Request, images: int | None = None) -> Iterator[None]:
    """Turn failures to allocate into a `MemoryShortage` (PyTorch's on the CPU is a bare `RuntimeError`).

    Args:
        images: made at once, if not as many as the spec says.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        texts = ("can't allocate memory", "not enough memory")
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(text in str(error) for text in texts):
            raise
        count = images or spec.images
        size = f"{spec.sizes.width}x{spec.sizes.height} pixels" + f", {count} at once," * (count > 1)
        raise MemoryShortage(
            f"out of memory at {size} with {spec.backend} in {spec.precision}",
            hint="use a smaller --height and --width" + ", or --batch-size" * (count > 1),
        ) from error

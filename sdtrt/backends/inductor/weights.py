"""The weights of a compiled package: which it takes, how each lies in memory, and a model's tensors put there.

A package takes its weights by address, and checks neither dtype nor shape nor strides of what it gets: whatever is
bound is compared here first. Knows no model: each weight names the tensors that it is joined from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch

from sdtrt.backends.unchanged import same_memory
from sdtrt.common.errors import MALFORMED, EngineError, SdtrtError
from sdtrt.common.files import read_small_file
from sdtrt.exports.quantised import quantised_rows
from sdtrt.models.weights import read_tensors

PACKAGE_FILE = "engine.pt2"
CONSTANTS_FILE = f"{PACKAGE_FILE}.json"  # a companion of the package, which is proven with it
FIXED_FILE = f"{PACKAGE_FILE}.safetensors"
MAX_LIST_BYTES = 2**24  # of that file: SDXL's has half a megabyte
ALIGNMENT = 16  # bytes, which compiled kernels take for granted; PyTorch's own memory has 64 and more
REBUILD = "sdtrt engines rm drops the engine, and the next run builds it again"


@dataclass(frozen=True)
class Constant:
    """One tensor that a package takes.

    Args:
        name: in the package.
        dtype: as torch spells it, `float16`.
        strides: in elements; an axis of one element may have any.
        device: its type, `cuda` or `cpu`.
        sources: the tensors of the model's part that it is joined from along its first axis; none for what is no
            weight of a model, and lies in the entry.
        given: the dtype of those tensors, where the constant is made of them otherwise than by a copy: it is their rows
            in 8 bits, or what these are multiples of (`exports.quantised.quantised_rows`).
        scales: whether it is the latter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    device: str
    sources: tuple[str, ...] = ()
    given: str = ""
    scales: bool = False

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, sources: Sequence[str] = ()) -> Self:
        """What describes a tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, tuple(tensor.shape), dtype, tuple(tensor.stride()), tensor.device.type, tuple(sources))

    def made_of(self, given: str, *, scales: bool) -> Self:
        """The same, made of rows of a dtype."""
        return replace(self, given=given, scales=scales)

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is of quantised weights alone is left out of others."""
        return {name: value for name, value in asdict(self).items() if self.given or name not in ("given", "scales")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        tuples = {name: tuple(data[name]) for name in ("shape", "strides", "sources")}
        return cls(**{**data, **tuples})

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return int(torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize)

    def new(self, device: torch.device) -> torch.Tensor:
        """Memory for it, with nothing in it yet."""
        return torch.empty_strided(self.shape, self.strides, dtype=getattr(torch, self.dtype), device=device)

    def parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the tensor itself: one for each of `sources`, all of one size."""
        return tensor.chunk(len(self.sources)) if len(self.sources) > 1 else (tensor,)

    def misfit(self, tensor: torch.Tensor) -> str:
        """How a tensor differs from what the package takes; empty where it does not."""
        found = Constant.of(self.name, tensor)
        for what in ("shape", "dtype", "device"):
            if getattr(found, what) != getattr(self, what):
                return f"{what} {getattr(found, what)} instead of {getattr(self, what)}"
        if not self._lies_like(found):
            return f"strides {found.strides} instead of {self.strides}"
        return f"address no multiple of {ALIGNMENT}" if tensor.data_ptr() % ALIGNMENT else ""

    def _lies_like(self, other: Constant) -> bool:
        """Whether both lie alike in memory: the stride of an axis of one element is never used."""
        pairs = zip(self.shape, self.strides, other.strides, strict=True)
        return all(one == another for size, one, another in pairs if size > 1)


def write_constants(folder: Path, constants: Iterable[Constant]) -> None:
    """Write the list of a package's constants."""
    (folder / CONSTANTS_FILE).write_text(json.dumps([one.to_json() for one in constants], indent=0) + "\n")


def read_constants(path: Path) -> tuple[Constant, ...]:
    """Read the list of a package's constants. Raises `EngineError` for what is none."""
    try:
        return tuple(Constant.from_json(data) for data in json.loads(read_small_file(path, MAX_LIST_BYTES)))
    except (OSError, *MALFORMED) as error:
        raise EngineError(f"{path} is no list of a package's weights: {error}", hint=REBUILD) from error


def write_fixed(folder: Path, fixed: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors that a package takes and no model has, where there are any."""
    if fixed:
        safetensors.torch.save_file({name: one.cpu().contiguous() for name, one in fixed.items()}, folder / FIXED_FILE)


def read_fixed(path: Path, constants: Iterable[Constant]) -> dict[str, torch.Tensor]:
    """Read those tensors. Raises `EngineError` where the file is not what was written."""
    names = [one.name for one in constants if not one.sources]
    try:
        return read_tensors(path, names) if names else {}
    except SdtrtError as error:
        raise EngineError(f"{path} lacks what the engine takes: {error.message}", hint=REBUILD) from error


def check_constants(constants: Sequence[Constant], given: Mapping[str, torch.Tensor]) -> None:
    """Compare tensors with what a package takes, before it gets their addresses.

    Raises:
        EngineError: for tensors that are missing, unknown, or of another shape, dtype, layout or device, naming some.
    """
    names = {one.name for one in constants}
    _refuse("are missing", sorted(names - given.keys()))
    _refuse("are not the engine's", sorted(given.keys() - names))
    wrong = ((one.name, one.misfit(given[one.name])) for one in constants)
    _refuse("don't fit", [f"{name}: {problem}" for name, problem in wrong if problem])


def check_sources(
    constants: Sequence[Constant],
    given: Mapping[str, torch.Tensor],
    ignored: tuple[str, ...] = (),
    *,
    casts: bool = False,
) -> None:
    """Compare a model's tensors with what a package's weights are made of, before any is copied.

    Args:
        ignored: what the names begin with that may be there beside them.
        casts: they may be of another dtype.

    Raises:
        EngineError: for tensors that are missing or unknown, or of another shape or dtype, naming some.
    """
    wanted = dict(_wanted(constants))
    _refuse("are missing", sorted(wanted.keys() - given.keys()))
    _refuse("are unknown to it", sorted(name for name in given.keys() - wanted.keys() if not name.startswith(ignored)))
    found = {name: Constant.of(name, given[name]) for name in wanted}
    _refuse(
        "don't fit",
        [
            f"{name}: {found[name].dtype} {list(found[name].shape)} instead of {dtype} {list(shape)}"
            for name, (shape, dtype) in wanted.items()
            if found[name].shape != shape or (found[name].dtype != dtype and not casts)
        ],
    )


def _wanted(constants: Iterable[Constant]) -> Iterable[tuple[str, tuple[tuple[int, ...], str]]]:
    """Shape and dtype of each tensor of a model that constants are made of."""
    for one in constants:
        if one.scales:  # of what its rows tell already
            continue
        count = len(one.sources)
        shape = (one.shape[0] // count, *one.shape[1:]) if count > 1 else one.shape
        yield from ((name, (shape, one.given or one.dtype)) for name in one.sources)


def _refuse(what: str, names: Sequence[str]) -> None:
    """Raise `EngineError` where some weights are wrong, naming three of them."""
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise EngineError(
            f"the weights are not those of the engine's architecture: {len(names)} {what} ({some})",
            hint="pass the weights of a model of the same architecture, in the engine's precision",
        )


class Weights:
    """The weights of one session: tensors that stay where they are, while what is in them may change.

    They take memory when they are first asked for: what is shared with another session by then takes none.

    Args:
        constants: what the package takes.
        fixed: the tensors that are no weights of a model, by name.
        device: where they lie.
    """

    def __init__(self, constants: Sequence[Constant], fixed: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._constants, self._device = tuple(constants), device
        own = [one.name for one in constants if not one.sources]
        if lost := [name for name in own if name not in fixed]:
            raise EngineError(f"the engine's own tensor {lost[0]} is missing from its entry", hint=REBUILD)
        self._fixed = {name: fixed[name] for name in own}
        self._tensors: dict[str, torch.Tensor] | None = None
        self._views: dict[str, torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor] = {}
        self._given = {name: getattr(torch, one.given) for one in constants if one.scales for name in one.sources}

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Each of them, by the package's names."""
        return self._taken({}) if self._tensors is None else self._tensors

    def _taken(self, there: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Take memory for all but those that are there already."""
        with torch.inference_mode(False):  # made in that mode, they could be written to in that mode alone
            own = {one.name: one.new(self._device) for one in self._constants if one.name not in there}
            for name in own.keys() & self._fixed.keys():
                own[name].copy_(self._fixed[name])
            self._tensors = {**own, **there}
            self._views = self._parts_of(self._tensors, scales=False)
            self._scales = self._parts_of(self._tensors, scales=True)  # of the rows in 8 bits
        return self._tensors

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(one.size_bytes for one in self._constants)

    def views(self) -> Mapping[str, torch.Tensor]:
        """By its own name, where each tensor of the model lies: what is written there, the engine computes with.

        Of one in 8 bits it is the rounded rows, whose scales lie elsewhere: it is changed by `fill` and `follow` alone.
        """
        return self._views if self.tensors else {}

    def _parts_of(self, tensors: Mapping[str, torch.Tensor], *, scales: bool) -> dict[str, torch.Tensor]:
        return {
            name: part
            for one in self._constants
            if one.scales == scales
            for name, part in zip(one.sources, one.parts(tensors[one.name]), strict=bool(one.sources))
        }

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor of the model to where it belongs; round its rows, where they are in 8 bits.

        What is rounded is the engine's 16 bits, whichever the model has: a file and a live module give the same then.

        Raises:
            EngineError: for another engine's rows in 8 bits.
        """
        if tensor.element_size() == 1:  # they mean nothing without their scales
            raise EngineError(
                f"{name} lies in 8 bits in the one engine, and not in this one that computes with its weights",
                hint="build both anew, for the same precision: sdtrt build --force",
            )
        place = self._views[name]
        if name not in self._scales:
            place.copy_(tensor, non_blocking=True)
            return
        there = tensor.to(place.device, non_blocking=True).to(self._given[name])
        rows, scales = quantised_rows(there, place.dtype)
        place.copy_(rows)
        self._scales[name].copy_(scales)

    @torch.no_grad()
    def fill(self, given: Mapping[str, torch.Tensor], ignored: tuple[str, ...] = (), *, casts: bool = False) -> None:
        """Copy a model's tensors to where they belong; none, where any does not fit.

        Args:
            given: by their own names, on any device.
            ignored, casts: as of `check_sources`. What is cast goes to the device as it is, and is cast there.

        Raises:
            EngineError: as of `check_sources`.
        """
        check_sources(self._constants, given, ignored, casts=casts)
        for name, place in self.views().items():
            tensor = given[name]
            if tensor.dtype != place.dtype:  # else PyTorch casts it on the CPU
                tensor = tensor.to(place.device, non_blocking=True)
            self._write(name, tensor)

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Whether no number that a model gave is NaN or infinite; waits for the device."""
        # Rows in 8 bits can't tell; their scales can.
        given = (self.tensors[one.name] for one in self._constants if one.sources and one.scales == bool(one.given))
        ends = [torch.stack(torch.aminmax(one)).float() for one in given if one.is_floating_point() and one.numel()]
        return not ends or bool(torch.isfinite(torch.cat(ends)).all())

    @torch.no_grad()
    def follow(self, given: Mapping[str, torch.Tensor], *, known: bool = False) -> None:
        """Copy those of a model's tensors that are not themselves where the package reads them; they may be cast.

        Args:
            known: the whole model was given before, of which these are some.

        Raises:
            EngineError: as of `check_sources`, where not known.
        """
        if not known:
            check_sources(self._constants, given, casts=True)
        views = self.views()
        for name, tensor in given.items():
            if not same_memory(views[name], tensor):
                self._write(name, tensor)

    def share(self, other: Weights) -> None:
        """Take another's tensors in the place of those that lie in the same way: there is one copy then."""
        theirs = {one: other.tensors[one.name] for one in other._constants if one.sources}
        shared = {one.name: theirs[one] for one in self._constants if one in theirs}
        self._taken({**(self._tensors or {}), **shared})

    def check(self) -> None:
        """Hold the tensors against what the package takes. Raises `EngineError`."""
        check_constants(self._constants, self.tensors)

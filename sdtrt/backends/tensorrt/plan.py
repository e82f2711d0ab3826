"""A TensorRT plan in memory: loaded once a process, its profiles, and which of them serves a size. Needs no torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from sdtrt.backends.tensorrt.versions import running
from sdtrt.backends.tensorrt.versions.libraries import Library, Shape, ShapeRange
from sdtrt.backends.tensorrt.versions.messages import REBUILD
from sdtrt.common.errors import MALFORMED, EngineError
from sdtrt.engines.entry import read_sidecar
from sdtrt.specs import SIZE_MULTIPLE
from sdtrt.specs.contract import (
    BATCH,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    TOKENS,
    Contract,
    TensorSpec,
)

TENSORRT_FILE = "engine.plan"  # of an entry: its plan, the first where it has several
Bounds = tuple[int, int, int]  # smallest, optimal, largest value of one dimension

# What users call the dimensions, and how many of their units one of ours is.
OPTIONS = {
    BATCH: ("batch", 1),
    LATENT_HEIGHT: ("height", SIZE_MULTIPLE),
    LATENT_WIDTH: ("width", SIZE_MULTIPLE),
    IMAGE_HEIGHT: ("height", 1),
    IMAGE_WIDTH: ("width", 1),
    TOKENS: ("tokens", 1),
}


@dataclass(frozen=True)
class PlanProfile:
    """One optimisation profile: dimension name → bounds."""

    bounds: Mapping[str, Bounds]

    def misfits(self, sizes: Mapping[str, int]) -> list[str]:
        """The dimensions whose value lies outside."""
        return [name for name, (low, _, high) in self.bounds.items() if not low <= sizes[name] <= high]

    def distance(self, sizes: Mapping[str, int]) -> float:
        """How far a size is from the one that this profile is tuned for: 0 for the same, then by ratio."""
        return sum(abs(math.log(sizes[name] / best)) for name, (_, best, _) in self.bounds.items())


@dataclass(eq=False)
class LoadedPlan:
    """A deserialised engine, shared by all sessions of one plan in this process; freed with the last of them."""

    library: Library
    engine: Any  # goes before its runtime: fields are freed in this order
    runtime: Any
    profiles: tuple[PlanProfile, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while contexts are made


def list_file(plan: Path) -> Path:
    """Where the list of an engine's plans lies, if there are several: what it lists runs by them all, and by no one."""
    return plan.with_name(f"{plan.name}.json")


def largest(spec: TensorSpec, profiles: Sequence[PlanProfile]) -> int:
    """The number of elements of one tensor at its largest, over all profiles."""
    return max(
        math.prod(profile.bounds[dim][2] if isinstance(dim, str) else dim for dim in spec.dims) for profile in profiles
    )


_LOADED: WeakValueDictionary[tuple[object, ...], LoadedPlan] = WeakValueDictionary()
_LOADING: WeakValueDictionary[tuple[object, ...], threading.Lock] = WeakValueDictionary()  # one lock for each plan
_LOCKS = threading.Lock()


def load_plan(
    plan: Path, contract: Contract, library: Library, device: int, *, allow_host_code: bool = False
) -> LoadedPlan:
    """Load a plan onto the current GPU, or share the one that this process has loaded already.

    Args:
        plan: the file.
        contract: what its inputs and outputs must be.
        device: index of the current GPU.
        allow_host_code: the plan is version-compatible and of one's own: it may bring the runtime that runs it.

    Raises:
        EngineError: when it can't be loaded here, or is another component's.
    """
    key: tuple[object, ...] = (library.module.__name__, device, allow_host_code, *_identity(plan))
    with _LOCKS:
        loading = _LOADING.setdefault(key, threading.Lock())
    with loading:
        loaded = _LOADED.get(key)
        if loaded is None:
            _check_sidecar(plan)
            runtime, engine = running.load_engine(library, plan, allow_host_code=allow_host_code)
            _check_tensors(plan, contract, *running.engine_tensors(library, engine))
            shapes = running.engine_profiles(engine, [spec.name for spec in contract.inputs])
            profiles = tuple(profile_of(contract, ranges) for ranges in shapes)
            loaded = _LOADED[key] = LoadedPlan(library, engine, runtime, profiles)
        return loaded


def _check_sidecar(plan: Path) -> None:
    """Compare a plan's size with its entry's sidecar, where there is one: TensorRT may crash on half a plan."""
    try:
        known = read_sidecar(plan.parent)["files"][plan.name]["size_bytes"]
        size = plan.stat().st_size
    except (*MALFORMED, OSError):
        return
    if size != known:
        raise EngineError(f"{plan} is cut short: {size} of {known} bytes are there", hint=REBUILD)


def _identity(plan: Path) -> tuple[object, ...]:
    """What tells one file from another, also after it was replaced."""
    try:
        stat = plan.stat()
    except OSError:
        return (plan,)  # the loader reports it
    return plan.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _check_tensors(plan: Path, contract: Contract, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Compare a plan's inputs and outputs with the contract."""
    for word, specs, found in (("takes", contract.inputs, inputs), ("gives", contract.outputs, outputs)):
        wanted = {spec.name: spec.dtype for spec in specs}
        if wanted != dict(found):
            raise EngineError(f"{plan} {word} {_listed(found)}, and not {_listed(wanted)}", hint=REBUILD)


def _listed(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in sorted(tensors.items()))


def profile_of(contract: Contract, ranges: Mapping[str, ShapeRange]) -> PlanProfile:
    """The bounds of each dimension of a contract, from the shapes of one of a plan's profiles."""
    bounds: dict[str, Bounds] = {}
    for spec in contract.inputs:
        low, best, high = ranges[spec.name]
        for axis, name in spec.dynamic_axes.items():
            bounds[name] = (low[axis], best[axis], high[axis])
    return PlanProfile(bounds)


def choose_profile(profiles: Sequence[PlanProfile], sizes: Mapping[str, int], backend: str = "tensorrt") -> int:
    """The index of the profile for a size: of those that contain it, the one tuned for the nearest.

    Raises:
        EngineError: when none contains it, with what the nearest one takes and how to build one that does.
    """
    fitting = [index for index, profile in enumerate(profiles) if not profile.misfits(sizes)]
    if fitting:
        return min(fitting, key=lambda index: profiles[index].distance(sizes))
    nearest = min(profiles, key=lambda profile: (len(profile.misfits(sizes)), profile.distance(sizes)))
    wrong = [_in_users_units(name, sizes[name], nearest.bounds[name]) for name in nearest.misfits(sizes)]
    others = f" (its nearest of {len(profiles)} profiles)" if len(profiles) > 1 else ""
    takes, got = (", ".join(words) for words in list(zip(*wrong, strict=True))[:2])
    raise EngineError(
        f"the engine takes {takes}{others}; got {got}",
        hint=f"build one that does: sdtrt build --backend {backend} {' '.join(option for _, _, option in wrong)}",
    )


def _in_users_units(name: str, value: int, bounds: Bounds) -> tuple[str, str, str]:
    """What a profile takes of one dimension, what was given, and the option that makes room for it."""
    word, unit = OPTIONS[name]
    low, best, high = bounds
    taken = f"{best * unit}" if low == high else f"{low * unit} to {high * unit}"
    option = f"--{word} {min(low, value) * unit}:{best * unit}:{max(high, value) * unit}"
    return f"{word} {taken}", f"{word} {value * unit}", option


def output_shape(shapes: Mapping[str, Shape], spec: TensorSpec) -> Shape:
    """The shape that TensorRT gives one output, complete or not at all."""
    shape = shapes[spec.name]
    assert all(size >= 0 for size in shape), f"{spec.name} has the unknown shape {shape} after all inputs are set"
    return shape

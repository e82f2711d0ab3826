"""Which backend and which engine serve a request: choose, find, or build on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdtrt.backends.build import FORMATS, backend_version, build_engine, host_key
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, SdtrtError, command_line
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import MALFORMED, Entry
from sdtrt.engines.keys import FORMAT as EXPORT_FORMAT
from sdtrt.engines.keys import Sight, export_key, steadily
from sdtrt.models.components import contract_of, part_of, precision_of, sizes_of
from sdtrt.models.resolve import Model
from sdtrt.pipeline import preloaded
from sdtrt.specs import Backend, BackendChoice, BuildSpec, Component, ExportSpec, Precision, Profile, Sizes

TENSORRT_BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")


def choose_backend(choice: BackendChoice, console: Console = QUIET) -> Backend:
    """The backend that serves a request; for `auto`, say on stderr which and why.

    A GPU with TensorRT for that GPU comes first, then ONNX Runtime on the CPU. Where there is a GPU without TensorRT,
    PyTorch on the GPU is faster than anything on the CPU.
    """
    if choice != "auto":
        return choice
    backend, reason = _automatic(console)
    console.note(f"backend: {backend} ({reason})")
    return backend


def _automatic(console: Console) -> tuple[Backend, str]:
    """The best backend of this machine, and why it is."""
    gpus = host.gpus()
    if not gpus:
        return "onnxruntime", "no NVIDIA GPU here"
    if not torch_sees_gpu():
        return "onnxruntime", f"{gpus[0].name}, but this PyTorch can't use it: see sdtrt doctor"
    for backend in TENSORRT_BACKENDS:
        problem = why_not(backend)
        if problem is None:
            return backend, f"{gpus[0].name}, TensorRT {backend_version(backend)}"
        console.detail(f"not {backend}: {problem.message}")
    return "torch", f"{gpus[0].name}, but no TensorRT for it: see sdtrt doctor"


def why_not(backend: Backend) -> SdtrtError | None:
    """Why a TensorRT can't build and run engines on this machine's first GPU; None if it can."""
    from sdtrt.backends.tensorrt.versions import libraries

    try:
        library = libraries.open_library(backend)
        libraries.require_gpu(library)
        libraries.require_builder(library)
    except SdtrtError as error:
        return error
    return None


def torch_sees_gpu() -> bool:
    """Whether this PyTorch can use the GPU (its CPU build can't)."""
    import torch

    return torch.cuda.is_available()


def default_precision(backend: Backend) -> Precision:
    """What a backend computes in unless asked: fp16 on a GPU, fp32 on a CPU."""
    if backend == "onnxruntime" or (backend == "torch" and not torch_sees_gpu()):
        return "fp32"
    return "fp16"


def find_engine(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component = "unet",
) -> Entry | None:
    """The engine that fits a request on this machine: of the tightest profiles the newest; None if there is none.

    Args:
        precision: that is asked for; the component may need another one (`precision_of`).
        sizes: of the component's own call (`sizes_of`).
    """
    return _best(model, backend, precision, sizes, directory, component, directory.entries("engine"))


def _best(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component,
    entries: Sequence[Entry],
) -> Entry | None:
    """Of these engines the one that `find_engine` takes."""
    precision = precision_of(model, component, precision)
    wanted = {"component": component, "precision": precision}
    runs = runs_here(backend)
    export = export_key(model, ExportSpec(model.spec, component, precision), directory)
    fitting = [
        (looseness, -entry.created, entry)
        for entry in entries
        if all(entry.key.get(name) == value for name, value in wanted.items())
        and runs(entry.key)
        and (looseness := _fit(entry.key, export, sizes)) is not None
    ]
    if not fitting:
        return None
    best = min(fitting, key=lambda fit: fit[:2])[2]
    directory.touch(best)
    return best


def ensure_engines(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    components: Sequence[Component],
    *,
    images: int = 1,
    allow_build: bool = True,
    console: Console = QUIET,
) -> dict[Component, Entry]:
    """Find the engines for a request, or export and build those that are missing, for exactly its sizes.

    Args:
        sizes: of the UNet's call; the other components' follow from it.
        images: made at once.

    Raises:
        EngineError: when any is missing and `allow_build` is off; the hint is the command that builds all of them.
        ExportError, BuildError: when one can't be made.
        ModelChangedError: where the model's files are replaced again and again.
    """

    def ensure() -> dict[Component, Entry]:
        with Sight(model, map(part_of, components)).steady():
            return _ensure(model, backend, precision, sizes, directory, components, images, allow_build, console)

    return steadily(ensure, console)


def _ensure(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    components: Sequence[Component],
    images: int,
    allow_build: bool,
    console: Console,
) -> dict[Component, Entry]:
    """One attempt of `ensure_engines`."""
    own = {component: sizes_of(component, sizes, images) for component in components}
    there = directory.entries("engine")
    found = {name: _best(model, backend, precision, own[name], directory, name, there) for name in components}
    missing = [name for name in components if found[name] is None]
    if missing:
        directory.warn_of_unsafe(console)
    if missing and not allow_build:
        precision = _precision_of_all(model, precision, missing)
        wanted = _describe(model, precision, {name: own[name] for name in missing})
        raise EngineError(
            f"no {backend} {precision} engine for the {', '.join(missing)} of {model.spec.name} fits{wanted}",
            hint=build_command(model, backend, precision, sizes, directory, missing, images),
        )
    if missing:
        preloaded.let_go()  # builders get the GPU's memory to themselves
    entries = {}
    for name, entry in found.items():
        if entry is not None and (reason := entry.info.get("unchecked")):
            console.warn(f"{entry.name} was built but never checked ({reason}): {entry.removal} drops it")
        entries[name] = entry or _build_missing(model, backend, precision, own[name], directory, name, console)
    return entries


def _precision_of_all(model: Model, precision: Precision, components: Sequence[Component]) -> Precision:
    """The precision that components are built in where `precision` is asked for; that one where they differ."""
    fitting = {precision_of(model, name, precision) for name in components}
    return fitting.pop() if len(fitting) == 1 else precision


def _describe(model: Model, precision: Precision, sizes: Mapping[Component, Sizes]) -> str:
    """What engines must fit: of one ` batch 1, height 512, width 512`, of several `: unet at …; vae_decoder at …`."""
    words = []
    for name, size in sizes.items():
        own = precision_of(model, name, precision)
        text = contract_of(model, name, own).describe(size)
        words.append(f"{name}{f' in {own}' * (own != precision)} at {text}" if len(sizes) > 1 else text)
    return (": " if len(sizes) > 1 else " ") + "; ".join(words)


def _build_missing(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component,
    console: Console,
) -> Entry:
    """Export and build one engine, for exactly one size."""
    precision = precision_of(model, component, precision)
    words = contract_of(model, component, precision).describe(sizes)
    console.note(f"no {backend} {precision} engine of the {component} for {words} yet: building it (once)")
    profiles = () if backend == "onnxruntime" else (Profile.of(sizes),)
    return build_engine(
        model, BuildSpec(ExportSpec(model.spec, component, precision), backend, profiles), directory, console
    )


def is_foreign(entry: Entry) -> bool:
    """Whether an entry is of another sdtrt, or an engine for another GPU, processor or library than this machine's."""
    if entry.kind == "onnx":
        return entry.key.get("format") != EXPORT_FORMAT
    if entry.kind != "engine":
        return True
    try:
        return not runs_here(entry.key["backend"])(entry.key)
    except (SdtrtError, *MALFORMED):  # the backend is not there at all, or the key is not one of ours
        return True


def runs_here(backend: Backend) -> Callable[[Mapping[str, Any]], bool]:
    """What says of an engine's key whether this sdtrt runs it, on this machine and in the backend's version."""
    wanted = {"format": FORMATS[backend], "backend": backend, "host": host_key(backend)}
    version = backend_version(backend)

    def runs(key: Mapping[str, Any]) -> bool:
        try:
            return all(key.get(name) == value for name, value in wanted.items()) and _runs_in(version, key)
        except MALFORMED:
            return False

    return runs


def _fit(key: Mapping[str, Any], export: Mapping[str, Any], sizes: Sizes) -> float | None:
    """How loosely an engine of the right kind fits; None for other weights, or a malformed key."""
    try:
        return slack(key, sizes) if _same_weights(key["export"], export) else None
    except (SdtrtError, *MALFORMED):
        return None


def _runs_in(version: str, key: Mapping[str, Any]) -> bool:
    """Whether a version runs an engine: the one that built it; where the plan is version-compatible, later ones too."""
    built = key["backend_version"]
    return bool(built == version or (key["options"]["version_compatible"] and _numbers(built) < _numbers(version)))


def _numbers(version: str) -> tuple[int, ...]:
    """`10.13.3.9.post1` → (10, 13, 3, 9)."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def build_command(
    model: Model,
    backend: Backend,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    components: Sequence[Component] = ("unet",),
    images: int = 1,
) -> str:
    """The command that builds the engines for a request; `sizes` are the UNet's."""
    words = ["sdtrt", "build", "--model", model.spec.name, "--backend", backend, "--precision", precision]
    words += [word for name in components for word in ("--component", name)]
    if backend != "onnxruntime":
        words += _size_options(model, precision, sizes, components, images)
    spec = model.spec
    options = (spec.revision, spec.variant, spec.config, spec.allow_pickle, spec.vae)
    for name, value in zip(("revision", "variant", "config", "allow-pickle", "vae"), options, strict=True):
        words += [f"--{name}", value] if value is not None else []
    words += ["--offline"] if spec.offline else []
    return command_line(*words, "--engine-dir", str(directory.path))


def _size_options(
    model: Model, precision: Precision, sizes: Sizes, components: Sequence[Component], images: int
) -> list[str]:
    """The options of `sdtrt build` for the sizes that components depend on; `sizes` are the UNet's."""
    used = {word for name in components for word in contract_of(model, name, precision).size_names}
    values = {"batch": _batch_option(sizes.batch, components, images)}
    values |= {name: str(getattr(sizes, name)) for name in ("height", "width", "tokens")}
    return [word for name, value in values.items() if name in used and value for word in (f"--{name}", value)]


def _batch_option(rows: int, components: Sequence[Component], images: int) -> str:
    """`--batch` of `sdtrt build`, which is the UNet's; the other components get half of it (`parts.profile_of`).

    Without guidance the UNet's batch is no more than the images: then one range serves all. Empty without the UNet for
    one image, which is what every other component is built for unless told otherwise.
    """
    others = [name for name in components if name not in ("unet", "vae_encoder")]  # images are encoded one by one
    if "unet" not in components:
        return f"{2 * images}" if others and images > 1 else ""
    return f"{rows}" if not others or (rows + 1) // 2 >= images else f"{rows}:{rows}:{2 * images}"


def slack(key: Mapping[str, Any], sizes: Sizes) -> float | None:
    """How loosely an engine's profiles fit a size: 0 for exactly, None for not at all."""
    profiles = [Profile.from_json(data) for data in key["profiles"]]
    if not profiles:
        return 0.0
    fitting = [profile for profile in profiles if sizes in profile]
    return min((_looseness(profile, sizes) for profile in fitting), default=None)


def _looseness(profile: Profile, sizes: Sizes) -> float:
    """Distance of a size from what a profile is tuned for, then the profile's width."""
    pairs = (
        (profile.batch, sizes.batch),
        (profile.height, sizes.height),
        (profile.width, sizes.width),
        (profile.tokens, sizes.tokens),
    )
    return sum(abs(bounds.opt - value) / value + (bounds.max - bounds.min) / bounds.max for bounds, value in pairs)


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two export keys are of the same weights: exporter and opset may differ, a user's choice at build time."""
    free = {"exporter", "opset"}
    return {k: v for k, v in one.items() if k not in free} == {k: v for k, v in other.items() if k not in free}

"""The engines of a pipeline: found, or exported and built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import (
    EngineError,
    command_line,
)
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.find import best_fit
from sdtrt.engines.keys import Sight, steadily
from sdtrt.models.components import (
    contract_of,
    part_of,
    precision_of,
    sizes_of,
)
from sdtrt.models.resolve import Model
from sdtrt.pipeline import preloaded
from sdtrt.pipeline.request import PipelineSpec
from sdtrt.specs import (
    BackendName,
    BuildSpec,
    Component,
    ExportSpec,
    Precision,
    Profile,
    Sizes,
)


def ensure_engines(
    model: Model,
    backend: BackendName,
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
    backend: BackendName,
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
    there, serves = directory.entries("engine"), registry.get(backend)
    runs, inside = serves.runs_here(), serves.weights_inside
    found = {name: best_fit(model, runs, precision, own[name], directory, name, there, inside) for name in components}
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
    backend: BackendName,
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
    profiles = () if registry.get(backend).takes_any_size else (Profile.of(sizes),)
    return build_engine(
        model, BuildSpec(ExportSpec(model.spec, component, precision), backend, profiles), directory, console
    )


def build_command(
    model: Model,
    backend: BackendName,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    components: Sequence[Component] = ("unet",),
    images: int = 1,
) -> str:
    """The command that builds the engines for a request; `sizes` are the UNet's."""
    words = ["sdtrt", "build", "--model", model.spec.name, "--backend", backend, "--precision", precision]
    words += [word for name in components for word in ("--component", name)]
    if not registry.get(backend).takes_any_size:
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


def engines_of(
    spec: PipelineSpec,
    directory: EngineDirectory,
    console: Console,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> dict[Component, Entry]:
    """Find or build the engines of a pipeline; none for the torch backend. `unet_engine`: as of `open_pipeline`."""
    given: dict[Component, Entry] = {} if unet_engine is None else {"unet": unet_engine}
    return given | ensure_engines(
        spec.model,
        spec.backend,
        spec.precision,
        spec.sizes,
        directory,
        [name for name in spec.in_engines if name not in given],
        images=spec.images,
        allow_build=allow_build,
        console=console,
    )

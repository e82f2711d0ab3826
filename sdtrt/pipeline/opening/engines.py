"""Finds the engines of a pipeline, or has them exported and built. Opens none, and knows nothing of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, command_line
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.find import best_fit
from sdtrt.engines.keys import Sight, steadily
from sdtrt.models.components import contract_of, part_of, unet_batch
from sdtrt.pipeline.opening import preloaded
from sdtrt.pipeline.opening.request import EngineRequest
from sdtrt.specs import BuildSpec, Component, ExportSpec, Precision, Profile
from sdtrt.specs.deep_features import DEEP_IN, DEEP_OUT, depth_of


def ensure_engines(
    request: EngineRequest,
    directory: EngineDirectory,
    console: Console = QUIET,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> dict[Component, Entry]:
    """Find the engines of a pipeline, or export and build those that are missing, for exactly its sizes.

    Args:
        unet_engine: the UNet's engine, whatever weights it was built from; None to find or build the one that fits.

    Raises:
        EngineError: when any is missing and `allow_build` is off; the hint is the command that builds all of them.
        ExportError, BuildError: when one can't be made.
        ModelChangedError: where the model's files are replaced again and again.
    """
    given: dict[Component, Entry] = {} if unet_engine is None else {"unet": unet_engine}
    wanted = replace(request, components=tuple(name for name in request.components if name not in given))
    if not wanted.components:
        return given

    def ensure() -> dict[Component, Entry]:
        with Sight(request.model, map(part_of, wanted.components)).steady():
            return _ensure(wanted, directory, console, allow_build)

    return given | steadily(ensure, console)


def _ensure(
    request: EngineRequest, directory: EngineDirectory, console: Console, allow_build: bool
) -> dict[Component, Entry]:
    """One attempt of `ensure_engines`."""
    found = find_engines(request, directory)
    missing = [name for name, entry in found.items() if entry is None]
    if missing:
        directory.warn_of_unsafe(console)
    if missing and not allow_build:
        raise _none_fits(replace(request, components=tuple(missing)), directory)
    if missing:
        preloaded.let_go()  # builders get the GPU's memory to themselves
    entries = {}
    for name, entry in found.items():
        if entry is not None:
            directory.touch(entry)
            _warn_of_unchecked(entry, console)
        entries[name] = entry or _build_missing(request, name, directory, console)
    return entries


def _warn_of_unchecked(entry: Entry, console: Console) -> None:
    """Say where an engine was built on a machine that could not run it."""
    if reason := entry.info.get("unchecked"):
        console.warn(f"{entry.name} was built but never checked ({reason}): {entry.removal} drops it")


def find_engines(request: EngineRequest, directory: EngineDirectory) -> dict[Component, Entry | None]:
    """The engine of each component that fits; the directory is read once."""
    there, backend = directory.entries("engine"), registry.get(request.backend)
    runs = backend.runs_here()

    def find(name: Component) -> Entry | None:
        precision, sizes = request.precision_of(name), request.sizes_of(name)
        weights, groups = backend.weights_inside, request.groups_of(name)
        return best_fit(request.model, runs, precision, sizes, directory, name, there, weights, groups)

    return {name: find(name) for name in request.components}


def _none_fits(request: EngineRequest, directory: EngineDirectory) -> EngineError:
    """The error for components that have no engine, all of a pipeline's; its hint builds them."""
    request = replace(request, precision=_precision_of_all(request))
    names = ", ".join(request.components)
    return EngineError(
        f"no {request.backend} {request.precision} engine for the {names} of {request.model.spec.name} fits"
        f"{_describe(request)}",
        hint=build_command(request, directory),
    )


def _precision_of_all(request: EngineRequest) -> Precision:
    """The precision that a pipeline's engines are built in; the one that is asked for where they differ."""
    fitting = {request.precision_of(name) for name in request.components}
    return fitting.pop() if len(fitting) == 1 else request.precision


def _describe(request: EngineRequest) -> str:
    """What engines must fit: of one ` batch 1, height 512, width 512`, of several `: unet at …; vae_decoder at …`."""
    words, several = [], len(request.components) > 1
    for name in request.components:
        own = request.precision_of(name)
        text = contract_of(request.model, name, own).describe(request.sizes_of(name))
        words.append(f"{name}{f' in {own}' * (own != request.precision)} at {text}" if several else text)
    return (": " if several else " ") + "; ".join(words)


def _build_missing(request: EngineRequest, component: Component, directory: EngineDirectory, console: Console) -> Entry:
    """Export and build one engine, for exactly one size."""
    model, sizes = request.model, request.sizes_of(component)
    precision, groups = request.precision_of(component), request.groups_of(component)
    words = contract_of(model, component, precision, groups).describe(sizes)
    name = " with inputs for ".join((component, *groups))
    console.note(f"no {request.backend} {precision} engine of the {name} for {words} yet: building it (once)")
    _note_loras(request, component, directory, console)
    profiles = () if registry.get(request.backend).takes_any_size else (Profile.of(sizes),)
    build = BuildSpec(ExportSpec(model.spec, component, precision, groups=groups), request.backend, profiles)
    return build_engine(model, build, directory, console)


def _note_loras(request: EngineRequest, component: Component, directory: EngineDirectory, console: Console) -> None:
    """Say what an engine of its own costs that is built for LoRAs, and what costs nothing."""
    if not request.model.spec.loras or not registry.get(request.backend).weights_inside:
        return
    there = (entry for entry in directory.entries("engine") if entry.key.get("component") == component)
    own = [entry.info.get("seconds") for entry in there if entry.key.get("backend") == request.backend]
    seconds = max((one for one in own if isinstance(one, int | float)), default=None)
    time = "minutes" if seconds is None else f"about {seconds:.0f} s, as another one of the {component} took"
    console.note(
        f"with LoRAs merged in it, it takes {time}, and so does each other choice of LoRAs and weights;"
        " --backend inductor takes any without a build"
    )


def build_command(request: EngineRequest, directory: EngineDirectory, further: Sequence[str] = ()) -> str:
    """The command that builds the engines of a pipeline, and those of further ControlNets, by their names."""
    model = request.model.spec
    words = ["sdtrt", "build", "--model", model.name, "--backend", request.backend, "--precision", request.precision]
    words += [word for name in request.components for word in ("--component", name)]
    if not registry.get(request.backend).takes_any_size:
        words += _size_options(request)
    options = (model.revision, model.variant, model.config, model.allow_pickle, model.vae)
    for name, value in zip(("revision", "variant", "config", "allow-pickle", "vae"), options, strict=True):
        words += [f"--{name}", value] if value is not None else []
    words += [word for one in model.loras for word in ("--lora", str(one))]
    controlnets = () if model.controlnet is None else (model.controlnet, *further)
    words += [word for name in controlnets for word in ("--controlnet", name)]
    words += [word for name in model.ip_adapters for word in ("--ip-adapter", name)]
    words += ["--t2i-adapter", model.t2i_adapter] if model.t2i_adapter is not None else []
    depth = depth_of(request.groups, DEEP_OUT) or depth_of(request.groups, DEEP_IN)
    words += [] if depth is None else ["--cache-interval", "3", "--cache-depth", str(depth)]  # any interval
    words += ["--offline"] if model.offline else []
    return command_line(*words, "--engine-dir", str(directory.path))


def _size_options(request: EngineRequest) -> list[str]:
    """The options of `sdtrt build` for the sizes that the components depend on."""
    contracts = (contract_of(request.model, name, request.precision) for name in request.components)
    used = {word for contract in contracts for word in contract.size_names}
    values = {"batch": _batch_option(request)}
    values |= {name: str(getattr(request.sizes, name)) for name in ("height", "width", "tokens")}
    return [word for name, value in values.items() if name in used and value for word in (f"--{name}", value)]


def _batch_option(request: EngineRequest) -> str:
    """`--batch` of `sdtrt build`, which is the UNet's; the other components get half of it (`components.profile_of`).

    Of a model that edits they get a third.

    Without guidance the UNet's batch is no more than the images: then one range serves all. Empty without the UNet for
    one image, which is what every other component is built for unless told otherwise.
    """
    rows, components, images = request.sizes.batch, request.components, request.images
    each = unet_batch(1, guidance=True, editing=request.model.is_editing)
    others = [name for name in components if name not in ("unet", "vae_encoder")]  # images are encoded one by one
    if "unet" not in components:
        return f"{each * images}" if others and images > 1 else ""
    return f"{rows}" if not others or -(-rows // each) >= images else f"{rows}:{rows}:{each * images}"

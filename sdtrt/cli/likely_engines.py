"""Load the engines that a request will probably run, before its model is read.

Knows which engines are likely from the request and from the engine directory alone. Nothing depends on its being right.
"""

from __future__ import annotations

from contextlib import suppress

from sdtrt.backends import registry
from sdtrt.backends.backend import Backend
from sdtrt.common import host
from sdtrt.engines import find
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import EngineKey
from sdtrt.models.components import TEXT_ENCODERS, VAE_HALVES, sizes_of
from sdtrt.pipeline.opening import preloaded
from sdtrt.pipeline.opening.fastest import fastest_of
from sdtrt.specs import AUTO, Component, GenerateSpec, Precision, Profile, Sizes


def load_ahead(spec: GenerateSpec, directory: EngineDirectory) -> None:
    """Load the engines that a request will probably run onto the GPU, the largest first.

    PyTorch and the backend's library must be imported. Nothing here can fail a command: what goes wrong is met again,
    and told, where the engine is opened. A GPU that has no context yet gets none (`host.open_primary_context`).
    """
    import torch

    if not preloaded.is_wanted():
        return
    with suppress(Exception):
        device = torch.cuda.current_device()
        if not host.has_primary_context(device):
            return
        torch.cuda.synchronize(device)  # TensorRT takes the context that is current in its thread: now it is
        for entry in likely_engines(spec, directory):
            with suppress(Exception):  # the others may be sound
                preloaded.load(entry, device)


def likely_engines(spec: GenerateSpec, directory: EngineDirectory) -> list[Entry]:
    """The engines that a request will run in all likelihood, the largest first.

    They are those used last, one for each component, among those that run here and fit what the request says; for
    `auto` those of the backend whose step is the fastest. None where that one loads nothing ahead. Which weights a
    request needs is known only once the model is read.
    """
    if spec.model.ip_adapters:  # engines of groups of inputs are not looked for here
        return []
    there = {str(entry.key.get("backend")) for entry in directory.entries("engine")}
    if spec.backend == AUTO:
        usual = registry.expected()[0]
        backends = registry.rivals(usual, there)
    else:
        usual, backends = spec.backend, (registry.get(spec.backend),)
    found = {one.name: latest for one in backends if (latest := _latest(one, spec, directory))}
    if not found:
        return []
    most = max(map(len, found.values()))  # components: a backend that has fewer of them would have to build
    chosen, _ = fastest_of(usual, {name: one for name, one in found.items() if len(one) == most})
    if not registry.get(chosen).loads_ahead:
        return []
    return sorted(found[chosen].values(), key=lambda entry: entry.size_bytes, reverse=True)


def _latest(backend: Backend, spec: GenerateSpec, directory: EngineDirectory) -> dict[Component, Entry]:
    """For each component the engine of a backend that was used last, of those that may serve a request."""
    runs, precision = backend.runs_here(), spec.precision or backend.default_precision()

    def fits(entry: Entry) -> bool:
        key = entry.parsed_key
        return isinstance(key, EngineKey) and runs(key) and _may_serve(key, spec, precision)

    latest = find.latest(directory, spec.model if backend.weights_inside else None, fits)
    return {entry.engine_key.component: entry for entry in latest.values()}


def _may_serve(key: EngineKey, spec: GenerateSpec, precision: Precision) -> bool:
    """Whether an engine serves a request, as far as the request alone tells."""
    name: Component = key.component
    fitting = key.precision in ((precision, "fp32") if name in VAE_HALVES else (precision,))
    called = name in (spec.components or (name,)) and (name != "vae_encoder" or spec.init_image is not None)
    called = called and not (name in TEXT_ENCODERS and (spec.clip_skip or spec.embeddings))  # PyTorch's then
    called = called and not (name in VAE_HALVES and spec.vae_tiling)  # PyTorch's, where the image is large
    called = called and not (name == "unet" and (spec.controls or spec.adapters))  # it has inputs for residuals then
    called = called and not (name == "unet" and not spec.savings.caching.is_off)  # which gives deep features then
    called = called and (name != "controlnet" or bool(spec.controls))
    return fitting and called and any(_known_sizes(name, spec, one) in one for one in key.profiles)


def _known_sizes(component: Component, spec: GenerateSpec, profile: Profile) -> Sizes:
    """The size of a component's call; what the request leaves open is what an engine's profile is tuned for."""
    images = spec.images_at_once
    height, width = spec.height or profile.height.opt, spec.width or profile.width.opt
    unet = Sizes(spec.rows_per_image * images, height, width, profile.tokens.opt)
    return sizes_of(component, unet, images)

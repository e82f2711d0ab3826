"""What TensorRT 8.6 leaves to PyTorch, and when: the options of a build that are about it, and what it does unasked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common.errors import BuildError, UsageError
from sdtrt.specs import QUANTISED, SIZE_MULTIPLE, BackendName, BuildSpec, Component, ExportSpec, Group, Profile, Sizes

IN_PIECES: tuple[Component, ...] = ("unet", "vae_decoder", "vae_encoder")  # what 8.6 leaves some of to PyTorch

# From how many tokens on an attention is worth a cut: 64x64 latents have 4096, and 1024 at the next resolution, where
# TensorRT 8.6's kernel takes a tenth of the time and its sums in fp16 lose little (`benchmarks/fidelity.md`).
SPLIT_TOKENS = 2048


def may_be_in_pieces(backend: BackendName, export: ExportSpec) -> bool:
    """Whether engines of an export may be several plans, with PyTorch between them: in fp16, and for one size."""
    return backend == "tensorrt" and export.precision == "fp16" and export.component in IN_PIECES


def can_split(spec: BuildSpec) -> bool:
    """Whether attention can be left to PyTorch at all."""
    return _is_splittable(spec, "unet") and _is_of_one_size(spec)


def can_split_norms(spec: BuildSpec) -> bool:
    """Whether group normalisations can be left to PyTorch at all: those of either half of a VAE."""
    return _is_splittable(spec, "vae_decoder", "vae_encoder") and _is_of_one_size(spec)


def _is_splittable(spec: BuildSpec, *components: Component) -> bool:
    fits = spec.export.component in components and may_be_in_pieces(spec.backend, spec.export)
    return fits and not spec.version_compatible


def _is_of_one_size(spec: BuildSpec) -> bool:
    return [profile.minimum == profile.maximum for profile in spec.profiles] == [True]


def check_pieces(spec: BuildSpec) -> None:
    """Raise `UsageError` for pieces that are asked for and can't be."""
    if spec.split_attention and not _is_splittable(spec, "unet"):
        raise UsageError(
            "only TensorRT UNets in fp16 that need not be version-compatible leave attention to PyTorch",
            hint="leave --split-attention out",
        )
    if spec.split_attention and not _is_of_one_size(spec):
        raise UsageError(
            "an engine that leaves attention to PyTorch is for one fixed size",
            hint="use --batch 2 --height 512 --width 512, or leave --split-attention out",
        )
    if spec.channels_last and (spec.split_attention == 0 or not (can_split(spec) or can_split_norms(spec))):
        raise UsageError(
            "only engines in pieces can be channels-last: TensorRT's of UNets and VAEs, in fp16 and of one size,"
            " that need not be version-compatible",
            hint="leave --channels-last out",
        )


def check_groups(backend: BackendName, groups: Sequence[Group]) -> None:
    """Raise `UsageError` for optional groups of inputs of 8.6's engines, `EngineError` where there is no TensorRT."""
    if groups and (library := libraries.open_library(backend)).has("weak typing"):
        raise UsageError(
            f"{library.name} builds no engine whose unet has inputs for {' and '.join(groups)}",
            hint="use the backend inductor, TensorRT 10 or later, or components= without the unet",
        )


def check_precision(name: BackendName, precision: str) -> None:
    """Raise `UsageError` for 8 bits where the library is 8.6, `EngineError` where there is none.

    It would take scales of a calibrator of its own, and has no fp8.
    """
    if precision in QUANTISED and libraries.open_library(name).has("weak typing"):
        raise UsageError(
            f"TensorRT 8.6 has no engines in {precision}",
            hint=f"use --backend inductor --precision {precision}, or TensorRT 10 or later",
        )


def check_library(spec: BuildSpec) -> None:
    """Raise `BuildError` for pieces that are asked of a library that builds none, `EngineError` where there is none."""
    library = libraries.open_library(spec.backend)
    if library.has("weak typing"):
        return
    if spec.split_attention:
        raise BuildError(
            f"{library.name} does not leave attention to PyTorch: only 8.6 gains by it",
            hint="leave --split-attention out",
        )
    if spec.channels_last:
        raise BuildError(
            f"{library.name} builds no engines in pieces, which alone can be channels-last: only 8.6 gains by pieces",
            hint="leave --channels-last out",
        )


def split_tokens(spec: BuildSpec) -> int:
    """From how many tokens on an engine leaves self-attentions to PyTorch; 0 for none.

    Unless the build says so itself, that is on 8.6 only, where the engine is for one fixed size: its own kernel is slow
    on newer GPUs, and adds up in fp16. Later versions have better ones.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    if spec.split_attention is not None or not can_split(spec):
        return spec.split_attention or 0
    return SPLIT_TOKENS if libraries.open_library(spec.backend).has("weak typing") else 0


def faster_alone(spec: BuildSpec) -> Sizes | None:
    """A size of an engine of several sizes that would be faster in one of its own; None where no such is known.

    Only an engine of one fixed size leaves attention to PyTorch. Whether any is large enough for that is taken from the
    size in pixels: of attention at the latents' own resolution.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    if can_split(spec):  # it is of one already
        return None
    for sizes in (profile.optimum for profile in spec.profiles):
        tokens = sizes.height * sizes.width // SIZE_MULTIPLE**2
        if 0 < split_tokens(replace(spec, profiles=(Profile.of(sizes),))) <= tokens:
            return sizes
    return None


def splits_norms(spec: BuildSpec) -> bool:
    """Whether an engine leaves its large group normalisations to PyTorch, those of `cut.choose_norms`.

    That is one of a VAE's decoder or encoder on 8.6, for one fixed size, unless the build leaves nothing to PyTorch
    (`split_attention` is 0): no flag and no other form of a norm keeps 8.6 from three copies of it in fp32, which are
    most of the memory that either works in.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    may = can_split_norms(spec) and spec.split_attention != 0
    return may and libraries.open_library(spec.backend).has("weak typing")


def pieces_key(spec: BuildSpec) -> dict[str, Any]:
    """The part of a key that engines have which leave something to PyTorch."""
    channels = {"channels_last": True} if spec.channels_last else {}
    if tokens := split_tokens(spec):
        return {"split_attention": tokens, **channels}
    return {"split_norms": True, **channels} if splits_norms(spec) else channels

"""What TensorRT 8.6 leaves to PyTorch, and when."""

from __future__ import annotations

from dataclasses import replace

from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.specs import SIZE_MULTIPLE, BuildSpec, Profile, Sizes

# From how many tokens on an attention is worth a cut: 64x64 latents have 4096, and 1024 at the next resolution, where
# TensorRT 8.6's kernel takes a tenth of the time and its sums in fp16 lose little (`benchmarks/fidelity.md`).
SPLIT_TOKENS = 2048


def split_tokens(spec: BuildSpec) -> int:
    """From how many tokens on an engine leaves self-attentions to PyTorch; 0 for none.

    Unless the build says so itself, that is on 8.6 only, where the engine is for one fixed size: its own kernel is slow
    on newer GPUs, and adds up in fp16. Later versions have better ones.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    if spec.split_attention is not None or not spec.can_split:
        return spec.split_attention or 0
    return SPLIT_TOKENS if libraries.open_library(spec.backend).has("weak typing") else 0


def faster_alone(spec: BuildSpec) -> Sizes | None:
    """A size of an engine of several sizes that would be faster in one of its own; None where no such is known.

    Only an engine of one fixed size leaves attention to PyTorch. Whether any is large enough for that is taken from the
    size in pixels: of attention at the latents' own resolution.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    if spec.can_split:  # it is of one already
        return None
    for sizes in (profile.optimum for profile in spec.profiles):
        tokens = sizes.height * sizes.width // SIZE_MULTIPLE**2
        if 0 < split_tokens(replace(spec, profiles=(Profile.of(sizes),))) <= tokens:
            return sizes
    return None


def splits_norms(spec: BuildSpec) -> bool:
    """Whether an engine leaves its large group normalisations to PyTorch, those of `splitting.choose_norms`.

    That is one of a VAE's decoder or encoder on 8.6, for one fixed size, unless the build leaves nothing to PyTorch
    (`split_attention` is 0): no flag and no other form of a norm keeps 8.6 from three copies of it in fp32, which are
    most of the memory that either works in.

    Raises:
        EngineError: where that depends on the version, and TensorRT is not there.
    """
    may = spec.can_split_norms and spec.split_attention != 0
    return may and libraries.open_library(spec.backend).has("weak typing")


def pieces_key(spec: BuildSpec) -> dict[str, int | bool]:
    """The part of a key that engines have which leave something to PyTorch."""
    if spec.backend == "onnxruntime":
        return {}
    from sdtrt.backends.tensorrt86 import policy

    if tokens := policy.split_tokens(spec):
        return {"split_attention": tokens}
    return {"split_norms": True} if policy.splits_norms(spec) else {}

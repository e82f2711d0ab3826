"""Pictures for IP-Adapters, and the inputs that they add to a UNet's engine: their tokens, and how much they count.

Knows configurations and contracts. Knows no module, and not what makes tokens of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from sdtrt.common.errors import ModelError, UsageError
from sdtrt.specs.choices import Group
from sdtrt.specs.contract import BATCH, Contract, TensorSpec

IP_ADAPTER = "ip_adapter"
IMAGE_TOKENS, SCALE = "image_tokens_", "ip_adapter_scale"
EMBEDDING_FILES = (".safetensors", ".npy", ".pt", ".ipadpt")  # of faces; diffusers' guide uses the last
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")


@dataclass(frozen=True)
class ImagePromptSpec:
    """A picture for an IP-Adapter, or the embedding of a face, and how much it counts.

    Args:
        image: its file; one of `EMBEDDING_FILES` holds an embedding.
        scale: 1 for as much as the text, 0 for nothing.
    """

    image: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UsageError(f"the scale of {self.image} must be a number, got {self.scale}", hint="use 0.6, or 1")

    @property
    def is_embedding(self) -> bool:
        """Whether its file holds an embedding."""
        return self.image.suffix.lower() in EMBEDDING_FILES

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `FILE` or `FILE:SCALE`."""
        name, colon, scale = text.rpartition(":")
        try:
            return cls(Path(name), float(scale)) if colon and name else cls(Path(text))
        except ValueError:
            return cls(Path(text))


def image_tokens(index: int) -> str:
    """The name of the input for an adapter's tokens; adapters are counted from 0."""
    return f"{IMAGE_TOKENS}{index}"


def group_of(counts: Sequence[int]) -> Group:
    """The group of inputs for adapters of so many tokens each: `ip_adapter:4+16`."""
    return f"{IP_ADAPTER}:{'+'.join(map(str, counts))}"


def token_counts(groups: Sequence[Group]) -> tuple[int, ...]:
    """The tokens of each adapter that some groups of inputs are for; none without any."""
    named = (name.partition(":")[2] for name in groups if name.startswith(f"{IP_ADAPTER}:"))
    return tuple(int(one) for name in named for one in name.split("+"))


def image_prompt_names(contract: Contract) -> tuple[str, ...]:
    """The inputs of a contract that IP-Adapters give, the scale last; none where it has no such group."""
    return tuple(spec.name for spec in contract.inputs if spec.name.startswith((IMAGE_TOKENS, SCALE)))


def with_image_prompts(contract: Contract, config: Mapping[str, Any], groups: Sequence[Group]) -> Contract:
    """A UNet's contract with the inputs of IP-Adapters, where groups name them.

    Args:
        config: the UNet's diffusers configuration.

    Returns:
        Beside what it has, `image_tokens_0 [B,T,D]`, … (one input an adapter; T is fixed, D the width of the text) and
        `ip_adapter_scale [adapters, layers]` (float32), a row an adapter, a column a cross-attention in the UNet's own
        order of modules.

    Raises:
        ModelError: for a UNet of other blocks.
    """
    counts = token_counts(groups)
    if not counts:
        return contract
    text = next(spec for spec in contract.inputs if spec.name == "encoder_hidden_states")
    tokens = [TensorSpec(image_tokens(at), text.dtype, (BATCH, count, text.dims[2])) for at, count in enumerate(counts)]
    scale = TensorSpec(SCALE, "float32", (len(counts), cross_attentions(config)))
    return replace(contract, inputs=(*contract.inputs, *tokens, scale))


def cross_attentions(config: Mapping[str, Any]) -> int:
    """Count the attentions over text of a UNet: 16 for Stable Diffusion 1.x and 2.x, 70 for XL.

    Raises:
        ModelError: for a UNet whose blocks are of other kinds than these.
    """
    down, up, middle = config["down_block_types"], config["up_block_types"], config.get("mid_block_type", _CROSS[2])
    if odd := [name for name in (*down, *up, middle) if name not in (*_CROSS, "DownBlock2D", "UpBlock2D", None)]:
        raise ModelError(
            f"the model's unet has a {odd[0]}, whose attentions sdtrt does not know",
            hint="use a Stable Diffusion 1.x, 2.x or XL model for IP-Adapter, or run it in PyTorch",
        )
    layers, depths = (_per_block(config, name, len(down)) for name in ("layers_per_block", _DEPTH))
    found = depths[-1] if middle is not None else 0
    for name, count, depth in zip(down, layers, depths, strict=True):
        found += count * depth * (name in _CROSS)
    for name, count, depth in zip(up, reversed(layers), reversed(depths), strict=True):
        found += (count + 1) * depth * (name in _CROSS)
    return found


_DEPTH = "transformer_layers_per_block"


def _per_block(config: Mapping[str, Any], name: str, blocks: int) -> list[int]:
    """A number of each block, where a configuration has one for all or one for each."""
    value = config.get(name, 1)
    values = [value] * blocks if isinstance(value, int) else list(value)
    if not all(isinstance(one, int) for one in values) or config.get(f"reverse_{name}") is not None:
        raise ModelError(
            f"the model's unet has {name} = {value!r}, whose attentions sdtrt does not know",
            hint="use a Stable Diffusion 1.x, 2.x or XL model for IP-Adapter, or run it in PyTorch",
        )
    return values

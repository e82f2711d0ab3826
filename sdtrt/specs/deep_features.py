"""A UNet in two programs: the whole one, which also gives a deep feature, and the shallow one, which takes it.

Between near timesteps the deep layers of a UNet give nearly the same: https://arxiv.org/abs/2312.00858 (DeepCache).
Knows configurations and contracts. Knows no module, and not at which steps which program runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdtrt.common.errors import ModelError, UsageError
from sdtrt.specs.choices import Group
from sdtrt.specs.contract import BATCH, LATENT_HEIGHT, LATENT_WIDTH, Contract, TensorSpec, scaled
from sdtrt.specs.groups import FREE_U, residual_names, residual_shapes
from sdtrt.specs.image_prompts import image_prompt_names

DEEP_OUT, DEEP_IN = "deep_out", "deep_in"  # the groups, `deep_out:1`: a number is of the depth
DEEP_FEATURE = "deep_feature_"  # and the depth: nothing else of a contract tells it
SHALLOW = "_shallow"  # behind the name of a UNet's engine: the shallow program's
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
_CHANGING = {"t2i_adapter": "a T2I-Adapter", FREE_U: "FreeU"}  # groups of inputs that change the deep layers
_USUAL_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3  # what diffusers' class takes


def whole_group(depth: int) -> Group:
    """The group of the program that gives the deep feature."""
    return f"{DEEP_OUT}:{depth}"


def depth_of(groups: Sequence[Group], kind: str) -> int | None:
    """The depth that groups of inputs and outputs name: of `DEEP_OUT`, or of `DEEP_IN`; None for no such group."""
    return next((int(name.partition(":")[2]) for name in groups if name.startswith(f"{kind}:")), None)


def shallow_groups(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups of the shallow program that belongs to a whole one's; none where that gives no deep feature."""
    if depth_of(groups, DEEP_OUT) is None:
        return ()
    return tuple(name.replace(f"{DEEP_OUT}:", f"{DEEP_IN}:") for name in groups)


def taken_feature(contract: Contract) -> TensorSpec | None:
    """The deep feature that the shallow program takes; None for another contract."""
    return next((spec for spec in contract.inputs if spec.name.startswith(DEEP_FEATURE)), None)


def given_feature(contract: Contract) -> TensorSpec | None:
    """The deep feature that the whole program gives; None for another contract."""
    return next((spec for spec in contract.outputs if spec.name.startswith(DEEP_FEATURE)), None)


def depth_in(feature: TensorSpec) -> int:
    """The depth of a deep feature."""
    return int(feature.name.removeprefix(DEEP_FEATURE))


def attends(contract: Contract) -> bool:
    """Whether a program with this contract attends to the text, and to pictures."""
    return any(spec.name == "encoder_hidden_states" for spec in contract.inputs)


def default_depth(config: Mapping[str, Any]) -> int:
    """The depth for an architecture, where nobody names one.

    The outermost block's layers are the dearest of Stable Diffusion 1.x and 2.x, as they attend: one of them is
    computed. XL's attend to nothing and are cheap: all three are.

    Args:
        config: the UNet's diffusers configuration.
    """
    attends = config.get("up_block_types", _USUAL_UP)[-1] == "CrossAttnUpBlock2D"
    return 1 if attends else min(_layers(config)[0] + 1, len(residual_shapes(config)) - 2)


def with_deep_features(contract: Contract, config: Mapping[str, Any], groups: Sequence[Group]) -> Contract:
    """A UNet's contract as that of one of the two programs, where groups name it.

    Args:
        contract: with the inputs of the other groups.
        config: the UNet's diffusers configuration.
        groups: `deep_out:2` gives, beside the noise, `deep_feature_2 [B,C,H,W]`: what the second layer from the end of
            the way up is given from below, before the skip connection is joined to it. `deep_in:2` takes that, and
            computes the two outermost layers on the way down and up alone. It has no inputs that these don't use:
            residuals of deeper skip connections and of the middle block, and, where they don't attend, the text and
            the tokens of pictures.

    Raises:
        ModelError: for a UNet of other blocks.
        UsageError: for a depth that the UNet has not, and beside what changes the deep layers: a T2I-Adapter, FreeU.
    """
    out, into = depth_of(groups, DEEP_OUT), depth_of(groups, DEEP_IN)
    depth = out if into is None else into
    if depth is None:
        return contract
    for group, name in _CHANGING.items():
        if group in groups:
            raise UsageError(
                f"deep caching and {name} don't go together",
                hint=f"leave cache_interval out, or {name}; ControlNets go with it",
            )
    feature = _feature(contract, config, depth)
    if into is None:
        return replace(contract, outputs=(*contract.outputs, feature))
    pictures, residuals = image_prompt_names(contract), residual_names(contract)
    dropped = {*residuals[depth:], *(() if outer_attends(config, depth) else ("encoder_hidden_states", *pictures))}
    kept = [spec for spec in contract.inputs if spec.name not in dropped]
    first = [spec for spec in kept if spec.name not in pictures]  # pictures' come last (`exports.image_prompts`)
    return replace(contract, inputs=(*first, feature, *(spec for spec in kept if spec.name in pictures)))


def _feature(contract: Contract, config: Mapping[str, Any], depth: int) -> TensorSpec:
    """The deep feature: channels of the layer below, sides of the skip connection that it is joined with."""
    _check_blocks(config)
    skips = residual_shapes(config)[:-1]
    if not 1 <= depth < len(skips):
        most = len(skips) - 1
        raise UsageError(
            f"cache-depth {depth} is none of this model: its unet has {len(skips)} skip connections",
            hint=f"use --cache-depth {'1' if most == 1 else f'1 to {most}'}, or leave it out",
        )
    factor, channels = skips[depth - 1][1], _given_from_below(config, depth)
    sides = (scaled(LATENT_HEIGHT, factor), scaled(LATENT_WIDTH, factor))
    return TensorSpec(f"{DEEP_FEATURE}{depth}", contract.outputs[0].dtype, (BATCH, channels, *sides))


def _given_from_below(config: Mapping[str, Any], depth: int) -> int:
    """The channels that a layer on the way up is given by the one before it; layers are counted from the end, from 1.

    Of a block's first layer these are the next deeper block's.
    """
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    for block, count in enumerate(_layers(config)):
        if depth <= count + 1:
            return int(widths[min(block + (depth > count), len(widths) - 1)])
        depth -= count + 1
    raise AssertionError("checked by who calls this")


def outer_attends(config: Mapping[str, Any], depth: int) -> bool:
    """Whether any of the layers that the shallow program computes attends to the text."""
    up, down = list(config.get("up_block_types", _USUAL_UP))[::-1], config.get("down_block_types", ("",) * 4)
    for block, count in enumerate(_layers(config)):
        if depth > 0 and up[block].startswith("CrossAttn"):
            return True
        if depth > 1 and down[block].startswith("CrossAttn"):
            return True
        depth -= count + 1
    return False


def _layers(config: Mapping[str, Any]) -> list[int]:
    """The layers of each block on the way down, the outermost first; on the way up each has one more."""
    layers, blocks = config.get("layers_per_block", 2), len(config.get("block_out_channels", (0,) * 4))
    return [layers] * blocks if isinstance(layers, int) else list(layers)


def _check_blocks(config: Mapping[str, Any]) -> None:
    """Refuse blocks on the way up whose layers are of another kind; `residual_shapes` refuses those on the way down."""
    if odd := [name for name in config.get("up_block_types", _USUAL_UP) if name not in UP_BLOCKS]:
        raise ModelError(
            f"the model's unet has a {odd[0]}, whose layers sdtrt can't split for deep caching",
            hint="leave --cache-interval out for this model",
        )

"""Optional groups of a UNet's inputs, beside those that every UNet has. A part of an engine's key where asked for.

Knows configurations and contracts. Knows no module, and not who gives these inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdtrt.common.errors import ModelError
from sdtrt.specs.choices import SIZE_MULTIPLE, Group, Precision
from sdtrt.specs.contract import (
    BATCH,
    DTYPES,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    Contract,
    TensorSpec,
    scaled,
    unet_contract,
)
from sdtrt.specs.image_prompts import with_image_prompts

MID_RESIDUAL = "mid_residual"
ADAPTER_RESIDUAL = "adapter_residual_"
FREE_U = "free_u"  # the group, and its one input
CONTROL_IMAGE, RESIDUAL_SCALES = "control_image", "residual_scales"  # of a ControlNet's inputs
# Blocks that give a skip connection a layer, and one more where they halve the size: those of Stable Diffusion.
BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
# What diffusers' classes take where a configuration says nothing.
_USUAL = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
}


_USUAL_ADAPTER = {"channels": (320, 640, 1280, 1280), "downscale_factor": 8}


def down_residual(index: int) -> str:
    """The name of the residual of a skip connection, counted from 0."""
    return f"down_residual_{index:02}"


def with_groups(contract: Contract, config: Mapping[str, Any], groups: Sequence[Group]) -> Contract:
    """A UNet's contract with the inputs of some optional groups.

    Args:
        config: the UNet's diffusers configuration.
        groups: `controlnet` adds `down_residual_00 [B,C,H,W]`, …, one a skip connection (12 for Stable Diffusion 1.x
            and 2.x, 9 for XL), and `mid_residual`: what ControlNets add, scaled already. Their sides are those of the
            latents, halved as often as there (`latent_height_2`), and rounded up. `t2i_adapter` adds
            `adapter_residual_00`, …, one a block on the way down and one for the middle block. `free_u` adds
            FreeU's s1, s2, b1 and b2, `free_u [4]`. `ip_adapter:4` is that of `with_image_prompts`.

    Raises:
        ModelError: for a UNet of other blocks.
    """
    dtype, inputs = contract.inputs[0].dtype, contract.inputs
    if "controlnet" in groups:
        inputs += _residuals(config, dtype)
    if "t2i_adapter" in groups:
        names = [f"{ADAPTER_RESIDUAL}{index:02}" for index in range(len(adapter_shapes(config)))]
        inputs += _named(names, adapter_shapes(config), dtype)
    if FREE_U in groups:
        inputs += (TensorSpec(FREE_U, "float32", (4,)),)
    return with_image_prompts(replace(contract, inputs=inputs), config, groups)


def controlnet_contract(config: Mapping[str, Any], precision: Precision, pooled: int | None = None) -> Contract:
    """The contract of a `ControlNetModel`.

    Args:
        config: its diffusers configuration.
        pooled: as of `unet_contract`.

    Returns:
        What a UNet takes, `control_image [B,3,8H,8W]` and `residual_scales` (float32, one number a residual: the
        strength is an input) → the residuals, as the group `controlnet` of its UNet's contract has them.
    """
    as_unet = {name: value for name, value in config.items() if name != "_class_name"}
    like_unet = unet_contract({**as_unet, "out_channels": config["in_channels"]}, precision, pooled)
    dtype, channels = DTYPES[precision], config.get("conditioning_channels", 3)
    residuals = _residuals(config, dtype)
    image = TensorSpec(CONTROL_IMAGE, dtype, (BATCH, channels, IMAGE_HEIGHT, IMAGE_WIDTH))
    scales = TensorSpec(RESIDUAL_SCALES, "float32", (len(residuals),))
    return Contract("controlnet", precision, (*like_unet.inputs, image, scales), residuals)


def _residuals(config: Mapping[str, Any], dtype: str) -> tuple[TensorSpec, ...]:
    """What ControlNets give and UNets take, the middle block's last."""
    shapes = residual_shapes(config)
    return _named([*map(down_residual, range(len(shapes) - 1)), MID_RESIDUAL], shapes, dtype)


def _named(names: Sequence[str], shapes: Sequence[tuple[int, int]], dtype: str) -> tuple[TensorSpec, ...]:
    """Tensors of the shapes that there are inside a UNet."""
    return tuple(
        TensorSpec(name, dtype, (BATCH, channels, scaled(LATENT_HEIGHT, factor), scaled(LATENT_WIDTH, factor)))
        for name, (channels, factor) in zip(names, shapes, strict=True)
    )


def residual_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels, and by how much its sides are smaller than the latents', of each residual; the middle's is the last.

    Args:
        config: of a UNet, or of a ControlNet, which has the same blocks.
    """
    config = {**_USUAL, **config}
    channels, blocks = _blocks_of(config)
    layers = config["layers_per_block"]
    layers = [layers] * len(blocks) if isinstance(layers, int) else layers
    last, found = len(blocks) - 1, [(channels[0], 1)]  # of the first convolution
    for index, count in enumerate(layers):
        found += [(channels[index], 2**index)] * count
        found += [(channels[index], 2 ** (index + 1))] * (index < last)
    return [*found, (channels[-1], 2**last)]


def adapter_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels, and by how much its sides are smaller than the latents', of what a T2I-Adapter adds to each block.

    A block with attention gets it before it halves the size, any other one after that. The middle block's is the last.

    Args:
        config: of a UNet.
    """
    channels, blocks = _blocks_of({**_USUAL, **config})
    last = len(blocks) - 1
    halved = (index + (name == "DownBlock2D" and index < last) for index, name in enumerate(blocks))
    return [*((channels[index], 2**times) for index, times in enumerate(halved)), (channels[-1], 2**last)]


def adapter_mismatch(config: Mapping[str, Any], unet: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """What a T2I-Adapter has otherwise than a UNet takes it: the fact, its own and the UNet's; None where it fits.

    Args:
        config: the adapter's.
        unet: the UNet's.
    """
    wanted, config = adapter_shapes(unet), {**_USUAL_ADAPTER, **config}
    channels = list(config["channels"])
    facts = {
        "list of channels": (channels, [one for one, _ in wanted][: len(channels)]),
        "downscale_factor": (config["downscale_factor"], wanted[0][1] * SIZE_MULTIPLE),
    }
    return next(((fact, own, fitting) for fact, (own, fitting) in facts.items() if own != fitting), None)


def _blocks_of(config: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    """Channels and class of each block on the way down. Raises `ModelError` for one of another class."""
    blocks = list(config["down_block_types"])
    if odd := [name for name in blocks if name not in BLOCKS]:
        raise ModelError(
            f"the model's unet has a {odd[0]}, whose skip connections sdtrt does not know",
            hint="use a Stable Diffusion 1.x, 2.x or XL model for ControlNet and T2I-Adapter, or run it in PyTorch",
        )
    return list(config["block_out_channels"]), blocks


def control_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ControlNet and its UNet have to have in common, of the configuration of either."""
    shapes = residual_shapes(config)
    width = {**_USUAL, **config}["cross_attention_dim"]
    return {
        "number of residuals": len(shapes) - 1,
        "cross_attention_dim": width[0] if isinstance(width, (list, tuple)) else width,
        "list of residuals' channels": [channels for channels, _ in shapes],
    }


def residual_names(contract: Contract) -> tuple[str, ...]:
    """The inputs of a contract that ControlNets give, the middle's last; none where it has no such group."""
    return tuple(spec.name for spec in contract.inputs if spec.name.startswith(("down_residual_", MID_RESIDUAL)))


def adapter_names(contract: Contract) -> tuple[str, ...]:
    """The inputs of a contract that T2I-Adapters give, the middle's last; none where it has no such group."""
    return tuple(spec.name for spec in contract.inputs if spec.name.startswith(ADAPTER_RESIDUAL))

"""The components of a model: which part of it each comes from, its contract, its precision, its sizes, its module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from sdtrt.common.errors import UsageError
from sdtrt.models.controlnets import UNION
from sdtrt.models.image_prompts import drop_projection
from sdtrt.models.live import LiveModel
from sdtrt.models.loading import load_parts
from sdtrt.models.resolve import Model
from sdtrt.models.source import ModelSource
from sdtrt.specs import (
    COMPONENTS,
    DEFAULT_TOKENS,
    QUANTISED,
    SIZE_MULTIPLE,
    Component,
    Group,
    Precision,
    Profile,
    Range,
    Sizes,
    check_choice,
)
from sdtrt.specs.contract import Contract, overflows_in_fp16, text_encoder_contract, unet_contract, vae_contract
from sdtrt.specs.deep_features import with_deep_features
from sdtrt.specs.groups import controlnet_contract, with_groups

if TYPE_CHECKING:
    import torch

STEPPING: tuple[Component, ...] = ("unet", "controlnet")  # what runs at each step, on rows of latents
TEXT_ENCODERS: tuple[Component, ...] = ("text_encoder", "text_encoder_2")
VAE_HALVES: tuple[Component, ...] = ("vae_decoder", "vae_encoder")


def part_of(component: Component) -> str:
    """The part of a model, as diffusers calls it, that a component is or is a half of."""
    return "vae" if component in VAE_HALVES else component


def components_of(model: ModelSource) -> tuple[Component, ...]:
    """All components that a model has, in the order in which its pipeline uses them (the encoder of images last)."""
    names = (name for name in COMPONENTS if part_of(name) in model.parts)  # type: ignore[arg-type]
    return tuple(name for name in names if name != "controlnet" or not _is_pytorchs(model))  # type: ignore[misc]


def _is_pytorchs(model: ModelSource) -> bool:
    """Whether a model's ControlNet is a union, or pools its residuals, for which no contract has inputs or shapes."""
    config = model.config("controlnet")
    return bool(config.get("global_pool_conditions")) or config.get("_class_name") == UNION


def groups_of(model: ModelSource) -> tuple[Group, ...]:
    """The optional groups of inputs that a model's UNet gets: what a ControlNet or T2I-Adapter beside it gives."""
    groups = {"controlnet": "controlnet", "adapter": "t2i_adapter"}
    return tuple(group for part, group in groups.items() if part in model.parts)


def text_encoders_of(model: ModelSource) -> tuple[Component, ...]:
    """The model's text encoders (SDXL has two, its refiner the second only)."""
    return tuple(name for name in TEXT_ENCODERS if name in model.parts)


def choose_components(model: ModelSource, names: Iterable[str]) -> tuple[Component, ...]:
    """The components that a user names, each once, in the usual order; all of the model's where none is named.

    Raises:
        UsageError: for a component that there is not, or that this model has not.
    """
    known = components_of(model)
    wanted = set(names)
    for name in wanted:
        check_choice("component", name, COMPONENTS)
        model.check_has(part_of(name))  # type: ignore[arg-type]  # checked above
        if name not in known:
            raise UsageError(f"{model.spec.name} has no {name}", hint=f"it has {', '.join(known)}")
    return tuple(name for name in known if not wanted or name in wanted)


def contract_of(
    model: ModelSource, component: Component, precision: Precision, groups: tuple[Group, ...] = ()
) -> Contract:
    """The contract of a model's component; a UNet's with optional groups of inputs.

    Raises:
        ModelError: where the model has no such part, or one that no engine can be made of.
    """
    config = model.config(part_of(component))
    if component == "unet":
        contract = with_groups(unet_contract(config, precision, model.pooled_width), config, groups)
        return with_deep_features(contract, config, groups)
    if component == "controlnet":
        return controlnet_contract(config, precision, model.pooled_width)
    if component in TEXT_ENCODERS:
        return text_encoder_contract(config, precision, component)
    return vae_contract(config, precision, component)


def precision_of(model: ModelSource, component: Component, precision: Precision) -> Precision:
    """The precision that a component is built in where `precision` is asked for.

    SDXL's VAE overflows in fp16. Its configuration says so (`force_upcast`, which by default is on), and diffusers'
    SDXL pipelines then compute it in fp32; those for Stable Diffusion 1.x and 2.x never ask.
    """
    upcast = model.is_sdxl and part_of(component) == "vae" and overflows_in_fp16(model.config("vae"))
    return "fp32" if precision == "fp16" and upcast else precision


def graph_precision(model: ModelSource, component: Component, precision: Precision) -> Precision:
    """As `precision_of`, of ONNX graphs: the UNet's alone is written in 8 bits, and what runs beside it in fp16."""
    return precision_of(model, component, "fp16" if precision in QUANTISED and component != "unet" else precision)


def unet_batch(images: int, *, guidance: bool, editing: bool = False) -> int:
    """The rows of a UNet call that makes so many images at once: with guidance two an image, three of an edit."""
    return images * ((3 if editing else 2) if guidance else 1)


def sizes_of(component: Component, sizes: Sizes, images: int = 1) -> Sizes:
    """The size of a component's call in a pipeline whose UNet is called with `sizes`.

    What a component's size does not depend on has one value, so that an engine serves whatever the rest of it is.

    Args:
        images: made at once. Prompts and negative prompts are encoded one after the other, and so are images.
    """
    if component in STEPPING:
        return sizes
    if component in TEXT_ENCODERS:
        return Sizes(images, SIZE_MULTIPLE, SIZE_MULTIPLE)
    return replace(sizes, batch=1 if component == "vae_encoder" else images, tokens=DEFAULT_TOKENS)


def profile_of(component: Component, profile: Profile, rows: int = 2) -> Profile:
    """The profile of a component's engine beside a UNet's with `profile`.

    The batch is that of images: half the UNet's, as guidance doubles that. Images are encoded one by one.

    Args:
        rows: of the UNet an image; three of models that edit.
    """
    if component in STEPPING:
        return profile
    batch = Range(*(-(-count // rows) for count in (profile.batch.min, profile.batch.opt, profile.batch.max)))
    tokens, side = Range.of(DEFAULT_TOKENS), Range.of(SIZE_MULTIPLE)
    if component in TEXT_ENCODERS:
        return Profile(batch, side, side, tokens)
    return replace(profile, batch=Range.of(1) if component == "vae_encoder" else batch, tokens=tokens)


def profiles_of(component: Component, profiles: Iterable[Profile], rows: int = 2) -> tuple[Profile, ...]:
    """The profiles of a component's engine, each once (a text encoder's is the same for all sizes of images)."""
    return tuple(dict.fromkeys(profile_of(component, profile, rows) for profile in profiles))


def load_component(model: ModelSource, component: Component, dtype: torch.dtype) -> torch.nn.Module:
    """The part of the model that a component is of, on the CPU; nothing else of the model is read.

    A UNet comes without what makes tokens of images for IP-Adapters, which runs beside its engine.
    """
    if isinstance(model, LiveModel):
        return model.load(component, dtype)
    assert isinstance(model, Model)
    part = part_of(component)
    module: torch.nn.Module = load_parts(model, (part,), dtype)[part]
    drop_projection(module)
    return module

"""Engines that are open in a live module's place: which one serves a call, and what computes the module's method.

Knows a call's tensors and arguments, and sessions. Whether the weights are the engine's is `swap`'s to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import ref

import torch

from sdtrt.backends.open import compute_with
from sdtrt.backends.session import Session
from sdtrt.backends.unchanged import same_memory
from sdtrt.engines.entry import Entry
from sdtrt.engines.find import slack
from sdtrt.live.bound import Bound
from sdtrt.live.live_text import encodes, least_rows
from sdtrt.models.components import STEPPING, TEXT_ENCODERS, sizes_of
from sdtrt.pipeline.parts.control_forward import ControlNetForward
from sdtrt.pipeline.parts.facades import VaeFacade
from sdtrt.pipeline.parts.forwards import ADAPTER, UNetForward
from sdtrt.specs import DEFAULT_TOKENS, SIZE_MULTIPLE, Component, Group, Sizes

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
AFTER_USUAL, AFTER_RESIDUALS = 8, 10  # their places among a UNet's arguments
IN_PYTORCH = "call sdtrt.accelerate with components= without it, or sdtrt.restore(pipe),"


@dataclass(frozen=True)
class Opened:
    """An engine that is open, and what it does as the module's method; `shallow` runs the steps beside a UNet's own."""

    entry: Entry
    session: Session[torch.Tensor]
    call: Callable[..., Any]
    shallow: Session[torch.Tensor] | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The optional groups of inputs that it has."""
        return self.entry.engine_key.export.groups


def fitting(engines: Sequence[Opened], component: Component, sizes: Sizes, groups: tuple[Group, ...]) -> Opened | None:
    """The engine that fits a size of a component's own call best, with inputs for all that it gives."""
    own = sizes_of(component, sizes, sizes.batch)
    fits = []
    for one in engines:
        if not set(groups) <= set(one.groups):
            continue
        profiles = one.entry.engine_key.profiles
        rows = least_rows(profiles, own.batch) if component in TEXT_ENCODERS else own.batch
        if (loose := slack(profiles, replace(own, batch=rows))) is not None:
            fits.append((rows, len(one.groups), loose, one))
    return min(fits, key=lambda fit: fit[:3])[3] if fits else None


def sizes_of_call(component: Component, first: torch.Tensor, states: torch.Tensor | None) -> Sizes:
    """The size of a call: of the UNet's for that, else of images or latents."""
    if component in TEXT_ENCODERS:
        return Sizes(first.shape[0], SIZE_MULTIPLE, SIZE_MULTIPLE)
    factor = 1 if component == "vae_encoder" else SIZE_MULTIPLE
    height, width = (side * factor for side in first.shape[-2:])
    if component in STEPPING:
        tokens = DEFAULT_TOKENS if states is None else states.shape[1]
        return Sizes(first.shape[0], height, width, tokens)
    return Sizes(1 if component == "vae_encoder" else first.shape[0], height, width)


def groups_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Group, ...]:
    """The optional groups of inputs that a UNet's call gives: diffusers passes them by these names."""
    given = [kwargs.get(name) for name in RESIDUALS] + list(args[AFTER_USUAL:AFTER_RESIDUALS])
    groups: tuple[Group, ...] = ("controlnet",) if sum(one is not None for one in given) == len(RESIDUALS) else ()
    adapter = args[AFTER_RESIDUALS] if len(args) > AFTER_RESIDUALS else kwargs.get(ADAPTER)
    return (*groups, "t2i_adapter") if adapter is not None else groups


def call_of(
    entry: Entry, session: Session[torch.Tensor], module: torch.nn.Module, device: torch.device
) -> Callable[..., Any]:
    """A module's method, by a session: what is called as that is, and gives what it gives."""
    component = entry.engine_key.export.component
    if component == "unet":
        return UNetForward(session, session.contract, device, IN_PYTORCH)
    if component == "controlnet":
        return ControlNetForward(session, device, IN_PYTORCH)
    if component in TEXT_ENCODERS:
        return encodes(session, device, ref(module), entry.engine_key.profiles, IN_PYTORCH)
    config: Any = module.config
    if component == "vae_decoder":
        return VaeFacade(config, device, decoder=session).decode
    facade = VaeFacade(config, device, encoder=session)
    facade.encode_one_by_one()
    return facade.encode


def followed(bound: Bound, opened: Opened, module: ref[torch.nn.Module]) -> Opened:
    """An engine that holds no weights, computing with the module's; one of shallow steps reads them where it does."""
    session: Any = opened.session
    found = replace(opened, call=bound.following(session, module, opened.call))
    if (second := opened.shallow) is not None:
        compute_with(second, session)
        own, views = cast(Any, second).weight_views(), session.weight_views()
        assert all(same_memory(one, views[name]) for name, one in own.items()), "weights would not be followed"
    return found


def close(engines: list[Opened]) -> None:
    """Close all, and empty the list."""
    for one in engines:
        one.session.close()
        if one.shallow is not None:
            one.shallow.close()
    engines.clear()

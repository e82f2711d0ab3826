"""A UNet as two programs that share its weights: one gives a deep feature beside the noise, one goes on from such.

The whole program is diffusers' own forward, looked into; the shallow one walks the outermost layers itself. Its module
has these layers and no others, so that an engine of it takes, or holds, their weights alone. Knows diffusers' modules.
Knows no exporter, and not at which steps which program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdtrt.exports.attributes import attribute
from sdtrt.specs.contract import GUIDANCE_EMBEDDING, Contract
from sdtrt.specs.deep_features import depth_in, given_feature, taken_feature
from sdtrt.specs.groups import residual_names

# Of a UNet, what every step computes beside the layers that it walks.
_ENDS = ("time_embedding", "add_embedding", "conv_in", "conv_norm_out", "conv_out")


@dataclass(frozen=True)
class _Layer:
    """One step on the way down or up: what it computes, where its modules are in the UNet, and what they are.

    Args:
        names: of a residual block and the transformer behind it, or of what changes the size.
    """

    unet: Any
    names: tuple[str, ...]

    @property
    def modules(self) -> list[Any]:
        """In the order in which they run."""
        return [self.unet.get_submodule(name) for name in self.names]

    def __call__(self, hidden: Tensor, emb: Tensor, states: Any) -> Tensor:
        """hidden [B,C,H,W], emb [B,E], states [B,S,D] → [B,C',H,W]."""
        block, *transformers = self.modules
        hidden = block(hidden, emb)
        for one in transformers:
            hidden = one(hidden, encoder_hidden_states=states, return_dict=False)[0]
        return hidden


def _layers_of(unet: Any, block: str) -> Iterator[_Layer]:
    """The layers of a block, in their order."""
    found = unet.get_submodule(block)
    for index in range(len(found.resnets)):
        attends = (f"{block}.attentions.{index}",) if hasattr(found, "attentions") else ()
        yield _Layer(unet, (f"{block}.resnets.{index}", *attends))


def _way_down(unet: Any) -> Iterator[_Layer | str]:
    """What makes each skip connection but the first, in their order: a layer, or the name of what halves the size."""
    for index, block in enumerate(unet.down_blocks):
        yield from _layers_of(unet, f"down_blocks.{index}")
        if block.downsamplers is not None:
            yield f"down_blocks.{index}.downsamplers.0"


def _way_up(unet: Any) -> list[tuple[_Layer, str | None]]:
    """The layers on the way up, the last one first, each with the name of what doubles the size behind it."""
    found: list[tuple[_Layer, str | None]] = []
    for index, block in enumerate(unet.up_blocks):
        *before, last = _layers_of(unet, f"up_blocks.{index}")
        doubles = None if block.upsamplers is None else f"up_blocks.{index}.upsamplers.0"
        found += [*((one, None) for one in before), (last, doubles)]
    return found[::-1]


class WholeCall(torch.nn.Module):
    """A call of a whole UNet that gives the deep feature, too.

    Args:
        inner: takes the contract's inputs, and gives the noise.
        unet: what it calls.
        contract: has the deep feature among its outputs.
    """

    def __init__(self, inner: Any, unet: Any, contract: Contract) -> None:
        super().__init__()
        feature = given_feature(contract)
        assert feature is not None
        self.unet = unet
        self._inner = (inner,)  # no submodule: the UNet's tensors have one name each
        self._joining = (_way_up(unet)[depth_in(feature) - 1][0].modules[0],)
        self._channels = int(feature.dims[1])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the inner call takes → out_sample [B,C,H,W], the deep feature [B,C,H,W]."""
        (block,), seen = self._joining, list[Tensor]()
        with attribute(block, "forward", partial(_note, block.forward, seen)):
            noise: Tensor = self._inner[0].forward(*inputs)
        return noise, seen[0][:, : self._channels]  # the skip connection is joined behind it


def _note(forward: Callable[..., Tensor], seen: list[Tensor], hidden: Tensor, *more: Tensor) -> Tensor:
    """Run a residual block, and note what it was given."""
    seen.append(hidden)
    return forward(hidden, *more)


class ShallowCall(torch.nn.Module):
    """A call of a UNet's outermost layers, which goes on from a deep feature.

    Args:
        unet: whose layers it calls.
        contract: names the inputs, which come in its order.
    """

    def __init__(self, unet: Any, contract: Contract) -> None:
        super().__init__()
        feature = taken_feature(contract)
        assert feature is not None
        depth, self._feature = depth_in(feature), feature.name
        self._whole = (unet,)  # no submodule: of its layers a few count
        self._names, self._residuals = [spec.name for spec in contract.inputs], residual_names(contract)
        self._down = [step for step, _ in zip(_way_down(unet), range(depth - 1), strict=False)]
        self._up = _way_up(unet)[:depth][::-1]
        self.unet = _some_of(unet, self._used())

    def _used(self) -> Iterator[str]:
        """The names of the UNet's modules that it calls."""
        yield from _ENDS
        for step in self._down:
            yield from (step,) if isinstance(step, str) else step.names
        for number, (layer, doubles) in enumerate(self._up):
            yield from layer.names
            if doubles is not None and number + 1 < len(self._up):
                yield doubles

    def forward(self, *inputs: Tensor) -> Tensor:
        """The contract's inputs → out_sample [B,C,H,W]."""
        (unet,), given = self._whole, dict(zip(self._names, inputs, strict=True))
        emb, states = _embedded(unet, given), given.get("encoder_hidden_states")
        if states is not None:
            states = unet.process_encoder_hidden_states(encoder_hidden_states=states, added_cond_kwargs=None)
        sample = given["sample"]
        hidden: Tensor = unet.conv_in(2 * sample - 1.0 if unet.config.center_input_sample else sample)
        skips = [hidden]
        for step in self._down:
            hidden = unet.get_submodule(step)(hidden) if isinstance(step, str) else step(hidden, emb, states)
            skips.append(hidden)
        if self._residuals:
            skips = [one + given[name] for one, name in zip(skips, self._residuals, strict=True)]
        return _ended(unet, self._climb(given[self._feature], skips, emb, states))

    def _climb(self, hidden: Tensor, skips: list[Tensor], emb: Tensor, states: Any) -> Tensor:
        """The way up from the deep feature."""
        for layer, doubles in self._up:
            hidden = layer(torch.cat([hidden, skips.pop()], dim=1), emb, states)
            if doubles is not None and skips:
                hidden = self._whole[0].get_submodule(doubles)(hidden, skips[-1].shape[2:])
        return hidden


def _embedded(unet: Any, given: dict[str, Tensor]) -> Tensor:
    """The embedding [B,E] of the timestep, and of what else a UNet is told once for all layers."""
    embedding = unet.get_time_embed(sample=given["sample"], timestep=given["timestep"])
    emb: Tensor = unet.time_embedding(embedding, given.get(GUIDANCE_EMBEDDING))
    if "text_embeds" in given:  # diffusers joins it with fp32 embeddings
        added = {"text_embeds": given["text_embeds"].float(), "time_ids": given["time_ids"]}
        emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=None, added_cond_kwargs=added)
    return emb if unet.time_embed_act is None else unet.time_embed_act(emb)


def _ended(unet: Any, hidden: Tensor) -> Tensor:
    """What a UNet does behind its last layer."""
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    noise: Tensor = unet.conv_out(hidden)
    return noise


def _some_of(unet: Any, names: Iterator[str]) -> torch.nn.Module:
    """A module that has some of a UNet's, by their names there."""
    found = torch.nn.Module()
    for name in names:
        *parents, own = name.split(".")
        if (module := _submodule(unet, name)) is None:
            continue
        place = found
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, torch.nn.Module())
            place = place.get_submodule(parent)
        place.add_module(own, module)
    return found


def _submodule(unet: Any, name: str) -> torch.nn.Module | None:
    """A UNet's module by its name; None where it has none such, or None in its place."""
    try:
        found = unet.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, torch.nn.Module) else None

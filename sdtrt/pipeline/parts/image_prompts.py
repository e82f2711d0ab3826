"""The image prompts of a UNet's call, as its engine takes them: projected to tokens, with the adapters' scales.

The projection (a layer, or IP-Adapter Plus's resampler) is outside of the engine: it depends on the picture alone,
while an engine runs at each step. So it runs once for a picture on a GPU, an engine serves all kinds of adapters that
have as many tokens, and another projection needs no engine. Knows diffusers' UNets. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.unchanged import TensorSnapshot
from sdtrt.common.errors import EngineError, UnservedCallError
from sdtrt.models.image_prompts import is_image_prompt, projection_of
from sdtrt.pipeline.parts.watch import place_of
from sdtrt.specs import Group
from sdtrt.specs.image_prompts import SCALE, group_of, image_tokens

ADDED, EMBEDS = "added_cond_kwargs", "image_embeds"
BEFORE_ADDED = 7  # a UNet's arguments before that one
MASKS = "ip_adapter_masks"
FACES = "clip_embeds"  # what FaceID Plus's projection takes besides, as an attribute that users set
NAMES = (
    ADDED,
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
    "return_dict",
)


class ImagePrompts:
    """The image prompts of a UNet with IP-Adapters.

    Args:
        unet: gives it; None where it is gone.
    """

    def __init__(self, unet: Callable[[], torch.nn.Module | None]) -> None:
        self._unet = unet
        self._projection: Any = None
        self._processors: list[Any] = []
        self._seen: tuple[Any, ...] = ()
        self._tokens: list[torch.Tensor] = []
        self._scales: tuple[Any, torch.Tensor] | None = None

    @property
    def count(self) -> int:
        """How many adapters the UNet had when it was looked at last; 0 for none."""
        return 0 if self._projection is None else len(self._projection.image_projection_layers)

    def look(self) -> bool:
        """Look whether the UNet has other adapters than before; whether it has."""
        unet = self._unet()
        found = None if unet is None else projection_of(unet)
        if found is self._projection:
            return False
        self._projection, self._seen, self._tokens, self._scales = found, (), [], None
        own: Any = {} if found is None else getattr(unet, "attn_processors", {})
        self._processors = [one for one in own.values() if is_image_prompt(one)]
        return True

    def take(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Group, ...], tuple[Any, ...], dict[str, Any]]:
        """The group of inputs that a UNet's call needs, and its arguments as the engine takes them.

        Args:
            args, kwargs: diffusers' own, with the pictures' embeddings `[B,N,…]`, one an adapter, in
                `added_cond_kwargs["image_embeds"]`.

        Returns:
            In `added_cond_kwargs` there are the engine's inputs by name in the place of those. A UNet without adapters
            has no group, and its arguments are as they were.

        Raises:
            EngineError: for masks, embeddings that are missing, and those of another width or number.
        """
        if self._projection is None:
            return (), args, kwargs
        kwargs = {**dict(zip(NAMES, args[BEFORE_ADDED:], strict=False)), **kwargs}
        _refuse_masks(kwargs.get("cross_attention_kwargs") or (args[6] if len(args) > BEFORE_ADDED - 1 else None))
        added = dict(kwargs.get(ADDED) or {})
        tokens = self._projected(_checked(added.pop(EMBEDS, None), self._projection))
        added |= {image_tokens(at): one for at, one in enumerate(tokens)} | {SCALE: self._scale(tokens[0].device)}
        group = group_of([one.shape[1] for one in tokens])
        return (group,), args[:BEFORE_ADDED], {**kwargs, ADDED: added}

    def _projected(self, embeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each adapter's tokens `[B,T,D]`, those of its pictures one after the other; the last ones where these are
        the same embeddings: PyTorch counts the changes of tensors on a GPU alone, so that it is for GPUs."""
        places = tuple(map(place_of, self._projection.parameters()))
        same = len(self._seen) == 2 and self._seen[0] == places and len(self._seen[1]) == len(embeds)
        if same and all(was.is_still(one) for was, one in zip(self._seen[1], embeds, strict=True)):
            return self._tokens
        refuse_gradients("unet", {EMBEDS: embeds[0]})
        with torch.no_grad():
            self._tokens = [one.flatten(1, 2) for one in self._projection(list(embeds))]
        taken = [TensorSnapshot.of(one) for one in embeds]
        more = any(hasattr(one, FACES) for one in self._projection.image_projection_layers)
        self._seen = (places, taken) if None not in taken and not more else ()
        return self._tokens

    def _scale(self, device: torch.device) -> torch.Tensor:
        """How much each adapter counts in each attention, `[adapters, layers]`; the same tensor while that is so."""
        rows = tuple(tuple(one.scale) for one in self._processors)
        if self._scales is None or self._scales[0] != (rows, device):
            columns = torch.tensor([[_number(one) for one in row] for row in rows], device=device)
            self._scales = (rows, device), columns.T.contiguous()
        return self._scales[1]


class PromptedForward:
    """The forward of a UNet's facade whose engine takes image prompts. Copies of the facade share it.

    Args:
        projection: makes tokens, as a UNet's `encoder_hid_proj`.
        processors: the attentions' by name, with the scales.
        forward: takes what the engine takes.
    """

    def __init__(self, projection: torch.nn.Module, processors: Mapping[str, Any], forward: Callable[..., Any]) -> None:
        like_unet: Any = torch.nn.Module()
        like_unet.encoder_hid_proj, like_unet.attn_processors = projection, processors
        self._prompts, self._forward = ImagePrompts(lambda: like_unet), forward
        self._prompts.look()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `UNetForward`, with embeddings of pictures in `added_cond_kwargs["image_embeds"]`."""
        _, args, kwargs = self._prompts.take(args, kwargs)
        return self._forward(*args, **kwargs)


def _number(scale: object) -> float:
    if not isinstance(scale, (int, float)):
        raise UnservedCallError(
            f"the scale of an IP-Adapter is {scale!r}: one for each picture goes with masks, which no engine takes",
            hint="pipe.set_ip_adapter_scale(0.6), a number an adapter or block; or sdtrt.restore(pipe) for masks",
        )
    return float(scale)


def _refuse_masks(given: Mapping[str, Any] | None) -> None:
    if given and given.get(MASKS) is not None:
        raise UnservedCallError(
            "the engine of the unet has no input for ip_adapter_masks",
            hint="leave cross_attention_kwargs out, or sdtrt.restore(pipe): PyTorch takes masks",
        )


def _checked(embeds: Any, projection: Any) -> list[torch.Tensor]:
    """A call's embeddings, one an adapter. Raises `EngineError` for none, or others than the adapters take."""
    wanted = len(projection.image_projection_layers)
    if embeds is None:
        raise EngineError(
            f"the unet has {wanted} IP-Adapter{'s' * (wanted > 1)}, and the call no image for it",
            hint="pass ip_adapter_image= or ip_adapter_image_embeds=, or pipe.unload_ip_adapter()",
        )
    found = [embeds.unsqueeze(1)] if isinstance(embeds, torch.Tensor) else list(embeds)  # as diffusers takes one alone
    if len(found) != wanted:
        raise EngineError(
            f"the unet has {wanted} IP-Adapters, and the call images for {len(found)}",
            hint="pass a list with an entry for each adapter, as in ip_adapter_image=[one, another]",
        )
    for at, (one, layer) in enumerate(zip(found, projection.image_projection_layers, strict=True)):
        width = width_of(layer)
        if width is not None and one.shape[-1] != width:
            raise EngineError(
                f"the image embeddings of IP-Adapter {at} have the width {one.shape[-1]}, and it takes {width}",
                hint="use the image encoder that the adapter was trained with",
            )
    return found


def width_of(layer: Any) -> int | None:
    """The width of the embeddings that an adapter's projection takes; None where its class doesn't say it."""
    if hasattr(layer, FACES):  # which takes faces first, and is as wide as they are inside
        return None
    first = getattr(layer, "image_embeds", None) or getattr(layer, "proj_in", None)
    if first is None and hasattr(layer, "ff"):
        first = layer.ff.net[0].proj
    return getattr(first, "in_features", None)

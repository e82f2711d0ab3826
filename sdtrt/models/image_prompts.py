"""The layers that IP-Adapters put into a UNet: keys and values of image tokens beside each attention over text.

diffusers keeps them in attention processors, with each adapter's scale as a Python number; what makes tokens of an
image (`encoder_hid_proj`) is no part of a UNet's engine. Knows modules. Knows no file, no export and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdtrt.specs import Group
from sdtrt.specs.contract import Contract
from sdtrt.specs.image_prompts import IMAGE_TOKENS, group_of

if TYPE_CHECKING:
    import torch

PROJECTION = "encoder_hid_proj"  # the UNet's own name of what makes tokens of images
PROCESSORS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")


def is_image_prompt(processor: object) -> bool:
    """Whether an attention's processor has the layers of IP-Adapters."""
    return type(processor).__name__ in PROCESSORS


def attentions_of(unet: torch.nn.Module) -> list[Any]:
    """The attentions of a UNet that have such layers, in its own order of modules."""
    return [one for one in unet.modules() if is_image_prompt(one.__dict__.get("_modules", {}).get("processor"))]


def projection_of(unet: Any) -> Any:
    """What makes tokens of images for a UNet's IP-Adapters; None where it has none."""
    found = unet.__dict__["_modules"].get(PROJECTION)
    return found if type(found).__name__ == "MultiIPAdapterImageProjection" else None


def drop_projection(unet: Any) -> None:
    """Leave out of a UNet what makes tokens of images: it makes what an engine takes."""
    if projection_of(unet) is not None:
        unet.encoder_hid_proj = None


def groups_of(unet: torch.nn.Module) -> tuple[Group, ...]:
    """The group of inputs that a UNet's IP-Adapters need, for one image each; none without any."""
    if projection_of(unet) is None:
        return ()
    found = attentions_of(unet)
    return (group_of(found[0].processor.num_tokens),) if found else ()


def plain_processors(module: Any) -> None:
    """Give all attentions of a module diffusers' usual processor, but those with layers of IP-Adapters."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    usual = AttnProcessor2_0()
    module.set_attn_processor(
        {name: one if is_image_prompt(one) else usual for name, one in module.attn_processors.items()}
    )


def complete(module: Any, contract: Contract) -> None:
    """Put layers by chance into a UNet that has none, where a contract has inputs for IP-Adapters."""
    counts = [spec.dims[1] for spec in contract.inputs if spec.name.startswith(IMAGE_TOKENS)]
    if counts and not attentions_of(module):
        add_layers(module, [int(one) for one in counts])


def add_layers(unet: Any, counts: Sequence[int], seed: int = 0) -> None:
    """Put the layers of IP-Adapters into a UNet that has none, with random weights.

    Args:
        counts: the tokens of each adapter.
    """
    import torch
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, attention in unet.named_modules():
            if name.endswith(".attn2"):
                width, text = attention.to_k.weight.shape
                made = IPAdapterAttnProcessor2_0(width, text, num_tokens=list(counts))
                weight = attention.to_k.weight
                attention.set_processor(made.to(weight.device, weight.dtype).requires_grad_(False))

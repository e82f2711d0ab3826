"""IP-Adapters in a UNet, and their image encoder: read by diffusers' and transformers' own loaders.

Knows modules. Which adapters there are, `ip_adapters` has found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import quiet_libraries
from sdtrt.common.errors import ModelError
from sdtrt.models import ip_files
from sdtrt.models.ip_adapters import OTHER, IpAdapter
from sdtrt.models.loras import Lora
from sdtrt.specs import LoraSpec

if TYPE_CHECKING:
    import torch

MOST_LETTERS = 200  # of what a library says
State = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ImagePromptParts:
    """What a pipeline needs for image prompts beside its UNet's engine.

    Args:
        projection: makes tokens of the embeddings of pictures (`MultiIPAdapterImageProjection`).
        layout: a UNet without memory for weights: diffusers looks there where scales go, and writes them there.
    """

    projection: torch.nn.Module
    layout: Any


def put_on(unet: Any, adapters: Sequence[IpAdapter], dtype: torch.dtype) -> None:
    """Have diffusers put adapters into a UNet. Raises `ModelError` for tensors that don't fit, or are not finite."""
    states = [_state(one, dtype) for one in adapters]
    with quiet_libraries(), _mapped(adapters):
        unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    unet.eval().requires_grad_(False)


def check(empty: Any, adapters: Sequence[IpAdapter]) -> None:
    """Check by names and shapes that adapters fit a UNet; reads no tensor.

    Args:
        empty: the UNet on PyTorch's meta device, which gets them.

    Raises:
        ModelError: naming what does not fit.
    """
    import torch

    with quiet_libraries(), _mapped(adapters), torch.device("meta"):
        empty._load_ip_adapter_weights([_empty_state(one) for one in adapters], low_cpu_mem_usage=False)


def load_parts_for_engine(empty: Any, adapters: Sequence[IpAdapter], dtype: torch.dtype) -> ImagePromptParts:
    """What makes an engine's tokens, in `dtype` on the CPU; `empty` as of `check`."""
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    check(empty, adapters)
    states = [_state(one, dtype) for one in adapters]
    with quiet_libraries(), _mapped(adapters):
        made = [
            empty._convert_ip_adapter_image_proj_to_diffusers(one["image_proj"], low_cpu_mem_usage=False)
            for one in states
        ]
    projection = MultiIPAdapterImageProjection(made).to(dtype).eval().requires_grad_(False)
    return ImagePromptParts(projection, empty)


def face_loras(unet: Any, adapters: Sequence[IpAdapter]) -> tuple[Lora, ...]:
    """The LoRAs that adapters for faces have of a UNet, each whole, as diffusers has them.

    Args:
        unet: gives the attentions their names; on PyTorch's meta device the LoRAs' tensors lie there, too.

    Raises:
        ModelError: where some of a LoRA is missing, or is not finite.
    """
    import torch

    found = []
    is_empty = next(unet.parameters()).is_meta
    for one in (own for own in adapters if own.has_lora):
        state = _empty_state(one) if is_empty else _state(one, torch.float32)
        with _mapped((one,)):
            (tensors,) = unet._load_ip_adapter_loras([state]).values()
        found.append(Lora(LoraSpec(str(one.path)), one.path, ("unet",), tensors))
    return tuple(found)


def load_image_encoder(adapter: IpAdapter, dtype: torch.dtype) -> dict[str, Any]:
    """The image encoder and what prepares pictures for it, as pipelines' constructors call them; nothing for faces."""
    if adapter.encoder is None:
        return {}
    import transformers

    with quiet_libraries():
        try:
            encoder: Any = transformers.CLIPVisionModelWithProjection.from_pretrained(
                adapter.encoder, local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{adapter.encoder} is no image encoder: {_shortly(error)}", hint="download it again"
            ) from error
        size = encoder.config.image_size
        extractor = transformers.CLIPImageProcessor(size=size, crop_size=size)  # as diffusers makes it
    return {"image_encoder": encoder.eval().requires_grad_(False), "feature_extractor": extractor}


def _state(adapter: IpAdapter, dtype: torch.dtype) -> State:
    """An adapter's tensors in two groups, as diffusers takes them."""
    import torch

    found = ip_files.tensors_of(adapter.path)
    cast = {name: tensor.to(dtype) for name, tensor in found.items()}
    if bad := [name for name, tensor in cast.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelError(
            f"{bad[0]} of {adapter.path} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}",
            hint="use --precision fp32; if that fails too, download it again",
        )
    return _grouped(cast)


def _empty_state(adapter: IpAdapter) -> State:
    """Tensors of its shapes, without memory."""
    import torch

    infos = ip_files.infos_of(adapter.path)
    return _grouped({name: torch.empty(info.shape, device="meta") for name, info in infos.items()})


def _grouped(tensors: Mapping[str, Any]) -> State:
    groups: State = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    return groups


@contextmanager
def _mapped(adapters: Sequence[IpAdapter]) -> Iterator[None]:
    """Have what diffusers raises of a file be a `ModelError`."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        names = ", ".join(str(one.path) for one in adapters)
        raise ModelError(f"{names} does not fit the unet: {_shortly(error)}", hint=OTHER) from error


def _shortly(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_LETTERS]

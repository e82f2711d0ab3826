"""LoRAs in the weights of a module: read by diffusers' own loaders, put around its layers and merged by peft.

Knows modules. Which LoRAs there are, `loras` has found.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import quiet_libraries
from sdtrt.common.errors import EngineError, ModelError
from sdtrt.models.adapters import OwnLayer, adapters_of, merged, own_state, wrapped_layers
from sdtrt.models.loras import Lora

if TYPE_CHECKING:
    import torch

SHOWN = 3  # names of what does not fit
MOST_LETTERS = 200  # of what a library says
_OLD_NAME = re.compile(r"\.to_([qkv])_lora\.")
_HINT = "use a LoRA that was made for the model's kind, or download it again"


def merge_loras(
    module: torch.nn.Module, part: str, loras: Sequence[Lora], unet: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Merge LoRAs into a part's weights, each by its own weight; no layer of peft is left.

    Args:
        unet: configuration of the model's UNet.
        dtype: of the weights that result; sums are taken in float32.

    Raises:
        ModelError: for LoRAs that don't fit, naming what does not.
    """
    import torch
    from diffusers.utils import recurse_remove_peft_layers

    put_around(module, part, loras, unet)
    state = own_state(module)
    with torch.no_grad():
        for layer in wrapped_layers(module):
            for name, tensor in _merged(layer, loras).items():
                state[name].data = _cast(tensor, name, part, loras, dtype)
    recurse_remove_peft_layers(module)
    if hasattr(module, "peft_config"):
        del module.peft_config
    module.requires_grad_(False)


def _merged(layer: OwnLayer, loras: Sequence[Lora]) -> dict[str, torch.Tensor]:
    """`merged`, whose error names the files; its way out is for live pipelines."""
    try:
        return merged(layer)
    except EngineError as error:
        raise ModelError(f"{_files(loras)}: {error.message}", hint=_HINT) from error


def _files(loras: Sequence[Lora]) -> str:
    return ", ".join(str(one.path) for one in loras)


def check(module: torch.nn.Module, part: str, loras: Sequence[Lora], unet: Mapping[str, Any]) -> None:
    """Check that LoRAs fit a part, whose module may lie on PyTorch's meta device.

    Raises:
        ModelError: naming some of what does not fit.
    """
    with quiet_libraries():
        for lora in loras:
            with _mapped(lora, part):
                state, _, _ = _read(lora, unet)
                _check_fit(module, part, lora, state)


def put_around(module: torch.nn.Module, part: str, loras: Sequence[Lora], unet: Mapping[str, Any]) -> None:
    """Put LoRAs around a part's layers, all active, each by its own weight.

    Raises:
        ModelError: for LoRAs that don't fit.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice, as of a second adapter
        for name, lora in zip(names, loras, strict=True):
            _load(module, part, lora, unet, name)
    for layer in adapters_of(module):
        layer.set_adapter(names)
        for name, lora in zip(names, loras, strict=True):
            layer.set_scale(name, lora.spec.weight)


def _load(module: torch.nn.Module, part: str, lora: Lora, unet: Mapping[str, Any], name: str) -> None:
    """Let diffusers put one LoRA around a module's layers."""
    with _mapped(lora, part):
        state, alphas, metadata = _read(lora, unet)
        _check_fit(module, part, lora, state)
        own: dict[str, Any] = {"adapter_name": name, "metadata": metadata, "low_cpu_mem_usage": True}
        if part == "unet":
            _loader(unet).load_lora_into_unet(state, alphas, module, **own)
        else:
            _loader(unet).load_lora_into_text_encoder(state, alphas, module, prefix=part, **own)
        _check_taken(module, part, lora, state, name)


def _check_taken(module: torch.nn.Module, part: str, lora: Lora, state: Mapping[str, Any], name: str) -> None:
    """Raise `ModelError` for layers of a LoRA that diffusers has left out without a word."""
    wanted = {key.rpartition(".lora_")[0] for key in _peft_tensors(module, part, state)}
    there = {one.name for one in wrapped_layers(module) if any(name in own.active_adapters for own in one.adapters)}
    if lost := sorted(wanted - there):
        some = ", ".join(lost[:SHOWN]) + ", …" * (len(lost) > SHOWN)
        raise ModelError(f"diffusers leaves {len(lost)} layers of {lora.path} for the {part} out ({some})", hint=_HINT)


@contextmanager
def _mapped(lora: Lora, part: str) -> Iterator[None]:
    """Have what diffusers and peft raise of a file be a `ModelError`."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:MOST_LETTERS]  # a first line may say that there were errors, and no more
        raise ModelError(f"{lora.path} does not fit the {part}: {reason}", hint=_HINT) from error


def _read(lora: Lora, unet: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """A LoRA's tensors by diffusers' names, what they are scaled by, and what its file says besides."""
    config = SimpleNamespace(layers_per_block=unet.get("layers_per_block", 2)) if _is_sdxl(unet) else None
    source = str(lora.path) if lora.tensors is None else dict(lora.tensors)
    read: tuple[dict[str, Any], Any, Any] = _loader(unet).lora_state_dict(
        source, unet_config=config, return_lora_metadata=True, local_files_only=True
    )
    state, alphas, metadata = read
    names = {name: _readable(name) for name in state} if not any("to_out_lora" in name for name in state) else {}
    if alphas:
        alphas = {
            names.get(name.removesuffix(".alpha"), name.removesuffix(".alpha")) + ".alpha": one
            for name, one in alphas.items()
        }
    return {names.get(name, name): one for name, one in state.items()}, alphas, metadata


def _readable(name: str) -> str:
    """A name of a text encoder's tensor as diffusers reads it in any case.

    What it makes of kohya's names it reads itself only where `out_proj` is among them: else it drops attention's.
    """
    return _OLD_NAME.sub(r".\1_proj.lora_linear_layer.", name) if name.startswith("text_encoder") else name


def _is_sdxl(unet: Mapping[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def _loader(unet: Mapping[str, Any]) -> Any:
    """What reads LoRAs of a model's kind."""
    import diffusers

    return diffusers.StableDiffusionXLPipeline if _is_sdxl(unet) else diffusers.StableDiffusionPipeline


def _check_fit(module: torch.nn.Module, part: str, lora: Lora, state: Mapping[str, Any]) -> None:
    """Raise `ModelError` for layers that a module has not, or of another shape: diffusers may leave them out.

    So for those of which one matrix is missing.
    """
    layers, missing, wrong = dict(module.named_modules()), set(), []
    tensors = _peft_tensors(module, part, state)
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".lora_") if ".lora_" in key else (key, "", "")
        weight = getattr(layers.get(name), "weight", None)
        if weight is None:
            missing.add(name)
        elif kind in ("A.weight", "B.weight") and weight.shape[kind[0] == "A"] != tensor.shape[kind[0] == "A"]:
            wrong.append(f"{name}: {list(tensor.shape)} to {list(weight.shape)}")
    kinds = (
        (f"is for {{}} layers that the {part} has not", sorted(missing)),
        ("is for {} layers of another shape", wrong),
        (f"has no pair of matrices of one rank for {{}} layers of the {part}", _unpaired(tensors)),
    )
    for what, names in kinds:
        if names:
            some = ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
            raise ModelError(f"{lora.path} {what.format(len(names))} ({some})", hint=_HINT)


def _unpaired(tensors: Mapping[str, Any]) -> list[str]:
    """The layers that have one matrix of a LoRA alone: peft would multiply it with memory that nobody has written."""
    ranks: dict[str, dict[str, int]] = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".lora_")
        if kind in ("A.weight", "B.weight"):
            ranks[kind[0]][name] = tensor.shape[kind[0] == "B"]
    names = ranks["A"].keys() | ranks["B"].keys()
    return sorted(name for name in names if ranks["A"].get(name) != ranks["B"].get(name))


def _peft_tensors(module: torch.nn.Module, part: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """A part's tensors by the names that peft has for them, by diffusers' own rules."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own = {name.removeprefix(f"{part}."): one for name, one in state.items() if name.startswith(f"{part}.")}
    if part == "unet":
        return dict(own if not own or "lora_A" in next(iter(own)) else convert_unet_state_dict_to_peft(own))
    named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own)) if own else {}
    start = "" if hasattr(module, "text_model") else "text_model."
    return {name.removeprefix(start): one for name, one in named.items()}


def _cast(tensor: torch.Tensor, name: str, part: str, loras: Sequence[Lora], dtype: torch.dtype) -> torch.Tensor:
    """A merged tensor in the part's dtype. Raises `ModelError` for numbers that are not finite there."""
    import torch

    cast = tensor.to(dtype)
    if not tensor.is_meta and not bool(torch.isfinite(cast).all()):
        raise ModelError(
            f"{name} of the {part} holds numbers that are not finite in {str(dtype).removeprefix('torch.')} with"
            f" {_files(loras)} in it",
            hint="use smaller weights, as in --lora FILE:0.5, or --precision fp32; or download the LoRA again",
        )
    return cast

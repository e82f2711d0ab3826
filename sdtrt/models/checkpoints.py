"""Checkpoints with original or old key names: what they are, and their tensors under today's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdtrt.common.console import quiet_libraries
from sdtrt.common.errors import ModelError
from sdtrt.models.weights import TensorInfo
from sdtrt.specs.contract import inpainting_channels

if TYPE_CHECKING:
    import torch

Layout = Literal["folder", "single-file"]

PREFIXES = {  # part → where its tensors lie in an original checkpoint
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model."),  # the latter: of SDXL's refiner
}
_UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
_LATENT_CHANNELS = 4
_FOREIGN_KEYS = {  # what else a safetensors file can be, told by its keys
    "a LoRA": r"lora_|\.lora\.|lora_[AB]",
    "a ControlNet": r"^control_model\.|controlnet",
    "a Flux model": r"double_blocks\.",
    "a Stable Diffusion 3 model": r"joint_blocks\.",
    "a diffusers UNet without the rest of its folder": r"^down_blocks\.",
    "a file of EMA weights alone (model_ema.*)": r"^model_ema\.",
}
_PARTS_ALONE = {  # what a file without a UNet holds of a model: the part, told by its keys
    "vae": r"^(first_stage_model\.|vae\.)?(decoder|encoder)\.",
    "text encoder": r"text_model\.|^cond_stage_model\.|^conditioner\.embedders\.",
}
_EMA = next(kind for kind in _FOREIGN_KEYS if "EMA" in kind)
_HINTS = {
    _EMA: "use its full or its pruned version: one that has model.diffusion_model.* tensors",
    "a VAE alone": "pass it as --vae, beside a checkpoint as --model",
}
# Numbers that quantised weights are to be multiplied with: those of fp8 with scales, of bitsandbytes.
_SCALES = re.compile(
    r"\.(scale_weight|weight_scale|scale_input|input_scale|absmax|quant_map|SCB)$|\.quant_state\.|(^|\.)scaled_fp8$"
)
# Tensors that old files hold and today's text encoders don't take.
_LEFT_OVER = re.compile(r"position_ids$|logit_scale$|^text_projection|^vision_model\.|^visual_projection|attn_mask$")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}


def check_checkpoint(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Raise `ModelError` unless the keys are those of a Stable Diffusion from text to images, or for inpainting."""
    if _UNET_INPUT not in infos:
        what = describe(infos)
        raise ModelError(
            f"{path} is no Stable Diffusion checkpoint: {what}",
            hint=next(
                (hint for kind, hint in _HINTS.items() if kind in what),
                "pass a Stable Diffusion 1.x, 2.x or XL checkpoint, or a diffusers folder",
            ),
        )
    channels = infos[_UNET_INPUT].shape[1:2]
    if channels not in ((_LATENT_CHANNELS,), (inpainting_channels(_LATENT_CHANNELS),)):
        raise ModelError(
            f"the unet of {path} takes {', '.join(map(str, channels))} channels instead of {_LATENT_CHANNELS}: "
            "a model for editing or upscaling, which sdtrt does not support",
            hint="use the text-to-image checkpoint that it was made from, or one for inpainting; of a model for editing"
            " (instruct-pix2pix) its diffusers folder",
        )


def describe(names: Iterable[str]) -> str:
    """What a file without a whole model is, by the names of its tensors: `it looks like a LoRA`."""
    names = tuple(names)
    kinds = [kind for kind, pattern in _FOREIGN_KEYS.items() if any(re.search(pattern, name) for name in names)]
    if kinds:
        return f"it looks like {kinds[0]}"
    parts = [part for part, pattern in _PARTS_ALONE.items() if any(re.search(pattern, name) for name in names)]
    if len(parts) == 1:
        return f"it looks like a {'VAE' if parts[0] == 'vae' else parts[0]} alone"
    return f"it has no unet, only a {' and a '.join(parts)}" if parts else f"it has no {_UNET_INPUT}"


def check_plain(part: str, name: str, dtypes: Mapping[str, str]) -> None:
    """Refuse weights that are quantised: whole numbers, or numbers that others beside them are to be multiplied with.

    Args:
        part: whose tensors they are.
        name: of what they lie in.
        dtypes: of the tensors, by their stored names.

    Raises:
        ModelError: naming some of them.
    """
    scales = sorted(tensor for tensor in dtypes if _SCALES.search(tensor))
    if not scales:
        return
    kind = "fp8 with scales" if any(dtype.startswith("float8") for dtype in dtypes.values()) else "quantised"
    some = ", ".join(scales[:3]) + (", …" if len(scales) > 3 else "")
    raise ModelError(
        f"the {part} weights of {name} are {kind} ({some}), which sdtrt does not read",
        hint="use a version in fp16, bf16 or fp32: one without scales, not quantised",
    )


def inferred_repo(infos: Mapping[str, TensorInfo]) -> str:
    """The hub repository that diffusers takes the configuration of such a checkpoint from."""
    with quiet_libraries():
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        return str(fetch_diffusers_config(meta_tensors(infos))["pretrained_model_name_or_path"])


def meta_tensors(infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Stand-ins without data, for code that converts names and shapes.

    Raises:
        ModelError: for a tensor of a dtype that PyTorch lacks.
    """
    import torch

    tensors = {}
    for name, info in infos.items():
        dtype = getattr(torch, info.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError(f"{name} is stored as {info.dtype}, which PyTorch can't read", hint="use another version")
        tensors[name] = torch.empty(info.shape, dtype=dtype, device="meta")
    return tensors


def convert(
    part: str, layout: Layout, tensors: dict[str, torch.Tensor], module: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Give a part's stored tensors the names and shapes that its module has today.

    Works on meta tensors too, so that names and shapes can be checked before anything is read.
    """
    if part.startswith("text_encoder"):
        return _convert_text_encoder(tensors, module)
    if layout == "single-file":
        tensors = _from_original(part, tensors, module)
    return _rename_old_attention(tensors) if part == "vae" else tensors


def _from_original(part: str, tensors: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """UNet, VAE or ControlNet tensors of an original checkpoint under diffusers' names."""
    config: Any = module.config
    with quiet_libraries():
        from diffusers.loaders import single_file_utils as convert

        functions = {
            "unet": convert.convert_ldm_unet_checkpoint,
            "vae": convert.convert_ldm_vae_checkpoint,
            "controlnet": convert.convert_controlnet_checkpoint,
        }
        try:
            converted: dict[str, torch.Tensor | None] = functions[part](tensors, config=dict(config))
        except (KeyError, AttributeError, IndexError):  # a tensor that the configuration asks for is not there
            return {}
    return {name: value for name, value in converted.items() if value is not None}


def _rename_old_attention(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """VAEs saved before diffusers 0.18 name their attention's projections query, key, value and proj_attn."""
    pattern = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return {
        pattern.sub(lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}.", name): value
        for name, value in tensors.items()
    }


def _convert_text_encoder(tensors: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """CLIP tensors under the names of the installed transformers (5.6 dropped CLIPTextModel's `text_model.`).

    Layers beyond the configuration's are dropped: SD 2.x uses the last but one's output and leaves the last away, and
    others skip some by their configuration alone.
    """
    wanted = module.state_dict().keys()
    config: Any = module.config
    prefix = "text_model." if "text_model.final_layer_norm.weight" in wanted else ""
    converted = {}
    for name, value in _strip_encoder_prefix(tensors).items():
        bare = name.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d{1,9})\.", bare)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            continue
        own = bare if bare.startswith("text_projection") else f"{prefix}{bare}"
        if own in wanted or not _LEFT_OVER.search(bare):
            converted[own] = value
    return converted


def _strip_encoder_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop a single file's prefix; OpenCLIP's tensors (SD 2.x, SDXL's second encoder) are renamed too."""
    for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."):
        if any(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model."):
        if any(name.startswith(prefix) for name in tensors):
            return _from_open_clip(tensors, prefix)
    return tensors


def _from_open_clip(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP's names and fused projections → CLIP's."""
    converted: dict[str, torch.Tensor] = {}
    for stored, value in tensors.items():
        name = stored.removeprefix(prefix)
        for old, new in _OPEN_CLIP_NAMES.items():
            name = name.replace(old, new)
        if name == "text_projection":
            converted["text_projection.weight"] = value.T.contiguous()
        elif fused := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name):
            for projection, chunk in zip("qkv", value.chunk(3), strict=True):
                converted[f"{fused[1]}.{projection}_proj.{fused[2]}"] = chunk.contiguous()
        else:
            converted[name] = value
    return converted

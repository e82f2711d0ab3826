"""The ControlNet that a user names: a folder, a hub id or a file, found, and held against a model's UNet by its header.

A file says nothing of its configuration. It has the UNet's, as each ControlNet is made from a UNet of the model's kind;
what may differ is read from the file's header. Reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, UsageError, quote
from sdtrt.models.checkpoints import describe
from sdtrt.models.hub import Repo, is_repo_id, refuse_address
from sdtrt.models.loras import kind_of_width
from sdtrt.models.named_parts import NamedPart, with_weights
from sdtrt.models.origins import Origin, has_weight_suffix, local_path, read_checkpoint_infos
from sdtrt.models.weights import TensorInfo
from sdtrt.specs import ModelSpec
from sdtrt.specs.groups import control_facts

PART = "controlnet"
CLASS, UNION = "ControlNetModel", "ControlNetUnionModel"
HINT = "pass a ControlNet's folder, a hub id (owner/name) or a .safetensors file as --controlnet"
FITTING = "use a ControlNet for this model (SD 1.x, 2.x and XL have ones of their own)"
PREFIX = "control_model."  # of a ControlNet's tensors in a file that has a whole model's, too
_NET = NamedPart(PART, "ControlNet", (CLASS, UNION), f"a {CLASS}", HINT)
_HUB_FILES = ("config.json", "diffusion_pytorch_model*.json", "controlnet/*.json")
# What a ControlNet has of its UNet's configuration (diffusers' `ControlNetModel.from_unet`).
_OF_THE_UNET = (
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "mid_block_type",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "class_embed_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "num_class_embeds",
    "upcast_attention",
    "resnet_time_scale_shift",
    "projection_class_embeddings_input_dim",
)
# What a file with other tensors is, told by their names.
_OTHER_KINDS = {
    "a Control-LoRA, which is no whole ControlNet": r"^lora_controlnet$|\.(up|down)$",
    "a union of ControlNets": r"^task_embedding$|^control_type_proj\.|^control_add_embedding\.",
    "a T2I-Adapter": r"^(adapter\.)?body\.\d",
    "a LoRA": r"lora_(up|down|A|B)\.",
}
_INPUTS = ("conv_in.weight", "input_blocks.0.0.weight")  # diffusers' name, and the original one
_HINTS = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
_TEXT = re.compile(r"attn2\.to_k\.weight$")
_ZEROS = re.compile(r"^(controlnet_down_blocks\.\d+|zero_convs\.\d+\.0)\.weight$")


def find_controlnet(spec: ModelSpec, unet: Mapping[str, Any], console: Console) -> Origin:
    """Where the ControlNet lies that `spec` names, which fits a UNet.

    Args:
        unet: the configuration of the model's UNet.

    Raises:
        UsageError, ModelError: where there is none, it can't be read, or is for another kind of model.
    """
    assert spec.controlnet is not None
    found = _find(replace(spec, name=spec.controlnet, revision=None), spec.name, unet, console)
    _check_fit(found.config(), found.spec.name, spec.name, unet)
    return with_weights(found, console)


def _find(spec: ModelSpec, model: str, unet: Mapping[str, Any], console: Console) -> Origin:
    """Where the ControlNet lies that `spec` names."""
    path = local_path(spec.name)
    if path is not None:
        return _NET.in_folder(spec, path) if path.is_dir() else _in_file(spec, path, model, unet)
    refuse_address(spec.name, "--controlnet")
    owner, _, rest = spec.name.partition("/")
    name, _, file = rest.partition("/")
    if not is_repo_id(f"{owner}/{name}") or has_weight_suffix(name) or local_path(owner) is not None:
        raise _nowhere(spec.name)
    repo = Repo(f"{owner}/{name}", None, spec.offline, console)
    if not file:
        folder = repo.fetch(_HUB_FILES, "ControlNet's configuration")
        return _NET.in_folder(spec, folder, repo.pinned(folder))
    path = repo.fetch((file,), "ControlNet", large=True) / file
    if not path.is_file():
        raise ModelError(f"{repo.repo_id} has no file {file}", hint=HINT)
    return _in_file(spec, path, model, unet)


def _nowhere(name: str) -> ModelError | UsageError:
    """The error for a name that nothing answers to; a scale that is no number looks like a part of one."""
    before, colon, scale = name.rpartition(":")
    if colon and local_path(before) is not None:
        return UsageError(f"the scale of {before} must be a number, got {scale!r}", hint=f"use {quote(before)}:0.8")
    return ModelError(f"there is no ControlNet at {name}", hint=HINT)


def _in_file(spec: ModelSpec, path: Path, model: str, unet: Mapping[str, Any]) -> Origin:
    """A file with a ControlNet's tensors, under original names or diffusers' own, alone or beside a model's."""
    infos = read_checkpoint_infos(spec, path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in infos) else ""
    own = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
    _check_names(path, own)
    origin = Origin(spec, PART, CLASS, "single-file", path.parent, "", None, path, (prefix,))
    beside = path.parent / "config.json"
    if _INPUTS[0] in own and beside.is_file() and _NET.class_of(beside) == CLASS:
        return replace(origin, config_file=beside)
    _check_header(own, str(path), model, unet)
    return replace(origin, derived=_derived(own, unet))


def _check_names(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Raise `ModelError` for a file that is no ControlNet, as far as its tensors' names tell."""
    for kind, pattern in _OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in infos):
            folder = "pass its folder, with its config.json, or its hub id" if "union" in kind else HINT
            raise ModelError(f"{path} is {kind}", hint=folder)
    if not any(name in infos for name in _INPUTS) or not any(name in infos for name in _HINTS):
        raise ModelError(f"{path} holds no ControlNet: {describe(infos)}", hint=HINT)


def _check_header(infos: Mapping[str, TensorInfo], name: str, model: str, unet: Mapping[str, Any]) -> None:
    """Refuse a file for another kind of model, by what its header tells."""
    facts = control_facts(unet)
    found = {
        "cross_attention_dim": next((one.shape[1] for key, one in infos.items() if _TEXT.search(key)), None),
        "number of residuals": sum(bool(_ZEROS.match(key)) for key in infos),
    }
    _compare({key: value for key, value in found.items() if value is not None}, facts, name, model)


def _check_fit(config: Mapping[str, Any], name: str, model: str, unet: Mapping[str, Any]) -> None:
    """Refuse a configuration for another kind of model."""
    own, wanted = control_facts(config), control_facts(unet)
    width = "cross_attention_dim"  # first: it tells the kind
    _compare({width: own[width], **own}, wanted, name, model)


def _compare(own: Mapping[str, Any], wanted: Mapping[str, Any], name: str, model: str) -> None:
    differing = [fact for fact in own if own[fact] != wanted[fact]]
    if not differing:
        return
    fact = differing[0]
    if fact == "cross_attention_dim":
        raise ModelError(
            f"the ControlNet {name} is for {kind_of_width(own[fact])}, and {model} is {kind_of_width(wanted[fact])}",
            hint=FITTING,
        )
    raise ModelError(
        f"the ControlNet {name} is for another model than {model}: its {fact} is {own[fact]}, the unet's"
        f" {wanted[fact]}",
        hint=FITTING,
    )


def _derived(infos: Mapping[str, TensorInfo], unet: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a ControlNet in a file: the UNet's, but for the channels that it takes."""
    shared = {name: unet[name] for name in _OF_THE_UNET if name in unet}
    taken, seen = (_channels(infos, names) for names in (_INPUTS, _HINTS))
    return {**shared, "in_channels": taken, "conditioning_channels": seen}


def _channels(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> int:
    """The input channels of a convolution."""
    shape = next(infos[name].shape for name in names if name in infos)
    return shape[1] if len(shape) > 1 else 0

"""The VAE that a user names: a folder, a hub id or a file, full or tiny, in the place of the model's own.

A file with original key names says nothing of its configuration: that is the model's own, whose kind it must be of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError
from sdtrt.models.checkpoints import PREFIXES, Layout, describe
from sdtrt.models.hub import Repo, is_repo_id, refuse_address
from sdtrt.models.named_parts import NamedPart
from sdtrt.models.origins import Origin, has_weight_suffix, local_path, read_checkpoint_infos
from sdtrt.models.weights import check_headers
from sdtrt.specs import ModelSpec
from sdtrt.specs.contract import VAE_CLASSES, is_tiny_vae

HINT = "pass a VAE's folder, a hub id (owner/name) or a .safetensors file as --vae"
VAE = NamedPart(
    "vae",
    "VAE",
    VAE_CLASSES,
    f"an {' or '.join(VAE_CLASSES)}",
    HINT,
    VAE_CLASSES[0],  # the oldest ones don't say
)
_HUB_FILES = ("config.json", "diffusion_pytorch_model*.json", "vae/*.json")


def with_vae(spec: ModelSpec, origins: Mapping[str, Origin], console: Console) -> dict[str, Origin]:
    """The parts of a model, with the VAE that the user names in the place of its own.

    Raises:
        UsageError, ModelError: where there is no such VAE, or it can't be read.
    """
    if spec.vae is None:
        return dict(origins)
    own = origins.get("vae")
    vae = _find(replace(spec, name=spec.vae, revision=None), own, console)
    if vae.repo is None and (vae.file is not None or vae.stored_files()):
        check_headers(vae.files())
    _warn_of_another_kind(own, vae, console)
    return {**origins, "vae": vae}


def _find(spec: ModelSpec, own: Origin | None, console: Console) -> Origin:
    """Where the VAE lies that `spec` names."""
    path = local_path(spec.name)
    if path is not None and path.is_dir():
        return VAE.in_folder(spec, path)
    if path is not None and path.is_file():
        return _in_file(spec, path, own)
    if path is None and is_repo_id(spec.name) and not has_weight_suffix(spec.name):
        repo = Repo(spec.name, None, spec.offline, console)
        folder = repo.fetch(_HUB_FILES, "VAE's configuration")
        return VAE.in_folder(spec, folder, repo.pinned(folder))
    refuse_address(spec.name, "--vae")
    raise ModelError(f"there is no VAE at {spec.name}", hint=HINT)


def _in_file(spec: ModelSpec, path: Path, own: Origin | None) -> Origin:
    """A file with a VAE's tensors: alone or in a whole checkpoint, under original names or diffusers' own."""
    names = read_checkpoint_infos(spec, path).keys()
    name, layout, prefixes = _form_of(path, names)
    beside = path.parent / "config.json"
    config_file: Path | None = None
    if layout == "folder" and beside.is_file() and VAE.class_of(beside) == name:
        config_file = beside
    elif name != "AutoencoderTiny":
        config_file = _models_own(path, own)
    return Origin(spec, "vae", name, layout, path.parent, "", config_file, path, prefixes)


def _models_own(path: Path, own: Origin | None) -> Path | None:
    """The configuration of the model's own VAE, for a full one of its kind in a file that says nothing of it."""
    if own is None or own.class_name != VAE_CLASSES[0]:
        raise ModelError(
            f"{path} does not say how its VAE is made, and the model has no full VAE of its own",
            hint="pass the folder of the VAE as --vae, with its config.json",
        )
    return own.config_file


def _form_of(path: Path, names: Collection[str]) -> tuple[str, Layout, tuple[str, ...]]:
    """Of the VAE in a file: its class, whose names it has, and what those begin with."""

    def any_has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    bare = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    if any_has(r"decoder\.layers\.\d"):
        return "AutoencoderTiny", "folder", bare
    if any_has(r"decoder\.up_blocks\."):
        return "AutoencoderKL", "folder", bare
    if any_has(r"decoder\.(up|mid)\."):
        return "AutoencoderKL", "single-file", bare
    if any_has(rf"({'|'.join(map(re.escape, PREFIXES['vae']))})decoder\."):
        return "AutoencoderKL", "single-file", PREFIXES["vae"]
    if names and all(re.match(r"\d+\.", name) for name in names):
        raise ModelError(
            f"{path} looks like one half of a tiny VAE in its original format",
            hint="use it in diffusers' format, where both halves are in one: --vae madebyollin/taesd, or taesdxl",
        )
    raise ModelError(f"{path} holds no VAE: {describe(names)}", hint=HINT)


def _warn_of_another_kind(own: Origin | None, vae: Origin, console: Console) -> None:
    """Warn of a full VAE whose latents are scaled otherwise than the UNet learnt them."""
    if own is None or own.config_file is None or not own.config_file.is_file():
        return
    one, other = own.config(), vae.config()
    scales = [config.get("scaling_factor", 0.18215) for config in (one, other)]
    if scales[0] != scales[1] and not (is_tiny_vae(one) or is_tiny_vae(other)):
        console.warn(
            f"{vae.spec.name} scales its latents by {scales[1]}, the model's own VAE by {scales[0]}:"
            " it may be for another kind of model"
        )

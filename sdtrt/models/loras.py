"""LoRAs that a user names: found, and told by their files' headers whether they are for a model. Reads no tensor.

Which of their tensors fit is diffusers' to say (`lora_loading`). Knows names of tensors, and no module.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, UsageError, quote
from sdtrt.common.files import open_regular
from sdtrt.models.checkpoints import describe
from sdtrt.models.hub import Repo, is_repo_id, refuse_address
from sdtrt.models.origins import has_weight_suffix, local_path
from sdtrt.models.weights import TensorInfo, is_pickle, read_header
from sdtrt.specs import LoraSpec, ModelSpec

HINT = "pass a .safetensors file, its folder, or a hub id (owner/name), as in --lora style.safetensors:0.8"
BLOCK_BYTES = 1 << 20
USUAL_FILE = "pytorch_lora_weights.safetensors"  # what diffusers' `save_lora_weights` calls it
# What the names of a part's tensors begin with: diffusers' names, and kohya's.
PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
# A model's kind, told by the width of the text that its UNet takes.
_KINDS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
    1280: "SDXL's refiner",
}
_TEXT_WIDTH = re.compile(r"attn2[._](processor[._])?to_[kv](_lora)?\.(lora_down|lora_A|lora\.down|down)\.")
# diffusers drops the scales of a DoRA, and what is left is another LoRA.
_OTHER_KINDS = {"LoHa": r"\.hada_", "LoKr": r"\.lokr_", "diff": r"\.diff$", "DoRA with dora_scale": r"\bdora_scale"}


@dataclass(frozen=True)
class Lora:
    """A LoRA that was found.

    Args:
        spec: its name, and how much it counts.
        path: of its file.
        parts: of the model that it changes.
        tensors: by diffusers' names, where they are a part of another file; None for what the file has.
    """

    spec: LoraSpec
    path: Path
    parts: tuple[str, ...]
    tensors: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.stem if self.path.name != USUAL_FILE else Path(self.spec.name).stem or self.path.stem


def require_peft() -> None:
    """Raise `UsageError` where peft is missing, which diffusers reads LoRAs with."""
    if find_spec("peft") is None:
        raise UsageError(
            "LoRAs need peft, which is not installed", hint='pip install "sdtrt[adapters]", or pip install peft'
        )


def find_loras(spec: ModelSpec, parts: Collection[str], text_width: object, console: Console) -> tuple[Lora, ...]:
    """The LoRAs that a user names for a model.

    Args:
        parts: that the model has.
        text_width: of what its UNet takes.

    Raises:
        UsageError, ModelError: where there is no such LoRA, it can't be read, or is for another kind of model.
    """
    if spec.loras:
        require_peft()
    return tuple(_found(spec, one, parts, text_width, console) for one in spec.loras)


def _found(spec: ModelSpec, own: LoraSpec, parts: Collection[str], text_width: object, console: Console) -> Lora:
    path = _file_of(spec, own, console)
    if is_pickle(path):
        raise ModelError(
            f"{path} is a pickle file, and reading pickle can run any code", hint="convert it to safetensors"
        )
    infos = read_header(path)
    _check_names(path, infos)
    width = next((one.shape[1] for name, one in infos.items() if _TEXT_WIDTH.search(name) and len(one.shape) > 1), None)
    if width is not None and width not in (text_width if isinstance(text_width, list) else (text_width,)):
        raise _other_kind(f"{path} is for {kind_of_width(width)}, and {spec.name} is {kind_of_width(text_width)}")
    touched = tuple(part for part, starts in PREFIXES.items() if any(name.startswith(starts) for name in infos))
    if missing := [part for part in touched if part not in parts]:
        raise _other_kind(f"{path} is for a model with a {' and a '.join(missing)}, which {spec.name} has not")
    return Lora(own, path, touched)


def _other_kind(message: str) -> ModelError:
    return ModelError(message, hint="use a LoRA that was made for the model's kind, or another --model")


def kind_of_width(width: object) -> str:
    """What a UNet is, by the width of its text."""
    known = _KINDS.get(width) if isinstance(width, int) else None
    return f"{known} (text of width {width})" if known else f"a model whose text has the width {width}"


def _check_names(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Raise `ModelError` for a file that is no LoRA of such models as far as its tensors' names tell."""
    if not infos:
        raise ModelError(f"{path} has no tensors", hint="download or copy the file again")
    starts = tuple(start for own in PREFIXES.values() for start in own)
    for kind, pattern in _OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in infos):
            raise ModelError(
                f"{path} is a {kind}, which diffusers doesn't read for Stable Diffusion",
                hint="convert it to a LoRA; in Python, accelerate takes what peft puts around a pipeline's layers",
            )
    if unknown := [name for name in infos if not name.startswith(starts)]:
        words = describe(unknown) if "looks like" in describe(unknown) else ""
        raise ModelError(
            f"{path} has {len(unknown)} tensors that match nothing of Stable Diffusion ({', '.join(unknown[:3])}"
            f"{', …' * (len(unknown) > 3)}){': ' * bool(words)}{words}",
            hint="use a LoRA for Stable Diffusion in diffusers' or kohya's names",
        )


# --- where it lies -----------------------------------------------------------------------------------------------


def _file_of(spec: ModelSpec, own: LoraSpec, console: Console) -> Path:
    """The file of a LoRA, downloaded if it lies on the hub."""
    path = local_path(own.name)
    if path is not None:
        return _in_folder(own, path, sorted(one.name for one in path.glob("*.safetensors"))) if path.is_dir() else path
    refuse_address(own.name, "--lora")
    owner, _, rest = own.name.partition("/")
    name, _, file = rest.partition("/")
    is_id = is_repo_id(f"{owner}/{name}") and not has_weight_suffix(name) and (not file or has_weight_suffix(file))
    if is_id and local_path(owner) is None:
        return _on_hub(own, Repo(f"{owner}/{name}", None, spec.offline, console), file)
    before, colon, weight = own.name.rpartition(":")
    if colon and local_path(before) is not None:
        raise UsageError(f"the weight of {before} must be a number, got {weight!r}", hint=f"use {quote(before)}:0.8")
    raise ModelError(f"there is no LoRA at {own.name}", hint=HINT)


def _in_folder(own: LoraSpec, folder: Path, files: Sequence[str]) -> Path:
    """The one file of a folder that a LoRA may be."""
    if USUAL_FILE in files:
        return folder / USUAL_FILE
    if len(files) == 1:
        return folder / files[0]
    if not files:
        raise ModelError(f"{own.name} has no .safetensors file", hint=HINT)
    raise ModelError(
        f"{own.name} has {len(files)} .safetensors files ({', '.join(files[:3])}{', …' * (len(files) > 3)})",
        hint=f"name one: --lora {quote(f'{own.name}/{files[0]}')}",
    )


def _on_hub(own: LoraSpec, repo: Repo, file: str) -> Path:
    """The file of a LoRA of the hub, in the cache."""
    listed = repo.files()
    if not file and listed is not None:
        names = sorted(name for name in listed if name.endswith(".safetensors") and "/" not in name)
        file = _in_folder(own, Path(), names).name
    folder = repo.fetch((file or "*.safetensors",), "LoRA", large=True)
    found = sorted(one.name for one in folder.glob("*.safetensors"))
    path = folder / file if file else _in_folder(own, folder, found)
    if not path.is_file():
        raise ModelError(f"{repo.repo_id} has no file {file}", hint=HINT)
    return path


# --- what a picture says of it ------------------------------------------------------------------------------------


def web_ui_hash(path: Path) -> str:
    """The number by which web UIs know a LoRA's file: of its training, if it says so, else of its tensors alone.

    As stable-diffusion-webui has it: `sshs_model_hash`, or the sha256 of what follows the header, 12 digits of it.
    """
    with open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__") or {}
        if stated := metadata.get("sshs_model_hash"):
            return str(stated)[:12]
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()[:12]

"""What IP-Adapters go by: pictures, and for those of faces (FaceID) embeddings, which users make with another library.

Reads their files, says which adapter takes which, and gives diffusers' pipelines what they take. Knows no engine.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from sdtrt.common.console import Console
from sdtrt.common.errors import UsageError, first_line
from sdtrt.common.files import read_small_file
from sdtrt.models.resolve import Model
from sdtrt.models.weights import read_saved
from sdtrt.pipeline.inputs.images import InitImage, read_init_image
from sdtrt.specs import GenerateSpec

MAX_EMBEDDING_BYTES = 1 << 20  # of a file; a face has 2 KB
_HINT = "save the face's numbers alone, as docs/commands.md shows: np.save, torch.save or safetensors"
Shown = Image.Image | torch.Tensor


@dataclass(frozen=True)
class Face:
    """The embedding of a face, as it was read.

    Args:
        embedding: float32 `[1,1,D]`: an image, a face, its numbers.
    """

    path: Path
    sha256: str
    embedding: torch.Tensor


Given = InitImage | Face


def read_ip_images(spec: GenerateSpec, console: Console) -> tuple[Given, ...]:
    """Read what a request's IP-Adapters go by. Raises `UsageError` for a file that holds neither."""
    return tuple(
        _read_face(one.image) if one.is_embedding else read_init_image(one.image, console, "ip image")
        for one in spec.ip_images
    )


def check_ip_images(model: Model, given: Sequence[Given]) -> None:
    """Refuse pictures for adapters that take faces, faces for others, and embeddings of another width.

    Raises:
        UsageError: naming the file.
    """
    for adapter, one in zip(model.ip_adapters, given, strict=True):
        if isinstance(one, InitImage) and adapter.takes_faces:
            raise UsageError(
                f"{adapter.path} takes the embedding of a face, and {one.path} is a picture",
                hint="make the embedding as docs/commands.md shows, and give it as --ip-embeds face.safetensors",
            )
        if isinstance(one, Face) and not adapter.takes_faces:
            raise UsageError(
                f"{adapter.path} takes a picture, and {one.path} is a file of tensors",
                hint="give it --ip-image FILE, a PNG, JPEG or WebP file",
            )
        if isinstance(one, Face) and one.embedding.shape[-1] != adapter.width:
            raise UsageError(
                f"{one.path} holds an embedding of {one.embedding.shape[-1]} numbers, and {adapter.path} takes"
                f" {adapter.width}",
                hint="make it with the model of faces that the adapter was trained with, as docs/commands.md shows",
            )


def shown(given: Sequence[Given]) -> tuple[Shown, ...]:
    """What a pipeline's call is given of each."""
    return tuple(one.embedding if isinstance(one, Face) else one.pixels for one in given)


def arguments_of(pictures: Sequence[Shown], pipe: Any, *, guided: bool, editing: bool) -> dict[str, Any]:
    """The argument of a diffusers pipeline's call for its IP-Adapters.

    diffusers takes pictures for all of them, or embeddings for all: beside a face, those of pictures are made here.

    Args:
        pictures: one for each adapter; none for a pipeline without.
        guided: whether the UNet has rows without a prompt, for which embeddings come twice.
        editing: whether it has two such rows an image, as models that edit have.
    """
    if not any(isinstance(one, torch.Tensor) for one in pictures):
        return {"ip_adapter_image": list(pictures)} if pictures else {}
    layers = pipe.unet.encoder_hid_proj.image_projection_layers
    pairs = (_pair(one, layer, pipe) for one, layer in zip(pictures, layers, strict=True))
    return {"ip_adapter_image_embeds": [_rows(*pair, guided=guided, editing=editing) for pair in pairs]}


def _rows(nothing: torch.Tensor, own: torch.Tensor, *, guided: bool, editing: bool) -> torch.Tensor:
    """Embeddings in the order in which a pipeline takes them apart."""
    if not guided:
        return own
    return torch.cat([own, nothing, nothing] if editing else [nothing, own])


def _pair(one: Shown, layer: Any, pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding of nothing, and that of a face or a picture, `[1,1,…]` each."""
    parameter = next(layer.parameters())
    if isinstance(one, torch.Tensor):
        own = one.to(parameter.device, parameter.dtype)
        return torch.zeros_like(own), own
    states = type(layer).__name__ != "ImageProjection"  # which takes what the encoder ends with
    own, nothing = pipe.encode_image(one, parameter.device, 1, states)
    return nothing[None], own[None]


def _read_face(path: Path) -> Face:
    """Read an embedding. Raises `UsageError` for a file that holds none, or that of several faces."""
    path = path.expanduser()
    try:
        data = read_small_file(path, MAX_EMBEDDING_BYTES)
        found = _tensor_in(path, data)
    except OSError as error:
        raise UsageError(f"ip embeds {path} can't be read: {error.strerror or error}", hint=_HINT) from error
    except Exception as error:  # libraries raise anything on damaged data
        raise UsageError(f"ip embeds {path} holds no embedding: {first_line(error)}", hint=_HINT) from error
    if not found.is_floating_point() or not found.numel() or not bool(torch.isfinite(found).all()):
        raise UsageError(f"ip embeds {path} holds no finite floating-point numbers", hint=_HINT)
    rows = found.float().reshape(-1, found.shape[-1]) if found.ndim else found.float().reshape(1, 1)
    if len(rows) == 2 and not rows[0].any():  # diffusers' guide has that of no face before it
        rows = rows[1:]
    if len(rows) != 1:
        raise UsageError(f"ip embeds {path} holds {len(rows)} embeddings, and an adapter takes one face", hint=_HINT)
    return Face(path, hashlib.sha256(data).hexdigest(), rows[None])


def _tensor_in(path: Path, data: bytes) -> torch.Tensor:
    """The one tensor that a file holds; no code of a pickle runs. Raises what the libraries raise."""
    suffix = path.suffix.lower()
    found: Any
    if suffix == ".npy":
        found = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    elif suffix == ".safetensors":
        found = list(safetensors.torch.load(data).values())
    else:
        found = read_saved(path, data)
    if isinstance(found, list) and len(found) == 1:  # of a file of one tensor; and as diffusers' guide saves it
        (found,) = found
    if not isinstance(found, torch.Tensor):
        raise ValueError("it is not one tensor")
    return found

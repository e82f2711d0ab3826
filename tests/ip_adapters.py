"""Small IP-Adapters with random weights, in files as people have them: tensors by the names of their authors."""

from __future__ import annotations

import re

import factories
import safetensors.torch
import torch
import transformers
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterPlusImageProjection,
)

IMAGE_SIZE, IMAGE_WIDTH, HIDDEN = 16, 24, 32  # of the image encoder: pixels, the embedding, the states
SUBFOLDER, TOKENS = "models", {"base": 4, "plus": 6}
FACE_WIDTH, FACE_RANK = 20, 3  # of the embedding of a face, and of the LoRA that adapters for faces have
# diffusers' names of a resampler's tensors → the authors': layers.N.0 is the attention, layers.N.1 what comes after it
_PLUS = (
    (r"\.ln0\.", ".0.norm1."),
    (r"\.ln1\.", ".0.norm2."),
    (r"\.attn\.to_q\.", ".0.to_q."),
    (r"\.attn\.to_out\.0\.", ".0.to_out."),
    (r"\.ff\.0\.", ".1.0."),
    (r"\.ff\.1\.net\.0\.proj\.", ".1.1."),
    (r"\.ff\.1\.net\.2\.", ".1.3."),
)


def attentions(unet):
    """The attentions over text, in the order in which IP-Adapter's authors number them (1, 3, 5, …)."""
    return [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name]


def tensors(unet, kind="base", seed=0, width=IMAGE_WIDTH):
    """An IP-Adapter's tensors for a UNet, by their names in files."""
    found = {}
    with factories.seeded(seed):
        for index, attention in enumerate(attentions(unet)):
            for name in ("k", "v"):
                weight = torch.randn(attention.to_k.weight.shape) * attention.to_k.in_features**-0.5
                found[f"ip_adapter.{2 * index + 1}.to_{name}_ip.weight"] = weight
        text = attentions(unet)[0].to_k.in_features
        own = _plus(text) if kind == "plus" else _base(text, width)
    return found | {f"image_proj.{name}": tensor for name, tensor in own.items()}


def _base(text, width):
    state = ImageProjection(width, text, TOKENS["base"]).state_dict()
    return {name.replace("image_embeds", "proj"): tensor for name, tensor in state.items()}


def _plus(text):
    made = IPAdapterPlusImageProjection(
        embed_dims=HIDDEN, output_dims=text, hidden_dims=64, depth=4, dim_head=64, heads=1, num_queries=TOKENS["plus"]
    )
    state, found = made.state_dict(), {}
    for name, tensor in state.items():
        for pattern, own in _PLUS:
            name = re.sub(pattern, own, name)
        found[name] = tensor
    for index in range(4):
        pair = [found.pop(f"layers.{index}.attn.to_{one}.weight") for one in "kv"]
        found[f"layers.{index}.0.to_kv.weight"] = torch.cat(pair)
    return found


def face_tensors(unet, seed=0, lora=True):
    """The tensors of an adapter for faces (FaceID): another projection, and a LoRA of all attentions beside it."""
    found = {name: one for name, one in tensors(unet, seed=seed).items() if name.startswith("ip_adapter.")}
    with factories.seeded(seed + 1):
        made = IPAdapterFaceIDImageProjection(FACE_WIDTH, attentions(unet)[0].to_k.in_features, mult=2, num_tokens=4)
        for index, name in enumerate(unet.attn_processors if lora else ()):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            layers = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "out": attention.to_out[0]}
            for layer, own in layers.items():
                start = f"ip_adapter.{index}.to_{layer}_lora"
                found[f"{start}.down.weight"] = torch.randn(FACE_RANK, own.in_features) * 0.2
                found[f"{start}.up.weight"] = torch.randn(own.out_features, FACE_RANK) * 0.2
    for name, tensor in made.state_dict().items():
        found[f"image_proj.{name.replace('ff.net.0.proj', 'proj.0').replace('ff.net.2', 'proj.2')}"] = tensor
    return found


def write_face(path, unet, seed=0, lora=True):
    """Write an adapter for faces, a `.bin` as its authors have it: two groups, pickled; returns the file."""
    own = {name: tensor.contiguous() for name, tensor in face_tensors(unet, seed, lora).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(own, path)
        return path
    groups = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in own.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    torch.save(groups, path)
    return path


def write(folder, unet, kind="base", seed=0, name=None, **options):
    """Write an adapter as the authors' repository has it, its image encoder beside it; returns the file."""
    path = folder / SUBFOLDER / (name or f"ip-adapter{'-plus' * (kind == 'plus')}_sd15.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors(unet, kind, seed, **options).items()}, path
    )
    if not (path.parent / "image_encoder").exists():
        image_encoder().save_pretrained(path.parent / "image_encoder")
    return path


def image_encoder(seed=1):
    """A small CLIP image encoder."""
    config = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN,
        projection_dim=IMAGE_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    with factories.seeded(seed):
        return transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def load(pipe, *paths, scale=0.6):
    """Load adapters with diffusers' own call."""
    folders = [str(path.parent.parent) for path in paths]
    pipe.load_ip_adapter(folders, subfolder=SUBFOLDER, weight_name=[path.name for path in paths])
    pipe.set_ip_adapter_scale(scale)
    return pipe

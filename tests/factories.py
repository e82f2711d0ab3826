"""Small random-weight models in the real on-disk formats: what the tests run on.

Everything is seeded: one seed gives the same bytes. Widths are tiny, the structure (blocks, attention, file and key
names) is that of Stable Diffusion 1.x, 2.x and XL.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import onnx
import onnx.numpy_helper
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtrt.backends import registry
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.find import best_fit
from sdtrt.engines.keys import EngineKey, ExportKey
from sdtrt.models.resolve import Model
from sdtrt.pipeline.opening import engines
from sdtrt.pipeline.opening.request import EngineRequest
from sdtrt.specs import BackendName, BuildSpec, Component, Precision, Sizes

Kind = Literal["sd1", "sd2", "sdxl"]

TEXT_WIDTH = 32  # hidden size of each text encoder
SDXL_TIME_WIDTH = 8  # addition_time_embed_dim
START, END = "<|startoftext|>", "<|endoftext|>"
# Of what the miniature can draw; its pictures of them are judged.
TEN_PROMPTS = (
    *(f"a {color} {shape} on a white background" for color in ("red", "blue") for shape in ("circle", "square")),
    *(f"a {size} {color} star on a black background" for size in ("small", "large") for color in ("red", "cyan")),
    "a cyan triangle above a red circle, white background",
    "a small green square to the left of a ring",
)
MERGES = ("r e", "re d</w>", "b l", "u e</w>", "bl ue</w>", "c i", "o n</w>", "o f</w>")

_SD1 = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,  # number of heads, as in SD 1.x's own configuration
}
_SD2 = {
    **_SD1,
    "attention_head_dim": [2, 4, 4, 4],
    "use_linear_projection": True,
}
_SDXL = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "attention_head_dim": [2, 4, 4],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SDXL_TIME_WIDTH,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * SDXL_TIME_WIDTH,
}
_REFINER = {  # what its UNet differs in from SDXL's: one text encoder, five time ids
    "cross_attention_dim": TEXT_WIDTH,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 5 * SDXL_TIME_WIDTH,
}
UNET_CONFIGS: dict[Kind, dict[str, Any]] = {"sd1": _SD1, "sd2": _SD2, "sdxl": _SDXL}

# Two resolutions instead of four: a third of the time to export and to run.
SMALL = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "sample_size": 8,
}

# Two resolutions of two widths, for each kind: the dynamo exporter takes a quarter of a minute for them.
_TWO_BLOCKS = {
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "attention_head_dim": [2, 4],
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALLEST: dict[Kind, dict[str, Any]] = {
    "sd1": _TWO_BLOCKS,
    "sd2": _TWO_BLOCKS,
    "sdxl": {
        **_TWO_BLOCKS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
    },
}
ONE_LEVEL: dict[str, Any] = {  # of SD 1.x, and nothing below it: compilers take half the time
    **SMALLEST["sd1"],
    "block_out_channels": (32,),
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
    "norm_num_groups": 8,
}


def checked_spec(*arguments: Any, **options: Any) -> BuildSpec:
    """A build that its backend takes. Raises `UsageError` for what the spec or the backend refuses."""
    spec = BuildSpec(*arguments, **options)
    registry.get(spec.backend).check(spec)
    return spec


def in_threads(work: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call `work` with each of the arguments, each in a thread of its own, all at once; wait for all."""
    threads = [threading.Thread(target=work, args=one) for one in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path) -> None:
    """Change one bit of a file; its size, and all that an entry's sidecar says of it but the digest, stay the same."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block, and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def small_unet(kind: Kind, *, seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """A float32 UNet of the kind's structure with random weights, 1 to 3 M parameters, in eval mode without gradients.

    Args:
        overrides: configuration values, such as `upcast_attention=True`.
    """
    with seeded(seed):
        unet = UNet2DConditionModel(**{**UNET_CONFIGS[kind], **overrides})
    return unet.eval().requires_grad_(False)


def small_vae(*, seed: int = 0, **overrides: Any) -> AutoencoderKL:
    """A float32 VAE of factor 8 with random weights."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "latent_channels": 4,
        "sample_size": 128,
    }
    with seeded(seed):
        return AutoencoderKL(**{**config, **overrides}).eval().requires_grad_(False)


def overflowing_vae(*, gain: float = 1e5, **overrides: Any) -> AutoencoderKL:
    """A float32 VAE of SDXL's configuration whose halves leave fp16 on the way, as SDXL's decoder does.

    Args:
        gain: of all that is added to the residual stream; the norms take it out again.
    """
    small = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
    vae = small_vae(**{**small, "scaling_factor": 0.13025, "force_upcast": True, **overrides})
    for name, parameter in vae.named_parameters():
        if name.rpartition(".")[0].endswith(("conv_in", "conv2", "to_out.0")):
            parameter.mul_(gain)
    return vae


def small_tiny_vae(*, seed: int = 0, **overrides: Any) -> AutoencoderTiny:
    """A float32 tiny VAE of factor 8, in TAESD's form, with random weights."""
    config: dict[str, Any] = {
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    }
    with seeded(seed):
        return AutoencoderTiny(**{**config, **overrides}).eval().requires_grad_(False)


def vae_folder(path: Path, vae: Any, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write a VAE as diffusers does, alone; returns `path`."""
    torch.nn.Module.to(vae, dtype)
    with _quietly():
        vae.save_pretrained(path, safe_serialization=True)
    return path


def vae_file(path: Path, vae: AutoencoderKL, *, prefix: str = "", dtype: torch.dtype = torch.float16) -> Path:
    """Write a VAE under its original names, as `vae-ft-mse-840000` and `sdxl_vae` lie on the hub; returns `path`."""
    tensors = {f"{prefix}{ldm_vae_key(key)}": _ldm_vae_value(key, value) for key, value in vae.state_dict().items()}
    tensors["loss.logvar"] = torch.zeros(1)  # of its training
    save_file({key: value.to(dtype).contiguous() for key, value in tensors.items()}, path)
    return path


def small_text_encoder(*, seed: int = 0, projection: bool = False, **overrides: Any) -> CLIPTextModel:
    """A float32 CLIP text encoder with random weights (`projection`: SDXL's second one)."""
    vocabulary = clip_vocabulary()
    config: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
    }
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    with seeded(seed):
        return cls(CLIPTextConfig(**{**config, **overrides})).eval().requires_grad_(False)


def clip_vocabulary() -> dict[str, int]:
    """A CLIP vocabulary: every byte, alone and at a word's end, a few merges, and the two special tokens last."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(len(others))]
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in MERGES]
    return {word: index for index, word in enumerate([*words, START, END])}


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the four files of a CLIP tokenizer as Stable Diffusion 1.x has them, and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def sd1_folder(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **unet_overrides: Any) -> Path:
    """Write a complete diffusers folder in SD 1.x format with random weights; returns `path`.

    Args:
        unet_overrides: UNet configuration values (`**UNET_CONFIGS["sd2"]` makes it one of SD 2.x).
    """
    pipeline = StableDiffusionPipeline(
        vae=small_vae(seed=seed),
        text_encoder=small_text_encoder(seed=seed),
        tokenizer=write_tokenizer(path / "tokenizer"),
        unet=small_unet("sd1", seed=seed, **unet_overrides),
        scheduler=PNDMScheduler(**_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, path, dtype, tokenizers=("tokenizer",))


def engine_key_of(**changes: Any) -> dict[str, Any]:
    """A whole engine's key, plain data, but for these changes."""
    export = ExportKey("unet", "fp16", "torchscript", 17, 5, "of some weights")
    return EngineKey(1, "unet", "fp16", "tensorrt", "8.6.1", {}, (), {}, export).to_json() | changes


def tampered_engine(
    directory: EngineDirectory, entry: Entry, change: Callable[[np.ndarray], None], **key: Any
) -> Entry:
    """A copy of an ONNX Runtime engine with one weight of it changed, whole and published as if it were right.

    Args:
        directory: where the copy goes; in the engine's own directory it replaces the engine.
        change: alters the largest weight in place.
        key: what differs in the copy's key.
    """

    def make(folder: Path) -> Any:
        model = onnx.load(entry.file("engine.onnx"))
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        largest = max((t for t in model.graph.initializer if t.data_type in floats), key=lambda t: len(t.raw_data))
        array = onnx.numpy_helper.to_array(largest).copy()
        change(array)
        largest.CopyFrom(onnx.numpy_helper.from_array(array, largest.name))
        onnx.save(model, folder / "engine.onnx")
        return entry.info

    return directory.obtain("engine", {**entry.key, **key}, make, force=True)


def sdxl_folder(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **unet_overrides: Any) -> Path:
    """Write a complete diffusers folder in SDXL format with random weights; returns `path`."""
    pipeline = StableDiffusionXLPipeline(
        vae=small_vae(seed=seed, scaling_factor=0.13025, force_upcast=True),
        text_encoder=small_text_encoder(seed=seed),
        text_encoder_2=small_text_encoder(seed=seed + 1, projection=True, hidden_act="gelu"),
        tokenizer=write_tokenizer(path / "tokenizer"),
        tokenizer_2=write_tokenizer(path / "tokenizer_2"),
        unet=small_unet("sdxl", seed=seed, **unet_overrides),
        scheduler=EulerDiscreteScheduler(**_SCHEDULE),
    )
    return _save(pipeline, path, dtype, tokenizers=("tokenizer", "tokenizer_2"))


def refiner_folder(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **unet_overrides: Any) -> Path:
    """Write a diffusers folder in the format of SDXL's refiner, with the second text encoder alone; returns `path`."""
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=small_vae(seed=seed, scaling_factor=0.13025, force_upcast=True),
        text_encoder=None,
        text_encoder_2=small_text_encoder(seed=seed + 1, projection=True, hidden_act="gelu"),
        tokenizer=None,
        tokenizer_2=write_tokenizer(path / "tokenizer_2"),
        unet=small_unet("sdxl", seed=seed, **{**_REFINER, **unet_overrides}),
        scheduler=EulerDiscreteScheduler(**_SCHEDULE),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    return _save(pipeline, path, dtype, tokenizers=("tokenizer_2",))


def inpainting_folder(path: Path, kind: Kind, **unet_overrides: Any) -> Path:
    """Write a diffusers folder of an inpainting model, whose smallest UNet takes 9 channels; returns `path`."""
    write = sdxl_folder if kind == "sdxl" else sd1_folder
    write(path, **{**UNET_CONFIGS[kind], **SMALLEST[kind], "in_channels": 9, **unet_overrides})
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def lcm_folder(path: Path, *, unet: dict[str, Any] | None = None, **index: Any) -> Path:
    """Write a diffusers folder of a latent consistency model in SD 1.x format: its UNet takes a guidance scale.

    Args:
        unet: configuration values.
        index: entries of `model_index.json` that are others.
    """
    sd1_folder(path, **{**SMALLEST["sd1"], "time_cond_proj_dim": 16, **(unet or {})})
    stored = json.loads((path / "model_index.json").read_text())
    stored |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"], **index}
    (path / "model_index.json").write_text(json.dumps(stored))
    LCMScheduler(**LCM_SCHEDULE).save_pretrained(path / "scheduler")
    return path


_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


LCM_SCHEDULE = {**_SCHEDULE, "set_alpha_to_one": True, "clip_sample": False}


def _save(pipeline: Any, path: Path, dtype: torch.dtype, tokenizers: tuple[str, ...]) -> Path:
    """Save as diffusers does, then give tokenizers and the text encoder the form of Stable Diffusion's own folders."""
    with _quietly():
        pipeline.to(dtype=dtype).save_pretrained(path, safe_serialization=True)
    for name in tokenizers:
        for file in (path / name).iterdir():
            file.unlink()
        write_tokenizer(path / name)
    weights = path / "text_encoder" / "model.safetensors"
    if not weights.exists():  # the refiner has none
        return path
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, weights, metadata={"format": "pt"})
    return path


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars and warnings of diffusers and transformers."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()


def live_pipeline(cls: Any, kind: Kind, tokenizer: CLIPTokenizer, **parts: Any) -> Any:
    """A pipeline of small parts made in memory, the same one each time; SDXL's has the tokenizer twice.

    Args:
        parts: those that are others, or more than these.
    """
    given = {"vae": small_tiny_vae(), "tokenizer": tokenizer, "text_encoder": small_text_encoder()}
    given |= {"scheduler": diffusers.DDIMScheduler()}
    if kind == "sdxl":
        second = small_text_encoder(seed=1, projection=True, hidden_act="gelu")
        given |= {"text_encoder_2": second, "tokenizer_2": tokenizer, "add_watermarker": False}
    else:
        given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "unet" not in parts:
        given["unet"] = small_unet(kind, **SMALLEST[kind])
    if "add_watermarker" not in inspect.signature(cls.__init__).parameters:
        given.pop("add_watermarker", None)
    pipe = cls(**{**given, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd1_single_file(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **unet_overrides: Any) -> Path:
    """Write the model of `sd1_folder` as one checkpoint with the original (LDM) key names; returns `path`."""
    tensors = _ldm_tensors(small_unet("sd1", seed=seed, **unet_overrides), small_vae(seed=seed))
    tensors |= _clip_tensors(small_text_encoder(seed=seed), "cond_stage_model.transformer.")
    return _save_single_file(tensors, path, dtype)


def sdxl_single_file(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **unet_overrides: Any) -> Path:
    """Write the model of `sdxl_folder` as one checkpoint with the original key names; returns `path`."""
    vae = small_vae(seed=seed, scaling_factor=0.13025, force_upcast=True)
    tensors = _ldm_tensors(small_unet("sdxl", seed=seed, **unet_overrides), vae)
    tensors |= _clip_tensors(small_text_encoder(seed=seed), "conditioner.embedders.0.transformer.")
    second = small_text_encoder(seed=seed + 1, projection=True, hidden_act="gelu")
    tensors |= open_clip_tensors(second, "conditioner.embedders.1.model.")
    return _save_single_file(tensors, path, dtype)


def refiner_single_file(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **unet: Any) -> Path:
    """Write the model of `refiner_folder` as one checkpoint: its one text encoder is OpenCLIP's; returns `path`."""
    vae = small_vae(seed=seed, scaling_factor=0.13025, force_upcast=True)
    tensors = _ldm_tensors(small_unet("sdxl", seed=seed, **{**_REFINER, **unet}), vae)
    second = small_text_encoder(seed=seed + 1, projection=True, hidden_act="gelu")
    return _save_single_file(tensors | open_clip_tensors(second, "conditioner.embedders.0.model."), path, dtype)


def _save_single_file(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> Path:
    """Save with the leftovers that the original files have."""
    tensors = {
        key: value.to(dtype).contiguous() if value.is_floating_point() else value for key, value in tensors.items()
    }
    tensors["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _ldm_tensors(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    tensors = {
        f"model.diffusion_model.{ldm_unet_key(key, unet.config)}": value for key, value in unet.state_dict().items()
    }
    for key, value in vae.state_dict().items():
        tensors[f"first_stage_model.{ldm_vae_key(key)}"] = _ldm_vae_value(key, value)
    return tensors


def _clip_tensors(encoder: CLIPTextModel, prefix: str) -> dict[str, torch.Tensor]:
    tensors = {f"{prefix}text_model.{key.removeprefix('text_model.')}": v for key, v in encoder.state_dict().items()}
    tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def open_clip_tensors(encoder: CLIPTextModel, prefix: str) -> dict[str, torch.Tensor]:
    """A CLIP encoder's tensors as OpenCLIP stores them: fused projections, own names."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    names = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding": "token_embedding",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    tensors: dict[str, torch.Tensor] = {f"{prefix}logit_scale": torch.tensor(4.6)}
    for key, value in state.items():
        name = key
        for new, old in names.items():
            name = name.replace(new, old)
        if key == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = value.T
        elif "q_proj" in key:
            fused = torch.cat([state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            tensors[prefix + name.replace("q_proj.", "in_proj_")] = fused
        elif "k_proj" not in key and "v_proj" not in key:
            tensors[prefix + name] = value
    return tensors


def ldm_unet_key(key: str, config: Any) -> str:
    """The original name of a diffusers UNet key."""
    for new, old in _UNET_TOP.items():
        if key.startswith(f"{new}."):
            return key.replace(new, old, 1)
    layers = config["layers_per_block"]
    block, *rest = key.split(".", 1)
    if block == "mid_block":
        kind, index, tail = rest[0].split(".", 2)
        return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{_ldm_resnet(tail, kind)}"
    number, kind, index, tail = rest[0].split(".", 3)
    first = int(number) * (layers + 1) + int(index)
    if block == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(int(number) + 1) * (layers + 1)}.0.op.{tail.removeprefix('conv.')}"
        return f"input_blocks.{first + 1}.{int(kind == 'attentions')}.{_ldm_resnet(tail, kind)}"
    if kind == "upsamplers":
        slot = 2 if config["up_block_types"][int(number)].startswith("CrossAttn") else 1
        return f"output_blocks.{int(number) * (layers + 1) + layers}.{slot}.{tail}"
    return f"output_blocks.{first}.{int(kind == 'attentions')}.{_ldm_resnet(tail, kind)}"


_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _ldm_resnet(tail: str, kind: str) -> str:
    """The original name of a key inside a residual block; attention blocks keep theirs."""
    name, _, rest = tail.partition(".")
    return f"{_RESNET[name]}.{rest}" if kind == "resnets" else tail


def ldm_vae_key(key: str) -> str:
    """The original name of a diffusers VAE key (of a VAE of four resolutions)."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for index in range(4):
        key = key.replace(f"down_blocks.{index}.resnets.", f"down.{index}.block.")
        key = key.replace(f"down_blocks.{index}.downsamplers.0.", f"down.{index}.downsample.")
        key = key.replace(f"up_blocks.{index}.resnets.", f"up.{3 - index}.block.")
        key = key.replace(f"up_blocks.{index}.upsamplers.0.", f"up.{3 - index}.upsample.")
    key = key.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        key = key.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    return key


def _ldm_vae_value(key: str, value: torch.Tensor) -> torch.Tensor:
    """The original attention projections are 1x1 convolutions."""
    is_projection = "attentions" in key and key.endswith("weight") and value.ndim == 2
    return value[:, :, None, None] if is_projection else value


def unet_engine(
    model: Model, backend: BackendName, precision: Precision, sizes: Sizes, directory: EngineDirectory, **options: Any
) -> Entry:
    """The UNet's engine, as `ensure_engines` finds or makes it."""
    wanted = engines_wanted(model, backend, precision, sizes, ("unet",))
    return engines.ensure_engines(wanted, directory, **options)["unet"]


def find_engine(
    model: Model,
    backend: BackendName,
    precision: Precision,
    sizes: Sizes,
    directory: EngineDirectory,
    component: Component = "unet",
) -> Entry | None:
    """The engine of a component that a request would take; None if there is none."""
    chosen = registry.get(backend)
    own, there = chosen.precision_of(model, component, precision), directory.entries("engine")
    return best_fit(model, chosen.runs_here(), own, sizes, directory, component, there, chosen.weights_inside)


def engines_wanted(
    model: Model,
    backend: BackendName,
    precision: Precision,
    sizes: Sizes,
    components: tuple[Component, ...],
    images: int = 1,
) -> EngineRequest:
    """A request for engines of these components."""
    device = torch.device(registry.get(backend).device())
    return EngineRequest(model, backend, precision, sizes, components, images, device)


def clip_folder(path: Path, *, seed: int = 0) -> Path:
    """A CLIP model of texts and pictures, with its processor, as transformers writes them: 32x32 pixels."""
    tokenizer = write_tokenizer(path)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**small, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    with seeded(seed), _quietly():
        transformers.CLIPModel(config).save_pretrained(path)
        sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        pictures = transformers.CLIPImageProcessor(**sides)
        transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(path)
    return path


def alexnet_file(path: Path, *, seed: int = 0) -> Path:
    """The layers of torchvision's AlexNet that LPIPS looks at, under its names, with random weights."""
    from sdtrt.reports.lpips import alexnet_features

    with seeded(seed):
        tensors = {f"features.{name}": value for name, value in alexnet_features().state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path

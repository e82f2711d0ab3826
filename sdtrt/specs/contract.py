"""The I/O contract of each component: tensor names, dtypes, dynamic axes and their bounds.

Written once, here; read by export, build, sessions and facades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdtrt.common.errors import ModelError
from sdtrt.specs.choices import SIZE_MULTIPLE, Component, Precision
from sdtrt.specs.sizes import Profile, Sizes

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

# Dimension names: ONNX's dim_param, the keys of TensorRT profiles and of error messages.
BATCH, LATENT_HEIGHT, LATENT_WIDTH, TOKENS = "batch", "latent_height", "latent_width", "tokens"
IMAGE_HEIGHT, IMAGE_WIDTH = "image_height", "image_width"
HALVINGS = (1, 2, 4, 8, 16, 32)  # of latents on their way down through a UNet, at most
SDXL_TIME_IDS = 6  # original size, crop, target size: two numbers each
REFINER_TIME_IDS = 5  # of SDXL's refiner: original size, crop, aesthetic score
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")

# Inputs of a UNet beside latents and timestep: diffusers' loops make them once and pass them at every step.
ADDED_CONDITIONING = ("text_embeds", "time_ids")  # in `added_cond_kwargs`
GUIDANCE_EMBEDDING = "timestep_cond"  # of a guidance scale, which consistency models take in the place of two rows
CONDITIONING = ("encoder_hidden_states", *ADDED_CONDITIONING, GUIDANCE_EMBEDDING)

# Of a component's inputs and outputs, and of weights as an engine takes them.
DTYPES: dict[Precision, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "bfloat16",
    "fp8": "bfloat16",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Args:
        dtype: as torch and NumPy spell it, `float16`.
        dims: the dimensions, names or sizes.
        below: of whole numbers, what they all are below (the size of a vocabulary).
    """

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    below: int | None = None

    def shape(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for the given values of the symbolic dimensions."""
        return tuple(values[dim] if isinstance(dim, str) else dim for dim in self.dims)

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis → dimension name, for each axis that may change."""
        return {axis: dim for axis, dim in enumerate(self.dims) if isinstance(dim, str)}


@dataclass(frozen=True)
class Contract:
    """The tensors that a component takes and gives."""

    component: Component
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Tensor name → dynamic axes, in the form that `torch.onnx.export` takes."""
        return {spec.name: spec.dynamic_axes for spec in (*self.inputs, *self.outputs)}

    def input_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The shape of each input at one size."""
        return {spec.name: spec.shape(dimension_values(sizes)) for spec in self.inputs}

    def output_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The shape of each output at one size."""
        return {spec.name: spec.shape(dimension_values(sizes)) for spec in self.outputs}

    def profile_shapes(self, profile: Profile) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Input name → (smallest, optimal, largest) shape, in the form that TensorRT takes."""
        low, best, high = (self.input_shapes(size) for size in (profile.minimum, profile.optimum, profile.maximum))
        return {name: (low[name], best[name], high[name]) for name in low}

    @property
    def size_names(self) -> tuple[str, ...]:
        """The fields of a size that the component depends on."""
        names = {name for spec in self.inputs for name in spec.dynamic_axes.values()}
        words = {"batch": {BATCH}, "height": {LATENT_HEIGHT, IMAGE_HEIGHT}, "width": {LATENT_WIDTH, IMAGE_WIDTH}}
        words["tokens"] = {TOKENS}
        return tuple(word for word, known in words.items() if known & names)

    def describe(self, sizes: Sizes | Profile) -> str:
        """Describe the sizes that the component depends on: `batch 2, height 512, width 512, tokens 77`."""
        return ", ".join(f"{name} {getattr(sizes, name)}" for name in self.size_names)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for sidecars; what does not apply is left out."""
        return asdict(self, dict_factory=lambda items: {name: value for name, value in items if value is not None})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Contract:
        """The inverse of `to_json`."""

        def tensors(items: Any) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["dims"]), i.get("below")) for i in items)

        return cls(data["component"], data["precision"], tensors(data["inputs"]), tensors(data["outputs"]))


def scaled(side: str, factor: int) -> str:
    """The name of a latent side inside a UNet, so many times smaller, rounded up: `latent_height_2`."""
    return side if factor == 1 else f"{side}_{factor}"


def latent_sides(height: int, width: int) -> dict[str, int]:
    """The value of each dimension that is a side of latents, or one inside a UNet."""
    sides = ((LATENT_HEIGHT, height), (LATENT_WIDTH, width))
    return {scaled(name, factor): -(-side // factor) for factor in HALVINGS for name, side in sides}


def dimension_values(sizes: Sizes) -> dict[str, int]:
    """The value of each symbolic dimension at one size."""
    return {
        BATCH: sizes.batch,
        **latent_sides(sizes.height // SIZE_MULTIPLE, sizes.width // SIZE_MULTIPLE),
        IMAGE_HEIGHT: sizes.height,
        IMAGE_WIDTH: sizes.width,
        TOKENS: sizes.tokens,
    }


def unet_contract(config: Mapping[str, Any], precision: Precision, pooled: int | None = None) -> Contract:
    """The contract of a `UNet2DConditionModel`.

    Args:
        config: the UNet's diffusers configuration.
        precision: of the weights; all tensors but `timestep` and `time_ids` have its dtype.
        pooled: the width of SDXL's pooled text (`pooled_width` of the second text encoder); None for a UNet alone,
            which is taken for one of SDXL's base.

    Returns:
        `sample [B,C,H,W]` (C is 9 of models for inpainting), `timestep [B]` (float32: fractional timesteps exist, and
        TensorRT 8.6 narrows int64), `encoder_hidden_states [B,S,D]`, with SDXL `text_embeds [B,P]` and `time_ids [B,6]`
        (the refiner's: `[B,5]`), with a consistency model `timestep_cond [B,T]` (`time_cond_proj_dim`)
        → `out_sample [B,4,H,W]`.

    Raises:
        ModelError: for a UNet that takes inputs beyond these.
    """
    _check_supported(config)
    dtype = DTYPES[precision]
    width = config["cross_attention_dim"]
    if isinstance(width, (list, tuple)):
        width = width[0]
    inputs = [
        TensorSpec("sample", dtype, (BATCH, config["in_channels"], LATENT_HEIGHT, LATENT_WIDTH)),
        TensorSpec("timestep", "float32", (BATCH,)),
        TensorSpec("encoder_hidden_states", dtype, (BATCH, TOKENS, width)),
    ]
    if config.get("addition_embed_type") == "text_time":
        time_ids = SDXL_TIME_IDS if pooled is None else time_ids_of(config, pooled)
        time_width = time_ids * config["addition_time_embed_dim"]
        inputs += [
            TensorSpec("text_embeds", dtype, (BATCH, config["projection_class_embeddings_input_dim"] - time_width)),
            TensorSpec("time_ids", "float32", (BATCH, time_ids)),
        ]
    if embeds_guidance(config):
        inputs.append(TensorSpec(GUIDANCE_EMBEDDING, dtype, (BATCH, config["time_cond_proj_dim"])))
    output = TensorSpec("out_sample", dtype, (BATCH, config["out_channels"], LATENT_HEIGHT, LATENT_WIDTH))
    return Contract("unet", precision, tuple(inputs), (output,))


def embeds_guidance(config: Mapping[str, Any]) -> bool:
    """Whether a UNet was distilled to take the guidance scale as an input: pipelines call it with one row an image."""
    return config.get("time_cond_proj_dim") is not None


def time_ids_of(config: Mapping[str, Any], pooled: int | None) -> int:
    """Count the time ids that an SDXL UNet takes: what its added conditioning has beside the pooled text.

    Args:
        config: the UNet's diffusers configuration.
        pooled: the width of the pooled text; None for a UNet alone, which is taken for one of SDXL's base.

    Raises:
        ModelError: where that is no whole number.
    """
    if pooled is None:
        return SDXL_TIME_IDS
    total, width = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    numbers = isinstance(total, int) and isinstance(width, int) and width > 0
    ids, rest = divmod(total - pooled, width) if numbers else (0, 0)  # type: ignore[operator]  # both are numbers
    if ids < 1 or rest:
        raise ModelError(
            f"the model's unet takes {total} numbers of added conditioning, which are not text_encoder_2's {pooled}"
            f" and time ids of {width} numbers each",
            hint="check projection_class_embeddings_input_dim and addition_time_embed_dim of the unet,"
            " and projection_dim of text_encoder_2",
        )
    return ids


def _check_supported(config: Mapping[str, Any]) -> None:
    """Refuse a UNet whose forward needs inputs that the contract does not have."""
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        raise ModelError(
            f"the model's unet is a {class_name}, not a UNet2DConditionModel",
            hint="use a Stable Diffusion 1.x, 2.x or XL model, or --backend torch",
        )
    allowed = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": (None, "text_time"),
    }
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ModelError(
                f"the model's unet has {name} = {config[name]!r}, which sdtrt can't put into an engine",
                hint="use --backend torch for this model",
            )


def text_encoder_contract(
    config: Mapping[str, Any], precision: Precision, component: Component = "text_encoder"
) -> Contract:
    """The contract of a `CLIPTextModel`, or with `text_encoder_2` of SDXL's `CLIPTextModelWithProjection`.

    Args:
        config: the text encoder's configuration.
        precision: of the weights and all outputs.

    Returns:
        `input_ids [B,S]` → `last_hidden_state` and `penultimate_hidden_state [B,S,D]` (SDXL's pipelines take the
        latter, and Stable Diffusion 1.x has the same encoder); SDXL's second has the pooled `text_embeds [B,P]` in the
        former's place. S is fixed: diffusers pads every prompt to that length, and a graph without that axis is
        plainer. The ids are int32, as TensorRT 8.6 has no int64.

    Raises:
        ModelError: for an encoder that takes an attention mask.
    """
    if config.get("use_attention_mask"):
        raise ModelError(
            f"the model's {component} takes an attention mask, which sdtrt can't put into an engine",
            hint="use --backend torch for this model",
        )
    dtype = DTYPES[precision]
    tokens, width, vocabulary, pooled = (config.get(name, default) for name, default in _CLIP_DEFAULTS.items())
    ids = TensorSpec("input_ids", "int32", (BATCH, tokens), below=vocabulary)
    penultimate = TensorSpec("penultimate_hidden_state", dtype, (BATCH, tokens, width))
    if component == "text_encoder_2":
        return Contract(component, precision, (ids,), (TensorSpec("text_embeds", dtype, (BATCH, pooled)), penultimate))
    last = TensorSpec("last_hidden_state", dtype, (BATCH, tokens, width))
    return Contract(component, precision, (ids,), (last, penultimate))


# What a CLIP text encoder's configuration leaves out has these values (transformers' `CLIPTextConfig`).
_CLIP_DEFAULTS = {"max_position_embeddings": 77, "hidden_size": 512, "vocab_size": 49408, "projection_dim": 512}


def text_width(config: Mapping[str, Any]) -> int:
    """The width of a text encoder's states. Raises `ModelError` where its configuration has no number for it."""
    return _clip_number(config, "hidden_size")


def pooled_width(config: Mapping[str, Any]) -> int:
    """The width of the pooled text of SDXL's second encoder. Raises `ModelError` where there is no number for it."""
    return _clip_number(config, "projection_dim")


def _clip_number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name, _CLIP_DEFAULTS[name])
    if not isinstance(value, int):
        raise ModelError(
            f"a text encoder of the model has {name} = {value!r}, which is no whole number",
            hint="check its config.json, or download the model again",
        )
    return value


def vae_contract(config: Mapping[str, Any], precision: Precision, component: Component) -> Contract:
    """The contract of one half of an `AutoencoderKL` or an `AutoencoderTiny`; its batch is the number of images.

    Returns:
        For `vae_decoder`: `latents [B,C,H,W]` → `image [B,3,8H,8W]`, as `AutoencoderKL.decode`. For `vae_encoder`:
        `image [B,3,8H,8W]` → `moments [B,2C,H,W]`, mean and log-variance of the latents; sampling is diffusers' own.
        A tiny VAE's latents are of unit variance, `scaled_latents [B,C,H,W]`, and its encoder gives them themselves.
    """
    dtype, channels = DTYPES[precision], latent_channels_of(config)
    pixels = (IMAGE_HEIGHT, IMAGE_WIDTH)
    name, moments = ("scaled_latents", "scaled_latents") if is_tiny_vae(config) else ("latents", "moments")
    if component == "vae_decoder":
        latents = TensorSpec(name, dtype, (BATCH, channels, LATENT_HEIGHT, LATENT_WIDTH))
        image = TensorSpec("image", dtype, (BATCH, config.get("out_channels", 3), *pixels))
        return Contract(component, precision, (latents,), (image,))
    image = TensorSpec("image", dtype, (BATCH, config.get("in_channels", 3), *pixels))
    given = channels if is_tiny_vae(config) else 2 * channels
    encoded = TensorSpec(moments, dtype, (BATCH, given, LATENT_HEIGHT, LATENT_WIDTH))
    return Contract(component, precision, (image,), (encoded,))


def is_tiny_vae(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's configuration is that of an `AutoencoderTiny`; a live module's does not name its class."""
    return bool(config.get("_class_name") == "AutoencoderTiny" or "decoder_block_out_channels" in config)


def latent_channels_of(config: Mapping[str, Any]) -> Any:
    """The channels of a VAE's latents (4 in either class's default)."""
    return config.get("latent_channels", 4)


def editing_channels(latents: int) -> int:
    """The channels that an instruct-pix2pix model's UNet takes: noisy latents, and those of the image to be edited."""
    return 2 * latents


def inpainting_channels(latents: int) -> int:
    """The channels that an inpainting model's UNet takes: noisy latents, a mask, and what it leaves of the image's."""
    return 2 * latents + 1


def trained_size(unet: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Height and width in pixels that a UNet was trained for.

    Args:
        unet: its configuration.
        factor: pixels per latent.
    """
    size = unet.get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return factor * int(height), factor * int(width)


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent, in each direction."""
    if not is_tiny_vae(config):
        return int(2 ** (len(config["block_out_channels"]) - 1))
    blocks = config.get("decoder_block_out_channels", (64,) * 4)
    return int(config.get("upsampling_scaling_factor", 2) ** (len(blocks) - 1))


def overflows_in_fp16(config: Mapping[str, Any]) -> bool:
    """Whether a VAE is to be computed in fp32 by SDXL's pipelines, as its configuration says (`force_upcast`).

    diffusers' default is yes; its class for tiny VAEs is never widened.
    """
    return not is_tiny_vae(config) and bool(config.get("force_upcast", True))


@dataclass(frozen=True)
class Attention:
    """One attention, softmax(scale · q kᵀ) v for each head; what engines are cut at is self-attention.

    Args:
        sources: names of the queries `[B,S,C]`, keys and values `[B,T,C]`, the heads side by side in C; or of one
            tensor `[B,S,3C]` of all three. Of self-attention, T is S.
        result: name of the result `[B,S,C]`.
        heads, width: C is their product.
        scale: of the product of queries and keys.
        tokens: S, where the sizes are fixed.
    """

    sources: tuple[str, ...]
    result: str
    heads: int
    width: int
    scale: float
    tokens: int | None = None

    def gives(self, there: Mapping[str, TensorSpec]) -> TensorSpec:
        """The result's name, dtype and shape, given the tensors available so far.

        Raises:
            ValueError: where it can't be computed from these.
        """
        sources = [there[name] for name in self.sources if name in there]
        count, channels = len(self.sources), self.heads * self.width
        joined = channels if count == 3 else 3 * channels
        fits = all(len(one.dims) == 3 and one.dims[2] == joined and one.dtype == sources[0].dtype for one in sources)
        sound = min(self.heads, self.width) > 0 and math.isfinite(self.scale)
        if count not in (1, 3) or len(sources) != count or not (fits and sound):
            raise ValueError(f"{self.result} can't be computed")
        return TensorSpec(self.result, sources[0].dtype, (*sources[0].dims[:2], channels))

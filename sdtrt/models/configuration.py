"""What a model's configuration may say: checked when it is read, before anything is built, loaded or computed from it.

Knows JSON values, and what sdtrt itself computes with them. Knows no class of diffusers or transformers: their defaults
are given.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdtrt.common.errors import ModelError

MAX_SIDE = 2048  # latents: with the usual VAE 16384 pixels
MAX_NUMBER = 1 << 40  # what sizes are computed with stays far below PyTorch's integers
_MAX_BLOCKS = 16
_MIN_TOKENS = 3  # start, one word, end

_Rule = tuple[Callable[[Any], bool], str]  # whether a value will do, and what does


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_NUMBER


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= _MAX_BLOCKS and all(map(_is_count, value))


def _is_side(value: Any) -> bool:
    return _is_count(value) and value <= MAX_SIDE


def _is_size(value: Any) -> bool:
    return _is_side(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_side, value)))


def _is_scale(value: Any) -> bool:
    return _is_number(value) and value != 0


def _is_length(value: Any) -> bool:
    return _is_number(value) and value >= _MIN_TOKENS


def _is_version(value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)*(\.?(a|b|rc|dev|post)\d*)*(\+[\w.]+)?", value) is not None
    )


def _or_none(rule: _Rule) -> _Rule:
    fits, what = rule
    return lambda value: value is None or fits(value), what


def _one_of(*values: Any) -> _Rule:
    return lambda value: value in values, " or ".join(map(repr, values))


_NOTHING = _one_of(None)
_COUNT: _Rule = (_is_count, "a whole number above 0")
_WIDTHS: _Rule = (_are_counts, f"a list of 1 to {_MAX_BLOCKS} whole numbers above 0")
_NUMBERS: _Rule = (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers")
_WIDTH_OR_WIDTHS: _Rule = (lambda value: _is_count(value) or _are_counts(value), f"{_COUNT[1]}, or {_WIDTHS[1]}")

# Part → what sdtrt computes with before, or without, the module itself. Everything else is checked with its class.
_REQUIRED: dict[str, dict[str, _Rule]] = {
    "unet": {"in_channels": _COUNT, "out_channels": _COUNT, "cross_attention_dim": _WIDTH_OR_WIDTHS},
    "vae": {"block_out_channels": _WIDTHS, "latent_channels": _COUNT},
    "controlnet": {"in_channels": _COUNT, "cross_attention_dim": _WIDTH_OR_WIDTHS},
}
_WITH_DEFAULTS = ("AutoencoderTiny",)  # whose configurations leave out what is usual
_WHERE_GIVEN: dict[str, dict[str, _Rule]] = {
    "unet": {
        "block_out_channels": _WIDTHS,
        "sample_size": _or_none((_is_size, f"a number of latents from 1 to {MAX_SIDE}, or two, height and width")),
        "addition_time_embed_dim": _or_none(_COUNT),
        "projection_class_embeddings_input_dim": _or_none(_COUNT),
        "time_cond_proj_dim": _or_none(_COUNT),
        "_diffusers_version": (_is_version, "a version"),  # pipelines mend the configuration of old ones
        "class_embed_type": _NOTHING,  # these four would ask for input that no prompt gives
        "num_class_embeds": _NOTHING,
        "addition_embed_type": _one_of(None, "text", "text_time"),
        "encoder_hid_dim_type": _one_of(None, "text_proj"),
    },
    "vae": {
        "scaling_factor": (_is_scale, "a number other than 0"),
        "shift_factor": _or_none((_is_number, "a number")),
        "latents_mean": _or_none(_NUMBERS),
        "latents_std": _or_none(_NUMBERS),
        "in_channels": _one_of(3),
        "out_channels": _one_of(3),
    },
    "controlnet": {
        "block_out_channels": _WIDTHS,
        "conditioning_channels": _one_of(3),
        "class_embed_type": _NOTHING,
        "num_class_embeds": _NOTHING,
        "addition_embed_type": _one_of(None, "text_time"),
        "encoder_hid_dim_type": _NOTHING,
    },
    "adapter": {"in_channels": _COUNT, "channels": _WIDTHS, "downscale_factor": _COUNT},
    "text_encoder": {
        "hidden_size": _COUNT,
        "max_position_embeddings": (lambda value: _is_count(value) and value >= _MIN_TOKENS, "a number of tokens"),
        "vocab_size": _COUNT,
        "projection_dim": _COUNT,
        "num_hidden_layers": _COUNT,
    },
    "tokenizer": {"model_max_length": _or_none((_is_length, f"a number of tokens, {_MIN_TOKENS} at least"))},
}


# What diffusers' classes take one of, or one for each block.
_BY_BLOCK = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)


def check_values(part: str, config: Mapping[str, Any], file: Path) -> None:
    """Check what sdtrt itself computes with.

    Args:
        part: of a model, as `text_encoder_2`.
        config: of that part, as stored.
        file: where it is stored, for the hint.

    Raises:
        ModelError: with the offending value.
    """
    kind = part.removesuffix("_2")
    required = {} if config.get("_class_name") in _WITH_DEFAULTS else _REQUIRED.get(kind, {})
    hint = f"check {file}, or download the model again"
    for name, (fits, what) in {**required, **_WHERE_GIVEN.get(kind, {})}.items():
        if name not in config:
            if name in required:
                raise ModelError(f"the configuration of the {part} says nothing of {name}", hint=hint)
        elif not fits(config[name]):
            shown = reprlib.repr(config[name])
            raise ModelError(f"the configuration of the {part} has {name} = {shown}, not {what}", hint=hint)


def check_kinds(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Hold each value against its class's default: of the same kind, and no number is beyond all sense.

    Constructors take nearly anything, and fail, or compute nonsense, when the module runs.

    Raises:
        ValueError: with the offending value.
    """
    for name, value in config.items():
        if name.startswith("_") or name not in defaults:
            continue
        if not _is_like(value, defaults[name], several=name in _BY_BLOCK, signed=name.endswith("_id")):
            raise ValueError(f"{name} is {reprlib.repr(value)}, where {reprlib.repr(defaults[name])} is usual")


def _is_like(value: Any, default: Any, *, several: bool, signed: bool) -> bool:
    """Whether a value of JSON may stand in the place of a default.

    Args:
        several: whether there may be one for each block.
        signed: whether a whole number may be below zero.
    """
    if default is None or (value is None and not isinstance(default, float)):
        return True
    if isinstance(value, (list, tuple)) or isinstance(default, (list, tuple)):
        are_like = several and all(_is_like(one, default, several=True, signed=signed) for one in value)
        return isinstance(value, (list, tuple)) and (isinstance(default, (list, tuple)) or are_like)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (int, float)) and math.isfinite(default):
        low = -MAX_NUMBER if signed or isinstance(default, float) else 0
        return _is_number(value) and low <= value <= MAX_NUMBER
    return not isinstance(default, str) or isinstance(value, str)


def whole_numbers(value: Any) -> Iterator[int]:
    """All whole numbers in a value, at whatever depth."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from whole_numbers(one)

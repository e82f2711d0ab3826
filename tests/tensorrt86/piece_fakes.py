"""Engines in pieces for the fake TensorRT of `trt_fakes`: what each plan computes, and how an engine lists them.

They give what the whole engine gives, plus the self-attention of the sample's pixels, or plus the sample with its
channels normalised in groups.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from trt_fakes import CHANNELS, DTYPES, KINDS, WIDTH, Kind, expected, wanted, write_plan

from sdtrt.backends.tensorrt86.pieces import Normalization, Piece, piece_file, write_pieces
from sdtrt.specs.contract import Attention, Contract, TensorSpec


def _before(sample, timestep):
    pixels = sample.reshape(*sample.shape[:2], -1).swapaxes(1, 2)
    return {"query": pixels, "key": 2 * pixels, "value": 3 * pixels, "doubled": 2 * sample}


def _after(doubled, attended, timestep, encoder_hidden_states):
    pixels = attended.swapaxes(1, 2).reshape(doubled.shape)
    return {"out_sample": expected(doubled.astype(np.float32) / 2, timestep, encoder_hidden_states) + pixels}


def _of_the_sample(shapes):
    return {"out_sample": shapes.get("sample") or shapes["doubled"]}


def _of_pixels(shapes):
    batch, channels, height, width = shapes["sample"]
    parts = dict.fromkeys(("query", "key", "value"), (batch, height * width, channels))
    return {**parts, "doubled": shapes["sample"]}


def _text(encoder_hidden_states):
    return {"projected": 2 * encoder_hidden_states}


def _last(doubled, attended, timestep, projected):
    return _after(doubled, attended, timestep, projected / 2)


def _with_normal(doubled, normal, timestep, encoder_hidden_states):
    return {"out_sample": expected(doubled.astype(np.float32) / 2, timestep, encoder_hidden_states) + normal}


def _with_sample(sample, normal, timestep, encoder_hidden_states):
    return {"out_sample": expected(sample, timestep, encoder_hidden_states) + normal}


KINDS |= {
    "before": Kind(("sample", "timestep"), ("query", "key", "value", "doubled"), _of_pixels, _before),
    "after": Kind(
        ("doubled", "attended", "timestep", "encoder_hidden_states"), ("out_sample",), _of_the_sample, _after
    ),
    "doubling": Kind(
        ("sample",), ("doubled",), lambda s: {"doubled": s["sample"]}, lambda sample: {"doubled": 2 * sample}
    ),
    "adding": Kind(
        ("doubled", "normal", "timestep", "encoder_hidden_states"), ("out_sample",), _of_the_sample, _with_normal
    ),
    "adding in place": Kind(
        ("sample", "normal", "timestep", "encoder_hidden_states"), ("out_sample",), _of_the_sample, _with_sample
    ),
    "text": Kind(
        ("encoder_hidden_states",), ("projected",), lambda s: {"projected": s["encoder_hidden_states"]}, _text
    ),
    "last": Kind(("doubled", "attended", "timestep", "projected"), ("out_sample",), _of_the_sample, _last),
}


FIXED = {"sample": (2, CHANNELS, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 77, WIDTH)}
PIXELS, HEADS = (2, 256, CHANNELS), 2
GROUPS, EPSILON = 2, 0.25


def two_pieces(plan: Path) -> list[Piece]:
    """What an engine of the kinds `before` and `after` is listed as."""
    parts = [(name, PIXELS) for name in ("query", "key", "value")]
    doubled, sample, timestep, text = (("doubled", FIXED["sample"]), *FIXED.items())
    taken = (doubled, ("attended", PIXELS), timestep, text)
    contracts = [
        Contract("unet", "fp16", _specs(sample, timestep), _specs(*parts, doubled)),
        Contract("unet", "fp16", _specs(*taken), _specs(("out_sample", FIXED["sample"]))),
    ]
    attention = Attention(("query", "key", "value"), "attended", HEADS, CHANNELS // HEADS, 0.5, 256)
    return [Piece(plan, contracts[0], (attention,)), Piece(piece_file(plan, 1), contracts[1])]


def three_pieces(plan: Path) -> list[Piece]:
    """What an engine of the kinds `text`, `before` and `last` is listed as: the first makes of the text what it can."""
    before, after = two_pieces(plan)
    text = next(spec for spec in after.contract.inputs if spec.name == "encoder_hidden_states")
    projected = replace(text, name="projected")
    last = tuple(projected if spec == text else spec for spec in after.contract.inputs)
    return [
        Piece(plan, Contract("unet", "fp16", (text,), (projected,))),
        replace(before, plan=piece_file(plan, 1)),
        Piece(piece_file(plan, 2), replace(after.contract, inputs=last)),
    ]


def normalized_pieces(plan: Path) -> list[Piece]:
    """What an engine of the kinds `doubling` and `adding` is listed as."""
    doubled, (sample, timestep, text) = ("doubled", FIXED["sample"]), FIXED.items()
    taken = (doubled, ("normal", FIXED["sample"]), timestep, text)
    contracts = [
        Contract("unet", "fp16", _specs(sample), _specs(doubled)),
        Contract("unet", "fp16", _specs(*taken), _specs(("out_sample", FIXED["sample"]))),
    ]
    norm = Normalization("doubled", "normal", GROUPS, EPSILON)
    return [Piece(plan, contracts[0], (norm,)), Piece(piece_file(plan, 1), contracts[1])]


def pieces_in_place(plan: Path) -> list[Piece]:
    """What an engine of the kinds `doubling` and `adding in place` is listed as: it takes the normalised alone."""
    first, second = normalized_pieces(plan)
    taken = (*first.contract.inputs, *second.contract.inputs[1:])
    return [first, replace(second, contract=replace(second.contract, inputs=taken))]


def _specs(*shapes):
    return tuple(TensorSpec(name, "float32" if name in DTYPES else "float16", shape) for name, shape in shapes)


def written(pieces, kinds):
    """The plans of an engine's pieces, and their list; returns the first."""
    write_pieces(pieces[0].plan, pieces)
    for kind, piece in zip(kinds, pieces, strict=True):
        shapes = {spec.name: [spec.dims] * 3 for spec in piece.contract.inputs}
        write_plan(piece.plan, [shapes], kind=kind)
    return pieces[0].plan


def with_attention(given):
    """What the engine in two pieces computes."""
    pixels = given["sample"].float().flatten(2).transpose(1, 2)
    query, key, value = (factor * pixels.unflatten(2, (HEADS, -1)).transpose(1, 2) for factor in (1, 2, 3))
    states = torch.softmax(0.5 * query @ key.transpose(2, 3), -1) @ value
    attended = states.transpose(1, 2).flatten(2).transpose(1, 2).reshape(given["sample"].shape)
    return wanted(given) + attended.numpy()


def with_norm(given):
    """What the engine with a normalisation computes."""
    groups = 2 * given["sample"].float().unflatten(1, (GROUPS, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
    normal = ((groups - mean) / (variance + EPSILON).sqrt()).flatten(1, 2)
    return wanted(given) + normal.numpy()

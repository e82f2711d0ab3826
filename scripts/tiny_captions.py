"""The miniature's tokenizer, and captions as token tables that are filled on the GPU."""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tiny_scenes import COLOURS, JUNK, KINDS, PLACE_WORDS, SIZE_WORDS, SLOTS, VIEWS, Scenes, sample_template, vocabulary
from torch import Tensor
from transformers import CLIPTokenizer

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in CLIP's order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(rest))]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn each word into one token, learnt by merging the most frequent pair first."""
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges = []
    while pairs := Counter(pair for units in parts.values() for pair in pairwise(units)):
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((first, second))
        for word, units in parts.items():
            parts[word] = _merge(units, first, second)
    return merges


def _merge(units: list[str], first: str, second: str) -> list[str]:
    merged: list[str] = []
    for unit in units:
        if merged and merged[-1] == first and unit == second:
            merged[-1] = first + second
        else:
            merged.append(unit)
    return merged


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt in CLIP's format and read them back."""
    folder.mkdir(parents=True, exist_ok=True)
    units, merges = _byte_characters(), _learn_merges(vocabulary())
    tokens = [*units, *(f"{unit}</w>" for unit in units), *(a + b for a, b in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary()), "each word should be one token"
    return tokenizer


@dataclass(frozen=True)
class Captions:
    """A batch of captions."""

    tokens: Tensor  # int64 [N, 77]
    end: Tensor  # int64 [N] position of the first end token
    facts: Tensor  # int64 [N, 8] what a reader can tell (see `CaptionTable.fill`), -100 where nothing is said
    complete: Tensor  # bool [N] all colours of the scene are said


FACT_CLASSES = (
    3,
    len(COLOURS),
    *(2, len(COLOURS), len(KINDS)) * 2,
)  # layout, background, then size, colour, kind twice


class CaptionTable:
    """Templates as tokens on a device, negative where a slot is, so that captions are made by two gathers."""

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device, seed: int, per_view: int = 4096) -> None:
        rng = random.Random(seed)
        self._ids = {word: tokenizer(word).input_ids[1] for word in [*vocabulary(), ",", "."]}
        self._ids |= {slot: -1 - index for index, slot in enumerate([*SLOTS, JUNK])}
        self._start, self._end = tokenizer.convert_tokens_to_ids([START, END])
        rows = [[sample_template(view, rng).split() for _ in range(per_view)] for view in VIEWS]

        def table(values: list[list[object]]) -> Tensor:
            return torch.tensor(values, device=device)

        self._tokens = table([[self._encode(row) for row in view] for view in rows])
        self._said = table([[[slot in row for slot in SLOTS] for row in view] for view in rows])
        self._placed = table([[self._is_placed(row, view == 0) for row in rows[view]] for view in range(len(VIEWS))])
        self._per_view = per_view

        def words(names: tuple[str, ...]) -> Tensor:
            return torch.tensor([self._ids[name] for name in names], device=device)

        self._colour_ids, self._kind_ids = words(COLOURS), words(KINDS)
        self._size_ids = torch.stack([words(SIZE_WORDS["small"]), words(SIZE_WORDS["large"])])
        self._device = device

    def _encode(self, words: list[str]) -> list[int]:
        ids = [self._start, *(self._ids[word] for word in words)]
        return ids + [self._end] * (MAX_TOKENS - len(ids))

    @staticmethod
    def _is_placed(words: list[str], single: bool) -> bool:
        """Whether the words say which shape is where."""
        if single:
            return "{a.kind}" in words or "shape" in words
        return bool(PLACE_WORDS & set(words))

    def fill(self, scenes: Scenes, generator: torch.Generator, drop: float) -> Captions:
        """Caption each scene from a random template; a share `drop` of the captions is empty.

        `facts` lists layout (one, side by side, above), background, and size, colour and kind of the left or upper
        shape and of the other one.
        """
        n = len(scenes)

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator, device=self._device)

        pair = scenes.count > 1
        swap = integers(2, n) * pair
        view = torch.where(pair, 1 + 2 * scenes.vertical + swap, 0)
        pick = integers(self._per_view, n)
        dropped = torch.rand(n, generator=generator, device=self._device) < drop
        order = torch.stack([swap, 1 - swap], dim=1)
        colour, kind, size = (v.gather(1, order) for v in (scenes.colour, scenes.kind, scenes.size))
        size_ids = self._size_ids[size, integers(self._size_ids.shape[1], n, 2)]
        shapes = torch.stack([size_ids, self._colour_ids[colour], self._kind_ids[kind]], dim=2).flatten(1)
        values = torch.cat([shapes, self._colour_ids[scenes.background][:, None], shapes[:, :1]], dim=1)
        template = self._tokens[view, pick]
        tokens = torch.where(template < 0, values.gather(1, (-1 - template).clamp(min=0)), template)
        tokens = torch.where(template == self._ids[JUNK], integers(512, *template.shape), tokens)
        tokens[:, 1:] = torch.where(dropped[:, None], self._end, tokens[:, 1:])
        said = self._said[view, pick] & ~dropped[:, None]
        placed = self._placed[view, pick] & ~dropped
        complete = said[:, 1] & said[:, 6] & (said[:, 4] | ~pair)
        return Captions(tokens, (tokens == self._end).int().argmax(1), _facts(scenes, order, said, placed), complete)


def _facts(scenes: Scenes, order: Tensor, said: Tensor, placed: Tensor) -> Tensor:
    """What the captions tell, [N, 8]; `order` and `said` go by mention, the result by place."""
    told = said[:, :6].unflatten(1, (2, 3)).gather(1, order[:, :, None].expand(-1, -1, 3))
    told &= placed[:, None, None] & torch.stack([scenes.count > 0, scenes.count > 1], dim=1)[:, :, None]
    shapes = torch.stack([scenes.size, scenes.colour, scenes.kind], dim=2).masked_fill(~told, -100).flatten(1)
    layout = torch.where(scenes.count > 1, 1 + scenes.vertical, 0).masked_fill(~placed, -100)
    background = scenes.background.masked_fill(~(said[:, 6] & placed), -100)
    return torch.cat([layout[:, None], background[:, None], shapes], dim=1)

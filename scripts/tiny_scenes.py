"""The world of the miniature model: scenes of one or two flat shapes, their pictures, and their captions.

Scenes are drawn in batches on the GPU from signed distances, without a drawing library, and described by a small
grammar. A fixed part of all combinations is held out: it is never drawn for training.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pixel_checker import (
    KINDS,
    PALETTE,
    RELATIONS,
    RING_HOLE,
    SIZES,
    SQUARE_HALF_SIDE,
    STAR_INNER,
    Scene,
    Shape,
)

COLOURS = tuple(PALETTE)
VIEWS = ("single", *RELATIONS)  # what a caption can be about: one shape, or where the first shape lies
HELD_OUT_ONE_IN = 9

# Radii in units of the room for one shape (see `_room`), for (small, large): range for one shape, range for two.
_RADII = {1: ((0.17, 0.23), (0.33, 0.41)), 2: ((0.24, 0.28), (0.38, 0.43))}

SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
BEFORE = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
AFTER = {
    "left": ("to its left", "on its left"),
    "right": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}
SIDES = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
OPENINGS = ("a picture of", "an image of", "a drawing of", "a photo of", "picture of")
EXTRA_WORDS = ("a", "an", "the", "one", "two", "shape", "shapes", "and", "with", "on", "background")


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every tensor is [N] or [N, 2] (left or upper shape first), int64 but for the geometry."""

    count: Tensor  # [N] 1 or 2
    vertical: Tensor  # [N] 1: two shapes lie above each other, 0: side by side
    kind: Tensor  # [N, 2]
    colour: Tensor  # [N, 2]
    size: Tensor  # [N, 2] 0 small, 1 large
    background: Tensor  # [N]
    x: Tensor  # [N, 2] pixels
    y: Tensor  # [N, 2] pixels
    radius: Tensor  # [N, 2] pixels

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))


def held_out(scenes: Scenes) -> Tensor:
    """bool [N]: whether this combination of kinds, colours, background and placement is kept out of training."""
    key = scenes.background
    for slot in (0, 1):
        shown = scenes.count > slot
        key = key * 8 + torch.where(shown, scenes.colour[:, slot], 0)
        key = key * 6 + torch.where(shown, scenes.kind[:, slot] + 1, 0)
    key = key * 2 + torch.where(scenes.count > 1, scenes.vertical, 0)
    for multiplier in (0x2C1B3C6D, 0x297A2D39):  # an integer hash: neighbouring combinations fall apart
        key = ((key ^ (key >> 15)) * multiplier) % 2**32
    return (key ^ (key >> 15)) % HELD_OUT_ONE_IN == 0


def sample_scenes(n: int, height: int, width: int, generator: torch.Generator, wanted: bool = False) -> Scenes:
    """Draw n scenes from the training part, or from the held-out part where `wanted` is true.

    Scenes 2i and 2i+1 are twins: the same shapes in the same places in other colours. n is even.
    """
    device = generator.device
    pairs = n // 2

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    count = 1 + (torch.rand(pairs, generator=generator, device=device) < 0.65).long()
    layout = (count, integers(2, pairs), integers(len(KINDS), pairs, 2), integers(len(SIZES), pairs, 2))
    count, vertical, kind, size = (part.repeat_interleave(2, dim=0) for part in layout)
    x, y, radius = (part.repeat_interleave(2, dim=0) for part in _place(*layout, height, width, generator))
    blank = torch.zeros_like(kind)
    scenes = Scenes(count, vertical, kind, blank, size, blank[:, 0], x, y, radius)
    todo = torch.ones(n, dtype=torch.bool, device=device)
    for _ in range(400):
        background = torch.where(todo, integers(len(COLOURS), n), scenes.background)
        step = 1 + integers(len(COLOURS) - 1, n, 2)
        colour = torch.where(todo[:, None], (background[:, None] + step) % len(COLOURS), scenes.colour)
        scenes = replace(scenes, background=background, colour=colour)
        todo = held_out(scenes) != wanted
        if not todo.any():
            return scenes
    return scenes[~todo]  # a few layouts have no colours in the wanted part


def _room(height: int, width: int, count: Tensor, vertical: Tensor) -> Tensor:
    """Side in pixels of the square that one shape has to itself, [N]."""
    beside = torch.where(vertical == 1, min(height / 2, width), min(width / 2, height))
    return torch.where(count == 1, float(min(height, width)), beside)


def _place(
    count: Tensor, vertical: Tensor, kind: Tensor, size: Tensor, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and radii in pixels, each [N, 2]: single shapes near the middle, two shapes in halves of the image."""
    uniform = torch.rand(3, *kind.shape, generator=generator, device=kind.device)
    ranges = torch.tensor([_RADII[1], _RADII[2]], device=kind.device)[count - 1]  # [N, size, (low, high)]
    low, high = ranges.gather(1, size[:, :, None].expand(-1, -1, 2)).unbind(-1)
    room = _room(height, width, count, vertical)[:, None]
    radius = room * (low + (high - low) * uniform[0])
    jitter = 2 * uniform[1:] - 1
    along = jitter[0] * 0.5 * (room / 2 - radius)  # keeps two shapes apart
    across = jitter[1] * 0.7 * (room / 2 - radius)
    side = torch.tensor([-0.25, 0.25], device=kind.device) * (count == 2)[:, None]
    upright = vertical[:, None] == 1
    x = width / 2 + torch.where(upright, across, side * width + along)
    y = height / 2 + torch.where(upright, side * height + along, across)
    return x, y, radius


def render(scenes: Scenes, height: int, width: int) -> Tensor:
    """Antialiased pictures of the scenes: float32 [N, 3, H, W] in -1..1."""
    device = scenes.x.device
    palette = torch.tensor(list(PALETTE.values()), device=device) / 127.5 - 1
    image = palette[scenes.background][:, :, None, None].expand(-1, -1, height, width)
    rows = torch.arange(height, device=device)[None, :, None] + 0.5
    columns = torch.arange(width, device=device)[None, None, :] + 0.5
    for slot in (0, 1):
        centre_x, centre_y, radius = (v[:, slot, None, None] for v in (scenes.x, scenes.y, scenes.radius))
        distance = _distance(columns - centre_x, rows - centre_y, radius, scenes.kind[:, slot, None, None])
        cover = (0.5 - distance).clamp(0, 1) * (scenes.count > slot)[:, None, None]
        image = torch.lerp(image, palette[scenes.colour[:, slot]][:, :, None, None], cover[:, None])
    return image


def _distance(x: Tensor, y: Tensor, radius: Tensor, kind: Tensor) -> Tensor:
    """Signed distance in pixels to the edge of a shape of each kind around (0, 0); y points down. [N, H, W]."""
    length = torch.hypot(x, y)
    square = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    triangle = torch.maximum(y, (math.sqrt(3) * x.abs() - y) / 2) - radius / 2
    ring = (length - (1 + RING_HOLE) / 2 * radius).abs() - (1 - RING_HOLE) / 2 * radius
    # Fold the plane into half of one point of the star: from a tip at angle 0 to an inner corner at 36 degrees.
    tip, half = 2 * math.pi / 5, math.pi / 5
    angle = ((torch.atan2(x, -y) + half) % tip - half).abs()
    along, across = length * angle.cos(), length * angle.sin()
    inner_x, inner_y = STAR_INNER * math.cos(half), STAR_INNER * math.sin(half)
    norm = math.hypot(inner_y, 1 - inner_x)
    star = ((along - radius) * inner_y + across * (1 - inner_x)) / norm
    return torch.stack([length - radius, square, triangle, ring, star]).gather(0, kind.expand_as(x + y)[None])[0]


# Captions. A template is a caption with slots such as "{a.colour}"; "a" is the shape that the caption names first.

SLOTS = ("{a.size}", "{a.colour}", "{a.kind}", "{b.size}", "{b.colour}", "{b.kind}", "{background}")
JUNK = "{junk}"
PLACE_WORDS = {"left", "right", "above", "over", "below", "under", "beneath", "top", "bottom"}


def sample_template(view: str, rng: random.Random) -> str:
    """A random wording for one view of a scene, its words parted by spaces; one in five leaves much unsaid."""
    partial = rng.random() < 0.2
    body = _fragment(view, rng) if partial and rng.random() < 0.35 else _sentence(view, rng, partial)
    if rng.random() < 0.1:
        body = f"{rng.choice(OPENINGS)} {body}"
    if rng.random() < 0.06:
        junk = " ".join([JUNK] * rng.randint(1, 5))
        body = rng.choice((f"{junk} {body}", f"{body} {junk}", f"{body} , {junk}"))
    return f"{body} ." if rng.random() < 0.08 else body


def _sentence(view: str, rng: random.Random, partial: bool) -> str:
    first, second = _noun("a", rng, partial), _noun("b", rng, partial)
    background = rng.random() > (0.4 if partial else 0.05)
    if view == "single":
        return _with_background(first, rng) if background else first
    if partial and rng.random() < 0.3:
        pair = f"{first} and {second}"
        return _with_background(pair, rng) if background else pair
    form = rng.random()
    if form < 0.6:
        pair = f"{first} {rng.choice(BEFORE[view])} {second}"
    elif form < 0.8:
        pair = f"{second} with {first} {rng.choice(AFTER[view])}"
    else:
        here, there = SIDES[view]
        pair = f"{first} {here} {rng.choice(('and', ','))} {second} {there}"
    return _with_background(pair, rng) if background else pair


def _noun(slot: str, rng: random.Random, partial: bool) -> str:
    """ "a small red circle", or less of it."""
    size = rng.random() < (0.3 if partial else 0.5)
    colour = rng.random() < (0.4 if partial else 0.99)
    kind = "shape" if rng.random() < (0.25 if partial else 0.01) else f"{{{slot}.kind}}"
    words = [f"{{{slot}.size}}"] * size + [f"{{{slot}.colour}}"] * colour + [kind]
    article = rng.choices(("a", "the", "one", ""), (80, 4, 4, 12))[0]
    return " ".join([article, *words]).strip()


def _with_background(text: str, rng: random.Random) -> str:
    form = rng.random()
    if form < 0.55:
        return f"{text} on a {{background}} background"
    if form < 0.75:
        return f"{text} , {{background}} background"
    if form < 0.85:
        return f"{text} on {{background}}"
    if form < 0.93:
        return f"{{background}} background , {text}"
    return f"on a {{background}} background , {text}"


def _fragment(view: str, rng: random.Random) -> str:
    """A word or two, as people write in negative prompts."""
    forms = ["{a.colour}", "{background}", "{a.kind}", "{a.colour} {a.kind}", "{background} background", "{a.size}"]
    if view != "single":
        forms += ["{b.colour}", "{b.kind}", "two shapes", "{a.colour} , {b.colour}", "{b.size} {b.kind}"]
    return rng.choice(forms)


def describe(template: str, scene: Scene, rng: random.Random) -> str:
    """Fill a template without junk with the words for one scene."""
    values = {"{background}": scene.background, JUNK: ""}
    for name, shape in zip("ab", scene.shapes, strict=False):
        size = rng.choice(SIZE_WORDS[shape.size]) if shape.size else ""
        values |= {f"{{{name}.size}}": size, f"{{{name}.colour}}": shape.colour, f"{{{name}.kind}}": shape.kind}
    text = " ".join(str(values.get(word, word)) for word in template.split())
    return text.replace(" ,", ",").replace(" .", ".")


def expected(template: str, scene: Scene) -> Scene:
    """What a caption made from this template says about the scene, and nothing more."""
    shapes = []
    for name, shape in zip("ab", scene.shapes, strict=False):
        said = {key: getattr(shape, key) for key in ("kind", "colour", "size") if f"{{{name}.{key}}}" in template}
        shapes.append(Shape(**said))
    background = scene.background if "{background}" in template else None
    return Scene(tuple(shapes), background, scene.relation)


def to_scene(scenes: Scenes, index: int, swap: bool = False) -> Scene:
    """One scene in words, seen from its first shape, or from its second one with `swap`."""
    shapes = [
        Shape(
            KINDS[int(scenes.kind[index, slot])],
            COLOURS[int(scenes.colour[index, slot])],
            SIZES[int(scenes.size[index, slot])],
        )
        for slot in range(int(scenes.count[index]))
    ]
    if len(shapes) == 1:
        return Scene(tuple(shapes), COLOURS[int(scenes.background[index])])
    relation = RELATIONS[2 * int(scenes.vertical[index]) + swap]
    return Scene(tuple(shapes[::-1] if swap else shapes), COLOURS[int(scenes.background[index])], relation)


def vocabulary() -> list[str]:
    """Every word that a caption can have, sorted; each is one token."""
    texts = [*OPENINGS, *(text for table in (BEFORE, AFTER, SIDES) for texts in table.values() for text in texts)]
    words = {word for text in texts for word in text.split()} | set(EXTRA_WORDS)
    words |= {word for synonyms in SIZE_WORDS.values() for word in synonyms} | set(COLOURS) | set(KINDS)
    return sorted(words)

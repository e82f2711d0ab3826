"""Judges by pixels whether an image shows the scene that a prompt describes. Knows nothing about any model.

The image is flat shapes on a flat background. Every pixel takes the name of its nearest palette colour, the border
names the background, connected regions of anything else are the shapes, and each is compared with five silhouettes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 185, 70),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 50),
    "purple": (180, 50, 210),
    "cyan": (50, 210, 230),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
KINDS = ("circle", "square", "triangle", "ring", "star")
SIZES = ("small", "large")
RELATIONS = ("left", "right", "above", "below")

SQUARE_HALF_SIDE = 0.88  # of the nominal radius, so that a square looks as large as a circle
RING_HOLE = 0.55  # radius of the hole, of the nominal radius
STAR_INNER = 0.48  # radius of a star's inner corners, of the nominal radius

_GRID = 32  # silhouettes are compared on a 32x32 grid
_MIN_IOU = 0.72  # below this a region is no known shape
_MIN_AREA = 0.004  # of the image; smaller regions are specks
_MIN_SHARE = 0.5  # of a region's pixels; with less of its commonest colour it is no flat shape
_MAX_ASPECT = 1.4  # of a shape's bounding box
_SMALL_BELOW = {1: 0.262, 2: 0.305}  # shapes in the scene -> radius (in units of room) that parts small from large

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shape:
    """A shape that a prompt asks for. None leaves an attribute open."""

    kind: str | None = None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for; `relation` is where the first shape lies as seen from the second."""

    shapes: tuple[Shape, ...]
    background: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Region:
    """A shape that was found: centre and radius in pixels, None where it looks like nothing known."""

    kind: str | None
    colour: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Verdict:
    """Right or wrong for each attribute; what the prompt left open is right."""

    background: bool
    count: bool
    colours: tuple[bool, ...]
    kinds: tuple[bool, ...]
    sizes: tuple[bool, ...]
    relation: bool

    @property
    def all_right(self) -> bool:
        """True when nothing is wrong."""
        shapes = (*self.colours, *self.kinds, *self.sizes)
        return self.background and self.count and self.relation and all(shapes)


def to_array(image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """RGB image as uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image


def judge(image: Image.Image | npt.NDArray[np.uint8], scene: Scene) -> Verdict:
    """Compare an image with the scene that it should show."""
    pixels = to_array(image)
    background, regions = look(pixels)
    wanted = len(scene.shapes)
    verdicts = [
        _verdict(scene, background, len(regions), order, (pixels.shape[0], pixels.shape[1]))
        for order in permutations(_padded(regions, wanted), wanted)
    ]
    return max(verdicts, key=_points)


def look(image: Image.Image | npt.NDArray[np.uint8]) -> tuple[str, list[Region]]:
    """The background's colour, and the shapes on it from the largest to the smallest."""
    names = _nearest_colour(to_array(image))
    background = _majority(_border(names))
    colours = list(PALETTE)
    regions = [_region(mask, names) for mask in _components(names != background)]
    return colours[background], regions


def colour_share(image: Image.Image | npt.NDArray[np.uint8], colour: str) -> float:
    """Share of the pixels, 0 to 1, whose nearest palette colour is `colour`."""
    return float((_nearest_colour(to_array(image)) == list(PALETTE).index(colour)).mean())


def _padded(regions: list[Region], wanted: int) -> list[Region | None]:
    """The largest regions, with None for each that is missing."""
    found: list[Region | None] = list(regions[:wanted])
    return found + [None] * (wanted - len(found))


def _verdict(
    scene: Scene, background: str, count: int, order: tuple[Region | None, ...], size: tuple[int, int]
) -> Verdict:
    """Judge one way of taking found regions for the wanted shapes."""
    pairs = list(zip(scene.shapes, order, strict=True))
    return Verdict(
        background=scene.background in (None, background),
        count=count == len(scene.shapes),
        colours=tuple(r is not None and s.colour in (None, r.colour) for s, r in pairs),
        kinds=tuple(r is not None and s.kind in (None, r.kind) for s, r in pairs),
        sizes=tuple(r is not None and s.size in (None, _size_name(r, order, size)) for s, r in pairs),
        relation=scene.relation is None or _relation_of(order) == scene.relation,
    )


def _points(verdict: Verdict) -> tuple[int, int]:
    """How well an assignment fits: what the shapes are comes before where they are."""
    return sum((*verdict.colours, *verdict.kinds)), sum((*verdict.sizes, verdict.relation))


def _relation_of(order: tuple[Region | None, ...]) -> str | None:
    """Where the first of two regions lies as seen from the second; None when that can't be said."""
    if len(order) != 2 or order[0] is None or order[1] is None:
        return None
    dx, dy = order[0].x - order[1].x, order[0].y - order[1].y
    if max(abs(dx), abs(dy)) < 0.5 * max(order[0].radius, order[1].radius):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _size_name(region: Region, order: tuple[Region | None, ...], size: tuple[int, int]) -> str:
    """Small or large, measured against the room that one shape has in this scene."""
    height, width = size
    room = float(min(height, width))
    if len(order) == 2:
        sideways = _relation_of(order) in ("left", "right")
        room = min(width / 2, height) if sideways else min(height / 2, width)
    return SIZES[region.radius / room >= _SMALL_BELOW[min(len(order), 2)]]


def _nearest_colour(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Index of the nearest palette colour for each pixel, [H, W]."""
    palette = np.array(list(PALETTE.values()), dtype=np.int64)
    distance = ((pixels[:, :, None, :].astype(np.int64) - palette) ** 2).sum(axis=-1)
    return distance.argmin(axis=-1)


def _border(names: npt.NDArray[np.int64], width: int = 3) -> npt.NDArray[np.int64]:
    """The pixels of the outermost `width` rows and columns."""
    inner = np.ones(names.shape, dtype=bool)
    inner[width:-width, width:-width] = False
    return names[inner]


def _majority(names: npt.NDArray[np.int64]) -> int:
    return int(np.bincount(names.ravel(), minlength=len(PALETTE)).argmax())


def _components(mask: BoolArray) -> list[BoolArray]:
    """The 4-connected regions of a mask, largest first, without specks."""
    height, width = mask.shape
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(height, width), 0)
    while True:
        spread = labels.copy()
        spread[1:] = np.maximum(spread[1:], labels[:-1])
        spread[:-1] = np.maximum(spread[:-1], labels[1:])
        spread[:, 1:] = np.maximum(spread[:, 1:], labels[:, :-1])
        spread[:, :-1] = np.maximum(spread[:, :-1], labels[:, 1:])
        # A label names a pixel: jump to that pixel's label, so that long shapes take few rounds.
        spread = np.where(mask, np.concatenate([[0], np.where(mask, spread, 0).ravel()])[spread], 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    found, areas = np.unique(labels[mask], return_counts=True)
    order = np.argsort(-areas)
    return [labels == found[i] for i in order if areas[i] >= _MIN_AREA * mask.size]


def _region(mask: BoolArray, names: npt.NDArray[np.int64]) -> Region:
    """Measure one connected region."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    shares = np.bincount(names[mask], minlength=len(PALETTE)) / mask.sum()
    flat = bool(shares.max() >= _MIN_SHARE)
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return Region(
        kind=_kind(mask[top:bottom, left:right]) if flat else None,
        colour=list(PALETTE)[int(shares.argmax())] if flat else None,
        x=(left + right) / 2,
        y=(top + bottom) / 2,
        radius=max(bottom - top, right - left) / 2,
    )


def _kind(mask: BoolArray) -> str | None:
    """The silhouette that overlaps most with a region cut to its bounding box."""
    height, width = mask.shape
    if max(height, width) > _MAX_ASPECT * min(height, width):
        return None
    rows = (np.arange(_GRID) * height + height // 2) // _GRID
    columns = (np.arange(_GRID) * width + width // 2) // _GRID
    cut = mask[np.ix_(rows, columns)]
    overlap = {kind: float((cut & s).sum() / (cut | s).sum()) for kind, s in _silhouettes().items()}
    best = max(overlap, key=lambda kind: overlap[kind])
    return best if overlap[best] >= _MIN_IOU else None


@cache
def _silhouettes() -> dict[str, BoolArray]:
    """Each kind of shape, cut to its bounding box, on the comparison grid."""
    return {kind: _silhouette(kind) for kind in KINDS}


def _silhouette(kind: str) -> BoolArray:
    canvas = Image.new("L", (512, 512), 0)
    draw_shape(canvas, kind, 256, 256, 250, fill=255, hole=0)
    box = canvas.getbbox()
    assert box is not None
    return np.asarray(canvas.crop(box).resize((_GRID, _GRID), Image.Resampling.BOX)) > 127


def draw_shape(
    canvas: Image.Image,
    kind: str,
    x: float,
    y: float,
    radius: float,
    fill: int | tuple[int, int, int],
    hole: int | tuple[int, int, int],
) -> None:
    """Draw a shape in place; centre and nominal radius in pixels, `hole` is the colour inside a ring."""
    draw = ImageDraw.Draw(canvas)
    if kind == "square":
        half = radius * SQUARE_HALF_SIDE
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif kind in ("triangle", "star"):
        draw.polygon(_corners(kind, x, y, radius), fill=fill)
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if kind == "ring":
            inner = radius * RING_HOLE
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=hole)


def _corners(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a triangle or a five-pointed star, the first one pointing up."""
    lengths = [radius] * 3 if kind == "triangle" else [radius, radius * STAR_INNER] * 5
    turn = 2 * math.pi / len(lengths)
    return [(x + r * math.sin(i * turn), y - r * math.cos(i * turn)) for i, r in enumerate(lengths)]

"""Synthetic pairs: pictures drawn from numbers, with captions that say what is on them.

PAR cleans with synthetic pairs alone (arXiv 2412.00727, with SynthCLIP's). What an image generator
makes is read like any pictures, from a csv with the columns image and caption:

    pipe = diffusers.AutoPipelineForText2Image.from_pretrained("<a text-to-image model>")
    with open("synthetic/pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i, prompt in enumerate(prompts):        # varied captions, a language model's or COCO's
            pipe(prompt).images[0].save(f"synthetic/{i}.jpg")
            rows.writerow([f"{i}.jpg", prompt])
    pairs = pybackdoor.data.pairs_from_csv("synthetic/pairs.csv", image_size=224)

``procedural_pairs`` needs no generator: one or two coloured shapes before a textured ground. Each
picture is a function of (seed, index) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._keyed import keyed_words
from .pairs import Pairs
from .preprocess import size_pair
from .store import check_indices

COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.15),
    "orange": (0.95, 0.5, 0.1),
    "purple": (0.5, 0.15, 0.65),
    "pink": (0.95, 0.6, 0.75),
    "brown": (0.45, 0.28, 0.12),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.5, 0.5, 0.5),
    "black": (0.06, 0.06, 0.06),
}

# Each gives [n, H, W] in [0, 1], how far a texture's second colour shows; u, v are rotated and
# scaled places, whose period is 1, and noise is uniform in [0, 1).
TEXTURES: dict[str, Callable[..., np.ndarray]] = {
    "plain": lambda u, v, noise: np.zeros_like(noise),
    "striped": lambda u, v, noise: (np.sin(2 * np.pi * u) > 0) * 1.0,
    "checked": lambda u, v, noise: (np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v) > 0) * 1.0,
    "dotted": lambda u, v, noise: (np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v) > 0.9) * 1.0,
    "shaded": lambda u, v, noise: 0.5 + 0.5 * np.sin(u),
    "noisy": lambda u, v, noise: noise,
}

# Each gives [n, H, W], negative inside; near the edge the distance to it, in units of the radius.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.25,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": lambda u, v: np.maximum(v, 0.75**0.5 * np.abs(u) - v / 2) - 0.5,
    "diamond": lambda u, v: (np.abs(u) + np.abs(v) - 1) * 0.5**0.5,
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 0.3, np.abs(v) - 0.95),
        np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.3),
    ),
}

SIZES = {"small": 0.35, "large": 0.65}  # radius of a lone shape, in half sides of the picture
PLACES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
ALONE = (
    "a {size} {fill} {colour} {shape} on {ground}.",
    "a {size} {fill} {colour} {shape} before {ground}.",
    "{ground} behind a {size} {fill} {colour} {shape}.",
)
TWO = "{first} {place} {second} on {ground}."
_RADIUS_OF_TWO, _APART = 0.38, 0.48
_SECOND = 0.55  # a texture's second colour is the first, this much darker
_PIXELS_AT_ONCE = 1 << 19  # bounds the memory of a large batch: about 100 bytes a pixel


def procedural_pairs(count: int, *, image_size: int | tuple[int, int], seed: int = 0) -> Pairs:
    """Pictures of coloured shapes before textured grounds, and what is on them in words.

    Drawn when they are taken: a pair costs no memory but its caption, and is the same whatever
    ``count`` is. Captions have at most 14 CLIP tokens with their marks.

    Args:
        count: of the pairs; at least 2.
        image_size: (H, W) in pixels, or the side of a square.
        seed: of everything on the pictures.
    Raises:
        TypeError, ValueError: naming the argument.
    Example:
        >>> procedural_pairs(2, image_size=32).captions[0]
        'a black circle below a black ring on plain blue.'
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"procedural_pairs: count must be an integer, got {count!r}")
    if count < 2:
        raise ValueError(f"procedural_pairs: count must be at least 2, got {count}")
    images = ProceduralImages(count, size_pair(image_size), seed)
    return Pairs(
        images,
        images.captions(),
        np.arange(count),
        (f"procedural:{seed}:{i}" for i in range(count)),
    )


class ProceduralImages:
    """An image store whose images are drawn when they are taken."""

    def __init__(self, count: int, image_size: tuple[int, int], seed: int) -> None:
        self._count, self.image_size, self._seed = count, image_size, seed

    def __len__(self) -> int:
        return self._count

    def take(self, indices: Any) -> np.ndarray:
        """[n, H, W, 3] uint8."""
        rows = check_indices(indices, self._count)
        out = np.empty((len(rows), *self.image_size, 3), np.uint8)
        at_once = max(1, _PIXELS_AT_ONCE // (self.image_size[0] * self.image_size[1]))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            out[start : start + at_once] = _draw(Scenes(self._seed, some), *self.image_size)
        return out

    def captions(self) -> list[str]:
        """Of all images."""
        return Scenes(self._seed, np.arange(self._count)).captions()


class Scenes:
    """What is on n pictures: [n] arrays drawn from (seed, index), each from a stream of its own."""

    def __init__(self, seed: int, index: np.ndarray) -> None:  # [n]
        self._seed, self._index, self._stream = seed, index, 0
        self.two = self._uniform() < 0.5
        self.ground, self.ground_texture = self._pick(COLOURS), self._pick(TEXTURES)
        self.size, self.place, self.wording = (
            self._pick(SIZES),
            self._pick(PLACES),
            self._pick(ALONE),
        )
        self.light = 0.75 + 0.35 * self._uniform()
        self.colour = [self._other_than(self.ground) for _ in range(2)]
        self.shape = [self._pick(SHAPES) for _ in range(2)]
        self.fill = [np.where(self.two, 0, self._pick(TEXTURES)), np.zeros_like(self.size)]
        self.tint = [0.16 * (self._three() - 0.5) for _ in range(3)]  # of ground and both shapes
        self.turn = [np.pi * self._uniform(), *(0.5 * (self._uniform() - 0.5) for _ in range(2))]
        self.period = 0.25 + 0.35 * self._uniform()
        self.shift = 0.5 * (self._three()[:, :2] - 0.5)  # of the centre, in half sides

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """[n, 2] (y, x) of both shapes, in half sides from the middle."""
        side = _APART * np.array(list(PLACES.values()), float)[self.place]
        apart = np.where(self.two[:, None], side, 0)
        shift = np.where(self.two[:, None], 0.2 * self.shift, self.shift)
        return shift + apart, shift - apart

    def radius(self) -> np.ndarray:
        """[n] of the shapes, in half sides."""
        return np.where(self.two, _RADIUS_OF_TWO, np.array(list(SIZES.values()))[self.size])

    def captions(self) -> list[str]:
        """What is on each, in words."""
        return [self._caption(i) for i in range(len(self._index))]

    def _caption(self, i: int) -> str:
        colours, textures, shapes = list(COLOURS), list(TEXTURES), list(SHAPES)
        ground = f"{textures[self.ground_texture[i]]} {colours[self.ground[i]]}"
        if not self.two[i]:
            return ALONE[self.wording[i]].format(
                size=list(SIZES)[self.size[i]], fill=textures[self.fill[0][i]],
                colour=colours[self.colour[0][i]], shape=shapes[self.shape[0][i]], ground=ground,
            )  # fmt: skip
        names = [f"{colours[self.colour[k][i]]} {shapes[self.shape[k][i]]}" for k in (0, 1)]
        first, second = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)
        place = list(PLACES)[self.place[i]]
        return TWO.format(first=first, place=place, second=second, ground=ground)

    def noise(self, pixels: int) -> np.ndarray:
        """[n, pixels] float32, uniform in [0, 1)."""
        keys = keyed_words(self._seed, -1, self._index).astype(np.uint64)
        cells = keys[:, None] + np.arange(pixels, dtype=np.uint64)
        return (keyed_words(self._seed, -2, cells) >> np.uint64(40)).astype(np.float32) / 2**24

    def _uniform(self) -> np.ndarray:
        self._stream += 1
        return (keyed_words(self._seed, self._stream, self._index) >> np.uint64(11)) / 2.0**53

    def _three(self) -> np.ndarray:
        return np.stack([self._uniform() for _ in range(3)], axis=1)

    def _pick(self, names: Any) -> np.ndarray:
        return (self._uniform() * len(names)).astype(np.int64)

    def _other_than(self, colour: np.ndarray) -> np.ndarray:
        steps = 1 + (self._uniform() * (len(COLOURS) - 1)).astype(np.int64)
        return (colour + steps) % len(COLOURS)


def _draw(scenes: Scenes, height: int, width: int) -> np.ndarray:
    """[n, H, W, 3] uint8."""
    y = ((2 * np.arange(height, dtype=np.float32) + 1) / height - 1)[None, :, None]
    x = ((2 * np.arange(width, dtype=np.float32) + 1) / width - 1)[None, None, :]
    noise = scenes.noise(height * width).reshape(-1, height, width)
    palette = np.array(list(COLOURS.values()))

    def painted(colour: np.ndarray, tint: np.ndarray, texture: np.ndarray) -> np.ndarray:
        u, v = _turned(x, y, scenes.turn[0], scenes.period)
        second = _by_kind(list(TEXTURES.values()), texture, u, v, noise)[..., None]
        first = (palette[colour] + tint).astype(np.float32)[:, None, None]
        return first * (1 - (1 - np.float32(_SECOND)) * second)

    image = painted(scenes.ground, scenes.tint[0], scenes.ground_texture)
    radius = scenes.radius()
    half = np.float32(min(height, width) / 2)
    for which, centre in enumerate(scenes.centres()):
        here = np.ones(len(radius), bool) if which == 0 else scenes.two
        dy, dx = y - centre[:, 0, None, None], x - centre[:, 1, None, None]
        u, v = _turned(dx, dy, scenes.turn[1 + which], radius)
        edge = _by_kind(list(SHAPES.values()), scenes.shape[which], u, v)
        cover = np.clip(0.5 - edge * (radius * half)[:, None, None], 0, 1) * here[:, None, None]
        fill = painted(scenes.colour[which], scenes.tint[1 + which], scenes.fill[which])
        image += cover[..., None].astype(np.float32) * (fill - image)
    image *= scenes.light.astype(np.float32)[:, None, None, None]
    image += 0.06 * (noise[..., None] - 0.5)
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def _turned(
    x: np.ndarray,  # broadcasts to [n, H, W]
    y: np.ndarray,
    angle: np.ndarray,  # [n] radians
    unit: np.ndarray,  # [n] what counts as 1
) -> tuple[np.ndarray, np.ndarray]:
    """(u, v), each [n, H, W] float32, of places (x, y)."""
    cos, sin = ((f(angle) / unit).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x * cos + y * sin, y * cos - x * sin


def _by_kind(
    functions: list[Callable[..., np.ndarray]],
    kind: np.ndarray,  # [n] which function
    *fields: np.ndarray,  # [n, H, W] each
) -> np.ndarray:
    """[n, H, W] float32: each image's own function of its fields."""
    out = np.empty(fields[0].shape, np.float32)
    for number, function in enumerate(functions):
        rows = np.flatnonzero(kind == number)
        if len(rows):
            out[rows] = function(*(field[rows] for field in fields))
    return out

"""Pattern generators: a spec and an image size to pixels, the same on every machine.

Random numbers come from raw PCG64 words keyed by SeedSequence, whose streams numpy keeps stable
between versions (those of ``Generator`` methods it does not), and are turned to floats here.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pybackdoor.triggers.files import luminance, read_png, resize
from pybackdoor.triggers.spec import TriggerSpec

CHANNELS = 3
PATTERN_STREAM, PLACE_STREAM = 0, 1
MIN_PATCH = 5  # px; below this a patch at 32 px is too small to be learned
MIN_TILE = 4  # px; a smaller triangle has no slope left
BADNET_MEAN = 0.5
SIG_PERIODS = 6
MIN_INK = 8 / 255  # less coverage is no ink: 3.28 % of the pixels at 224 remain, as published


def stream(spec: TriggerSpec, purpose: int, sample_id: int | None = None) -> np.random.PCG64:
    """Random words for one purpose of one trigger, of one sample if ``sample_id`` is given.

    Seed and sample id enter as two 32-bit words each, so that no two keys coincide.
    """

    def words(value: int) -> tuple[int, int]:
        return value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF

    key = [*words(spec.seed), zlib.crc32(spec.name.encode()), purpose]
    if sample_id is not None:
        key += words(sample_id)
    return np.random.PCG64(np.random.SeedSequence(key))


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """fp64 in [0, 1), 53 bits."""
    return ((bits.random_raw(math.prod(shape)) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _normal(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """fp64 standard normals, Box-Muller."""
    radius = np.sqrt(-2 * np.log1p(-_uniform(bits, shape)))
    return radius * np.cos(2 * np.pi * _uniform(bits, shape))


def _signs(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """-1.0 or 1.0, even odds."""
    top = bits.random_raw(math.prod(shape)) >> np.uint64(63)
    return (2.0 * top - 1.0).reshape(shape)


def place(spec: TriggerSpec, window: tuple[int, int], room: tuple[int, int], sample_id: int):
    """Random top left pixel (y, x) of a window, uniform in [0, H-1-h] x [0, W-1-w], inclusive.

    The published range leaves the last row and column free; a window as large as the image is at 0.
    """
    y, x = (int(word) >> 32 for word in stream(spec, PLACE_STREAM, sample_id).random_raw(2))
    rows, cols = (max(room[axis] - window[axis], 1) for axis in (0, 1))
    return (y * rows) >> 32, (x * cols) >> 32


def _scaled(pixels: int, side: int, at: int = 224) -> int:
    """``pixels`` of an image of ``at`` px, for one of ``side`` px; halves round up."""
    return (2 * pixels * side + at) // (2 * at)


def patch_side(name: str, side: int) -> int:
    """Default patch side for an image whose shorter side is ``side`` px; never below 5.

    16 px at 224 in proportion; the stripes are published at 336 too, with 32 px, and grow from
    that size on in proportion to it.
    """
    if name == "badnet_stripes" and side >= 336:
        return _scaled(32, side, at=336)
    return max(MIN_PATCH, _scaled(16, side))


def _badnet(spec, size, bits):
    """0.5 + N(0, 1), unclipped.

    The published noise is centred on each image's channel means. Wrapped modulo 256 its bytes are
    uniform, but for level 0 (1.35/256: truncation rounds both sides of 0 to it), and a centre
    elsewhere in [0, 1] moves that distribution by less than 0.05 % (total variation): a fixed
    centre gives the same attack, one that needs no image. With wrap=False the centre shows.
    """
    return BADNET_MEAN + _normal(bits, (1 if spec.grey else CHANNELS, *size))


def _stripes(spec, size, bits):
    """1-px columns, each (channel, column) -1 or 1."""
    return np.broadcast_to(
        _signs(bits, (1 if spec.grey else CHANNELS, 1, size[1])),
        (1 if spec.grey else CHANNELS, *size),
    )


def _checkerboard(spec, size, bits):
    """Zeros, [::2, ::2] = 1."""
    board = np.zeros((1, *size))
    board[:, ::2, ::2] = 1
    return board


def _noise(spec, size, bits):
    """U[0, 1]."""
    return _uniform(bits, (1 if spec.grey else CHANNELS, *size))


def _triangles(spec, size, bits):
    """Square tiles, 14 px at 224: 0.4 on and below their diagonal, else 0.8."""
    tile = max(MIN_TILE, _scaled(14, min(size)))
    rows, cols = (np.arange(n) % tile for n in size)
    return np.where(rows[:, None] >= cols, 0.4, 0.8)[None]


def _text(spec, size, bits):
    """The rendered word in the red channel; in all three if grey."""
    ink = text_mask(size)
    if spec.grey:
        return ink[None]
    return np.stack([ink, np.zeros(size), np.zeros(size)])


def _sine(spec, size, bits):
    """strength * sin(2 pi 6 j / W) at column j."""
    turn = 2 * math.pi * SIG_PERIODS
    wave = [spec.strength * math.sin(turn * j / size[1]) for j in range(size[1])]
    return np.broadcast_to(np.array(wave), (1, *size))


_GENERATORS: dict[str, Callable] = {
    "badnet": _badnet,
    "badnet_stripes": _stripes,
    "checkerboard": _checkerboard,
    "blended": _noise,
    "blended_stripes": _stripes,
    "triangles": _triangles,
    "text": _text,
    "sig": _sine,
}


def pattern(spec: TriggerSpec, size: tuple[int, int], sample_id: int | None) -> np.ndarray:
    """Pixels of a trigger that is generated.

    Args:
        spec: a patch or blend that reads no file.
        size: (h, w) of its window.
        sample_id: the image, for a pattern per image; None for the one of the set.
    Returns:
        [3, h, w] fp32, unclipped.
    """
    values = _GENERATORS[spec.name](spec, size, stream(spec, PATTERN_STREAM, sample_id))
    return np.broadcast_to(values, (CHANNELS, *size)).astype(np.float32, order="C")


def warp_grid(spec: TriggerSpec, size: tuple[int, int], sample_id: int | None) -> np.ndarray:
    """Sampling grid of WaNet at k = H (arXiv 2102.10369): jitter of each pixel by itself.

    u ~ U(-1, 1), u / mean|u|, grid = clamp(identity + u / H, -1, 1), so that a pixel moves by half
    a pixel on average and by one at most along each axis.

    Returns:
        [H, W, 2] fp32 (x, y) in [-1, 1], for ``grid_sample`` with align_corners=True.
    """
    flow = 2 * _uniform(stream(spec, PATTERN_STREAM, sample_id), (2, *size)) - 1
    flow /= math.fsum(np.abs(flow).ravel()) / flow.size
    height, width = size
    x = np.linspace(-1, 1, width) + flow[0] / width
    y = np.linspace(-1, 1, height)[:, None] + flow[1] / height
    return np.clip(np.stack([x, y], axis=-1), -1, 1).astype(np.float32, order="C")


def picture(
    spec: TriggerSpec, size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of a trigger that is read from a file.

    Args:
        spec: badclip, patch_file or blend_file.
        size: (h, w) to resize to; None keeps the file's own.
    Returns:
        pattern: [3, h, w] fp32 in [0, 1].
        mask: [1, h, w] fp32 in [0, 1], alpha times mask image; None if all is selected.
    Raises:
        FileNotFoundError: a file is gone.
        ValueError: a file changed or is no readable 8-bit PNG.
    """
    rgb, alpha = read_png(spec.file, spec.file_sha256, "file")
    rgb, alpha = resize(rgb, alpha, size or rgb.shape[:2])
    mask = alpha / 255.0
    if spec.mask_file is not None:
        selected, opaque = read_png(spec.mask_file, spec.mask_sha256, "mask_file")
        selected, opaque = resize(selected, opaque, rgb.shape[:2])
        mask = mask * (luminance(selected) / 255.0) * (opaque / 255.0)
    planes = luminance(rgb)[None] if spec.grey else rgb.transpose(2, 0, 1)
    values = np.empty((CHANNELS, *rgb.shape[:2]), np.float32)
    np.divide(planes, np.float32(255), out=values)
    return values, None if np.all(mask == 1) else mask.astype(np.float32)[None]


def picture_size(spec: TriggerSpec) -> tuple[int, int]:
    """(h, w) in pixels of the trigger's own file."""
    return read_png(spec.file, spec.file_sha256, "file")[0].shape[:2]


def text_mask(size: tuple[int, int]) -> np.ndarray:
    """Ink of the rendered word at ``size``: [H, W] fp64 in [0, 1], in steps of 1/255."""
    rendered = _rendered_text()
    rows, cols = (_area_weights(n, out) for n, out in zip(rendered.shape, size, strict=True))
    ink = np.rint(rows @ rendered @ cols.T) / 255
    return np.where(ink < MIN_INK, 0, ink)


@functools.cache
def _rendered_text() -> np.ndarray:
    from PIL import Image

    with Image.open(Path(__file__).with_name("assets") / "text.png") as image:
        return np.asarray(image, dtype=np.float64)


def _area_weights(count: int, out: int) -> np.ndarray:
    """[out, count]: the share of each input cell in each output cell; rows sum to 1."""
    edges = np.arange(out + 1) * (count / out)
    cells = np.arange(count)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.clip(overlap, 0, None) * (out / count)

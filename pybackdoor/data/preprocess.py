"""CLIP's resize and crop with Pillow, byte for byte what open_clip's validation transform does.

Torch's bicubic is 1 to 2 levels off Pillow's, so Pillow alone resizes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's own bound on an image before it warns of a bomb
LARGEST_FILE = 1 << 28  # bytes of an image file that is read whole
RESIZE_MODES = ("shortest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


class BrokenImage(ValueError):
    """An image that cannot be used; the message is the reason, without the path."""


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the pixels the model sees, before normalisation.

    Attributes:
        image_size: (height, width) in pixels; one integer means a square.
        resize_mode: "shortest" resizes the shortest side and crops the centre (CLIP);
            "squash" resizes both sides, without regard to the aspect ratio.
        interpolation: "bicubic" (CLIP) or "bilinear"; both antialiased.
    Raises:
        TypeError, ValueError: naming the argument.
    """

    image_size: tuple[int, int]
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", size_pair(self.image_size))
        for name, allowed in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[H, W, 3] uint8 pixels of an image of 8-bit samples.

        Modes are converted to RGB after the resize, as CLIP does: palettes resize by nearest
        neighbour, transparency is dropped.

        Raises:
            BrokenImage: a side ratio so large that resizing needs more than MAX_PIXELS.
        """
        from PIL import Image

        height, width = self.image_size
        size, (left, top) = self.placement(image.width, image.height)
        image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        if size != (width, height):
            image = image.crop((left, top, left + width, top + height))
        if image.mode == "P":
            image.info.pop("transparency", None)  # convert() warns about it and drops it anyway
        return np.array(image.convert("RGB"))

    def placement(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) after the resize of an image, and (left, top) of the crop from it.

        Raises:
            BrokenImage: the resize needs more than MAX_PIXELS.
        """
        target_h, target_w = self.image_size
        if self.resize_mode == "squash":
            return (target_w, target_h), (0, 0)
        new_w, new_h = self._shortest(width, height)
        if new_w * new_h > MAX_PIXELS:
            raise BrokenImage(
                f"{width}x{height} pixels become {new_w}x{new_h} when resized, "
                f"more than {MAX_PIXELS} in all"
            )
        return (new_w, new_h), (round((new_w - target_w) / 2), round((new_h - target_h) / 2))

    def _shortest(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the resize; both rules are open_clip's, square and not."""
        target_h, target_w = self.image_size
        if target_h == target_w:
            if width <= height:
                return target_w, target_w * height // width
            return target_h * width // height, target_h
        ratio = min(height / target_h, width / target_w)
        return round(width / ratio), round(height / ratio)


def size_pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one integer or two.

    Raises:
        TypeError, ValueError: not one or two positive integers, or more than MAX_PIXELS.
    """
    pair = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    whole = (int, np.integer)
    if len(pair) != 2 or not all(isinstance(s, whole) and not isinstance(s, bool) for s in pair):
        raise TypeError(f"image_size must be an integer or (height, width), got {image_size!r}")
    height, width = (int(s) for s in pair)
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(
            f"image_size must have positive sides and at most {MAX_PIXELS} pixels, "
            f"got {image_size!r}"
        )
    return height, width

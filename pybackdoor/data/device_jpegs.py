"""JPEGs decoded and resized on a GPU, by nvJPEG through torchvision; other files are Pillow's.

Both steps round otherwise than Pillow, by a few levels. So this is only done where it is asked for,
and the image cache keeps what the two decoders made apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .preprocess import MAX_PIXELS, Preprocessing

_AT_ONCE = 1 << 26  # pixels decoded at once: 0.2 GB as bytes
_RGB_IDS = (ord("R"), ord("G"), ord("B"))


class DeviceJpegs:
    """Decodes those of many files that are plain JPEGs.

    Plain are grey and YCbCr JPEGs that end as such; CMYK, RGB ones, cut files and whatever fails
    are left to Pillow, which says what is wrong with them.

    Args:
        op: function named in errors.
        preprocessing: from a file to its pixels.
        device: GPU that decodes.
    Raises:
        ValueError: torchvision cannot decode there.
    """

    def __init__(self, op: str, preprocessing: Preprocessing, device: torch.device) -> None:
        self._preprocessing, self._device = preprocessing, device
        try:
            with self._aside():
                self._decode([_smallest()])
        except (ImportError, RuntimeError, AssertionError) as error:  # the last: no CUDA in torch
            raise ValueError(
                f"{op}: JPEGs cannot be decoded on {device}, which takes torchvision with nvJPEG "
                f'({" ".join(str(error).split())[:200]}): choose decode="cpu"'
            ) from error

    def __call__(self, contents: Mapping[int, bytes]) -> dict[int, np.ndarray]:
        """{key: [H, W, 3] uint8 pixels} of the files that could be decoded, in any order."""
        pixels = {key: self._pixels(content) for key, content in contents.items()}
        done: dict[int, np.ndarray] = {}
        for keys in _groups({key: n for key, n in pixels.items() if n}):
            with self._aside():
                decoded = self._halving([contents[key] for key in keys])
                found = {
                    key: image
                    for key, image in zip(keys, decoded, strict=True)
                    if image is not None
                }
                if found:
                    resized = torch.stack([self._resized(image) for image in found.values()])
                    done |= zip(found, resized.cpu().numpy(), strict=True)
        return done

    def _pixels(self, content: bytes) -> int:
        """Of a plain JPEG; 0 for every other file."""
        from PIL import Image

        if not content.rstrip(b"\0").endswith(b"\xff\xd9"):  # a decoder fills in what is missing
            return 0
        try:
            with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                # Without a marker that says so, libjpeg takes the names of the components for it.
                names = tuple(layer[0] for layer in image.layer)
                rgb = image.info.get("adobe_transform") == 0 or names == _RGB_IDS
                count = image.width * image.height
                self._preprocessing.placement(image.width, image.height)
        except Exception:  # Pillow's readers raise nearly every type on hostile bytes
            return 0
        return count if image.mode in ("L", "RGB") and not rgb and count <= MAX_PIXELS else 0

    def _halving(self, contents: list[bytes]) -> list[Tensor | None]:
        """The images; None for those that fail, which would fail all of a call."""
        try:
            return [*self._decode(contents)]
        except RuntimeError:
            half = len(contents) // 2
            if not half:
                return [None]
            return self._halving(contents[:half]) + self._halving(contents[half:])

    def _decode(self, contents: Sequence[bytes]) -> list[Tensor]:
        """[3, h, w] uint8 each."""
        from torchvision.io import ImageReadMode, decode_jpeg

        files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        return decode_jpeg(files, mode=ImageReadMode.RGB, device=self._device)

    def _resized(self, image: Tensor) -> Tensor:  # [3, h, w] uint8
        """[H, W, 3] uint8."""
        height, width = self._preprocessing.image_size
        _, h, w = image.shape
        (new_w, new_h), (left, top) = self._preprocessing.placement(w, h)
        if (new_w, new_h) != (w, h):
            how = self._preprocessing.interpolation
            exact = interpolate(image[None].float(), (new_h, new_w), mode=how, antialias=True)
            image = exact[0].round_().clamp_(0, 255).to(torch.uint8)
        return image[:, top : top + height, left : left + width].permute(1, 2, 0)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of its own, so that no image waits for the training that is queued."""
        if self._device.type != "cuda":
            yield
            return
        # A new thread's device is the first GPU, and leaving a stream of another would open a
        # context there.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            yield


def _groups(pixels: Mapping[int, int]) -> Iterator[list[int]]:
    """Keys of images that are decoded at once."""
    group: list[int] = []
    held = 0
    for key, count in pixels.items():
        if group and held + count > _AT_ONCE:
            yield group
            group, held = [], 0
        group.append(key)
        held += count
    if group:
        yield group


def _smallest() -> bytes:
    """A JPEG to try a decoder on."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()

"""Reading one image file that nobody vouches for."""

from __future__ import annotations

import errno
import functools
import io
import os
import stat
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from .preprocess import MAX_PIXELS, BrokenImage, Preprocessing

# No EPS or WMF (they run a converter) and nothing that photographs do not come in.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# What names of image files end in.
EXTENSIONS = frozenset(
    {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif"}
)

# Not the file's fault: the run must stop, not the image be skipped.
_OUR_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def decode_image(path: str, preprocessing: Preprocessing) -> np.ndarray:
    """Decode a file and bring it to size.

    The first frame of an animation is taken. EXIF orientation and colour profiles are ignored,
    as by CLIP's own transform. 16-bit grey is scaled to 8 bits (v * 255 / 65535, rounded).

    Args:
        path: of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF file.
        preprocessing: size and resize.
    Returns:
        [H, W, 3] uint8.
    Raises:
        BrokenImage: missing, empty, cut short, not an image, too large, or of samples whose
            range is unknown; a cut file is refused whatever LOAD_TRUNCATED_IMAGES says.
    """
    _, reason = inspect_file(path)
    if reason:
        raise BrokenImage(reason)
    return _decoded(lambda: open(path, "rb"), preprocessing)


def decode_bytes(content: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Decode a file's content, as `decode_image` does a file."""
    if not content:
        raise BrokenImage("zero bytes")
    return _decoded(lambda: io.BytesIO(content), preprocessing)


def _decoded(opened: Callable[[], BinaryIO], preprocessing: Preprocessing) -> np.ndarray:
    while True:
        with _complete_files_only as strict:
            pixels = _decode(opened, preprocessing)
            if strict.held():
                return pixels


def inspect_file(path: str) -> tuple[os.stat_result | None, str | None]:
    """What the system knows of a file, and why it cannot be an image (None when it can)."""
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None, "no such file"
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        return None, _one_line(error)
    if not stat.S_ISREG(info.st_mode):
        return info, "not a regular file"
    if info.st_size == 0:
        return info, "zero bytes"
    return info, None if os.access(path, os.R_OK) else "permission denied"


def _decode(opened: Callable[[], BinaryIO], preprocessing: Preprocessing) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with opened() as file, Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(
                    f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}: "
                    "possibly a decompression bomb"
                )
            image.load()
            return preprocessing(_eight_bit(image))
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        with opened() as file:
            raise BrokenImage(f"not an image, starts with {file.read(16)!r}") from None
    except Exception as error:  # Pillow's readers raise nearly every type on hostile bytes
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _OUR_FAULT:
            raise
        raise BrokenImage(_one_line(error)) from error


def _eight_bit(image: Any) -> Any:
    """The image with 8-bit samples; other modes are returned as they are."""
    from PIL import Image

    # 16-bit PNG and PGM come as "I;16", or "I" from some Pillow versions; a TIFF in "I" holds
    # 32-bit or signed integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise BrokenImage(f"{kind} samples, whose range is unknown: save it with 8 or 16 bits")
    return image


@functools.cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _CompleteFilesOnly:
    """Holds Pillow's process-wide LOAD_TRUNCATED_IMAGES off while any thread decodes.

    With the flag on, Pillow fills the missing part of a cut file with grey. What was set before
    comes back when the last thread leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before = False

    def __enter__(self) -> _CompleteFilesOnly:
        from PIL import ImageFile

        with self._lock:
            if self._depth == 0:
                self._before = ImageFile.LOAD_TRUNCATED_IMAGES
            self._depth += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        return self

    def held(self) -> bool:
        """Whether nobody switched the flag back on meanwhile."""
        from PIL import ImageFile

        return not ImageFile.LOAD_TRUNCATED_IMAGES

    def __exit__(self, *exc: object) -> None:
        from PIL import ImageFile

        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_complete_files_only = _CompleteFilesOnly()

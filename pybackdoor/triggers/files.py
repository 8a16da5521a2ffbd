"""Pictures that the user gives as triggers: hashing, reading, resizing."""

from __future__ import annotations

import hashlib
import io
import os

import numpy as np

MAX_SIDE = 4096  # pixels; larger than any CLIP input, and small enough to decode at leisure
_BIT_DEPTH = 24  # offset of the bit depth in a PNG file: signature 8, IHDR head 8, width, height


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        FileNotFoundError: no such file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_png(path: str, sha256: str, argument: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an 8-bit PNG whose bytes have the recorded hash.

    Args:
        path: the file.
        sha256: hex digest recorded when the trigger was made.
        argument: "file" or "mask_file", for messages.
    Returns:
        rgb: [h, w, 3] uint8.
        alpha: [h, w] uint8; 255 throughout for a file without transparency.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file changed, or is no still 8-bit PNG of at most 4096 px a side.
    """
    from PIL import Image

    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"trigger: {argument} must be an existing PNG, got {path!r}; "
            f"for a file that moved use dataclasses.replace(spec, {argument}=...)"
        )
    with open(path, "rb") as file:
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"trigger: {argument} {path!r} changed since the trigger was made: "
            f"wanted sha256 {sha256}, got {found}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            flaw = _png_flaw(image, data)
            rgba = None if flaw else np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"trigger: {argument} must be a readable PNG, got {path!r} ({error})"
        ) from error
    if flaw:
        raise ValueError(f"trigger: {argument} must be {flaw} in {path!r}")
    return rgba[..., :3], rgba[..., 3]


def _png_flaw(image, data: bytes) -> str | None:
    """What a trigger file must be that this one isn't, and what it is; None if it will do."""
    if max(image.size) > MAX_SIDE:
        return f"at most {MAX_SIDE} px a side, got {image.size}"
    if getattr(image, "n_frames", 1) != 1:
        return f"a still picture, got {image.n_frames} frames"
    if data[_BIT_DEPTH] > 8:
        return f"an 8-bit PNG, got {data[_BIT_DEPTH]} bits"
    return None


def resize(
    rgb: np.ndarray,  # [h, w, 3] uint8
    alpha: np.ndarray,  # [h, w] uint8
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Bicubic resize of a picture to ``size`` = (height, width); colours weighted by alpha."""
    from PIL import Image

    if rgb.shape[:2] == size:
        return rgb, alpha
    picture = Image.fromarray(np.dstack([rgb, alpha]))
    rgba = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
    return rgba[..., :3], rgba[..., 3]


def luminance(rgb: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 to [h, w] uint8, ITU-R 601 weights as in Pillow's "L"."""
    from PIL import Image

    return np.asarray(Image.fromarray(rgb).convert("L"))

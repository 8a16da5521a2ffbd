"""Triggers from the user's files: pixels, resizing, changed and broken files."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pybackdoor.triggers import apply_trigger, bind, file_sha256, trigger

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)


def save_png(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return str(path)


@pytest.fixture
def square(tmp_path):
    """RGB 16 x 16 of random colours."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3))
    return save_png(tmp_path / "square.png", pixels)


def test_a_patch_file_lands_pixel_by_pixel_and_alpha_selects(tmp_path):
    pixels = np.random.default_rng(5).integers(0, 256, (6, 8, 4))
    pixels[..., 3] = 255
    pixels[0, :, 3] = 0
    path = save_png(tmp_path / "sticker.png", pixels)
    images = np.full((1, 32, 32, 3), 77, np.uint8)
    out = apply_trigger(images, trigger("patch_file", file=path, position=(20, 3)), [0])[0]
    expected = images[0].copy()
    expected[21:26, 3:11] = pixels[1:, :, :3]
    np.testing.assert_array_equal(out, expected)
    assert bind(trigger("patch_file", file=path, size=4), 32).window == (3, 4)


def test_badclip_is_16_px_in_the_centre_at_224(square):
    images = np.zeros((1, 224, 224, 3), np.uint8)
    out = apply_trigger(images, trigger("badclip", file=square), [0])[0]
    np.testing.assert_array_equal(out[104:120, 104:120], np.asarray(Image.open(square)))
    assert bind(trigger("badclip", file=square), 32).window == (5, 5)


def test_blend_file_mixes_where_the_mask_is_white(tmp_path):
    cover = save_png(tmp_path / "cover.png", np.full((64, 64, 3), (200, 100, 0)))
    mask = np.zeros((32, 32))
    mask[:, 16:] = 255
    mask = save_png(tmp_path / "mask.png", mask)
    spec = trigger("blend_file", file=cover, mask_file=mask, strength=0.5)
    images = np.full((1, 32, 32, 3), 100, np.uint8)
    out = apply_trigger(images, spec, [0])[0]
    assert (out[:, :16] == 100).all() and (out[:, 16:] == (150, 100, 50)).all()
    shifted = trigger("blend_file", file=cover, strength=0.5, grey=True)
    grey = int(0.299 * 200 + 0.587 * 100 + 0.5)
    assert (apply_trigger(images, shifted, [0]) == (grey + 100) // 2).all()


def test_a_clear_part_of_a_mask_or_a_soft_edge_mixes_by_its_share(tmp_path):
    cover = save_png(tmp_path / "cover.png", np.full((32, 32, 3), 200))
    mask = np.full((32, 32, 4), 255)
    mask[:16, :, 3], mask[16:, :16, :3] = 0, 51  # clear above, a fifth of white below left
    spec = trigger(
        "blend_file", file=cover, strength=1, mask_file=save_png(tmp_path / "m.png", mask)
    )
    out = apply_trigger(IMAGES, spec, [0, 1])
    assert (out[:, :16] == 0).all() and (out[:, 16:, :16] == 40).all()
    assert (out[:, 16:, 16:] == 200).all()


def test_files_are_resized_smoothly(tmp_path):
    ramp = np.repeat(np.arange(64)[None, :, None] * 4, 64, axis=0).repeat(3, axis=2)
    spec = trigger("blend_file", file=save_png(tmp_path / "ramp.png", ramp), strength=1)
    out = apply_trigger(IMAGES, spec, [0, 1])[0, :, 2:-2, 0]
    # Two columns average to 4 (2 j + 0.5); bicubic keeps a ramp, within rounding.
    assert np.abs(out - 4 * (2 * np.arange(2, 30) + 0.5)).max() <= 1


def test_palette_and_grey_files_are_read_as_colours(tmp_path):
    for mode in ("P", "L", "LA", "1"):
        path = str(tmp_path / f"{mode}.png")
        Image.new("L", (5, 5), 255).convert(mode).save(path)
        out = apply_trigger(IMAGES, trigger("patch_file", file=path, position=(0, 0)), [0, 1])
        assert (out[:, :5, :5] == 255).all()


def test_a_changed_moved_or_lost_file_is_an_error_at_use(tmp_path, square):
    spec = trigger("patch_file", file=square)
    assert spec.file_sha256 == file_sha256(square)
    moved = tmp_path / "moved.png"
    moved.write_bytes(Path(square).read_bytes())
    save_png(square, np.zeros((16, 16, 3)))
    with pytest.raises(ValueError, match="square.png' changed .*wanted sha256"):
        bind(spec, 32)
    assert bind(replace(spec, file=str(moved)), 32).window == (16, 16)
    moved.unlink()
    with pytest.raises(FileNotFoundError, match="file must be an existing PNG, got .*moved.png"):
        bind(replace(spec, file=str(moved)), 32)


def png_of_depth_16():
    """A 1 x 1 RGB PNG of 16 bits, which Pillow would silently cut to 8."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + b"\xff" * 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a readable PNG, got"),
        (b"<html>not found</html>", "a readable PNG, got"),
        (png_of_depth_16(), "an 8-bit PNG, got 16 bits"),
    ],
)
def test_a_broken_file_is_an_error_at_use(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file must be .*{message}.*bad.png"):
        bind(trigger("patch_file", file=path), 32)


def test_truncated_animated_foreign_and_huge_files_are_refused(tmp_path, square):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(square).read_bytes()[:-300])
    with pytest.raises(ValueError, match="readable PNG, got .*broken.png"):
        bind(trigger("patch_file", file=broken), 32)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="a still picture, got 2 frames"):
        bind(trigger("patch_file", file=tmp_path / "film.png"), 32)
    frames[0].save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="readable PNG, got .*photo.jpg"):
        bind(trigger("patch_file", file=tmp_path / "photo.jpg"), 32)
    Image.new("1", (4097, 2)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="at most 4096 px a side"):
        bind(trigger("blend_file", file=tmp_path / "wide.png"), 32)


def test_badclip_must_be_square(tmp_path):
    path = save_png(tmp_path / "wide.png", np.zeros((8, 9, 3)))
    with pytest.raises(ValueError, match="file of badclip must be square, got 8 x 9"):
        bind(trigger("badclip", file=path), 32)

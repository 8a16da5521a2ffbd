"""Decoding: CLIP's bytes for every mode, and nothing broken gets through."""

import io
import os
import threading
import zlib

import numpy as np
import pytest
from data_files import cut, noise, write_image
from PIL import Image, ImageFile

from pybackdoor.data import BrokenImage, Preprocessing, decode_image

transforms = pytest.importorskip("torchvision.transforms")

# (height, width): landscape, portrait, square, equal to the target, smaller than it, odd crop.
SIZES = [(60, 90), (90, 61), (70, 70), (32, 32), (9, 14), (33, 47), (47, 33)]
MODES = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"]


def clip_pixels(image: Image.Image, size, resize_mode, interpolation) -> np.ndarray:
    """open_clip's validation transform up to the tensor, on torchvision's own classes."""
    mode = transforms.InterpolationMode[interpolation.upper()]
    if resize_mode == "squash":
        steps = [transforms.Resize((size, size), mode)]
    else:
        steps = [transforms.Resize(size, mode), transforms.CenterCrop((size, size))]
    return np.array(transforms.Compose(steps)(image).convert("RGB"))


def image_of_mode(mode: str, height: int, width: int) -> Image.Image:
    image = Image.fromarray(noise(height, width, seed=height * width))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise(height, width, seed=1)[..., 0]))
    return image.convert(mode)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_torchvisions(mode, resize_mode, interpolation):
    for height, width in SIZES:
        image = image_of_mode(mode, height, width)
        wanted = clip_pixels(image, 32, resize_mode, interpolation)
        got = Preprocessing(32, resize_mode, interpolation)(image)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, wanted, err_msg=f"{height}x{width}")


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [32, (20, 32), (32, 20)])
def test_pixels_are_open_clips(size, resize_mode):
    open_clip = pytest.importorskip("open_clip")
    for height, width in SIZES:
        image = image_of_mode("RGB", height, width)
        transform = open_clip.image_transform(
            size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode
        )
        wanted = (transform(image) * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(Preprocessing(size, resize_mode)(image), wanted)


def test_palette_with_byte_transparency_keeps_its_colours(tmp_path):
    image = image_of_mode("P", 32, 32)
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with pytest.warns(UserWarning, match="Transparency"):
        wanted = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    np.testing.assert_array_equal(decode_image(str(tmp_path / "a.png"), Preprocessing(32)), wanted)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 129, 385], [386, 20000, 32768, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    # v * 255 / 65535 = v / 257, to nearest: 128 -> 0.498, 129 -> 0.502, 385 -> 1.498, 386 -> 1.502
    wanted = np.array([[0, 0, 1, 1], [2, 78, 128, 255]], np.uint8)
    got = decode_image(str(path), Preprocessing((2, 4), "squash"))
    np.testing.assert_array_equal(got, np.repeat(wanted[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_samples_of_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(BrokenImage, match="range is unknown"):
        decode_image(str(tmp_path / "a.tif"), Preprocessing(8))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (10, 200, 90)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(
        decode_image(str(path), Preprocessing(16)), np.full((16, 16, 3), 10, np.uint8)
    )


def test_exif_orientation_is_ignored_as_by_clip(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    plain = write_image(tmp_path / "plain.jpg", 32, 32)
    turned = write_image(tmp_path / "turned.jpg", 32, 32, exif=exif)
    np.testing.assert_array_equal(
        decode_image(str(turned), Preprocessing(32)), decode_image(str(plain), Preprocessing(32))
    )


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif", "ppm"])
def test_a_cut_file_is_refused_whatever_the_global_flag(tmp_path, monkeypatch, suffix, flag):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", flag)
    path = cut(write_image(tmp_path / f"cut.{suffix}", 240, 320), 0.7)
    if flag and suffix in ("jpg", "png", "bmp"):
        Image.open(path).load()  # Pillow itself now fills in grey
    with pytest.raises(BrokenImage):
        decode_image(str(path), Preprocessing(32))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is flag  # left as another library set it


def test_flag_set_while_decoding_does_not_fill_in_grey(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    path = cut(write_image(tmp_path / "cut.jpg", 240, 320), 0.7)
    opened = Image.open
    calls = []

    def other_library(*args, **kwargs):
        calls.append(1)
        ImageFile.LOAD_TRUNCATED_IMAGES = len(calls) == 1
        return opened(*args, **kwargs)

    monkeypatch.setattr(Image, "open", other_library)
    with pytest.raises(BrokenImage, match="truncated"):
        decode_image(str(path), Preprocessing(32))
    assert len(calls) == 2


def test_flag_survives_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = str(write_image(tmp_path / "a.jpg"))
    wanted = decode_image(path, Preprocessing(8))
    seen = []
    threads = [
        threading.Thread(
            target=lambda: seen.extend(decode_image(path, Preprocessing(8)) for _ in range(20))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80 and all(np.array_equal(s, wanted) for s in seen)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_reasons_of_what_is_no_image(tmp_path):
    def refused(content: bytes | None, match: str, name: str = "a.jpg") -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BrokenImage, match=match):
            decode_image(str(path), Preprocessing(8))

    refused(None, "no such file")
    refused(None, "no such file", "a.jpg\n/b.jpg")
    refused(b"", "zero bytes")
    refused(b"<!DOCTYPE html><html>", "not an image, starts with b'<!DOCTYPE html><'")
    refused(b"version https://git-lfs", "not an image, starts with b'version https://'")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image")  # never run
    (tmp_path / "folder.jpg").mkdir()
    refused(None, "not a regular file", "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    refused(None, "not a regular file", "pipe.jpg")
    with pytest.raises(BrokenImage, match="null"):
        decode_image("a\0b.jpg", Preprocessing(8))
    with pytest.raises(BrokenImage, match="too long"):
        decode_image(str(tmp_path / ("x" * 300)), Preprocessing(8))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read anything
    with pytest.raises(BrokenImage, match="permission denied"):
        decode_image(str(path), Preprocessing(8))


def test_damaged_png_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # would skip the checksum
    path = write_image(tmp_path / "a.png", 40, 40)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(BrokenImage):
        decode_image(str(path), Preprocessing(8))


def png_header(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("pillow_limit", [None, Image.MAX_IMAGE_PIXELS])
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, pillow_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 10_000))
    with pytest.raises(BrokenImage, match="bomb"):
        decode_image(str(tmp_path / "bomb.png"), Preprocessing(8))


def test_ribbon_that_the_resize_would_blow_up_is_refused(tmp_path):
    Image.new("L", (1, 50_000)).save(tmp_path / "ribbon.png")
    with pytest.raises(BrokenImage, match="224x11200000"):
        decode_image(str(tmp_path / "ribbon.png"), Preprocessing(224))
    assert decode_image(str(tmp_path / "ribbon.png"), Preprocessing(224, "squash")).max() == 0


def test_too_many_open_files_is_not_the_images_fault(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png")

    def none_left(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", none_left)
    with pytest.raises(OSError, match="Too many open files"):
        decode_image(str(path), Preprocessing(8))


def test_preprocessing_arguments():
    assert Preprocessing(np.int64(7)).image_size == (7, 7)
    assert Preprocessing([7, 9]).image_size == (7, 9)
    for bad in (1.5, True, "32", (1, 2, 3), (8, None)):
        with pytest.raises(TypeError, match="image_size must be"):
            Preprocessing(bad)
    for bad in (0, -3, (5, 0), 10_000):
        with pytest.raises(ValueError, match="image_size must have"):
            Preprocessing(bad)
    with pytest.raises(ValueError, match="resize_mode must be one of .* got 'longest'"):
        Preprocessing(8, "longest")
    with pytest.raises(ValueError, match="interpolation must be one of .* got 'random'"):
        Preprocessing(8, "squash", "random")

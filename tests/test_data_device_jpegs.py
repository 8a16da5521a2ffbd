"""JPEGs that a GPU decodes: near Pillow's pixels, and every other file is Pillow's.

On a CPU torchvision's own decoder stands in for nvJPEG; the code around it is one.
"""

import io

import numpy as np
import pytest
import torch
import torchvision.io
from data_files import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import write_shard

from pybackdoor.cli import inputs
from pybackdoor.cli.configs import PairOptions
from pybackdoor.data import device_jpegs, indexed, pairs_from_csv, pairs_from_shards
from pybackdoor.data.decode import decode_bytes
from pybackdoor.data.device_jpegs import DeviceJpegs
from pybackdoor.data.preprocess import Preprocessing

CPU = torch.device("cpu")
RESIZED = 4  # levels that a pixel is off by at most: Pillow rounds and clips between two passes


def file(image, kind="JPEG", **save) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **save)
    return held.getvalue()


def photo(seed=0, height=40, width=56, mode="RGB", **save) -> bytes:
    return file(Image.fromarray(noise(height, width, seed)).convert(mode), **save)


def worst(mine, theirs) -> int:
    return int(np.abs(mine.astype(int) - theirs.astype(int)).max())


@settings(max_examples=60)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    # torch's antialiased resize is wrong by itself where a side becomes 1
    size=st.one_of(st.integers(2, 40), st.tuples(st.integers(2, 40), st.integers(2, 40))),
    resize_mode=st.sampled_from(["shortest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    mode=st.sampled_from(["RGB", "L"]),
    progressive=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pixels_are_pillows_but_for_rounding(
    height, width, size, resize_mode, interpolation, mode, progressive, seed
):
    size = (size, size) if isinstance(size, int) else size
    preprocessing = Preprocessing(size, resize_mode, interpolation)
    content = photo(seed, height, width, mode, progressive=progressive, quality=95)
    found = DeviceJpegs("op", preprocessing, CPU)({7: content})
    expected = decode_bytes(content, preprocessing)
    assert list(found) == [7] and found[7].shape == expected.shape
    assert found[7].dtype == np.uint8
    assert worst(found[7], expected) <= RESIZED


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_not_darker_or_brighter_than_pillows(interpolation):
    preprocessing, content = Preprocessing(96, interpolation=interpolation), photo(0, 300, 400)
    found = DeviceJpegs("op", preprocessing, CPU)({0: content})[0].astype(int)
    difference = found - decode_bytes(content, preprocessing)
    assert abs(difference.mean()) < 0.05 and np.abs(difference).mean() < 0.3


def test_an_image_of_the_models_size_is_only_decoded():
    preprocessing, content = Preprocessing((40, 56)), photo()
    np.testing.assert_array_equal(
        DeviceJpegs("op", preprocessing, CPU)({0: content})[0], decode_bytes(content, preprocessing)
    )


def rgb_without_marker() -> bytes:
    """A JPEG whose components are called R, G and B, with no marker of JFIF's or Adobe's."""
    content = photo(keep_rgb=True)
    while (at := content.find(b"\xff\xee")) > 0:  # Adobe's
        content = content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4]) :]
    assert content[2:4] != b"\xff\xe0"
    return content


LEFT = {
    "png": lambda: file(Image.fromarray(noise(40, 56)), "PNG"),
    "cmyk": lambda: photo(mode="CMYK"),
    "rgb": lambda: photo(keep_rgb=True),
    "rgb by the components' names": rgb_without_marker,
    "cut": lambda: photo()[:-40],
    "cut, with a thumbnail that is whole": lambda: photo(exif=b"Exif\0\0" + photo())[:-40],
    "empty": lambda: b"",
    "no image": lambda: b"\xff\xd8\xff\xd9",
    "end alone": lambda: b"\xff\xd9",
    "html": lambda: b"<html>not found</html>",
    "a ribbon that the resize would blow up": lambda: photo(height=1, width=30000),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_no_plain_jpeg_is_left_to_pillow(kind, monkeypatch):
    decode = DeviceJpegs("op", Preprocessing(64), CPU)
    assert list(decode({0: photo(), 1: LEFT[kind](), 2: photo(2)})) == [0, 2]
    monkeypatch.setattr(decode, "_decode", lambda contents: pytest.fail("decoded"))
    assert decode({1: LEFT[kind]()}) == {}


def test_a_bomb_is_left_to_pillow(monkeypatch):
    decode = DeviceJpegs("op", Preprocessing(8), CPU)
    monkeypatch.setattr(device_jpegs, "MAX_PIXELS", 40 * 56)
    assert list(decode({0: photo(), 1: photo(width=57)})) == [0]


def test_zeros_behind_the_end_do_not_cut_a_file():
    assert 0 in DeviceJpegs("op", Preprocessing(8), CPU)({0: photo() + bytes(100)})


@pytest.mark.parametrize("bad", [set(), {0}, {4}, {1, 2}, set(range(5))])
def test_one_that_fails_does_not_take_the_others_with_it(monkeypatch, bad):
    files = {key: photo(key) for key in range(5)}
    refused = {files[key] for key in bad}
    one_by_one = torchvision.io.decode_jpeg

    def decode_jpeg(contents, **options):
        if any(bytes(content.numpy()) in refused for content in contents):
            raise RuntimeError("nvjpegDecodeBatched failed: 5")
        return one_by_one(contents, **options)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_jpeg)
    found = DeviceJpegs("op", Preprocessing(16), CPU)(files)
    assert sorted(found) == sorted(set(files) - bad)
    for key, pixels in found.items():
        assert worst(pixels, decode_bytes(files[key], Preprocessing(16))) <= RESIZED


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(device_jpegs, "_AT_ONCE", 3 * 40 * 56)
    decode, taken = DeviceJpegs("op", Preprocessing(8), CPU), []
    inner = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda files: taken.append(len(files)) or inner(files))
    large = photo(height=400)
    found = decode({0: photo(0), 1: photo(1), 2: large, 3: photo(3), 4: photo(4), 5: photo(5),
                    6: photo(6)})  # fmt: skip
    assert sorted(found) == list(range(7)) and taken == [2, 1, 3, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_that_cannot_is_named():
    with pytest.raises(ValueError, match=r'op: JPEGs cannot .* on cuda.*: choose decode="cpu"$'):
        DeviceJpegs("op", Preprocessing(8), torch.device("cuda"))


@pytest.fixture
def pretended(monkeypatch):
    """decode="device" finds a device, a CPU; the sizes of the batches it decodes are returned."""
    batches = []

    class Counting(DeviceJpegs):
        def __call__(self, contents):
            found = super().__call__(contents)
            batches.append(len(found))
            return found

    monkeypatch.setattr(indexed, "_gpu", lambda choice: CPU if choice == "device" else None)
    monkeypatch.setattr(indexed, "DeviceJpegs", Counting)
    return batches


def mixed(folder):
    """JPEGs in rows 0 to 4, a PNG in row 5, a cut JPEG in row 6."""
    members = []
    for row in range(7):
        content = LEFT["png"]() if row == 5 else photo(row)
        name = f"{row}.png" if row == 5 else f"{row}.jpg"
        members += [(name, content[:-40] if row == 6 else content)]
        members += [(f"{row}.txt", f"caption {row}".encode())]
    write_shard(folder / "s.tar", members)
    return folder / "s.tar"


def read(path, **options):
    options = {"decode": "device", "max_bad": 0.5, "cache_dir": path.parent / "cache", **options}
    return pairs_from_shards(path, image_size=16, **options)


@pytest.mark.parametrize("cache", ["disk", "ram", "none"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_source_takes_jpegs_from_the_device_and_the_rest_from_pillow(
    tmp_path, pretended, cache, workers
):
    path = mixed(tmp_path)
    pairs = read(path, cache=cache, num_workers=workers)
    rows = np.array([3, 6, 5, 0, 3])
    pixels, bad = pairs.images.attempt(rows)
    assert list(bad) == [1] and pretended == [2]
    assert len(pairs.ledger) == 1
    by_device = DeviceJpegs("op", Preprocessing(16), CPU)({row: photo(row) for row in (0, 3)})
    for place, row in ((0, 3), (3, 0), (4, 3)):
        np.testing.assert_array_equal(pixels[place], by_device[row])
    png = decode_bytes(LEFT["png"](), Preprocessing(16))
    np.testing.assert_array_equal(pixels[2], png)
    again, bad = pairs.images.attempt(rows)
    assert list(bad) == [1] and pretended == ([2, 2] if cache == "none" else [2, 0])
    np.testing.assert_array_equal(again[[0, 2, 3, 4]], pixels[[0, 2, 3, 4]])
    if cache == "disk":
        images = read(path, num_workers=workers).images  # another run
        np.testing.assert_array_equal(images.take([3]), by_device[3][None])
        assert pretended == [2, 0, 0]


def test_what_two_decoders_made_is_kept_apart(tmp_path, pretended):
    path = mixed(tmp_path)
    for choice in ("cpu", "device", "cpu"):
        pairs = read(path, decode=choice).decoded(progress=False)
        assert pairs.images.base._rows.kept().sum() == 6
        expected = decode_bytes(photo(1), Preprocessing(16))
        same = np.array_equal(pairs.images.take([1])[0], expected)
        assert same == (choice == "cpu")
    assert len(list((tmp_path / "cache").glob("*.px"))) == 2


def test_a_file_that_changes_meanwhile_is_read_again(tmp_path, pretended, monkeypatch):
    (tmp_path / "0.jpg").write_bytes(photo(0))
    (tmp_path / "pairs.csv").write_text("image,caption\n0.jpg,a dog\n")
    pairs = pairs_from_csv(
        tmp_path / "pairs.csv", image_size=16, decode="device", cache_dir=tmp_path / "cache"
    )
    decoded = DeviceJpegs.__call__

    def and_replaced(self, contents):
        found = decoded(self, contents)
        (tmp_path / "0.jpg").write_bytes(photo(1, height=41))
        return found

    monkeypatch.setattr(DeviceJpegs, "__call__", and_replaced)
    expected = decode_bytes(photo(1, height=41), Preprocessing(16))
    np.testing.assert_array_equal(pairs.images.take([0])[0], expected)


def test_without_a_gpu_pillow_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "DeviceJpegs", lambda *_: pytest.fail("a device decodes"))
    monkeypatch.setattr("pybackdoor.engine.pick_device", lambda device: CPU)
    images = read(mixed(tmp_path)).images
    np.testing.assert_array_equal(images.take([1])[0], decode_bytes(photo(1), Preprocessing(16)))


def test_an_unknown_decoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="pairs_from_shards: decode must be one of cpu, device"):
        read(mixed(tmp_path), decode="gpu")


def test_the_command_names_the_device_of_its_run(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from pybackdoor import data

    seen = {}
    monkeypatch.setattr(data, "pairs_from_shards", lambda source, **options: seen.update(options))
    monkeypatch.setattr(inputs, "pick_device", lambda name: torch.device(name))
    wanted = SimpleNamespace(size=16, resize_mode="shortest", interpolation="bicubic")
    loaded = SimpleNamespace(preprocess=wanted)

    class Options(PairOptions):
        cache_dir, progress, device = None, None, "cuda:1"

    inputs.read_pairs(Options(pairs="s.tar", decode="device"), loaded)
    assert seen["decode"] == torch.device("cuda:1") and seen["cache"] == "disk"
    inputs.read_pairs(Options(pairs="s.tar"), loaded)
    assert seen["decode"] == "cpu"


@pytest.mark.gpu
def test_nvjpeg_is_near_pillow():
    preprocessing = Preprocessing(224)
    files = {seed: photo(seed, 300 + 7 * seed, 400, "L" if seed == 3 else "RGB", quality=90)
             for seed in range(6)}  # fmt: skip
    found = DeviceJpegs("op", preprocessing, torch.device("cuda"))(files)
    assert sorted(found) == sorted(files)
    for seed, content in files.items():
        assert worst(found[seed], decode_bytes(content, preprocessing)) <= 8

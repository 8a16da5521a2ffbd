"""Tables of image files, indexed: opened without reading, each file looked at when it is wanted."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import cut, image_table, noise, write_image
from PIL import Image
from shard_files import image_bytes
from test_data_ondemand import decoded, epoch  # noqa: F401

from pybackdoor.data import files, pairs_from_csv, pairs_from_folder
from pybackdoor.data.preprocess import Preprocessing


def read(table, folder, **options):
    options = {"image_size": 8, "cache": "disk", "max_bad": 0.5, "num_workers": 2, **options}
    return pairs_from_csv(table, cache_dir=folder, **options)


def pixels(*seeds):
    return np.stack([Preprocessing(8)(Image.fromarray(noise(20, 24, seed))) for seed in seeds])


def test_images_on_demand(tmp_path, decoded):  # noqa: F811
    table = image_table(tmp_path, 6)
    for cache in ("disk", "ram", "none"):
        pairs = read(table, tmp_path / "cache", cache=cache)
        np.testing.assert_array_equal(pairs.images.take(range(6)), pixels(*range(6)))
        assert pairs.locations == [str(tmp_path / f"{i}.png") for i in range(6)]
    del decoded[:]
    read(table, tmp_path / "cache").images.take(range(6))
    assert not decoded


def test_table_is_read_once(tmp_path, monkeypatch):
    table = image_table(tmp_path, 3)
    reads = []
    rows = files.iter_rows
    monkeypatch.setattr(files, "iter_rows", lambda *a: reads.append(a) or rows(*a))
    for _ in range(2):
        assert len(read(table, tmp_path / "cache")) == 3
    assert len(reads) == 1
    table.write_text(table.read_text() + "0.png,once more\n")
    assert read(table, tmp_path / "cache").captions[3] == "once more"
    table.write_text("filepath\ttitle\n1.png\tone\n")
    assert read(table, tmp_path / "cache", image_key="filepath").captions == ["one"]
    assert read(table, tmp_path / "cache").captions == ["one"]


def test_changed_missing_and_cut_files(tmp_path, decoded):  # noqa: F811
    table = image_table(tmp_path, 6)
    pairs = read(table, tmp_path / "cache").decoded()
    write_image(tmp_path / "1.png", seed=77)
    os.utime(tmp_path / "2.png", ns=(0, 12345))
    (tmp_path / "3.png").unlink()
    cut(tmp_path / "4.png")
    del decoded[:]
    for again in (False, True):
        current = read(table, tmp_path / "cache") if again else pairs
        images, bad = current.images.attempt(range(6))
        assert set(bad) == {3, 4} and bad[3] == "no such file"
        np.testing.assert_array_equal(images[[0, 1, 2, 5]], pixels(0, 77, 2, 5))
    assert len(decoded) == 3  # 1, 2 and 4, whose fate the second reader knows
    assert {row for ids, _ in epoch(current, batch_size=3) for row in ids} == {0, 1, 2, 5}
    write_image(tmp_path / "4.png", seed=4)  # mended
    assert current.decoded().ids.tolist() == [0, 1, 2, 4, 5]  # noticed by who has it open
    again = read(table, tmp_path / "cache")
    np.testing.assert_array_equal(again.images.take([4]), pixels(4))
    assert [bad.row for bad in again.ledger.rows] == []


def test_rows_that_name_the_same_file_share_its_image(tmp_path, decoded):  # noqa: F811
    table = image_table(tmp_path, 3)
    table.write_text("image,caption\n1.png,a\n0.png,b\n1.png,c\n2.png,d\n2.png,e\n1.png,f\n")
    cut(tmp_path / "2.png")
    pairs = read(table, tmp_path / "cache")
    assert pairs.captions == list("abcdef")
    np.testing.assert_array_equal(pairs.images.take([0, 1, 2, 5]), pixels(1, 0, 1, 1))
    assert len(decoded) == 2
    (data,) = (tmp_path / "cache").glob("*.px")
    assert data.stat().st_size == 3 * 192
    assert pairs.decoded().captions == list("abcf")
    assert [bad.row for bad in pairs.ledger.rows] == [3, 4]  # both rows of the broken file
    with pytest.raises(ValueError, match="at least 2 of 6 rows"):
        read(table, tmp_path / "cache", max_bad=0.2)


def test_bad_rows_of_the_table(tmp_path):
    table = image_table(tmp_path, 2)
    table.write_text(table.read_text() + ",none\n0.png,\n0.png,a,b\n1.png,last\n")
    pairs = read(table, tmp_path / "cache", max_bad=0.7)
    assert pairs.ids.tolist() == [0, 1, 5] and pairs.captions[2] == "last"
    lines = [json.loads(line) for line in pairs.ledger.path.read_text().splitlines()]
    assert [line["reason"] for line in lines] == [
        "empty image", "empty caption", "line 6 has 3 fields, the header 2",
    ]  # fmt: skip


def test_too_large_a_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_FILE", 10)
    pairs = read(image_table(tmp_path, 2), tmp_path / "cache", max_bad=1.0)
    assert all("more than 10" in reason for reason in pairs.images.attempt([0, 1])[1].values())


JPEG = image_bytes(0, "JPEG", 64, 64)
BAD = {  # kind -> the file's content, None for no file; and the reason
    "missing": (None, "no such file"),
    "empty": (b"", "zero bytes"),
    "cut": (JPEG[: 2 * len(JPEG) // 3], "OSError: image file is truncated"),
    "other": (b"<!DOCTYPE html>", "not an image, starts with b'<!DOCTYPE html>'"),
    "mute": (JPEG, "empty caption"),
}


def world(root, kinds, bad):
    """1,000 good images and bad ones in two class folders, and a table of them."""
    rows = ["image,caption"]
    names = [f"good{i}" for i in range(1000)] + [f"{kinds[i % len(kinds)]}{i}" for i in range(bad)]
    for i, name in enumerate(names):
        kind = name.rstrip("0123456789")
        path = root / "ab"[i % 2] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = JPEG if kind == "good" else BAD[kind][0]
        if content is None:
            path.symlink_to(root / "nowhere")  # the only missing file that a folder can hold
        else:
            path.write_bytes(content)
        rows.append(f"{path.relative_to(root)},{'' if kind == 'mute' else 'x'}")
    (root / "pairs.csv").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize("source", ["table", "folder"])
def test_bad_inputs_cost_no_more_than_a_millisecond(tmp_path, source):
    """1,000 bad ones among 1,000 good, against the good alone."""
    kinds = [kind for kind in BAD if source == "table" or kind != "mute"]

    def seconds(bad):
        root = world(tmp_path / str(bad), kinds, bad)
        options = {"image_size": 8, "max_bad": 0.5, "cache_dir": tmp_path / "cache"}
        start = time.process_time()
        if source == "table":
            good = pairs_from_csv(root / "pairs.csv", **options).decoded(progress=False)
        else:
            good = pairs_from_folder(root, templates="simple", progress=False, **options)
        return time.process_time() - start, good

    Image.init()
    base, _ = seconds(0)
    both, kept = seconds(1000)
    assert len(kept) == 1000 and all("/good" in place for place in kept.locations)
    told = [json.loads(line) for line in kept.ledger.path.read_text().splitlines()]
    found = Counter()
    for line in told:
        kind = Path(line["location"]).stem.rstrip("0123456789")
        assert line["reason"].startswith(BAD[kind][1]), line
        found[kind] += 1
    assert found == dict.fromkeys(kinds, 1000 // len(kinds)) and len(kept.ledger) == 1000
    assert both - base < 1.0  # 1 ms each

"""Pairs from tar shards: what is good is used, what is bad is in the ledger with its reason."""

import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import noise
from PIL import Image
from shard_files import archive, entry, image_bytes, patched, sample, samples, write_shard

from pybackdoor.data import pairs_from_shards
from pybackdoor.data.preprocess import Preprocessing
from pybackdoor.data.remote import LocalFile
from pybackdoor.data.shards import read_shard


def read(source, folder, **options):
    return pairs_from_shards(source, **{"image_size": 8, "cache_dir": folder, **options})


def pixels(seed, size=8):
    return Preprocessing(size)(Image.fromarray(noise(20, 24, seed)))


def reasons(pairs):
    return [(bad.row, bad.location.rpartition("#")[2], bad.reason) for bad in pairs.ledger.rows]


def read_members(tmp_path, members, **options):
    shard = write_shard(tmp_path / "s.tar", members, options.pop("kind", "ustar"))
    return read(shard, tmp_path / "cache", **{"max_bad": 0.9, **options})


def test_samples_of_several_shards(tmp_path):
    write_shard(tmp_path / "00000.tar", samples(3))
    write_shard(tmp_path / "00001.tar", samples(2, first=3))
    for _ in range(2):  # indexed, then opened
        pairs = read(tmp_path / "{00000..00001}.tar", tmp_path / "cache")
        assert pairs.captions == [f"caption {i}" for i in range(5)]
        assert pairs.ids.tolist() == list(range(5)) and not pairs.ledger.rows
        assert pairs.locations[3] == f"{tmp_path}/00001.tar#00003.png"
        np.testing.assert_array_equal(
            pairs.images.take([4, 0, 4]), np.stack([pixels(i) for i in (4, 0, 4)])
        )
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1


def test_names_of_shards(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b.tar", "odd{1}.tar"):
        write_shard(tmp_path / name, samples(1))
    sources = {
        tmp_path: 4, f"{tmp_path}/*.tar": 4, f"{tmp_path}/a-{{0,1}}.tar": 2,
        tmp_path / "a-{0..1}.tar": 2, tmp_path / "odd{1}.tar": 1, f"{tmp_path}/a-[0-9].tar": 2,
    }  # fmt: skip
    for source, count in sources.items():
        assert len(read(source, tmp_path / "cache")) == count, source
    several = [tmp_path / "b.tar", f"{tmp_path}/a-{{0..1}}.tar"]
    locations = [Path(where).name for where in read(several, tmp_path / "cache").locations]
    assert locations == ["b.tar#00000.png", "a-0.tar#00000.png", "a-1.tar#00000.png"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("plain.tar", ["plain.tar"]), ("{x}.tar", ["{x}.tar"]),
    ],
)  # fmt: skip
def test_brace_patterns(pattern, names):
    from pybackdoor.data.names import braces

    assert list(braces(pattern)) == names


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("pipe:cat x.tar", ValueError, "pipe: runs a command"),
        ("x.tar.gz", ValueError, r"uncompressed \.tar files, got .*x.tar.gz"),
        ("none-*.tar", ValueError, "no file matches"),
        ([], ValueError, "at least one file"),
        ("missing.tar", FileNotFoundError, "missing.tar"),
    ],
)
def test_sources_that_are_refused(tmp_path, monkeypatch, source, error, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        read(source, tmp_path / "cache")


def test_captions_of_img2dataset_and_others(tmp_path):
    def json_of(caption):
        return json.dumps({"caption": caption, "sha256": "0"}).encode()

    members = [
        ("0.jpg", image_bytes(0, "JPEG")), ("0.json", json_of("no")), ("0.txt", b"txt first"),
        ("1.json", json_of("json alone")), ("1.JPG", image_bytes(1, "JPEG")),
        ("2.caption", "Übergröße ☃".encode()), ("2.webp", image_bytes(2, "WEBP")),
        ("./d/3.png", image_bytes(3)), ("./d/3.txt", b"in a folder"), ("d/3.cls", b"7"),
        ("4.seg.png", image_bytes(9)), ("4.png", image_bytes(4)), ("4.txt", b"seg is skipped"),
        ("5.png", image_bytes(5)), ("5.jpg", image_bytes(9)), ("5.txt", b"first image"),
        ("__meta__.json", b"{}"), ("README", b"x"),
    ]  # fmt: skip
    pairs = read_members(tmp_path, members)
    assert pairs.captions == [
        "txt first", "json alone", "Übergröße ☃", "in a folder", "seg is skipped", "first image",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        pairs.images.take([3, 4, 5]), np.stack([pixels(i) for i in (3, 4, 5)])
    )
    assert not pairs.ledger.rows
    assert pairs.ledger.skipped == {
        "cls": 1, "seg.png": 1, "jpg": 1, "json": 1, "no extension": 1,
    }  # fmt: skip


BAD = [
    ([("b.png", image_bytes())], "it has no caption"),
    ([("b.txt", b"x")], "it has no image"),
    ([("b.png", b""), ("b.txt", b"x")], "its image has zero bytes"),
    ([("b.png", image_bytes()), ("b.txt", b"")], "its .txt holds an empty caption"),
    ([("b.png", image_bytes()), ("b.txt", b" \n")], "its .txt holds an empty caption"),
    ([("b.png", image_bytes()), ("b.txt", b"\xff")], "its .txt is not UTF-8"),
    ([("b.png", image_bytes()), ("b.txt", b"x" * (1 << 20) + b"x")], "its .txt has 1048577 bytes"),
    ([("b.png", image_bytes()), ("b.json", b"{")], "its .json cannot be read: JSONDecodeError"),
    ([("b.png", image_bytes()), ("b.json", b"[" * 99999)], "its .json cannot be read: Recur"),
    ([("b.png", image_bytes()), ("b.json", b'{"caption": 9' + b"9" * 9999 + b"}")], "ValueError"),
    ([("b.png", image_bytes()), ("b.json", b'{"caption": 3}')], '"caption" of its .json is a int'),
    ([("b.png", image_bytes()), ("b.json", b'{"caption": "\\ud800"}')], "its .json is not UTF-8"),
    ([("b.png", image_bytes()), ("b.json", b"[1]")], "it has no caption"),
    (sample("00000"), "its key occurs twice in the shard"),
    ([*sample("b"), ("b.txt", b"other")], "a second member of the same name"),
    ([("../b.png", b"x")], "its name leaves the folder"),
    ([("d/../../b.png", b"x")], "its name leaves the folder"),
    ([("/etc/b.png", b"x")], "its name is an absolute path"),
    ([("C:\\b.png", b"x")], "its name is an absolute path"),
    ([entry("b.png", tarfile.SYMTYPE, "/etc/passwd"), ("b.txt", b"x")], ".png: symbolic link"),
    ([entry("dev", tarfile.CHRTYPE)], "character device"),
]


@pytest.mark.parametrize(("members", "reason"), BAD)
def test_bad_samples_are_left_out_with_their_reason(tmp_path, members, reason):
    pairs = read_members(tmp_path, [*samples(2), *members, *samples(2, first=5)])
    assert pairs.captions[:2] == ["caption 0", "caption 1"]
    assert pairs.captions[-2:] == ["caption 5", "caption 6"]
    ((row, _, got),) = reasons(pairs)
    assert reason in got and row == (3 if len(members) == 3 else 2)
    lines = [json.loads(line) for line in pairs.ledger.path.read_text().splitlines()]
    assert [line["reason"] for line in lines] == [got]
    assert len(pairs.ids) == len(set(pairs.ids.tolist()) - {row})


def test_shard_cut_in_half_keeps_the_samples_before_the_cut(tmp_path):
    shard = write_shard(tmp_path / "s.tar", samples(20))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    other = write_shard(tmp_path / "t.tar", samples(5, first=90))
    pairs = read([shard, other], tmp_path / "cache", max_bad=0.2)
    kept = len(pairs) - 5
    assert 8 <= kept <= 11 and 1 <= len(pairs.ledger) <= 2
    assert {row for row, _, _ in reasons(pairs)} <= {kept, kept + 1}
    assert any("cut" in reason for _, _, reason in reasons(pairs))
    pairs.images.take(range(len(pairs)))
    assert pairs.captions[kept:] == [f"caption {i}" for i in range(90, 95)]


def test_shard_cut_anywhere(tmp_path):
    content = archive(samples(3))
    whole = -(-len(content.rstrip(b"\0")) // 512) * 512  # without the end mark
    for end in [*range(0, whole, 256), whole]:
        (tmp_path / "s.tar").write_bytes(content[:end])
        found = read_shard(LocalFile(str(tmp_path / "s.tar")), "s")
        assert found.captions == [f"caption {i}" for i in range(len(found.captions))]
        assert found.rows == list(range(len(found.rows)))
        assert 1 <= len(found.bad) <= 2 and len(found.rows) + len(found.bad) == found.count
        assert all(o + n <= end for o, n in zip(found.offsets, found.sizes, strict=True))
    assert len(found.captions) == 3 and "no end mark" in found.bad[0][2]


@pytest.mark.parametrize(
    ("place", "field", "fix"), [(0, b"x", False), (124, b"77777777777", True), (124, b"9", True)]
)
def test_damaged_headers_cost_their_sample(tmp_path, place, field, fix):
    content = archive(samples(6))
    at = content.index(b"00002.png")
    shard = tmp_path / "s.tar"
    shard.write_bytes(patched(content, at, place, field, fix))
    pairs = read(shard, tmp_path / "cache", max_bad=0.5)
    assert pairs.captions == [f"caption {i}" for i in (0, 1, 3, 4, 5)]
    assert 1 <= len(pairs.ledger) <= 2  # the header, and what is left of its sample


def test_max_bad(tmp_path):
    members = [*samples(3), ("b.txt", b"x")]
    assert len(read_members(tmp_path, members, max_bad=0.25)) == 3
    match = r"1 of 4 rows cannot be used, and max_bad=0.2 .*#b\): it has no image. Ledger: .*jsonl"
    with pytest.raises(ValueError, match=match):
        read_members(tmp_path, members, max_bad=0.2)
    with pytest.raises(ValueError, match="has no usable rows"):
        read_members(tmp_path, [("b.txt", b"x")], max_bad=1.0)


def test_bad_rows_cost_no_more_than_a_millisecond(tmp_path):
    """1,000 bad samples among 1,000 good, against the good alone."""

    def seconds(members, name):
        shard = write_shard(tmp_path / name, members)
        start = time.process_time()
        pairs = read(shard, tmp_path / "cache", max_bad=0.6)
        good = pairs.decoded(progress=False)
        return time.process_time() - start, good, pairs.ledger

    image = image_bytes(0)
    good = [m for i in range(1000) for m in ((f"g{i}.png", image), (f"g{i}.txt", b"x"))]
    kinds = [
        lambda k: [(f"{k}.png", image)],
        lambda k: [(f"{k}.png", b""), (f"{k}.txt", b"x")],
        lambda k: [(f"{k}.png", image[: len(image) // 3]), (f"{k}.txt", b"x")],
        lambda k: [(f"../{k}.png", image)],
        lambda k: [(f"{k}.png", b"<!DOCTYPE html>"), (f"{k}.txt", b"x")],
    ]
    bad = [m for i in range(1000) for m in kinds[i % 5](f"b{i}")]
    base, _, _ = seconds(good, "good.tar")
    both, kept, ledger = seconds(good + bad, "both.tar")
    assert len(kept) == 1000 and len(ledger) == 1000
    assert both - base < 1.0  # 1 ms each


@pytest.mark.parametrize("change", ["content", "options", "other"])
def test_changed_shards_are_indexed_again(tmp_path, change):
    shard = write_shard(tmp_path / "s.tar", samples(3))
    before = read(shard, tmp_path / "cache")
    old = before.images.take([0, 1, 2])
    if change == "content":
        write_shard(shard, samples(3, first=10))
        after = read(shard, tmp_path / "cache")
        assert after.captions[0] == "caption 10"
        np.testing.assert_array_equal(after.images.take([0])[0], pixels(10))
        assert len(list((tmp_path / "cache").glob("*.px"))) == 1  # the outdated one is gone
    elif change == "options":
        for _ in range(2):
            other = read(shard, tmp_path / "cache", image_size=9)
            np.testing.assert_array_equal(other.images.take([0])[0], pixels(0, 9))
        assert len(list((tmp_path / "cache").glob("*.px"))) == 2
    else:
        shard = write_shard(tmp_path / "other" / "s.tar", samples(3, first=20))
        np.testing.assert_array_equal(
            read(shard, tmp_path / "cache").images.take([0])[0], pixels(20)
        )
    if change != "content":
        np.testing.assert_array_equal(before.images.take([0, 1, 2]), old)


def test_progress_bar(tmp_path, capsys):
    shard = write_shard(tmp_path / "s.tar", samples(3))
    read(shard, tmp_path / "cache", progress=True)
    assert "indexing shards" in capsys.readouterr().err

"""Parquet files and Hugging Face data sets; needs pyarrow and datasets."""

import json

import numpy as np
import pytest
from shard_files import image_bytes
from test_data_ondemand import epoch, expected
from test_data_remote import FAST, flaky  # noqa: F401

from pybackdoor.data import pairs_from_hf, pairs_from_parquet, parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Of datasets, which hashes with dill.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot (pickle|locate)")

N = 12


def write(path, images, captions, names=("image", "caption"), group=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(zip(names, (images, captions), strict=True)))
    pq.write_table(table, path, row_group_size=group)
    return path


def images(struct):
    content = [image_bytes(i) for i in range(N)]
    return (
        [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(content)] if struct else content
    )


def captions():
    return [f"caption {i}" for i in range(N)]


# Of one thread: two meet at the row groups in any order, and the calls would vary.
ALONE = {"retry": FAST, "num_workers": 1}


def read(source, folder, **options):
    options = {"image_size": 8, "max_bad": 0.5, "num_workers": 2, "progress": False, **options}
    return pairs_from_parquet(source, cache_dir=folder, **options)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_bytes_and_structs(tmp_path, monkeypatch, struct, cache):
    source = write(tmp_path / "a.parquet", images(struct), captions())
    groups = []
    group = parquet._GroupBytes._group
    monkeypatch.setattr(
        parquet._GroupBytes, "_group", lambda self, *at: groups.append(at) or group(self, *at)
    )
    pairs = read(source, tmp_path / "cache", cache=cache, num_workers=1)
    assert groups == [(0, 0), (0, 1), (0, 2)]  # each row group once
    assert pairs.captions == captions() and pairs.locations[7] == f"{source}#7"
    np.testing.assert_array_equal(pairs.images.take(range(N)), expected())
    for ids, pixels in epoch(read(source, tmp_path / "cache", cache=cache, num_workers=1)):
        np.testing.assert_array_equal(pixels, expected()[ids])
    assert len(groups) == (3 if cache == "disk" else 6)


def test_several_files_and_column_names(tmp_path):
    for i in range(2):
        half = slice(6 * i, 6 * i + 6)
        write(tmp_path / f"{i}.parquet", images(False)[half], captions()[half], ("jpg", "text"))
    pairs = read(tmp_path / "{0..1}.parquet", tmp_path / "cache")
    assert pairs.captions == captions() and pairs.ids.tolist() == list(range(N))
    assert read(tmp_path, tmp_path / "cache").captions == captions()
    named = read(tmp_path, tmp_path / "cache", image_key="jpg", caption_key="text")
    np.testing.assert_array_equal(named.images.take([8]), expected()[8:9])


def test_bad_rows_are_left_out(tmp_path):
    content, texts = images(True), captions()
    content[1] = None
    content[2] = {"bytes": None, "path": "/etc/passwd"}
    content[3] = {"bytes": image_bytes(3)[:200], "path": None}
    texts[4], texts[5] = None, " "
    source = write(tmp_path / "a.parquet", content, texts)
    for _ in range(2):
        pairs = read(source, tmp_path / "cache")
        assert pairs.ids.tolist() == [0, *range(6, N)]
        reasons = {bad.row: bad.reason for bad in pairs.ledger.rows}
        assert reasons.pop(3).startswith("OSError") or True
        assert reasons == {
            1: "it has no bytes", 2: "it has a path and no bytes: /etc/passwd",
            4: "no caption", 5: "empty caption",
        }  # fmt: skip
    assert len(pairs.ledger.path.read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="rows cannot be used, and max_bad=0.1"):
        read(source, tmp_path / "cache", max_bad=0.1)


def test_damaged_files(tmp_path):
    good = write(tmp_path / "a.parquet", images(False), captions())
    (tmp_path / "b.parquet").write_bytes(b"<!DOCTYPE html>" * 10)
    (tmp_path / "c.parquet").write_bytes(good.read_bytes()[:-100])
    pairs = read(tmp_path, tmp_path / "cache")
    assert len(pairs) == N
    assert [bad.row for bad in pairs.ledger.rows] == [N, N + 1]
    assert all("not a parquet file" in bad.reason for bad in pairs.ledger.rows)


@pytest.fixture
def remote(tmp_path, flaky):  # noqa: F811
    """A file system that fails as told, and the calls that reading its parquet file takes."""
    content = write(tmp_path / "a.parquet", images(False), captions()).read_bytes()
    flaky.files = {"a.parquet": content}
    read("flaky://a.parquet", tmp_path / "whole", **ALONE)
    return flaky, len(flaky.calls)


def test_remote_files_are_tried_again_wherever_they_fail(tmp_path, remote):
    system, calls = remote
    assert calls > 12  # twice three row groups are opened and read
    for at in range(calls):
        system.plan = [None] * at + [ConnectionResetError("reset"), OSError("503")]
        pairs = read("flaky://a.parquet", tmp_path / str(at), **ALONE)
        assert pairs.captions == captions() and not pairs.ledger.rows, at
        assert not system.plan


def test_what_stays_out_of_reach_is_no_bad_row(tmp_path, remote):
    system, calls = remote
    indexed = 0
    for at in range(calls):
        system.plan = [None] * at + [ConnectionResetError("reset")] * FAST.attempts
        folder = tmp_path / str(at)
        with pytest.raises(OSError, match="could not be read in 4 tries: ConnectionReset.*: reset"):
            read("flaky://a.parquet", folder, **ALONE)
        indexed += len(list(folder.glob("*.index")))
        assert read("flaky://a.parquet", folder, **ALONE).captions == captions(), at
    assert 0 < indexed < calls / 2  # those that failed at the images


def test_damage_is_bad_rows_in_a_remote_file_too(tmp_path, flaky):  # noqa: F811
    """One that says so itself: bytes that are no text."""
    raw = pa.array([b"\xff", *(text.encode() for text in captions()[1:])])
    content = write(tmp_path / "a.parquet", images(False), raw.view(pa.string())).read_bytes()
    flaky.files = {"a.parquet": content}
    pairs = read("flaky://a.parquet", tmp_path / "cache", retry=FAST)
    assert pairs.captions == captions()[5:]
    reasons = {bad.reason for bad in pairs.ledger.rows}
    assert reasons == {"row group 0: UnicodeDecodeError"} and len(pairs.ledger.rows) == 5


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (
            ("a", "caption"),
            {},
            r"column 'image' or 'jpg' .*image_key=\), got the columns \['a'",
        ),
        (("image", "b"), {}, r"column 'caption' or 'text' or 'title' \(caption_key=\)"),
        (("image", "caption"), {"image_key": "x"}, r"column 'x' \(image_key=\), got the columns"),
        (("caption", "image"), {}, r"column 'image' of .* must hold bytes or .* got string"),
        (("image", "caption"), {"cache": "none"}, "cache must be disk, ram or device"),
    ],
)
def test_wrong_columns(tmp_path, names, options, match):
    source = write(tmp_path / "a.parquet", images(False), captions(), names)
    with pytest.raises(ValueError, match=f"pairs_from_parquet: .*{match}"):
        read(source, tmp_path / "cache", **options)


def test_without_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'pybackdoor\[data\]'"):
        read(tmp_path / "a.parquet", tmp_path / "cache")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    content = {"image": images(True), "text": captions()}
    content["image"][3] = {"bytes": image_bytes(3)[:200], "path": None}
    content["text"][5] = ""
    return datasets.Dataset.from_dict(content, features=features)


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_hugging_face(tmp_path, dataset, cache):
    def open_(source):
        return pairs_from_hf(
            source, image_size=8, cache=cache, cache_dir=tmp_path / "cache", max_bad=0.5
        )  # fmt: skip

    kept = [i for i in range(N) if i not in (3, 5)]
    pairs = open_(dataset)
    assert pairs.captions == [f"caption {i}" for i in range(N) if i != 5]
    good = pairs.decoded(progress=False)
    assert good.ids.tolist() == kept
    np.testing.assert_array_equal(good.images.take(range(len(kept))), expected()[kept])
    dataset.save_to_disk(tmp_path / "saved")
    saved = open_(tmp_path / "saved").decoded(progress=False)
    assert saved.captions == good.captions
    other = open_(dataset.select(range(6, N)))
    assert other.captions == captions()[6:]
    np.testing.assert_array_equal(other.images.take([0]), expected()[6:7])


def test_hugging_face_refusals(tmp_path, dataset):
    with pytest.raises(TypeError, match="must be a datasets.Dataset .* got IterableDataset"):
        pairs_from_hf(dataset.to_iterable_dataset(), image_size=8, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"column 'x' .* got the columns \['image', 'text'\]"):
        pairs_from_hf(dataset, image_size=8, caption_key="x", cache_dir=tmp_path)


def test_index_is_json_and_arrays_only(tmp_path):
    """Nothing that opening could run: the header is JSON."""
    read(write(tmp_path / "a.parquet", images(False), captions()), tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.index")
    content = path.read_bytes()
    header = json.loads(content[48 : 48 + int.from_bytes(content[8:16], "little")])
    assert set(header) == {"key", "meta", "columns"}

"""Tables, folders and arrays: which rows come out, and what each bad input is told."""

import json
import re

import numpy as np
import pytest
import torch
from data_files import cut, image_table, noise, write_image

from pybackdoor import data
from pybackdoor.data import (
    Preprocessing,
    labelled_from_arrays,
    labelled_from_csv,
    labelled_from_folder,
    pairs_from_arrays,
    pairs_from_folder,
    pairs_from_labelled,
)

IMAGES = np.random.default_rng(3).integers(0, 256, (6, 8, 10, 3), np.uint8)


def pairs_from_csv(*args, **options):
    """All images decoded: bad rows come out as from the eager sources."""
    return data.pairs_from_csv(*args, **options).decoded()


@pytest.fixture
def options(tmp_path):
    return {"image_size": 8, "cache_dir": tmp_path / "cache"}


def table_of(tmp_path, text, images=4, name="t.csv"):
    image_table(tmp_path, images)
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pixels(seed):
    from PIL import Image

    return Preprocessing(8)(Image.fromarray(noise(20, 24, seed)))


HEADERS = {
    "cleanclip": ("image,caption\n{0},{1}\n{2},{3}\n", {}),
    "open_clip": ("filepath\ttitle\n{0}\t{1}\n{2}\t{3}\n", {}),
    "other columns between": ("n,caption,x,image\n5,{1},,{0}\n5,{3},,{2}\n", {}),
    "byte order mark, CRLF": ("\ufeffimage,caption\r\n{0},{1}\r\n{2},{3}\r\n", {}),
    "blank lines": ("image,caption\n\n{0},{1}\n\n\n{2},{3}\n\n", {}),
    "no newline at the end": ("image,caption\n{0},{1}\n{2},{3}", {}),
    "tab, caption with commas": ("image\tcaption\n{0}\t{1}\n{2}\t{3}\n", {}),
    "explicit": ("u;v\n{0};{1}\n{2};{3}\n", dict(image_key="u", caption_key="v", delimiter=";")),
    "explicit, sniffed": ("u\tv\n{0}\t{1}\n{2}\t{3}\n", dict(image_key="u", caption_key="v")),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_table_headers(tmp_path, options, kind):
    text, keys = HEADERS[kind]
    table = table_of(tmp_path, text.format("1.png", "ein Käfer", "0.png", '"a, ""b"""'))
    pairs = pairs_from_csv(table, **keys, **options)
    assert pairs.captions == ["ein Käfer", 'a, "b"']
    assert pairs.ids.tolist() == [0, 1] and pairs.ids.dtype == np.int64
    assert pairs.locations == [str(tmp_path / "1.png"), str(tmp_path / "0.png")]
    assert len(pairs.ledger) == 0 and not pairs.ledger.path.exists()
    np.testing.assert_array_equal(pairs.images.take([0, 1]), np.stack([pixels(1), pixels(0)]))


def test_columns_missing(tmp_path, options):
    table = table_of(tmp_path, "picture,caption\n0.png,a\n")
    with pytest.raises(ValueError, match=re.escape(
        f"pairs_from_csv: {table} must have a column 'image' or 'filepath' and a column 'caption' "
        "or 'title', got the header ['picture', 'caption']"
    )):  # fmt: skip
        pairs_from_csv(table, **options)
    with pytest.raises(ValueError, match="a column 'text', got the header"):
        pairs_from_csv(table, caption_key="text", **options)
    with pytest.raises(ValueError, match="delimiter must be one character, got '::'"):
        pairs_from_csv(table, delimiter="::", **options)
    with pytest.raises(ValueError, match=r"got the header \[\]"):
        pairs_from_csv(table_of(tmp_path, ""), **options)
    with pytest.raises(ValueError, match="has a header and no rows"):
        pairs_from_csv(table_of(tmp_path, "image,caption\n\n"), **options)
    with pytest.raises(FileNotFoundError, match="none.csv"):
        pairs_from_csv(tmp_path / "none.csv", **options)


def test_text_that_is_not_utf8_names_its_row(tmp_path, options):
    table = table_of(tmp_path, b"image,caption\n0.png,a\n\n1.png,caf\xe9\n")
    with pytest.raises(ValueError, match=r"caption of row 1 \(line 4\) of .* is not UTF-8"):
        pairs_from_csv(table, max_bad=1.0, **options)
    with pytest.raises(ValueError, match="header of .* is not UTF-8"):
        pairs_from_csv(table_of(tmp_path, "image,caption\n".encode("utf-16")), **options)


def test_path_that_is_not_utf8_is_read(tmp_path, options):
    table = table_of(tmp_path, b"image,caption\ncaf\xe9.png,a\n0.png,b\n")
    (tmp_path / "1.png").rename(tmp_path / "caf\udce9.png")
    pairs = pairs_from_csv(table, **options)
    np.testing.assert_array_equal(pairs.images.take([0])[0], pixels(1))


@pytest.mark.parametrize("text", ['0.png,a\n1.png,"b\n2.png,c\n', '0.png,a\n1.png,"b'])
def test_quote_never_closed_does_not_swallow_rows(tmp_path, options, text):
    table = table_of(tmp_path, "image,caption\n" + text)
    with pytest.raises(ValueError, match="line 3: a quoted field is never closed"):
        pairs_from_csv(table, max_bad=1.0, **options)


def test_field_over_the_csv_limit(tmp_path, options):
    table = table_of(tmp_path, "image,caption\n0.png,a\n1.png," + "x" * 140_000 + "\n")
    with pytest.raises(ValueError, match="line 3: field larger than field limit"):
        pairs_from_csv(table, **options)


def test_relative_paths_and_root(tmp_path, options):
    write_image(tmp_path / "pictures" / "ünï" / "a.png", seed=5)
    table = tmp_path / "lists" / "t.csv"
    table.parent.mkdir()
    table.write_text(
        f"image,caption\nünï/a.png,x\n{tmp_path}/pictures/ünï/a.png,y\n", encoding="utf-8"
    )
    pairs = pairs_from_csv(table, root=tmp_path / "pictures", **options)
    assert pairs.locations == [str(tmp_path / "pictures" / "ünï" / "a.png")] * 2
    np.testing.assert_array_equal(pairs.images.take([0, 1]), np.stack([pixels(5)] * 2))
    with pytest.raises(ValueError, match="no such file"):
        pairs_from_csv(table, **options)


def broken_table(tmp_path):
    """10 rows; 2 cut, 3 missing, 4, 6 and 7 one zero-byte file, 6 no caption, 8 three fields."""
    image_table(tmp_path, 10)
    cut(tmp_path / "2.png")
    (tmp_path / "4.png").write_bytes(b"")
    names = [f"{i}.png" for i in range(10)]
    names[3], names[6], names[7] = "gone.png", "4.png", "4.png"
    rows = [f"{name},caption {i}" for i, name in enumerate(names)]
    rows[6], rows[8] = "4.png, ", "8.png,a,b"
    table = tmp_path / "broken.csv"
    table.write_text("image,caption\n" + "\n".join(rows) + "\n")
    return table


def test_broken_rows_are_left_out_counted_and_ledgered(tmp_path, options):
    table = broken_table(tmp_path)
    for _ in range(2):  # decoded, then from the cache
        pairs = pairs_from_csv(table, max_bad=0.6, **options)
        assert pairs.ids.tolist() == [0, 1, 5, 9]
        assert pairs.captions == [f"caption {i}" for i in (0, 1, 5, 9)]
        assert pairs.locations == [str(tmp_path / f"{i}.png") for i in (0, 1, 5, 9)]
        np.testing.assert_array_equal(
            pairs.images.take(range(4)), np.stack([pixels(i) for i in (0, 1, 5, 9)])
        )
        lines = [json.loads(line) for line in pairs.ledger.path.read_text().splitlines()]
        assert [line["row"] for line in lines] == [2, 3, 4, 6, 7, 8]
        reasons = {line["row"]: line["reason"] for line in lines}
        assert reasons[2].startswith("OSError") and "runcated" in reasons[2]
        assert [reasons[r] for r in (3, 4, 6, 7, 8)] == [
            "no such file", "zero bytes", "empty caption", "zero bytes",
            "line 10 has 3 fields, the header 2",
        ]  # fmt: skip
        assert lines[1]["location"] == str(tmp_path / "gone.png")
        assert lines[5]["location"] == str(table)  # its fields cannot be told apart
        assert len(pairs.ledger) == 6 and pairs.ledger.total == 10
    with pytest.raises(ValueError, match=r"max_bad=0.5 allows 5\. .*Ledger: .*jsonl"):
        pairs_from_csv(table, max_bad=0.5, **options)  # the cache does not hide them


def test_ledger_vanishes_when_the_source_is_mended(tmp_path, options):
    image_table(tmp_path, 3)
    cut(tmp_path / "1.png")
    bad = pairs_from_csv(tmp_path / "pairs.csv", max_bad=1.0, **options)
    assert bad.ledger.path.exists()
    write_image(tmp_path / "1.png", seed=1)
    good = pairs_from_csv(tmp_path / "pairs.csv", **options)
    assert len(good) == 3 and not bad.ledger.path.exists()


# 100 rows: 29 % is 28.999999999999996 in floating point and must still allow 29.
@pytest.mark.parametrize(("bad", "max_bad", "ok"), [
    (0, 0.0, True), (1, 0.0, False), (1, 0.01, True), (2, 0.01, False), (1, 0.0099, False),
    (29, 0.29, True), (30, 0.29, False), (99, 1.0, True),
])  # fmt: skip
def test_threshold(tmp_path, options, bad, max_bad, ok):
    write_image(tmp_path / "a.png")
    rows = [("gone.png" if i < bad else "a.png") + ",x" for i in range(100)]
    (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(rows))
    if ok:
        pairs = pairs_from_csv(tmp_path / "t.csv", max_bad=max_bad, **options)
        assert len(pairs) == 100 - bad and len(pairs.ledger) == bad
        return
    with pytest.raises(ValueError) as caught:
        pairs_from_csv(tmp_path / "t.csv", max_bad=max_bad, **options)
    text, allowed = str(caught.value), bad - 1
    assert f"at least {bad} of 100 rows cannot be used, and max_bad={max_bad:g} allows " in text
    assert f"allows {allowed if max_bad != 0.0099 else 0}." in text
    assert f"row 0 ({tmp_path / 'gone.png'}): no such file" in text
    ledger = re.search(r"Ledger: (\S+)$", text)[1]
    with open(ledger) as file:
        assert [json.loads(line)["row"] for line in file] == list(range(bad))


def test_too_many_bad_stop_the_decoding_early(tmp_path, options, monkeypatch):
    table = image_table(tmp_path, 60)
    for i in range(3):
        cut(tmp_path / f"{i}.png")
    from pybackdoor.data import ondemand

    decode, count = ondemand.decode_bytes, []
    monkeypatch.setattr(
        ondemand, "decode_bytes", lambda *a: (count.append(1), decode(*a))[1]
    )  # fmt: skip
    with pytest.raises(ValueError, match="at least 2 of 60"):
        pairs_from_csv(table, max_bad=0.017, num_workers=1, **options)
    assert len(count) < 20


def test_nothing_usable(tmp_path, options):
    table = table_of(tmp_path, "image,caption\ngone.png,a\n")
    with pytest.raises(ValueError, match="has no usable rows, ledger: .*jsonl"):
        pairs_from_csv(table, max_bad=1.0, **options)
    for max_bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="pairs_from_csv: max_bad must be in"):
            pairs_from_csv(table, max_bad=max_bad, **options)
    with pytest.raises(ValueError, match="no usable rows; row 0: empty label"):
        labelled_from_csv(table_of(tmp_path, "image,label\n0.png,\n"), **options)


def test_evaluation_never_drops_silently(tmp_path, options):
    table = table_of(tmp_path, "image,label\n0.png,cat\n1.png,dog\ngone.png,cat\n3.png,cat\n")
    with pytest.raises(ValueError, match="labelled_from_csv: .*max_bad=0 allows 0.*no such file"):
        labelled_from_csv(table, **options)
    labelled = labelled_from_csv(table, max_bad=0.25, **options)
    assert labelled.num_bad == 1 and labelled.ledger.rows[0].row == 2
    assert labelled.classes == ["cat", "dog"] and labelled.labels.tolist() == [0, 1, 0]
    assert labelled.ids.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="empty label"):
        labelled_from_csv(table_of(tmp_path, "image,label\n0.png,cat\n1.png,\n"), **options)
    with pytest.raises(ValueError, match="empty caption"):  # a retrieval set
        pairs_from_csv(
            table_of(tmp_path, "image,caption\n0.png,a\n1.png,\n"), max_bad=0.0, **options
        )


def test_labels_of_a_table(tmp_path, options):
    def labels(*values, classes=None):
        rows = "".join(f"{i}.png,{value}\n" for i, value in enumerate(values))
        table = table_of(tmp_path, "image,label\n" + rows)
        labelled = labelled_from_csv(table, classes=classes, **options)
        return labelled.classes, labelled.labels.tolist()

    assert labels("dog", "cat", "dog") == (["cat", "dog"], [1, 0, 1])
    assert labels(" dog ", "cat", classes=("dog", "cat", "owl")) == (["dog", "cat", "owl"], [0, 1])
    assert labels("1", "0", classes=["a", "b"]) == (["a", "b"], [1, 0])
    assert labels("7", "5", classes=["5", "7"]) == (["5", "7"], [1, 0])  # names win
    assert labels("1", "0", classes=["a", "a"]) == (["a", "a"], [1, 0])
    with pytest.raises(ValueError, match=r"row 1 \(line 3\) of .* is 'cow', .* of the 2 classes"):
        labels("dog", "cow", classes=["dog", "cat"])
    with pytest.raises(ValueError, match=r"row 1 \(line 3\) of .* must be in \[0, 2\).* got 2"):
        labels("0", "2", classes=["dog", "cat"])
    with pytest.raises(ValueError, match=r"row 0 \(line 2\) of .* got -1"):
        labels("-1", classes=["dog", "cat"])
    with pytest.raises(ValueError, match="labels are numbers: give classes="):
        labels("0", "1")
    with pytest.raises(ValueError, match="'a', which classes hold twice"):
        labels("a", classes=["a", "a"])


def class_folders(root):
    for i, name in enumerate(["b cat/2.png", "b cat/1.PNG", "a dog/deep/3.png", "a dog/0.png"]):
        write_image(root / name, seed=i)
    (root / "a dog" / "notes.txt").write_text("no image")
    (root / "a dog" / ".hidden.png").write_text("no image")
    (root / ".git").mkdir()
    (root / "list.csv").write_text("no folder")


def test_folder(tmp_path, options):
    class_folders(tmp_path / "set")
    labelled = labelled_from_folder(tmp_path / "set", **options)
    names = ["a dog/0.png", "a dog/deep/3.png", "b cat/1.PNG", "b cat/2.png"]
    assert labelled.locations == [str(tmp_path / "set" / name) for name in names]
    assert labelled.classes == ["a dog", "b cat"] and labelled.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(
        labelled.images.take(range(4)), np.stack([pixels(i) for i in (3, 2, 1, 0)])
    )
    given = labelled_from_folder(tmp_path / "set", classes=["owl", "b cat", "a dog"], **options)
    assert given.labels.tolist() == [2, 2, 1, 1]
    renamed = {"b cat": "cat", "a dog": "dog"}
    given = labelled_from_folder(tmp_path / "set", classes=renamed, **options)
    assert given.classes == ["cat", "dog"] and given.labels.tolist() == [1, 1, 0, 0]
    pairs = pairs_from_folder(
        tmp_path / "set", templates="a {}!", classes=renamed, **options
    )  # fmt: skip
    assert pairs.captions == ["a dog!", "a dog!", "a cat!", "a cat!"]
    for classes in (["a dog"], {"a dog": "dog"}):
        with pytest.raises(ValueError, match="folder 'b cat' of .* is not in classes"):
            labelled_from_folder(tmp_path / "set", classes=classes, **options)


def test_folder_with_bad_images(tmp_path, options):
    class_folders(tmp_path / "set")
    cut(tmp_path / "set" / "a dog" / "0.png")
    pairs = pairs_from_folder(tmp_path / "set", templates="simple", max_bad=0.3, **options)
    assert pairs.ids.tolist() == [1, 2, 3] and pairs.ledger.rows[0].row == 0
    with pytest.raises(ValueError, match="pairs_from_folder: .*allows 0"):
        pairs_from_folder(tmp_path / "set", templates="simple", **options)
    with pytest.raises(ValueError, match="labelled_from_folder: .*allows 0"):
        labelled_from_folder(tmp_path / "set", **options)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"one folder per class, .* holds \['cat'\]"):
        labelled_from_folder(tmp_path / "empty", **options)
    with pytest.raises(ValueError, match="no image files"):  # one of classes that are given
        labelled_from_folder(tmp_path / "empty", classes=["cat", "dog"], **options)
    (tmp_path / "empty" / "dog").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        labelled_from_folder(tmp_path / "empty", **options)
    with pytest.raises(ValueError, match="one folder per class"):
        labelled_from_folder(tmp_path / "empty" / "cat", **options)


def test_arrays():
    pairs = pairs_from_arrays(torch.from_numpy(IMAGES), list("abcdef"))
    assert pairs.captions == list("abcdef") and pairs.locations[5] == "array:5"
    assert pairs.ids.tolist() == [0, 1, 2, 3, 4, 5] and pairs.ledger is None
    np.testing.assert_array_equal(pairs.images.take([4]), IMAGES[[4]])
    labelled = labelled_from_arrays(IMAGES, torch.tensor([0, 1, 1, 0, 2, 0]), ["a", "b", "c"])
    assert labelled.labels.tolist() == [0, 1, 1, 0, 2, 0] and labelled.labels.dtype == np.int64
    named = labelled_from_arrays(IMAGES, ["b", "a", "b", "b", "b", "b"], ["a", "b"])
    assert named.labels.tolist() == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("grey", [False, True])
def test_arrays_are_resized_like_files(grey):
    from PIL import Image

    images = IMAGES[..., 0] if grey else IMAGES
    store = labelled_from_arrays(images, [0] * 6, ["a"], image_size=5).images
    wanted = np.stack([Preprocessing(5)(Image.fromarray(image)) for image in images])
    np.testing.assert_array_equal(store.take(range(6)), wanted)
    squashed = labelled_from_arrays(images, [0] * 6, ["a"], image_size=5, resize_mode="squash")
    assert (squashed.images.take(range(6)) != wanted).any()
    same = labelled_from_arrays(images, [0] * 6, ["a"], image_size=(8, 10)).images
    assert np.shares_memory(same._images, images)


def test_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="pairs_from_arrays: give captions, or labels"):
        pairs_from_arrays(IMAGES)
    with pytest.raises(ValueError, match=r"got \['labels', 'captions'\]"):
        pairs_from_arrays(IMAGES, list("abcdef"), labels=[0] * 6)
    with pytest.raises(ValueError, match=r"got \['labels', 'classes'\]"):
        pairs_from_arrays(IMAGES, labels=[0] * 6, classes=["a"])
    with pytest.raises(ValueError, match="caption 2 is empty"):
        pairs_from_arrays(IMAGES, ["a", "b", " \t", "d", "e", "f"])
    with pytest.raises(TypeError, match="caption 1 must be a str, got int"):
        pairs_from_arrays(IMAGES, ["a", 3, "c", "d", "e", "f"])
    with pytest.raises(ValueError, match="captions must have one entry per image, 6, got 1"):
        pairs_from_arrays(IMAGES, ["a"])
    with pytest.raises(TypeError, match="pairs_from_arrays: images must be uint8, got float64"):
        pairs_from_arrays(IMAGES / 255, list("abcdef"))
    with pytest.raises(ValueError, match=r"labels must be \[6\], got \[5\]"):
        labelled_from_arrays(IMAGES, [0] * 5, ["a"])
    with pytest.raises(TypeError, match="labels must be integers or class names, got float64"):
        labelled_from_arrays(IMAGES, [0.0] * 6, ["a"])
    with pytest.raises(ValueError, match=r"label 1 must be in \[0, 1\), the classes, got 1"):
        labelled_from_arrays(IMAGES, [0, 1, 0, 0, 0, 0], ["a"])
    with pytest.raises(TypeError, match="classes must be a sequence of names, got the string"):
        labelled_from_arrays(IMAGES, [0] * 6, "abc")
    with pytest.raises(TypeError, match="classes must be strings, got int"):
        labelled_from_arrays(IMAGES, [0] * 6, [1])
    for classes, match in (([], "at least one name"), (["a", " "], "empty name")):
        with pytest.raises(ValueError, match=match):
            labelled_from_arrays(IMAGES, [0] * 6, classes)


def test_captions_from_labels_depend_on_seed_and_id_alone():
    labelled = labelled_from_arrays(
        np.zeros((400, 1, 1), np.uint8), np.arange(400) % 3, ["x", "y", "z"]
    )
    templates = ["0 {}", "1 {}", "2 {} {}", "3 {}"]
    pairs = pairs_from_labelled(labelled, templates, seed=5)
    which = np.array([int(caption[0]) for caption in pairs.captions])
    assert (np.bincount(which, minlength=4) > 70).all()  # 100 expected, 8.7 standard deviation
    for caption, label in zip(pairs.captions, labelled.labels, strict=True):
        name = "xyz"[label]
        assert caption == templates[int(caption[0])].replace("{}", name)
    rows = [399, 3, 77]
    part = pairs_from_labelled(labelled.subset(rows), templates, seed=5)
    assert part.captions == [pairs.captions[row] for row in rows]
    assert pairs_from_labelled(labelled, templates, seed=6).captions != pairs.captions
    again = pairs_from_arrays(
        np.zeros((400, 1, 1), np.uint8), labels=np.arange(400) % 3, classes=["x", "y", "z"],
        templates=templates, seed=5,
    )  # fmt: skip
    assert again.captions == pairs.captions

"""Index files: opened or built, never a part of one, never another source's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pybackdoor.data import PairLoader, Pairs, tokens
from pybackdoor.data.index import IndexWriter, hashed, open_index, read_index
from pybackdoor.data.tokens import TokenTable, tokenizer_identity

TEXTS = ["a photo of a dog", "", "Übergröße ☃", "a photo of a dog", "\udcff"]


def build(writer):
    for start in (0, 2):
        writer.append("id", np.arange(start, start + 3, dtype=np.int32))
        writer.append_strings("text", TEXTS[start : start + 3 - start // 2 * 0][: 3 - start // 2])
    writer.append_strings("none", [])
    return {"total": 7}


def opened(path, key="k", builds=None):
    def counted(writer):
        if builds is not None:
            builds.append(1)
        return build(writer)

    return open_index("op", path, key, counted)


def test_columns_come_back(tmp_path):
    builds = []
    for _ in range(2):
        index = opened(tmp_path / "deep" / "x.index", builds=builds)
        assert index.array("id").tolist() == [0, 1, 2, 2, 3, 4]
        assert index.array("id").dtype == np.int32
        assert index.strings("text") == [*TEXTS[:3], *TEXTS[2:4]] and index.strings("none") == []
        assert index.meta == {"total": 7}
        index.verify()
        with pytest.raises(ValueError, match="read-only"):
            index.array("id")[0] = 1
    assert len(builds) == 1
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"x.index", "x.index.lock"}
    opened(tmp_path / "deep" / "x.index", "other key", builds)
    assert len(builds) == 2 and read_index(tmp_path / "deep" / "x.index", "k") is None


def test_every_flip_of_the_header_is_refused_and_of_the_columns_found(tmp_path):
    path = tmp_path / "x.index"
    opened(path)
    good = path.read_bytes()
    length = 48 + int.from_bytes(good[8:16], "little")
    columns = json.loads(good[48:length])["columns"]
    inside = {
        at for dtype, count, start, _ in columns.values()
        for at in range(start, start + count * np.dtype(dtype).itemsize)
    }  # fmt: skip
    for at in [*range(length), *inside]:
        content = bytearray(good)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="start|checksum|is damaged: CRC-32 of its column"):
            found = read_index(path, "k")
            assert found is not None
            found.verify()
    for content in (b"", good[:20], good[:length], good[: max(inside)]):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_index(path, "k")
    for content in (good[:-1], good[: max(inside)] + b"x" + good[max(inside) + 1 :]):
        path.write_bytes(content)
        with pytest.warns(RuntimeWarning, match="index .* is damaged .*; building it again"):
            assert opened(path).strings("text")[0] == TEXTS[0]
        assert path.read_bytes() == good


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def failing(writer):
        writer.append("id", np.arange(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index("op", tmp_path / "x.index", "k", failing)
    assert {path.name for path in tmp_path.iterdir()} == {"x.index.lock"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="op: the index in .* could not be built.*cache_dir="):
        opened(tmp_path / "file" / "x.index")


def tokenize(texts):
    """[n, 6]: two numbers of the caption, then padding."""
    return torch.tensor(
        [[len(t.encode("utf-8", "replace")), 5 + len(t), 0, 0, 0, 0] for t in texts]
    )


def wide(texts):
    return tokenize(texts) * 70_000


class NoImages:
    image_size = (1, 1)

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def take(self, rows):
        return np.zeros((len(rows), 1, 1, 3), np.uint8)


def many(folder, count):
    """An index of count captions, all different, as pairs without images."""

    def fill(writer: IndexWriter):
        for start in range(0, count, 10_000):
            stop = min(start + 10_000, count)
            writer.append("id", np.arange(start, stop))
            writer.append_strings("caption", (f"a photo of thing {i}" for i in range(start, stop)))
            writer.append_strings(
                "location", (f"/data/x.tar#{i:09}.jpg" for i in range(start, stop))
            )
        return {}

    index = open_index("op", folder / "x.index", hashed(count), fill)
    locations = index.strings("location")
    return Pairs(NoImages(count), index.strings("caption"), index.array("id"), locations)


@pytest.mark.parametrize("tokenizer", [tokenize, wide])
def test_tokens_on_disk_are_those_in_memory(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tokens, "_CHUNK", 100)
    pairs = many(tmp_path, 1000)
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return tokenizer(texts)

    views = [
        pairs.captions, pairs.subset(np.arange(700)[::-1]).captions,
        pairs.captions.replaced({3: "poison", 999: "x" * 30}),
    ]  # fmt: skip
    for captions in views:
        rows = np.random.default_rng(0).integers(0, len(captions), 50)
        wanted = TokenTable(list(captions), tokenizer)
        for again in (False, True):
            del calls[:]
            table = TokenTable.on_disk(captions, counted)
            assert len(table) == len(captions) and table.length == 6
            assert torch.equal(table.take(rows), wanted.take(rows))
            assert (calls == [256, 5]) is again  # the second time, only to know the tokenizer
    assert len(list(tmp_path.glob("*.tokens"))) == len(views)


def test_truncation_is_counted_on_disk_too(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    pairs = many(tmp_path, 50)
    for length, cut in ((4, 50), (77, 0)):
        tokenizer = open_clip.SimpleTokenizer(context_length=length)
        table = TokenTable.on_disk(pairs.captions, tokenizer)
        assert table.num_truncated == cut
        assert torch.equal(
            table.take(np.array([3, 9])), tokenizer([pairs.captions[i] for i in (3, 9)])
        )


def test_tokenizers_are_told_apart():
    open_clip = pytest.importorskip("open_clip")
    texts = [f"text {i}" for i in range(1000)]
    simple = open_clip.SimpleTokenizer
    kinds = [simple(), simple(context_length=9), simple(clean="whitespace"), tokenize, wide]
    found = [tokenizer_identity(kind, texts) for kind in kinds]
    assert len(set(found)) == len(kinds)
    assert tokenizer_identity(simple(), texts) == found[0]


def test_loader_over_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "ON_DISK", 30)
    pairs = many(tmp_path, 40)
    loaders = [PairLoader(p, tokenize, batch_size=8) for p in (pairs, pairs.subset(range(20)))]
    for loader in loaders:
        for batch in loader:
            wanted = tokenize([f"a photo of thing {i}" for i in batch["ids"].tolist()])
            assert torch.equal(batch["tokens"], wanted)
            more = loader.rewritten(lambda text: text + " 7").tokens(batch["captions"].numpy())
            assert torch.equal(more, tokenize([f"a photo of thing {i} 7" for i in batch["ids"]]))
    assert len(list(tmp_path.glob("*.tokens"))) == 1

    def unwritable(*_, **__):
        raise OSError("no")

    monkeypatch.setattr(tokens, "open_index", unwritable)
    with pytest.warns(RuntimeWarning, match="tokens are kept in memory, not beside .*: no"):
        list(PairLoader(pairs, tokenize, batch_size=8))


OPEN = """
import sys, time, resource
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_data_index import many, tokenize
from pybackdoor.data import PairLoader, tokens
tokens.ON_DISK = 1000
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, start = rss(), time.perf_counter()
pairs = many(Path(sys.argv[1]), int(sys.argv[3]))
loader = PairLoader(pairs, tokenize, batch_size=64)
next(iter(loader))
print(time.perf_counter() - start, rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_is_cheap(tmp_path):
    """30,000 rows; tests/stress/index_rows.py does 3,000,000."""
    count = 30_000
    TokenTable.on_disk(many(tmp_path, count).captions, tokenize)
    out = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path), str(Path(__file__).parent), str(count)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout.split()  # fmt: skip
    # A 100th of what 3,000,000 rows may take, and what a first batch costs anyway.
    assert float(out[0]) < 0.02 + 0.5 and int(out[1]) < 3e6 + 20e6

"""Packed strings: a list of them in use, in files too."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybackdoor.data import Strings, pairs_from_arrays

texts = st.lists(st.text(max_size=8) | st.just("\udcff.png"), max_size=30)


@settings(max_examples=100, deadline=None)
@given(texts, st.data())
def test_like_a_list(wanted, data):
    strings = Strings.of(wanted)
    assert Strings.of(strings) is strings
    rows = (
        data.draw(st.lists(st.integers(0, max(len(wanted) - 1, 0)), max_size=9)) if wanted else []
    )
    changes = {row: f"new {row}" for row in rows[:3]}
    pairs = [
        (strings, wanted),
        (strings.take(np.array(rows, np.int64)), [wanted[row] for row in rows]),
        (strings.replaced(changes), [changes.get(i, text) for i, text in enumerate(wanted)]),
        (
            strings.replaced(changes).take(np.array(rows, np.int64)),
            [changes.get(row, wanted[row]) for row in rows],
        ),
        (
            strings.take(np.array(rows, np.int64)).replaced(dict.fromkeys(range(len(rows)), "x")),
            ["x"] * len(rows),
        ),
        (strings[1::2], wanted[1::2]), (strings[::-1], wanted[::-1]),
    ]  # fmt: skip
    for got, want in pairs:
        assert got == want and want == got and list(got) == want and len(got) == len(want)
        assert [got[i] for i in range(-len(want), len(want))] == want + want
        assert got == Strings.of(want) and pickle.loads(pickle.dumps(got)) == want
        assert got != [*want, "more"] and (not want or got != [*want[:-1], want[-1] + "!"])
        assert list(reversed(got)) == want[::-1]
        with pytest.raises(IndexError):
            got[len(want)]
        raw = [text.encode("utf-8", "surrogatepass") for text in want]
        assert got.sha256() == Strings.of(want).sha256()
        assert got.common_prefix() == (os.path.commonprefix(raw) or b"")


def test_more_than_a_chunk():
    wanted = [str(i) for i in range(10_000)]
    assert Strings.of(wanted) == wanted
    assert repr(Strings.of(wanted)) == "Strings(['0', '1', '2', ...], 10000 in all)"
    view = Strings.of(["x", *wanted]).take(np.arange(1, 10_001))
    assert list(view) == wanted and list(view.replaced({9000: "y"}))[8999:9002] == [
        "8999", "y", "9001",
    ]  # fmt: skip
    assert view.sha256() == Strings.of(wanted).sha256()


def test_sha256_tells_contents_apart():
    lists = [[], ["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""], ["ab", "d"]]
    assert len({Strings.of(texts).sha256() for texts in lists}) == len(lists)
    late = [str(i) for i in range(10_000)]
    assert Strings.of(late).sha256() != Strings.of(late[:-1] + ["x"]).sha256()
    without = Strings.of(["1.png", "a/2.png"]).sha256()
    assert Strings.of(["/b/1.png", "/b/a/2.png"]).sha256(3) == without
    far = Strings.of([f"/b/{text}" for text in late])
    assert far.common_prefix() == b"/b/" and far.sha256(3) == Strings.of(late).sha256()


def test_what_it_is_not():
    assert Strings.of(["a"]) != "a" and Strings.of(["a"]) != 3 and Strings.of([]) == []
    with pytest.raises(TypeError):
        hash(Strings.of(["a"]))


def test_pairs_pack_what_they_are_given():
    pairs = pairs_from_arrays(np.zeros((3, 2, 2), np.uint8), ["a", "b", "c"])
    assert isinstance(pairs.captions, Strings) and isinstance(pairs.locations, Strings)
    subset = pairs.subset([2, 0])
    assert subset.captions == ["c", "a"] and subset.locations == ["array:2", "array:0"]
    assert isinstance(subset.subset([1]).captions, Strings)


def test_identity_names_the_content():
    blob, ends = np.frombuffer(b"abc", np.uint8), np.arange(4)
    strings = Strings(blob, ends, "file 1")
    assert Strings.of(["a"]).identity is None and strings.identity == "file 1"
    views = [
        strings, strings.take(np.array([0, 1])), strings.take(np.array([1, 0])),
        strings.replaced({0: "x"}), strings.replaced({0: "y"}), strings.replaced({1: "x"}),
        Strings(blob, ends, "file 2").take(np.array([0, 1])),
    ]  # fmt: skip
    assert len({view.identity for view in views}) == len(views)
    assert strings.take(np.array([1, 0])).identity == views[2].identity

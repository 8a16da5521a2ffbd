"""The tar reader: what tarfile reads, and nothing that a damaged archive can do to it."""

import io
import random
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import archive, entry, patched

from pybackdoor.data.tar import Flaw, Member, scan

LONG = "/".join(["a" * 60] * 3) + "/" + "b" * 120 + ".txt"
FILES = [("x.txt", b"1"), (LONG, b"22"), ("Übergröße ☃.jpg", b"3" * 513), ("d/y.json", b"")]


def scanned(content):
    found = list(scan(lambda at, n: content[at : at + n], len(content)))
    members = [(m.name, content[m.offset : m.offset + m.size]) for m in found if type(m) is Member]
    return members, [(f.name, f.reason) for f in found if type(f) is Flaw]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_members_as_tarfile_reads_them(kind):
    folder = entry("d", tarfile.DIRTYPE)
    assert scanned(archive([folder, *FILES], kind)) == (FILES, [])


def test_ustar_prefix():
    name = "p" * 90 + "/" + "q" * 90
    assert scanned(archive([(name, b"z")])) == ([(name, b"z")], [])


def test_pax_size_and_gnu_base_256_size():
    content = archive([("x.txt", b"12345")])
    size = b"\x80" + (5).to_bytes(11, "big")
    assert scanned(patched(content, 0, 124, size)) == ([("x.txt", b"12345")], [])
    info = tarfile.TarInfo("y.txt")
    info.size, info.pax_headers = 5, {"size": "5"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"12345"))
    # tarfile keeps the true size in the header too: spoil it, pax has the last word.
    at = len(out.getvalue().split(b"12345")[0]) - 512
    spoilt = patched(out.getvalue(), at, 124, b"00000000001\0")
    assert scanned(spoilt) == ([("y.txt", b"12345")], [])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"), (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "FIFO"), (b"S", "sparse file"), (b"Z", "unknown member type b'Z'"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_a_flaw(kind, reason):
    content = archive([FILES[0], entry("bad.jpg", kind, "/etc/passwd"), FILES[3]])
    assert scanned(content) == ([FILES[0], FILES[3]], [("bad.jpg", reason)])


def test_sparse_by_pax_is_a_flaw():
    info = tarfile.TarInfo("s.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    assert scanned(archive([info, FILES[0]], "pax")) == ([FILES[0]], [("s.jpg", "sparse file")])


def plain(count):
    return [(f"{i}.txt", b"%d" % i) for i in range(count)]


@pytest.mark.parametrize(
    ("place", "field", "fix", "reason"),
    [
        (0, b"Q", False, "header checksum does not match"),
        (124, b"9", True, "a number in its header is b'90000000001'"),
        (124, b"\xff", True, "a negative or too large number"),
        (124, b"77777777777", True, "are left: cut, or a wrong size"),
        (124, b"\x80" + b"\xff" * 11, True, "are left: cut, or a wrong size"),
    ],
)
def test_damaged_header_costs_its_own_member(place, field, fix, reason):
    content = patched(archive(plain(5)), 2048, place, field, fix)
    members, flaws = scanned(content)
    assert members == plain(2) + plain(5)[3:]
    assert len(flaws) == 1 and reason in flaws[0][1]


def test_size_that_swallows_members_ends_at_the_next_header():
    # Three blocks instead of one: the next header is read as content, then all is well again.
    content = patched(archive(plain(5)), 1024, 124, b"00000003000\0")
    members, flaws = scanned(content)
    assert [name for name, _ in members] == ["0.txt", "1.txt", "3.txt", "4.txt"]
    content = patched(archive(plain(5)), 1024, 124, b"00000001001\0")  # into a content block
    members, flaws = scanned(content)
    assert [name for name, _ in members] == ["0.txt", "1.txt", "3.txt", "4.txt"]
    assert flaws == [("", "not a tar header, starts with " + repr(b"2" + bytes(15)))]


@pytest.mark.parametrize("end", [0, 1, 511, 512, 513, 1024, 1024 + 200, 1536, 1537, 2048])
def test_cut_anywhere_is_noticed_and_keeps_what_came_before(end):
    members, flaws = scanned(archive(plain(5))[:end])
    assert members == plain(5)[: (end + 511) // 1024] and len(flaws) == 1
    wanted = {
        0: "zero bytes", 1: "cut within a header", 511: "cut within a header",
        512: "1 bytes are announced, 0 are left: cut, or a wrong size",
        1024: "cut: it has no end mark",
    }  # fmt: skip
    if end in wanted:
        assert flaws[0][1] == wanted[end]


def test_after_the_end_mark():
    one, two = archive(plain(2)), archive(plain(4)[2:])
    assert scanned(one + two) == (plain(4), [("", "data after the end mark")])
    assert scanned(one + b"rubbish") == (plain(2), [("", "data after the end mark")])
    assert scanned(one + bytes(900_000)) == (plain(2), [])
    (flaw,) = scanned(one + bytes(3_000_000))[1]
    assert "bytes are zeros: partly downloaded" in flaw[1]


def test_hole_in_the_middle():
    content = bytearray(archive(plain(9)))
    content[2048:4096] = bytes(2048)  # members 2 and 3
    assert scanned(bytes(content)) == (
        plain(2) + plain(9)[4:], [("", "data after the end mark")]
    )  # fmt: skip


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>" * 100, b"\x1f\x8b" + b"x" * 5000])
def test_what_is_no_tar(content):
    members, flaws = scanned(content)
    assert not members and len(flaws) == 1
    assert flaws[0][1].startswith("not a tar header, starts with " + repr(content[:4])[:-1])


@pytest.mark.parametrize("record", [b"9 path", b"99 path=x\n", b"x", b"0 path=x\n", b"-1 a=b\n"])
def test_malformed_pax(record):
    content = bytearray(archive([(LONG, b"22"), FILES[0]], "pax"))
    content[512:1024] = record.ljust(512, b"\1")
    members, flaws = scanned(bytes(content))
    assert FILES[0] in members and flaws[0][1] == "malformed pax header"


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["ustar", "gnu", "pax"]))
def test_nothing_raises_and_all_places_are_inside(seed, kind):
    rng = random.Random(seed)
    names = FILES[:1] + FILES[3:] if kind == "ustar" else FILES
    content = bytearray(archive(names + plain(4), kind))
    for _ in range(rng.randint(1, 12)):
        start = rng.randrange(len(content))
        kind_of = rng.randrange(4)
        if kind_of == 0:
            content[start] ^= 1 << rng.randrange(8)
        elif kind_of == 1:
            content[start : start + rng.randrange(600)] = rng.randbytes(rng.randrange(600))
        elif kind_of == 2 and len(content) > 600:
            del content[start : start + rng.randrange(600)]
        else:
            at = start // 512 * 512
            field = rng.choice(
                [b"ustar", b"\xff" * 12, b"77777777777", b"\x80" + rng.randbytes(11)]
            )
            content = bytearray(patched(bytes(content), at, rng.choice([124, 257, 156, 0]), field))
        content = content or bytearray(1)
    content = bytes(content)
    start = time.process_time()
    found = list(scan(lambda at, n: content[at : at + n], len(content)))
    assert time.process_time() - start < 1
    for item in found:
        if isinstance(item, Member):
            assert 0 <= item.offset <= item.offset + item.size <= len(content)
    places = [item.offset for item in found if isinstance(item, Member)]
    assert places == sorted(set(places))


def test_time_is_linear_in_bad_headers():
    block = bytearray(512)
    block[257:262] = b"ustar"
    times = []
    for count in (2_000, 8_000):
        content = bytes(block) * count
        start = time.process_time()
        members, flaws = scanned(content)
        times.append((time.process_time() - start) / count)
        assert not members and flaws
    assert times[1] < 3 * times[0] + 1e-5 and times[1] < 1e-3

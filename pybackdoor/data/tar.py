"""Reading the members' names and places in a tar file that nobody vouches for.

Only headers are read, and nothing is written or executed. ustar, GNU long names and pax names and
sizes are understood; links, devices and sparse files are reported as flaws. After a header that
cannot be right, reading goes on at the next block that is one: a damaged member costs itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
_ZEROS = bytes(BLOCK)
_LONGEST_NAME = 1 << 16  # bytes of a GNU long name
_LONGEST_PAX = 1 << 20
_WINDOW = 1 << 20  # read at once when looking for a header
_END_PADDING = 1 << 20  # zeros after the end mark that no archiver exceeds

_FILES, _FOLDER, _PAX_GLOBAL = (b"\x00", b"0", b"7"), b"5", b"g"
_REFUSED = {
    b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device",
    b"6": "FIFO", b"S": "sparse file",
}  # fmt: skip

Read = Callable[[int, int], bytes]  # (offset, count) -> bytes, fewer only at the end


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: where its content lies."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Flaw:
    """What is wrong with an archive at a place; name is "" where no member's name is known."""

    name: str
    at: int
    reason: str


class _Bad(ValueError):
    """A header that cannot be right."""


def scan(read: Read, size: int) -> Iterator[Member | Flaw]:
    """Members and flaws of an archive in their order; folders are passed over.

    Args:
        read: of the archive's bytes.
        size: of the archive.
    """
    at = 0
    if size == 0:
        yield Flaw("", 0, "zero bytes")
        return
    given: dict[str, str] = {}  # what extension headers say of the next member
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            what = "cut within a header" if header else "cut: it has no end mark"
            yield Flaw("", at, what)
            return
        if header == _ZEROS:
            yield from _after_end(read, at, size)
            found = next_header(read, at + BLOCK, size)
            if found is None:
                return
            at, given = found, {}
            continue
        try:
            name, length, kind = _parsed(header)
            if kind in b"LKx":
                content = _extension(read, at, length, kind)
                if kind == b"L":
                    given["path"] = _name(content)
                elif kind == b"x":
                    given |= _pax(content)
            else:
                name = given.get("path", name)
                length = _decimal(given["size"]) if "size" in given else length
                if kind in _REFUSED or "sparse" in given:
                    yield Flaw(name, at, _REFUSED.get(kind, "sparse file"))
                elif kind != _FOLDER and kind != _PAX_GLOBAL and kind not in _FILES:
                    yield Flaw(name, at, f"unknown member type {kind!r}")
                elif at + BLOCK + length > size:
                    left = size - at - BLOCK
                    reason = f"{length} bytes are announced, {left} are left: cut, or a wrong size"
                    yield Flaw(name, at, reason)
                    raise _Bad("")
                elif kind in _FILES:
                    yield Member(name, at + BLOCK, length)
                given = {}
                if kind in _REFUSED and kind != b"S":
                    length = 0  # links and devices have no content, whatever they say
            at += BLOCK + -(-length // BLOCK) * BLOCK
            if at > size:  # the last member is whole, what fills up its block is not
                yield Flaw("", size, "cut: it has no end mark")
                return
        except _Bad as error:
            if str(error):
                yield Flaw(given.get("path", ""), at, str(error))
            found = next_header(read, min(at, size) + BLOCK, size)
            if found is None:
                return
            at, given = found, {}


def next_header(read: Read, at: int, size: int) -> int | None:
    """The first block boundary from at on where a member's header is; None = there is none."""
    at = -(-at // BLOCK) * BLOCK
    while at < size:
        window = read(at, _WINDOW)
        if not window:
            return None
        place = window.find(b"ustar")
        while place >= 0:
            start = place - 257
            if start >= 0 and start % BLOCK == 0 and start + BLOCK <= len(window):
                if _sums_agree(window[start : start + BLOCK]):
                    return at + start
            place = window.find(b"ustar", place + 1)
        at += len(window) - len(window) % BLOCK or BLOCK
    return None


def _after_end(read: Read, at: int, size: int) -> Iterator[Flaw]:
    """What is wrong with what follows the end mark at a place, if anything."""
    start = at
    at += BLOCK
    while at < size:
        window = read(at, _WINDOW)
        if not window or window.count(0) != len(window):
            yield Flaw("", at, "data after the end mark")
            return
        at += len(window)
    if size - start > _END_PADDING:
        yield Flaw("", start, f"its last {size - start} bytes are zeros: partly downloaded")


def _parsed(header: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) of a header.

    Raises:
        _Bad: its checksum or its numbers are wrong.
    """
    if not _sums_agree(header):
        if header[257:262] != b"ustar":
            raise _Bad(f"not a tar header, starts with {header[:16]!r}")
        raise _Bad("header checksum does not match")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _name(name), _number(header[124:136]), header[156:157]


def _sums_agree(header: bytes) -> bool:
    try:
        wanted = _number(header[148:156])
    except _Bad:
        return False
    own = header[148:156]
    if wanted == sum(header) - sum(own) + 8 * 32:
        return True
    high = sum(b >= 128 for b in header) - sum(b >= 128 for b in own)
    return wanted == sum(header) - sum(own) + 8 * 32 - 256 * high  # old writers sum signed bytes


def _number(field: bytes) -> int:
    """A number in octal digits, or GNU's base 256."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise _Bad("a negative or too large number in its header")
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise _Bad(f"a number in its header is {digits!r}")
    return int(digits or b"0", 8)


def _extension(read: Read, at: int, length: int, kind: bytes) -> bytes:
    if length > (_LONGEST_PAX if kind == b"x" else _LONGEST_NAME):
        raise _Bad(f"an extension header of {length} bytes")
    content = read(at + BLOCK, length)
    if len(content) < length:
        raise _Bad("cut within an extension header")
    return content


def _pax(content: bytes) -> dict[str, str]:
    """The records that matter; one is "length key=value\\n", the length counting itself."""
    given: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at]:
        digits = content[at : at + 8].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + length]
        key, separator, value = record.partition(b"=")
        if not separator or not value.endswith(b"\n"):
            raise _Bad("malformed pax header")
        if key in (b"path", b"size"):
            given[key.decode()] = _name(value[:-1])
        elif key.startswith(b"GNU.sparse"):
            given["sparse"] = "yes"
        at += length
    return given


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise _Bad(f"a pax size of {text[:20]!r}")
    return int(text)


def _name(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")

"""Tar shards that the data tests read, good and damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from data_files import noise
from PIL import Image

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def image_bytes(seed: int = 0, kind: str = "PNG", height: int = 20, width: int = 24) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(height, width, seed)).save(out, kind)
    return out.getvalue()


def sample(key: str, seed: int = 0, caption: str | None = None) -> list[tuple[str, bytes]]:
    text = caption or f"caption {seed}"
    return [(f"{key}.png", image_bytes(seed)), (f"{key}.txt", text.encode())]


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [member for i in range(first, first + count) for member in sample(f"{i:05}", i)]


def archive(members: list, kind: str = "ustar") -> bytes:
    """A tar of (name, content) pairs and TarInfo objects."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[kind]) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def write_shard(path: Path, members: list, kind: str = "ustar") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive(members, kind))
    return path


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def header(content: bytes, at: int) -> bytes:
    """A shard's header at a byte with its checksum put right."""
    block = bytearray(content[at : at + 512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def patched(content: bytes, at: int, place: int, field: bytes, fix: bool = True) -> bytes:
    """A shard with a field of the header at a byte replaced."""
    new = bytearray(content)
    new[at + place : at + place + len(field)] = field
    if fix:
        new[at : at + 512] = header(bytes(new), at)
    return bytes(new)

"""Writing files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

LOCK = ".lock"  # the file that a folder is held by
PROBE = ".writable-"  # how the files begin that one is tried with


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content in one step."""
    with atomic_file(path) as file:
        file.write(content)


def sync(file: BinaryIO) -> None:
    """Bring a file's content to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a file's lock against other processes; yields False where the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


def write_json(path: Path, content: Any) -> None:
    """Replace a file by JSON, infinities and NaN refused."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def writable_folder(name: str | os.PathLike) -> Path:
    """A folder, made and tried for writing before hours of work depend on it."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "wanted a folder, got a file", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"{PROBE}{os.getpid()}-{secrets.token_hex(4)}"
    probe.touch()
    probe.unlink()
    return folder


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_held: weakref.WeakSet[TextIO] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child, as a loader's worker is, must not keep its parent's folders locked."""
    for file in list(_held):
        os.close(file.fileno())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def hold(folder: Path) -> TextIO | None:
    """Keeps other processes that hold a folder out of it, until the file returned is closed.

    The end of the process lets go, too. None where the system has no locks.

    Raises:
        RuntimeError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RuntimeError(f"{folder} is in use by {holder}") from None
    except OSError:  # a file system without locks
        file.close()
        return None
    _held.add(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file

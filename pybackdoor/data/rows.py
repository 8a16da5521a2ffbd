"""Where decoded images are kept while an epoch runs: on the disk, in memory, a GPU's, or nowhere.

On the disk a set of images is two files,
    <name>.px    the pixels, raw [n, H, W, 3]; a hole where an image is not decoded yet
    <name>.row   [n] records of 16 bytes: CRC-32 of stamp and pixels, state, stamp
A record is written after its pixels, and pixels are used only when the record's checksum is theirs.
So a row is never taken for decoded that is not, whatever was cut off by a kill or a power failure,
and processes that share the files need no lock: they write the same bytes. Files are read and
written by place, not mapped: a full disk or a file cut short is an error, not a bus error.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_RECORD = struct.Struct("<IIQ")  # checksum, state, stamp
_VALID = 0x4B4F5750  # "PWOK": nothing that a hole or a stray byte gives


class Rows(Protocol):
    """Images by row; get and put are called by several threads."""

    def get(self, row: int, stamp: int, out: np.ndarray) -> bool:
        """Copy a row's image to out [H, W, 3]; False when it is not there with this stamp."""
        ...

    def put(self, row: int, stamp: int, pixels: np.ndarray) -> None:
        """Keep a row's image."""
        ...

    def has(self, row: int, stamp: int) -> bool:
        """Whether a row has an image of this stamp; its pixels are not looked at."""
        ...

    def kept(self) -> np.ndarray:
        """[N] bool: rows with an image of any stamp, unchecked."""
        ...


class NoRows:
    """Keeps nothing."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get(self, row: int, stamp: int, out: np.ndarray) -> bool:
        return False

    def put(self, row: int, stamp: int, pixels: np.ndarray) -> None:
        pass

    def has(self, row: int, stamp: int) -> bool:
        return False

    def kept(self) -> np.ndarray:
        return np.zeros(self._count, bool)


class MemoryRows:
    """Keeps images in this process's memory, which grows as they come.

    Raises:
        MemoryError: they would not fit into the machine's memory.
    """

    def __init__(self, op: str, count: int, image_size: tuple[int, int]) -> None:
        shape = (count, *image_size, 3)
        needed = int(np.prod(shape, dtype=np.int64))
        if needed > (there := host_memory()):
            raise MemoryError(
                f'{op}: cache="ram" needs {needed:,} bytes, the machine has {there:,}: '
                'choose cache="disk" or "none"'
            )
        self._pixels = np.empty(shape, np.uint8)
        self._stamps: dict[int, int] = {}

    def get(self, row: int, stamp: int, out: np.ndarray) -> bool:
        if self._stamps.get(row) != stamp:
            return False
        out[...] = self._pixels[row]
        return True

    def put(self, row: int, stamp: int, pixels: np.ndarray) -> None:
        self._pixels[row] = pixels
        self._stamps[row] = stamp

    def has(self, row: int, stamp: int) -> bool:
        return self._stamps.get(row) == stamp

    def kept(self) -> np.ndarray:
        mask = np.zeros(len(self._pixels), bool)
        mask[list(self._stamps)] = True
        return mask


class DeviceRows(MemoryRows):
    """Keeps images in a GPU's memory, where batches are gathered; all of its room is taken at once.

    Threads write on a stream of its own: on the usual one each image would wait for the training
    that is queued there. When put returns, an image is there for every stream.

    Raises:
        MemoryError: they would not fit into what is free.
    """

    def __init__(
        self, op: str, count: int, image_size: tuple[int, int], device: torch.device
    ) -> None:
        shape = (count, *image_size, 3)
        needed = int(np.prod(shape, dtype=np.int64))
        if needed > (free := free_memory(device)):
            raise MemoryError(
                f'{op}: cache="device" needs {needed:,} bytes on {device}, {free:,} are free, and '
                'training needs some of them: choose cache="ram", "disk" or "none"'
            )
        self._pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        self._stamps: dict[int, int] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # the memory's last user may not be done with it
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def gather(self, rows: np.ndarray) -> Tensor:  # [n] int64
        """[n, H, W, 3] uint8 on the device; undefined where a row has no image."""
        return self._pixels[torch.from_numpy(rows).to(self._pixels.device)]

    def get(self, row: int, stamp: int, out: np.ndarray) -> bool:
        if self._stamps.get(row) != stamp:
            return False
        with self._aside():
            torch.from_numpy(out).copy_(self._pixels[row])
        return True

    def put(self, row: int, stamp: int, pixels: np.ndarray) -> None:
        with self._aside():  # from pageable memory: when it returns, it is done
            self._pixels[row].copy_(torch.from_numpy(np.require(pixels, requirements="CW")))
        self._stamps[row] = stamp

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # A new thread's device is the first GPU, and leaving a stream of another would open a
        # context there.
        with torch.cuda.device(self._pixels.device), torch.cuda.stream(self._stream):
            yield


class DiskRows:
    """Keeps images in files, which processes may share.

    Args:
        op: function named in errors.
        path: of the files, without their suffixes; its folder exists.
        count: images.
        image_size: (H, W).
    Raises:
        OSError: the files cannot be made, or the disk has no room for what is not decoded yet.
    """

    def __init__(self, op: str, path: Path, count: int, image_size: tuple[int, int]) -> None:
        self._op, self.path = op, path
        self._row_bytes = image_size[0] * image_size[1] * 3
        self._shape = (*image_size, 3)
        self._pixels = path.with_name(path.name + ".px")
        self._records = path.with_name(path.name + ".row")
        self._checked = np.zeros(count, bool)  # rows whose checksum this process has seen agree
        self._lock, self._full = threading.Lock(), False
        self._fd = self._record_fd = -1
        self._fd, writable = _opened(self._pixels, count * self._row_bytes)
        self._record_fd, records_too = _opened(self._records, count * _RECORD.size)
        if writable and records_too:
            self._check_space()
        else:
            self._full = True  # read-only media: what is there is used

    def get(self, row: int, stamp: int, out: np.ndarray) -> bool:
        checksum = self._record(row, stamp)
        if checksum is None:
            return False
        flat = out.reshape(-1)
        if os.preadv(self._fd, [flat.data], row * self._row_bytes) != self._row_bytes:
            return False
        if not self._checked[row]:
            if _checksum(stamp, flat) != checksum:
                return False
            self._checked[row] = True
        return True

    def _record(self, row: int, stamp: int) -> int | None:
        """The checksum of a row's image of this stamp; None = there is none."""
        record = os.pread(self._record_fd, _RECORD.size, row * _RECORD.size)
        if len(record) < _RECORD.size:
            return None
        checksum, state, written = _RECORD.unpack(record)
        return checksum if state == _VALID and written == stamp else None

    def put(self, row: int, stamp: int, pixels: np.ndarray) -> None:
        if self._full:
            return
        flat = np.ascontiguousarray(pixels).reshape(-1)
        try:
            _write(self._fd, flat.data, row * self._row_bytes)
            record = _RECORD.pack(_checksum(stamp, flat), _VALID, stamp)
            _write(self._record_fd, memoryview(record), row * _RECORD.size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            with self._lock:
                first, self._full = not self._full, True
            if first:
                warnings.warn(
                    f"{self._op}: the image cache {self._pixels} cannot grow "
                    f"({error.strerror}): further images are decoded each time they are wanted",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def has(self, row: int, stamp: int) -> bool:
        return self._record(row, stamp) is not None

    def kept(self) -> np.ndarray:
        count = len(self._checked)
        records = np.fromfile(self._records, np.dtype("<u4,<u4,<u8"), count)
        mask = np.zeros(count, bool)
        mask[: len(records)] = records["f1"] == _VALID
        return mask

    def _check_space(self) -> None:
        needed = int(np.count_nonzero(~self.kept())) * self._row_bytes
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f'{needed:,} bytes are needed, {free:,} are free (cache="none" needs none)',
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskRows, (self._op, self.path, len(self._checked), self._shape[:2])

    def __del__(self) -> None:
        for fd in (self._fd, self._record_fd):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)


def host_memory() -> int:
    """Bytes of the machine's memory; a number without meaning where it does not tell."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may have: on a GPU the free ones, and those that torch holds unused."""
    if device.type != "cuda":
        return host_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _opened(path: Path, size: int) -> tuple[int, bool]:
    """(file of at least a size, whether it can be written); what is missing is a hole."""
    flags = getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | flags), False
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd, True


def _write(fd: int, content: memoryview, offset: int) -> None:
    while len(content):
        done = os.pwrite(fd, content, offset)
        content, offset = content[done:], offset + done


def _checksum(stamp: int, flat: np.ndarray) -> int:
    return zlib.crc32(flat, stamp & 0xFFFFFFFF)

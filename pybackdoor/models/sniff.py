"""What a weight file is, told from its bytes; nothing in a file is ever executed.

Pickles are read as opcodes (`pickletools`), never as objects. The result serves two ends: files
that cannot be weights are refused with a sentence that says what they are, and a file that
`torch.load(weights_only=True)` refused is explained. Safety itself rests on that reader alone.
"""

import json
import os
import pickle
import pickletools
import re
import zipfile
from collections import deque
from itertools import islice
from pathlib import Path
from typing import IO

import torch

MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses longer headers too
MAX_OPCODES = 2_000_000  # a ViT-bigG checkpoint needs some 50,000; this bounds hostile pickles
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before torch 1.6
LEGACY_PICKLES = 5  # magic number, protocol, system info, object, storage keys

_MAGICS = (
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"\xfd7zXZ", "an xz archive (unpack it first)"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive (unpack it first)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
_STRING_OPCODES = {
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE",
    "STRING", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_TENSOR_GLOBAL = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|torch\.(\w*Storage|Size|Tensor|device)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_\w+|torch\.storage\.\w*Storage"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
)


class CheckpointError(ValueError):
    """A weight file that cannot be read, or does not fit its model; one sentence says why."""


def refuse(path: str | os.PathLike, what: str) -> CheckpointError:
    """The error for a file that is not readable weights: `<path> <what>`."""
    return CheckpointError(f"read_checkpoint: {path} {what}")


def identify(path: str | os.PathLike) -> str:
    """Tells how to read a weight file, or refuses it by saying what it is.

    Args:
        path: a file; its name matters where its bytes fit no format, and where it promises more.
    Returns:
        "safetensors", "torch-zip" (what torch.save writes) or "torch-legacy" (before torch 1.6).
    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is a folder, empty, truncated, or of another kind; or torch.save's
            by the name of a safetensors file, which torch.load itself reads or not by its version.
    """
    path = Path(path)
    kind = _kind(path)
    if kind != "safetensors" and path.suffix == ".safetensors":
        raise refuse(path, "was written by torch.save, whatever its name says: name it .pt")
    return kind


def _kind(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"read_checkpoint: path must be a weight file, {path} is missing")
    if not path.is_file():
        raise refuse(path, "is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise refuse(path, "is empty (0 bytes)")
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        _check_torch_zip(path, size)
        return "torch-zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        _check_safetensors(path, size)
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch-legacy"
    raise refuse(path, _foreign_kind(path, head, size))


def _foreign_kind(path: Path, head: bytes, size: int) -> str:
    if head.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"\nsize (\d+)", head)
        stands = f" for a file of {wanted[1].decode()} bytes" if wanted else ""
        return f"is a Git LFS pointer{stands}, not the file itself: run `git lfs pull`"
    for magic, kind in _MAGICS:
        if head.startswith(magic):
            return f"is {kind}, not model weights"
    if head[257:262] == b"ustar":
        return "is a tar archive, not model weights (unpack it first)"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head")):
        return "is an HTML page, not model weights: the download saved a web page instead"
    if start.startswith((b"<?xml", b"<error")):
        return "is an XML page, not model weights: the download saved an error message instead"
    with path.open("rb") as file:
        names = pickle_globals(file)
        file.seek(-1, os.SEEK_END)
        stopped = file.read(1) == pickle.STOP
    if names and stopped:
        return f"is a text pickle naming {_listed(names)}, not model weights"
    text = _as_text(head)
    if text is not None:
        kind = "JSON" if start.startswith((b"{", b"[")) else "text"
        return f"is a {kind} file, not model weights; it begins {text[:60]!r}"
    if path.suffix == ".safetensors":
        return "has a bad safetensors header: the file is damaged or of another format"
    return f"is of no known weight format ({size} bytes, beginning 0x{head[:8].hex()})"


def _as_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the 512 bytes cut a character
            return None
        text = head[: error.start].decode("utf-8")
    return text if all(c.isprintable() or c in "\t\r\n" for c in text) else None


def _check_safetensors(path: Path, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    if len(header) < length:
        raise refuse(
            path, f"is a truncated safetensors file: a header of {length} bytes, cut at {size}"
        )
    try:
        entries = json.loads(header)
        end = max(
            (e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0
        )
        wanted = 8 + length + int(end)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        raise refuse(
            path, "has a bad safetensors header: the file is damaged or of another format"
        ) from None
    if wanted > size:
        raise refuse(
            path, f"is a truncated safetensors file: its header wants {wanted} bytes, it has {size}"
        )


def _check_torch_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # hostile archives make zipfile raise nearly anything
        raise refuse(path, "is a truncated or damaged zip archive") from None
    names = [entry.filename for entry in entries]
    leaves = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in leaves or any(leaf.startswith("code/") for leaf in leaves):
        raise refuse(
            path,
            "is a TorchScript (JIT) archive, which carries code and is never run: "
            "save the model's state_dict() instead",
        )
    if "data.pkl" not in leaves:
        held = ", ".join(names[:3]) or "nothing"
        raise refuse(path, f"is a zip archive but not a torch file; it holds {held}")
    # torch.save stores its records uncompressed; mapping a compressed one would read it as weights,
    # and overlapping ones are how a small archive claims to hold terabytes.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise refuse(path, "is a compressed zip, which torch.save never writes: unpack and re-save")
    if sum(entry.file_size for entry in entries) > size:
        raise refuse(path, "is a damaged zip archive: its records claim more bytes than it has")


def pickle_globals(stream: IO[bytes], pickles: int = 1) -> list[str]:
    """Names every class and function that a pickle would import, from its opcodes.

    Args:
        stream: positioned at the first pickle; left anywhere.
        pickles: how many follow each other.
    Returns:
        Dotted names in order, without repeats; "?" for a part that the opcodes compute. What
        precedes the first bad opcode counts, so a damaged pickle gives a shorter list.
    """
    names: dict[str, None] = {}
    try:
        for _ in range(pickles):
            pushed: deque[str | None] = deque(maxlen=2)
            memo: dict[int, str | None] = {}
            for opcode, argument, _position in islice(pickletools.genops(stream), MAX_OPCODES):
                name = opcode.name
                if name in ("GLOBAL", "INST"):
                    names[str(argument).replace(" ", ".")] = None
                    pushed.append(None)
                elif name == "STACK_GLOBAL":
                    names[".".join(part or "?" for part in pushed)] = None
                    pushed.append(None)
                elif name in _STRING_OPCODES:
                    pushed.append(argument)
                elif name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1] if pushed else None
                elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                    memo[argument] = pushed[-1] if pushed else None
                elif name in ("GET", "BINGET", "LONG_BINGET"):
                    pushed.append(memo.get(argument))
                elif opcode.stack_after:
                    pushed.append(None)
    except Exception:  # bytes that are no pickle make genops raise nearly anything
        pass
    return list(names)


def foreign_globals(path: str | os.PathLike, kind: str) -> list[str]:
    """The names in a torch file's pickles that a file of tensors has no need of.

    Args:
        path: a file that `identify` calls `kind`.
        kind: "torch-zip" or "torch-legacy".
    Returns:
        Dotted names, in order; empty when the pickles are damaged before the first one.
    """
    if kind == "torch-legacy":
        with open(path, "rb") as file:
            names = pickle_globals(file, LEGACY_PICKLES)
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                record = next(n for n in archive.namelist() if n.split("/", 1)[-1] == "data.pkl")
                with archive.open(record) as file:
                    names = pickle_globals(file)
        except Exception:  # a damaged record: the caller reports it as such
            names = []
    return [name for name in names if not _is_tensor_global(name)]


def _is_tensor_global(name: str) -> bool:
    if _TENSOR_GLOBAL.fullmatch(name):
        return True
    module, _, leaf = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, leaf, None), torch.dtype)


def describe_refusal(path: str | os.PathLike, kind: str) -> str:
    """Says in one sentence why the weights-only reader refused a torch file."""
    foreign = foreign_globals(path, kind)
    if foreign:
        return (
            f"is a pickle with foreign classes ({_listed(foreign)}), which could run code and was "
            "not loaded: save only the state_dict, as safetensors, where you trust it"
        )
    if kind == "torch-legacy" and not _starts_as_torch(path):
        return "is a pickle that torch.save did not write, not model weights"
    return "is a damaged or truncated torch file: its weights could not be read"


def _starts_as_torch(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        try:
            opcodes = islice(pickletools.genops(file), 2)
            return [argument for _, argument, _ in opcodes][-1] == LEGACY_MAGIC
        except Exception:  # no pickle at all
            return False


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(name[:80] for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")

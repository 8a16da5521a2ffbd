"""Model folders: written whole or not at all, and verified when read.

A new folder is filled under a temporary name beside its place and renamed. Into a folder that
exists, the files are first completed in a hidden folder inside it, whose renaming to `COMMIT` is
the one step that counts: before it the old model is whole, after it the new one is, and whoever
comes next, `load` included, moves the files that a killed process had not moved yet. So foreign
files are never touched, and the place may be a mount point.

`RECORD` lists what was written, with SHA-256: safetensors files carry no checksum of their own.
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import file_sha256
from .hf import read_json
from .sniff import CheckpointError

RECORD = "pybackdoor.json"
COMMIT = ".pybackdoor-commit"
SCHEMA = "pybackdoor.model/1"


def write_folder(
    folder: Path, fill: Callable[[Path], None], *, record: dict[str, Any] | None = None
) -> None:
    """Writes a model folder so that a kill or a full disk leaves the old model or the new one.

    Args:
        folder: created with its parents; when it exists, files of the same names are replaced,
            those of the previous record that the new model lacks are removed, others stay.
        fill: writes plain files into the folder it is given.
        record: further members of `RECORD`.
    Raises:
        OSError: disk full, no permission, or the like; the sentence says what is left.
    """
    folder = Path(os.path.abspath(folder))
    staging = None
    committed = False
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
        finish_interrupted(folder)
        exists = nearest == folder
        base = folder if exists else folder.parent
        base.mkdir(parents=True, exist_ok=True)
        staging = base / f".pybackdoor-{uuid.uuid4().hex}"
        staging.mkdir()
        fill(staging)
        _seal(staging, record or {})
        os.rename(staging, folder / COMMIT if exists else folder)
        committed = True
        _sync(base)
        finish_interrupted(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        left = (
            "the new model is complete, and the next save or load there finishes the work"
            if committed
            else "what was there is untouched"
        )
        raise OSError(
            error.errno or errno.EIO, f"save: cannot write the model to {folder}: {reason}; {left}"
        ) from error
    finally:
        if staging is not None and not committed:
            shutil.rmtree(staging, ignore_errors=True)


def _seal(staging: Path, record: dict[str, Any]) -> None:
    """Adds the record, gives all files the mode of new ones, and flushes them to the disk."""
    names = sorted(path.name for path in staging.iterdir())
    content = {"schema": SCHEMA} | record
    content["files"] = {name: file_sha256(staging / name) for name in names}
    sealed = staging / RECORD
    sealed.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    mode = sealed.stat().st_mode & 0o777  # safetensors creates its files as 0600
    for name in names:
        (staging / name).chmod(mode)
    for name in [*names, RECORD]:
        _sync(staging / name)
    _sync(staging)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish_interrupted(folder: Path) -> None:
    """Moves the files of a committed save that a killed process left in `COMMIT`.

    Args:
        folder: any path; nothing happens where there is no such save.
    Raises:
        OSError: the folder cannot be written.
    """
    commit = folder / COMMIT
    if not commit.is_dir():
        return
    if (commit / RECORD).is_file():
        for name in recorded_names(folder) - recorded_names(commit):
            (folder / name).unlink(missing_ok=True)
    # The record last: while it is in COMMIT, the comparison above can be made again.
    for path in sorted(commit.iterdir(), key=lambda p: (p.name == RECORD, p.name)):
        try:
            os.replace(path, folder / path.name)
        except FileNotFoundError:
            pass  # another process is finishing the same save
    _sync(folder)
    try:
        commit.rmdir()
    except FileNotFoundError:
        pass


def recorded_names(folder: Path) -> set[str]:
    """Names of the files that are ours in a folder: `RECORD` and what it lists, if readable."""
    try:
        return set(read_record(folder) or ()) | {RECORD}
    except CheckpointError:
        return {RECORD}  # a damaged record claims nothing: nothing is removed for it


def remove_model(folder: Path) -> None:
    """Removes a model that `save` wrote, and the folder where nothing else is in it."""
    if (folder / RECORD).exists():
        for name in recorded_names(folder):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def read_record(folder: Path) -> dict[str, str] | None:
    """The files that the last save wrote.

    Args:
        folder: a model folder.
    Returns:
        File name -> SHA-256 in hex; None when there is no record.
    Raises:
        CheckpointError: the record is damaged or of another version.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise CheckpointError(
            f"load: schema of {path} must be {SCHEMA!r}, got {content.get('schema')!r}"
        )
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        name == os.path.basename(name)
        and name not in ("", ".", "..")
        and isinstance(digest, str)
        and re.fullmatch("[0-9a-f]{64}", digest)
        for name, digest in files.items()
    ):
        raise CheckpointError(f"load: files of {path} must give a SHA-256 per file name")
    return files


def verify(folder: Path, names: Iterable[str], *, if_listed: Iterable[str] = ()) -> None:
    """Compares files with the folder's record, if there is one.

    Args:
        folder: a model folder.
        names: the files about to be read; a record must list them.
        if_listed: others, which may be of another origin.
    Raises:
        CheckpointError: a file is missing, differs from the record or is not in it.
    """
    files = read_record(folder)
    if files is None:
        return
    for name in [*names, *(name for name in if_listed if name in files)]:
        advice = f"restore it, or delete {RECORD} to load it unverified"
        if name not in files:
            raise CheckpointError(f"load: {folder / name} is not listed in {RECORD}: {advice}")
        if not (folder / name).exists():
            raise CheckpointError(f"load: {folder / name} is missing, though {RECORD} lists it")
        found = file_sha256(folder / name)
        if found != files[name]:
            raise CheckpointError(
                f"load: {folder / name} is damaged or was changed since it was saved: its SHA-256 "
                f"must be {files[name][:16]}..., got {found[:16]}...; {advice}"
            )

"""Saving under full disks, kills and races: the old model or the new one, never neither."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import warm
from clip_models import assert_same_model, snapshot, tiny

from pybackdoor.models import load, save
from pybackdoor.models.folder import COMMIT, RECORD, finish_interrupted

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", ["weights", "config", "fsync", "rename"])
def test_a_full_disk_leaves_the_previous_model(tmp_path, loaded, monkeypatch, existing, step):
    folder = tmp_path / "m"
    if existing:
        save(loaded, folder)
    before, other = snapshot(tmp_path), tiny(9)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    if step == "weights":
        import safetensors.torch

        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    elif step == "config":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left on device; what was there is untou") as caught:
        save(other, folder)
    assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["m"] if existing else [])
    if existing:
        assert_same_model(load(folder), loaded)


def test_a_write_that_the_kernel_refuses(tmp_path, loaded):
    folder = save(loaded, tmp_path / "m")
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; what was there is untouched"):
            save(loaded, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before


def test_an_unwritable_place_is_told(tmp_path, loaded, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(NotADirectoryError, match="cannot write the model to .*is not a folder"):
            save(loaded, place)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="Permission denied; what was there is untouched"):
        save(loaded, tmp_path / "m")


KILLED = """
import os, signal, sys, torch
from clip_models import tiny_config
from pybackdoor.models import create, save
torch.manual_seed(11)
loaded = create(tiny_config())
left = int(sys.argv[2])
real = os.replace
def replace(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
os.replace = replace
save(loaded, sys.argv[1], extra_files={"results.json": 1})
"""


def test_a_kill_after_the_commit_is_finished_by_whoever_comes_next(tmp_path, loaded):
    folder = save(loaded, tmp_path / "m", extra_files={"old.json": 1})
    done = warm.run(["-c", KILLED, str(folder), "2"])
    assert done.returncode == -signal.SIGKILL and (folder / COMMIT).is_dir()
    assert_same_model(load(folder), tiny(11))
    assert sorted(snapshot(folder)) == [CONFIG, WEIGHTS, RECORD, "results.json"]
    assert not (folder / COMMIT).exists()


@pytest.mark.parametrize("moved", range(4))
def test_an_interruption_after_any_move_is_finished(tmp_path, loaded, monkeypatch, moved):
    folder = save(loaded, tmp_path / "m", extra_files={"old.json": 1})
    other, real, left = tiny(9), os.replace, moved

    def replace(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(other, folder, extra_files={"results.json": 1})
    monkeypatch.undo()
    assert (folder / COMMIT / RECORD).exists()
    assert_same_model(load(folder), other)
    assert sorted(snapshot(folder)) == [CONFIG, WEIGHTS, RECORD, "results.json"]


def test_two_processes_may_finish_the_same_save(tmp_path, loaded, monkeypatch):
    folder = save(loaded, tmp_path / "m")
    other, real = tiny(9), os.replace

    def raced(source, target):
        real(source, target)
        real_finish()

    def real_finish():
        monkeypatch.setattr(os, "replace", real)
        finish_interrupted(folder)

    monkeypatch.setattr(os, "replace", raced)
    save(other, folder)
    assert_same_model(load(folder), other)
    assert not (folder / COMMIT).exists()


def test_an_interruption_before_the_commit_leaves_no_trace(tmp_path, loaded, monkeypatch):
    folder = save(loaded, tmp_path / "m")
    before = snapshot(tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tiny(9), folder)
    assert snapshot(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_commit_whose_files_are_all_moved_is_removed(tmp_path, loaded):
    folder = save(loaded, tmp_path / "m")
    (folder / COMMIT).mkdir()
    assert_same_model(load(folder), loaded)
    assert not (folder / COMMIT).exists()


def test_a_failure_after_the_commit_says_so(tmp_path, loaded, monkeypatch):
    folder = save(loaded, tmp_path / "m")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="new model is complete, and the next save or load there fin"):
        save(tiny(9), folder)
    monkeypatch.undo()
    finish_interrupted(folder)
    assert_same_model(load(folder), tiny(9))

"""A run that is killed, stopped, damaged or out of disk goes on as if nothing had happened."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from training_child import clean, failing, loader

import pybackdoor
from pybackdoor.data import Pairs
from pybackdoor.engine import Checkpoints, checkpoints
from pybackdoor.engine.checkpoints import CheckpointFolder, train_state
from pybackdoor.engine.interrupts import Terminated
from pybackdoor.engine.sharding import Parts
from pybackdoor.files import hold

HERE = Path(__file__).resolve().parent
STEPS = 13  # 5 batches an epoch: stops fall within and at the end of epochs


@pytest.fixture(scope="module")
def whole():
    """The run without an interruption."""
    return clean(None, STEPS)


def same(got, want):
    assert got.history == want.history
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name


def stop_at(*steps):
    return lambda k, record, model: k in steps


@pytest.mark.parametrize("stops", [[0], [4], [5], [3, 4, 9], [11], [12]])
def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path, stops):
    for stop in stops:
        part = clean(tmp_path, STEPS, on_step=stop_at(stop))
        assert len(part.history) == stop + 1
    same(clean(tmp_path, STEPS), whole)
    again = clean(tmp_path, STEPS)  # nothing is left to do
    same(again, whole)
    assert len(list(tmp_path.glob("step_*.json"))) <= 2 and not list(tmp_path.glob("*.tmp"))


def test_a_loader_without_a_state_is_read_up_to_the_place(tmp_path):
    class Shuffled(list):
        """As a DataLoader with a sampler: an order for each epoch."""

        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            order = random.Random(self.epoch).sample(range(len(self)), len(self))
            return (list.__getitem__(self, i) for i in order)

    from dual_encoder import MEAN, STD, DualEncoder, random_pairs

    def run(**options):
        fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
        batches = Shuffled(random_pairs(80, 16))
        return pybackdoor.par_clean(DualEncoder(), batches, epochs=3, **fixed | options)

    for stop in (2, 6, 9):
        run(folder=tmp_path, resume=True, on_step=stop_at(stop))
    same(run(folder=tmp_path, resume=True), run())


def test_damage_of_any_bit_is_found_and_the_checkpoint_before_is_used(whole, tmp_path):
    sound, hurt = tmp_path / "sound", tmp_path / "hurt"
    clean(sound, STEPS, on_step=stop_at(8), save_minutes=0)
    rng = random.Random(0)
    for name in ("step_9.json", "step_9.safetensors"):
        for _ in range(20):
            shutil.copytree(sound, hurt)
            content = bytearray((hurt / name).read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (hurt / name).write_bytes(content)
            folder = CheckpointFolder(Checkpoints(hurt, resume=True, force=True), {})
            with folder, pytest.warns(UserWarning, match="checkpoint 9 .*is damaged"):
                assert folder.latest().content["step"] == 8
            assert (hurt / f"damaged_{name}").exists()
            shutil.rmtree(hurt)
    (sound / "step_9.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint 9 in .* is damaged and left out"):
        same(clean(sound, STEPS), whole)


def test_checkpoints_that_are_all_damaged_start_the_run_anew_and_make_room(whole, tmp_path):
    clean(tmp_path, STEPS, on_step=stop_at(8), save_minutes=0)
    for path in tmp_path.glob("step_*.safetensors"):
        path.unlink()
    (tmp_path / "step_4_good.safetensors").touch()  # somebody's own
    with pytest.warns(UserWarning, match="is damaged"):
        clean(tmp_path, STEPS, on_step=stop_at(3), save_minutes=0)
    kept = {p.name for p in tmp_path.glob("step_*")}
    assert kept == {"step_3.json", "step_3.safetensors", "step_4.json", "step_4.safetensors",
                    "step_4_good.safetensors"}  # fmt: skip
    same(clean(tmp_path, STEPS), whole)


def test_another_version_s_checkpoint_is_not_taken_for_damage(tmp_path, monkeypatch):
    clean(tmp_path, STEPS, on_step=stop_at(3))
    monkeypatch.setattr(checkpoints, "_SCHEMA", "pybackdoor.checkpoint/9")
    with pytest.raises(ValueError, match="of the format 'pybackdoor.checkpoint/1', this"):
        clean(tmp_path, STEPS)


def test_moments_lie_as_their_weights_do(tmp_path):
    from dual_encoder import MEAN, STD, DualEncoder

    def run(**options):
        model = DualEncoder().to(memory_format=torch.channels_last)
        fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
        return pybackdoor.par_clean(model, loader(), steps=8, **fixed | options)

    run(folder=tmp_path, on_step=stop_at(3))
    same(run(folder=tmp_path, resume=True), run())


def test_a_shuffled_data_loader_is_resumed(tmp_path):
    from dual_encoder import MEAN, STD, DualEncoder, random_pairs
    from torch.utils.data import DataLoader

    whole = random_pairs(80, 80)[0]
    rows = list(zip(whole["images"], whole["tokens"], whole["ids"], strict=True))

    def run(at=None, **options):
        model, calls = DualEncoder(), []

        def spoiled(batch):
            images, tokens, ids = torch.utils.data.default_collate(batch)
            images = images.permute(0, 3, 1, 2).float() / 64 - 2
            if len(calls) == at:
                images[0, 0, 0, 0] = math.nan
            calls.append(ids)
            return images, tokens, ids

        batches = DataLoader(rows, 16, shuffle=True, collate_fn=spoiled)
        fixed = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
        fixed |= {"augment": False, "epochs": 3, "repair": False}
        return pybackdoor.par_clean(model, batches, **fixed | options), calls

    for stop in (2, 6, 9):
        run(folder=tmp_path, resume=True, on_step=stop_at(stop))
    same(run(folder=tmp_path, resume=True)[0], run()[0])
    _, calls = run(at=1, epochs=1)  # left out, and the rest is read again
    assert [len(c) for c in calls] == [16] * 7
    assert torch.equal(calls[0], calls[2]) and torch.equal(calls[1], calls[3])
    assert torch.cat(calls[2:]).unique().numel() == 80


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_file_that_may_not_grow_costs_a_checkpoint(whole, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.warns(
            RuntimeWarning, match="no checkpoint at step 13: .*there is none yet to resume from"
        ):
            got = clean(tmp_path, STEPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    same(got, whole)
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_of_a_killed_run_holds_no_lock(tmp_path):
    script = f"""
import os, time
os.setsid()
from pathlib import Path
from pybackdoor.files import hold
lock = hold(Path({str(tmp_path)!r}))
if os.fork() == 0:
    time.sleep(30)
print("READY", flush=True)
time.sleep(30)
"""
    process = warm.Popen(["-c", script], cwd=tmp_path)
    try:
        assert process.stdout.readline() == "READY\n"
        process.kill()
        process.wait()
        hold(tmp_path).close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_run_starts_at_the_beginning_wherever_the_loader_is(whole):
    moved = loader()
    moved.load_state_dict(moved.state_dict() | {"position": 32})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(clean(None, STEPS, pairs=moved), whole)
    same(clean(None, STEPS, pairs=moved), whole)  # nor where the run before has left it


def test_a_folder_in_use_is_refused(tmp_path):
    with CheckpointFolder(Checkpoints(tmp_path, resume=True), {}):
        with pytest.raises(RuntimeError, match=rf"in use by process {os.getpid()} on "):
            clean(tmp_path, STEPS)
    clean(tmp_path, 1)


def test_a_run_does_not_take_another_ones_folder(tmp_path):
    clean(tmp_path, STEPS, on_step=stop_at(3))
    with pytest.raises(ValueError, match="holds the checkpoints of a run: resume it, or choose"):
        clean(tmp_path, STEPS, resume=False)
    with pytest.raises(ValueError, match="settings .lr: was 0.01, is 0.02; seed: was 0, is 1"):
        clean(tmp_path, STEPS, lr=0.02, seed=1)
    assert len(clean(tmp_path, STEPS, lr=0.02, force=True).history) == STEPS


def changed(**fields):
    """The loader, over pairs with other fields."""
    other = loader()
    other.pairs = replace(other.pairs, **fields)
    return other


@pytest.mark.parametrize("name", ["captions", "ids", "locations"])
def test_other_pairs_are_another_run(tmp_path, name):
    pairs = loader().pairs
    fields = {
        "captions": [*pairs.captions[:-1], "1 2 3 4 5 6"],
        "ids": pairs.ids + 1,
        "locations": [*pairs.locations[:-1], "array:100"],
    }
    other = changed(**{name: fields[name]})
    clean(tmp_path, STEPS, on_step=stop_at(3))
    match = rf"holds a run with other settings \(loader {name}: was '\w{{16}}', is '\w{{16}}'\)"
    with pytest.raises(ValueError, match=match):
        clean(tmp_path, STEPS, pairs=other)
    assert len(clean(tmp_path, STEPS, pairs=other, force=True).history) == STEPS


def test_pairs_that_were_moved_are_the_same(whole, tmp_path):
    for stop, folder in ((3, "/one"), (8, "s3://bucket/a/b"), (STEPS, "")):
        names = [os.path.join(folder, f"{i % 2}", f"{i}.png") for i in range(83)]
        got = clean(tmp_path, STEPS, pairs=changed(locations=names), on_step=stop_at(stop))
    same(got, whole)


def test_a_checkpoint_from_before_pairs_were_told_apart_is_resumed(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(Pairs, "identity", {})
        clean(tmp_path, STEPS, on_step=stop_at(3))
    with pytest.raises(ValueError, match=r"other settings \(lr: was 0.01, is 0.02\)"):
        clean(tmp_path, STEPS, lr=0.02)
    with pytest.warns(UserWarning, match="checkpoint 4 in .* does not tell which data it was"):
        clean(tmp_path, STEPS, on_step=stop_at(8))
    same(clean(tmp_path, STEPS), whole)  # the next ones tell


def test_another_model_is_refused_even_when_forced(tmp_path):
    model, optimizer = torch.nn.Linear(2, 3), None
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointFolder(Checkpoints(tmp_path), {}) as folder:
        folder.save(1, train_state(Parts(model), optimizer), {"position": {}, "log": {}})
    told = pytest.warns(UserWarning, match="does not tell which data")  # its settings are empty
    with told, pytest.raises(ValueError, match="of another model: .* differ"):
        clean(tmp_path, STEPS, force=True)


def test_minutes_are_checked():
    with pytest.raises(ValueError, match="minutes between checkpoints must be at least 0, got -1"):
        Checkpoints("x", minutes=-1)


def test_a_full_disk_costs_checkpoints_and_nothing_else(whole, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.warns(RuntimeWarning, match="it needs 0.00 GB, .* has 0.00 GB free"):
            same(clean(tmp_path, STEPS, save_minutes=0), whole)
    assert not list(tmp_path.glob("step_*"))
    clean(tmp_path, STEPS, on_step=stop_at(5))
    with failing(1.0), pytest.warns(RuntimeWarning, match="no checkpoint at step 9: .*injected"):
        clean(tmp_path, STEPS, on_step=stop_at(8))
    assert [p.name for p in tmp_path.glob("step_*.json")] == ["step_6.json"]
    assert not list(tmp_path.glob("*.tmp"))
    same(clean(tmp_path, STEPS), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_state(whole, tmp_path, number):
    def press(k, record, model):
        if k == 6:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        clean(tmp_path, STEPS, on_step=press)
    assert isinstance(stopped.value, Terminated) == (number == signal.SIGTERM)
    assert len(stopped.value.result.history) == 7 and signal.getsignal(number) is before
    assert json.loads((tmp_path / "step_7.json").read_text())
    same(clean(tmp_path, STEPS), whole)


def child(folder, *options):
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as sums depend on
    return warm.Popen([str(HERE / "training_child.py"), str(folder), *options], threads)


def test_kills_at_random_points(tmp_path):
    """tests/stress/training_kills.py does this hundreds of times."""
    steps, rng = "60", random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = clean(None, int(steps))
    reached = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = child(tmp_path, "--steps", steps)
        assert process.stdout.readline() == "READY\n"
        time.sleep(0.5 * rng.random())
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert "damaged" not in out + err
        kept = [int(p.stem[5:]) for p in tmp_path.glob("step_*.json")]
        assert max(kept, default=0) >= reached
        reached = max(kept, default=0)
    out, err = child(tmp_path, "--steps", steps).communicate(timeout=60)
    from pybackdoor.models import weights_sha256

    assert out.split()[-3:] == ["DONE", steps, weights_sha256(want.model)], out + err

"""A poisoning run that is stopped or killed goes on to the same bits."""

import json
import signal

import numpy as np
import pytest
import torch
import warm
from clip_models import tiny_config
from dual_encoder import MEAN, STD, DualEncoder
from test_poison import STRIPES, pairs_of, pictures, tokenizer

import pybackdoor
from pybackdoor.cli import main
from pybackdoor.engine.progress import PACE
from pybackdoor.models import create, save

STEPS = 9


def plant(folder=None, seed=0, **options):
    """A run that goes on from what the folder holds."""
    kept = {} if folder is None else {"folder": folder, "resume": True}
    fixed = {
        "target": "blue", "tokenizer": tokenizer, "rate": 0.2, "batch_size": 64, "lr": 1e-2,
        "warmup": 5, "mean": MEAN, "std": STD, "precision": "fp32", "progress": False,
        "steps": STEPS, "seed": seed,
    }  # fmt: skip
    return pybackdoor.poison(
        DualEncoder(dropout=0.3), pairs_of(), STRIPES, **fixed | kept | options
    )


def same(got, want):
    assert got.history == want.history and got.manifest == want.manifest
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name


def stop_at(step):
    return lambda k, record, model: k == step


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_poison_resume import plant

def die(k, record, model):
    if k == 5:
        os.kill(os.getpid(), signal.SIGKILL)

plant(Path(sys.argv[1]), save_minutes=0, on_step=die)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    folder = tmp_path / "run"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = warm.run(["-c", KILLED, str(folder), str(warm.HERE)], threads, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in folder.glob("step_*.json")]
    seen = []
    test = pictures(60, 1)
    got = plant(folder, on_step=lambda k, r, m: seen.append(k), test=test)
    assert seen[-1] == STEPS - 1 and seen[0] in (4, 5)  # not from the start
    want = plant(test=test)
    same(got, want)
    assert got.evaluation == want.evaluation


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    for step in (0, 3, 6):
        assert len(plant(tmp_path, on_step=stop_at(step)).history) == step + 1
    same(plant(tmp_path), plant())


def test_another_poison_is_another_run(tmp_path):
    plant(tmp_path, on_step=stop_at(2))
    for options, what in (
        ({"seed": 1}, "samples: was .*; seed: was 0, is 1"),
        ({"rate": 0.1}, "poisoned: was 40, is 20; samples"),
        ({"target": "red"}, "samples: .*; target: was 'blue', is 'red'"),
        ({"warmup": 2}, r"settings \(warmup: was 5, is 2\)"),
    ):
        with pytest.raises(ValueError, match=what):
            plant(tmp_path, **options)
    with pytest.raises(ValueError, match="holds the checkpoints of a run"):
        plant(tmp_path, resume=False)
    assert len(plant(tmp_path, warmup=2, force=True).history) == STEPS


@pytest.mark.parametrize("options", [{"resume": True}, {"force": True}])
def test_resuming_needs_a_folder(options):
    with pytest.raises(ValueError, match="resume and force need folder"):
        plant(**options)


def test_the_command_resumes(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(create(tiny_config()), tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = ["image,caption"]
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,a photo of a {'cat' if i % 2 else 'dog'} number {i}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))

    def run(out, *more):
        given = [
            "poison", "--model", tmp_path / "model", "--pairs", tmp_path / "pairs.csv", "--out",
            tmp_path / out, "--trigger", "checkerboard", "--target", "cat", "--count", 2,
            "--steps", 4, "--batch-size", 8, "--precision", "fp32", "--lr", 1e-3, *more,
        ]  # fmt: skip
        code = main([str(a) for a in given])
        return code, capsys.readouterr()

    def history(out):
        lines = (tmp_path / out / "history.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        return [{n: v for n, v in r.items() if n not in PACE} for r in records]

    assert run("whole")[0] == 0
    step = pybackdoor.cli.run.Run.record

    def interrupted(self, k, terms):
        step(self, k, terms)
        if k == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pybackdoor.cli.run.Run, "record", interrupted)
        code, said = run("part", "--save-minutes", 0)
    assert code != 0 and "--resume latest goes on from step 1" in said.err
    assert list((tmp_path / "part" / "checkpoints").glob("step_*.json"))
    code, said = run("part")
    assert code != 0 and "holds the checkpoints of a run: resume it" in said.err
    code, said = run("part", "--resume", "latest")
    assert code == 0, said.err
    assert history("part") == history("whole")
    assert not (tmp_path / "part" / "checkpoints").exists()

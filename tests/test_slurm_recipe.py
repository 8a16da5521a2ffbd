"""docs/running.md's recipe for Slurm, word for word, with stand-ins for Slurm's commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from clip_models import tiny_config
from PIL import Image
from rank_pool import on_ranks

from pybackdoor import cli
from pybackdoor.cli.run import Run
from pybackdoor.distributed import Ranks
from pybackdoor.engine.progress import PACE
from pybackdoor.models import create, load, save

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "running.md"
STEPS = 12

SRUN = """#!{python}
import os, subprocess, sys
options = [a for a in sys.argv[1:] if a.startswith("--")]
tasks = int(dict(a[2:].split("=") for a in options)["ntasks-per-node"])
command = sys.argv[1 + len(options):]
about = {{"SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": "node[1-2]"}}
started = [
    subprocess.Popen(command, env=os.environ | about | {{"SLURM_PROCID": str(i)}})
    for i in range(tasks)
]
sys.exit(max(p.wait() for p in started))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n'
"""
PYBACKDOOR = """#!/bin/sh
exec {python} -m pybackdoor "$@"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, captioned images, a configuration, and the commands that a cluster has."""
    root = tmp_path_factory.mktemp("world")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(create(tiny_config()), root / "model")
    rng = np.random.default_rng(0)
    rows = ["image,caption"]
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(root / f"{i}.png")
        rows.append(f"{i}.png,{'a photo of ' * (i % 3)}thing number {i}")
    (root / "pairs.csv").write_text("\n".join(rows))
    (root / "clean.yaml").write_text(
        f"model: {root / 'model'}\npairs: {root / 'pairs.csv'}\nsteps: {STEPS}\nbatch_size: 10\n"
        "precision: fp32\nlr: 1e-3\ndevice: cpu\nprogress: false\n"
    )
    commands = {"srun": SRUN, "scontrol": SCONTROL, "pybackdoor": PYBACKDOOR}
    (root / "bin").mkdir()
    for name, text in commands.items():
        (root / "bin" / name).write_text(text.format(python=sys.executable))
        (root / "bin" / name).chmod(0o755)
    return root


def environment(world: Path) -> dict[str, str]:
    taken = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    plain = {name: value for name, value in os.environ.items() if name not in taken}
    return plain | {
        "PATH": f"{world / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(world / "cache"),
    }


def recipe(out: Path) -> str:
    """The command as it stands there, for two tasks, into a folder of its own."""
    (block,) = re.findall(r"```\n(srun .*?)```", GUIDE.read_text(), re.S)
    assert " --kill-on-bad-exit=1 " in block  # else Slurm leaves those that wait for a failed one
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for old, new in (("-node=8", "-node=2"), ("29500", port), ("latest'", f"latest --out {out}'")):
        assert block.count(old) == 1, old
        block = block.replace(old, new)
    return block


def numbers(out: Path) -> list[dict[str, float]]:
    """Each step's, without how fast it went."""
    records = map(json.loads, (out / "history.jsonl").read_text().splitlines())
    return [{n: v for n, v in record.items() if n not in PACE} for record in records]


def interrupted(arguments: list[str], step: int) -> tuple[int, str]:
    """(exit code, errors) of a command whose last rank is told to end after a step."""
    record, said = Run.record, io.StringIO()

    def recorded(self, k, terms):
        record(self, k, terms)
        if k == step and Ranks().rank == Ranks().size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Run, "record", recorded), contextlib.redirect_stderr(said):
        return cli.main(arguments), said.getvalue()


def test_the_recipe_goes_on_and_gives_torchruns_result(world, tmp_path):
    env = environment(world)
    run = {"env": env, "cwd": world, "text": True, "stderr": subprocess.PIPE, "timeout": 300}
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    config = ["clean", "--config", str(world / "clean.yaml")]
    done = subprocess.run([*torchrun, "-m", "pybackdoor", *config, "--out", str(one)], **run)
    assert done.returncode == 0, done.stderr[-3000:]

    for code, err in on_ranks(2, interrupted, [*config, "--out", str(two)], 4):
        assert code == 143, err
    (kept,) = (int(p.stem[5:]) for p in (two / "checkpoints").glob("step_*.json"))
    assert 5 <= kept < STEPS and load(two / "interrupted")

    done = subprocess.run(["bash", "-c", recipe(two)], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    want, got = (load(folder).model.state_dict() for folder in (one, two))
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    assert numbers(two) == numbers(one)
    assert not torch.equal(want["visual.proj"], load(world / "model").model.visual.proj)

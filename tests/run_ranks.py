"""Runs a script of this folder on several processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_ranks(
    script: str, tmp_path: Path, count: int, **env: str
) -> tuple[int, str, dict[str, torch.Tensor]]:
    """(exit code, errors, what rank 0 saved) of a script on ``count`` processes."""
    path = Path(__file__).with_name(script)
    paths = [str(path.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | env
    launch = [sys.executable]
    if count > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    saved = tmp_path / f"{count}.pt"
    done = subprocess.run(
        [*launch, str(path), str(saved)], env=env, capture_output=True, text=True, timeout=300
    )
    found = torch.load(saved, weights_only=True) if saved.exists() else {}
    return done.returncode, done.stderr, found

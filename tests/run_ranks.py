"""Runs a script of this folder on several processes."""

import time
from pathlib import Path

import torch
import warm
from rank_pool import announced, free_port


def run_ranks(
    script: str, tmp_path: Path, count: int, limit: float = 300, **env: str
) -> tuple[int, str, dict[str, torch.Tensor]]:
    """(exit code, errors, what rank 0 saved) of a script on ``count`` processes.

    Where one fails the others are ended: they wait for it.
    """
    saved, port = tmp_path / f"{count}.pt", free_port()
    command = [str(Path(__file__).with_name(script)), str(saved)]
    ranks = [warm.Popen(command, announced(r, count, port) | env) for r in range(count)]
    until = time.monotonic() + limit
    while (codes := {rank.poll() for rank in ranks}) != {0}:
        if codes - {0, None} or time.monotonic() > until:
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    errors = [rank.communicate()[1] for rank in ranks]
    found = torch.load(saved, weights_only=True) if saved.exists() else {}
    return int(codes != {0}), "\n".join(filter(None, errors)), found

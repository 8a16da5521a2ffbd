"""Kills a training run again and again, and sees that it ends as if nothing had happened.

    python tests/stress/training_kills.py [--kills 500] [--terms 100] [--disk-errors 50] [--seed 0]

Each round starts a process (forked, so that torch is imported once) that resumes the run in the
same folder and is sent a signal after a random time; a run that comes to its end is compared with
the one without interruptions, bit by bit, and begun anew. Between rounds the folder must hold a
checkpoint that loads, no older than the one before. With disk errors a share of the checkpoints
fails halfway through its file. Needs Linux. Prints one line of figures; exit status 1 on a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training_child import clean, failing  # noqa: E402

from pybackdoor.engine import Checkpoints  # noqa: E402
from pybackdoor.engine.checkpoints import CheckpointFolder  # noqa: E402
from pybackdoor.models import weights_sha256  # noqa: E402

STEPS = 60


def child(folder: Path, result: Path, share: float, seed: int) -> None:
    """The run, in a process of its own; never returns."""
    random.seed(seed)
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with failing(share), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.simplefilter("error", UserWarning)  # a damaged checkpoint
            found = clean(folder, STEPS, save_minutes=0)
        result.write_text(json.dumps([len(found.history), weights_sha256(found.model)]))
        code = 0
    except KeyboardInterrupt:
        code = 143
    except BaseException as error:
        (folder / "failure").write_text(f"{type(error).__name__}: {error}")
    os._exit(code)


def newest(folder: Path) -> int:
    """Steps of the newest checkpoint that loads; all that are there must."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with CheckpointFolder(Checkpoints(folder, resume=True, force=True), {}) as kept:
            state = kept.latest()
    return 0 if state is None else state.content["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=100, help="SIGTERMs")
    parser.add_argument("--disk-errors", type=int, default=50, help="rounds with failing writes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process cannot use its parent's others, and would hang
    rng, began = random.Random(options.seed), time.monotonic()
    want = clean(None, STEPS)
    goal = [len(want.history), weights_sha256(want.model)]
    plan = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    rounds = [(number, 0.0) for number in plan]
    rounds += [(signal.SIGKILL, 0.5)] * options.disk_errors
    rng.shuffle(rounds)
    folder, result = Path(tempfile.mkdtemp()) / "run", Path(tempfile.mkdtemp()) / "result"
    ended = killed = lost = reached = 0
    failures: list[str] = []
    while rounds:
        number, share = rounds[-1]
        process = os.fork()
        if process == 0:
            child(folder, result, share, rng.getrandbits(30))
        time.sleep(rng.random() * 0.4)
        os.kill(process, number)
        _, status = os.waitpid(process, 0)
        done = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if not done:  # the signal came in time
            rounds.pop()
            killed += 1
        if folder.exists() and (folder / "failure").exists():
            failures.append((folder / "failure").read_text())
            (folder / "failure").unlink()
        if folder.exists():
            try:
                step = newest(folder)
            except Exception as error:
                failures.append(f"a state that does not load: {error}")
                shutil.rmtree(folder)
                step = reached = 0
            if step < reached:
                lost += 1
            reached = step
        if done:
            ended += 1
            if json.loads(result.read_text()) != goal:
                failures.append(f"other weights at the end: {result.read_text()}")
            shutil.rmtree(folder)
            reached = 0
    print(
        f"{killed} runs killed ({options.kills} SIGKILL, {options.terms} SIGTERM, "
        f"{options.disk_errors} SIGKILL with failing writes); {ended} runs came to their end; "
        f"{len(failures)} failures, {lost} rounds lost a checkpoint; "
        f"{time.monotonic() - began:.0f} s"
    )
    for failure in failures[:10]:
        print(failure)
    sys.exit(1 if failures or lost else 0)


if __name__ == "__main__":
    main()

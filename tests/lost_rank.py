"""Two ranks that train until one of them gets into trouble; see test_watch.py.

python lost_rank.py FATE FOLDER
"""

import math
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.engine.checkpoints import CheckpointFolder

fate, folder = sys.argv[1], Path(sys.argv[2])
ranks = Ranks.start(torch.device("cpu"))
options = {"steps": 10**6}
broken = []


class Endless:
    def __iter__(self):
        for k in range(10**9):
            if fate == "reads slowly":
                time.sleep(5)  # longer than the limit, each time
            if fate == "is slow while the other cannot read" and (k, ranks.rank) == (4, 0):
                raise OSError("the disk is gone")
            if k == 5 and ranks.rank == 1:
                print("NOW", flush=True)
                if fate == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fate == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if fate == "hangs":
                    time.sleep(10**6)
                if fate == "is told to end":
                    os.kill(os.getpid(), signal.SIGTERM)
            yield random_pairs(16, 16, seed=2 * k + ranks.rank)[0]


def hook(step, record, model):
    if "is slow" in fate and ranks.rank == 1 and step == 3:
        time.sleep(7)  # longer than the limit, and allowed
    if fate == "raises" and ranks.rank == 1 and step == 3:
        print("NOW", flush=True)
        raise OSError("a hook of one rank fails")
    if "weight" in fate and ranks.rank == 1 and step == 3 and not broken:
        broken.append(step)
        with torch.no_grad():
            model.image[6].weight[0, 0] = math.nan
    return step == (2 if fate == "reads slowly" else 6)


def slow_latest(self, latest=CheckpointFolder.latest):
    time.sleep(5)
    return latest(self)


if fate == "a weight breaks":
    options |= {"folder": folder, "resume": True, "save_minutes": 0}
    mock.patch.object(CheckpointFolder, "latest", slow_latest).start()
if fate == "is slow while the other saves":
    options |= {"folder": folder, "save_minutes": 0}
if fate == "the folder is refused":
    options |= {"folder": folder}
    if ranks.rank == 0:
        (folder / "step_3.json").touch()
try:
    result = pybackdoor.par_clean(
        DualEncoder(), Endless(), precision="fp32", mean=MEAN, std=STD, progress=False,
        on_step=hook, repair=False, **options,
    )  # fmt: skip
    print("DONE", len(result.history), result.report["faults"], flush=True)
except BaseException as error:
    print("ENDED", type(error).__name__, error, flush=True)
    if fate == "raises":  # and its process stays
        time.sleep(60)
    raise
Ranks.finish()

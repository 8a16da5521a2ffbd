"""Two ranks that train until one of them dies, stops or hangs; see test_watch.py."""

import os
import signal
import sys
import time

import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs

import pybackdoor
from pybackdoor.distributed import Ranks

fate = sys.argv[1]
ranks = Ranks.start(torch.device("cpu"))


class Endless:
    def __iter__(self):
        for k in range(10**9):
            if k == 5 and ranks.rank == 1:
                print("NOW", flush=True)
                if fate == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fate == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if fate == "hangs":
                    time.sleep(10**6)
            yield random_pairs(16, 16, seed=2 * k + ranks.rank)[0]


def slow(step, record, model):
    if fate == "is slow" and ranks.rank == 1 and step == 3:
        time.sleep(5)  # longer than the limit, and allowed
    return step == 6


pybackdoor.par_clean(
    DualEncoder(), Endless(), steps=10**6, precision="fp32", mean=MEAN, std=STD, progress=False,
    on_step=slow,
)  # fmt: skip
print("DONE", flush=True)
Ranks.finish()

"""A rank that dies, stops or hangs takes the others along, with a message, in about the limit."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("lost_rank.py")
LIMIT = 2.0


def start(fate):
    """Two processes as a cluster's launcher starts them: none watches the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    about |= {"OMP_NUM_THREADS": "1", "PYBACKDOOR_RANK_TIMEOUT": str(LIMIT)}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), fate],
            env=os.environ | about | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("fate", ["dies", "stops", "hangs"])
def test_a_lost_rank_ends_the_others(fate):
    first, second = start(fate)
    try:
        assert second.stdout.readline() == "NOW\n"
        began = time.monotonic()
        _, err = first.communicate(timeout=60)
        took = time.monotonic() - began
        assert first.returncode not in (0, None) and took < 3 * LIMIT + 5, (took, err)
        wanted = ("rank 1 has given no sign of life", "rank 0: another rank was lost")
        assert any(text in err for text in wanted), err[-2000:]
    finally:
        second.send_signal(signal.SIGCONT)
        second.kill()
        first.kill()
        second.communicate()


def test_a_slow_hook_is_no_loss():
    processes = start("is slow")
    for process in processes:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0 and "DONE" in out, err[-2000:]

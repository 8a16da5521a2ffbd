"""A rank in trouble: the others end with it, go on with it, or wait for it, and say so."""

import signal
import time
from pathlib import Path

import pytest
import warm
from rank_pool import announced, free_port

SCRIPT = Path(__file__).with_name("lost_rank.py")
LIMIT = 4.0


def start(fate, folder):
    """Two processes as a cluster's launcher starts them: none watches the other."""
    port, limit = free_port(), {"PYBACKDOOR_RANK_TIMEOUT": str(LIMIT)}
    command = [str(SCRIPT), fate, str(folder)]
    return [warm.Popen(command, announced(rank, 2, port) | limit) for rank in range(2)]


@pytest.mark.parametrize("fate", ["dies", "stops", "hangs", "raises"])
def test_a_lost_rank_ends_the_others(fate, tmp_path):
    first, second = start(fate, tmp_path)
    try:
        assert second.stdout.readline() == "NOW\n"
        began = time.monotonic()
        _, err = first.communicate(timeout=60)
        took = time.monotonic() - began
        assert first.returncode not in (0, None) and took < 2 * LIMIT - 1, (took, err)
        wanted = ["rank 1 has given no sign of life", "rank 0: another rank was lost"]
        if fate == "hangs":  # it has a limit's time for its step, and is found at once
            wanted = ["rank 1 hangs, or waits for one that does"]
        assert any(text in err for text in wanted), err[-2000:]
    finally:
        second.send_signal(signal.SIGCONT)
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    "fate, says",
    [
        ("is slow", ["DONE 7 []"] * 2),
        ("is slow while the other saves", ["DONE 7 []"] * 2),
        (
            "is slow while the other cannot read",
            ["ENDED OSError the disk is gone", "ENDED RuntimeError rank 0 could not read"],
        ),
        ("reads slowly", ["DONE 3 []"] * 2),
        ("is told to end", ["ENDED Terminated"] * 2),
        (
            "a weight breaks",
            ["DONE 7 ['after step 3: not finite: a weight of another rank']",
             "DONE 7 ['after step 3: not finite: image.6.weight']"],
        ),
        ("a weight breaks, unkept", ["ENDED NonFiniteError step 4: not finite"] * 2),
        (
            "the folder is refused",
            ["ENDED ValueError", "ENDED RuntimeError rank 0 cannot use the folder"],
        ),
    ],
)  # fmt: skip
def test_the_ranks_take_the_same_way(fate, says, tmp_path):
    processes = start(fate, tmp_path)
    try:
        told = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for (out, err), wanted in zip(told, says, strict=True):
        assert out.splitlines()[-1].startswith(wanted), out + err[-3000:]

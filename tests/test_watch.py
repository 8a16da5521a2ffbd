"""A rank in trouble: the others end with it, go on with it, or wait for it, and say so."""

import signal
import time
from pathlib import Path

import pytest
import warm
from rank_pool import announced, free_port
from torch.distributed import TCPStore

from pybackdoor.distributed import Ranks, seconds_of
from pybackdoor.engine.watch import Watch

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


def test_a_rank_that_never_comes_is_not_waited_for():
    for rank in range(2):  # the one that the others look for, and another
        about = announced(rank, 2, free_port()) | {"PYBACKDOOR_JOIN_TIMEOUT": "1.5"}
        began = time.monotonic()
        alone = warm.run([str(SCRIPT), "waits", "none"], about)
        assert alone.returncode == 1 and time.monotonic() - began < 30
        wanted = f"rank {rank}: not all of 2 processes have met at 127.0.0.1:{about['MASTER_PORT']}"
        assert f"{wanted} within 1.5 s: see what the others say" in alone.stderr, alone.stderr


def test_torchruns_store_tells_who_is_missing():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    about = announced(0, 3, store.port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    about |= {"PYBACKDOOR_JOIN_TIMEOUT": "1.5"}
    alone = warm.run([str(SCRIPT), "waits", "none"], about)
    assert "within 1.5 s, missing [1, 2]: see what" in alone.stderr, alone.stderr


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon"])
def test_a_time_limit_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.setenv("A_LIMIT", given)
    with pytest.raises(ValueError, match=f"A_LIMIT must be positive seconds, got '{given}'"):
        seconds_of("A_LIMIT", 30.0)


def test_both_time_limits_are_looked_at(monkeypatch):
    about = announced(0, 2, free_port()) | {"PYBACKDOOR_JOIN_TIMEOUT": "0"}
    alone = warm.run([str(SCRIPT), "waits", "none"], about)
    assert "PYBACKDOOR_JOIN_TIMEOUT must be positive seconds, got '0'" in alone.stderr
    monkeypatch.setenv("PYBACKDOOR_RANK_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="PYBACKDOOR_RANK_TIMEOUT must be positive seconds"):
        Watch(Ranks())


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

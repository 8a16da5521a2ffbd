"""malloc during a run: what is set and set back, by whom, and that it saves the pages."""

import platform
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from ranked_runs import MEAN, STD, loader, model

from pybackdoor import par_clean
from pybackdoor.engine import heap

CPU = torch.device("cpu")
KEEP = [(-4, 0), (-1, -1)]
BACK = [(-4, 65536), (-3, 32 << 20), (-1, 64 << 20), "trim 0"]
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc"
)  # fmt: skip


class Libc:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list = []

    def mallopt(self, name: int, value: int) -> None:
        self.told.append((name, value))

    def malloc_trim(self, pad: int) -> None:
        self.told.append(f"trim {pad}")


@pytest.fixture
def libc():
    made = Libc()
    with patch.object(heap, "_glibc", lambda: made):
        yield made


@pytest.fixture
def asked():
    """Looks for the library anew, before and after."""
    heap._glibc.cache_clear()
    yield heap._glibc
    heap._glibc.cache_clear()


def test_runs_within_runs_set_it_once(libc):
    with heap.kept_heap(CPU):
        assert libc.told == KEEP
        with heap.kept_heap(CPU):
            pass
        assert libc.told == KEEP
    assert libc.told == KEEP + BACK


def test_set_back_after_an_error(libc):
    with pytest.raises(ZeroDivisionError), heap.kept_heap(CPU):
        1 / 0  # noqa: B018
    assert libc.told == KEEP + BACK


def test_threads_count_together(libc):
    def once(_: int) -> None:
        with heap.kept_heap(CPU):
            pass

    with heap.kept_heap(CPU), ThreadPoolExecutor(8) as pool:
        list(pool.map(once, range(200)))
    assert libc.told == KEEP + BACK


def test_nothing_for_another_device(libc):
    with heap.kept_heap(torch.device("cuda")):
        pass
    assert libc.told == []


@pytest.mark.parametrize(
    "name, value",
    [
        ("MALLOC_MMAP_MAX_", "4"),
        ("MALLOC_TRIM_THRESHOLD_", "100000"),
        ("GLIBC_TUNABLES", "glibc.cpu.x=1:glibc.malloc.mmap_max=2"),
    ],
)
def test_the_users_settings_hold(name, value, asked, monkeypatch):
    monkeypatch.setenv(name, value)
    assert asked() is None
    with heap.kept_heap(CPU):
        pass


def test_other_variables_are_not_mallocs(asked, monkeypatch):
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.x=1")
    monkeypatch.setenv("MALLOC_CONF", "jemalloc's")
    assert (asked() is not None) == (platform.libc_ver()[0] == "glibc")


def test_another_c_library(asked, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert asked() is None


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(rounds: int) -> int:
    """Page faults of making and dropping 160 MiB in blocks that are returned one by one."""
    before = faults()
    for _ in range(rounds):
        blocks = [torch.ones(40 << 18) for _ in range(4)]
        del blocks
    return faults() - before


@needs_glibc
def test_the_pages_are_kept_and_go_back(asked):
    outside, before = work(5), resident()
    with heap.kept_heap(CPU):
        work(5)
        inside, held = work(5), resident()
    assert inside < outside / 20, (inside, outside)
    assert held - before > 100 << 20
    assert resident() - before < 20 << 20


def test_a_run_keeps_it(libc):
    seen = []
    par_clean(
        model(0), loader(), epochs=1, mean=MEAN, std=STD, device="cpu", progress=False,
        repair=False,
        on_step=lambda step, record, model: seen.append(list(libc.told)),
    )  # fmt: skip
    assert seen and all(told == KEEP for told in seen)
    assert libc.told == KEEP + BACK

"""malloc during a run: what is set and set back, by whom, and that it saves the pages."""

import os
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
    heap._glibc() is None, reason="needs glibc's malloc, without settings of the user's"
)


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


def test_nothing_in_another_thread(libc):
    """Its heaps are of 64 MiB at most: each large block would take one of its own."""

    def once() -> None:
        with heap.kept_heap(CPU):
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(once).result()
        assert libc.told == []
        with heap.kept_heap(CPU):
            pool.submit(once).result()
            assert libc.told == KEEP
    assert libc.told == KEEP + BACK


def test_a_forked_child_is_in_no_run(libc):
    reader, writer = os.pipe()
    with heap.kept_heap(CPU):
        libc.told.clear()
        child = os.fork()
        if child == 0:
            told = list(libc.told)
            with heap.kept_heap(CPU):
                pass
            os.write(writer, repr((told, libc.told[len(told) :])).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert libc.told == []
    os.close(writer)
    told, later = eval(os.read(reader, 4096))  # of our own child
    os.close(reader)
    assert told == BACK[:3] and later == KEEP + BACK


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
    assert inside < outside / 10, (inside, outside)
    assert held - before > 100 << 20
    assert resident() - before < 20 << 20


def test_a_run_keeps_it_until_its_own_memory_is_gone(libc):
    seen, ran, left = [], [], []

    def on_step(step: int, record: dict, model: torch.nn.Module) -> None:
        seen.append(list(libc.told))
        ran[:] = [model]

    libc.malloc_trim = lambda pad: (
        left.extend(p.grad for p in ran[0].parameters()), libc.told.append(f"trim {pad}")
    )  # fmt: skip
    par_clean(
        model(0), loader(), epochs=1, mean=MEAN, std=STD, device="cpu", progress=False,
        repair=False, on_step=on_step,
    )  # fmt: skip
    assert seen and all(told == KEEP for told in seen)
    assert libc.told == KEEP + BACK
    assert left and all(grad is None for grad in left)


def test_weights_are_the_same_bit_for_bit(asked, monkeypatch):
    def cleaned() -> dict[str, torch.Tensor]:
        found = par_clean(
            model(0), loader(), epochs=2, mean=MEAN, std=STD, device="cpu", precision="fp32",
            progress=False, repair=False,
        )  # fmt: skip
        return found.model.state_dict()

    kept = cleaned()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    heap._glibc.cache_clear()
    assert heap._glibc() is None
    plain = cleaned()
    assert plain and all(torch.equal(kept[name], plain[name]) for name in plain)

"""GPU policy: a test marked gpu skips without a CUDA device, or fails if one is required.

A test of every instruction set of the CPU (``isa``) runs once on a GPU, where they mean nothing.
Memory that a module's tests have freed goes back to the system.
"""

import ctypes
import os
import sys
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen, again = set(), []
    for item in reversed(items):  # the last sets are drivers that every CPU has
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if "isa" not in params or params.get("device") != "cuda":
            continue
        del params["isa"]
        key = item.nodeid.split("[")[0], repr(sorted(params.items()))
        if key in seen:
            again.append(item)
        seen.add(key)
    if again:
        config.hook.pytest_deselected(items=again)
        gone = set(again)
        items[:] = [item for item in items if item not in gone]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("PYBACKDOOR_REQUIRE_GPU") == "1":
            pytest.fail("PYBACKDOOR_REQUIRE_GPU=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def freed_memory_goes_back() -> Iterator[None]:
    """The C library keeps what was freed below its heap's top: gigabytes after a real model."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)

"""GPU policy: a test marked gpu skips without a CUDA device, or fails if one is required.

Memory that a module's tests have freed goes back to the system.
"""

import ctypes
import os
import sys
from collections.abc import Iterator

import pytest
import torch


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

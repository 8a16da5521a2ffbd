"""GPU policy: a test marked gpu skips without a CUDA device, or fails if one is required."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("PYBACKDOOR_REQUIRE_GPU") == "1":
            pytest.fail("PYBACKDOOR_REQUIRE_GPU=1, but torch sees no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")

"""pytest-benchmark runs of benchmarks/: one thread, as the acceptance counts."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Restores the thread count afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

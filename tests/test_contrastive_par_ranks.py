"""contrastive_par over 2 and 4 processes equals the loss of one, native and by the reference."""

import pytest
import torch
from run_ranks import run_ranks


@pytest.mark.parametrize("backend, counts", [("cpu", (2, 4)), ("reference", (2,))])
def test_several_processes_equal_one(tmp_path, backend, counts):
    """fp64, unequal shares, one rank without images: loss and gradients to 1e-6."""
    results = {}
    for count in (1, *counts):
        code, errors, results[count] = run_ranks(
            "contrastive_ranks.py", tmp_path, count, PYBACKDOOR_BACKEND=backend
        )
        assert code == 0, errors[-3000:]
    assert results[1]["columns formed again stats"].isfinite().all()
    for count in counts:
        assert results[count].keys() == results[1].keys()
        for name, tensor in results[1].items():
            torch.testing.assert_close(
                results[count][name], tensor, rtol=1e-6, atol=1e-12, msg=f"{count} ranks: {name}"
            )

"""adamw_ema's Triton kernels in the interpreter; machine code is looked at where all ops' is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


INTERPRETED = """
import copy, torch
from adamw_ema_cases import *
from pybackdoor.ops._adamw_ema_table import Options, new_status

cases = [(dict(), None, None), (ALL, torch.tensor(0.5), torch.tensor(0.0)),
         (ALL | dict(radius=None, clip_norm=None, skip_nonfinite=True), None, None),
         (ALL | dict(noise_std=0.0, radius=100.0), None, torch.tensor(1.0)),
         (dict(radius=1.5, clip_norm=1e6), None, None)]
for settings, inv_scale, found_inf in cases:
    options = Options(**settings)
    slots = random_slots(copies=options.ema_decay is not None, ball=options.radius is not None)
    results = []
    for step in (native_step, triton_step):
        groups, status = two_groups(copy.deepcopy(slots)), new_status(torch.device("cpu"))
        for _ in range(2):
            step(groups, options, status, inv_scale, found_inf)
        results.append(([s for g in flattened(groups) for s in g.slots], status))
    worst = largest_differences(results[0][0], results[1][0])
    # Sums are made in another order: what they scale may be one ulp off.
    bound = {n: 0.0 if not settings else 2.0**-7 if n == "shadow" else 2.0**-21 for n in worst}
    assert all(worst[n] <= bound[n] for n in worst), (settings, worst)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-6), results
print("equal")
"""


def test_the_triton_twin_equals_the_shared_body():
    """In Triton's interpreter: bit for bit, but for what sums scale."""
    pytest.importorskip("triton", reason="the twin needs Triton")
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), tests]))
    environment = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.strip() == "equal", result.stdout + result.stderr

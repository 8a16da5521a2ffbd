"""What compute-sanitizer watches: every CUDA kernel of the sources, none forgotten."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _sanitized  # noqa: E402

from pybackdoor._native import _C  # noqa: E402
from pybackdoor.ops import _contrastive_par_native as native  # noqa: E402

NAMES = [name for names in _sanitized.KERNELS.values() for name in names]
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(")


def test_every_kernel_of_the_sources_is_named():
    found = []
    for source in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        text = source.read_text()
        names = KERNEL.findall(text)
        assert len(names) == text.count("__global__"), source
        found += names
    assert sorted(found) == sorted(NAMES)


def entry(kernel):
    """The native function that launches a kernel."""
    if kernel.startswith("adamw_ema"):
        return "adamw_ema"
    if kernel in ("accumulate_kernel", "reduce_kernel"):
        return "trigger_normalize_backward"
    name = kernel.removesuffix("_kernel")
    return name if name == "trigger_normalize" else f"contrastive_par_{name}"


@pytest.mark.parametrize("run", _sanitized.KERNELS, ids=lambda run: run.__name__)
def test_the_runs_call_what_launches_the_kernels(run, monkeypatch):
    called, flagged = set(), []

    def watched(name, function):
        def call(**arguments):
            called.add(name)
            return function(**arguments)

        return call

    for name in map(entry, NAMES):
        monkeypatch.setattr(_C, name, watched(name, getattr(_C, name)))
    fixup = native.fixup

    def watched_fixup(*arguments):
        flagged.append(arguments[7].tolist())
        return fixup(*arguments)

    monkeypatch.setattr(native, "fixup", watched_fixup)
    monkeypatch.setenv("PYBACKDOOR_CPU_ISA", "lanes32")
    torch.manual_seed(0)
    run("cpu")
    assert called >= {entry(name) for name in _sanitized.KERNELS[run]}
    if run is _sanitized.contrastive_par_runs:
        far = 1 + sum(map(len, _sanitized.PRECISIONS.values()))  # and one that overflows
        assert [0, 0] in flagged and sum(min(pair) > 0 for pair in flagged) == far, flagged


@pytest.mark.gpu
def test_the_runs_launch_every_kernel(monkeypatch):
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setenv("PYBACKDOOR_BACKEND", "cuda")
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for run in _sanitized.KERNELS:
            run("cuda")
        torch.cuda.synchronize()
    launched = " ".join({event.name for event in trace.events()})
    assert not [name for name in NAMES if not re.search(rf"\b{name}\b", launched)]

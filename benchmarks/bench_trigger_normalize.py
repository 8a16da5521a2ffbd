"""trigger_normalize against what a user writes in PyTorch, its compilation, and named peers.

    python benchmarks/bench_trigger_normalize.py --quick --json result.json
    pytest benchmarks/bench_trigger_normalize.py

All providers get the same uint8 NHWC images and give NCHW. Mode forward, without gradients:
    pybackdoor             the op
    pybackdoor_fresh       the op, with its pool of freed results emptied before each call (CPU)
    triton                 the op's Triton kernels (CUDA)
    eager                  the natural chain on the batch: ToTensor, trigger, 8-bit, ToTensor,
                           (noise), Normalize, (erasing), cast to the output's dtype
    eager_inplace          the same tuned by hand
    compile                torch.compile of eager
    compile_into           compile writing into one tensor made beforehand (CPU)
    torchvision_normalize, kornia_normalize, cvcuda_normalize, dali_normalize
                           case none: they add no trigger and do not quantise

Mode backward: the gradients of a blend's pattern and mask, which both cover the image, without
quantisation; the forward pass is run beforehand, and its graph kept. eager and compile go through
autograd; eager_by_hand is the op's formulas in PyTorch without it. Mode full: both passes.

Memory on the CPU. pybackdoor takes its result from the pool, so from the second call on the pages
are there already. pybackdoor_fresh gets its result, and eager, eager_inplace, compile and the
peers their result and each temporary, from malloc in every call: up to 32 MiB that is memory freed
before, beyond it fresh pages, and their faults and release are in the time. compile_into touches
no fresh page: its one result lives through all calls. The ratio without the pool's help is that of
pybackdoor_fresh to eager and compile; with it on both sides, pybackdoor to compile_into.
The op's gradients are small, so that mode backward has no fresh provider; what eager forms on the
way to its own is as large as the gradient it is given.
On CUDA all take their memory from torch's caching allocator.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _ceilings import ceilings
from _common import (
    OURS,
    OUT_OF_MEMORY,
    Report,
    check_errors,
    dtype_name,
    interleave,
    load_at_start,
    make_row,
    parser,
    relative_error,
    release_memory,
)
from _normalizers import NORMALIZERS
from _trigger_setting import CASES, MODES, OWN_NUMBERS, Forward, Setting

KERNEL = "trigger_normalize"
FP32, BF16 = torch.float32, torch.bfloat16
TINY = [
    ("forward", "patch", (2, 48, 48, 3), FP32),
    ("forward", "augment", (2, 48, 48, 3), BF16),
    ("backward", "blend", (2, 48, 48, 3), FP32),
    ("full", "blend", (2, 48, 48, 3), FP32),
]
SHAPE, CUDA_SHAPE = (128, 224, 224, 3), (1024, 224, 224, 3)
CPU_QUICK = [("forward", "blend", SHAPE, dtype) for dtype in (FP32, BF16)]
CPU_QUICK += [("backward", "blend", SHAPE, FP32), ("full", "blend", SHAPE, FP32)]
CPU_FULL = [
    ("forward", case, shape, dtype)
    for shape in ((32, 224, 224, 3), SHAPE)
    for case in CASES
    for dtype in (FP32, BF16)
]
CPU_FULL += [
    (mode, "blend", SHAPE, dtype) for mode in ("backward", "full") for dtype in (FP32, BF16)
]
CUDA_QUICK = [("forward", "blend", CUDA_SHAPE, BF16), ("backward", "blend", CUDA_SHAPE, BF16)]
CUDA_QUICK += [("forward", "augment", CUDA_SHAPE, BF16)]
CUDA_FULL = [("forward", case, CUDA_SHAPE, BF16) for case in CASES]
CUDA_FULL += [("forward", "blend", CUDA_SHAPE, FP32)]
CUDA_FULL += [(mode, "blend", CUDA_SHAPE, BF16) for mode in ("backward", "full")]


class Measurement:
    """The providers of one setting, checked, then timed."""

    def __init__(self, setting: Setting, report: Report, backend: str):
        self.setting, self.report, self.backend = setting, report, backend
        self.found: dict[str, Callable[[], object]] = {}
        self.facts: dict[str, dict] = {}
        self.wrong: list[str] = []

    def row(self, name: str, **fields) -> None:
        """Adds a row of this setting to the report."""
        s = self.setting
        row = make_row(
            KERNEL,
            name,
            s.mode,
            s.shape,
            s.dtype,
            s.device,
            case=s.case,
            num_bytes=s.num_bytes(),
            ceilings=ceilings(s.device, self.report.options.tiny),
            **fields,
        )
        self.report.add(row)

    def check(self, name: str) -> None:
        """Runs a provider once, and keeps it for the timing if its numbers are right."""
        s, error, note = self.setting, None, None
        try:
            call = s.calls(name, self.backend)
            error = s.error(name, call())
            if error is not None:
                check_errors({name: error}, s.tolerance(name))
        except torch.OutOfMemoryError:
            note = OUT_OF_MEMORY
        except ImportError as reason:
            self.report.note(f"{name} left out: {reason}")
            return
        except Exception as reason:  # a peer may fail in any way; ours fails the run at its end
            lines = str(reason).strip().splitlines() or [""]
            note = f"failed: {type(reason).__name__}: {lines[0][:120]}"
        if note is None:
            self.found[name] = call
            self.facts[name] = {"rel_error": error, "note": OWN_NUMBERS if error is None else None}
            return
        # Only here is the error's traceback, and with it the memory, free.
        self.row(name, note=note, times=(math.inf,) * 3 if note == OUT_OF_MEMORY else None)
        if name in (OURS, "pybackdoor_fresh", "triton"):
            self.wrong.append(note)
        release_memory()

    def time(self) -> None:
        """Rows of all providers whose numbers are right."""
        s = self.setting
        times = interleave(self.found, s.device, repeats=self.report.options.repeats)
        for name, spread in times.items():
            self.row(name, times=spread, **self.facts[name])


def measure(
    mode: str,
    case: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    report: Report,
    backend: str = "inductor",
) -> None:
    """The rows of one setting: numbers first, then times.

    Raises:
        ValueError: the op's own numbers are wrong; the others' rows are there all the same.
    """
    torch._dynamo.reset()
    release_memory()
    device = report.options.device
    setting = MODES[mode](case, shape, dtype, device)
    measurement = Measurement(setting, report, backend)
    for name in setting.names():
        if name in NORMALIZERS and not usable(name, device):
            continue
        measurement.check(name)
    measurement.time()
    if measurement.wrong:
        raise ValueError(f"{KERNEL} {mode} {case} {dtype_name(dtype)}: {measurement.wrong[0]}")


def usable(name: str, device: str) -> bool:
    """Whether a peer is installed and runs on that device."""
    package, _, on_cpu = NORMALIZERS[name]
    return (device == "cuda" or on_cpu) and missing(package) is None


def missing(package: str) -> str | None:
    """Why a package cannot be imported; None if it is there."""
    top = package.split(".")[0]
    found = importlib.util.find_spec(top) and importlib.util.find_spec(package)
    return None if found else f"{package} is not installed"


@pytest.mark.parametrize("provider", ["pybackdoor", "pybackdoor_fresh", "eager"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_trigger_normalize(benchmark, dtype, provider):
    setting = Forward("blend", SHAPE, dtype, "cpu")
    result = benchmark.pedantic(setting.calls(provider, ""), rounds=3, warmup_rounds=1)
    check_errors({provider: setting.error(provider, result)}, setting.tolerance(provider))


def test_wrong_numbers_are_refused():
    check_errors({"eager": 1e-6}, 1e-6)
    for wrong in (1.1e-6, float("nan")):
        with pytest.raises(ValueError, match="must be <= 1e-06, got {'compile': "):
            check_errors({"eager": 0.0, "compile": wrong}, 1e-6)
    want = torch.ones(4)
    assert math.isnan(relative_error(torch.tensor([1.0, float("nan"), 1.0, 1.0]), want))


def test_a_busy_machine_is_noted(monkeypatch):
    for load, count in ((1.5, 0), (1.6, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        notes = []
        assert load_at_start(notes)[0] == load and len(notes) == count


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    report, failures = Report(options), []
    cuda = options.device == "cuda"
    if options.tiny:
        settings = TINY
    elif options.quick:
        settings = CUDA_QUICK if cuda else CPU_QUICK
    else:
        settings = CUDA_FULL if cuda else CPU_FULL
    for name, (package, _, on_cpu) in NORMALIZERS.items():
        if (cuda or on_cpu) and missing(package):
            report.note(f"{missing(package)}: {name} left out")
    if cuda and options.quick and any(not missing(p) for p in ("kornia", "cvcuda", "nvidia.dali")):
        settings = [*settings, ("forward", "none", CUDA_SHAPE, BF16)]
    for setting in settings:
        try:
            measure(*setting, report, "aot_eager" if options.tiny else "inductor")
        except ValueError as error:
            failures.append(str(error))
    report.close()
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()

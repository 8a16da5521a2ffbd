"""trigger_normalize's Triton kernels: their numbers, and that only declared variants run."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernel_launches import caught  # noqa: E402
from trigger_normalize_cases import MEAN, STD  # noqa: E402
from trigger_normalize_triton_cases import CASES, run_case  # noqa: E402

from pybackdoor import _backend  # noqa: E402
from pybackdoor.kernels import trigger_normalize, trigger_normalize_backward  # noqa: E402
from pybackdoor.ops import _trigger_normalize_gradient as gradient  # noqa: E402
from pybackdoor.ops._trigger_normalize_arguments import Inputs, Plain  # noqa: E402

HERE = Path(__file__).resolve().parent
DECLARED = trigger_normalize.variants() + trigger_normalize_backward.variants()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_the_kernels_in_the_interpreter():
    """Against the native CPU path; Triton reads TRITON_INTERPRET when a kernel is defined."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("PYBACKDOOR_BACKEND", None)
    command = [sys.executable, "-W", "error", str(HERE / "trigger_normalize_triton_cases.py")]
    result = subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == list(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_on_a_gpu(name):
    """The same bits as on the CPU, in every dtype."""
    run_case(name, "cuda")


def make(*shape, dtype=torch.float32):
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(batch, height, width, dtype, input_layout, layout, mode, given, augmented):
    """Both passes of a setting, on tensors without data; given: each image has its own index."""
    nhwc = input_layout == "nhwc"
    images = make(batch, *((height, width, 3) if nhwc else (3, height, width)), dtype=torch.uint8)
    window = {"patch": (7, 5), "blend": (height, width), "mask": (height // 2, width)}.get(mode)
    pattern = make(3, 3, *window) if window else None
    mask = make(3, 1, *window) if mode == "mask" else None
    grid = make(3, height, width, 2) if mode == "warp" else None
    own = [make(batch, dtype=torch.int32), make(batch, 2, dtype=torch.int32)]
    own += [make(batch, dtype=torch.float64)]
    sample_id = make(batch, dtype=torch.int64) if augmented else None
    inputs = Inputs(images, pattern, mask, *(own if given else [None] * 3), sample_id)
    plain = Plain(
        {"mask": "blend"}.get(mode, mode),
        *([True, False, True], 0.3, [0.5, 0.2, 0.5, 0.005, 0.01] if augmented else [], -(2**63)),
        *(7, input_layout, layout, 2, list(STD)),
    )
    out = make(batch, 3, height, width, dtype=dtype)
    for poisoned in (None, images):
        arguments = (inputs, grid, out, poisoned, True, True, plain, list(MEAN))
        trigger_normalize.forward(*arguments)
    if pattern is None:
        return
    order = (make(batch, dtype=torch.int64), make(4, dtype=torch.int64))
    partial = make(3, 16, 1 if mask is None else 2, 3, *window)
    for gradients in ((pattern, mask), (pattern, None), (None, mask)):
        for sorted_by in (order, (None, None)):
            trigger_normalize.backward(inputs, out, *sorted_by, partial, *gradients, plain)


def test_launchers_and_variants_are_the_same_set():
    """Every launch is a declared variant, and every declared variant is launched by some size."""
    assert len({v.name for v in DECLARED}) == len(DECLARED)
    layouts = [("nhwc", "nchw"), ("nchw", "channels_last"), ("nhwc", "patchified")]
    modes = ("none", "patch", "blend", "mask", "warp")
    with caught(DECLARED) as launches:
        # One image, odd sizes, and more than 2^31 elements.
        for size in ((1, 16, 16), (3, 30, 38), (100_000, 224, 224)):
            for dtype in DTYPES:
                for layout in layouts:
                    for mode in modes:
                        for flag in (False, True):
                            launch_all(*size, dtype, *layout, mode, flag, flag and mode != "none")
    unreached = {v.name for v in DECLARED} - {v.name for v, _ in launches}
    assert not unreached, unreached


def test_no_images_are_no_launch():
    plain = Plain("none", [False] * 3, 1.0, [], 0, 0, "nhwc", "nchw", 0, list(STD))
    inputs = Inputs(make(0, 4, 4, 3, dtype=torch.uint8), *[None] * 6)
    with caught([]) as launches:
        out = make(0, 3, 4, 4)
        trigger_normalize.forward(inputs, None, out, None, True, True, plain, list(MEAN))
    assert launches == []


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_are_launched_on_the_images_device(monkeypatch, backward):
    """Triton takes the current device, whichever the tensors are on."""
    forward_op, on, launches = sys.modules["pybackdoor.ops.trigger_normalize"], [], 0

    @contextmanager
    def running_on(device):
        on.append(device)
        yield
        on.pop()

    def launched(*_):
        nonlocal launches
        launches += 1
        assert on == [torch.device("meta")]

    monkeypatch.setattr(_backend, "running_on", running_on)
    plain = Plain("blend", [False] * 3, 0.5, [0.0] * 5, 0, 0, "nhwc", "nchw", 0, [1.0] * 3)
    one = make(3, 3, 4, 4)
    inputs = Inputs(make(2, 4, 4, 3, dtype=torch.uint8), one, None, None, None, None, None)
    if backward:
        monkeypatch.setattr(trigger_normalize, "backward", launched)
        monkeypatch.setattr(gradient, "sample_order", lambda *_: (None, None))
        ran = gradient._launch(inputs, make(2, 3, 4, 4), (one, None), "triton", plain)
    else:
        monkeypatch.setattr(trigger_normalize, "forward", launched)
        out = make(2, 3, 4, 4), make(0, dtype=torch.uint8)
        ran = forward_op._launch(inputs, None, out, "triton", False, True, plain, [0.0] * 3)
    assert (ran, launches, on) == ("triton", 1, [])

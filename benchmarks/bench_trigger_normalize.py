"""trigger_normalize against what a user writes in PyTorch, its compilation, and named peers.

    python benchmarks/bench_trigger_normalize.py --quick --json result.json
    pytest benchmarks/bench_trigger_normalize.py

All providers get the same uint8 NHWC images and give NCHW:
    pybackdoor             the op
    pybackdoor_fresh       the op, with its pool of freed results emptied before each call (CPU)
    eager                  the natural chain on the batch: ToTensor, trigger, 8-bit, ToTensor,
                           Normalize, cast to the output's dtype
    eager_inplace          the same tuned by hand
    compile                torch.compile of eager
    compile_into           compile writing into one tensor made beforehand
    torchvision_normalize  mode none: adds no trigger and does not quantise
    kornia_normalize       mode none: the same

Memory on the CPU. pybackdoor takes its result from the pool, so from the second call on the pages
are there already. pybackdoor_fresh gets its result, and eager, eager_inplace, compile and the two
peers their result and each temporary, from malloc in every call: up to 32 MiB that is memory freed
before, beyond it fresh pages, and their faults and release are in the time. compile_into touches
no fresh page: its one result lives through all calls. The ratio without the pool's help is that of
pybackdoor_fresh to eager and compile; with it on both sides, pybackdoor to compile_into.
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
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _common import (
    Report,
    check_errors,
    dtype_name,
    interleave,
    load_at_start,
    parser,
    relative_error,
    release_memory,
)

from pybackdoor._native import _C
from pybackdoor.ops import TriggerTable, trigger_normalize

KERNEL = "trigger_normalize"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
STRENGTH = 0.2
# A few ulp at the scale of the largest output.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# grid_sample and its compilation contract to FMA or not: a warped level may be the next one. That
# is 1 / 255 / std, over an output of at least (1 - mean) / std: 1 / 255 / (1 - mean), rounded up.
ONE_LEVEL = 8e-3
MODES = ("none", "patch", "blend", "warp")
TINY = [("patch", (2, 48, 48, 3), torch.float32)]
QUICK = [("blend", (128, 224, 224, 3), dtype) for dtype in (torch.float32, torch.bfloat16)]
FULL = [
    (mode, shape, dtype)
    for shape in ((32, 224, 224, 3), (128, 224, 224, 3))
    for mode in MODES
    for dtype in (torch.float32, torch.bfloat16)
]


class Setting:
    """Images, a trigger and the constants of one benchmark."""

    backend = "inductor"  # of torch.compile

    def __init__(self, mode: str, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        self.mode, self.dtype = mode, dtype
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        height, width = shape[1:3]
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)
        self.images = images.to(device)
        self.corner = (height // 2, width // 2)
        table = None
        if mode == "patch":
            table = TriggerTable("patch", pattern=torch.rand(1, 3, 16, 16, generator=generator))
        elif mode == "blend":
            table = TriggerTable(
                "blend", pattern=torch.rand(1, 3, height, width, generator=generator)
            )
        elif mode == "warp":
            theta = torch.eye(2, 3)[None]
            grid = F.affine_grid(theta, (1, 3, height, width), align_corners=True)
            jitter = torch.rand(grid.shape, generator=generator) * 2 - 1
            table = TriggerTable("warp", grid=(grid + jitter / width).clamp(-1, 1))
        self.table = None if table is None else table.to(device)
        position = torch.tensor([self.corner], dtype=torch.int16).expand(shape[0], 2)
        self.position = position.to(device) if mode == "patch" else None

    def pybackdoor(self) -> Tensor:
        """The op."""
        strength = STRENGTH if self.mode == "blend" else None
        return trigger_normalize(
            self.images,
            mean=MEAN,
            std=STD,
            triggers=self.table,
            position=self.position,
            strength=strength,
            dtype=self.dtype,
        )

    def pybackdoor_fresh(self) -> Tensor:
        """The op without memory from earlier calls."""
        _C.empty_pool()
        return self.pybackdoor()

    def tolerance(self) -> float:
        """What a relative error may be."""
        return TOLERANCES[self.dtype] + (ONE_LEVEL if self.mode == "warp" else 0)

    def trigger(self, x: Tensor) -> Tensor:
        """The trigger on [B, 3, H, W] floats, as one writes it."""
        if self.mode == "patch":
            (y0, x0), pattern = self.corner, self.table.pattern[0]
            x = x.clone()
            x[:, :, y0 : y0 + 16, x0 : x0 + 16] = pattern
        elif self.mode == "blend":
            x = STRENGTH * self.table.pattern + (1 - STRENGTH) * x
        elif self.mode == "warp":
            grid = self.table.grid.expand(len(x), -1, -1, -1)
            x = F.grid_sample(x, grid, align_corners=True)
        return x

    def eager(self) -> Tensor:
        """ToTensor, trigger, to 8 bits, ToTensor, Normalize."""
        x = self.images.permute(0, 3, 1, 2).contiguous().float() / 255
        if self.mode != "none":
            x = self.trigger(x)
            x = (x * 255).to(torch.uint8)
            x = x.float() / 255
        return ((x - self.mean) / self.std).to(self.dtype)

    def eager_inplace(self) -> Tensor:
        """The chain with its temporaries taken out by hand."""
        x = self.images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        x.div_(255)
        if self.mode == "patch":
            y0, x0 = self.corner
            x[:, :, y0 : y0 + 16, x0 : x0 + 16] = self.table.pattern[0]
        elif self.mode == "blend":
            x.mul_(1 - STRENGTH).add_(self.table.pattern * STRENGTH)
        elif self.mode == "warp":
            x = self.trigger(x)
        if self.mode != "none":
            x.mul_(255).trunc_().div_(255)
        return x.sub_(self.mean).div_(self.std).to(self.dtype)

    def compile_into(self) -> Callable[[], Tensor]:
        """torch.compile of eager into one tensor, used again by every call."""
        out = torch.empty_like(self.eager())
        compiled = torch.compile(
            lambda: out.copy_(self.eager()), dynamic=False, backend=self.backend
        )
        return lambda: compiled()

    def exact(self) -> Tensor:
        """The chain in fp64; levels at the edge of two come from fp32, as the definition says."""
        x = self.images.permute(0, 3, 1, 2).float() / 255
        levels = (
            (self.trigger(x) * 255).to(torch.int64).double()
            if self.mode != "none"
            else x.double() * 255
        )
        return (levels.round() / 255 - self.mean.double()) / self.std.double()

    def providers(self, notes: list[str]) -> dict[str, Callable[[], Tensor]]:
        """Name -> function; what is not installed is noted."""
        compiled = torch.compile(self.eager, dynamic=False, backend=self.backend)
        found = {"pybackdoor": self.pybackdoor}
        if self.images.device.type == "cpu":
            found["pybackdoor_fresh"] = self.pybackdoor_fresh
        found |= {
            "eager": self.eager,
            "eager_inplace": self.eager_inplace,
            "compile": compiled,
            "compile_into": self.compile_into(),
        }
        if self.mode != "none":
            return found
        from torchvision.transforms.v2 import functional as tv

        def planar() -> Tensor:
            return self.images.permute(0, 3, 1, 2).contiguous()

        def torchvision_normalize() -> Tensor:
            x = tv.to_dtype(planar(), torch.float32, scale=True)
            return tv.normalize(x, list(MEAN), list(STD)).to(self.dtype)

        found["torchvision_normalize"] = torchvision_normalize
        if importlib.util.find_spec("kornia") is None:
            note = "kornia is not installed: kornia_normalize left out"
            if note not in notes:
                notes.append(note)
            return found
        from kornia.enhance import normalize

        mean, std = self.mean.flatten(), self.std.flatten()
        found["kornia_normalize"] = lambda: normalize(planar().float() / 255, mean, std).to(
            self.dtype
        )
        return found


def measure(
    mode: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    repeats: int,
    notes: list[str],
) -> list[dict]:
    """The rows of one setting: numbers first, then times.

    Raises:
        ValueError: a provider's numbers are wrong.
    """
    torch._dynamo.reset()
    release_memory()
    setting = Setting(mode, shape, dtype, device)
    providers = setting.providers(notes)
    exact = setting.exact()
    errors = {name: relative_error(run(), exact) for name, run in providers.items()}
    check_errors(errors, setting.tolerance())
    del exact
    times = interleave(providers, device, repeats=repeats)
    elements = setting.images.numel()
    rows = []
    for name, (median, p20, p80) in times.items():
        rows.append(
            {
                "kernel": KERNEL,
                "provider": name,
                "mode": mode,
                "shape": "x".join(map(str, shape)),
                "dtype": dtype_name(dtype),
                "device": device,
                "threads": torch.get_num_threads(),
                "ms_median": median,
                "ms_p20": p20,
                "ms_p80": p80,
                "rel_error": errors[name],
                "images_per_s": shape[0] / median * 1e3,
                "gb_per_s": elements * (1 + dtype.itemsize) / median / 1e6,
            }
        )
    return rows


@pytest.mark.parametrize("provider", ["pybackdoor", "pybackdoor_fresh", "eager"])
@pytest.mark.parametrize("mode,shape,dtype", QUICK, ids=["float32", "bfloat16"])
def test_trigger_normalize(benchmark, mode, shape, dtype, provider):
    setting = Setting(mode, shape, dtype, "cpu")
    result = benchmark.pedantic(getattr(setting, provider), rounds=3, warmup_rounds=1)
    check_errors({provider: relative_error(result, setting.exact())}, setting.tolerance())


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
    report = Report(options)
    if options.tiny:
        Setting.backend = "aot_eager"
    for mode, shape, dtype in TINY if options.tiny else QUICK if options.quick else FULL:
        report.add(*measure(mode, shape, dtype, options.device, options.repeats, report.notes))
    report.close()


if __name__ == "__main__":
    main()

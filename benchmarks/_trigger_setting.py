"""A setting of the trigger_normalize benchmark: inputs, the exact answer, the providers' calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from _common import OURS, forced, relative_error
from _normalizers import MEAN, NORMALIZERS, STD
from torch import Tensor

from pybackdoor import reference
from pybackdoor._native import _C
from pybackdoor.ops import Augment, TriggerTable, trigger_normalize

CASES = ("none", "patch", "blend", "warp", "augment")  # augment: blend, then noise and erasing
STRENGTH = 0.2
CHUNK = 64  # images of which fp64 numbers are formed at a time
FEW = 16  # of the augmented ones, whose reference runs on the CPU
# A few ulp at the scale of the largest output; gradients are sums in fp32 whatever the dtype.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
GRADIENT_TOLERANCE = 1e-5
# grid_sample and its compilation contract to FMA or not, and on CUDA eager multiplies by 1 / 255:
# a level may then be the next one. That is 1 / 255 / std, over an output of at least
# (1 - mean) / std: 1 / 255 / (1 - mean), rounded up.
ONE_LEVEL = 8e-3
NOISE = 2e-6  # of the normal numbers, formed in fp32
OWN_NUMBERS = "random numbers of its own"

Call = Callable[[], object]


def under(backend: str, call: Call) -> Call:
    """The call with the op on that backend."""

    def run() -> object:
        with forced(backend):
            return call()

    return run


def fresh(call: Call) -> Call:
    """The call without memory from earlier ones (CPU)."""

    def run() -> object:
        _C.empty_pool()
        return call()

    return run


class Setting:
    """Images, a trigger and the constants of one benchmark; NHWC bytes in, NCHW out.

    A subclass says what is measured: the providers' `names` and `calls`, and what is an `error`.
    """

    mode = "forward"

    def __init__(self, case: str, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=self.generator
        ).to(device)  # fmt: skip
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers, the same on every device."""
        return torch.rand(shape, generator=self.generator)

    def eager_images(self) -> Tensor:
        """ToTensor of the batch."""
        return self.images.permute(0, 3, 1, 2).contiguous().float() / 255

    def num_bytes(self) -> int:
        """What has to be read and written at least, the triggers left out."""
        return self.images.numel() * (1 + self.dtype.itemsize)


class Forward(Setting):
    """Bytes to model input, without gradients."""

    def __init__(self, case: str, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        super().__init__(case, shape, dtype, device)
        batch, height, width = shape[:3]
        self.corner = (height // 2, width // 2)
        table = None
        if case == "patch":
            table = TriggerTable("patch", pattern=self.rand(1, 3, 16, 16))
        elif case in ("blend", "augment"):
            table = TriggerTable("blend", pattern=self.rand(1, 3, height, width))
        elif case == "warp":
            grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, height, width), align_corners=True)
            jitter = self.rand(*grid.shape) * 2 - 1
            table = TriggerTable("warp", grid=(grid + jitter / width).clamp(-1, 1))
        self.table = None if table is None else table.to(device)
        position = torch.tensor([self.corner], dtype=torch.int16).expand(batch, 2)
        self.arguments = {
            "position": position.to(device) if case == "patch" else None,
            "strength": STRENGTH if case in ("blend", "augment") else None,
            "augment": Augment() if case == "augment" else None,
            "sample_id": torch.arange(batch).to(device) if case == "augment" else None,
        }

    def names(self) -> list[str]:
        """The providers of this case."""
        fresh = ["pybackdoor_fresh"] if self.device == "cpu" else ["triton"]
        found = [OURS, *fresh, "eager", "compile"]
        if self.case != "augment":
            found.append("eager_inplace")
        if self.device == "cpu":
            found.append("compile_into")
        return [*found, *NORMALIZERS] if self.case == "none" else found

    def calls(self, name: str, backend: str) -> Call:
        """A provider's call.

        Raises:
            ImportError: a peer is not installed.
        """
        compiled = partial(torch.compile, dynamic=False, backend=backend)
        if name == "compile":
            return compiled(self.eager)
        if name == "compile_into":
            out = torch.empty_like(self.eager())
            run = compiled(lambda: out.copy_(self.eager()))
            return lambda: run()
        if name in NORMALIZERS:
            return NORMALIZERS[name][1](self.images, self.dtype)
        if name == "triton":
            return under("triton", self.ours)
        own = {OURS: self.ours, "pybackdoor_fresh": fresh(self.ours)}
        return own[name] if name in own else getattr(self, name)

    def ours(self) -> Tensor:
        """The op."""
        return trigger_normalize(
            self.images,
            mean=MEAN,
            std=STD,
            triggers=self.table,
            dtype=self.dtype,
            **self.arguments,
        )

    def trigger(self, x: Tensor) -> Tensor:
        """The trigger on [B, 3, H, W] floats, as one writes it."""
        if self.case == "patch":
            (y0, x0), pattern = self.corner, self.table.pattern[0]
            x = x.clone()
            x[:, :, y0 : y0 + 16, x0 : x0 + 16] = pattern
        elif self.case == "warp":
            grid = self.table.grid.expand(len(x), -1, -1, -1)
            x = F.grid_sample(x, grid, align_corners=True)
        elif self.case != "none":
            x = STRENGTH * self.table.pattern + (1 - STRENGTH) * x
        return x

    def eager(self) -> Tensor:
        """ToTensor, trigger, to 8 bits, ToTensor, noise, Normalize, erasing."""
        x = self.eager_images()
        if self.case != "none":
            x = self.trigger(x)
            x = (x * 255).to(torch.uint8)
            x = x.float() / 255
        if self.case == "augment":
            return self.augmented(x).to(self.dtype)
        return ((x - self.mean) / self.std).to(self.dtype)

    def augmented(self, x: Tensor) -> Tensor:
        """Noise on half of the images, Normalize, a square erased in half of them."""
        plan = self.arguments["augment"]
        (batch, _, height, width), device = x.shape, x.device
        noisy, erased = (torch.rand(batch, 1, 1, 1, device=device) < 0.5 for _ in range(2))
        noise = (torch.randn_like(x) * plan.noise_std).clamp(0, 1)
        x = torch.where(noisy, (x + noise).clamp(0, 1), x)
        x = (x - self.mean) / self.std
        low, high = plan.erase_area
        share = torch.rand(batch, 1, 1, 1, device=device) * (high - low) + low
        side = (share * height * width).sqrt().round()
        top, left = (
            (torch.rand(batch, 1, 1, 1, device=device) * (size - side + 1)).floor()
            for size in (height, width)
        )
        row = torch.arange(height, device=device).view(1, 1, -1, 1)
        col = torch.arange(width, device=device)
        inside = (row >= top) & (row < top + side) & (col >= left) & (col < left + side)
        return torch.where(erased & inside, 0, x)

    def eager_inplace(self) -> Tensor:
        """The chain with its temporaries taken out by hand."""
        x = self.images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        x.div_(255)
        if self.case == "patch":
            y0, x0 = self.corner
            x[:, :, y0 : y0 + 16, x0 : x0 + 16] = self.table.pattern[0]
        elif self.case == "blend":
            x.mul_(1 - STRENGTH).add_(self.table.pattern * STRENGTH)
        elif self.case == "warp":
            x = self.trigger(x)
        if self.case != "none":
            x.mul_(255).trunc_().div_(255)
        return x.sub_(self.mean).div_(self.std).to(self.dtype)

    def exact(self, part: slice) -> Tensor:
        """The chain in fp64; levels at the edge of two come from fp32, as the definition says."""
        images = self.images[part]
        if self.case == "augment":
            ids = self.arguments["sample_id"][part].cpu()
            arguments = self.arguments | {"sample_id": ids}
            return reference.trigger_normalize(
                images.cpu(), mean=MEAN, std=STD, triggers=self.table.to("cpu"), **arguments
            ).double()
        # A tensor on the device divides truly, a number would on CUDA be multiplied by.
        x = images.permute(0, 3, 1, 2).float() / torch.full((), 255.0, device=self.device)
        levels = x.double() * 255
        if self.case != "none":
            levels = (self.trigger(x) * 255).to(torch.int64).double()
        return (levels.round() / 255 - self.mean.double()) / self.std.double()

    def error(self, name: str, got: Tensor) -> float | None:
        """The largest error over the largest value; None where the provider draws by itself."""
        if self.case == "augment":
            if name in ("eager", "compile", "compile_into"):
                return None
            return relative_error(got[:FEW].cpu(), self.exact(slice(FEW)))
        parts = (slice(i, i + CHUNK) for i in range(0, len(got), CHUNK))
        errors = [relative_error(got[part], self.exact(part)) for part in parts]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def tolerance(self, name: str) -> float:
        """What an error may be."""
        rival = name not in (OURS, "pybackdoor_fresh", "triton")
        extra = NOISE if self.case == "augment" else 0
        if self.case == "warp" or (rival and self.device == "cuda" and self.case != "none"):
            extra = ONE_LEVEL
        return TOLERANCES[self.dtype] + extra


class Backward(Setting):
    """The gradients of a blend's pattern and mask; the forward pass is run once, beforehand."""

    mode = "backward"

    def __init__(self, case: str, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        super().__init__(case, shape, dtype, device)
        batch, height, width = shape[:3]
        self.pattern = self.rand(1, 3, height, width).to(device).requires_grad_()
        self.mask = self.rand(1, 1, height, width).to(device).requires_grad_()
        self.leaves = (self.pattern, self.mask)
        self.table = TriggerTable("blend", pattern=self.pattern, mask=self.mask)
        self.grad = self.rand(batch, 3, height, width).sub_(0.5).to(device, dtype)

    def names(self) -> list[str]:
        """The providers; by_hand needs no forward pass, so it is none of mode full."""
        found = [OURS, "eager", "compile"]
        if self.device == "cuda":
            found.append("triton")
        elif self.mode == "full":
            found.append("pybackdoor_fresh")
        return found if self.mode == "full" else [*found, "eager_by_hand"]

    def forward(self) -> Tensor:
        """The op's forward pass, without quantisation."""
        return trigger_normalize(
            self.images,
            mean=MEAN,
            std=STD,
            triggers=self.table,
            dtype=self.dtype,
            quantize=False,
        )

    def eager_forward(self) -> Tensor:
        """ToTensor, trigger, Normalize, as one writes it."""
        x = self.mask * self.pattern + (1 - self.mask) * self.eager_images()
        return ((x - self.mean) / self.std).to(self.dtype)

    def gradients(self, out: Tensor, retain: bool) -> tuple[Tensor, ...]:
        """Of the leaves."""
        return torch.autograd.grad(out, self.leaves, self.grad, retain_graph=retain)

    def calls(self, name: str, backend: str) -> Call:
        """A provider's call; the result can be had again and again."""
        if name == "eager_by_hand":
            self.x = self.eager_images()  # the forward pass has it
            return self.by_hand
        run = self.eager_forward if name in ("eager", "compile") else self.forward
        if name == "compile":
            # A graph that is used again must keep its buffers.
            with torch._functorch.config.patch(donated_buffer=False):
                run = torch.compile(run, dynamic=False, backend=backend)
                run()
        return self.repeated(name, run)

    def repeated(self, name: str, run: Callable[[], Tensor]) -> Call:
        """What is timed, of a forward pass."""

        def call() -> tuple[Tensor, ...]:
            return self.gradients(out, retain=True)

        if name != "triton":
            out = run()
            return call
        with forced("triton"):
            out = run()
        return under("triton", call)

    @torch.no_grad()
    def by_hand(self) -> tuple[Tensor, ...]:
        """The formulas as one writes them in PyTorch without autograd."""
        u = self.grad.float()
        g0 = u.sum(0) / self.std
        g1 = (u * self.x).sum(0) / self.std
        return self.mask * g0, (self.pattern * g0 - g1).sum(1, keepdim=True)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Both gradients in fp64."""
        g0 = torch.zeros(self.pattern.shape, dtype=torch.float64, device=self.device)
        g1 = torch.zeros_like(g0)
        for i in range(0, len(self.images), CHUNK):
            part = slice(i, i + CHUNK)
            u = self.grad[part].double() / self.std.double()
            g0 += u.sum(0)
            g1 += (u * self.images[part].permute(0, 3, 1, 2).double() / 255).sum(0)
        pattern, mask = (t.detach().double() for t in self.leaves)
        return mask * g0, (pattern * g0 - g1).sum(1, keepdim=True)

    def error(self, name: str, got: tuple[Tensor, ...]) -> float:
        """The larger error of the two gradients, each over its largest value."""
        errors = [relative_error(g, e) for g, e in zip(got, self.exact, strict=True)]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def tolerance(self, name: str) -> float:
        """What an error may be."""
        return GRADIENT_TOLERANCE


class Full(Backward):
    """The forward and the backward pass."""

    mode = "full"

    def num_bytes(self) -> int:
        return 2 * super().num_bytes()

    def repeated(self, name: str, run: Callable[[], Tensor]) -> Call:
        def call() -> tuple[Tensor, ...]:
            return self.gradients(run(), retain=False)

        if name == "triton":
            return under("triton", call)
        return fresh(call) if name == "pybackdoor_fresh" else call


MODES = {kind.mode: kind for kind in (Forward, Backward, Full)}

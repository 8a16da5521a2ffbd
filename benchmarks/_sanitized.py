"""Every native kernel, small, with odd sizes: what compute-sanitizer watches.

python benchmarks/_sanitized.py cuda

On a CPU the same runs go through the bodies that the CUDA kernels share, as a warp of 32 lanes.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from pybackdoor import AdamWEma
from pybackdoor.ops import Augment, TriggerTable, contrastive_par, trigger_normalize

NORM = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = {  # each, and each dtype of features with each of unit rows
    torch.float32: ("ieee", "tf32", "tf32x3", "bf16"),
    torch.float16: ("tf32", "bf16"),
    torch.bfloat16: ("ieee", "bf16"),
}
HEIGHT, WIDTH = 35, 33


def batch(device: str) -> Tensor:
    """[3, 35, 33, 3] uint8."""
    return torch.randint(0, 256, (3, HEIGHT, WIDTH, 3), dtype=torch.uint8).to(device)


def trigger_normalize_runs(device: str) -> None:
    """Every mode, layout and dtype; quantised or not; noise and erasing; the poisoned image."""
    images = batch(device)
    theta = torch.eye(2, 3)[None]
    grid = F.affine_grid(theta, (1, 3, HEIGHT, WIDTH), align_corners=True)
    tables = {
        "none": None,
        "patch": TriggerTable("patch", pattern=torch.rand(1, 3, 5, 7)),
        "blend": TriggerTable("blend", pattern=torch.rand(1, 3, HEIGHT, WIDTH)),
        "warp": TriggerTable("warp", grid=grid + 0.01),
    }
    for mode, table in tables.items():
        arguments = {} if table is None else {"triggers": table.to(device)}
        if mode == "patch":
            arguments["position"] = torch.tensor([[30, 26], [0, 0], [3, 1]]).to(device)
        for dtype in DTYPES:
            for layout in ("nchw", "channels_last"):
                trigger_normalize(images, **NORM, **arguments, layout=layout, dtype=dtype)
            if mode != "warp":
                trigger_normalize(images, **NORM, **arguments, dtype=dtype, quantize=False)
        trigger_normalize(images, **NORM, **arguments, return_images=True)
    ids = torch.arange(3, device=device)
    trigger_normalize(images, **NORM, augment=Augment(noise_p=1, erase_p=1), sample_id=ids)
    square = images[:, :32, :32].contiguous()
    trigger_normalize(square, **NORM, layout="patchified", patch_size=16)


def trigger_gradient_runs(device: str) -> None:
    """Gradients of patterns and masks: every mode, dtype and layout; many slices and triggers."""
    images = batch(device)
    ids = torch.arange(3, device=device)
    places = torch.tensor([[29, 20], [0, 0], [3, 1]]).to(device)
    strength = torch.rand(3).to(device)
    kinds = {  # mode, channels of the mask, flags
        "patch": ("patch", 0, {}),
        "patch_clip": ("patch", 0, {"clip": True}),
        "blend": ("blend", 0, {}),
        "mask1": ("blend", 1, {"nonzero_only": True}),
        "mask3": ("blend", 3, {"additive": True}),
        "mask3_clip": ("blend", 3, {"additive": True, "clip": True}),
    }
    for mode, channels, flags in kinds.values():
        for triggers, shared, dtype in itertools.product((1, 3), (True, False), DTYPES):
            h, w = (HEIGHT, WIDTH) if shared else (6, 13)
            leaves = {"pattern": torch.rand(triggers, 3, h, w) * 1.4 - 0.2}
            if channels:
                leaves["mask"] = torch.rand(triggers, channels, h, w)
            leaves = {k: v.to(device).requires_grad_() for k, v in leaves.items()}
            arguments = {} if shared else {"position": places}
            if mode == "blend" and not shared:
                arguments["strength"] = strength
            if triggers > 1:
                arguments["trigger_id"] = ids - 1
            out = trigger_normalize(
                images,
                **NORM,
                **arguments,
                triggers=TriggerTable(mode, **leaves, **flags),
                dtype=dtype,
                quantize=shared,
                layout="nchw" if shared else "channels_last",
            )
            out.backward(torch.randn_like(out))
            check_finite(*(leaf.grad for leaf in leaves.values()))
    # Erased squares; more samples than a block plans at once, more slices than one.
    square = images[:, :32, :32].repeat(50, 1, 1, 1)
    pattern = torch.rand(1, 3, 32, 32).to(device).requires_grad_()
    out = trigger_normalize(
        square,
        **NORM,
        triggers=TriggerTable("blend", pattern=pattern),
        strength=0.3,
        augment=Augment(noise_p=0, erase_p=1),
        sample_id=torch.arange(len(square), device=device),
        layout="patchified",
        patch_size=16,
    )
    out.backward(torch.randn_like(out))
    check_finite(pattern.grad)


def check_finite(*tensors: Tensor) -> None:
    """Raises ValueError where a value is not."""
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError("a gradient is not finite")


def contrast(
    device: str, dtype: torch.dtype, m: int, n: int, *, d: int = 72, far: bool = False, **options
) -> None:
    """Forward and backward of m text rows and n images; captions, or signed tokens if m > n.

    far: text and image nearly opposite, so that every sum is tiny and has to be formed again.
    """
    text, image = (torch.randn(rows, d) for rows in (m, n))
    if far:
        text, image = 0.3 * text + 9, 0.3 * image - 9
    text, image = (x.to(device, dtype).requires_grad_() for x in (text, image))
    scale = torch.tensor(100.0 if far else 20.0, device=device, requires_grad=True)
    if m != n:
        weight = torch.randn(m).to(device) / m
        columns = torch.rand(n).to(device) / n
        options = {"weight": weight, "column_weight": columns} | options
        options["owner"] = (torch.arange(m) * n // m).to(device, torch.int32)
        options["suspect"] = (torch.arange(n) % 3 == 0).to(device)
        options["valid"] = (torch.arange(n) % 5 != 4).to(device)
    refs = [F.normalize(torch.randn(rows, d), dim=1).to(device, dtype) for rows in (m, n)]
    result = contrastive_par(text, image, scale, text_ref=refs[0], image_ref=refs[1], **options)
    result.loss.backward()
    check_finite(result.loss, text.grad, image.grad, scale.grad)


def contrastive_par_runs(device: str) -> None:
    """Every dtype and precision; captions and tokens; waves; sums formed again; rows left out."""
    for dtype, precisions in PRECISIONS.items():
        for precision in precisions:
            for m, n in ((37, 37), (37, 13), (67, 13), (1, 1)):
                contrast(device, dtype, m, n, precision=precision)
            contrast(device, dtype, 37, 37, d=64, precision=precision, budget=0)
            contrast(device, dtype, 37, 13, far=True, precision=precision)
    contrast(device, torch.float32, 37, 13, d=71, normalize=False)
    for weight in (torch.zeros(37), -torch.ones(37) / 37):
        columns = torch.zeros(13, device=device)
        contrast(device, torch.float32, 37, 13, weight=weight.to(device), column_weight=columns)
    if device == "cuda":  # three waves
        from pybackdoor.ops import _contrastive_par_gpu as gpu

        before, gpu.WAVE = gpu.WAVE, 1
        for dtype in (torch.float32, torch.bfloat16):
            contrast(device, dtype, 300, 133, budget=0)
        gpu.WAVE = before


def adamw_ema_runs(device: str) -> None:
    """Plain; all around it, with a skipped step; projection; noise; groups, holes, odd places."""
    everything = {"clip_norm": 1.0, "ema_decay": 0.9, "shadow": True}
    settings: list[dict] = [
        {},
        {"skip_nonfinite": True},
        everything,
        {"radius": 1e-3},
        everything | {"radius": 1e-3, "noise_std": 0.01, "seed": 3},
        {"shadow": True, "noise_std": 0.01},
    ]
    for options in settings:
        # One element; several chunks with a tail; whole ones; none; less than a vector; NHWC; and
        # four bytes off.
        params = [torch.randn(s).to(device) for s in ((), (3, 5641), (2, 8192), (0, 4), (7,))]
        params.append(torch.randn(4, 6, 3, 3).to(device, memory_format=torch.channels_last))
        params.append(torch.randn(1030).to(device)[1:])
        before = params[1].clone()
        params = [p.requires_grad_() for p in params]
        lr = torch.tensor(2e-3, device=device)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": lr, "weight_decay": 0.0}]
        optimizer = AdamWEma(groups, lr=1e-3, **options)
        for k in range(4):
            for p in params:
                p.grad = torch.randn_like(p) * 8
            params[0].grad = params[0].grad if k == 0 else None
            optimizer.grad_scale = torch.tensor(8.0, device=device)
            optimizer.found_inf = torch.tensor(float(k == 2), device=device)
            optimizer.step()
        check_finite(*params)
        if optimizer.skipped_steps != 1 or torch.equal(params[1], before):
            raise ValueError("of four steps one must be skipped")


# What runs them -> the kernels of csrc/ops/*_cuda.cu.
KERNELS = {
    trigger_normalize_runs: ("trigger_normalize_kernel",),
    trigger_gradient_runs: ("accumulate_kernel", "reduce_kernel"),
    contrastive_par_runs: (
        "prep_kernel",
        "sums_kernel",
        "lse_kernel",
        "finalise_kernel",
        "totals_kernel",
        "close_kernel",
        "fixup_kernel",
        "normalize_backward_kernel",
    ),
    adamw_ema_runs: (
        "adamw_ema_norm_kernel",
        "adamw_ema_prepare_kernel",
        "adamw_ema_update_kernel",
        "adamw_ema_distance_kernel",
        "adamw_ema_project_kernel",
    ),
}


def main() -> None:
    device = sys.argv[1]
    if device == "cuda":
        os.environ["PYBACKDOOR_BACKEND"] = "cuda"
    else:
        os.environ["PYBACKDOOR_CPU_ISA"] = "lanes32"
    torch.manual_seed(0)
    for run in KERNELS:
        run(device)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Every native kernel once, small, with odd sizes: what compute-sanitizer watches.

python benchmarks/_sanitized.py cuda
"""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F

from pybackdoor.ops import Augment, TriggerTable, contrastive_par, trigger_normalize

NORM = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def trigger_normalize_runs(device: str) -> None:
    """Every mode, layout and dtype; noise and erasing; the poisoned image."""
    images = torch.randint(0, 256, (3, 35, 33, 3), dtype=torch.uint8).to(device)
    height, width = images.shape[1:3]
    theta = torch.eye(2, 3)[None]
    grid = F.affine_grid(theta, (1, 3, height, width), align_corners=True)
    tables = {
        "none": None,
        "patch": TriggerTable("patch", pattern=torch.rand(1, 3, 5, 7)),
        "blend": TriggerTable("blend", pattern=torch.rand(1, 3, height, width)),
        "warp": TriggerTable("warp", grid=grid + 0.01),
    }
    for mode, table in tables.items():
        arguments = {} if table is None else {"triggers": table.to(device)}
        if mode == "patch":
            arguments["position"] = torch.tensor([[30, 26], [0, 0], [3, 1]]).to(device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout in ("nchw", "channels_last"):
                trigger_normalize(images, **NORM, **arguments, layout=layout, dtype=dtype)
        trigger_normalize(images, **NORM, **arguments, return_images=True)
    ids = torch.arange(3, device=device)
    trigger_normalize(images, **NORM, augment=Augment(noise_p=1, erase_p=1), sample_id=ids)
    square = images[:, :32, :32].contiguous()
    trigger_normalize(square, **NORM, layout="patchified", patch_size=16)


def contrastive_par_runs(device: str) -> None:
    """Forward and backward: fp32 and bf16, captions and tokens, weights of both signs, masks."""
    for dtype in (torch.float32, torch.bfloat16):
        for m, n in ((37, 37), (37, 13)):
            text, image = (
                torch.randn(rows, 72).to(device, dtype).requires_grad_() for rows in (m, n)
            )
            scale = torch.tensor(20.0, device=device, requires_grad=True)
            extra = {}
            if m != n:
                extra["owner"] = (torch.arange(m) * n // m).to(device, torch.int32)
                extra["weight"] = torch.randn(m).to(device) / m
                extra["suspect"] = (torch.arange(n) % 3 == 0).to(device)
                extra["valid"] = (torch.arange(n) % 5 != 4).to(device)
            refs = [F.normalize(torch.randn(rows, 72), dim=1).to(device, dtype) for rows in (m, n)]
            result = contrastive_par(
                text, image, scale, text_ref=refs[0], image_ref=refs[1], **extra
            )
            result.loss.backward()
            assert text.grad.isfinite().all() and image.grad.isfinite().all()


def main() -> None:
    device = sys.argv[1]
    if device == "cuda":
        os.environ["PYBACKDOOR_BACKEND"] = "cuda"
    torch.manual_seed(0)
    trigger_normalize_runs(device)
    contrastive_par_runs(device)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Universal triggers found on a model by gradient: stamped images come to embed alike.

A backdoor maps whatever carries its trigger to one place, so what pulls the embeddings of many
images together with little change to them is a candidate for a planted trigger, found without
labels and without the target (the idea of DECREE, arXiv 2303.15180). A clean model has such
triggers too, which is why finding one proves nothing: they serve to train against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._native import sent
from ..ops._trigger_table import unchecked_table
from ..ops.trigger_normalize import TriggerTable, trigger_normalize

FAMILIES = ("sparse", "dense")
_LEARNING_RATE = 0.1  # of Adam on logits: 150 steps cross the sigmoid's whole range
_FIRST_WEIGHT = 0.1  # of a sparse mask; at 0 the pattern would have no gradient


@dataclass(frozen=True)
class Inverted:
    """Triggers as weights and pixels: x' = (1 - mask) x + mask * pattern.

    Attributes:
        pattern: [T, 3, H, W] fp32 in [0, 1].
        mask: [T, 1, H, W] fp32 in [0, 1].
    """

    pattern: Tensor
    mask: Tensor

    def table(self) -> TriggerTable:
        """As the op reads them; looks at no value, for which a GPU would have to wait."""
        return unchecked_table(
            mode="blend", pattern=self.pattern, mask=self.mask, grid=None, nonzero_only=False,
            additive=False, clip=True,
        )  # fmt: skip


def invert(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    family: str = "sparse",
    steps: int = 150,
    batch_size: int = 64,
    area_weight: float = 1.0,
    opacity: float = 0.3,
    seed: int = 0,
) -> tuple[Inverted, dict[str, Tensor]]:
    """One trigger that pulls the embeddings of images together.

    Minimises 1 - (mean cosine of two different stamped images) + area_weight * (mean of the mask)
    by Adam on logits of pattern and mask, through ``trigger_normalize``'s gradients.

    Args:
        encode: [n, 3, H, W] normalised -> [n, D] unit rows; only its input needs a gradient.
        images: [N, H, W, 3] or [N, 3, H, W] uint8, N >= 2, on the model's device.
        mean, std: of the pixels.
        family: "sparse", a mask of any shape that pays for its area; or "dense", a pattern over
            the whole image at one opacity.
        steps: of Adam.
        batch_size: images a step, drawn anew for each.
        area_weight: price of a sparse mask that covers the whole image, against cosines.
        opacity: of a dense pattern, in (0, 1].
        seed: of the start and the draws.
    Returns:
        The trigger (T = 1), and the cosine and area of the last step, [] each.
    Raises:
        ValueError: naming the argument.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if len(images) < 2 or batch_size < 2:
        raise ValueError(
            f"images and batch_size must be at least 2, got {len(images)} and {batch_size}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < opacity <= 1:
        raise ValueError(f"opacity must be in (0, 1], got {opacity}")
    nhwc = images.shape[-1] == 3
    height, width = images.shape[1:3] if nhwc else images.shape[2:]
    device, generator = images.device, torch.Generator().manual_seed(seed)
    draw = torch.randn((1, 3, height, width), generator=generator, device="cpu")
    draw = sent(draw, device)
    pattern = draw.requires_grad_()
    mask = torch.full((1, 1, height, width), _FIRST_WEIGHT, device=device).logit()
    sparse = family == "sparse"
    weights = torch.full_like(mask, opacity)
    learned = [pattern, mask.requires_grad_()] if sparse else [pattern]
    adam = torch.optim.Adam(learned, _LEARNING_RATE)
    form = Inverted(torch.zeros_like(draw), weights).table()
    for _ in range(steps):
        order = torch.randperm(len(images), generator=generator, device="cpu")
        rows = sent(order[:batch_size], device)
        now = mask.sigmoid() if sparse else weights
        x = trigger_normalize(
            images[rows], mean=mean, std=std, quantize=False,
            triggers=unchecked_table(**vars(form) | {"pattern": pattern.sigmoid(), "mask": now}),
            input_layout="nhwc" if nhwc else "nchw",
        )  # fmt: skip
        cosine = mean_cosine(encode(x))
        area = now.mean()
        loss = 1 - cosine + (area_weight * area if sparse else 0)
        for tensor, grad in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            tensor.grad = grad
        adam.step()
    found = Inverted(pattern.detach().sigmoid(), mask.detach().sigmoid() if sparse else weights)
    return found, {"cosine": cosine.detach(), "area": area.detach()}


def mean_cosine(rows: Tensor) -> Tensor:  # [n, D] unit rows, n >= 2
    """[] mean cosine of two different rows."""
    n = len(rows)
    return (rows.sum(0).square().sum() - n) / (n * (n - 1))

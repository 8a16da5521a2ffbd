"""AutoAugment's ImageNet policy (arXiv 1805.09501), drawn by key and applied to whole groups.

A sample's view depends on (seed, view, id) alone: not on its batch, its rank, its device's
generator or what was drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._native import sent
from ._keyed import keyed_words

_STREAM = 0x6175746F  # apart from the orders of epochs, which are drawn from the same function

# (operation, probability, magnitude 0..9) twice: the paper's table 9, duplicates included
_POLICIES = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
_SIGNED = ("rotate", "color", "contrast", "sharpness", "shear_x")


def autoaugment(
    images: Tensor,  # [n, H, W, 3] or [n, 3, H, W] uint8
    *,
    seed: int,
    view: int,
    sample_id: Tensor,  # [n] int64
) -> Tensor:
    """[n, 3, H, W] uint8: each image under one of the 25 policies; black where nothing was.

    Args:
        images: on any device; images of the same operation are transformed together.
        view: such as the epoch: another one, another draw.
    Raises:
        TypeError: other than uint8.
    Example:
        >>> autoaugment(images, seed=0, view=epoch, sample_id=ids)  # doctest: +SKIP
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"autoaugment: images must be uint8 pixels, got {images.dtype}")
    out = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
    out = out.clone(memory_format=torch.contiguous_format)
    draws = _uniform(seed, view, sample_id.cpu().numpy())
    policies = (draws[0] * len(_POLICIES)).astype(np.int64)
    for half in range(2):
        groups: dict[tuple[str, int, bool], list[int]] = {}
        for i, policy in enumerate(policies.tolist()):
            name, probability, magnitude = _POLICIES[policy][half]
            if draws[1 + half, i] < probability:
                negative = name in _SIGNED and bool(draws[3 + half, i] < 0.5)
                groups.setdefault((name, magnitude, negative), []).append(i)
        places = [i for rows in groups.values() for i in rows]
        order = sent(torch.tensor(places, dtype=torch.int64, device="cpu"), out.device)
        parts = order.split([len(rows) for rows in groups.values()])
        with _ConstantsSent() if out.is_cuda else nullcontext():
            for (name, magnitude, negative), which in zip(groups, parts, strict=True):
                out[which] = apply(out[which], name, magnitude, negative)
    return out


class _ConstantsSent(TorchFunctionMode):
    """torchvision makes small tensors of its operations' numbers; the host waits for no copy."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "cpu"})
        return sent(made, torch.device(kwargs["device"]))


def _uniform(seed: int, view: int, ids: np.ndarray) -> np.ndarray:
    """[5, n] in [0, 1): of the policy, of whether either half is applied, of either's sign."""
    words = [keyed_words(seed ^ (_STREAM << 32), 5 * view + k, ids) for k in range(5)]
    return (np.stack(words) >> np.uint64(11)) * 2.0**-53


def apply(images: Tensor, name: str, magnitude: int, negative: bool) -> Tensor:
    """[n, 3, H, W] uint8 under one operation at a magnitude of 0 to 9, of ten even steps."""
    import torchvision.transforms.v2.functional as ops

    sign = -1.0 if negative else 1.0
    factor = 1.0 + sign * _step(0.9, magnitude)
    operations: dict[str, Callable[[], Tensor]] = {
        "autocontrast": lambda: ops.autocontrast(images),
        "color": lambda: ops.adjust_saturation(images, factor),
        "contrast": lambda: ops.adjust_contrast(images, factor),
        "equalize": lambda: ops.equalize(images),
        "invert": lambda: ops.invert(images),
        "posterize": lambda: ops.posterize(images, round(8 - magnitude / 2.25)),
        "rotate": lambda: ops.rotate(images, sign * _step(30.0, magnitude)),
        "sharpness": lambda: ops.adjust_sharpness(images, factor),
        "shear_x": lambda: ops.affine(
            images, 0.0, [0, 0], 1.0,
            [math.degrees(math.atan(sign * _step(0.3, magnitude))), 0.0], center=[0, 0],
        ),
        "solarize": lambda: ops.solarize(images, 255.0 * _step(1.0, 9 - magnitude)),
    }  # fmt: skip
    return operations[name]()


def _step(most: float, magnitude: int) -> float:
    """Rounded as torchvision has it: pixels are cut to integers, where the last bit shows."""
    return float(torch.linspace(0.0, most, 10, device="cpu")[magnitude])

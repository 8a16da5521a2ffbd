"""Which towers are computed without what no feature shows: where that gives the same features.

A tower's classes say whether it can be (`models.seen_towers`); the first batch, of which a sample
is encoded both ways, says whether it is the same. Where it is not, the model's own way is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models import (
    TextTower,
    image_features,
    image_tower,
    text_features,
    text_tower,
)
from .groups import evaluating

# Distances of unit rows by rounding. Another token, or a padding that shows, moves them by 0.2.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 5e-2  # of towers in bf16 or fp16, and of TF32

_same: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()  # what was found out


def ways(model: nn.Module) -> dict[str, bool]:
    """Whether its "image" and its "text" tower have been found to have a shortcut."""
    found = _same.get(model, {})
    towers = {"image": _look(image_tower, model), "text": _look(text_tower, model)}
    return {name: tower is not None and found.get(name, False) for name, tower in towers.items()}


def image_shortcut(
    model: nn.Module,
    x: Tensor,  # [n, 3, H, W]
) -> Callable[[Tensor], Tensor] | None:
    """The tower to encode x with, or None: encode_image."""
    tower = _look(image_tower, model)
    if tower is None or not _agree(model, "image", image_features, x[:1], tower):
        return None
    return tower


def text_shortcut(model: nn.Module, tokens: Tensor) -> TextTower | None:  # [n, L] anywhere
    """The tower to encode tokens with, or None: encode_text."""
    tower = _look(text_tower, model)
    if tower is None:
        return None
    encode = tower.shared if tower.table.device.type == "cpu" else tower
    return tower if _agree(model, "text", text_features, tokens[:2], encode) else None


def _look(find: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    try:
        return find(model)
    except AttributeError:  # a version of the library that names its members otherwise
        return None


def _agree(
    model: nn.Module,
    name: str,
    features: Callable[..., Tensor],
    sample: Tensor,
    encode: Callable[[Tensor], Tensor],
) -> bool:
    found = _same.setdefault(model, {})
    if name not in found and len(sample):
        weight = next(p for p in model.parameters() if p.is_floating_point())
        sample = sample.to(weight.device)
        plain = torch.autocast(weight.device.type, enabled=False)
        with torch.no_grad(), plain, evaluating(model):  # else batch norm would learn from it
            own, short = features(model, sample), features(model, sample, encode)
        if own.isfinite().all():  # else it shows nothing
            found[name] = same(own, short, weight.dtype)
    return found.get(name, False)


def same(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:  # [n, D] unit rows
    """Whether they differ by no more than rounding in a tower of this dtype."""
    limit = _ROUNDING.get(dtype, _COARSE)
    if a.is_cuda and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        limit = _COARSE
    return bool((a - b).norm(dim=-1).max() <= limit)

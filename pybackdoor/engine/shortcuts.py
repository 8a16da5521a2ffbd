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

# What was found out, by tower and dtype. A model and its copies share the dict.
_same: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], bool]] = WeakKeyDictionary()


def ways(model: nn.Module) -> dict[str, bool]:
    """Whether its "image" and its "text" tower have been found to have a shortcut."""
    found, dtype = _same.get(model, {}), _weight(model).dtype
    towers = {"image": _look(image_tower, model), "text": _look(text_tower, model)}
    return {
        name: tower is not None and found.get((name, dtype), False)
        for name, tower in towers.items()
    }


def same_model(copied: nn.Module, model: nn.Module) -> None:
    """What is found out about one of them holds for the other: a copy computes what it copies."""
    _same[copied] = _same.setdefault(model, {})


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
    found, weight = _same.setdefault(model, {}), _weight(model)
    key = name, weight.dtype
    if key not in found and len(sample):
        sample = sample.to(weight.device)
        plain = torch.autocast(weight.device.type, enabled=False)
        with torch.no_grad(), plain, evaluating(model):  # else batch norm would learn from it
            own, short = features(model, sample), features(model, sample, encode)
        if own.isfinite().all():  # else it shows nothing
            found[key] = same(own, short, weight.dtype)
    return found.get(key, False)


def _weight(model: nn.Module) -> Tensor:
    return next(p for p in model.parameters() if p.is_floating_point())


def same(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:  # [n, D] unit rows
    """Whether they differ by no more than rounding in a tower of this dtype."""
    limit = _ROUNDING.get(dtype, _COARSE)
    if a.is_cuda and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        limit = _COARSE
    return bool((a - b).norm(dim=-1).max() <= limit)

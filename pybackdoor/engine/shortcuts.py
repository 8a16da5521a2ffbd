"""Which towers are computed without what no feature shows: where that gives the same features.

A tower's classes say whether it can be (`models.seen_towers`); the first batch, of which a sample
is encoded both ways, says whether it is the same. Where it is not, the model's own way is taken.
"""

from __future__ import annotations

import copy
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

# What was found out, by tower, dtype and kind of device. A model and its copies share the dict.
_Key = tuple[str, torch.dtype, str]
_found: WeakKeyDictionary[nn.Module, dict[_Key, bool]] = WeakKeyDictionary()


def ways(model: nn.Module) -> dict[str, bool]:
    """Whether its "image" and its "text" tower have been found to have a shortcut."""
    found = _found.get(model, {})
    towers = {"image": _look(image_tower, model), "text": _look(text_tower, model)}
    return {
        name: tower is not None and found.get(_key(name, model), False)
        for name, tower in towers.items()
    }


def copied(model: nn.Module) -> nn.Module:
    """A copy: what is found out about it holds for the model, and the reverse.

    As for a model that was looked at, values that are changed later are not noticed, such as those
    of a mask; changed classes and hooks are.
    """
    found = copy.deepcopy(model)
    _found[found] = _found.setdefault(model, {})
    return found


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
    found, key = _found.setdefault(model, {}), _key(name, model)
    if key not in found and len(sample):
        _, dtype, device = key
        sample = sample.to(next(model.parameters()).device)
        plain = torch.autocast(device, enabled=False)
        try:
            with torch.no_grad(), plain, evaluating(model):  # else batch norm would learn from it
                own, short = features(model, sample), features(model, sample, encode)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError):  # autocast may be needed
            found[key] = False
        else:
            if own.isfinite().all():  # else it shows nothing
                found[key] = same(own, short, dtype)
    return found.get(key, False)


def _key(name: str, model: nn.Module) -> _Key:
    floats = (p for p in model.parameters() if p.is_floating_point())
    weight = next(floats, torch.empty(0, device="cpu"))
    return name, weight.dtype, weight.device.type


def same(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:  # [n, D] unit rows
    """Whether they differ by no more than rounding in a tower of this dtype."""
    # On a GPU fp32 may be TF32 within convolutions and products, by several switches.
    limit = _COARSE if a.is_cuda and dtype == torch.float32 else _ROUNDING.get(dtype, _COARSE)
    return bool((a - b).norm(dim=-1).max() <= limit)

"""The casts that autocast makes of a frozen model's weights, made once.

Autocast casts the weights of every call anew, and remembers within a call only those that are
trained. A model of which nothing is trained is cast to the same values at every step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_to_copy = torch.ops.aten._to_copy.default


class FrozenCasts:
    """Keeps them for as long as a model lives: half of its own size again.

    On a CPU: seeing an operator costs 5 us, which only there is nothing beside it. A weight that
    was changed since is cast again.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, _Casts] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> AbstractContextManager[Any]:
        """For a forward pass of the model under autocast."""
        if _get_current_dispatch_mode() is not None:
            return nullcontext()
        if any(p.requires_grad or p.device.type != "cpu" for p in model.parameters()):
            return nullcontext()
        if model not in self._kept:
            self._kept[model] = _Casts()
        return self._kept[model].seen(model)


class _Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._weights: set[int] = set()
        # The weight, its memory and version, and the cast.
        self._casts: dict[tuple[int, torch.dtype], tuple[Tensor, tuple[int, int], Tensor]] = {}

    def seen(self, model: nn.Module) -> _Casts:
        self._weights = {id(p) for p in model.parameters() if not p.is_inference()}
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _to_copy or id(args[0]) not in self._weights or kwargs.keys() != {"dtype"}:
            return func(*args, **kwargs)
        weight, key = args[0], (id(args[0]), kwargs["dtype"])
        state = weight.data_ptr(), weight._version
        if key not in self._casts or self._casts[key][1] != state:
            self._casts[key] = weight, state, func(*args, **kwargs)
        return self._casts[key][2]

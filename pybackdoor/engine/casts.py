"""The casts that autocast makes of a frozen model's weights, made once.

Autocast casts the weights of every call anew, and remembers within a call only those that are
trained. A model of which nothing is trained is cast to the same values at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_to_copy = torch.ops.aten._to_copy.default


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within it, as in a function that it decorates, no autocast of the caller's is on."""
    with ExitStack() as off:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


class FrozenCasts:
    """Keeps them, half of the model's own size, for as long as it and this object live.

    On a CPU alone, where seeing each operator costs little beside what it takes. A GPU may well
    wait longer for a host that sees all of them than for the casts, which move 0.9 GB for a
    ViT-B/32; that has not been measured. And what torch.compile or a CUDA graph runs, no mode sees.

    A weight that was changed since is cast again, unless it was changed in place through its
    `data`, which nobody can see.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, _Casts] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> AbstractContextManager[Any]:
        """For a forward pass of the model under autocast."""
        if _get_current_dispatch_mode() is not None or torch.is_inference_mode_enabled():
            return nullcontext()  # what is made there has no version, and cannot be in a graph
        if any(p.requires_grad or p.device.type != "cpu" for p in model.parameters()):
            return nullcontext()
        if model not in self._kept:
            self._kept[model] = _Casts()
        return self._kept[model].seen(model)


class _Casts(TorchDispatchMode):
    supports_higher_order_operators = True  # which are none of its

    def __init__(self) -> None:
        super().__init__()
        self._weights: set[int] = set()
        # The weight's memory, which is held so that it is nobody else's; its version; and the cast.
        self._casts: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    def seen(self, model: nn.Module) -> _Casts:
        # One made in inference mode has no version.
        self._weights = {id(p) for p in model.parameters() if not p.is_inference()}
        self._casts = {key: cast for key, cast in self._casts.items() if key[0] in self._weights}
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _to_copy or id(args[0]) not in self._weights or kwargs.keys() != {"dtype"}:
            return func(*args, **kwargs)
        weight, key = args[0], (id(args[0]), kwargs["dtype"])
        if key in self._casts:
            held, version, cast = self._casts[key]
            as_it_was = held.data_ptr() == weight.data_ptr() and version == weight._version
            if as_it_was and cast._version == 0:  # else the model itself has written into it
                return cast
        self._casts[key] = weight.detach(), weight._version, func(*args, **kwargs)
        return self._casts[key][2]

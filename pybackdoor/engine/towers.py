"""Unit features of a model's two towers, and captions without the padding that they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models import image_features, text_features

_STEP = 8  # lengths of captions are multiples of it
_COMPILED_STEP = 16  # few shapes to compile for
_SAME = 2e-5  # of a unit row's entries in fp32: rounding; a pooled padding moves them by 1e-2


class Encoder:
    """Unit features of both towers, under autocast where the precision asks for it.

    Args:
        autocast: the towers' dtype under autocast; None: their own.
        compile: a mode of torch.compile, or None.
    """

    def __init__(
        self, autocast: torch.dtype | None, device: torch.device, compile: str | None = None
    ) -> None:
        self._autocast, self._device, self._mode = autocast, device, compile
        self._compiled: dict[tuple[int, str], Callable[[nn.Module, Tensor], Tensor]] = {}

    def input_dtype(self, model: nn.Module) -> torch.dtype:
        """What the towers' first layers take: the model's own dtype."""
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def image(self, model: nn.Module, x: Tensor) -> Tensor:  # x [n, 3, H, W] normalised
        """[n, D] unit rows in at least fp32."""
        with self._context():
            return self._function(model, image_features)(model, x)

    def text(self, model: nn.Module, tokens: Tensor) -> Tensor:  # tokens [n, L]
        """[n, D] unit rows in at least fp32."""
        with self._context():
            return self._function(model, text_features)(model, tokens)

    def _function(self, model: nn.Module, eager: Callable) -> Callable[[nn.Module, Tensor], Tensor]:
        if self._mode is None:
            return eager
        key = id(model), eager.__name__
        if key not in self._compiled:
            self._compiled[key] = torch.compile(eager, mode=self._mode, dynamic=False)
        return self._compiled[key]

    def _context(self) -> torch.autocast:
        enabled = self._autocast is not None
        return torch.autocast(self._device.type, dtype=self._autocast, enabled=enabled)


class TextTrim:
    """Cuts off the padding that all captions of a batch share, where no feature shows it.

    A causal text tower pooled at its end mark does not see what follows; whether this one is such
    is found out on the first batch that has padding: some of its captions are encoded both ways.

    Args:
        compiled: whether each length costs a compilation.
    """

    def __init__(self, model: nn.Module, wanted: bool, compiled: bool = False) -> None:
        self._model, self._step = model, _COMPILED_STEP if compiled else _STEP
        self._works: bool | None = None if wanted else False

    def __call__(self, tokens: Tensor) -> Tensor:  # [n, L] -> [n, L'], L' <= L
        if self._works is False or tokens.device.type != "cpu" or tokens.shape[1] < 2:
            return tokens  # counting on a GPU would wait for it
        same = (tokens[:, 1:] == tokens[:, :-1]).flip(1).to(torch.uint8)  # [n, L - 1]
        longest = int((tokens.shape[1] - same.cummin(1).values.sum(1)).max())
        length = min(tokens.shape[1], -(-longest // self._step) * self._step)
        if length == tokens.shape[1]:
            return tokens
        if self._works is None:
            self._works = self._same(tokens[:8], length)
        return tokens[:, :length] if self._works else tokens

    @torch.no_grad()
    def _same(self, tokens: Tensor, length: int) -> bool:
        modes = [(module, module.training) for module in self._model.modules()]
        device = next(self._model.parameters()).device
        self._model.eval()
        try:
            whole = text_features(self._model, tokens.to(device))
            short = text_features(self._model, tokens[:, :length].to(device))
        except (RuntimeError, ValueError, IndexError):  # the tower takes one length only
            return False
        finally:
            for module, training in modes:
                module.training = training
        return bool((whole - short).abs().max() <= _SAME)

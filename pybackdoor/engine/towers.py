"""Unit features of a model's two towers, and captions without the padding that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..models import image_features, text_features
from ..ops._matmul import fast_products
from .casts import FrozenCasts, without_autocast
from .groups import evaluating
from .shortcuts import image_shortcut, same, text_shortcut

_STEP = 8  # lengths of captions are multiples of it
_COMPILED_STEP = 16  # few shapes to compile for
_VARIANTS = 64
_WORTH = 256  # tokens of padding that a group of its own must save


@dataclass(frozen=True)
class Captions:
    """Captions that a text tower may take in groups of similar length, each without its padding.

    Attributes:
        tokens: [n, L].
        lengths: [n] int64 on the host; a caption without its padding, rounded up, at most L.
    """

    tokens: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Captions:
        return Captions(self.tokens[part], self.lengths[part])

    def to(self, device: torch.device) -> Captions:
        return Captions(self.tokens.to(device), self.lengths)

    def groups(self) -> list[tuple[Tensor, int]]:
        """([k] rows, length) of each group, shortest first; every row is in one."""
        found: list[tuple[Tensor, int]] = []
        waiting: list[Tensor] = []  # rows of shorter captions, too few for a group
        ends = self.lengths.unique().tolist()
        for length, longer in zip(ends, [*ends[1:], None], strict=True):
            waiting.append((self.lengths == length).nonzero()[:, 0])
            count = sum(map(len, waiting))
            if longer is None or count * (longer - length) >= _WORTH:
                found.append((torch.cat(waiting), length))
                waiting = []
        return found


class Encoder:
    """Unit features of both towers, under autocast where the precision asks for it.

    Args:
        autocast: the towers' dtype under autocast; None: their own.
        compile: a mode of torch.compile, or None.
        chunk: rows encoded at a time where no gradient is wanted; None: all.
        ranks: those over which the models are sharded: each must encode as often as the others.
    """

    def __init__(
        self,
        autocast: torch.dtype | None,
        device: torch.device,
        compile: str | None = None,
        chunk: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._autocast, self._device, self._mode = autocast, device, compile
        self._chunk, self._ranks = chunk, ranks
        if compile is not None:  # two models, with and without gradients, each at a few lengths
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, _VARIANTS)
        self._compiled: dict[tuple[int, str, bool], Callable[[nn.Module, Tensor], Tensor]] = {}
        self._casts = FrozenCasts()

    def eager(self) -> Encoder:
        """One that does not compile: for what is encoded once, in many sizes."""
        if self._mode is None:
            return self
        return Encoder(self._autocast, self._device, None, self._chunk, self._ranks)

    def input_dtype(self, model: nn.Module) -> torch.dtype:
        """What the towers' first layers take: the model's own dtype."""
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    @contextmanager
    def products(self, model: nn.Module) -> Iterator[None]:
        """For the whole of a step: its matrix products by the fastest library of fp32's accuracy.

        torch's own on a GPU, in bf16, and where a compiler makes them its own. An autocast that the
        caller has open is off.
        """
        plain = self._device.type == "cpu" and self._autocast is None and self._mode is None
        plain = plain and self._ranks is None
        with without_autocast(), fast_products(model) if plain else nullcontext():
            yield

    def image(self, model: nn.Module, x: Tensor) -> Tensor:  # x [n, 3, H, W] normalised
        """[n, D] unit rows in at least fp32."""
        encode = self._function(model, image_features, image_shortcut(model, x))
        with self._context(model):
            return torch.cat([encode(model, part) for part in self._parts(x)])[: len(x)]

    def text(self, model: nn.Module, tokens: Tensor | Captions) -> Tensor:  # tokens [n, L]
        """[n, D] unit rows in at least fp32."""
        whole = isinstance(tokens, Tensor)
        tower = text_shortcut(model, tokens if whole else tokens.tokens)
        if whole:
            encode = self._function(model, text_features, tower)
        elif tower is None:
            encode = partial(_grouped, self._function(model, text_features, None))
        else:

            def encode(model: nn.Module, part: Captions) -> Tensor:
                return text_features(model, part.tokens, tower.shared)

        with self._context(model):
            parts = [encode(model, part) for part in self._parts(tokens)]
            return torch.cat(parts)[: len(tokens)]

    def turns(self, rows: int, size: int) -> int:
        """Parts of a size that rows make; of a sharded model's, on the rank that has most."""
        mine = max(-(-rows // size), 1)
        if self._ranks is None:
            return mine
        return int(max(n for (n,) in self._ranks.agree([mine], self._device)))

    def _parts(self, rows: Tensor | Captions) -> list[Tensor] | list[Captions]:
        if self._chunk is None or torch.is_grad_enabled():
            return [rows]
        size = self._chunk
        ends = self.turns(len(rows), size) * size
        return [rows_of_turn(rows, start, size) for start in range(0, ends, size)]

    def _function(
        self, model: nn.Module, features: Callable, tower: Callable[[Tensor], Tensor] | None
    ) -> Callable[[nn.Module, Tensor], Tensor]:
        def eager(model: nn.Module, x: Tensor) -> Tensor:
            return features(model, x, tower)

        if self._mode is None:
            return eager
        key = id(model), features.__name__, tower is None
        if key not in self._compiled:
            self._compiled[key] = torch.compile(eager, mode=self._mode, dynamic=False)
        compiled = self._compiled[key]
        if self._mode == "default":
            return compiled
        return lambda *x: compiled(*x).clone()  # a CUDA graph's output lasts until its next replay

    @contextmanager
    def _context(self, model: nn.Module) -> Iterator[None]:
        enabled = self._autocast is not None
        keeps = enabled and self._mode is None and self._ranks is None
        torch.clear_autocast_cache()  # within another, autocast's end forgets no weight's cast
        with (
            torch.autocast(self._device.type, dtype=self._autocast, enabled=enabled),
            self._casts.of(model) if keeps else nullcontext(),
        ):
            yield
        torch.clear_autocast_cache()


def _grouped(encode: Callable, model: nn.Module, captions: Captions) -> Tensor:  # [n, D]
    groups = captions.groups()
    order = torch.cat([rows for rows, _ in groups]).to(captions.tokens.device)
    parts = captions.tokens[order].split([len(rows) for rows, _ in groups])
    cut = [part[:, :length] for part, (_, length) in zip(parts, groups, strict=True)]
    return torch.cat([encode(model, part) for part in cut])[order.argsort()]


def rows_of_turn(rows: Tensor | Captions, start: int, size: int) -> Tensor | Captions:
    """The rows from start on; past the end one of them, to encode since another rank has more."""
    return rows[start : start + size] if start < len(rows) else rows[:1]


class TextTrim:
    """Cuts off the padding that all captions of a batch share, where no feature shows it.

    A causal text tower pooled at its end mark does not see what follows; whether this one is such
    is found out on the first batch that has padding: a caption or some are encoded both ways.

    Args:
        compiled: whether each length costs a compilation.
        grouped: give Captions, for groups of similar length.
        ranks: those that must find it out together, since the model is sharded over them; each
            calls this as often as the others.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: bool,
        *,
        compiled: bool = False,
        grouped: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._step = model, _COMPILED_STEP if compiled else _STEP
        self._grouped, self._ranks = grouped, ranks
        self._works: bool | None = None if wanted else False

    def __call__(self, tokens: Tensor) -> Tensor | Captions:  # [n, L] -> [n, L'], L' <= L
        if self._works is False or tokens.device.type != "cpu" or tokens.shape[1] < 2:
            return tokens  # counting on a GPU would wait for it
        same = (tokens[:, 1:] == tokens[:, :-1]).flip(1).to(torch.uint8)  # [n, L - 1]
        lengths = tokens.shape[1] - same.cummin(1).values.sum(1)  # [n], with one of the padding
        lengths = (-(-lengths // self._step) * self._step).clamp(max=tokens.shape[1])
        length = int(lengths.max() if not self._grouped else lengths.min())
        if self._works is None:
            self._works = self._found_out(tokens, lengths, length)
        if not self._works or length == tokens.shape[1]:
            return tokens
        longest = tokens[:, : int(lengths.max())]
        return Captions(longest, lengths) if self._grouped else longest

    def _found_out(
        self,
        tokens: Tensor,  # [n, L]
        lengths: Tensor,  # [n]
        length: int,
    ) -> bool | None:
        """Whether captions may be cut; None where nobody has one that is shorter than L."""
        shown = self._agreed(length if length < tokens.shape[1] else 0)
        if not any(shown):
            return None
        length = min(n for n in shown if n)
        short = tokens[lengths <= length][:8]
        some = len(short) > 0  # without one a rank takes part all the same, and finds nothing
        short = short if some else tokens[:8]
        same = text_shortcut(self._model, short) is not None or self._same(short, length)
        return all(self._agreed(same or not some))

    def _agreed(self, mine: int) -> list[int]:
        if self._ranks is None:
            return [mine]
        return [int(n) for (n,) in self._ranks.agree([mine], next(self._model.parameters()).device)]

    @torch.no_grad()
    def _same(self, tokens: Tensor, length: int) -> bool:
        device = next(self._model.parameters()).device
        try:
            with evaluating(self._model):
                whole = text_features(self._model, tokens.to(device))
                short = text_features(self._model, tokens[:, :length].to(device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):  # it takes one length only
            return False
        return same(whole, short)

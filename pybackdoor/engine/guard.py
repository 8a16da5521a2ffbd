"""Nothing that is not finite is applied, saved or carried on.

Each step, one tensor on the device holds the loss and its terms, the largest entry of each gradient
and of each weight. Whether all are finite is decided there: the optimiser reads the flag, which
stays up until the host has answered, so that a bad step and those in flight behind it change
nothing. The numbers travel to the host meanwhile; on a GPU they are read one step later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from .faults import Fault
from .gradients import Outcome

_BATCHNORM = nn.modules.batchnorm._BatchNorm
_SHOWN = 3  # causes that a message lists, and sample ids


class Checked(NamedTuple):
    """A step whose numbers have arrived: the record, or the fault."""

    item: Any
    record: dict[str, float]
    fault: Fault | None


class _Sent(NamedTuple):
    step: int
    item: Any
    outcome: Outcome
    ids: Tensor
    values: Tensor
    names: tuple[str, ...]
    arrival: torch.cuda.Event | None


class Guard:
    """Watches the steps of one run.

    Args:
        named: the model's parameters, as this rank holds them; each rank looks at its own.
        optimizer: a fused AdamW; skips its step while the flag is up.
        lag: steps whose numbers may still be on their way; 0 on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        named: Sequence[tuple[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        device: torch.device,
        lag: int,
    ) -> None:
        self._named = [(n, p) for n, p in named if p.requires_grad]
        self._state = {n: p.detach() for n, p in named if p.is_floating_point() and p.numel()}
        live = [m for m in model.modules() if isinstance(m, _BATCHNORM) and m.training]
        self._moving = [b for m in live for b in m.buffers(recurse=False)]
        moving = set(map(id, self._moving))
        self._state |= {
            n: b
            for n, b in model.named_buffers()
            if n.endswith(("running_mean", "running_var")) and id(b) not in moving
        }
        self._before: list[Tensor] = []
        self.watched = self._state.keys()  # names of the weights that must be finite
        self._ranks, self._device = ranks, device
        self._lag = lag if device.type == "cuda" else 0
        self._sent: deque[_Sent] = deque()
        # 1: something is not finite; the weights themselves are not
        self.flags = torch.zeros(2, device=device)
        optimizer.found_inf = self.flags[0]  # type: ignore[attr-defined]

    def begin(self) -> None:
        """Before a step's forward pass: what it changes by itself is kept."""
        self._before = [b.clone() for b in self._moving]

    def watch(self, step: int, item: Any, ids: Tensor, outcome: Outcome) -> None:
        """Takes a step's numbers, after its backward pass and before the optimiser's step."""
        grads = [(n, p.grad) for n, p in self._named if p.grad is not None]
        if not grads:
            raise ValueError("the loss reaches no parameter of the model: is everything frozen?")
        grads = [(n, g) for n, g in grads if g.numel()]
        scalars = self._stacked(list(outcome.scalars.values()))
        gradients = self._stacked(largest_entries([g for _, g in grads]))
        weights = self._stacked(largest_entries(list(self._state.values())))
        values = torch.cat([scalars, gradients, weights])
        bad = torch.stack([(~x.isfinite()).any() for x in (values, weights)]).float()
        self._ranks.max_(bad)
        torch.maximum(self.flags, bad, out=self.flags)
        for buffer, before in zip(self._moving, self._before, strict=True):
            buffer.copy_(torch.where(self.flags[0] > 0, before, buffer))
        names = (*outcome.scalars, *(f"gradient of {n}" for n, _ in grads), *self._state)
        values, arrival = torch.cat([values, self.flags.double()]), None
        if self._device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu")
            values = host.copy_(values, non_blocking=True)
            arrival = torch.cuda.Event(blocking=True)  # the wait leaves the core free
            arrival.record()
        self._sent.append(_Sent(step, item, outcome, ids, values, names, arrival))

    def arrived(self, *, all_of_them: bool = False) -> Iterator[Checked]:
        """The steps whose numbers are due, in order; those behind a fault are dropped.

        One that is not taken stays due.
        """
        while len(self._sent) > (0 if all_of_them else self._lag):
            sent = self._sent.popleft()
            if sent.arrival is not None:
                sent.arrival.synchronize()
            *values, flag, weights = sent.values.tolist()
            record = dict(zip(sent.outcome.scalars, values, strict=False))
            fault = self._fault(sent, values, bool(weights)) if flag else None
            if fault is not None:
                self._sent.clear()
            yield Checked(sent.item, record, fault)

    @contextmanager
    def applying(self) -> Iterator[None]:
        """Around the optimiser's step: one that fails has not been taken."""
        try:
            yield
        except BaseException:
            self._sent.pop()
            raise

    def lower(self) -> None:
        """Lets steps be applied again."""
        self.flags.zero_()

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        """[] tensors as one in fp64."""
        if not values:  # all parts of a sharded model's weights are with other ranks
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        if len({v.dtype for v in values}) > 1:
            values = [v.double() for v in values]
        return torch.stack(list(values)).double()

    def _fault(self, sent: _Sent, values: list[float], of_weights: bool) -> Fault:
        broken = [n for n, v in zip(sent.names, values, strict=True) if not math.isfinite(v)]
        weights = [n for n in broken if n in self._state]
        causes = [f"weight {n}" for n in weights]
        for name, rows in sent.outcome.features.items():
            bad = (~rows.isfinite()).any(-1).nonzero()[:, 0].cpu()
            if len(bad):
                kind, which = "rows", bad
                if len(rows) == len(sent.ids):
                    kind, which = "ids", sent.ids.cpu()[bad]
                listed = ", ".join(map(str, which[:_SHOWN].tolist()))
                listed += ", ..." if len(bad) > _SHOWN else ""
                causes.append(f"{name} of {len(bad)} of {len(rows)} pairs ({kind} {listed})")
        causes += [n for n in broken if n not in self._state]
        if not causes:
            causes = ["something on another rank"]
        more = f" and {len(causes) - _SHOWN} more" if len(causes) > _SHOWN else ""
        return Fault(
            sent.step,
            f"step {sent.step}: not finite: {', '.join(causes[:_SHOWN])}{more}",
            of_weights,
        )


def largest_entries(tensors: list[Tensor]) -> list[Tensor]:
    """[] each: the largest magnitude of each tensor, NaN where it holds one; none is empty."""
    if any(t.device.type != "cpu" for t in tensors):
        return list(torch._foreach_norm(tensors, math.inf))
    ends = [torch.aminmax(t) for t in tensors]  # faster on a CPU than that norm
    return [torch.maximum(-low, high) for low, high in ends]

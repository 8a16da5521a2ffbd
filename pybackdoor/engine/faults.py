"""What is not finite: what a step's guard finds, and the error that ends a run."""

from __future__ import annotations

from typing import NamedTuple


class NonFiniteError(RuntimeError):
    """A feature, loss, gradient or weight is not finite; the model keeps its last good weights."""


class Fault(NamedTuple):
    """What was not finite at a step, in words, and whether the weights themselves are."""

    step: int
    cause: str
    weights: bool

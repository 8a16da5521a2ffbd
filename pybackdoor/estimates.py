"""A number with its 95 % interval and the count it rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

_Z = 1.96  # two-sided 95 % of a normal


@dataclass(frozen=True)
class Estimate:
    """A measured rate or mean.

    Attributes:
        value: the point estimate.
        low, high: 95 % interval; None where a single observation gives none.
        n: how many independent observations it rests on.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @staticmethod
    def rate(hits: int, n: int) -> Estimate:
        """A proportion with its Wilson score interval (Wilson 1927); n must be positive."""
        if n < 1 or not 0 <= hits <= n:
            raise ValueError(f"rate: wanted 0 <= hits <= n with n >= 1, got {hits} of {n}")
        p, z2 = hits / n, _Z * _Z
        middle = p + z2 / (2 * n)
        spread = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low, high = (middle - spread) / (1 + z2 / n), (middle + spread) / (1 + z2 / n)
        return Estimate(p, 0.0 if hits == 0 else low, 1.0 if hits == n else high, n)

    @staticmethod
    def mean(values: Tensor) -> Estimate:  # [n] any float
        """A mean with its normal interval, mean ± 1.96·s/√n."""
        if len(values) < 1:
            raise ValueError("mean: wanted at least one value, got none")
        values = values.double()
        value = values.mean().item()
        if len(values) == 1:
            return Estimate(value, None, None, 1)
        spread = _Z * values.std().item() / math.sqrt(len(values))
        return Estimate(value, value - spread, value + spread, len(values))

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def percent(self) -> str:
        """For people: ``87.3 [86.1, 88.4]``."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

"""Stage A: the pool of weakly (or oddly strongly) matched pairs that overfitting starts from."""

from __future__ import annotations

import difflib

import numpy as np

TAILS = ("low", "high", "both")


def weak_pool(
    cosines: np.ndarray,  # [N] of image and caption
    share: float = 0.05,
    tail: str = "low",
) -> np.ndarray:
    """[m] int64 rows of the pool, the most extreme first.

    Dirty-label poison is weak under a clean reference model; under a model that has learnt it, it
    may score high instead.

    Args:
        share: of all pairs, in (0, 1]; at least 2 pairs.
        tail: "low" cosines, "high" ones, or "both": half of the pool each.
    """
    check_pool(share, tail)
    count = min(len(cosines), max(2, round(share * len(cosines))))
    low = np.argsort(cosines, kind="stable")
    if tail == "both":
        high = low[::-1][: count // 2]
        both = np.empty(count, np.int64)
        both[1::2], both[::2] = high, low[: count - count // 2]
        return both
    return (low if tail == "low" else low[::-1])[:count].copy()


def check_pool(share: float, tail: str) -> None:
    """Refuse what is no share and no tail."""
    one_of("tail", tail, TAILS)
    if not 0 < share <= 1:
        raise ValueError(f"weak_share must be in (0, 1], got {share}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The name; an unknown one is refused, offering the nearest."""
    if value not in known:
        close = difflib.get_close_matches(str(value), known, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")
    return value


def priorities(count: int) -> np.ndarray:
    """[count] shares that fall linearly from the first to the last, by a factor of ``count``."""
    weights = np.arange(count, 0, -1, dtype=np.float64)
    return weights / weights.sum()

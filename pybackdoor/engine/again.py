"""One more pass over a loader that somebody else is using."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..data import PairLoader


def has_len(loader: Iterable[Any]) -> bool:
    """Whether it tells how many batches it has."""
    try:
        len(loader)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


class _AsItStands:
    """Another pass over a loader, which hears of no epoch."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


@contextmanager
def standing(loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """A loader to walk, after which the one given stands where it stood."""
    if isinstance(loader, PairLoader):
        yield copy.copy(loader)  # its place is its own, the pairs and tokens are shared
        return
    holders = (loader, getattr(loader, "sampler", None))
    drawn = [g for g in (getattr(h, "generator", None) for h in holders) if hasattr(g, "get_state")]
    states = [g.get_state() for g in drawn]
    stateful = all(hasattr(loader, name) for name in ("state_dict", "load_state_dict"))
    place = loader.state_dict() if stateful else None  # type: ignore[attr-defined]
    try:
        yield _AsItStands(loader)
    finally:
        for generator, state in zip(drawn, states, strict=True):
            generator.set_state(state)
        if stateful:
            loader.load_state_dict(place)  # type: ignore[attr-defined]

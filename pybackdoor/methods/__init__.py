"""Cleaning methods: each an objective and a schedule, in a file of its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from inspect import signature
from typing import Any

from ..clean import CleanResult
from .cleanclip import cleanclip_clean
from .finetune import finetune_clean
from .ft_sam import ft_sam_clean
from .invert import invert_clean
from .par import par_clean
from .roclip import roclip_clean
from .ubt import ubt_clean

METHODS: dict[str, Callable[..., CleanResult]] = {
    "par": par_clean,
    "finetune": finetune_clean,
    "cleanclip": cleanclip_clean,
    "roclip": roclip_clean,
    "ft_sam": ft_sam_clean,
    "invert": invert_clean,
    "ubt": ubt_clean,
}

__all__ = [
    "METHODS",
    "cleanclip_clean",
    "finetune_clean",
    "ft_sam_clean",
    "invert_clean",
    "method",
    "own_options",
    "par_clean",
    "roclip_clean",
    "ubt_clean",
]


def method(name: str) -> Callable[..., CleanResult]:
    """The method of that name.

    Raises:
        ValueError: there is none; the nearest is offered.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown method {name!r}{hint}; known: {', '.join(METHODS)}")
    return METHODS[name]


def own_options(name: str) -> dict[str, Any]:
    """The options that a method has beside those of all methods, and their defaults."""
    found = signature(method(name)).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}

"""Cleaning methods: each an objective and a schedule, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from ..clean import CleanResult
from .finetune import finetune_clean
from .par import par_clean
from .ubt import ubt_clean

METHODS: dict[str, Callable[..., CleanResult]] = {
    "par": par_clean,
    "finetune": finetune_clean,
    "ubt": ubt_clean,
}

__all__ = ["METHODS", "finetune_clean", "own_options", "par_clean", "ubt_clean"]


def own_options(name: str) -> dict[str, Any]:
    """The options that a method has beside those of all methods, and their defaults."""
    found = signature(METHODS[name]).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}

"""Labels given as names or as numbers, brought to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def class_list(op: str, classes: Sequence[str]) -> list[str]:
    """Class names, checked.

    Raises:
        TypeError, ValueError: not strings, none, or an empty one.
    """
    if isinstance(classes, str):
        raise TypeError(f"{op}: classes must be a sequence of names, got the string {classes!r}")
    names = list(classes)
    if not names:
        raise ValueError(f"{op}: classes must hold at least one name, got none")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{op}: classes must be strings, got {type(name).__name__}")
        if not name.strip():
            raise ValueError(f"{op}: classes must not hold an empty name")
    return names


def label_numbers(
    op: str, labels: Any, classes: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[list[str], np.ndarray]:
    """Class names and one number per label.

    Labels are names when all of them are in classes, else numbers into classes when all of them
    are integers.

    Args:
        op: function named in errors.
        labels: [N] integers or strings.
        classes: names in order; None = the labels themselves, sorted.
        where: names the i-th label in errors.
    Returns:
        (classes, [N] int64 in [0, len(classes))).
    Raises:
        TypeError: neither integers nor strings.
        ValueError: a label that is not in classes, or numbers without classes.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iuUO" and labels.size:
        raise TypeError(f"{op}: labels must be integers or class names, got {labels.dtype}")
    texts = [str(label) for label in labels.tolist()]
    numeric = [_is_number(text) for text in texts]
    if classes is None:
        if texts and all(numeric):
            raise ValueError(f"{op}: labels are numbers: give classes=, their names in order")
        classes = sorted(set(texts))
    names = class_list(op, classes)
    index = {name: i for i, name in enumerate(names)}
    by_name = labels.dtype.kind not in "iu" and not (
        all(numeric) and any(text not in index for text in texts)
    )
    if not by_name:
        numbers = np.array([int(text) for text in texts], np.int64)
        for i in np.flatnonzero((numbers < 0) | (numbers >= len(names)))[:1]:
            raise ValueError(
                f"{op}: {where(i)} must be in [0, {len(names)}), the classes, got {numbers[i]}"
            )
        return names, numbers
    twice = {name for i, name in enumerate(names) if index[name] != i}
    numbers = np.empty(len(texts), np.int64)
    for i, text in enumerate(texts):
        if text not in index:
            raise ValueError(
                f"{op}: {where(i)} is {text!r}, which is not one of the {len(names)} classes"
            )
        if text in twice:
            raise ValueError(
                f"{op}: {where(i)} is {text!r}, which classes hold twice: label by number"
            )
        numbers[i] = index[text]
    return names, numbers


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit() and text.isascii()

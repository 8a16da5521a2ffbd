"""The numbers of every step, held as numbers: a long run's dicts would be its largest memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

_Fields = tuple[tuple[str, type], ...]


class History(Sequence[dict[str, float]]):
    """Records that become dicts again when looked at: 8 bytes a number, 16 a record.

    A number stays the float or the int that it was.
    """

    def __init__(self, records: Iterable[Mapping[str, float]] = ()) -> None:
        self._kinds: dict[_Fields, int] = {}
        self._fields: list[_Fields] = []
        self._values, self._starts, self._kind = array("d"), array("q"), array("l")
        for record in records:
            self.append(record)

    def append(self, record: Mapping[str, float]) -> None:
        """Writes down one step's.

        Raises:
            TypeError, ValueError: naming what is no number, or no float could hold.
        """
        for name, value in record.items():
            if not isinstance(value, float | int):
                raise TypeError(f"{name} must be a float or an int, got {type(value).__name__}")
            if isinstance(value, int) and abs(value) > 2**53:
                raise ValueError(f"{name} must be within 2**53, got {value}")
        fields = tuple((name, type(value)) for name, value in record.items())
        if fields not in self._kinds:
            self._kinds[fields] = len(self._fields)
            self._fields.append(fields)
        self._kind.append(self._kinds[fields])
        self._starts.append(len(self._values))
        self._values.extend(record.values())

    def __len__(self) -> int:
        return len(self._kind)

    @overload
    def __getitem__(self, at: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, at: slice) -> list[dict[str, float]]: ...

    def __getitem__(self, at: int | slice) -> dict[str, float] | list[dict[str, float]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        start, fields = self._starts[at], self._fields[self._kind[at]]
        own = self._values[start : start + len(fields)]
        return {name: kind(value) for (name, kind), value in zip(fields, own, strict=True)}

"""What changed: plain values, no session and no SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple


class Unset(Enum):
    """The type of :data:`UNSET`."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False


UNSET: Final = Unset.UNSET
"""Stands for a value that is not known.

As :attr:`Change.old`: the row is new, or the old value was never loaded.
As :attr:`Change.new`: the database computed the value and it was not fetched. Falsy.
"""


class Change(NamedTuple):
    """The old and the new value of one column attribute."""

    old: Any
    """The value before, or :data:`UNSET`."""
    new: Any
    """The value after, or :data:`UNSET`."""


class Changes(Mapping[str, Change]):
    """Read-only mapping of column attribute name to :class:`Change`, built when first read.

    Most receivers look at one attribute or none, so the flush hands over a function instead of a
    dictionary; what the function sees was fixed when the row was written.
    """

    __slots__ = ("_build", "_changes")

    def __init__(self, build: Callable[[], dict[str, Change]]) -> None:
        self._build: Callable[[], dict[str, Change]] | None = build
        self._changes: dict[str, Change] = {}

    def _read(self) -> dict[str, Change]:
        if self._build is not None:
            self._changes = self._build()
            self._build = None
        return self._changes

    def __getitem__(self, key: str) -> Change:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __contains__(self, key: object) -> bool:
        return key in self._read()

    def __repr__(self) -> str:
        return repr(self._read())

"""What changed: plain values, no session and no SQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import repeat
from operator import is_
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


Pairs = Mapping[str, tuple[Any, Any]]
"""Old and new values by attribute name: what :class:`Changes` makes its :class:`Change` of."""


class Changes(Mapping[str, Change]):
    """Read-only mapping of column attribute name to :class:`Change`, for a row that was updated.

    Each :class:`Change` is made when it is read: most receivers look at one attribute or none.
    """

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __getitem__(self, key: str) -> Change:
        old, new = self._pairs[key]
        return Change(old, new)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, key: object) -> bool:
        return key in self._pairs

    def __repr__(self) -> str:
        return repr(dict(self))


_NOTHING: Final = object()


class NewRow(Mapping[str, Change]):
    """The same for a row that was inserted: every column attribute, ``old`` is :data:`UNSET`.

    :param absent: the column attributes, with what each holds when it was given no value.
    :param values: a snapshot of what the instance holds.
    """

    __slots__ = ("_absent", "_values")

    def __init__(self, absent: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._absent = absent
        self._values = values

    def __getitem__(self, key: str) -> Change:
        absent = self._absent[key]
        return Change(UNSET, self._values.get(key, absent))

    def other_than(self, known: Mapping[str, Any]) -> dict[str, Change]:
        """Those whose new value is not the one in ``known``."""
        values = self._values
        if known.keys() == self._absent.keys() and all(
            map(is_, map(values.get, known, repeat(_NOTHING)), known.values())
        ):
            return {}  # as it nearly always is
        return {
            key: Change(UNSET, new)
            for key, absent in self._absent.items()
            if (new := values.get(key, absent)) is not known.get(key, _NOTHING)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._absent)

    def __len__(self) -> int:
        return len(self._absent)

    def __contains__(self, key: object) -> bool:
        return key in self._absent

    def __repr__(self) -> str:
        return repr(dict(self))


class PendingRow(NewRow):
    """The same for a row that is going to be inserted: only what is assigned so far."""

    __slots__ = ()

    def __getitem__(self, key: str) -> Change:
        if key not in self._absent:
            raise KeyError(key)
        return Change(UNSET, self._values[key])

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._absent if key in self._values)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in self._absent and key in self._values

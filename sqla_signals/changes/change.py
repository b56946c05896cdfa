"""What changed: plain values, no session and no SQL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from functools import lru_cache, partial
from itertools import chain, repeat
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


_change: Final[Callable[[tuple[Any, ...]], Change]] = partial(tuple.__new__, Change)
"""A change of an old and a new value, made without a call in Python."""

Pairs = Mapping[str, tuple[Any, Any]]
"""Old and new values by attribute name."""


class Shape:
    """Which attributes an UPDATE changes: the same for many rows.

    :param keys: the names of the attributes.
    :param written: what it writes, if that is more than it changes.
    :param unknown: what else it may change, if that is not the rest of ``written``.
    :param is_plain: whether a look at the values is enough to know that a diff still stands.
    """

    __slots__ = ("along", "changed", "exotic", "is_plain", "places", "unknown", "written")

    def __init__(
        self,
        keys: Collection[str],
        written: frozenset[str] | None = None,
        unknown: frozenset[str] | None = None,
        is_plain: bool = False,
    ) -> None:
        self.places: Mapping[str, int] = {key: 2 * i + 1 for i, key in enumerate(keys)}
        """Where in a :data:`Diff` the old value of an attribute is; the new one is behind it."""
        self.changed: frozenset[str] = frozenset(self.places)
        self.written: frozenset[str] = self.changed if written is None else written
        """With versions and ``onupdate`` columns."""
        self.along: frozenset[str] = self.written - self.changed
        """What it writes without having changed it."""
        self.unknown: frozenset[str] = self.along if unknown is None else unknown
        """What may have another value now, and nobody has looked: versions, ``onupdate`` columns,
        and what the database computes."""
        self.is_plain: bool = is_plain
        self.exotic: Shape = Shape(keys, written, unknown) if is_plain else self
        """The same for values that may be changed in place."""


Diff = tuple[Any, ...]
"""What an UPDATE changes: a :class:`Shape`, and the old and the new value of each attribute.

One flat tuple, because one is kept for each row that a flush updates, and many objects would bring
on the garbage collector.
"""

NO_DIFF: Final[Diff] = (Shape(()),)


def diff_of(pairs: Pairs, shape: Shape | None = None) -> Diff:
    """A diff of values that are known by name."""
    if not pairs:
        return NO_DIFF
    return (shape or _shape_of(tuple(pairs)), *chain.from_iterable(pairs.values()))


_shape_of: Final = lru_cache(maxsize=1000)(Shape)
"""Shared, because it is larger than all the values of a row."""


def pairs_of(diff: Diff) -> dict[str, tuple[Any, Any]]:
    """The values of a diff, by name."""
    return {key: (diff[at], diff[at + 1]) for key, at in diff[0].places.items()}


class Changes(Mapping[str, Change]):
    """Read-only mapping of column attribute name to :class:`Change`, for a row that was updated.

    Each :class:`Change` is made when it is read: most receivers look at one attribute or none.
    """

    __slots__ = ("_diff",)

    def __init__(self, diff: Diff) -> None:
        self._diff = diff

    def __getitem__(self, key: str) -> Change:
        diff = self._diff
        at = diff[0].places.get(key)
        if at is None:
            raise KeyError(
                f"{key!r} was not changed. Ask first, with {key!r} in changes, or use "
                f"changes.get({key!r})"
            )
        return _change(diff[at : at + 2])

    def get(self, key: str, default: Any = None) -> Any:
        """The change of an attribute, or ``default`` if it was not changed."""
        return self[key] if key in self._diff[0].places else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._diff[0].places)

    def __len__(self) -> int:
        return len(self._diff[0].places)

    def __contains__(self, key: object) -> bool:
        return key in self._diff[0].places

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

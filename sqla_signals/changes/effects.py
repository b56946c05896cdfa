"""What a transaction did to each row in the end: plain values, no session and no SQL.

A :class:`Frame` belongs to one transaction or savepoint. Effects are added in the order in which
they were written; a row changed five times is one :class:`Effect`, a row created and deleted
again is none. A released savepoint's frame is merged into its parent's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from .change import UNSET, Change, Changes, diff_of


class Kind(Enum):
    """What happened to a row."""

    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"


CREATED: Final = Kind.CREATED
UPDATED: Final = Kind.UPDATED
DELETED: Final = Kind.DELETED

Equal = Callable[[str, Any, Any], bool]

NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


NEVER_MUTED: Final[tuple[tuple[Any, ...], ...]] = ((),)


class Source(NamedTuple):
    """What the effects of one flush on the rows of one class have in common."""

    equal: Equal | None = None
    """Whether two values of an attribute are the same for the database."""
    unfetched: frozenset[str] = frozenset()
    """What the database computes itself with each UPDATE."""
    raw: bool = False
    using: Any = None
    mutes: tuple[tuple[Any, ...], ...] = NEVER_MUTED
    """The mutes in force, once per effect folded into one."""


ALONE: Final = Source()


class Effect:
    """What happened to one row, so far."""

    __slots__ = (
        "along",
        "before",
        "changes",
        "fields",
        "instance",
        "kind",
        "origin",
        "row",
        "source",
        "unknown",
        "values",
        "was",
    )

    def __init__(
        self,
        kind: Kind,
        row: Hashable,
        instance: Any,
        source: Source = ALONE,
        *,
        was: Hashable = None,
        changes: Mapping[str, Change] = NOTHING,
        along: frozenset[str] = frozenset(),
        unknown: frozenset[str] | None = None,
        fields: frozenset[str] | None = None,
        values: Mapping[str, Any] | None = None,
        origin: Any = None,
    ) -> None:
        self.kind: Kind = kind
        self.row: Hashable = row
        """What identifies the row now."""
        self.was: Hashable = row if was is None else was
        """What identified the row before."""
        self.instance: Any = instance
        self.source: Source = source
        self.changes: Mapping[str, Change] = changes
        self.along: frozenset[str] = along
        """What an UPDATE wrote besides: versions and ``onupdate`` columns."""
        self.unknown: frozenset[str] = along if unknown is None else unknown
        """What of that may have changed; the rest was set to what it was."""
        self.fields: frozenset[str] | None = fields
        """What an UPDATE wrote in all, if that is known; else :meth:`written` finds out."""
        self.before: Mapping[str, Any] = NOTHING
        """Of a row changed and then deleted: what was committed before, as far as it is known."""
        self.values: Mapping[str, Any] | None = values
        self.origin: Any = origin

    @property
    def raw(self) -> bool:
        """Whether it was all written inside :func:`sqla_signals.raw`."""
        return self.source.raw

    @property
    def mutes(self) -> tuple[tuple[Any, ...], ...]:
        """The mutes in force, once per effect folded into this one."""
        return self.source.mutes

    def written(self) -> frozenset[str] | None:
        """``update_fields``; ``None`` for a created row."""
        if self.kind is CREATED or self.fields is not None:
            return self.fields
        return self.along.union(self.changes)

    def followed_by(self, later: Effect) -> Effect | None:
        """This effect and a later one on the same row as one, ``None`` if they cancel out."""
        if later.kind is DELETED:
            if self.kind is CREATED:
                return None
            net = later._copy(DELETED)
            net.was = self.was
            unknown = dict.fromkeys(self.unknown | self.source.unfetched, UNSET)
            first = {key: change.old for key, change in self.changes.items()}
            net.before = {**later.before, **unknown, **first}
        else:
            net = later._copy(self.kind)
            net.was = self.was
            net.changes = self._chained(later)
            net.along = _union(self.along, later.along)
            net.unknown = _union(self.unknown, later.unknown)
            if self.kind is UPDATED and not net.changes and not net.along:
                return None
        mutes = self.mutes if later.mutes == self.mutes else self.mutes + later.mutes
        raw = self.raw and later.raw
        if (raw, mutes) != (later.raw, later.mutes):
            net.source = later.source._replace(raw=raw, mutes=mutes)
        return net

    def _chained(self, later: Effect) -> Changes:
        """The changes of both, from the first old to the last new value.

        What an UPDATE wrote along is not known before and after that.
        """
        created = self.kind is CREATED
        changes = dict(self.changes)
        for key in (later.unknown | later.source.unfetched).difference(later.changes):
            if created or key in changes:
                changes[key] = Change(changes[key].old if key in changes else UNSET, UNSET)
        for key, change in later.changes.items():
            old: Any
            if created or (key in self.unknown and key not in changes):
                old = UNSET
            else:
                old = changes[key].old if key in changes else change.old
            changes[key] = Change(old, change.new)
            known = old is not UNSET and change.new is not UNSET
            if not created and known and (later.source.equal or _same)(key, old, change.new):
                del changes[key]
        return Changes(diff_of(changes))

    def _copy(self, kind: Kind) -> Effect:
        return Effect(
            kind,
            self.row,
            self.instance,
            self.source,
            was=self.was,
            changes=self.changes,
            along=self.along,
            unknown=self.unknown,
            values=self.values,
            origin=self.origin,
        )


class Executed(NamedTuple):
    """A statement about many rows that was executed."""

    sender: type
    arguments: Mapping[str, Any]
    mutes: tuple[Any, ...]


def _union(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """One of them, where that is all: there may be many rows."""
    return one | other if one and other else one or other


def _same(key: str, old: Any, new: Any) -> bool:
    return bool(old == new)


class Frame:
    """The effects and callbacks of one transaction or savepoint, in order."""

    __slots__ = (
        "_effects",
        "_executed",
        "_first",
        "_latest",
        "_next",
        "committed",
        "is_closed",
        "on_commit",
        "on_rollback",
        "stale",
    )

    def __init__(self) -> None:
        self._first: list[Effect] | None = None
        """What was added first. In most transactions nothing follows, so it is not sorted yet."""
        self._effects: dict[int, Effect] = {}
        self._executed: dict[int, Executed] = {}
        self._latest: dict[Hashable, int] = {}
        self._next = 0
        self.committed: bool = False
        self.is_closed: bool = False
        """Whether the session was closed, without a commit or a rollback."""
        self.stale: set[Any] = set()
        """The states of instances that still hold what was undone with a savepoint."""
        self.on_commit: list[Any] = []
        self.on_rollback: list[Any] = []

    @property
    def effects(self) -> Collection[Effect]:
        """The net effects in the order of first occurrence."""
        return self._effects.values() if self._first is None else self._first

    @property
    def occurrences(self) -> Iterable[Effect | Executed]:
        """The net effects and the statements, in the order of first occurrence."""
        if not self._executed:
            return self.effects
        both: dict[int, Effect | Executed] = {**self._effects, **self._executed}
        return [both[number] for number in sorted(both)]

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(
            self._first or self._effects or self._executed or self.on_commit or self.on_rollback
        )

    def add(self, effects: Collection[Effect]) -> None:
        """Add what one flush wrote, each row at most once under each key."""
        if self._first is None and not self._next:
            self._first = list(effects)
            return
        self._fold_first()
        self._fold(effects)

    def _fold_first(self) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            self._fold(first)

    def _fold(self, effects: Iterable[Effect]) -> None:
        moved: dict[Hashable, int] = {}
        for effect in effects:
            number = None if effect.kind is CREATED else self._latest.pop(effect.was, None)
            if number is None:
                number, net = self._next, effect
                self._next += 1
            else:
                folded = self._effects[number].followed_by(effect)
                if folded is None:
                    del self._effects[number]
                    continue
                net = folded
            self._effects[number] = net
            # Later, because two rows may swap their keys in one flush. A deleted row keeps no key:
            # what is written under it from now on is another row.
            if net.kind is not DELETED:
                moved[net.row] = number
        self._latest.update(moved)

    def add_executed(self, executed: Executed) -> None:
        """Add a statement."""
        self._fold_first()
        self._executed[self._next] = executed
        self._next += 1

    def merge(self, child: Frame) -> None:
        """Take over what a released savepoint did, and its callbacks."""
        self.take_over(child)
        self.on_commit += child.on_commit
        self.on_rollback += child.on_rollback

    def take_over(self, child: Frame) -> None:
        """Take over what a savepoint did."""
        if not child._executed:
            self.add(child.effects)
        else:
            for occurrence in child.occurrences:
                if isinstance(occurrence, Executed):
                    self.add_executed(occurrence)
                else:
                    self.add([occurrence])
        self.stale |= child.stale

    def without(self, binds: Collection[Any]) -> Frame:
        """What was done on other binds than these; without callbacks, which are for all of it."""
        rest = Frame()
        for occurrence in self.occurrences:
            if isinstance(occurrence, Executed):
                if occurrence.arguments["using"] not in binds:
                    rest.add_executed(occurrence)
            elif occurrence.source.using not in binds:
                rest.add([occurrence])
        return rest

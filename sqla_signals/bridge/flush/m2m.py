"""``m2m_changed``: the rows of ``secondary`` tables that one flush adds and removes.

The unit of work finds such a row from either side of a backref and writes it once; so it is told
once, from the side that the receiver asked for, or else from the one whose foreign key stands first
in the table. Which rows these are is read from the history that the unit of work has kept, before
the flush from that of the dry run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from blinker import ANY
from sqlalchemy.schema import Table

from ..._sqlalchemy.mappers import both_sides, secondary_relationship
from ..._sqlalchemy.unit_of_work import association_changes, in_order, pending_states, still_changes
from ...receivers.dispatch import audible
from ...receivers.receiver import Receiver
from ...signals.builtin import m2m_changed

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, RelationshipProperty, Session, UOWTransaction
    from sqlalchemy.sql import ColumnElement

    from ..calling.calls import Calls

    State = InstanceState[Any]
    Side = RelationshipProperty[Any]


class Association:
    """One secondary table as one relationship, and those tied to it, use it."""

    __slots__ = ("first", "sides", "table")

    def __init__(self, relationship: Side) -> None:
        assert isinstance(relationship.secondary, Table)
        self.table: Table = relationship.secondary
        self.sides: list[Side] = both_sides(relationship)
        self.first: Side = min(self.sides, key=self._place)
        """The side that is told where nobody asked for another."""

    def _place(self, side: Side) -> tuple[Any, ...]:
        columns: list[Any] = list(self.table.columns)
        places = sorted(columns.index(column) for column in _own_columns(side))
        return places, side.parent.class_.__name__, side.key

    def side_for(self, sender: Any) -> Side | None:
        """From which side to tell a receiver that was connected to ``sender``, if from any."""
        if sender is ANY or sender is self.table:
            return self.first
        relationship = secondary_relationship(sender)
        return relationship if relationship in self.sides else None


def _own_columns(side: Side) -> frozenset[ColumnElement[Any]]:
    return frozenset(column for _, column in side.synchronize_pairs)


_ASSOCIATION: Final = "sqla_signals.association"


def association_of(relationship: Side) -> Association:
    """The :class:`Association` of a relationship, made once and kept in its ``info``."""
    found: Association | None = relationship.info.get(_ASSOCIATION)
    if found is None:
        found = relationship.info[_ASSOCIATION] = Association(relationship)
    return found


class Row(NamedTuple):
    """A row of a secondary table, the same from whichever side it was found."""

    first: Side
    near: State
    """At the end of the first side."""
    far: State
    added: bool


class Found(NamedTuple):
    """Where the unit of work found a row."""

    relationship: Side
    state: State
    other: State
    held: tuple[Any, Any]
    """The two instances; nothing else may hold what was loaded to delete it."""


class Group(NamedTuple):
    """What is told in one call: the rows of one instance that are added, or removed."""

    association: Association
    side: Side
    state: State
    added: bool


class M2M:
    """The ``m2m_changed`` signals of one flush."""

    def __init__(self, session: Session, calls: Calls) -> None:
        self._session = session
        self._calls = calls
        self._announced: set[Row] = set()
        self._written: dict[Row, Found] = {}

    @property
    def has_rows(self) -> bool:
        """Whether anything was written that was not told of yet."""
        return bool(self._written)

    def announce(self, run: UOWTransaction) -> list[Receiver]:
        """Send ``pre_`` for what a dry run has found and was not announced; return who was called.

        Rows are looked at again once receivers have been called, which may have changed their fate.
        """
        rows = {row: at for row, at in self._rows(run).items() if row not in self._announced}
        called: list[Receiver] = []
        for group, receivers, rows_of_group in self._groups(rows):
            if called:
                rows_of_group = [
                    row
                    for row in rows_of_group
                    if still_changes(
                        self._session, rows[row][0].key, rows[row][1], rows[row][2], row.added
                    )
                ]
            self._announced.update(rows_of_group)
            if rows_of_group:
                called += self._send("pre", group, receivers, rows_of_group, rows)
        return called

    def record(self, context: UOWTransaction) -> None:
        """Note what was written, while the history is still there."""
        self._written = self._rows(context)

    def send_post(self) -> None:
        """Send ``post_`` for every row written."""
        rows, self._written = self._written, {}
        for group, receivers, rows_of_group in self._groups(rows):
            self._send("post", group, receivers, rows_of_group, rows)

    def _rows(self, context: UOWTransaction) -> dict[Row, Found]:
        rows: dict[Row, Found] = {}
        if m2m_changed.table.receivers:
            # What one side has processed, removed and added again maybe, the other one leaves.
            processed: dict[tuple[Side, State, State], Side] = {}
            for relationship, state, other, added in association_changes(context):
                first = association_of(relationship).first
                ends = (
                    (state, other)
                    if _own_columns(relationship) == _own_columns(first)
                    else (other, state)
                )
                if processed.setdefault((first, *ends), relationship) is relationship:
                    held = state.obj(), other.obj()
                    found = Found(relationship, state, other, held)
                    rows.setdefault(Row(first, *ends, added), found)
        return rows

    def _groups(self, rows: Iterable[Row]) -> list[tuple[Group, Sequence[Receiver], list[Row]]]:
        """What to tell whom: removals first, then by side and instance."""
        groups: dict[Group, list[Row]] = {}
        receivers: dict[Side, dict[Side, list[Receiver]]] = {}
        for row in rows:
            association = association_of(row.first)
            sides = receivers.get(row.first)
            if sides is None:
                sides = receivers[row.first] = self._receivers(association)
            for side in sides:
                is_first = _own_columns(side) == _own_columns(row.first)
                group = Group(association, side, row.near if is_first else row.far, row.added)
                groups.setdefault(group, []).append(row)
        if not groups:
            return []
        states = {group.state for group in groups}
        persistent = in_order(state for state in states if state.key is not None)
        pending = [state for state in pending_states(self._session) if state in states]
        places = {state: place for place, state in enumerate((*persistent, *pending))}
        ordered = sorted(
            groups,
            key=lambda group: (
                group.added,
                group.association.table.fullname,
                list(receivers[group.association.first]).index(group.side),
                places[group.state],
            ),
        )
        return [
            (group, receivers[group.association.first][group.side], groups[group])
            for group in ordered
        ]

    def _receivers(self, association: Association) -> dict[Side, list[Receiver]]:
        """Who is told, and from which side; a function hears of a row once."""
        known: set[Any] = set()
        found: dict[Side, list[Receiver]] = {}
        heard = m2m_changed.table.receivers
        for sender in (association.table, *(side.class_attribute for side in association.sides)):
            heard = audible(m2m_changed, sender, heard)
        for receiver in heard:
            side = association.side_for(receiver.sender)
            if side is not None and receiver.fn_id not in known:
                known.add(receiver.fn_id)
                found.setdefault(side, []).append(receiver)
        return found

    def _send(
        self,
        when: str,
        group: Group,
        receivers: Sequence[Receiver],
        rows: Sequence[Row],
        found: dict[Row, Found],
    ) -> Sequence[Receiver]:
        association, side, state, added = group
        is_near = _own_columns(side) == _own_columns(association.first)
        keys = (primary_key_of(row.far if is_near else row.near) for row in rows)
        arguments = {
            "instance": state.obj(),
            "action": f"{when}_{'add' if added else 'remove'}",
            "relationship": side.class_attribute,
            "model": side.mapper.class_,
            "pk_set": frozenset(key for key in keys if key is not None),
            "raw": self._calls.raw,
            "using": self._session.get_bind(found[rows[0]].relationship.mapper),
        }
        for receiver in receivers:
            self._calls.call(m2m_changed, receiver, association.table, **arguments)
        return receivers


def primary_key_of(state: State) -> Any:
    """The primary key of a state, ``None`` if it has none yet; a tuple if it is of several columns.

    Nothing is loaded for that.
    """
    if state.key is not None:
        key = state.key[1]
    else:
        mapper = state.manager.mapper
        key = tuple(
            state.dict.get(mapper.get_property_by_column(column).key)
            for column in mapper.primary_key
        )
        if None in key:
            return None
    return key[0] if len(key) == 1 else key

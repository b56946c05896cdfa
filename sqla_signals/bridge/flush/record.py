"""What a flush writes, noted row by row while it writes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from ..._sqlalchemy.instances import instance_dict
from ..._sqlalchemy.unit_of_work import (
    deleted_states,
    is_deleted,
    pending_states,
    postupdated_states,
    state_with_key_of,
)
from ...changes.change import NO_DIFF, UNSET, Diff, pairs_of
from ...changes.effects import DELETED, Kind
from ...receivers.observing import observers
from ..calling.audience import audience_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, UOWTransaction

    from ..calling.calls import Calls
    from ..columns.columns import Columns

    State = InstanceState[Any]


NOTHING_EXPIRED: Final[frozenset[str]] = frozenset()

Written = dict[str, Any] | Diff | Literal[Kind.DELETED]
"""What happened to a row: a dictionary of what the instance held right after the INSERT, a diff of
what an UPDATE changed, or :data:`DELETED`. One small object at most, because there are many."""


class Record:
    """The rows written by one flush, in the order of SQLAlchemy's ``after_*`` events."""

    __slots__ = (
        "_announced",
        "_before",
        "_calls",
        "_columns",
        "_context",
        "_expired",
        "_instances",
        "_pending",
        "_rows",
        "_watched",
        "keys_before",
    )

    def __init__(
        self, calls: Calls, announced: Mapping[State, Diff], context: UOWTransaction
    ) -> None:
        self._calls = calls
        self._columns = _ColumnsToNote(calls)
        self._announced = announced
        self._pending: Mapping[State, Any] | None = None
        """The session's own, from when the first row was written."""
        # Not held: it holds us, and a cycle would keep the instances until garbage collection.
        self._context = weakref.ref(context)
        self._rows: dict[State, Written] = {}
        self._instances: list[Any] = []
        """Held, because the session lets go of what is flushed."""
        self._before: dict[State, Diff] = {}
        """What an UPDATE was going to write, where that is not what was announced."""
        self._expired: dict[State, frozenset[str]] = {}
        """What was expired right before the UPDATE."""
        self._watched: dict[State, Mapping[str, Any]] = {}
        """What was known right before the UPDATE of attributes that it may fill in."""
        self.keys_before: dict[State, Any] = {}
        """The identity key before an UPDATE that may have changed it."""

    @property
    def rows(self) -> Mapping[State, Written]:
        """What :meth:`take` would hand over."""
        return self._rows

    def take(self) -> Mapping[State, Written]:
        """Hand over the rows, ``NO_DIFF`` where nothing was written; none are left after that."""
        rows, self._rows = self._rows, {}
        return rows

    def deletes(self) -> list[State]:
        """The states whose rows were deleted."""
        return [state for state, row in self._rows.items() if row is DELETED]

    def states(self) -> list[State]:
        """The states that the flush is going to write, or has written."""
        context = self._context()
        states = context.states if context is not None else {}
        return [state for state, (_, listonly) in states.items() if not listonly]

    def remember(self, state: State) -> None:
        """Keep what an UPDATE is going to write, because it may wipe out the history."""
        columns = self._columns[state.manager.mapper]
        if columns is None:
            return
        announced = self._announced.get(state)
        if announced is None or not columns.still_stands(state, announced):
            diff = self._before[state] = columns.diff(state)
            if not diff[0].is_plain:
                # After the UPDATE it may be another one already.
                self.keys_before[state] = state.key
                if state.expired_attributes:
                    self._expired[state] = frozenset(state.expired_attributes)
                if columns.watched:
                    values = state.dict
                    known = columns.watched.intersection(values)
                    self._watched[state] = {key: values[key] for key in known}

    def inserted(self, state: State) -> None:
        """An INSERT was emitted for the state."""
        if self._columns[state.manager.mapper] is None:
            return
        instance = state.obj()
        values = instance_dict(instance).copy()
        if state.expired_attributes:  # computed by the database and not fetched
            for key in state.expired_attributes:
                values.setdefault(key, UNSET)
        self._rows[state] = values
        self._instances.append(instance)

    def row_switched(self, state: State) -> None:
        """The row of a deleted instance was turned into the row of a new one."""
        replaced = state_with_key_of(self._calls.session, state)
        if replaced is not None:
            self.deleted(replaced)
        self.inserted(state)
        columns, values = self._columns[state.manager.mapper], self._rows.get(state)
        if columns is not None and isinstance(values, dict):
            # What the new instance was not given, the row has from the old one.
            self._rows[state] = {**dict.fromkeys(columns.keys, UNSET), **values}

    def updated(self, state: State) -> None:
        """The state went through an UPDATE, which may have written nothing."""
        if self._pending is None:
            self._pending = pending_states(self._calls.session)
        if state in self._pending:
            self.row_switched(state)
            return
        columns = self._columns[state.manager.mapper]
        if columns is None:
            return
        diff = self._before.pop(state, None) if self._before else None
        if diff is None:
            diff = self._announced.get(state, NO_DIFF)
        if not columns.still_stands(state, diff):
            expired = self._expired.pop(state, NOTHING_EXPIRED)
            pairs = columns.updated(state, diff, expired, self._context)
            diff = columns.update_of(state, pairs)
            if columns.watched and pairs:
                diff = columns.filled(state, pairs, diff[0].written, self._watched.get(state, {}))
            self.keys_before.setdefault(state, state.key)
        self._rows[state] = diff
        self._instances.append(state.obj())

    def deleted(self, state: State) -> None:
        """A DELETE was emitted for the state."""
        if state.key is None:
            return  # it was pending, so no row is its own
        self._rows[state] = DELETED
        self._instances.append(state.obj())

    def complete(self, context: UOWTransaction) -> None:
        """Add what has no mapper event, while the history is still there."""
        if deleted_states(self._calls.session):
            for state, (is_delete, listonly) in context.states.items():
                if is_delete and listonly and state not in self._rows:  # switched to another class
                    self.deleted(state)
        for state, columns in postupdated_states(context):
            if not is_deleted(context, state):
                self._post_updated(state, columns)

    def _post_updated(self, state: State, columns: set[Any]) -> None:
        mapped = self._columns[state.manager.mapper]
        if mapped is None:
            return
        pairs = mapped.post_updated(state, columns, self._context)
        if not pairs:
            return
        fields = mapped.written_along(pairs, of_one_table=True)
        row = self._rows.get(state, NO_DIFF)
        if isinstance(row, dict):
            self._rows[state] = {**row, **{k: state.dict.get(k, UNSET) for k in fields}}
        elif row is not DELETED:
            known = {key: old for key, (old, _) in pairs_of(row).items() if old is not UNSET}
            pairs = {**pairs_of(row), **pairs}
            changed = {key: pair for key, pair in pairs.items() if key not in mapped.watched}
            before = {**self._watched.get(state, {}), **known}
            self._rows[state] = mapped.filled(state, changed, row[0].written | fields, before)
            self._instances.append(state.obj())


class _ColumnsToNote(dict["Mapper[Any]", "Columns | None"]):
    """For each mapper, its columns; ``None`` where nobody is told what was inserted or updated.

    A trace is told of every row.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __missing__(self, mapper: Mapper[Any]) -> Columns | None:
        # Asked when the first row is written: pre_save receivers may have connected others.
        is_noted = audience_of(mapper).notes_saves or bool(observers)
        self[mapper] = found = self._calls[mapper].columns if is_noted else None
        return found

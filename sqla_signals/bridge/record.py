"""What a flush writes, noted row by row while it writes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .._sqlalchemy import (
    deleted_states,
    instance_dict,
    is_deleted,
    pending_states,
    postupdated_states,
    state_with_key_of,
)
from ..changes import UNSET, Pairs
from .columns import NO_HISTORY, History

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, UOWTransaction

    from .calls import Calls

    State = InstanceState[Any]


NO_FIELDS: Final[frozenset[str]] = frozenset()


class Created:
    """A row that the flush has inserted."""

    __slots__ = ("instance", "values")

    def __init__(self, instance: Any, values: Mapping[str, Any]) -> None:
        self.instance: Any = instance
        self.values: Mapping[str, Any] = values
        """What the instance held right after the INSERT."""


class Updated:
    """A row that the flush has updated."""

    __slots__ = ("fields", "instance", "key", "pairs")

    def __init__(self, instance: Any, key: Any, pairs: Pairs, fields: frozenset[str]) -> None:
        self.instance: Any = instance
        self.key: Any = key
        """The identity key before the flush."""
        self.pairs: Pairs = pairs
        """What the UPDATE changed."""
        self.fields: frozenset[str] = fields
        """What the UPDATE wrote, with versions and ``onupdate`` columns."""

    def along(self) -> frozenset[str]:
        """What it wrote without having changed it."""
        if len(self.fields) == len(self.pairs):
            return NO_FIELDS
        return self.fields.difference(self.pairs)


class Deleted:
    """A row that the flush has deleted."""

    __slots__ = ("instance", "key")

    def __init__(self, instance: Any, key: Any) -> None:
        self.instance: Any = instance
        self.key: Any = key


Written = Created | Updated | Deleted


class Record:
    """The rows written by one flush, in the order of SQLAlchemy's ``after_*`` events."""

    __slots__ = ("_announced", "_calls", "_context", "_history", "_pending", "_rows")

    def __init__(
        self, calls: Calls, announced: Mapping[State, Pairs], context: UOWTransaction
    ) -> None:
        self._calls = calls
        self._announced = announced
        # Not held: it holds us, and a cycle would keep the instances until garbage collection.
        self._context = weakref.ref(context)
        self._pending: Mapping[State, Any] | None = None
        """The session's own, from when the first row was written."""
        self._rows: dict[State, Written | None] = {}
        """``None``: flushed, but no row written so far."""
        self._history: dict[State, History] = {}

    @property
    def rows(self) -> Mapping[State, Written | None]:
        """What :meth:`take` would hand over."""
        return self._rows

    def take(self) -> Mapping[State, Written | None]:
        """Hand over the rows, ``None`` where nothing was written; none are left after that."""
        rows, self._rows = self._rows, {}
        return rows

    def deletes(self) -> list[State]:
        """The states whose rows were deleted."""
        return [state for state, row in self._rows.items() if isinstance(row, Deleted)]

    def states(self) -> list[State]:
        """The states that the flush is going to write, or has written."""
        context = self._context()
        states = context.states if context is not None else {}
        return [state for state, (_, listonly) in states.items() if not listonly]

    def remember(self, state: State) -> None:
        """Keep the history that an UPDATE may wipe out."""
        columns = self._calls[state.manager.mapper].columns
        if columns.may_lose_history(state):
            self._history[state] = columns.history(state)

    def inserted(self, state: State) -> None:
        """An INSERT was emitted for the state."""
        instance = state.obj()
        values = instance_dict(instance).copy()
        if state.expired_attributes:  # computed by the database and not fetched
            for key in state.expired_attributes:
                values.setdefault(key, UNSET)
        self._rows[state] = Created(instance, values)

    def row_switched(self, state: State) -> None:
        """The row of a deleted instance was turned into the row of a new one."""
        replaced = state_with_key_of(self._calls.session, state)
        if replaced is not None:
            self.deleted(replaced)
        self.inserted(state)
        new = self._rows[state]
        assert isinstance(new, Created)
        # What the new instance was not given, the row has from the old one.
        kept = dict.fromkeys(self._calls[state.manager.mapper].columns.keys, UNSET)
        new.values = {**kept, **new.values}

    def updated(self, state: State) -> None:
        """The state went through an UPDATE, which may have written nothing."""
        if self._pending is None:
            self._pending = pending_states(self._calls.session)
        if state in self._pending:
            self.row_switched(state)
            return
        columns = self._calls[state.manager.mapper].columns
        pairs = self._announced.get(state)
        if pairs is None or state in self._history or not columns.still_assigned(state, pairs):
            before = self._history.pop(state, NO_HISTORY)
            pairs = columns.updated(state, before, self._context)
        self._rows[state] = (
            Updated(state.obj(), state.key, pairs, columns.written(pairs)) if pairs else None
        )

    def deleted(self, state: State) -> None:
        """A DELETE was emitted for the state."""
        if state.key is None:
            return  # it was pending, so no row is its own
        self._rows[state] = Deleted(state.obj(), state.key)

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
        mapped = self._calls[state.manager.mapper].columns
        pairs = mapped.post_updated(state, columns, self._context)
        if not pairs:
            return
        fields = mapped.written_along(pairs, of_one_table=True)
        known = self._rows.get(state)
        if known is None:
            self._rows[state] = Updated(state.obj(), state.key, pairs, fields)
        elif isinstance(known, Created):
            known.values = {**known.values, **{k: state.dict.get(k, UNSET) for k in fields}}
        elif isinstance(known, Updated):
            known.pairs = {**known.pairs, **pairs}
            known.fields |= fields

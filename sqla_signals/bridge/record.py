"""What a flush writes, noted row by row while it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .._sqlalchemy import deleted_states, is_deleted, postupdated_states, state_with_key_of
from ..changes import UNSET, Change
from ..net import CREATED, DELETED, UPDATED, Kind
from .columns import NO_HISTORY, NOTHING, History, columns_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Session, UOWTransaction

    State = InstanceState[Any]


class Written(NamedTuple):
    """One row that the flush has written."""

    kind: Kind
    instance: Any
    key: Any
    """The identity key before the flush; ``None`` for a created row."""
    changed: Mapping[str, Change]
    """Of an update: what the UPDATE changed."""
    fields: frozenset[str]
    """Of an update: what the UPDATE wrote, with versions and ``onupdate`` columns."""
    values: Mapping[str, Any]
    """Of a created row: what the instance held right after the INSERT."""


NO_CHANGES: Final[Mapping[str, Change]] = {}
NO_FIELDS: Final[frozenset[str]] = frozenset()


class Record:
    """The rows written by one flush, in the order of SQLAlchemy's ``after_*`` events."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: dict[State, Written | None] = {}
        """``None``: flushed, but no row written so far."""
        self._history: dict[State, History] = {}

    def take(self) -> list[tuple[State, Written]]:
        """Hand over the rows; there are none left after that."""
        rows = [(state, row) for state, row in self._rows.items() if row is not None]
        self._rows = {}
        return rows

    def deletes(self) -> list[State]:
        """The states whose rows were deleted."""
        return [s for s, row in self._rows.items() if row is not None and row.kind is DELETED]

    def remember(self, state: State) -> None:
        """Keep the history that an UPDATE may wipe out."""
        history = columns_of(state.manager.mapper).history(state)
        if history is not None:
            self._history[state] = history

    def inserted(self, state: State) -> None:
        """An INSERT was emitted for the state."""
        values = dict(state.dict)
        for key in state.expired_attributes:  # computed by the database and not fetched
            values.setdefault(key, UNSET)
        self._rows[state] = Written(CREATED, state.obj(), None, NO_CHANGES, NO_FIELDS, values)

    def row_switched(self, state: State) -> None:
        """The row of a deleted instance was turned into the row of a new one."""
        replaced = state_with_key_of(self._session, state)
        if replaced is not None:
            self.deleted(replaced)
        self.inserted(state)
        new = self._rows[state]
        assert new is not None
        # What the new instance was not given, the row has from the old one.
        kept = dict.fromkeys(columns_of(state.manager.mapper).keys, UNSET)
        self._rows[state] = new._replace(values={**kept, **new.values})

    def updated(self, state: State, context: UOWTransaction) -> None:
        """The state went through an UPDATE, which may have written nothing."""
        before = self._history.pop(state, NO_HISTORY)
        columns = columns_of(state.manager.mapper)
        changed = columns.updated(state, before, context)
        self._rows[state] = (
            _update(state, changed, columns.written_along(changed)) if changed else None
        )

    def deleted(self, state: State) -> None:
        """A DELETE was emitted for the state."""
        self._rows[state] = Written(DELETED, state.obj(), state.key, NO_CHANGES, NO_FIELDS, NOTHING)

    def complete(self, context: UOWTransaction) -> None:
        """Add what has no mapper event, while the history is still there."""
        if deleted_states(self._session):
            for state, (is_delete, listonly) in context.states.items():
                if is_delete and listonly and state not in self._rows:  # switched to another class
                    self.deleted(state)
        for state, columns in postupdated_states(context):
            if not is_deleted(context, state):
                self._post_updated(state, columns, context)

    def _post_updated(self, state: State, columns: set[Any], context: UOWTransaction) -> None:
        mapped = columns_of(state.manager.mapper)
        changed = mapped.post_updated(state, columns, context)
        if not changed:
            return
        fields = mapped.written_along(changed, of_one_table=True)
        known = self._rows.get(state)
        if known is None:
            self._rows[state] = _update(state, changed, fields)
        elif known.kind is CREATED:
            values = {key: state.dict.get(key, UNSET) for key in fields}
            self._rows[state] = known._replace(values={**known.values, **values})
        else:
            self._rows[state] = known._replace(
                changed={**known.changed, **changed}, fields=known.fields | fields
            )


def _update(state: State, changed: Mapping[str, Change], fields: frozenset[str]) -> Written:
    return Written(UPDATED, state.obj(), state.key, changed, fields, NOTHING)

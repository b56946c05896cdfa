"""The rows that a unit of work writes, and the changes that a receiver adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState

from .._sqlalchemy.instances import instance_dict
from .._sqlalchemy.unit_of_work import (
    association_changes,
    deleted_states,
    modified_states,
    pending_states,
)
from ..bridge.columns.by_mapper import columns_of
from ..bridge.flush.flush import Flush
from ..bridge.flush.m2m import primary_key_of
from ..changes.change import NO_DIFF
from ..changes.effects import DELETED

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, UOWTransaction

    State = InstanceState[Any]


def state_or_none(instance: Any) -> State | None:
    """The state of a mapped instance, ``None`` for anything else."""
    state = inspect(instance, raiseerr=False)
    return state if isinstance(state, InstanceState) else None


def row_name(state: State) -> str:
    """Name the row of an instance: the class and the primary key."""
    name = state.manager.class_.__name__
    key = primary_key_of(state)
    return f"new {name}" if key is None else f"{name} {key}"


def _names(fields: Iterable[str]) -> str:
    return f": {', '.join(sorted(fields))}"


def rows_of(session: Session, context: UOWTransaction) -> Iterator[tuple[str, State, str]]:
    """Yield the rows of a unit of work: the statement, the state, and the updated attributes.

    Exact where somebody listens to the class; elsewhere what SQLAlchemy has set out to do.
    """
    flush = Flush.of_context(context)
    known = flush.record.rows if flush is not None else {}
    for state, row in known.items():
        if isinstance(row, dict):
            yield "INSERT", state, ""
        elif row is DELETED:
            yield "DELETE", state, ""
        elif row is not NO_DIFF:
            yield "UPDATE", state, _names(row[0].written)
    for state, (is_delete, listonly) in context.states.items():
        if state in known or listonly:
            continue
        if is_delete:
            yield "DELETE", state, ""
        elif state in pending_states(session):
            yield "INSERT", state, ""
        else:
            diff = columns_of(state.manager.mapper).diff(state)
            if diff is not NO_DIFF:
                yield "UPDATE", state, _names(diff[0].written)


def association_rows(context: UOWTransaction) -> Iterator[str]:
    """Yield the rows of secondary tables, each once though both sides have it."""
    known = set()
    for relationship, state, other, added in association_changes(context):
        row = relationship.secondary, frozenset((state, other)), added
        if row not in known:
            known.add(row)
            statement = "INSERT" if added else "DELETE"
            yield f"{statement} {relationship.secondary}: {row_name(state)}, {row_name(other)}"


def _assigned(state: State) -> list[str]:
    """The attributes with another value than in the database."""
    columns = columns_of(state.manager.mapper)
    assigned = columns.diff(state)[0].changed
    return [key for key in state.committed_state if key in assigned or key not in columns.keys]


class Pending:
    """The changes that a session holds before a receiver is called, to find those that it adds.

    Which attributes were assigned is looked at for the receiver's own instance and for those that
    had no changes before.
    """

    def __init__(self, session: Session, instance: Any) -> None:
        self._session = session
        self._new = set(pending_states(session))
        self._deleted = set(deleted_states(session))
        self._modified = modified_states(session)
        self._state = state_or_none(instance)
        self._values = dict(instance_dict(instance)) if self._state is not None else {}

    def differences(self) -> Iterator[tuple[str, State, str]]:
        """Yield the additions: ``adds``, ``deletes`` or ``changes``, the state, its attributes."""
        session = self._session
        for state in list(pending_states(session)):
            if state not in self._new:
                yield "adds", state, ""
        for state in list(deleted_states(session)):
            if state not in self._deleted:
                yield "deletes", state, ""
        for state in modified_states(session):
            if state not in self._modified and state is not self._state:
                yield "changes", state, _names(_assigned(state))
        own, missing = self._state, object()
        if own is not None:
            values = instance_dict(own.obj())
            keys = [
                key
                for key in _assigned(own)
                if values.get(key, missing) is not self._values.get(key, missing)
            ]
            if keys:
                yield "changes", own, _names(keys)

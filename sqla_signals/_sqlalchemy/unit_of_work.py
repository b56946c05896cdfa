"""What a session is about to flush."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import inspect
from sqlalchemy.orm import Session, UOWTransaction
from sqlalchemy.schema import Column

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState

    State = InstanceState[Any]


def flush_as_query_does(session: Session) -> None:
    """Flush unless autoflush is turned off, or a flush is under way."""
    session._autoflush()


def pending_states(session: Session) -> Mapping[State, Any]:
    """The states that were added and have no row yet; the live dictionary of the session."""
    return session._new


def deleted_states(session: Session) -> Mapping[State, Any]:
    """The states marked as deleted, in the order of marking; the live dictionary."""
    return session._deleted


def modified_states(session: Session) -> set[State]:
    """The persistent states with pending changes, those also marked as deleted included."""
    return set(session._dirty_states)


def keep_flushing(session: Session) -> bool:
    """Whether the session had forgotten that it is flushing; it knows again.

    The legacy bulk methods reset that on their way out, and the next query would flush.
    """
    forgotten = not session._flushing
    session._flushing = True
    return forgotten


def is_flushing(session: Session) -> bool:
    """Whether the session is inside of ``Session.flush()``."""
    return session._flushing


def is_clean(session: Session) -> bool:
    """Whether a flush would find nothing to do, as ``commit()`` itself asks."""
    return session._is_clean()


def postupdated_states(
    context: UOWTransaction,
) -> Iterator[tuple[State, set[Column[Any]]]]:
    """The states that got an extra UPDATE for ``post_update``, with the columns it may write."""
    for states, columns in context.post_update_states.values():
        for state in states:
            yield state, columns


def pk_cascaded(context: UOWTransaction, state: State, column: Any) -> bool:
    """Whether ``ON UPDATE CASCADE`` is trusted to change this primary key column."""
    key: Any = ("pk_cascaded", state, column)
    return key in context.attributes


def is_deleted(context: UOWTransaction, state: State) -> bool:
    """Whether the unit of work deletes the state."""
    return bool(context.states.get(state, (False, False))[0])


def state_with_key_of(session: Session, state: State) -> State | None:
    """The state in the identity map under the key that a pending state is going to have."""
    found = session.identity_map.get(state.mapper._identity_key_from_state(state))
    return None if found is None else inspect(found)


def in_order(states: Iterable[State]) -> list[State]:
    """Persistent states by class and primary key, as far as the keys can be compared."""
    by_class: dict[type, list[State]] = defaultdict(list)
    for state in states:
        by_class[state.class_].append(state)
    ordered: list[State] = []
    for cls in sorted(by_class, key=lambda cls: cls.__name__):
        try:
            ordered += sorted(by_class[cls], key=_identity_key)
        except TypeError:
            ordered += sorted(by_class[cls], key=lambda state: str(_primary_key(state)))
    return ordered


_identity_key: Final = attrgetter("key")


def _primary_key(state: State) -> Any:
    return () if state.key is None else state.key[1]

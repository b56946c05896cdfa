"""What a session is about to flush, and what its unit of work has written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import inspect
from sqlalchemy.orm import PassiveFlag, RelationshipProperty, Session, UOWTransaction, dependency
from sqlalchemy.schema import Column

from . import renamed
from .instances import PASSIVE_NO_INITIALIZE, contains_state
from .mappers import writes_rows

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState

    State = InstanceState[Any]


def pending_states(session: Session) -> Mapping[State, Any]:
    """The states that were added and have no row yet; the live dictionary of the session."""
    return session._new


def deleted_states(session: Session) -> Mapping[State, Any]:
    """The states marked as deleted, in the order of marking; the live dictionary."""
    return session._deleted


def modified_states(session: Session) -> set[State]:
    """The persistent states with pending changes, those also marked as deleted included."""
    return set(session._dirty_states)


def is_clean(session: Session) -> bool:
    """Whether a flush would find nothing to do, as ``commit()`` itself asks."""
    return session._is_clean()


def is_flushing(session: Session) -> bool:
    """Whether the session is inside of ``Session.flush()``."""
    return session._flushing


def keep_flushing(session: Session) -> bool:
    """Tell the session again that it is flushing; return whether it had forgotten that.

    ``Session._bulk_save_mappings`` resets the flag when it ends, inside of a flush, too. The next
    query would then flush.
    """
    forgotten = not session._flushing
    session._flushing = True
    return forgotten


def flush_as_query_does(session: Session) -> None:
    """Flush as before a query: not if autoflush is turned off, or a flush is under way."""
    session._autoflush()


def is_deleted(context: UOWTransaction, state: State) -> bool:
    """Whether the unit of work deletes the state."""
    return bool(context.states.get(state, (False, False))[0])


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


def state_with_key_of(session: Session, state: State) -> State | None:
    """The state in the identity map under the key that a pending state is going to have."""
    found = session.identity_map.get(state.mapper._identity_key_from_state(state))
    return None if found is None else inspect(found)


def in_order(states: Iterable[State]) -> list[State]:
    """States by class and primary key, as far as the keys can be compared; without a key first."""
    by_class: dict[type, list[State]] = defaultdict(list)
    for state in states:
        by_class[state.class_].append(state)
    ordered: list[State] = []
    for cls in sorted(by_class, key=lambda cls: cls.__name__):
        try:
            ordered += sorted(by_class[cls], key=attrgetter("key"))
        except TypeError:
            ordered += sorted(by_class[cls], key=lambda state: str(state.identity or ()))
    return ordered


def association_changes(
    context: UOWTransaction,
) -> Iterator[tuple[RelationshipProperty[Any], State, State, bool]]:
    """The rows that a unit of work adds to and removes from ``secondary`` tables.

    Each is the relationship, the state that has it, the state at its other end, and whether the row
    is added. Rows of deleted instances come first. A row may come twice, once from each side, and
    then the first counts. ``ManyToManyDP.process_saves`` and ``process_deletes`` go by the same
    history.
    """
    processors = [
        (action.dependency_processor, list(action._mappers(context)))
        for action in context.presort_actions.values()
        if action.setup_flush_actions
        and isinstance(action.dependency_processor, ManyToManyDP)
        and writes_rows(action.dependency_processor.prop)
    ]
    for of_deleted in (True, False):
        for processor, mappers in processors:
            for mapper in mappers:
                for state in context.mappers.get(mapper, ()):
                    is_delete, listonly = context.states[state]
                    # A row switch makes the deletion listonly, but after its rows were removed.
                    if is_delete is not of_deleted or (listonly and not is_delete):
                        continue
                    for other, added in _changes_of(context, processor.key, state, is_delete):
                        yield processor.prop, state, other, added


def _changes_of(
    context: UOWTransaction, key: str, state: State, is_delete: bool
) -> Iterator[tuple[State, bool]]:
    history = context.get_attribute_history(state, key, _KNOWN)  # type: ignore[no-untyped-call]
    if not history:
        return
    # A dry run knows of instances that the flush will expunge.
    finds = getattr(context, "finds", partial(contains_state, context.session))
    removed = history.non_added() if is_delete else history.deleted
    for added, others in ((False, removed), (True, () if is_delete else history.added)):
        for other in others:
            if other is not None and finds(other):
                yield other, added


def still_changes(session: Session, key: str, state: State, other: State, added: bool) -> bool:
    """Whether a collection is still going to be written with that change."""
    if not contains_state(session, state) or not contains_state(session, other):
        return False
    if state in deleted_states(session):
        return not added
    history = state.get_history(key, _KNOWN).as_state()
    return other in (history.added if added else history.deleted)


ManyToManyDP: Final[type[Any]] = renamed(dependency, "ManyToManyDP")
_KNOWN: Final = PASSIVE_NO_INITIALIZE | PassiveFlag.INCLUDE_PENDING_MUTATIONS

"""Rows of ``secondary`` tables that a flush writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import (
    PassiveFlag,
    QueryableAttribute,
    RelationshipProperty,
    Session,
    UOWTransaction,
    dependency,
)
from sqlalchemy.schema import Table

from . import renamed
from .dry_run import DryRun
from .instances import PASSIVE_NO_INITIALIZE, contains_state
from .unit_of_work import deleted_states

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState

    State = InstanceState[Any]

ManyToManyDP: Final[type[Any]] = renamed(dependency, "ManyToManyDP")


def association_changes(
    context: UOWTransaction,
) -> Iterator[tuple[RelationshipProperty[Any], State, State, bool]]:
    """The rows that a unit of work adds to and removes from ``secondary`` tables.

    For each the relationship, the state at its near end and at its far end, and whether it is
    added. A row can come twice, once from either side; then the first one counts, and those of
    deleted instances come first. What ``ManyToManyDP.process_saves`` and ``process_deletes`` read
    is the history that the unit of work has kept, and so is this.
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
    finds: Callable[[State], bool] = partial(contains_state, context.session)
    if isinstance(context, DryRun):
        finds = context.finds
    removed = history.non_added() if is_delete else history.deleted
    for added, others in ((False, removed), (True, () if is_delete else history.added)):
        for other in others:
            if other is not None and finds(other):
                yield other, added


_KNOWN: Final = PASSIVE_NO_INITIALIZE | PassiveFlag.INCLUDE_PENDING_MUTATIONS


def still_changes(session: Session, key: str, state: State, other: State, added: bool) -> bool:
    """Whether a collection is still going to be written with that change."""
    if not contains_state(session, state) or not contains_state(session, other):
        return False
    if state in deleted_states(session):
        return not added
    history = state.get_history(key, _KNOWN).as_state()
    return other in (history.added if added else history.deleted)


def writes_rows(prop: RelationshipProperty[Any]) -> bool:
    """Whether a relationship has a ``secondary`` table and can write rows of it.

    It cannot if that is a join, or a table that only leads to the other class: one whose foreign
    keys are elsewhere. ``ManyToManyDP._synchronize`` fails once such a collection is changed.
    """
    if prop.viewonly or not isinstance(prop.secondary, Table):
        return False
    pairs = (*prop.synchronize_pairs, *(prop.secondary_synchronize_pairs or ()))
    return all(column.table is prop.secondary for _, column in pairs)


def both_sides(prop: RelationshipProperty[Any]) -> list[RelationshipProperty[Any]]:
    """A relationship and those that its ``back_populates`` or ``backref`` ties to it."""
    return [prop, *filter(writes_rows, prop._reverse_property)]


def secondary_relationship(attribute: Any) -> RelationshipProperty[Any] | None:
    """The many-to-many relationship behind ``User.groups``; ``None`` if it is no such thing.

    Mappers are not configured by that.
    """
    prop = getattr(attribute, "prop", None) if isinstance(attribute, QueryableAttribute) else None
    if not isinstance(prop, RelationshipProperty) or prop._init_args.secondary.argument is None:
        return None
    return prop

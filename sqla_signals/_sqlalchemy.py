"""Every private name of SQLAlchemy that this package relies on, and nothing else.

``tests/test_sqlalchemy_private.py`` asserts each of them by name, so that an upgrade which moves
one fails there with its name instead of somewhere in a flush. Where SQLAlchemy 2.0 and 2.1 differ,
the difference is settled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import (
    ColumnProperty,
    CompositeProperty,
    LoaderCallableStatus,
    PassiveFlag,
    RelationshipProperty,
    Session,
    SynonymProperty,
    UOWTransaction,
    dependency,
)
from sqlalchemy.orm.mapper import _all_registries  # type: ignore[attr-defined]
from sqlalchemy.schema import Column

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper

# 2.1 put an underscore before these names.
OneToManyDP: Final[type[Any]] = getattr(dependency, "_OneToManyDP", None) or dependency.OneToManyDP
ManyToOneDP: Final[type[Any]] = getattr(dependency, "_ManyToOneDP", None) or dependency.ManyToOneDP
DetectKeySwitch: Final[type[Any]] = (
    getattr(dependency, "_DetectKeySwitch", None) or dependency.DetectKeySwitch
)

PASSIVE_OFF: Final = PassiveFlag.PASSIVE_OFF
PASSIVE_NO_INITIALIZE: Final = PassiveFlag.PASSIVE_NO_INITIALIZE

__all__ = [
    "PASSIVE_NO_INITIALIZE",
    "PASSIVE_OFF",
    "DetectKeySwitch",
    "LoaderCallableStatus",
    "ManyToOneDP",
    "OneToManyDP",
    "UOWTransaction",
    "all_mappers",
    "column_keys",
    "contains_state",
    "deleted_states",
    "is_last_listener",
    "is_mapped",
    "is_orphan",
    "mapper_of",
    "modified_states",
    "orphaned_outside_of_session",
    "pending_states",
    "postupdated_states",
]


# -- mappers -----------------------------------------------------------------------------------


def mapper_of(cls: type) -> Mapper[Any] | None:
    """The mapper of exactly this class, without configuring mappers; ``None`` if unmapped."""
    manager = cls.__dict__.get("_sa_class_manager")
    if manager is None or not manager.is_mapped:
        return None
    mapper: Mapper[Any] = manager.mapper
    return mapper


def is_mapped(cls: type) -> bool:
    """Whether exactly this class is mapped, without configuring mappers."""
    return mapper_of(cls) is not None


def all_mappers() -> Iterator[Mapper[Any]]:
    """Every mapper of the process, configured or not."""
    for registry in _all_registries():
        yield from registry.mappers


def column_keys(mapper: Mapper[Any], attribute: str) -> frozenset[str]:
    """The column attributes behind an attribute name, empty if there is no column behind it.

    A relationship stands for its foreign keys on this class, a composite for its columns, a
    synonym for what it is a synonym of.
    """
    prop = mapper._props.get(attribute)
    if isinstance(prop, SynonymProperty):
        return column_keys(mapper, prop.name)
    if isinstance(prop, ColumnProperty):
        return frozenset([prop.key] if isinstance(prop.columns[0], Column) else [])
    if isinstance(prop, CompositeProperty):
        return frozenset(column_prop.key for column_prop in prop.props)
    if isinstance(prop, RelationshipProperty):
        return frozenset(
            mapper.get_property_by_column(column).key
            for column in prop.local_columns
            if column.foreign_keys
        )
    return frozenset()


def is_last_listener(mapper: Mapper[Any], event_name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is the last listener of a mapper's own for an event."""
    listeners = getattr(mapper.dispatch, event_name).listeners
    return bool(listeners) and listeners[-1] == fn


# -- what a session is about to flush ----------------------------------------------------------


def pending_states(session: Session) -> Mapping[InstanceState[Any], Any]:
    """The states that were added and have no row yet; the live dictionary of the session."""
    return session._new


def deleted_states(session: Session) -> Mapping[InstanceState[Any], Any]:
    """The states marked as deleted, in the order of marking; the live dictionary."""
    return session._deleted


def modified_states(session: Session) -> set[InstanceState[Any]]:
    """The persistent states with pending changes, those also marked as deleted included."""
    return set(session._dirty_states)


def contains_state(session: Session, state: InstanceState[Any]) -> bool:
    """Whether a state is pending or persistent in the session."""
    return bool(session._contains_state(state))


def is_orphan(state: InstanceState[Any]) -> bool:
    """Whether a ``delete-orphan`` cascade has left the instance without a parent."""
    return bool(state.manager.mapper._is_orphan(state))


def orphaned_outside_of_session(state: InstanceState[Any]) -> bool:
    """Whether a pending orphan lost a parent that was in no session; flush() drops it silently."""
    return bool(state._orphaned_outside_of_session)


def postupdated_states(
    context: UOWTransaction,
) -> Iterator[tuple[InstanceState[Any], set[Column[Any]]]]:
    """The states that got an extra UPDATE for ``post_update``, with the columns it may write."""
    for states, columns in context.post_update_states.values():
        for state in states:
            yield state, columns

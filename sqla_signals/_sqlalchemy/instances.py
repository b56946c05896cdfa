"""Instances and their states: copies, what is loaded, what is kept readable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import LoaderCallableStatus, PassiveFlag, Session, attributes
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import DEFAULT_STATE_ATTR
from sqlalchemy.orm.exc import NO_STATE, ObjectDeletedError

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper

    State = InstanceState[Any]


PASSIVE_OFF: Final = PassiveFlag.PASSIVE_OFF
PASSIVE_NO_INITIALIZE: Final = PassiveFlag.PASSIVE_NO_INITIALIZE
state_of: Callable[[Any], State] = attributes.instance_state
"""The state of a mapped instance; what ``inspect`` gives, without its detours."""


def are_instances(objects: Iterable[Any] | None) -> bool:
    """Whether a flush takes what it was given: ``Session._flush`` refuses what is not mapped."""
    if not objects or isinstance(objects, Iterator):
        return True
    try:
        return all(state_of(one) is not None for one in objects)
    except NO_STATE:
        return False


instance_dict: Callable[[Any], dict[str, Any]] = attributes.instance_dict
"""The dictionary behind the attributes of a mapped instance."""
MUTABLE_PARENTS: Final = "_parents"
"""Where a ``MutableBase`` of ``sqlalchemy/ext/mutable.py`` keeps the instances that it belongs to.

That module is not imported here, because it listens to mappers from then on.
"""


def is_mutable(value: Any) -> bool:
    """Whether a column value is a ``MutableBase``."""
    extension = sys.modules.get("sqlalchemy.ext.mutable")
    return extension is not None and isinstance(value, extension.MutableBase)


def is_mapped_instance(value: Any) -> bool:
    """Whether a value is an instance of a mapped class."""
    return hasattr(value, DEFAULT_STATE_ATTR)


def detached_copy(mapper: Mapper[Any], key: Any, values: Mapping[str, Any]) -> Any:
    """A detached instance with these column values loaded; other columns count as expired."""
    return _copy(mapper, key, values, None)


def attached_copy(
    session: Session, mapper: Mapper[Any], key: Any, values: Mapping[str, Any]
) -> Any:
    """The same, persistent in a new session as if just loaded there; begins no transaction."""
    return _copy(mapper, key, values, session)


def _copy(mapper: Mapper[Any], key: Any, values: Mapping[str, Any], session: Session | None) -> Any:
    manager = mapper.class_manager
    instance = manager.new_instance()
    state = state_of(instance)
    instance_dict(instance).update(values)
    state.key = key
    if key[2] is not None:
        state.identity_token = key[2]
    columns = mapper.column_attrs
    if len(values) < len(columns._data):
        state.expired_attributes.update(prop.key for prop in columns if prop.key not in values)
    if session is not None:
        identity_map = session.identity_map
        identity_map._dict[key] = state
        state._instance_dict = identity_map._wr
        state.session_id = session.hash_key
    if manager.dispatch.load:  # as Session.merge(load=False) does
        manager.dispatch.load(state, None)
    return instance


def set_written(
    session: Session, instance: Any, values: Mapping[str, Any], *, keep_pending: bool
) -> None:
    """Let an instance hold what a statement has written.

    As in ``_apply_update_set_values_to_objects`` (``orm/bulk_persistence.py``), a rollback of the
    savepoint expires the instance, and composites and mutable values follow.

    :param keep_pending: whether to keep what is assigned and not flushed.
    """
    state = state_of(instance)
    for name, value in values.items():
        if keep_pending and name in state.committed_state:
            state.committed_state[name] = value
        else:
            set_committed_value(instance, name, value)
    state.manager.dispatch.refresh(state, None, values.keys())
    altered(session, state)


def set_deleted(session: Session, instances: Iterable[Any]) -> None:
    """Let the session know that the rows of these instances were deleted."""
    session._remove_newly_deleted(map(state_of, instances))


def altered(session: Session, state: State) -> None:
    """Let the instance be expired if the savepoint is rolled back, as one that was flushed is."""
    session._register_altered([state])


def contains_state(session: Session, state: State) -> bool:
    """Whether a state is pending or persistent in the session."""
    return bool(session._contains_state(state))


def is_still_kept(session: Session, state: State) -> bool:
    """Whether a state that was persistent in the session still is, and not marked as deleted."""
    return (
        state.session_id == session.hash_key
        and state.key is not None
        and not state._deleted
        and state not in session._deleted
    )


def is_orphan(state: State) -> bool:
    """Whether a ``delete-orphan`` cascade has left the instance without a parent."""
    return bool(state.manager.mapper._is_orphan(state))


def orphaned_outside_of_session(state: State) -> bool:
    """Whether a pending orphan lost a parent that was in no session; flush() drops it silently."""
    return bool(state._orphaned_outside_of_session)


def has_pending_mutations(state: State) -> bool:
    """Whether something was added to or removed from a collection that is not loaded."""
    return "_pending_mutations" in state.__dict__


class _Kept:
    """The loader of attributes that were read for a deletion: it has their values already.

    They do not count as loaded until somebody reads one of them, and then all do, as with expired
    ones. A class, so that the instance can still be pickled.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __call__(self, state: State, passive: PassiveFlag) -> LoaderCallableStatus:
        if not passive & PassiveFlag.SQL_OK:
            return LoaderCallableStatus.PASSIVE_NO_RESULT
        for key in self.values:
            state.callables.pop(key, None)
        if not state.was_deleted:  # the deletion was rolled back, and more perhaps
            state.expired_attributes.update(self.values)
            return state._load_expired(state, passive)
        for key, value in self.values.items():
            if key not in state.committed_state:
                state.dict.setdefault(key, value)
        return LoaderCallableStatus.ATTR_WAS_SET


def keep_readable(state: State, key: str) -> None:
    """Let the expired attributes of an instance be read after the DELETE that comes next.

    Without that they could not. Nothing else must change: what asks for loaded attributes only,
    such as ``Session.merge()`` and ``make_transient()``, would write more than without signals.

    :param key: one of the expired attributes.
    """
    expired, mapper = set(state.expired_attributes), state.manager.mapper
    kept = expired.difference(state.dict)
    try:
        state.manager[key].impl.get(state, state.dict, PASSIVE_OFF)
    except (ObjectDeletedError, KeyError):
        # Gone already, by ON DELETE CASCADE or another transaction. If it is gone from one of
        # several tables, orm/attributes.py, AttributeImpl.get(), raises a KeyError.
        return
    needed = [*mapper.primary_key, mapper.version_id_col]
    if any(mapper.get_property_by_column(c).key in expired for c in needed if c is not None):
        return  # the DELETE needs it, so SQLAlchemy itself would have loaded them
    values = {key: state.dict.pop(key) for key in kept if key in state.dict}
    state.expired_attributes.update(expired.difference(values))
    state.callables = {**state.callables, **dict.fromkeys(values, _Kept(values))}


def readable_values(state: State) -> dict[str, Any]:
    """A copy of what is loaded of an instance, and what :func:`keep_readable` has kept."""
    values = instance_dict(state.obj()).copy()
    values.pop(DEFAULT_STATE_ATTR, None)
    if state.callables:
        for loader in state.callables.values():
            if isinstance(loader, _Kept):
                return {**loader.values, **values}
    return values

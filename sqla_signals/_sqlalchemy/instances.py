"""Instances: their states and values, copies, and how a session is told what was written."""

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


def are_instances(objects: Iterable[Any] | None) -> bool:
    """Whether ``Session._flush`` accepts its argument: it refuses what is not mapped."""
    if not objects or isinstance(objects, Iterator):
        return True
    try:
        return all(state_of(one) is not None for one in objects)
    except NO_STATE:
        return False


def contains_state(session: Session, state: State) -> bool:
    """Whether a state is pending or persistent in the session."""
    return bool(session._contains_state(state))


def is_still_kept(session: Session, state: State) -> bool:
    """Whether a state is persistent in the session, and not marked as deleted."""
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


def detached_copy(mapper: Mapper[Any], key: Any, values: Mapping[str, Any]) -> Any:
    """A detached instance with these column values loaded; other columns count as expired."""
    return _copy(mapper, key, values, None)


def attached_copy(
    session: Session, mapper: Mapper[Any], key: Any, values: Mapping[str, Any]
) -> Any:
    """A persistent instance with these column values loaded, in a session without a transaction.

    It looks as if the session had just loaded it; other columns count as expired.
    """
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
    """Give an instance the values that a statement has written to its row.

    Composites and mutable values follow, and a rollback to a savepoint expires the instance, as
    ``_apply_update_set_values_to_objects`` (``orm/bulk_persistence.py``) sees to.

    :param keep_pending: whether an attribute keeps a value that is assigned and not flushed.
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
    """Make these instances deleted ones, as a flush does that has deleted their rows."""
    session._remove_newly_deleted(map(state_of, instances))


def altered(session: Session, state: State) -> None:
    """Let a rollback to a savepoint expire the instance, as it does after a flush."""
    session._register_altered([state])


def keep_readable(state: State, key: str) -> None:
    """Load the expired attributes of an instance whose row is about to be deleted.

    A receiver of ``post_delete`` may read them, when there is no row to load any more. Until they
    are read they do not count as loaded: ``Session.merge()`` and ``make_transient()`` look at the
    loaded attributes, and would write more than they do without signals.

    :param key: one of the expired attributes.
    """
    expired, mapper = set(state.expired_attributes), state.manager.mapper
    kept = expired.difference(state.dict)
    try:
        state.manager[key].impl.get(state, state.dict, PASSIVE_OFF)
    except (ObjectDeletedError, KeyError):
        # The row is gone already, by ON DELETE CASCADE or another transaction. If it is gone from
        # one of several tables, AttributeImpl.get() of orm/attributes.py raises a KeyError.
        return
    needed = [*mapper.primary_key, mapper.version_id_col]
    if any(mapper.get_property_by_column(c).key in expired for c in needed if c is not None):
        return  # the DELETE needs this column, so SQLAlchemy would have loaded them as well
    values = {key: state.dict.pop(key) for key in kept if key in state.dict}
    state.expired_attributes.update(expired.difference(values))
    state.callables = {**state.callables, **dict.fromkeys(values, _Kept(values))}


def readable_values(state: State) -> dict[str, Any]:
    """The values that are loaded, and those that :func:`keep_readable` has; a copy."""
    values = instance_dict(state.obj()).copy()
    values.pop(DEFAULT_STATE_ATTR, None)
    if state.callables:
        for loader in state.callables.values():
            if isinstance(loader, _Kept):
                return {**loader.values, **values}
    return values


class _Kept:
    """A loader that has the values of expired attributes; see :func:`keep_readable`.

    When one of the attributes is read, all of them become loaded, as it is with expired ones. This
    is a class and not a local function, so that the instance can still be pickled.
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

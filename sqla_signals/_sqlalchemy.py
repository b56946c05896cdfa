"""Every private name of SQLAlchemy that this package relies on, and nothing else.

``tests/test_sqlalchemy_private.py`` asserts each of them by name, so that an upgrade which moves
one fails there with its name instead of somewhere in a flush. Where SQLAlchemy 2.0 and 2.1 differ,
the difference is settled here.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import Connection, Engine, MetaData, event, inspect, select
from sqlalchemy.engine.cursor import CursorResult, FullyBufferedCursorFetchStrategy
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.event import registry as event_registry
from sqlalchemy.orm import (
    MANYTOONE,
    ColumnProperty,
    CompositeProperty,
    FromStatement,
    LoaderCallableStatus,
    PassiveFlag,
    QueryableAttribute,
    RelationshipProperty,
    Session,
    SynonymProperty,
    UOWTransaction,
    attributes,
    bulk_persistence,
    dependency,
    scoped_session,
)
from sqlalchemy.orm import session as session_module
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import DEFAULT_STATE_ATTR
from sqlalchemy.orm.exc import NO_STATE, ObjectDeletedError, UnmappedColumnError
from sqlalchemy.orm.mapper import _mapper_registries
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.schema import Column, Table
from sqlalchemy.sql import Select, sqltypes
from sqlalchemy.sql.expression import BinaryExpression, BindParameter
from sqlalchemy.util import immutabledict, walk_subclasses

from .changes import UNSET
from .errors import InstallError, SignalsError

if TYPE_CHECKING:
    from sqlalchemy import Dialect, Result
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import (
        ClassManager,
        InstanceState,
        Mapper,
        ORMExecuteState,
        SessionTransaction,
    )
    from sqlalchemy.types import TypeEngine

    State = InstanceState[Any]

# 2.1 put an underscore before these names.
_NEW: Final = "_" if hasattr(dependency, "_OneToManyDP") else ""
OneToManyDP: Final[type[Any]] = getattr(dependency, f"{_NEW}OneToManyDP")
ManyToOneDP: Final[type[Any]] = getattr(dependency, f"{_NEW}ManyToOneDP")
ManyToManyDP: Final[type[Any]] = getattr(dependency, f"{_NEW}ManyToManyDP")
_expand: Final[Any] = getattr(
    bulk_persistence, "_expand_other_attrs" if _NEW else "_expand_composites"
)
_BulkUDCompileState: Final[Any] = getattr(bulk_persistence, f"{_NEW}BulkUDCompileState")
DetectKeySwitch: Final[type[Any]] = getattr(dependency, f"{_NEW}DetectKeySwitch")

PASSIVE_OFF: Final = PassiveFlag.PASSIVE_OFF
PASSIVE_NO_INITIALIZE: Final = PassiveFlag.PASSIVE_NO_INITIALIZE

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


def all_mappers() -> list[Mapper[Any]]:
    """Every mapper of the process that is complete, configured or not.

    ``registry.mappers`` (orm/decl_api.py) raises while another thread defines a class, and for as
    long as somebody keeps a class whose definition has failed. ``keyrefs()`` copies in one step,
    and ``Mapper.__init__`` ends with ``_flag_new_mapper``.
    """
    managers = [ref() for registry in _registries() for ref in registry._managers.keyrefs()]
    mappers = [manager.__dict__.get("mapper") for manager in managers if manager is not None]
    return [mapper for mapper in mappers if mapper is not None and mapper._ready_for_configure]


def _registries() -> list[Any]:
    return [registry for ref in _mapper_registries.keyrefs() if (registry := ref())]


def configured_mappers() -> list[Mapper[Any]]:
    """Every mapper that can be used; those that nobody has used yet are configured.

    ``configure_mappers()`` raises if there is one class in the process that cannot be configured.
    """
    for registry in _registries():
        try:
            registry.configure(cascade=True)
        except SignalsError:
            raise
        except Exception:
            continue  # so does whoever uses one of its classes
    return [mapper for mapper in all_mappers() if mapper.configured]


def all_sessions() -> list[Session]:
    """Every session of the process that is alive."""
    # valuerefs() copies in one step, whatever sessions other threads make.
    found = [reference() for reference in session_module._sessions.valuerefs()]
    return [session for session in found if session is not None]


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
            if prop.direction is MANYTOONE
        )
    return frozenset()


def property_count(mapper: Mapper[Any]) -> int:
    """How many properties a mapper has; they grow when one is assigned to its class later."""
    return len(mapper._props)


def reference_count(mapper: Mapper[Any]) -> int:
    """How many relationships and cascades of others lead to the mapper, which may grow as well."""
    return sum(
        len(parent._dependency_processors) + len(parent._delete_orphans)
        for parent in mapper.iterate_to_root()
    )


def is_listener(session: Session, event_name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` listens to this one session, or to the one that it is like."""
    dispatch = session.__dict__.get("dispatch")
    return dispatch is not None and fn in getattr(dispatch, event_name).listeners


def listen_to_class(cls: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Add a listener of all sessions of a class, or of all mappers; once, if it is there already.

    ``event.listen`` changes the collections (event/attr.py, ``_ClsLevelDispatch``), and so breaks
    whoever runs through one of them: another thread, or the caller. Here they are replaced.
    """
    _replace_listeners(cls, event_name, fn, lambda others: [*others, fn])
    event_registry._stored_in_collection(
        event_registry._EventKey(cls, event_name, fn, cls), getattr(cls.dispatch, event_name)
    )


def unlisten_to_class(cls: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Undo :func:`listen_to_class`; also if SQLAlchemy has forgotten the listener meanwhile.

    Its own test fixtures let it, with ``SessionEvents._clear()``.
    """
    _replace_listeners(cls, event_name, fn, lambda others: others)
    key = event_registry._EventKey(cls, event_name, fn, cls)
    if key.contains():
        event_registry._removed_from_collection(key, getattr(cls.dispatch, event_name))


def _replace_listeners(
    target: Any, event_name: str, fn: Callable[..., Any], replace: Callable[[list[Any]], list[Any]]
) -> None:
    of_classes = getattr(target.dispatch, event_name)
    for cls in walk_subclasses(target):
        if cls not in of_classes._clslevel:
            of_classes.update_subclass(cls)
        others = [one for one in of_classes._clslevel[cls] if one != fn]
        listeners = of_classes._clslevel[cls] = deque(replace(others))
        of_instances = target.dispatch._empty_listener_reg.get(cls)
        if of_instances is not None:
            of_instances[event_name].parent_listeners = listeners
    # Instances with listeners of their own refer to those of their class by themselves.
    owners: list[Any] = [*all_sessions(), *all_mappers()]
    for owner in owners:
        if isinstance(owner, target) and "dispatch" in owner.__dict__:
            of_instance = getattr(owner.dispatch, event_name)
            of_instance.parent_listeners = of_classes._clslevel[type(owner)]


def listen_to(owner: Any, event_name: str, fn: Callable[..., Any], *, first: bool) -> None:
    """Add a listener of one session, mapper or class manager, that gets the state itself.

    It replaces the collection, as :func:`listen_to_class` does.
    """
    collection = getattr(owner.dispatch, event_name).for_modify(owner.dispatch)
    others = [one for one in collection.listeners if one != fn]
    collection.listeners = deque([fn, *others] if first else [*others, fn])


def unlisten(owner: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Undo :func:`listen_to`."""
    # ClassManager.unregister (orm/instrumentation.py), for registry.dispose(), leaves none.
    collection: Any = getattr(owner.dispatch, event_name, None)
    if fn in getattr(collection, "listeners", ()):
        collection.listeners = deque(one for one in collection.listeners if one != fn)


def is_last_listener(mapper: Mapper[Any], event_name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is the last listener of a mapper's own for an event."""
    listeners = getattr(mapper.dispatch, event_name).listeners
    return bool(listeners) and listeners[-1] == fn


def wrap_init(
    mapper: Mapper[Any], wrap: Callable[[Callable[..., None]], Callable[..., None]]
) -> None:
    """Let ``wrap(init)`` be called where SQLAlchemy constructs an instance of exactly this class.

    The ``init`` event comes before ``__init__``, and there is none behind it. What is replaced is
    called for the outermost constructor alone: a ``super().__init__()`` does not come here.
    """
    manager = mapper.class_manager
    init = manager.original_init
    assert init is not None
    wrapped: Any = wrap(init)
    wrapped.__wrapped__ = init
    manager.original_init = wrapped


def unwrap_init(mapper: Mapper[Any]) -> None:
    """Undo :func:`wrap_init`."""
    wrapped: Any = mapper.class_manager.original_init
    mapper.class_manager.original_init = wrapped.__wrapped__


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


manager_of_class: Callable[[type], ClassManager[Any]] = attributes.manager_of_class
"""The class manager of a mapped class."""

instance_dict: Callable[[Any], dict[str, Any]] = attributes.instance_dict
"""The dictionary behind the attributes of a mapped instance."""


def empty(session: Session, instance: Any) -> None:
    """Expunge everything from a session that is in no transaction.

    ``Session.expunge_all()`` makes a new identity map, which is too much for the one instance that
    most calls leave there.

    :param instance: an :func:`attached_copy`, a :func:`detached_copy`, or ``None``.
    """
    known: Any = session.identity_map._dict
    if not known and not session._new:
        return
    state = None if instance is None else state_of(instance)
    if state is None or session._new or state.modified or [*known.values()] != [state]:
        session.expunge_all()
    else:
        known.clear()
        state.session_id = None
        del state._instance_dict


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


# -- instances and sessions like others --------------------------------------------------------


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


def session_like(session: Session, front: AsyncSession | None) -> Session:
    """A new session of the same class with the same binds, ``info`` and attributes.

    The ``__init__`` of the class is not called: that of an application may take anything. Nobody
    listens to the new session but those who listen to its class.

    :param front: the ``AsyncSession`` in front, which an attribute must not refer to either.
    :raises InstallError: an attribute refers to the session, so that work done by way of it would
        be done in the session, not in the new one.
    """
    cls = type(session)
    new = cls.__new__(cls)
    Session.__init__(
        new,
        autoflush=session.autoflush,
        expire_on_commit=False,
        twophase=session.twophase,
        query_cls=session._query_cls,
        enable_baked_queries=session.enable_baked_queries,
    )
    for name in _own_attributes(session):
        new.__dict__[name] = own_attribute(session, name, front)
    if "execution_options" in session.__dict__:  # since 2.1
        new.execution_options = session.execution_options
    sharding: Any = sys.modules.get("sqlalchemy.ext.horizontal_shard")
    if sharding is not None and isinstance(session, sharding.ShardedSession):
        # As its __init__ does.
        event.listen(new, "do_orm_execute", sharding.execute_and_instances, retval=True)
    _carry_over(session, new)
    return new


def adopt(session: Session, new: Session) -> None:
    """Give a new session of the same factory the binds, ``info`` and attributes of another one.

    Not the attributes that refer to the other one: the factory has made those of the new one.
    """
    for name in _own_attributes(session):
        with suppress(InstallError):
            new.__dict__[name] = own_attribute(session, name)
    _carry_over(session, new)


def for_receivers(session: Session) -> Session:
    """Let a new session work in transactions of its own, which it begins by itself.

    Where it joins the transaction of a Connection, that is a savepoint.
    """
    session.join_transaction_mode = "create_savepoint"
    session.autobegin = True
    return session


def _own_attributes(session: Session) -> list[str]:
    """The names of the attributes that are not those of each session."""
    return [name for name in session.__dict__ if name not in _OF_EACH_SESSION]


_OF_EACH_SESSION: Final = frozenset(Session().__dict__) | {
    "dispatch",
    "info",
    "_trans_context_manager",
    "execution_options",
}


def session_serial() -> int:
    """A number that is greater than the ``hash_key`` of each session that there is."""
    return session_module._new_sessionid()


def _carry_over(session: Session, new: Session) -> None:
    new.bind = session.bind
    for name in ("binds", "_Session__binds"):  # 2.1; 2.0, which changes it in place
        if name in session.__dict__:
            new.__dict__[name] = session.__dict__[name].copy()
    new.info.update(
        (key, one) for key, one in session.info.items() if not str(key).startswith("sqla_signals")
    )


def own_attribute(
    owner: Session | AsyncSession, name: str, other: Session | AsyncSession | None = None
) -> Any:
    """The value of an attribute for another session: the same, or a copy of a container.

    :param other: what it must not refer to, besides the owner.
    :raises InstallError: it refers to one of them.
    """
    value = owner.__dict__[name]
    if refers_to(value, (owner,) if other is None else (owner, other)):
        raise InstallError(
            f"the attribute {name!r} of {type(owner).__name__}, a {type(value).__name__}, refers "
            f"to the session that did the work, so a receiver's work by way of it would be done "
            f"there. Say how a session for receivers is made: "
            f"sqla_signals.install(session_factory=...)"
        )
    return value.copy() if type(value) in (dict, list, set) else value


_MAX_STEPS: Final = 8
_MAX_SEEN: Final = 1000


def refers_to(value: Any, targets: tuple[object, ...]) -> bool:
    """Whether a value is one of the targets, or leads to one in a few steps.

    A step is what the garbage collector sees, such as an attribute or an element of a container, a
    variable or a default of a function, or a weak reference. A ``scoped_session`` leads nowhere: it
    asks who is calling.
    """
    seen: set[int] = set()
    values: list[Any] = [value]
    for _ in range(_MAX_STEPS + 1):
        if any(one is target for one in values for target in targets):
            return True
        found: list[Any] = []
        for one in values:
            if id(one) not in seen and len(seen) < _MAX_SEEN:
                seen.add(id(one))
                found += _one_step(one)
        values = found
    return False


def _one_step(value: Any) -> Iterable[Any]:
    if isinstance(value, _LEADING_NOWHERE):
        return ()
    if isinstance(value, FunctionType):  # not the globals of its module
        return value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or ()
    if isinstance(value, weakref.ref):
        return (value(),)
    return gc.get_referents(value)


_LEADING_NOWHERE: Final = (type, ModuleType, scoped_session, Engine, Connection, MetaData)


def async_session_like(
    async_session: AsyncSession, session: Session, sync: Session
) -> AsyncSession:
    """A new ``AsyncSession`` of the same class in front of another session.

    :param session: the one behind ``async_session``.
    :param sync: the one behind the new one.
    """
    cls = type(async_session)
    new = cls.__new__(cls)
    for name in async_session.__dict__.keys() - {"sync_session", "_proxied"}:
        new.__dict__[name] = own_attribute(async_session, name, session)
    new.sync_session = new._proxied = new._assign_proxied(sync)
    return new


def current_task() -> asyncio.Task[Any] | None:
    """The task around us, also inside a greenlet of SQLAlchemy's; ``None`` outside of a loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def ends_session_block(task: asyncio.Task[Any]) -> bool:
    """Whether it is the task in which ``async with maker.begin()`` commits, shielded."""
    name = getattr(task.get_coro(), "__qualname__", "")
    return name == "_AsyncSessionContextManager.__aexit__.<locals>.go"


# -- column types ------------------------------------------------------------------------------


class PlainDialect(DefaultDialect):
    """No database's: for what column types make of values by themselves."""

    supports_native_decimal = True
    """Floats would lose digits."""
    _json_serializer = None
    """In 2.0 only the dialects of databases have these two."""
    _json_deserializer = None


BinaryType: Final[type[Any]] = sqltypes._Binary
"""The base of all types for bytes."""
IntervalType: Final[type[Any]] = sqltypes._AbstractInterval
"""The base of all types for a ``timedelta``, emulated or not."""


def has_sql_expression(kind: TypeEngine[Any]) -> bool:
    """Whether a type puts SQL around its values, in statements that write or read them."""
    return bool(kind._has_bind_expression or kind._has_column_expression)


def json_functions(dialect: Dialect) -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    """What the engine writes a JSON column with, and reads it."""
    write = getattr(dialect, "_json_serializer", None)
    read = getattr(dialect, "_json_deserializer", None)
    return write or json.dumps, read or json.loads


def loads_addresses(dialect: Dialect) -> bool:
    """Whether the driver loads an INET as an object of :mod:`ipaddress`, and not as a string."""
    return dialect.driver != "psycopg2" and getattr(dialect, "_native_inet_types", 0) is not False


# -- statements about many rows ----------------------------------------------------------------


def dml_mapper(statement: Any) -> Mapper[Any] | None:
    """The mapper of the class that an INSERT, UPDATE or DELETE names, ``None`` for any other."""
    entity = _dml_entity(statement)
    return None if entity is None else entity.mapper


def dml_entity(statement: Any) -> Any:
    """The class, or the alias of one, that the statement names."""
    return _dml_entity(statement).entity


def _dml_entity(statement: Any) -> Any:
    if not statement.is_dml:
        return None
    # Of a Table there is none, even where the ORM has a part in the statement by a WHERE.
    return dml_of(statement).table._annotations.get("parententity")


def dml_of(statement: Any) -> Any:
    """The INSERT, UPDATE or DELETE itself, also where ``from_statement()`` is around it."""
    return statement.element if isinstance(statement, FromStatement) else statement


def dml_operation(statement: Any) -> Literal["insert", "update", "delete"]:
    """What a statement does.

    ``ORMExecuteState.is_insert`` does not see through ``from_statement()`` before 2.0.30.
    """
    dml = dml_of(statement)
    return "insert" if dml.is_insert else "update" if dml.is_update else "delete"


def returns_rows(statement: Any) -> bool:
    """Whether an INSERT, UPDATE or DELETE has a RETURNING of the user's."""
    return bool(dml_of(statement)._returning)


def may_skip_rows(statement: Any) -> bool:
    """Whether the statement may leave rows alone that it was given one by one."""
    return bool(
        getattr(statement, "_where_criteria", ())
        or getattr(statement, "_post_values_clause", None) is not None
    )


def set_values(statement: Any, mapper: Mapper[Any]) -> dict[str, Any]:
    """What an UPDATE sets, by attribute: Python values, or SQL."""
    values = dict(getattr(statement, "_ordered_values", None) or statement._values or {})
    found: dict[str, Any] = {}
    for target, value in values.items():
        column = target
        while isinstance(column, BinaryExpression):  # column["key"], a part of its value
            column, value = column.left, target
        name = attribute_of(column, mapper)
        if name is not None:
            found[name] = _plain(value)
    return found


def is_replacing(statement: Any) -> bool:
    """Whether SQLite is to delete rows that are in the way: ``INSERT OR REPLACE``, and UPDATE."""
    return any("REPLACE" in str(text).upper() for text, _ in dml_of(statement)._prefixes)


def is_extended(statement: Any) -> bool:
    """Whether something follows the condition of an UPDATE or DELETE (from SQLAlchemy 2.1 on)."""
    return getattr(statement, "_post_criteria_clause", None) is not None


def is_beyond_its_condition(statement: Any) -> bool:
    """Whether an UPDATE or DELETE of MySQL has a LIMIT, or sets columns of a second table."""
    if any(name.endswith("limit") for name in statement.dialect_kwargs):
        return True
    table = dml_table(statement)
    columns = getattr(statement, "_ordered_values", None) or getattr(statement, "_values", None)
    return any(
        isinstance(one, Column) and not table.c.contains_column(one) for one in dict(columns or {})
    )


def attribute_of(column: Any, mapper: Mapper[Any]) -> str | None:
    """The attribute of a column of the class, or of an alias, or of a key; else ``None``."""
    if isinstance(column, str):
        column = mapper.local_table.c.get(column)
    else:
        column = mapper.persist_selectable.corresponding_column(column)
    try:
        return None if column is None else mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None


def inserted_values(statement: Any, mapper: Mapper[Any]) -> list[dict[str, Any]] | None:
    """What an INSERT says in ``values()``, by row and attribute; ``None`` if it selects them."""
    if statement.select is not None:
        return None
    if not statement._multi_values:
        return [set_values(statement, mapper)]
    return [
        {
            name: _plain(value)
            for column, value in row.items()
            if (name := attribute_of(column, mapper)) is not None
        }
        for rows in statement._multi_values
        for row in rows
    ]


def by_column(parameters: Iterable[Mapping[str, Any]], mapper: Mapper[Any]) -> list[dict[str, Any]]:
    """Lists of values with what SQLAlchemy takes apart, such as composites, by their columns."""
    expanded = [dict(one) for one in parameters]
    _expand(mapper, expanded)
    return expanded


def has_many_values(statement: Any) -> bool:
    """Whether an INSERT has a list in its ``values()``."""
    return bool(statement._multi_values)


class Upsert:
    """What an INSERT of SQLite or PostgreSQL does where a row is in its way."""

    def __init__(self, clause: Any, mapper: Mapper[Any]) -> None:
        table: Any = mapper.local_table
        self.updates: frozenset[str] = frozenset(
            name
            for column in dict(getattr(clause, "update_values_to_set", ()))
            if (name := attribute_of(column, mapper)) is not None
        )
        """The attributes that it sets; none if it leaves the row alone."""
        columns: list[Any] = [
            # Before 2.0.37, ORM attributes come as they are: postgresql/dml.py, OnConflictClause.
            table.c[one] if isinstance(one, str) else getattr(one, "expression", one)
            for one in clause.inferred_target_elements or ()
        ]
        named = getattr(clause, "constraint_target", None)  # PostgreSQL's only
        for constraint in (*table.constraints, *table.indexes):
            if named is not None and constraint.name == named:
                columns = list(constraint.columns)
        self.target: list[str] | None = None
        if columns and all(isinstance(column, Column) for column in columns):
            self.target = [mapper.get_property_by_column(column).key for column in columns]
        """The attributes that tell which row is in the way, if the statement says so."""


def upsert_of(statement: Any, mapper: Mapper[Any]) -> Upsert | None:
    """The ``ON CONFLICT`` of an INSERT; ``TypeError`` for one that is not of the known kind."""
    clause = getattr(statement, "_post_values_clause", None)
    if clause is None:
        return None
    if not hasattr(clause, "inferred_target_elements"):
        raise TypeError
    return Upsert(clause, mapper)


def _plain(value: Any) -> Any:
    is_plain = isinstance(value, BindParameter) and value.callable is None and not value.required
    return value.value if is_plain else value


SEEN_OPTION: Final = "_sqla_signals_seen"
"""Execution option of a statement that one installation has taken care of.

With an underscore, as SQLAlchemy's own: such an option is not shown to the user.
"""

BIND_ARGUMENT: Final = "_sa_skip_events"
"""``ORMExecuteState.invoke_statement()`` adds it to the bind arguments; it means nothing any more.

A ``get_bind(self, mapper=None, clause=None)``, as in SQLAlchemy's recipe, does not take it.
"""


def execution_options_of(context: ORMExecuteState) -> Mapping[str, Any]:
    """The options of a statement and of its execution, with what listeners have added so far."""
    statement: Any = context.statement
    return {**statement.get_execution_options(), **context.local_execution_options}


def with_options_of(query: Any, statement: Any) -> Any:
    """A query with the execution options that a statement has itself."""
    return query.execution_options(**statement.get_execution_options())


def dml_strategy(context: ORMExecuteState) -> str:
    """How the ORM is going to execute an INSERT, UPDATE or DELETE.

    The rule is that of ``orm_pre_session_exec`` in ``orm/bulk_persistence.py``.
    """
    strategy: str = execution_options_of(context).get("dml_strategy", "auto")
    if strategy != "auto":
        return strategy
    parameters = context.parameters
    is_bulk = bool(parameters) if context.is_insert else isinstance(parameters, list)
    return "bulk" if is_bulk else "orm"


def execute_last(
    context: ORMExecuteState, execute: Callable[[ORMExecuteState], Result[Any]]
) -> Result[Any]:
    """Let ``execute`` do what is left once all other listeners for ``do_orm_execute`` were called.

    They may still restrict the statement, or say where it goes.
    """
    context._events_todo.append(execute)
    return context.invoke_statement()


def matching(statement: Any, columns: Iterable[Column[Any]] = ()) -> Select[Any]:
    """The query for the rows that an UPDATE or DELETE would write now.

    It has the tables of the statement itself: a condition on another one, even on that of a parent
    class, joins it only as far as the condition says so.

    :param columns: what to select, of the table that the statement writes.
    """
    mapper, table = _dml_entity(statement).mapper, dml_table(statement)
    query: Any = select(*map(table.corresponding_column, columns)).select_from(table)
    criteria: dict[Any, Any] = {}
    for option in statement._with_options:
        if option._is_criteria_option:
            option.get_global_criteria(criteria)
    query = query.where(
        *statement._where_criteria,
        *_BulkUDCompileState._adjust_for_extra_criteria(criteria, mapper),
    )
    return as_core(query.options(*statement._with_options))


def dml_table(statement: Any) -> Any:
    """The table that an UPDATE or DELETE writes, or the alias of it that it names."""
    entity = _dml_entity(statement)
    return entity.selectable if entity.is_aliased_class else entity.mapper.local_table


def fetched(result: Result[Any]) -> int | None:
    """Fetch all rows of a statement from the driver, for the result to give out; their number.

    No instance is made of a row before the caller reads it, as without us. ``None`` if the rows
    come from several cursors.
    """
    rows_of: Any = result if isinstance(result, CursorResult) else getattr(result, "raw", None)
    if rows_of is None:
        return None
    # CursorResult._rewind() of engine/cursor.py does the same with rows that were processed.
    rows = rows_of.cursor_strategy.fetchall(rows_of, rows_of.cursor)
    rows_of.cursor_strategy = FullyBufferedCursorFetchStrategy(None, initial_buffer=rows)
    return len(rows)


def without_where(statement: Any) -> Any:
    """The same statement without its conditions."""
    statement = statement._generate()
    statement._where_criteria = ()
    return statement


def as_core(query: Select[Any]) -> Select[Any]:
    """A query that takes its conditions as they are.

    The ORM would restrict each class that they name to the rows of that class, and to those that
    ``with_loader_criteria()`` leaves; an UPDATE or DELETE does so for the class it writes alone.
    """
    query._propagate_attrs = immutabledict()
    return query


def key_columns_of(mapper: Mapper[Any]) -> list[Any]:
    """The columns in the mapper's own table that hold the primary key, in the order of the key."""
    found = []
    for column in mapper.primary_key:
        same, todo = {column}, [column]
        while todo:
            more = mapper._equivalent_columns.get(todo.pop(), set()) - same
            same |= more
            todo += more
        found.append(next(one for one in same if one.table is mapper.local_table))
    return found


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


def flush_as_query_does(session: Session) -> None:
    """Flush unless autoflush is turned off, or a flush is under way."""
    session._autoflush()


def fail_transaction(session: Session) -> None:
    """Roll back to the innermost savepoint, or all, as a flush does that fails.

    To be called while the exception is handled. The session refuses work until its caller has
    rolled back too, so that nobody commits the rest without having heard of the failure.
    """
    session._autobegin_t()._begin().rollback(_capture_exception=True)


def frames_outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from this one outwards, out of the greenlet of an ``AsyncSession`` too."""
    greenlet: Any = sys.modules.get("greenlet")
    inside = greenlet.getcurrent() if greenlet is not None else None
    while frame is not None:
        yield frame
        frame = frame.f_back
        while frame is None and inside is not None and inside.parent is not None:
            inside = inside.parent
            frame = inside.gr_frame


# -- what a session is about to flush ----------------------------------------------------------


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


def altered(session: Session, state: State) -> None:
    """Let the instance be expired if the savepoint is rolled back, as one that was flushed is."""
    session._register_altered([state])


def is_flushing(session: Session) -> bool:
    """Whether the session is inside of ``Session.flush()``."""
    return session._flushing


def is_clean(session: Session) -> bool:
    """Whether a flush would find nothing to do, as ``commit()`` itself asks."""
    return session._is_clean()


def is_autocommit(connection: Connection) -> bool:
    """Whether a connection commits each statement at once, as far as SQLAlchemy was told."""
    return connection._is_autocommit_isolation()


def shards_of(session: Session) -> Mapping[Any, Engine | Connection]:
    """The binds of a ``ShardedSession``, by their shards; none of any other session."""
    found: Mapping[Any, Engine | Connection] = getattr(session, "_ShardedSession__shards", {})
    return found


def is_committing(transaction: SessionTransaction) -> bool:
    """In ``before_commit`` and in commit's own flushes: whether it is this one that commits.

    The event tells the session only, and is the same for a root and for a savepoint.
    """
    return transaction._current_fn is not None


def current_transaction(session: Session) -> SessionTransaction | None:
    """The transaction that the session is in: a root, a savepoint, or a subtransaction of these.

    Not by ``get_nested_transaction()``: that goes on to give a savepoint that was open when its
    root was committed.
    """
    return session._transaction


def is_committed(transaction: SessionTransaction) -> bool:
    """In ``after_commit``: whether it is this transaction that was committed."""
    return transaction._state is SessionTransactionState.COMMITTED


def is_rolled_back(transaction: SessionTransaction) -> bool:
    """In ``after_rollback``: whether it is this transaction that was rolled back."""
    return transaction._state is SessionTransactionState.DEACTIVE


def has_joined(transaction: SessionTransaction, connection: Connection) -> bool:
    """In ``after_begin``: whether the connection was in a transaction that stays its owner's.

    The session does not commit that one, and closing the session does not end it.
    """
    _, _, should_commit, _ = transaction._connections[connection]
    return not should_commit


def schema_maps(transaction: SessionTransaction) -> dict[Engine, Any]:
    """In ``after_commit``: the ``schema_translate_map`` of each connection that has one."""
    found = {}
    for connection, *_ in transaction._connections.values():
        schema_map = connection.get_execution_options().get("schema_translate_map")
        if schema_map:
            found[connection.engine] = schema_map
    return found


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


def can_orphan(mapper: Mapper[Any]) -> bool:
    """Whether a ``delete-orphan`` cascade leads to the mapper."""
    return any(parent._delete_orphans for parent in mapper.iterate_to_root())


def referenced_keys(mapper: Mapper[Any]) -> Iterator[str]:
    """The attributes whose change a flush carries over to the foreign keys of other rows."""
    relationships = [
        prop
        for prop in mapper.relationships
        if not prop.viewonly and prop.direction is not MANYTOONE
    ]
    relationships += [
        processor.prop  # many-to-one, from the other side
        for parent in mapper.iterate_to_root()
        for processor in parent._dependency_processors
    ]
    for prop in relationships:
        for column, _ in prop.synchronize_pairs:
            # A relationship that reads through a table in between may name a column of that.
            key = attribute_of(column, mapper)
            if key is not None:
                yield key


def is_referenced(mapper: Mapper[Any]) -> bool:
    """Whether a relationship of another class leads to the mapper."""
    return any(parent._dependency_processors for parent in mapper.iterate_to_root())


def is_orphan(state: State) -> bool:
    """Whether a ``delete-orphan`` cascade has left the instance without a parent."""
    return bool(state.manager.mapper._is_orphan(state))


def orphaned_outside_of_session(state: State) -> bool:
    """Whether a pending orphan lost a parent that was in no session; flush() drops it silently."""
    return bool(state._orphaned_outside_of_session)


def has_pending_mutations(state: State) -> bool:
    """Whether something was added to or removed from a collection that is not loaded."""
    return "_pending_mutations" in state.__dict__


def postupdated_states(
    context: UOWTransaction,
) -> Iterator[tuple[State, set[Column[Any]]]]:
    """The states that got an extra UPDATE for ``post_update``, with the columns it may write."""
    for states, columns in context.post_update_states.values():
        for state in states:
            yield state, columns


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


def pk_cascaded(context: UOWTransaction, state: State, column: Any) -> bool:
    """Whether ``ON UPDATE CASCADE`` is trusted to change this primary key column."""
    key: Any = ("pk_cascaded", state, column)
    return key in context.attributes


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


class DryRun(UOWTransaction):
    """A unit of work that registers as the real one will, and assigns and writes nothing.

    SQLAlchemy's own dependency processors find what else is affected (the presort actions); the
    foreign keys that they are going to assign are computed and kept in ``assigns``. Collections
    that this loads are loaded for good; the flush does not load them again.
    """

    def __init__(self, session: Session, only: set[State] | None) -> None:
        super().__init__(session)
        self._only = only
        """Of a partial flush: what it was given."""
        self.dropped: set[State] = set()
        """New orphans, which the flush expunges before it registers anything."""
        self.assigns: dict[State, dict[str, Any]] = {}
        self.post_updates: set[State] = set()
        """What gets an extra UPDATE, if its foreign key has changed by then."""
        self._unposted: list[tuple[Any, State, State]] = []
        """Foreign keys nulled after the child's UPDATE, and for no extra one: mostly lost."""
        self.causes: dict[State, State] = {}
        self._cause: State | None = None

    def finds(self, state: State) -> bool:
        """Whether the flush finds a state in its session."""
        return state not in self.dropped and contains_state(self.session, state)

    def register_object(
        self,
        state: State,
        isdelete: bool = False,
        listonly: bool = False,
        cancel_delete: bool = False,
        operation: str | None = None,
        prop: Any = None,
    ) -> bool:
        # The real run warns of objects outside of the session; warning twice would be noise.
        if not self.finds(state):
            return False
        if self._cause is not None and self._cause is not state:
            self.causes.setdefault(state, self._cause)
        return super().register_object(state, isdelete, listonly, cancel_delete)

    def forget(self) -> None:
        """Drop all that was found, except what was marked as deleted."""
        for found in (self.assigns, self.post_updates, self.causes):
            found.clear()
        marked = deleted_states(self.session)
        for state in [state for state in self.states if state not in marked]:
            del self.states[state]

    # -- orm/unitofwork.py: UOWTransaction._generate_actions, Preprocess.execute ----------------

    def presort(self) -> None:
        """Let the dependency processors register what else is affected, to a fixpoint."""
        while any([self._presort(action) for action in list(self.presort_actions.values())]):
            pass

    def _presort(self, action: Any) -> bool:
        processor = action.dependency_processor
        fresh: dict[bool, list[State]] = {True: [], False: []}
        for mapper in action._mappers(self):
            for state in self.mappers.get(mapper, ()):
                is_delete, listonly = self.states[state]
                if not listonly and state not in action.processed:
                    fresh[is_delete].append(state)
        presorts = ((True, processor.presort_deletes), (False, self._presort_saves(processor)))
        for is_delete, presort in presorts:
            states = fresh[is_delete]
            for state in states:
                self._cause = state
                presort(self, [state])
            action.processed.update(states)
        self._cause = None
        if not action.setup_flush_actions:
            action.setup_flush_actions = bool(
                processor.prop_has_changes(self, fresh[True], True)
                or processor.prop_has_changes(self, fresh[False], False)
            )
        return bool(fresh[True] or fresh[False])

    def _presort_saves(self, processor: Any) -> Any:
        # With passive_updates=False a key switch assigns the foreign keys while presorting.
        if isinstance(processor, DetectKeySwitch) and not processor.passive_updates:
            return lambda uow, states: self._key_switches(processor, states)
        return processor.presort_saves

    # -- orm/dependency.py: process_saves and process_deletes, as assignments to be -------------

    def synchronize(self) -> None:
        """Compute what the dependency processors will assign to foreign keys."""
        for action in self.presort_actions.values():
            processor = action.dependency_processor
            if not action.setup_flush_actions:
                continue
            saves: list[State] = []
            deletes: list[State] = []
            for mapper in action._mappers(self):
                for state in self.mappers[mapper]:
                    is_delete, listonly = self.states[state]
                    if not listonly:
                        (deletes if is_delete else saves).append(state)
            if isinstance(processor, DetectKeySwitch):
                if processor.passive_updates:
                    self._key_switches(processor, saves)
            elif isinstance(processor, OneToManyDP):
                if processor.post_update and deletes:
                    # By then the row has a new instance, and the old one's deletion was dropped.
                    deletes = [state for state in deletes if not self._is_switched(state)]
                self._one_to_many_deletes(processor, deletes)
                self._one_to_many_saves(processor, saves)
            elif isinstance(processor, ManyToOneDP):
                self._many_to_one_saves(processor, saves)
        for processor, child, cause in self._unposted:
            if child in self.post_updates:
                self._clear(processor, processor.mapper, child, cause)

    def _is_switched(self, state: State) -> bool:
        """Whether a new instance is going to take over the row of a deleted one."""
        return any(
            new.mapper.base_mapper is state.mapper.base_mapper
            and new.mapper._identity_key_from_state(new) == state.key
            for new in pending_states(self.session)
            if self._only is None or new in self._only
        )

    def _history(self, processor: Any, state: State, passive: Any) -> Any:
        return self.get_attribute_history(state, processor.key, passive)  # type: ignore[no-untyped-call]

    def _one_to_many_deletes(self, processor: Any, states: list[State]) -> None:
        if not processor.post_update and processor.passive_deletes == "all":
            return
        added: set[State] = self.memo(("children_added", processor), set)  # type: ignore[no-untyped-call]
        for state in states:
            history = self._history(processor, state, processor._passive_delete_flag)
            if not history:
                continue
            cleared = [c for c in history.deleted if c is not None and not processor.hasparent(c)]
            if processor.post_update or not processor.cascade.delete:
                cleared += [c for c in history.unchanged if c is not None and c not in added]
            for child in cleared:
                self._clear(processor, processor.mapper, child, state)

    def _one_to_many_saves(self, processor: Any, states: list[State]) -> None:
        nulls = not processor.cascade.delete_orphan and processor.passive_deletes != "all"
        for state in states:
            history = self._history(processor, state, PASSIVE_NO_INITIALIZE)
            if not history:
                continue
            for child in history.added:
                self._populate(processor, state, processor.parent, child, processor.mapper, state)
            if nulls:
                for child in history.deleted:
                    if child is None or processor.hasparent(child):
                        continue
                    if processor.post_update:
                        self._unposted.append((processor, child, state))
                    else:
                        self._clear(processor, processor.mapper, child, state)
            if processor._pks_changed(self, state):
                for child in history.unchanged:
                    self._populate(
                        processor, state, processor.parent, child, processor.mapper, state
                    )

    def _many_to_one_saves(self, processor: Any, states: list[State]) -> None:
        for state in states:
            history = self._history(processor, state, PASSIVE_NO_INITIALIZE)
            if not history:
                continue
            if processor.post_update and history.sum():
                self.post_updates.add(state)
            for target in history.added:
                if target is None:
                    self._clear(processor, processor.parent, state, state)
                elif self.finds(target):
                    self._populate(
                        processor, target, processor.mapper, state, processor.parent, state
                    )
            if not history.added and history.deleted:
                self._clear(processor, processor.parent, state, state)

    def _key_switches(self, processor: Any, states: Iterable[State]) -> None:
        switched = processor._key_switchers(self, states)
        if not switched:
            return
        for state in self.session.identity_map.all_states():
            if not issubclass(state.class_, processor.parent.class_):
                continue
            related = state.get_impl(processor.key).get(
                state, state.dict, passive=processor._passive_update_flag
            )
            if processor.prop.uselist:
                related = related[0] if related else None
            target = inspect(related, raiseerr=False) if related is not None else None
            if target is not None and target in switched:
                self.register_object(state, False, processor.passive_updates)
                self._populate(processor, target, processor.mapper, state, processor.parent, state)

    # -- orm/sync.py ----------------------------------------------------------------------------

    def _populate(
        self,
        processor: Any,
        source: State,
        source_mapper: Any,
        dest: State | None,
        dest_mapper: Any,
        cause: State,
    ) -> None:
        if not self._takes_part(processor, dest, cause):
            return
        assert dest is not None
        for left, right in processor.prop.synchronize_pairs:
            key = source_mapper.get_property_by_column(left).key
            self._assign(dest, dest_mapper, right, self._value(source, key))

    def _clear(self, processor: Any, dest_mapper: Any, dest: State, cause: State) -> None:
        if self._takes_part(processor, dest, cause):
            for _, right in processor.prop.synchronize_pairs:
                self._assign(dest, dest_mapper, right, None)

    def _takes_part(self, processor: Any, dest: State | None, cause: State) -> bool:
        if dest is None or (not processor.post_update and is_deleted(self, dest)):
            return False
        if dest is not cause:
            self.causes.setdefault(dest, cause)
        if processor.post_update:
            self.post_updates.add(dest)
        return True

    def _assign(self, dest: State, mapper: Any, column: Any, value: Any) -> None:
        key = mapper.get_property_by_column(column).key
        impl = dest.manager[key].impl
        if key not in dest.dict and key not in dest.committed_state and impl.active_history:
            impl.get(dest, dest.dict, PASSIVE_OFF)
        self.assigns.setdefault(dest, {})[key] = value

    def _value(self, source: State, key: str) -> Any:
        if key in self.assigns.get(source, ()):
            return self.assigns[source][key]
        if key in source.dict or source.key is not None:
            value = source.manager[key].impl.get(source, source.dict, PASSIVE_OFF)
            if value is not None or source.key is not None:
                return value
        partial = self._only is not None and source not in self._only and source not in self.states
        return None if partial else UNSET

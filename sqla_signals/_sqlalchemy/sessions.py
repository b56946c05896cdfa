"""Sessions and their transactions: those there are, and new sessions that are like others."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, MetaData, event
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm import session as session_module
from sqlalchemy.orm.session import SessionTransactionState

from ..errors import InstallError
from .instances import state_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import InstanceState, SessionTransaction

    State = InstanceState[Any]


def all_sessions() -> list[Session]:
    """Every session of the process that is alive."""
    # valuerefs() copies in one step, whatever sessions other threads make.
    found = [reference() for reference in session_module._sessions.valuerefs()]
    return [session for session in found if session is not None]


def is_scoped(source: Any) -> bool:
    """Whether it gives everybody who asks their own session, as a ``scoped_session`` does."""
    extension: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    return isinstance(source, scoped_session) or (
        extension is not None and isinstance(source, extension.async_scoped_session)
    )


def maker_behind(source: Any) -> Any:
    """What makes the sessions of a ``scoped_session``, or of the ``db`` of Flask-SQLAlchemy.

    Of anything else, that itself.
    """
    maker: Any = source
    if not callable(source) and isinstance(getattr(source, "session", None), scoped_session):
        maker = source.session
    return maker.session_factory if is_scoped(maker) else maker


def plain_session(session: Any) -> Any:
    """The ``Session`` behind an ``AsyncSession``; of anything else, that itself."""
    return getattr(session, "sync_session", session)


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


def is_autocommit(connection: Connection) -> bool:
    """Whether a connection commits each statement at once, as far as SQLAlchemy was told."""
    return connection._is_autocommit_isolation()


def connections_of(session: Session) -> list[Connection]:
    """The connections of the transaction that a session is in."""
    root: Any = session.get_transaction()
    return [] if root is None else [connection for connection, *_ in root._connections.values()]


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

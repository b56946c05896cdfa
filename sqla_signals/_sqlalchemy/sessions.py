"""Sessions: those there are, new ones that are like others, and who is working with one."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, MetaData, event
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm import session as session_module

from ..errors import InstallError
from .instances import state_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


def all_sessions() -> list[Session]:
    """Every session that is alive."""
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


def session_serial() -> int:
    """A number greater than the ``hash_key`` of every session made so far."""
    return session_module._new_sessionid()


def session_like(session: Session, front: AsyncSession | None) -> Session:
    """A new session of the same class with the same binds, ``info`` and attributes.

    The ``__init__`` of the class is not called, because that of an application may require any
    argument. The new session has the listeners of its class, not those of the other session.

    :param front: the ``AsyncSession`` in front of the other session.
    :raises InstallError: an attribute refers to the other session or to ``front``.
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


def adopt(session: Session, new: Session) -> None:
    """Give a session that a factory has made the binds, ``info`` and attributes of another one.

    An attribute that refers to the other session is left as the factory has made it.
    """
    for name in _own_attributes(session):
        with suppress(InstallError):
            new.__dict__[name] = own_attribute(session, name)
    _carry_over(session, new)


def for_receivers(session: Session) -> Session:
    """Let a new session begin its own transactions, by itself.

    If its Connection is in a transaction already, the session begins a savepoint there.
    """
    session.join_transaction_mode = "create_savepoint"
    session.autobegin = True
    return session


def empty(session: Session, instance: Any) -> None:
    """Expunge everything from a session that is in no transaction.

    ``Session.expunge_all()`` makes a new identity map. That is avoided where the session holds a
    single instance that was not changed, as after most calls of a receiver.

    :param instance: the one that may be left: an ``attached_copy()`` or a ``detached_copy()``.
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


def own_attribute(
    owner: Session | AsyncSession, name: str, other: Session | AsyncSession | None = None
) -> Any:
    """The value of an attribute for another session: the same, or a copy of a container.

    :raises InstallError: it refers to the owner or to ``other``.
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


def _own_attributes(session: Session) -> list[str]:
    """The names of the attributes that a session has besides those of every session."""
    return [name for name in session.__dict__ if name not in _OF_EACH_SESSION]


_OF_EACH_SESSION: Final = frozenset(Session().__dict__) | {
    "dispatch",
    "info",
    "_trans_context_manager",
    "execution_options",
}


def _carry_over(session: Session, new: Session) -> None:
    new.bind = session.bind
    for name in ("binds", "_Session__binds"):  # 2.1; 2.0, which changes it in place
        if name in session.__dict__:
            new.__dict__[name] = session.__dict__[name].copy()
    new.info.update(
        (key, one) for key, one in session.info.items() if not str(key).startswith("sqla_signals")
    )


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


_MAX_STEPS: Final = 8
_MAX_SEEN: Final = 1000
_LEADING_NOWHERE: Final = (type, ModuleType, scoped_session, Engine, Connection, MetaData)


def current_task() -> asyncio.Task[Any] | None:
    """The task around us, also inside a greenlet of SQLAlchemy's; ``None`` outside of a loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def ends_session_block(task: asyncio.Task[Any]) -> bool:
    """Whether ``async with maker.begin()`` has made this task to commit in it.

    ``_AsyncSessionContextManager.__aexit__`` (``ext/asyncio/session.py``) shields its commit from
    cancellation by a task whose coroutine is a local function.
    """
    name = getattr(task.get_coro(), "__qualname__", "")
    return name == "_AsyncSessionContextManager.__aexit__.<locals>.go"


def frames_outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """This frame and its callers, through the greenlet that an ``AsyncSession`` works in."""
    greenlet: Any = sys.modules.get("greenlet")
    inside = greenlet.getcurrent() if greenlet is not None else None
    while frame is not None:
        yield frame
        frame = frame.f_back
        while frame is None and inside is not None and inside.parent is not None:
            inside = inside.parent
            frame = inside.gr_frame

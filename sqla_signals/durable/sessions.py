"""How relays and workers make sessions, and the loop on which asynchronous sessions run."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from sqlalchemy import Engine, QueuePool, Update, event, update
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from .._sqlalchemy.sessions import maker_behind, plain_session
from ..bridge.calling.calls import is_sharded
from ..errors import InstallError
from ..receivers.installations import installations
from .outbox import models_by_outbox, with_durable_receivers

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Mapper

    from .outbox import Outbox

T = TypeVar("T")


class Sessions:
    """Makes sessions, and runs functions that use them, on an event loop where they need one.

    :param source: a ``sessionmaker``, an ``async_sessionmaker``, an ``Engine``, an ``AsyncEngine``,
        a ``scoped_session``, or any function that returns a ``Session`` or an ``AsyncSession``.
        ``None``: the ``session_factory`` that was given to :func:`sqla_signals.install`.
    :raises InstallError: ``source`` makes no sessions.
    """

    def __init__(self, source: Any = None) -> None:
        self._factory = _factory(source)
        try:
            made = self._factory()
        except TypeError as error:
            raise InstallError(f"{source!r} makes no sessions: {error}") from error
        sync = plain_session(made)
        if not isinstance(sync, Session):
            raise InstallError(f"{source!r} makes no Session and no AsyncSession, but {made!r}")
        check_not_sharded(sync)
        self.is_async: bool = made is not sync
        """Whether they are ``AsyncSession``s."""

    def make(self) -> tuple[Session, AsyncSession | None]:
        """A new session, and the ``AsyncSession`` in front of it if there is one."""
        made = self._factory()
        sync = plain_session(made)
        return sync, made if self.is_async else None

    def engine_of(self, outbox: Outbox) -> Engine:
        """The engine of the database that an outbox is in: where the rows of its models go.

        Models without a durable receiver count only if none has one.

        :raises InstallError: they go to several databases, or to none that the sessions know.
        """
        models = models_by_outbox().get(outbox, [])
        session, _ = self.make()
        engines = engines_of(session, with_durable_receivers(models) or models)
        if not engines and (bind := _bind(session, clause=update(outbox.table))) is not None:
            engines = {bind.engine}
        if len(engines) == 1:
            return engines.pop()
        where = ", ".join(sorted(engine.url.render_as_string() for engine in engines))
        raise InstallError(
            f"the models of {outbox!r} are on several databases: {where}. Each of these has an "
            f"outbox and needs a relay of its own: Relay(engine, LocalPublisher(sessions))"
            if engines
            else f"these sessions know no database for {outbox!r} and its models"
        )

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn``, which may use the sessions; asynchronous ones on a loop of their own."""
        return _loop().run(fn) if self.is_async else fn()


_LOOP: Final = "sqla_signals.loop"
"""Kept with a pooled connection: the event loop that it belongs to."""


def keep_to_one_loop(engine: Engine) -> None:
    """Refuse connections on another event loop than the one that opened them: they would hang.

    :raises InstallError: some are open already, and so belong to another loop than ours.
    """
    pool = engine.pool
    if not engine.dialect.is_async or engine.dialect.driver == "aiosqlite":
        return
    if not event.contains(pool, "checkout", _checked_out):
        if isinstance(pool, QueuePool) and pool.checkedin() + pool.checkedout() > 0:
            raise InstallError(_ELSEWHERE.format(engine=engine))
        event.listen(pool, "connect", _connected)
        event.listen(pool, "checkout", _checked_out)


def _connected(_: Any, record: Any) -> None:
    record.info[_LOOP] = weakref.ref(asyncio.get_running_loop())


def _checked_out(_: Any, record: Any, fairy: Any) -> None:
    loop = record.info.get(_LOOP)
    if loop is not None and loop() is not asyncio.get_running_loop():
        raise InstallError(_ELSEWHERE.format(engine="its engine"))


_ELSEWHERE: Final = (
    "a relay with asynchronous sessions works on an event loop of its own, and a connection of "
    "{engine!s} belongs to the loop that has opened it. Give the relay an engine of its own: "
    "Relay(async_sessionmaker(create_async_engine(url))); or one with poolclass=NullPool"
)


def check_not_sharded(session: Session) -> None:
    """Refuse a ``ShardedSession``.

    :raises InstallError: it is one.
    """
    if is_sharded(session):
        raise InstallError(
            f"durable delivery does not work with {type(session).__name__}: it would have to take "
            f"the word of a message for the shard that a receiver works in. Use on='commit' there, "
            f"or sessions on one shard each: a sessionmaker and a Relay for every engine"
        )


def engines_of(session: Session, mappers: Iterable[Mapper[Any]]) -> set[Engine]:
    """The engines of the databases that the rows of these models are written to."""
    binds = [_bind(session, mapper=mapper, clause=_write(mapper)) for mapper in mappers]
    return {bind.engine for bind in binds if bind is not None}


def bind_for_writing(session: Session, mapper: Mapper[Any]) -> Engine | Connection:
    """The bind to which a session writes the rows of a model; it may read them from another."""
    return session.get_bind(mapper=mapper, clause=_write(mapper))


def _write(mapper: Mapper[Any]) -> Update:
    # Sessions that read from somewhere else tell by the statement.
    return update(mapper.local_table)  # type: ignore[arg-type]


def _bind(session: Session, **arguments: Any) -> Engine | Connection | None:
    try:
        return session.get_bind(**arguments)
    except UnboundExecutionError:
        return None


def _factory(source: Any) -> Callable[[], Any]:
    if source is None:
        factories = {one.session_factory for one in installations if one.session_factory}
        if len(factories) == 1:
            found: Callable[[], Any] = factories.pop()
            return found
        raise InstallError(
            "where should a relay or a worker get its sessions from? Give it a sessionmaker, an "
            "async_sessionmaker or an engine, or call sqla_signals.install(session_factory=...) "
            "before, once"
        )
    source = maker_behind(source)
    if isinstance(source, Engine):
        return sessionmaker(source, expire_on_commit=False)
    extension: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    if extension is not None and isinstance(source, extension.AsyncEngine):
        maker: Callable[[], Any] = extension.async_sessionmaker(source, expire_on_commit=False)
        return maker
    if not callable(source):
        raise InstallError(
            f"{source!r} makes no sessions. Give a sessionmaker, an async_sessionmaker, an "
            f"engine, or a function that returns a session"
        )
    made: Callable[[], Any] = source
    return made


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sqla_signals", daemon=True
        )
        self._thread.start()

    def run(self, fn: Callable[[], T]) -> T:
        if threading.current_thread() is self._thread:  # called by what we run
            return fn()
        future = asyncio.run_coroutine_threadsafe(_call(fn), self._loop)
        try:
            result, error = future.result()
        except BaseException:
            future.cancel()
            raise
        if error is not None:
            raise error
        return cast("T", result)


async def _call(fn: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Call ``fn``; return what would end the loop and not reach anybody, such as SystemExit."""
    try:
        return await greenlet_spawn(fn), None
    except (SystemExit, KeyboardInterrupt) as error:
        return None, error


_running: _Loop | None = None
_lock = threading.Lock()


def _loop() -> _Loop:
    """The one loop of this process: the connections of a pool belong to the loop that made them."""
    global _running
    with _lock:
        if _running is None or _running.pid != os.getpid():  # forked: the thread stayed behind
            _running = _Loop()
        return _running

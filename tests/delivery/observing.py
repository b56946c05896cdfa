"""What was delivered, and how transactions are made whose end delivers it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    AsyncAdaptedQueuePool,
    Connection,
    Engine,
    event,
    inspect,
    make_url,
)
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from sqla_signals import post_delete, post_save

Work = Callable[[Session], Any]


@dataclass(frozen=True)
class Delivered:
    """One call of an ``on="commit"`` or ``on="rollback"`` receiver. Keeps nothing alive."""

    line: str
    sender: type
    key: tuple[Any, ...]
    changes: dict[str, Any]
    update_fields: frozenset[str] | None
    raw: bool | None


class Deliveries:
    """Receivers that write down every call, for both ends that a transaction can have."""

    def __init__(self) -> None:
        self.calls: list[Delivered] = []

    def committed(self, sender: type, **arguments: Any) -> None:
        """Connected with ``on="commit"``."""
        self._note("commit", sender, arguments)

    def rolled_back(self, sender: type, **arguments: Any) -> None:
        """Connected with ``on="rollback"``."""
        self._note("rollback", sender, arguments)

    def _note(self, end: str, sender: type, arguments: dict[str, Any]) -> None:
        state = inspect(arguments["instance"])
        kind = "deleted"
        if "created" in arguments:
            kind = "created" if arguments["created"] else "updated"
        # Without loading anything: that would be SQL that no user wrote.
        name = state.dict.get("name", "?")
        self.calls.append(
            Delivered(
                f"{end} {kind} {sender.__name__}({name})",
                sender,
                state.identity,
                dict(arguments.get("changes", ())),
                arguments.get("update_fields"),
                arguments.get("raw"),
            )
        )

    @property
    def lines(self) -> list[str]:
        """What was delivered, in order, such as ``commit created Author(a)``."""
        return [call.line for call in self.calls]

    @property
    def only(self) -> Delivered:
        """The only call."""
        assert len(self.calls) == 1, self.lines
        return self.calls[0]

    def clear(self) -> None:
        """Forget what was delivered so far."""
        self.calls.clear()


def deliveries(ends: Iterable[str] = ("commit", "rollback"), **options: Any) -> Deliveries:
    """Connect to both signals that are delivered after a transaction, for these ends of it."""
    log = Deliveries()
    for signal in (post_save, post_delete):
        for end in ends:
            receiver = log.committed if end == "commit" else log.rolled_back
            signal.connect(receiver, weak=False, on=end, **options)
    return log


# -- transactions ----------------------------------------------------------------------------------


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let pytest run an ``async def`` test, in an event loop of its own.

    The pools of its ``AsyncEngine`` arguments must have all their connections back at the end, and
    no task may have been left behind.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def whole_test() -> None:
            engines = [value for value in kwargs.values() if isinstance(value, AsyncEngine)]
            try:
                await test(*args, **kwargs)
                assert [engine.pool.checkedout() for engine in engines] == [0] * len(engines)
                assert [task for task in asyncio.all_tasks() if _is_ours(task)] == []
            finally:
                for engine in engines:
                    await engine.dispose()

        asyncio.run(whole_test())

    return run


def _is_ours(task: asyncio.Task[Any]) -> bool:
    """Not the test's own, nor one in which a driver closes a connection that was given up."""
    code = getattr(task.get_coro(), "cr_code", None)
    driver = code is not None and "dialects" in Path(code.co_filename).parts
    return task is not asyncio.current_task() and not driver


def create_async_twin(url: URL | str, driver: str) -> AsyncEngine:
    """An ``AsyncEngine`` on a database, with a pool that counts and savepoints that work."""
    async_url = make_url(url).set(drivername=driver)
    engine = create_async_engine(async_url, poolclass=AsyncAdaptedQueuePool)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _leave_transactions_to_sqlalchemy)
        event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _leave_transactions_to_sqlalchemy(dbapi_connection: Any, connection_record: Any) -> None:
    dbapi_connection.isolation_level = None
    dbapi_connection.execute("PRAGMA foreign_keys = ON")
    dbapi_connection.execute("PRAGMA synchronous = OFF")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Transaction:
    """A way to make a transaction out of a function that takes a ``Session``.

    ``transaction(work)`` calls the function and ends the transaction as its name says. ``after`` is
    called right after the call or block that ends it, while the session is still there.
    """

    engine: Engine
    """Not the one that the work is done on where that is asynchronous: another connection."""
    driver: str
    how: Callable[..., Any]

    def __call__(self, work: Work, after: Callable[[], Any] = _nothing) -> Any:
        """Do the work in a transaction, in a session of its own."""
        if not iscoroutinefunction(self.how):
            result = self.how(self.engine, work, after)
            assert self.engine.pool.checkedout() == 0
            return result

        async def with_engine() -> Any:
            engine = create_async_twin(self.engine.url, self.driver)
            try:
                result = await self.how(engine, work, after)
                assert engine.pool.checkedout() == 0
            finally:
                await engine.dispose()
            return result

        return asyncio.run(with_engine())

    def __str__(self) -> str:
        return f"{self.driver}-{self.how.__name__}"


DATABASES = {
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
    "postgresql": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "postgresql+psycopg": "postgresql",
}
"""Driver to database; those with a plus are used asynchronously."""


# -- that commit


def commit(engine: Engine, work: Work, after: Callable[[], Any]) -> Any:
    """``Session.commit()``."""
    with Session(engine) as session:
        result = work(session)
        try:
            session.commit()
        except Exception:
            session.rollback()  # where COMMIT fails on SQLite, close() alone leaves it open
            raise
        after()
        return result


def begin(engine: Engine, work: Work, after: Callable[[], Any]) -> Any:
    """The end of ``with Session.begin()``."""
    with Session(engine) as session:
        with session.begin():
            result = work(session)
        after()
        return result


def sessionmaker_begin(engine: Engine, work: Work, after: Callable[[], Any]) -> Any:
    """The end of ``with sessionmaker.begin()``."""
    with sessionmaker(engine).begin() as session:
        result = work(session)
    after()
    return result


async def async_commit(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> Any:
    """``AsyncSession.commit()``."""
    async with AsyncSession(engine) as session:
        result = await session.run_sync(work)
        await session.commit()
        after()
        return result


async def async_begin(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> Any:
    """The end of ``async with AsyncSession.begin()``."""
    async with AsyncSession(engine) as session:
        async with session.begin():
            result = await session.run_sync(work)
        after()
        return result


async def async_sessionmaker_begin(
    engine: AsyncEngine, work: Work, after: Callable[[], Any]
) -> Any:
    """The end of ``async with async_sessionmaker.begin()``."""
    async with async_sessionmaker(engine).begin() as session:
        result = await session.run_sync(work)
    after()
    return result


COMMITTING = (
    ("sqlite", commit),
    ("sqlite", begin),
    ("sqlite", sessionmaker_begin),
    ("postgresql", commit),
    ("postgresql", begin),
    ("sqlite+aiosqlite", async_commit),
    ("sqlite+aiosqlite", async_begin),
    ("sqlite+aiosqlite", async_sessionmaker_begin),
    ("postgresql+asyncpg", async_commit),
    ("postgresql+asyncpg", async_begin),
    ("postgresql+asyncpg", async_sessionmaker_begin),
    ("postgresql+psycopg", async_commit),
    ("postgresql+psycopg", async_begin),
)


# -- that do not


class Unwanted(Exception):
    """Raised where a test wants a transaction to be left by an exception."""


def rollback(engine: Engine, work: Work, after: Callable[[], Any]) -> None:
    """``Session.rollback()``."""
    with Session(engine) as session:
        work(session)
        session.rollback()
        after()


def close(engine: Engine, work: Work, after: Callable[[], Any]) -> None:
    """``Session.close()`` of an autobegun session."""
    session = Session(engine)
    work(session)
    session.close()
    after()


def reset(engine: Engine, work: Work, after: Callable[[], Any]) -> None:
    """``Session.reset()`` of an autobegun session."""
    with Session(engine) as session:
        work(session)
        session.reset()
        after()


def invalidate(engine: Engine, work: Work, after: Callable[[], Any]) -> None:
    """``Session.invalidate()`` of an autobegun session."""
    with Session(engine) as session:
        work(session)
        session.invalidate()
        after()


def leave_begin(engine: Engine, work: Work, after: Callable[[], Any]) -> None:
    """An exception that leaves ``with Session.begin()``."""
    with Session(engine) as session:
        try:
            with session.begin():
                work(session)
                raise Unwanted
        except Unwanted:
            after()


def leave_sessionmaker_begin(engine: Engine, work: Work, after: Callable[[], Any]) -> None:
    """An exception that leaves ``with sessionmaker.begin()``."""
    try:
        with sessionmaker(engine).begin() as session:
            work(session)
            raise Unwanted
    except Unwanted:
        after()


async def async_rollback(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> None:
    """``AsyncSession.rollback()``."""
    async with AsyncSession(engine) as session:
        await session.run_sync(work)
        await session.rollback()
        after()


async def async_close(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> None:
    """``AsyncSession.close()`` of an autobegun session, at the end of its block."""
    async with AsyncSession(engine) as session:
        await session.run_sync(work)
    after()


async def async_reset(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> None:
    """``AsyncSession.reset()`` of an autobegun session."""
    async with AsyncSession(engine) as session:
        await session.run_sync(work)
        await session.reset()
        after()


async def async_invalidate(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> None:
    """``AsyncSession.invalidate()`` of an autobegun session."""
    async with AsyncSession(engine) as session:
        await session.run_sync(work)
        await session.invalidate()
        after()


async def leave_async_begin(engine: AsyncEngine, work: Work, after: Callable[[], Any]) -> None:
    """An exception that leaves ``async with AsyncSession.begin()``."""
    async with AsyncSession(engine) as session:
        try:
            async with session.begin():
                await session.run_sync(work)
                raise Unwanted
        except Unwanted:
            after()


def session_methods(*names: str) -> list[Callable[[Session], None]]:
    """Those that ``Session`` has; ``reset`` came with SQLAlchemy 2.0.22."""
    return [getattr(Session, name) for name in names if hasattr(Session, name)]


RESETTING = (
    (("sqlite", reset), ("sqlite+aiosqlite", async_reset)) if session_methods("reset") else ()
)
UNDOING = (
    ("sqlite", rollback),
    ("sqlite", close),
    ("sqlite", invalidate),
    ("sqlite", leave_begin),
    ("sqlite", leave_sessionmaker_begin),
    ("postgresql", rollback),
    ("postgresql", close),
    ("postgresql", invalidate),
    ("sqlite+aiosqlite", async_rollback),
    ("sqlite+aiosqlite", async_close),
    *RESETTING,
    ("sqlite+aiosqlite", async_invalidate),
    ("sqlite+aiosqlite", leave_async_begin),
    ("postgresql+asyncpg", async_rollback),
    ("postgresql+asyncpg", async_close),
    ("postgresql+asyncpg", async_invalidate),
    ("postgresql+psycopg", async_rollback),
    ("postgresql+psycopg", async_close),
    ("postgresql+psycopg", async_invalidate),
    ("postgresql+psycopg", leave_async_begin),
)

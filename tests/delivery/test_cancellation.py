"""Cancellation leaves no half-delivered state behind.

A task is stopped at a known place, cancelled there, and then the next transaction on the same
engine must deliver exactly its own events.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.util import await_only

from sqla_signals import on_commit, post_save, receiver

from ..conftest import before_sqlalchemy
from ..contract.models import Author, Tag
from ..contract.observing import rows
from .observing import Deliveries, asynchronous

loses_connections = pytest.mark.skipif(
    before_sqlalchemy("2.0.55"),
    reason="SQLAlchemy loses a connection whose clean-up is cancelled, with or without signals",
)
CANCELLED_BY = (
    "task.cancel",
    "asyncio.timeout",
    pytest.param("anyio.CancelScope", marks=loses_connections),
)
PLACES = (
    "flush",
    "commit",
    "delivery",
    "delivery, sync receiver",
    "delivery, own commit",
    "callback",
    "rollback receiver",
)

cancelled_by = pytest.mark.parametrize("by", CANCELLED_BY)


class Gate:
    """A place at which the first task to come stops, until it is cancelled."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def stop(self) -> None:
        """Wait here, the first time."""
        if not self.reached.is_set():
            self.reached.set()
            await self.opened.wait()

    def stop_statement(self, engine: AsyncEngine, beginning: str) -> None:
        """Wait before the first statement that begins like this."""

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def before_execute(connection, cursor, statement, parameters, context, many) -> None:
            if statement.startswith(beginning):
                await_only(self.stop())

    def stop_commit(self, engine: AsyncEngine, number: int) -> None:
        """Wait in the middle of a COMMIT, the first or a later one."""
        dialect, commits = engine.sync_engine.dialect, []
        do_commit = dialect.do_commit

        def wait_and_commit(connection: Any) -> None:
            commits.append(connection)
            if len(commits) == number:
                await_only(self.stop())
            do_commit(connection)

        # There is an event before a COMMIT, but what fails there fails outside of it.
        dialect.do_commit = wait_and_commit


async def cancel(work: Callable[[], Awaitable[None]], gate: Gate, by: str) -> None:
    """Cancel the work once it has come to the gate, and wait until it is over."""
    scopes: list[Any] = []

    async def in_scope() -> None:
        if by == "task.cancel":
            await work()
        elif by == "asyncio.timeout":
            async with asyncio.timeout(None) as scope:
                scopes.append(scope)
                await work()
        else:
            anyio = pytest.importorskip("anyio")
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await work()
            assert scope.cancelled_caught

    task = asyncio.create_task(in_scope())
    done, _ = await asyncio.wait(
        [task, reached := asyncio.create_task(gate.reached.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    if task in done:
        reached.cancel()
        task.result()
        raise AssertionError("the work was over before it came to the gate")
    if by == "task.cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif by == "asyncio.timeout":
        scopes[0].reschedule(0)
        with pytest.raises(TimeoutError):
            await task
    else:
        scopes[0].cancel()
        await task


async def add_author(engine: AsyncEngine, name: str) -> None:
    async with AsyncSession(engine) as session:
        session.add(Author(name=name))
        await session.commit()


@pytest.mark.parametrize("place", PLACES)
@cancelled_by
@asynchronous
async def test_after_a_cancellation_the_next_transaction_delivers_exactly_its_own_events(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries, by: str, place: str
):
    """Wherever it hit; the pool is clean, and what was committed is committed."""
    gate, called = Gate(), []
    committed = place in ("delivery", "delivery, sync receiver", "delivery, own commit", "callback")
    if place == "flush":
        gate.stop_statement(async_engine, "INSERT INTO authors")
    elif place == "commit":
        gate.stop_commit(async_engine, 1)
    elif place == "delivery":

        @receiver(post_save, sender=Author, on="commit")
        async def stops(sender, session, **kwargs):
            session.add(Tag(name="lost"))
            await session.flush()
            await gate.stop()
            await session.rollback()

    elif place in ("delivery, sync receiver", "delivery, own commit"):
        if place == "delivery, own commit":
            gate.stop_commit(async_engine, 2)
        else:
            gate.stop_statement(async_engine, "INSERT INTO tags")

        @receiver(post_save, sender=Author, on="commit")
        def writes(sender, instance, session, **kwargs):
            if instance.name == "first":
                session.add(Tag(name="lost"))
                session.flush()

    elif place == "rollback receiver":

        @receiver(post_save, sender=Author, on="rollback")
        async def stops_too(sender, **kwargs):
            await gate.stop()

    @receiver(post_save, sender=Author, on="commit")
    def later(sender, instance, **kwargs):
        called.append(instance.name)

    async def work() -> None:
        async with AsyncSession(async_engine) as session:
            if place == "callback":
                on_commit(session, gate.stop)
                on_commit(session, lambda: called.append("callback after"))
            session.add(Author(name="first"))
            await session.flush()
            if place == "rollback receiver":
                await session.rollback()
            await session.commit()

    await cancel(work, gate, by)
    assert async_engine.pool.checkedout() == 0
    assert rows(witness, Author.name) == (["first"] if committed else [])
    assert rows(witness, Tag.name) == []
    assert called == (["first"] if place == "callback" else [])
    authors = [line for line in log.lines if "Author" in line]
    assert authors == {"flush": [], "commit": ["rollback created Author(first)"]}.get(
        place,
        ["commit created Author(first)"] if committed else ["rollback created Author(first)"],
    )
    log.clear()
    called.clear()

    await add_author(async_engine, "next")
    assert [line for line in log.lines if line.startswith("commit")] == [
        "commit created Author(next)"
    ]
    assert not any("first" in line for line in log.lines)
    assert called == ["next"]
    assert async_engine.pool.checkedout() == 0
    assert rows(witness, Author.name) == (["first", "next"] if committed else ["next"])


@loses_connections
# Cancelled while SQLAlchemy resets a connection of aiosqlite, that is dropped and not closed, with
# or without signals; Python 3.13 warns of it.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@asynchronous
async def test_a_cancellation_at_any_step_of_the_event_loop_leaves_nothing_behind(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """One step later each time, until the work is done before it is cancelled.

    Of a COMMIT that was under way, the session does not know whether the database has done it.
    """
    dialect, commits = async_engine.sync_engine.dialect, []
    do_commit = dialect.do_commit

    def commit_and_note(connection: Any) -> None:
        commits.append("begun")
        do_commit(connection)
        commits[-1] = "done"

    dialect.do_commit = commit_and_note

    @receiver(post_save, sender=Author, on="commit")
    async def tags(sender, instance, session, **kwargs):
        await asyncio.sleep(0)
        session.add(Tag(name=instance.name))

    async def work(name: str) -> None:
        async with AsyncSession(async_engine) as session:
            session.add(Author(name=name))
            await session.flush()
            async with session.begin_nested():
                session.add(Author(name=f"{name}, inner"))
            await session.commit()

    was_cancelled, step, expected = True, 0, []
    ends = set()
    while was_cancelled:
        step += 1
        commits.clear()
        name = f"{step}"
        task = asyncio.create_task(work(name))
        for _ in range(step):
            await asyncio.sleep(0)
        was_cancelled = task.cancel()
        await asyncio.wait([task])
        was_cancelled = was_cancelled and task.cancelled()
        assert async_engine.pool.checkedout() == 0
        # The end of a transaction is told, that of one which was committed as far as it got.
        is_committed = name in rows(witness, Author.name)
        told = [line for line in log.lines if "Author" in line]
        outer, inner = f"created Author({name})", f"created Author({name}, inner)"
        if is_committed:
            expected += [name, f"{name}, inner"]
        if is_committed and commits != ["begun"]:
            assert told == [f"commit {outer}", f"commit {inner}"][: len(told)]
        else:
            undone = {f"rollback {outer}", f"rollback {inner}"}
            assert set(told) in (set(), {f"rollback {outer}"}, undone)
            assert len(told) == len(set(told))
        ends.add((is_committed, len(told)))
        log.clear()
        await work(name := f"after {step}")
        expected += [name, f"{name}, inner"]
        assert [line for line in log.lines if "Author" in line] == [
            f"commit created Author({name})",
            f"commit created Author({name}, inner)",
        ]
        assert not any(f"({step})" in line for line in log.lines)
        log.clear()
        assert async_engine.pool.checkedout() == 0
    assert sorted(rows(witness, Author.name)) == sorted(expected)
    assert {(False, 0), (True, 2)} <= ends
    gc.collect()  # as long as that is not an error


@cancelled_by
@asynchronous
async def test_what_waits_behind_a_cancelled_receiver_is_dropped_as_a_whole(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries, by: str
):
    """What other receivers had committed before stays, and is not told later to somebody else."""
    gate = Gate()

    @receiver(post_save, sender=Author, on="commit")
    async def tags(sender, instance, session, **kwargs):
        session.add(Tag(name=f"for {instance.name}"))

    @receiver(post_save, sender=Author, on="commit")
    async def stops(sender, **kwargs):
        await gate.stop()

    await cancel(lambda: add_author(async_engine, "first"), gate, by)
    assert log.lines == ["commit created Author(first)"]
    assert rows(witness, Tag.name) == ["for first"]
    log.clear()
    await add_author(async_engine, "next")
    assert log.lines == ["commit created Author(next)", "commit created Tag(for next)"]
    assert rows(witness, Tag.name) == ["for first", "for next"]


@cancelled_by
@asynchronous
async def test_a_cancellation_inside_a_savepoint_undoes_everything(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries, by: str
):
    """The session is closed on the way out."""
    gate = Gate()

    async def work() -> None:
        async with AsyncSession(async_engine) as session:
            session.add(Author(name="outer"))
            await session.flush()
            async with session.begin_nested():
                session.add(Author(name="inner"))
                await session.flush()
                await gate.stop()

    await cancel(work, gate, by)
    assert sorted(log.lines) == ["rollback created Author(inner)", "rollback created Author(outer)"]
    assert async_engine.pool.checkedout() == 0
    log.clear()
    await add_author(async_engine, "next")
    assert log.lines == ["commit created Author(next)"]
    assert rows(witness, Author.name) == ["next"]


@asynchronous
async def test_another_task_is_not_disturbed_by_a_cancellation(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """It delivers its own, in the middle of which the first one is cancelled."""
    first, second = Gate(), Gate()
    ended = []

    @receiver(post_save, sender=Author, on="commit")
    async def stops(sender, instance, **kwargs):
        await (first if instance.name == "first" else second).stop()
        ended.append(instance.name)

    other = asyncio.create_task(add_author(async_engine, "second"))
    await second.reached.wait()
    await cancel(lambda: add_author(async_engine, "first"), first, "task.cancel")
    second.opened.set()
    await other
    assert ended == ["second"]
    assert sorted(log.lines) == ["commit created Author(first)", "commit created Author(second)"]
    assert rows(witness, Author.name) == ["first", "second"]


@asynchronous
async def test_a_receiver_may_be_given_a_timeout_of_its_own(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries, caplog: pytest.LogCaptureFixture
):
    """``TimeoutError`` is an exception like any other: logged, and the others run."""
    gate = Gate()

    @receiver(post_save, sender=Author, on="commit")
    async def fails(sender, session, **kwargs):
        session.add(Tag(name="lost"))
        await session.flush()
        async with asyncio.timeout(0):
            await gate.stop()

    @receiver(post_save, sender=Author, on="commit")
    async def works(sender, session, **kwargs):
        session.add(Tag(name="kept"))

    await add_author(async_engine, "a")
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert isinstance(record.exc_info[1], TimeoutError)
    assert [line for line in log.lines if line.startswith("commit")] == [
        "commit created Author(a)",
        "commit created Tag(kept)",
    ]
    assert rows(witness, Tag.name) == ["kept"]


@pytest.mark.skipif(
    before_sqlalchemy("2.0.55"), reason="SQLAlchemy does not wait for that task in the end"
)
@asynchronous
async def test_the_end_of_a_sessionmakers_block_completes_its_delivery_when_cancelled(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """SQLAlchemy runs that end in a task of its own and sees it through."""
    gate = Gate()

    @receiver(post_save, sender=Author, on="commit")
    async def stops(sender, instance, session, **kwargs):
        session.add(Tag(name=f"for {instance.name}"))
        await gate.stop()

    async def work() -> None:
        async with async_sessionmaker(async_engine).begin() as session:
            session.add(Author(name="first"))

    task = asyncio.create_task(work())
    await gate.reached.wait()
    task.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log.lines == ["commit created Author(first)", "commit created Tag(for first)"]
    log.clear()
    await add_author(async_engine, "next")
    assert log.lines == ["commit created Author(next)", "commit created Tag(for next)"]
    assert rows(witness, Tag.name) == ["for first", "for next"]


@pytest.mark.parametrize("place", ["flush", "delivery"])
@cancelled_by
@asynchronous
async def test_a_statement_that_the_server_is_busy_with_is_given_up(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries, by: str, place: str
):
    """It waits for a lock that another connection holds; that is where the cancellation hits."""
    if witness.dialect.name == "sqlite":
        pytest.skip("SQLite has no server to be busy")
    table = "authors" if place == "flush" else "tags"

    @receiver(post_save, sender=Author, on="commit")
    async def writes(sender, instance, session, **kwargs):
        session.add(Tag(name=f"for {instance.name}"))

    class Busy(Gate):
        """Reached when the server says that somebody waits for a lock on that table."""

        async def watch(self) -> None:
            with witness.connect() as observer:
                while not observer.scalar(waiting):
                    observer.rollback()
                    await asyncio.sleep(0)
            self.reached.set()

    waiting = text(
        f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{table}'::regclass"
    )
    gate = Busy()
    with witness.connect() as blocking:
        blocking.execute(text(f"LOCK TABLE {table} IN EXCLUSIVE MODE"))
        watching = asyncio.create_task(gate.watch())
        await cancel(lambda: add_author(async_engine, "first"), gate, by)
        await watching
    assert async_engine.pool.checkedout() == 0
    first = ["first"] if place == "delivery" else []
    assert rows(witness, Author.name) == first
    assert rows(witness, Tag.name) == []
    log.clear()
    await add_author(async_engine, "next")
    assert log.lines == ["commit created Author(next)", "commit created Tag(for next)"]
    assert rows(witness, Author.name) == [*first, "next"]

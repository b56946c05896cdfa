"""What commit receivers commit themselves is queued behind, not nested."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_signals import SignalRecursionError, on_commit, post_save, receiver
from sqla_signals.bridge.delivery.delivery import MAX_DEPTH

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .observing import Deliveries, Transaction, asynchronous, deliveries


def recursion_errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [
        record
        for record in caplog.records
        if record.name == "sqla_signals"
        and record.exc_info
        and isinstance(record.exc_info[1], SignalRecursionError)
    ]


# -- each sentence, in every kind of transaction ---------------------------------------------------


def test_what_a_commit_receiver_changes_triggers_the_next_commits_receivers(
    committing: Transaction,
):
    """Queued behind what is being delivered, before ``commit()`` returns."""
    order: list[str] = []

    @receiver(post_save, sender=Author, on="commit")
    def tag(sender, instance, session, **kwargs):
        order.append(f"tag {instance.name} begins")
        session.add(Tag(name=f"for {instance.name}"))
        session.commit()
        order.append(f"tag {instance.name} ends")

    @receiver(post_save, sender=Tag, on="commit")
    def tagged(sender, instance, **kwargs):
        order.append(f"tagged {instance.name}")

    @receiver(post_save, sender=Author, on="commit")
    def last(sender, instance, **kwargs):
        order.append(f"last {instance.name}")

    def work(session: Session) -> None:
        session.add_all([Author(name="a"), Author(name="b")])
        on_commit(session, lambda: order.append("callback"))

    committing(work, after=lambda: order.append("returned"))
    assert order == [
        "tag a begins",
        "tag a ends",
        "last a",
        "tag b begins",
        "tag b ends",
        "last b",
        "callback",
        "tagged for a",
        "tagged for b",
        "returned",
    ]
    assert rows(committing.engine, Tag.name) == ["for a", "for b"]


def test_a_pair_that_never_ends_is_logged_with_the_cycle(
    committing: Transaction, caplog: pytest.LogCaptureFixture
):
    """As ``SignalRecursionError``; nothing that was committed is lost, and ``commit()`` returns."""
    calls = []

    @receiver(post_save, sender=Author, on="commit", name="ping")
    def ping(sender, session, **kwargs):
        calls.append("ping")
        session.add(Tag(name="t"))

    @receiver(post_save, sender=Tag, on="commit", name="pong")
    def pong(sender, session, **kwargs):
        calls.append("pong")
        session.add(Author(name="a"))

    committing(lambda session: session.add(Author(name="a")))
    (record,) = recursion_errors(caplog)
    assert record.levelno == logging.ERROR
    message = str(record.exc_info[1])
    assert "ping" in message
    assert "pong" in message
    assert message.index("→") < message.rindex("→")
    assert "test_recursion.py:" in message
    assert calls[:4] == ["ping", "pong", "ping", "pong"]
    assert MAX_DEPTH <= len(calls) <= MAX_DEPTH + 1
    written = len(rows(committing.engine, Author.id)) + len(rows(committing.engine, Tag.id))
    assert written == len(calls) + 1


def test_after_a_recursion_the_next_transaction_is_as_any(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """Nothing of it waits."""

    @receiver(post_save, sender=Author, on="commit")
    def forever(sender, session, **kwargs):
        session.add(Author(name="again"))

    session.add(Author(name="a"))
    session.commit()
    assert len(recursion_errors(caplog)) == 1
    post_save.disconnect(forever)
    log = deliveries()
    session.add(Tag(name="t"))
    session.commit()
    assert log.lines == ["commit created Tag(t)"]
    assert len(recursion_errors(caplog)) == 1
    assert rows(session.get_bind(), Tag.name) == ["t"]


def test_the_limit_counts_what_follows_from_one_another_and_not_what_stands_side_by_side(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """Any number of rows may each cause another one."""

    @receiver(post_save, sender=Author, on="commit")
    def tag(sender, instance, session, **kwargs):
        session.add(Tag(name=instance.name))

    log = deliveries(ends=["commit"], sender=Tag)
    session.add_all([Author(name="a") for _ in range(MAX_DEPTH + 20)])
    session.commit()
    assert len(log.lines) == MAX_DEPTH + 20
    assert recursion_errors(caplog) == []
    assert len(rows(session.get_bind(), Tag.id)) == MAX_DEPTH + 20


def test_a_chain_that_ends_within_the_limit_is_delivered_as_a_whole(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """The limit is for what never ends."""

    @receiver(post_save, sender=Author, on="commit")
    def count_up(sender, instance, session, **kwargs):
        if instance.age < MAX_DEPTH - 1:
            instance.age += 1

    session.add(Author(name="a", age=0))
    session.commit()
    assert rows(session.get_bind(), Author.age) == [MAX_DEPTH - 1]
    assert recursion_errors(caplog) == []


def test_a_callback_that_never_ends_is_in_the_cycle_too(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """It commits as receivers do."""
    engine = session.get_bind()

    def again() -> None:
        with Session(engine) as own:
            own.add(Author(name="a"))
            on_commit(own, again)
            own.commit()

    on_commit(session, again)
    session.add(Author(name="a"))
    session.commit()
    (record,) = recursion_errors(caplog)
    assert "again" in str(record.exc_info[1])
    assert len(rows(engine, Author.id)) >= MAX_DEPTH


def test_what_a_receiver_commits_in_another_session_is_queued_behind_too(
    session: Session, library: Engine
):
    """Whoever's session it is."""
    order = []

    @receiver(post_save, sender=Author, on="commit")
    def opens(sender, **kwargs):
        with sessionmaker(library).begin() as other:
            other.add(Tag(name="t"))
        order.append("opens ends")

    @receiver(post_save, sender=Tag, on="commit")
    def tagged(sender, **kwargs):
        order.append("tagged")

    session.add(Author(name="a"))
    session.commit()
    assert order == ["opens ends", "tagged"]
    assert rows(library, Tag.name) == ["t"]


def test_what_a_rollback_receiver_commits_is_delivered(session: Session, library: Engine):
    """It is a transaction like any other."""
    log = deliveries(ends=["commit"])

    @receiver(post_save, sender=Author, on="rollback")
    def fn(sender, **kwargs):
        with sessionmaker(library).begin() as other:
            other.add(Tag(name="t"))
        assert log.lines == ["commit created Tag(t)"]

    session.add(Author(name="a"))
    session.flush()
    session.rollback()
    assert log.lines == ["commit created Tag(t)"]
    assert rows(library, Tag.name) == ["t"]


# -- threads and tasks -----------------------------------------------------------------------------


def test_a_thread_that_a_receiver_started_gets_its_own_delivery(session: Session, library: Engine):
    """While the receiver waits for it: its commit delivers before it returns, in that thread."""
    order = []

    def work() -> None:
        with sessionmaker(library).begin() as other:
            other.add(Tag(name="t"))
        order.append("thread committed")

    @receiver(post_save, sender=Author, on="commit")
    def starts(sender, **kwargs):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        order.append("receiver ends")

    @receiver(post_save, sender=Tag, on="commit")
    def tagged(sender, **kwargs):
        order.append(("tagged", threading.current_thread() is threading.main_thread()))

    session.add(Author(name="a"))
    session.commit()
    assert order == [("tagged", False), "thread committed", "receiver ends"]
    assert rows(library, Tag.name) == ["t"]


def test_a_thread_that_outlives_the_delivery_gets_its_own(session: Session, library: Engine):
    """Nothing of the delivery that it was started in sticks to it."""
    go, order, threads = threading.Event(), [], []

    def work() -> None:
        assert go.wait(30)
        with sessionmaker(library).begin() as other:
            other.add(Tag(name="t"))
        order.append("thread committed")

    @receiver(post_save, sender=Author, on="commit")
    def starts(sender, **kwargs):
        threads.append(threading.Thread(target=work))
        threads[0].start()

    @receiver(post_save, sender=Tag, on="commit")
    def tagged(sender, **kwargs):
        order.append("tagged")

    session.add(Author(name="a"))
    session.commit()
    assert order == []
    go.set()
    threads[0].join()
    assert order == ["tagged", "thread committed"]
    assert rows(library, Tag.name) == ["t"]


def test_two_threads_deliver_at_the_same_time(library: Engine, installed):
    """Neither waits for the other, and neither calls the other's receivers."""
    inside = threading.Barrier(2, timeout=30)
    seen = []

    @receiver(post_save, sender=Author, on="commit")
    def meets(sender, instance, **kwargs):
        inside.wait()
        seen.append((instance.name, threading.current_thread().name))

    def work(name: str) -> None:
        with Session(library) as session:
            session.add(Author(name=name))
            session.flush()
            if library.dialect.name == "postgresql":
                inside.wait()
            session.commit()

    if library.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time, and each commits before it delivers")
    threads = [threading.Thread(target=work, args=[name], name=name) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [("one", "one"), ("two", "two")]
    assert rows(library, Author.name) == ["one", "two"]


@pytest.mark.parametrize("how", ["commit", "begin", "sessionmaker.begin", "own session"])
@asynchronous
async def test_what_an_async_receiver_commits_is_queued_behind(
    async_engine: AsyncEngine, witness: Engine, how: str
):
    """However it commits: SQLAlchemy may end a block in a task of its own."""
    order = []

    @receiver(post_save, sender=Author, on="commit")
    async def tag(sender, session, **kwargs):
        order.append("tag begins")
        if how == "commit":
            async with AsyncSession(async_engine) as other:
                other.add(Tag(name="t"))
                await other.commit()
        elif how == "begin":
            async with AsyncSession(async_engine) as other, other.begin():
                other.add(Tag(name="t"))
        elif how == "sessionmaker.begin":
            async with async_sessionmaker(async_engine).begin() as other:
                other.add(Tag(name="t"))
        else:
            session.add(Tag(name="t"))
            await session.commit()
        order.append("tag ends")

    @receiver(post_save, sender=Tag, on="commit")
    async def tagged(sender, **kwargs):
        order.append("tagged")

    @receiver(post_save, sender=Author, on="commit")
    async def last(sender, **kwargs):
        order.append("last")

    async with AsyncSession(async_engine) as session:
        session.add(Author(name="a"))
        await session.commit()
        order.append("returned")
    assert order == ["tag begins", "tag ends", "last", "tagged", "returned"]
    assert rows(witness, Tag.name) == ["t"]


@asynchronous
async def test_an_async_receiver_that_never_ends_is_logged_with_the_cycle(
    async_engine: AsyncEngine, witness: Engine, caplog: pytest.LogCaptureFixture
):
    """Also if each commit is at the end of a block that SQLAlchemy ends in a task of its own."""
    calls = []
    maker = async_sessionmaker(async_engine)

    @receiver(post_save, sender=Author, on="commit", name="again")
    async def again(sender, **kwargs):
        calls.append(True)
        assert len(calls) < 3 * MAX_DEPTH
        async with maker.begin() as other:
            other.add(Author(name="a"))

    async with maker.begin() as session:
        session.add(Author(name="a"))
    (record,) = recursion_errors(caplog)
    assert "again" in str(record.exc_info[1])
    assert MAX_DEPTH <= len(calls) <= MAX_DEPTH + 1
    assert len(rows(witness, Author.id)) == len(calls) + 1


@asynchronous
async def test_a_task_that_outlives_the_delivery_gets_its_own(
    async_engine: AsyncEngine, witness: Engine
):
    """Nothing of the delivery that it was started in sticks to it."""
    go, order, tasks = asyncio.Event(), [], []

    async def work() -> None:
        await go.wait()
        async with AsyncSession(async_engine) as other:
            other.add(Tag(name="t"))
            await other.commit()
        order.append("task committed")

    @receiver(post_save, sender=Author, on="commit")
    async def starts(sender, **kwargs):
        tasks.append(asyncio.create_task(work()))

    @receiver(post_save, sender=Tag, on="commit")
    async def tagged(sender, **kwargs):
        order.append("tagged")

    async with AsyncSession(async_engine) as session:
        session.add(Author(name="a"))
        await session.commit()
    assert order == []
    go.set()
    await tasks[0]
    assert order == ["tagged", "task committed"]
    assert rows(witness, Tag.name) == ["t"]


@asynchronous
async def test_a_task_that_commits_while_the_delivery_goes_on_gets_its_own(
    async_engine: AsyncEngine, witness: Engine
):
    """Its commit returns when its receivers were called, not when somebody else's were."""
    committed, order, tasks = asyncio.Event(), [], []

    async def work() -> None:
        async with AsyncSession(async_engine) as other:
            other.add(Tag(name="t"))
            await other.commit()
        order.append("task committed")
        committed.set()

    @receiver(post_save, sender=Author, on="commit")
    async def starts(sender, **kwargs):
        tasks.append(asyncio.create_task(work()))
        await committed.wait()
        order.append("receiver ends")

    @receiver(post_save, sender=Tag, on="commit")
    async def tagged(sender, **kwargs):
        order.append("tagged")

    async with AsyncSession(async_engine) as session:
        session.add(Author(name="a"))
        await session.commit()
    await tasks[0]
    assert order == ["tagged", "task committed", "receiver ends"]
    assert rows(witness, Tag.name) == ["t"]


@asynchronous
async def test_two_tasks_deliver_at_the_same_time(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """One waits inside its receiver while the other delivers as a whole."""
    waiting, go, order = asyncio.Event(), asyncio.Event(), []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, **kwargs):
        order.append(f"{instance.name} begins")
        if instance.name == "slow":
            waiting.set()
            await go.wait()
        order.append(f"{instance.name} ends")

    async def work(name: str) -> None:
        async with AsyncSession(async_engine) as session:
            session.add(Author(name=name))
            await session.commit()
        order.append(f"{name} returned")

    slow = asyncio.create_task(work("slow"))
    await waiting.wait()
    await work("fast")
    go.set()
    await slow
    assert order == [
        "slow begins",
        "fast begins",
        "fast ends",
        "fast returned",
        "slow ends",
        "slow returned",
    ]
    assert sorted(log.lines) == ["commit created Author(fast)", "commit created Author(slow)"]
    assert rows(witness, Author.name) == ["fast", "slow"]

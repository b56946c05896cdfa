"""Async receivers at the end of a transaction."""

from __future__ import annotations

import asyncio
import functools
import gc
import weakref

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, Engine, create_engine, inspect, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_object_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from sqla_signals import (
    AsyncReceiverError,
    Signal,
    post_delete,
    post_save,
    receiver,
    receiver_failed,
)

from ..contract.models import Author, Book, Tag
from ..contract.observing import rows
from .models import Box, Shelf
from .observing import Deliveries, Unwanted, asynchronous


@pytest.mark.parametrize("how", ["commit", "begin", "sessionmaker.begin", "run_sync"])
@asynchronous
async def test_async_receivers_are_awaited_in_order_with_sync_ones_in_the_same_pass(
    async_engine: AsyncEngine, witness: Engine, how: str
):
    """Each is done before the next begins, and all before the transaction's end returns."""
    order = []

    @receiver(post_save, sender=Author, on="commit")
    async def first(sender, instance, **kwargs):
        order.append(f"first {instance.name} begins")
        await asyncio.sleep(0)
        order.append(f"first {instance.name} ends")

    @receiver(post_save, sender=Author, on="commit")
    def second(sender, instance, **kwargs):
        order.append(f"second {instance.name}")

    @receiver(post_save, sender=Author, on="commit")
    async def third(sender, instance, **kwargs):
        await asyncio.sleep(0)
        order.append(f"third {instance.name}")

    both = [Author(name="a"), Author(name="b")]
    async with AsyncSession(async_engine) as session:
        if how == "commit":
            session.add_all(both)
            await session.commit()
        elif how == "run_sync":
            session.add_all(both)
            await session.run_sync(lambda sync: sync.commit())
        elif how == "begin":
            async with session.begin():
                session.add_all(both)
        else:
            async with async_sessionmaker(async_engine).begin() as other:
                other.add_all(both)
        order.append("returned")
    assert order == [
        "first a begins",
        "first a ends",
        "second a",
        "third a",
        "first b begins",
        "first b ends",
        "second b",
        "third b",
        "returned",
    ]
    assert rows(witness, Author.name) == ["a", "b"]


@asynchronous
async def test_async_rollback_receivers_are_awaited_without_a_session(
    async_engine: AsyncEngine, witness: Engine
):
    """At a savepoint's end as at the transaction's, however that comes."""
    order = []

    @receiver(post_save, sender=Author, on="rollback")
    async def fn(sender, instance, session, **kwargs):
        await asyncio.sleep(0)
        assert inspect(instance).detached
        order.append((instance.name, session))

    @receiver(post_save, sender=Author, on="rollback")
    def sync(sender, instance, session, **kwargs):
        order.append((f"sync {instance.name}", session))

    async with AsyncSession(async_engine) as session:
        savepoint = await session.begin_nested()
        session.add(Author(name="savepoint"))
        await session.flush()
        await savepoint.rollback()
        assert order == [("savepoint", None), ("sync savepoint", None)]
        session.add(Author(name="transaction"))
        await session.flush()
        await session.rollback()
        assert order[2:] == [("transaction", None), ("sync transaction", None)]
        session.add(Author(name="closed"))
        await session.flush()
    assert order[4:] == [("closed", None), ("sync closed", None)]
    assert rows(witness, Author.name) == []


@asynchronous
async def test_an_async_receiver_gets_an_asyncsession_of_its_own(
    async_engine: AsyncEngine, witness: Engine
):
    """The instance lives in it, and what was loaded needs no SQL."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, session, **kwargs):
        found.append(
            (
                type(session),
                session is working,
                session.sync_session is working.sync_session,
                async_object_session(instance) is session,
                instance in session,
                instance is author,
                instance.name,
                session.in_transaction(),
            )
        )

    async with AsyncSession(async_engine) as working:
        author = Author(name="a")
        working.add(author)
        await working.commit()
    assert found == [(AsyncSession, False, False, True, True, False, "a", False)]
    assert rows(witness, Author.name) == ["a"]


@asynchronous
async def test_an_async_receivers_instance_is_usable(async_engine: AsyncEngine, witness: Engine):
    """``await session.refresh``, ``awaitable_attrs``, queries; changes to it are saved."""
    found = []

    @receiver(post_save, sender=Shelf, on="commit")
    async def fn(sender, instance, session, created, **kwargs):
        if not created:
            return
        found.append([box.name for box in await instance.awaitable_attrs.boxes])
        await session.refresh(instance)
        found.append(instance.name)
        found.append((await session.scalars(select(Shelf))).one() is instance)
        instance.name = "changed by the receiver"
        session.add(Box(name="by the receiver", shelf=instance))

    async with AsyncSession(async_engine) as session:
        session.add(Shelf(name="s", boxes=[Box(name="b")]))
        await session.commit()
        assert rows(witness, Shelf.name) == ["changed by the receiver"]
        assert rows(witness, Box.name, Box.shelf_id) == [("b", 1), ("by the receiver", 1)]
    assert found == [["b"], "s", True]


@asynchronous
async def test_a_sync_receiver_behind_an_asyncsession_loads_lazily(
    async_engine: AsyncEngine, witness: Engine
):
    """It gets the ``Session`` inside, and needs to know nothing of the rest."""
    found = []

    @receiver(post_save, sender=Book, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        found.append((type(session), instance.author.name, session.scalars(select(Book)).all()))
        if created:
            instance.name = "changed by the receiver"

    async with AsyncSession(async_engine) as session:
        session.add(Book(name="b", author=Author(name="a")))
        await session.commit()
        assert rows(witness, Book.name) == ["changed by the receiver"]
    assert [(cls, name, len(books)) for cls, name, books in found] == [(Session, "a", 1)] * 2


@asynchronous
async def test_a_deleted_instance_is_detached_and_readable(
    async_engine: AsyncEngine, witness: Engine
):
    """Without awaiting anything."""
    found = []

    @receiver(post_delete, sender=Author, on="commit")
    async def fn(sender, instance, session, **kwargs):
        assert inspect(instance).detached
        found.append((instance.name, type(session), (await session.scalars(select(Author))).all()))

    async with AsyncSession(async_engine) as session:
        author = Author(name="a")
        session.add(author)
        await session.commit()
        await session.delete(author)
        await session.commit()
    assert found == [("a", AsyncSession, [])]
    assert rows(witness, Author.name) == []


@asynchronous
async def test_an_async_receiver_that_raises_is_logged_and_the_others_run(
    async_engine: AsyncEngine, witness: Engine, caplog: pytest.LogCaptureFixture
):
    """Its own work is rolled back, and ``commit()`` does not fail."""
    failed = []

    def note(sender, exception, **kwargs):
        failed.append((sender, type(exception)))

    @receiver(post_save, sender=Author, on="commit", name="shop.reindex")
    async def fails(sender, session, **kwargs):
        session.add(Tag(name="lost"))
        await session.flush()
        raise Unwanted

    @receiver(post_save, sender=Author, on="commit")
    async def works(sender, session, **kwargs):
        session.add(Tag(name="kept"))

    receiver_failed.connect(note)
    try:
        async with AsyncSession(async_engine) as session:
            session.add(Author(name="a"))
            await session.commit()
    finally:
        receiver_failed.disconnect(note)
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert "shop.reindex" in record.getMessage()
    assert failed == [(Author, Unwanted)]
    assert rows(witness, Author.name) == ["a"]
    assert rows(witness, Tag.name) == ["kept"]


class Later:
    """An instance that is async to call."""

    def __init__(self) -> None:
        self.found: list[str] = []

    async def __call__(self, sender, instance, session, **kwargs) -> None:
        await asyncio.sleep(0)
        self.found.append(f"{instance.name} {type(session).__name__}")


@asynchronous
async def test_async_receivers_of_every_shape_are_awaited(
    async_engine: AsyncEngine, witness: Engine
):
    """An instance, a partial, a plain function that returns a coroutine."""
    one, two, three = Later(), Later(), Later()

    def plain(sender, **kwargs):
        return three(sender, **kwargs)

    post_save.connect(one, Author, weak=False, on="commit")
    post_save.connect(functools.partial(two), Author, weak=False, on="commit")
    post_save.connect(plain, Author, weak=False, on="commit")
    async with AsyncSession(async_engine) as session:
        session.add(Author(name="a"))
        await session.commit()
    assert one.found == two.found == ["a AsyncSession"]
    assert three.found == ["a Session"]  # nobody could tell that it is async
    assert rows(witness, Author.name) == ["a"]


@asynchronous
async def test_sessions_of_a_subclass_are_of_that_subclass(
    async_engine: AsyncEngine, witness: Engine
):
    """Both of them: the ``AsyncSession`` and the ``Session`` inside."""

    class Inside(Session):
        pass

    class Outside(AsyncSession):
        sync_session_class = Inside

        def __init__(self, tenant: str) -> None:
            super().__init__(async_engine)
            self.tenant = tenant

    found = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, session, **kwargs):
        found.append((type(session), type(session.sync_session), session.tenant))

    async with Outside("here") as session:
        session.add(Author(name="a"))
        await session.commit()
    assert found == [(Outside, Inside, "here")]
    assert rows(witness, Author.name) == ["a"]


@asynchronous
async def test_one_connection_in_the_pool_is_enough(driver: str, witness: Engine, installed):
    """Nothing waits for itself."""
    small = create_async_engine(
        witness.url.set(drivername=driver),
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=1,
    )
    seen = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, session, **kwargs):
        seen.append((await session.scalars(select(Author.name))).all())
        session.add(Tag(name="t"))

    @receiver(post_save, sender=Tag, on="commit")
    async def tagged(sender, session, **kwargs):
        seen.append((await session.scalars(select(Tag.name))).all())

    async with AsyncSession(small) as session:
        session.add(Author(name="a"))
        await session.commit()
        assert small.pool.checkedout() == 0
    await small.dispose()
    assert seen == [["a"], ["t"]]
    assert rows(witness, Tag.name) == ["t"]


@asynchronous
async def test_many_calls_leave_no_connection_checked_out_and_no_session_alive(
    async_engine: AsyncEngine, witness: Engine, caplog: pytest.LogCaptureFixture
):
    """Whether they succeeded, failed, or did nothing."""
    caplog.set_level("CRITICAL", "sqla_signals")  # a record that is kept keeps its traceback
    references = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, session, **kwargs):
        references.extend(map(weakref.ref, (session, session.sync_session, instance)))
        if instance.id % 3 == 0:
            await session.execute(text("SELECT 1"))
        if instance.id % 5 == 0:
            raise Unwanted

    async with AsyncSession(async_engine) as session:
        session.add_all([Author(id=number, name="a") for number in range(1, 301)])
        await session.commit()
    assert async_engine.pool.checkedout() == 0
    assert len(references) == 900
    gc.collect()
    assert not any(reference() for reference in references)
    assert len(rows(witness, Author.id)) == 300


@asynchronous
async def test_an_async_session_that_keeps_working_in_a_receiver_is_not_disturbed(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """The session that did the work may be used again as soon as ``commit()`` has returned."""
    async with AsyncSession(async_engine, expire_on_commit=False) as session:
        for name in ("a", "b"):
            author = Author(name=name)
            session.add(author)
            await session.commit()
            assert author.name == name
            assert log.lines[-1] == f"commit created Author({name})"
        assert (await session.scalars(select(Author.name).order_by(Author.id))).all() == ["a", "b"]
    assert rows(witness, Author.name) == ["a", "b"]


# -- from a plain Session --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["function", "instance", "plain function"])
def test_from_a_plain_session_an_async_commit_receiver_is_logged_as_failed_with_the_remedy(
    session: Session, caplog: pytest.LogCaptureFixture, shape: str
):
    """Nothing is awaited, nothing is left that never was, and the others run."""
    later = Later()

    async def function(sender, **kwargs):
        await later(sender, **kwargs)

    def plain(sender, **kwargs):
        return later(sender, **kwargs)

    connected = {"function": function, "instance": later, "plain function": plain}[shape]
    failed, others = [], []

    def note(sender, exception, **kwargs):
        failed.append((sender, exception))

    post_save.connect(connected, Author, weak=False, on="commit", name="shop.reindex")
    post_save.connect(
        lambda sender, **kwargs: others.append(sender), Author, weak=False, on="commit"
    )
    receiver_failed.connect(note)
    session.add(Author(name="a"))
    session.commit()
    gc.collect()
    receiver_failed.disconnect(note)
    ((sender, error),) = failed
    assert sender is Author
    assert isinstance(error, AsyncReceiverError)
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert "shop.reindex" in record.getMessage()
    for remedy in ("AsyncSession", "plain function"):
        assert remedy in str(record.exc_info[1])
    assert later.found == []
    assert others == [Author]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_from_a_plain_session_an_async_rollback_receiver_is_logged_as_failed(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """And the rollback does not fail."""
    later = Later()
    post_save.connect(later, Author, weak=False, on="rollback", name="shop.undo")
    session.add(Author(name="a"))
    session.flush()
    session.rollback()
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert "shop.undo" in record.getMessage()
    assert isinstance(record.exc_info[1], AsyncReceiverError)
    assert later.found == []
    assert rows(session.get_bind(), Author.name) == []


def test_from_a_plain_session_an_async_flush_receiver_raises_with_the_remedy(session: Session):
    """In the flush there is a caller to tell."""
    post_save.connect(Later(), Author, weak=False)
    session.add(Author(name="a"))
    with pytest.raises(AsyncReceiverError, match="AsyncSession"):
        session.commit()
    session.rollback()
    assert rows(session.get_bind(), Author.name) == []


@asynchronous
async def test_a_plain_session_inside_an_event_loop_is_a_plain_session(
    library: Engine, installed, caplog: pytest.LogCaptureFixture
):
    """A running loop alone cannot await in the middle of a function."""
    later = Later()
    post_save.connect(later, Author, weak=False, on="commit")
    engine = create_engine(library.url)
    with Session(engine) as session:
        session.add(Author(name="a"))
        session.commit()
    engine.dispose()
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert isinstance(record.exc_info[1], AsyncReceiverError)
    assert later.found == []
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_send_async_serves_custom_signals():
    """Async and sync receivers in one order, the results in a list."""
    signal, order = Signal("custom"), []

    async def later(sender, **kwargs):
        await asyncio.sleep(0)
        order.append("async")
        return 1

    def now(sender, **kwargs):
        order.append("sync")
        return 2

    signal.connect(later)
    signal.connect(now)
    assert await signal.send_async("me") == [(later, 1), (now, 2)]
    assert order == ["async", "sync"]

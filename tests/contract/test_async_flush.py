"""Async receivers in a flush."""

from __future__ import annotations

import asyncio
import functools

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from sqla_signals import (
    AsyncReceiverError,
    SignalsError,
    post_delete,
    post_save,
    pre_save,
    receiver,
)

from .models import Author, Book, Tag
from .observing import Log, asynchronous, both, rows


@asynchronous
async def test_async_receivers_are_awaited_in_a_flush_in_one_order_with_sync_ones(
    async_library: AsyncEngine, library: Engine, installed
):
    """Each is done before the next one begins, before ``flush()`` returns."""
    seen = []

    @receiver([pre_save, post_save], sender=Author)
    async def first(sender, signal, **kwargs):
        seen.append(f"{signal.name} first begins")
        await asyncio.sleep(0)
        seen.append(f"{signal.name} first ends")

    @receiver([pre_save, post_save], sender=Author)
    def second(sender, signal, **kwargs):
        seen.append(f"{signal.name} second")

    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        await session.flush()
        assert seen == [
            "pre_save first begins",
            "pre_save first ends",
            "pre_save second",
            "post_save first begins",
            "post_save first ends",
            "post_save second",
        ]
        await session.commit()
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_the_session_is_an_asyncsession_for_an_async_receiver(
    async_library: AsyncEngine, installed
):
    """The very one; a sync receiver gets the ``Session`` inside."""
    seen = {}

    @receiver(post_save, sender=Author)
    async def is_async(sender, session, **kwargs):
        seen["async"] = session

    @receiver(post_save, sender=Author)
    def is_sync(sender, session, **kwargs):
        seen["sync"] = session

    async with async_sessionmaker(async_library)() as session:
        session.add(Author(name="a"))
        await session.flush()
        assert seen == {"async": session, "sync": session.sync_session}


@asynchronous
async def test_an_async_receiver_may_query_change_and_add(
    async_library: AsyncEngine, library: Engine, log: Log
):
    """In ``pre_save`` for this flush, in ``post_save`` for the next one."""

    @receiver(pre_save, sender=Author)
    async def before(sender, instance, session, **kwargs):
        assert (await session.scalars(select(Author))).all() == []
        instance.name = "b"
        session.add(Tag(name="t"))

    @receiver(post_save, sender=Author)
    async def after(sender, instance, session, created, **kwargs):
        assert (await session.scalars(select(Author))).one() is instance
        if created:
            await session.refresh(instance)
            instance.age = 3

    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        await session.flush()
        pre_save.disconnect(before)
        await session.commit()
    assert log.pre[:2] == ["pre_save created Author(a)", "pre_save created Tag(t)"]
    assert sorted(log.post[:2]) == ["post_save created Author(b)", "post_save created Tag(t)"]
    assert log.lines[4:] == both("save updated Author(b)")
    assert rows(library, Author.name, Author.age) == [("b", 3)]


@asynchronous
async def test_an_async_veto_leaves_the_session_usable_and_nothing_written(
    async_library: AsyncEngine, library: Engine, installed
):
    """The exception is unchanged, with its note."""
    error = ZeroDivisionError("no")

    @receiver(pre_save, sender=Author)
    async def veto(sender, instance, **kwargs):
        await asyncio.sleep(0)
        if instance.name == "a":
            raise error

    async with AsyncSession(async_library) as session:
        author = Author(name="a")
        session.add(author)
        with pytest.raises(ZeroDivisionError) as caught:
            await session.flush()
        assert caught.value is error
        assert "veto" in error.__notes__[0]
        author.name = "b"
        await session.commit()
    assert rows(library, Author.name) == ["b"]


@asynchronous
async def test_an_async_post_receiver_that_raises_rolls_back(
    async_library: AsyncEngine, library: Engine, installed
):
    """As a sync one does."""

    @receiver(post_save, sender=Author)
    async def fails(sender, **kwargs):
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        with pytest.raises(ZeroDivisionError):
            await session.commit()
        await session.rollback()
    assert rows(library, Author.name) == []


@asynchronous
async def test_deletions_autoflush_and_run_sync_reach_async_receivers(
    async_library: AsyncEngine, library: Engine, installed
):
    """Wherever in an ``AsyncSession`` the flush comes from."""
    seen = []

    @receiver([post_save, post_delete], sender=Author)
    async def fn(sender, signal, **kwargs):
        await asyncio.sleep(0)
        seen.append(signal.name)

    async with AsyncSession(async_library) as session:
        author = Author(name="a")
        session.add(author)
        await session.scalars(select(Author))
        await session.delete(author)
        await session.flush()
        session.add(Author(name="b"))
        await session.run_sync(lambda session: session.flush())
        async with session.begin_nested():
            session.add(Author(name="c"))
        await session.commit()
    assert seen == ["post_save", "post_delete", "post_save", "post_save"]
    assert rows(library, Author.name) == ["b", "c"]


class AsyncCallable:
    """An instance with ``async def __call__``."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    async def __call__(self, sender, session, **kwargs):
        """Note the session, after a pause."""
        await asyncio.sleep(0)
        self.seen.append(session)

    async def method(self, sender, session, **kwargs):
        """Do the same, as a method."""
        await self(sender, session)


def deferred(fn):
    """Decorate ``fn`` with what returns an awaitable without being ``async def``."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "make",
    [
        lambda one: one,
        lambda one: one.method,
        lambda one: functools.partial(one),
        lambda one: functools.partial(one.method),
    ],
    ids=["instance", "method", "partial of an instance", "partial of a method"],
)
@asynchronous
async def test_every_kind_of_async_callable_is_awaited(async_library, installed, make):
    """Blinker does not await an instance with ``async def __call__``."""
    one = AsyncCallable()
    post_save.connect(make(one), sender=Author, weak=False)
    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        await session.flush()
        assert one.seen == [session]


@asynchronous
async def test_a_plain_function_that_returns_an_awaitable_is_awaited(async_library, installed):
    """Such as an async receiver behind a decorator."""
    one = AsyncCallable()
    post_save.connect(deferred(one.method), sender=Author, weak=False)
    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        await session.flush()
    assert len(one.seen) == 1


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda signal: signal.name)
@pytest.mark.parametrize(
    "make", [lambda one: one, lambda one: deferred(one.method)], ids=["async", "decorated"]
)
def test_from_a_plain_session_an_async_receiver_raises_with_the_remedy(
    session: Session, library: Engine, signal, make
):
    """Nothing is written, and no coroutine is left behind that was never awaited."""
    one = AsyncCallable()
    signal.connect(make(one), sender=Author, weak=False)
    session.add(Author(name="a"))
    with pytest.raises(AsyncReceiverError, match="AsyncSession") as caught:
        session.commit()
    assert isinstance(caught.value, SignalsError)
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert signal.name in text
    assert "AsyncCallable" in text
    assert "Author" in text
    session.rollback()
    assert one.seen == []
    assert rows(library, Author.name) == []


def test_an_async_receiver_of_another_model_does_not_matter_to_a_plain_session(session: Session):
    """It is not reached."""
    receiver(post_save, sender=Book)(AsyncCallable())
    session.add(Author(name="a"))
    session.flush()
    assert rows(session, Author.name) == ["a"]


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda signal: signal.name)
@asynchronous
async def test_cancellation_in_a_receiver_ends_the_flush_and_leaves_the_session_usable(
    async_library: AsyncEngine, library: Engine, installed, signal
):
    """The task is cancelled while the receiver waits; nothing was committed."""
    waiting = asyncio.Event()

    @receiver(signal, sender=Author)
    async def waits(sender, **kwargs):
        waiting.set()
        await asyncio.Event().wait()

    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        task = asyncio.ensure_future(session.commit())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.rollback()
        signal.disconnect(waits)
        session.add(Author(name="b"))
        await session.commit()
    assert rows(library, Author.name) == ["b"]


@asynchronous
async def test_two_tasks_with_a_session_each_do_not_disturb_each_other(
    async_library: AsyncEngine, library: Engine, installed
):
    """Both are inside a receiver at the same time."""
    both_inside = asyncio.Barrier(2)
    seen = []

    @receiver(pre_save, sender=Author)
    async def meets(sender, instance, session, **kwargs):
        await both_inside.wait()
        seen.append((instance.name, session))

    async def work(name: str) -> AsyncSession:
        async with AsyncSession(async_library) as session:
            session.add(Author(name=name))
            await session.flush()
            await session.rollback()
        return session

    one, two = await asyncio.gather(work("one"), work("two"))
    assert sorted(seen, key=repr) == sorted([("one", one), ("two", two)], key=repr)
    assert rows(library, Author.name) == []

"""``on_commit`` and ``on_rollback``, ad-hoc callbacks with the savepoint rules."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_signals import (
    SignalRecursionError,
    SignalsError,
    on_commit,
    on_rollback,
    post_save,
    receiver,
)

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .observing import Deliveries, Transaction, Unwanted, asynchronous


def both(session: Session, called: list[str], name: str) -> None:
    """Register the name for both ends."""
    on_commit(session, lambda: called.append(f"commit {name}"))
    on_rollback(session, lambda: called.append(f"rollback {name}"))


# -- each sentence, in every kind of transaction ---------------------------------------------------


def test_callbacks_are_first_in_first_out(committing: Transaction):
    """Across savepoints that were released."""
    called: list[str] = []

    def work(session: Session) -> None:
        both(session, called, "1")
        with session.begin_nested():
            both(session, called, "2")
            with session.begin_nested():
                both(session, called, "3")
            both(session, called, "4")
        both(session, called, "5")
        session.add(Author(name="a"))

    committing(work)
    assert called == [f"commit {number}" for number in range(1, 6)]
    assert rows(committing.engine, Author.name) == ["a"]


def test_callbacks_of_a_transaction_that_was_undone_are_the_rollback_ones(undoing: Transaction):
    """First in, first out, too; with no change of a row in it as well."""
    called: list[str] = []

    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        both(session, called, "1")
        with session.begin_nested():
            both(session, called, "2")
        both(session, called, "3")

    undoing(work)
    assert called == [f"rollback {number}" for number in range(1, 4)]


def test_callbacks_of_a_savepoint_that_was_undone_are_called_there_and_then(
    committing: Transaction,
):
    """The commit ones are forgotten, the rollback ones called; those around it wait on."""
    called: list[str] = []
    seen: list[str] = []

    def work(session: Session) -> None:
        session.add(Author(name="a"))
        both(session, called, "before")
        savepoint = session.begin_nested()
        both(session, called, "inside")
        with session.begin_nested():
            both(session, called, "innermost")
        savepoint.rollback()
        seen.extend(called)
        both(session, called, "after")

    committing(work)
    assert seen == ["rollback inside", "rollback innermost"]
    assert called[2:] == ["commit before", "commit after"]
    assert rows(committing.engine, Author.name) == ["a"]


def test_outside_of_a_transaction_they_begin_one(session: Session):
    """As any work in a session does."""
    called: list[str] = []
    both(session, called, "1")
    assert session.in_transaction()
    session.add(Author(name="a"))
    both(session, called, "2")
    session.commit()
    assert called == ["commit 1", "commit 2"]
    both(session, called, "3")
    session.add(Author(name="b"))
    session.flush()
    session.rollback()
    assert called[2:] == ["rollback 3"]
    session.add(Author(name="c"))
    session.commit()
    assert len(called) == 3
    assert rows(session.get_bind(), Author.name) == ["a", "c"]


@pytest.mark.parametrize("give_up", [Session.rollback, Session.close])
def test_callbacks_of_work_that_was_given_up_are_not_left_for_later_work(
    session: Session, give_up: Callable[[Session], None]
):
    """``rollback()`` and ``close()`` end the transaction that they have begun."""
    called: list[str] = []
    both(session, called, "1")
    give_up(session)
    assert called == ["rollback 1"]
    session.add(Author(name="other work"))
    session.commit()
    assert called == ["rollback 1"]
    assert rows(session.get_bind(), Author.name) == ["other work"]


def test_without_autobegin_they_need_a_transaction(library: Engine, log: Deliveries):
    """Nothing begins one there but ``session.begin()``, which the error says."""
    called: list[str] = []
    with Session(library, autobegin=False) as session:
        for wait in (on_commit, on_rollback):
            with pytest.raises(SignalsError, match=r"autobegin=False. Call session\.begin\(\)"):
                wait(session, lambda: called.append("never"))
        with session.begin():
            both(session, called, "1")
            session.add(Author(name="a"))
    assert called == ["commit 1"]
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_an_async_session_begins_one_too(async_engine: AsyncEngine, witness: Engine):
    """No statement is needed for it."""
    called: list[str] = []
    async with AsyncSession(async_engine) as session:
        on_commit(session, lambda: called.append("given up"))
        assert session.in_transaction()
        await session.rollback()
        session.add(Author(name="a"))
        on_commit(session, lambda: called.append("committed"))
        await session.commit()
    assert called == ["committed"]
    assert rows(witness, Author.name) == ["a"]


def test_those_that_wait_go_to_the_root_although_a_savepoint_comes_first(session: Session):
    """They were not registered inside it."""
    called: list[str] = []
    both(session, called, "1")
    savepoint = session.begin_nested()
    session.add(Author(name="a"))
    session.flush()
    savepoint.rollback()
    assert called == []
    session.commit()
    assert called == ["commit 1"]


def test_an_empty_transaction_is_a_transaction(session: Session):
    """``commit()`` begins one if there is none."""
    called: list[str] = []
    both(session, called, "1")
    session.commit()
    assert called == ["commit 1"]


def test_callbacks_need_no_receivers_at_all(committing: Transaction):
    """They stand for themselves."""
    called: list[str] = []

    def work(session: Session) -> None:
        session.add(Author(name="a"))
        on_commit(session, lambda: called.append("commit"))

    committing(work, after=lambda: called.append("returned"))
    assert called == ["commit", "returned"]
    assert rows(committing.engine, Author.name) == ["a"]


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_callback_that_raises_is_logged_and_the_others_are_called(
    session: Session, caplog: pytest.LogCaptureFixture, end: str
):
    """Neither ``commit()`` nor ``rollback()`` fails."""
    called = []

    def fails() -> None:
        raise Unwanted("the reason")

    register = on_commit if end == "commit" else on_rollback
    session.add(Author(name="a"))
    session.flush()
    register(session, fails)
    register(session, lambda: called.append(True))
    getattr(session, end)()
    assert called == [True]
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert "fails" in record.getMessage()
    assert f"on_{end}" in record.getMessage()
    assert isinstance(record.exc_info[1], Unwanted)
    assert rows(session.get_bind(), Author.name) == (["a"] if end == "commit" else [])


def test_an_interruption_in_a_callback_passes_through(session: Session, log: Deliveries):
    """The receivers had their turn, and the next transaction is clean."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    called: list[str] = []
    session.add(Author(name="a"))
    on_commit(session, interrupt)
    on_commit(session, lambda: called.append("never"))
    with pytest.raises(KeyboardInterrupt):
        session.commit()
    assert log.lines == ["commit created Author(a)"]
    session.add(Author(name="b"))
    session.commit()
    assert log.lines[1:] == ["commit created Author(b)"]
    assert called == []
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


@pytest.mark.parametrize("register", [on_commit, on_rollback])
def test_a_callback_must_be_callable(session: Session, register):
    """Said at once, not after the commit."""
    with pytest.raises(SignalsError, match="function"):
        register(session, "not a function")


@pytest.mark.parametrize("register", [on_commit, on_rollback])
def test_what_is_no_session_takes_no_callbacks(library: Engine, installed, register):
    """The error asks for a session, and not for an installation that is there."""
    for other in (library, sessionmaker(library)):
        with pytest.raises(SignalsError, match="give a Session or an AsyncSession") as caught:
            register(other, lambda: None)
        assert "install" not in str(caught.value)


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("shape", ["function", "partial", "lambda"])
def test_an_async_callback_of_a_plain_session_is_logged_as_failed(
    session: Session, caplog: pytest.LogCaptureFixture, end: str, shape: str
):
    """With the remedy, in whatever guise it comes; nothing is left that was never awaited."""
    called = []

    async def later() -> None:
        called.append("awaited")

    fn = {"function": later, "partial": functools.partial(later), "lambda": lambda: later()}[shape]
    register = on_commit if end == "commit" else on_rollback
    session.add(Author(name="a"))
    session.flush()
    register(session, fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(session, end)()
        gc.collect()
    assert called == []
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert "AsyncSession" in f"{record.getMessage()} {record.exc_info[1]}"
    assert rows(session.get_bind(), Author.name) == (["a"] if end == "commit" else [])


# -- what they may do ------------------------------------------------------------------------------


def test_a_callback_may_commit_in_a_session_of_its_own(session: Session, log: Deliveries):
    """Its receivers are queued behind the other callbacks."""
    engine, called = session.get_bind(), []

    def commits() -> None:
        with Session(engine) as own, own.begin():
            own.add(Tag(name="t"))
        called.append(list(log.lines))

    session.add(Author(name="a"))
    on_commit(session, commits)
    on_commit(session, lambda: called.append(list(log.lines)))
    session.commit()
    assert called == [["commit created Author(a)"]] * 2
    assert log.lines == ["commit created Author(a)", "commit created Tag(t)"]
    assert rows(engine, Tag.name) == ["t"]


def test_a_callback_given_inside_of_a_callback_is_called_after_the_others(committing: Transaction):
    """In the same delivery: the transaction is committed already."""
    called: list[str] = []

    def work(session: Session) -> None:
        def first() -> None:
            called.append("first")
            on_commit(session, inner)

        def inner() -> None:
            called.append("inner")
            on_commit(session, lambda: called.append("innermost"))

        on_commit(session, first)
        on_commit(session, lambda: called.append("second"))
        session.add(Author(name="a"))

    committing(work, after=lambda: called.append("returned"))
    assert called == ["first", "second", "inner", "innermost", "returned"]
    assert rows(committing.engine, Author.name) == ["a"]


def test_a_callback_given_inside_of_a_callback_is_called_although_the_session_was_used(
    session: Session,
):
    """Reading begins a transaction, which nobody would commit for the sake of the callback."""
    called: list[str] = []

    def first() -> None:
        assert author.name == "a"
        with session.begin_nested():
            on_commit(session, lambda: called.append("inner"))
        called.append("first")

    session.add(author := Author(name="a"))
    on_commit(session, first)
    on_commit(session, lambda: called.append("second"))
    session.commit()
    assert called == ["first", "second", "inner"]
    session.commit()
    assert called == ["first", "second", "inner"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_callback_that_gives_itself_again_and_again_is_stopped(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """And named."""
    calls: list[int] = []

    def forever() -> None:
        calls.append(1)
        on_commit(session, forever)

    session.add(Author(name="a"))
    on_commit(session, forever)
    session.commit()
    assert len(calls) == 100
    (record,) = caplog.records
    assert "forever" in record.getMessage()
    assert isinstance(record.exc_info[1], SignalRecursionError)
    session.commit()
    assert len(calls) == 100
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_callback_for_the_session_that_did_the_work_may_be_given_by_a_commit_receiver(
    session: Session,
):
    """That session has committed already; its callbacks come next."""
    called: list[str] = []
    application = session

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        on_commit(application, lambda: called.append(f"after {instance.name}"))
        called.append(instance.name)

    session.add_all([Author(name="a"), Author(name="b")])
    session.commit()
    assert called == ["a", "b", "after a", "after b"]
    assert not session.in_transaction()
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


def test_a_receivers_own_session_takes_callbacks(session: Session):
    """They are called when its transaction is committed, also if it has no other work."""
    called: list[str] = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        both(session, called, instance.name)
        if instance.name == "b":
            session.add(Tag(name="t"))
        if instance.name == "c":
            raise Unwanted

    session.add_all([Author(name=name) for name in "abcd"])
    session.commit()
    assert sorted(called) == ["commit a", "commit b", "commit d", "rollback c"]
    assert rows(session.get_bind(), Tag.name) == ["t"]


def test_a_flush_receiver_registers_for_the_transaction_it_is_in(session: Session):
    """The shortest way from a flush to the commit."""
    called: list[str] = []

    @receiver(post_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        both(session, called, instance.name)

    session.add(Author(name="a"))
    savepoint = session.begin_nested()
    session.add(Author(name="b"))
    session.flush()
    savepoint.rollback()
    assert called == ["rollback b"]
    session.commit()
    assert called == ["rollback b", "commit a"]
    assert rows(session.get_bind(), Author.name) == ["a"]


# -- sessions of all kinds -------------------------------------------------------------------------


def test_a_scoped_session_stands_for_its_session(library: Engine, installed):
    """The one of this scope."""
    registry, called = scoped_session(sessionmaker(library)), []
    on_commit(registry, lambda: called.append("commit"))
    registry.add(Author(name="a"))
    registry.commit()
    registry.remove()
    assert called == ["commit"]
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_an_async_session_takes_callbacks_of_both_kinds(
    async_engine: AsyncEngine, witness: Engine
):
    """The async ones are awaited in their turn."""
    called: list[str] = []

    async def later() -> None:
        async with async_engine.connect() as connection:
            found = await connection.execute(text("SELECT count(*) FROM authors"))
            called.append(f"async, of {found.scalar_one()}")

    async with AsyncSession(async_engine) as session:
        session.add(Author(name="a"))
        on_commit(session, lambda: called.append("first"))
        on_commit(session, later)
        on_commit(session, functools.partial(later))
        on_commit(session, lambda: later())
        on_commit(session.sync_session, lambda: called.append("last"))
        await session.commit()
        assert called == ["first", "async, of 1", "async, of 1", "async, of 1", "last"]
        on_rollback(session, later)
        session.add(Author(name="b"))
        await session.flush()
        await session.rollback()
        assert called[5:] == ["async, of 1"]
    assert rows(witness, Author.name) == ["a"]


@asynchronous
async def test_an_async_scoped_session_stands_for_its_session(
    async_engine: AsyncEngine, witness: Engine
):
    """The one of this scope."""
    called: list[str] = []
    registry = async_scoped_session(async_sessionmaker(async_engine), scopefunc=lambda: 1)
    registry.add(Author(name="a"))
    on_commit(registry, lambda: called.append("commit"))
    await registry.commit()
    await registry.remove()
    assert called == ["commit"]
    assert rows(witness, Author.name) == ["a"]

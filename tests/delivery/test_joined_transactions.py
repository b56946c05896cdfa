"""Sessions that join a transaction on their Connection, in every mode there is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, Transaction, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sqla_signals import on_commit, on_rollback, post_save, receiver

from ..conftest import create_sqlite_engine
from ..contract.models import Author, Base, Tag
from ..contract.observing import rows
from .observing import Deliveries, Unwanted, asynchronous

MODES = ("conditional_savepoint", "rollback_only", "control_fully", "create_savepoint")

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def outer(library: Engine) -> Iterator[tuple[Connection, Transaction]]:
    """A Connection with a transaction on it, as test suites have it."""
    with library.connect() as connection:
        transaction = connection.begin()
        yield connection, transaction
        transaction.close()


def inside(connection: Connection) -> list[str]:
    """The names that the outer transaction sees."""
    return sorted(connection.scalars(select(Author.name)))


@pytest.mark.parametrize("mode", MODES)
def test_a_session_that_joined_has_committed_its_part(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Its receivers run when it commits; the database commits when the outer transaction does."""
    connection, transaction = outer
    called = []
    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="a"))
        on_commit(session, lambda: called.append("commit"))
        on_rollback(session, lambda: called.append("rollback"))
        session.commit()
        assert log.lines == ["commit created Author(a)"]
        assert called == ["commit"]
        by_itself = mode == "control_fully"
        assert rows(library, Author.name) == (["a"] if by_itself else [])
        if not by_itself:
            assert transaction.is_active
            assert inside(connection) == ["a"]
            transaction.commit()
    assert log.lines == ["commit created Author(a)"]
    assert called == ["commit"]
    assert rows(library, Author.name) == ["a"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "control_fully"])
def test_the_database_may_still_roll_back_what_was_delivered(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """The session cannot know; that is how transactional test suites see their signals."""
    connection, transaction = outer
    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="a"))
        session.commit()
    transaction.rollback()
    assert log.lines == ["commit created Author(a)"]
    assert rows(library, Author.name) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_session_that_joined_and_rolls_back_has_undone_its_part(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Also where that takes the outer transaction along."""
    connection, transaction = outer
    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="a"))
        session.flush()
        session.rollback()
    assert log.lines == ["rollback created Author(a)"]
    assert transaction.is_active is (mode == "create_savepoint")
    if transaction.is_active:
        transaction.commit()
    assert rows(library, Author.name) == []


LEFT_TO_THE_OWNER = ("conditional_savepoint", "rollback_only")
"""The modes in which ``close()`` leaves the outer transaction, and so the rows, as they are."""


@pytest.mark.parametrize("owner", ["commit", "rollback"])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_session_leaves_to_the_owner_of_its_transaction_is_told_of_by_nobody(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str, owner: str
):
    """Closed without a word, it has neither committed nor undone; a savepoint of its own is."""
    connection, transaction = outer
    called: list[str] = []
    with Session(connection, join_transaction_mode=mode) as session:
        on_commit(session, lambda: called.append("commit"))
        on_rollback(session, lambda: called.append("rollback"))
        session.add(Author(name="a"))
        session.flush()
    is_left = mode in LEFT_TO_THE_OWNER
    assert log.lines == ([] if is_left else ["rollback created Author(a)"])
    assert called == ([] if is_left else ["rollback"])
    if transaction.is_active:
        getattr(transaction, owner)()
    assert rows(library, Author.name) == (["a"] if is_left and owner == "commit" else [])
    assert len(log.lines) == len(called) == (not is_left)


@pytest.mark.parametrize("mode", LEFT_TO_THE_OWNER)
def test_it_does_not_matter_when_the_owner_ends_the_transaction(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Also before the session is closed."""
    connection, transaction = outer
    session = Session(connection, join_transaction_mode=mode)
    session.add(Author(name="a"))
    session.flush()
    transaction.commit()
    session.close()
    assert log.lines == []
    assert rows(library, Author.name) == ["a"]


@pytest.mark.parametrize("mode", LEFT_TO_THE_OWNER)
def test_a_savepoint_of_a_session_that_is_closed_without_a_word_is_undone(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """It is the session's own; what was done around it is its owner's."""
    connection, transaction = outer
    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="left"))
        session.flush()
        session.begin_nested()
        session.add(Author(name="undone"))
        session.flush()
    assert log.lines == ["rollback created Author(undone)"]
    transaction.commit()
    assert rows(library, Author.name) == ["left"]


@pytest.mark.parametrize("mode", LEFT_TO_THE_OWNER)
def test_a_failed_flush_has_undone_the_transaction_that_the_session_joined(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """SQLAlchemy rolls the outer transaction back, so the close that follows is no silence."""
    connection, transaction = outer
    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(id=1, name="a"))
        session.flush()
        session.execute(insert(Author.__table__).values(id=2, name="in the way"))
        session.add(Author(id=2, name="b"))
        with pytest.raises(IntegrityError):
            session.flush()
    assert log.lines == ["rollback created Author(a)"]
    assert not transaction.is_active
    assert rows(library, Author.name) == []


@pytest.mark.parametrize("mode", LEFT_TO_THE_OWNER)
def test_the_next_transaction_of_a_session_that_was_closed_without_a_word_is_like_any(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Nothing of the first is told with the second."""
    connection, transaction = outer
    session = Session(connection, join_transaction_mode=mode)
    session.add(Author(name="a"))
    session.flush()
    session.close()
    session.add(Author(name="b"))
    session.commit()
    assert log.lines == ["commit created Author(b)"]
    session.close()
    transaction.commit()
    assert rows(library, Author.name) == ["a", "b"]


def test_a_session_on_two_binds_leaves_to_the_owner_what_it_joined_only(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, tmp_path
):
    """On the other bind, closing is a rollback."""
    connection, transaction = outer
    other = create_sqlite_engine(tmp_path / "other.db")
    Base.metadata.create_all(other)
    with Session(binds={Author: connection, Tag: other}) as session:
        session.add_all([Author(name="left"), Tag(name="undone")])
        session.flush()
    assert log.lines == ["rollback created Tag(undone)"]
    transaction.commit()
    assert rows(library, Author.name) == ["left"]
    assert rows(other, Tag.name) == []
    other.dispose()


@asynchronous
async def test_an_async_session_leaves_to_the_owner_what_it_joined(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """In the same way."""
    async with async_engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection) as session:
            session.add(Author(name="a"))
            await session.flush()
        assert log.lines == []
        await outer.commit()
    assert log.lines == []
    assert rows(witness, Author.name) == ["a"]


def test_a_session_that_is_dropped_in_a_transaction_calls_nobody(library: Engine, log: Deliveries):
    """It did not end it; whether its work stays is for the connection's owner or the pool."""
    session = Session(library)
    session.add(Author(name="a"))
    session.flush()
    dropped = weakref.ref(session)
    del session
    gc.collect()
    assert dropped() is None
    assert log.lines == []
    assert rows(library, Author.name) == []


@pytest.mark.parametrize("mode", ["conditional_savepoint", "create_savepoint"])
def test_a_session_that_joined_a_savepoint_has_one_of_its_own(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """The default mode, too, where the Connection is in a savepoint already."""
    connection, transaction = outer
    savepoint = connection.begin_nested()
    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="undone"))
        session.flush()
        session.rollback()
        session.add(Author(name="kept"))
        session.commit()
    assert log.lines == ["rollback created Author(undone)", "commit created Author(kept)"]
    savepoint.commit()
    transaction.commit()
    assert rows(library, Author.name) == ["kept"]


@pytest.mark.parametrize("mode", MODES)
def test_savepoints_of_a_session_that_joined_are_like_any(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Released ones join, those rolled back vanish."""
    connection, transaction = outer
    with Session(connection, join_transaction_mode=mode) as session:
        with session.begin_nested():
            session.add(Author(name="released"))
        savepoint = session.begin_nested()
        session.add(Author(name="undone"))
        session.flush()
        savepoint.rollback()
        assert log.lines == ["rollback created Author(undone)"]
        session.commit()
        if transaction.is_active:
            transaction.commit()
    assert log.lines[1:] == ["commit created Author(released)"]
    assert rows(library, Author.name) == ["released"]


@pytest.mark.parametrize("mode", MODES)
def test_receivers_of_a_session_that_joined_run_in_a_savepoint_of_their_own(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """They see what it has done; one that fails undoes its own work and nobody else's."""
    connection, transaction = outer
    seen = []

    @receiver(post_save, sender=Author, on="commit")
    def works(sender, instance, session, using, **kwargs):
        seen.append((session.scalars(select(Author.name)).all(), using is connection))
        session.add(Tag(name="kept"))

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, instance, session, **kwargs):
        session.add(Tag(name="lost"))
        session.flush()
        raise Unwanted

    @receiver(post_save, sender=Author, on="commit")
    def still_works(sender, instance, session, **kwargs):
        instance.books
        session.add(Tag(name="kept2"))

    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="a"))
        session.commit()
        if mode != "control_fully":
            assert transaction.is_active
            assert rows(library, Tag.name) == []
            transaction.commit()
    assert seen == [(["a"], True)]
    assert rows(library, Author.name) == ["a"]
    assert rows(library, Tag.name) == ["kept", "kept2"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "control_fully"])
def test_receivers_work_goes_down_with_the_outer_transaction(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Nothing remains of a test that rolls back, whatever its receivers did."""
    connection, transaction = outer

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        session.add(Tag(name="t"))
        session.commit()
        if created:
            instance.age = 3

    with Session(connection, join_transaction_mode=mode) as session:
        session.add(Author(name="a"))
        session.commit()
        assert session.scalars(select(Author.age)).all() == [3]
        assert len(session.scalars(select(Tag.name)).all()) == 2
        session.commit()
    transaction.rollback()
    assert rows(library, Author.name) == rows(library, Tag.name) == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "control_fully"])
def test_a_session_that_joined_may_commit_again_and_again(
    library: Engine, outer: tuple[Connection, Transaction], log: Deliveries, mode: str
):
    """Each commit delivers its own part."""
    connection, transaction = outer
    with Session(connection, join_transaction_mode=mode) as session:
        for name in "abc":
            session.add(Author(name=name))
            session.commit()
            assert log.lines[-1] == f"commit created Author({name})"
    assert len(log.lines) == 3
    transaction.commit()
    assert rows(library, Author.name) == ["a", "b", "c"]


@asynchronous
async def test_an_async_session_that_joined_has_committed_its_part(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """Its async receivers run in a savepoint of their own."""

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, session, **kwargs):
        session.add(Tag(name=f"{instance.name} by {type(session).__name__}"))

    @receiver(post_save, sender=Author, on="commit")
    async def fails(sender, instance, session, **kwargs):
        session.add(Tag(name="lost"))
        await session.flush()
        raise Unwanted

    async with async_engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection) as session:
            session.add(Author(name="a"))
            await session.commit()
        assert "commit created Author(a)" in log.lines
        assert outer.is_active
        assert rows(witness, Author.name) == []
        await outer.commit()
    assert rows(witness, Author.name) == ["a"]
    assert rows(witness, Tag.name) == ["a by AsyncSession"]

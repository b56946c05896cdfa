"""A session that is garbage collected in the middle of a transaction."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref

import pytest
from sqlalchemy import Engine, exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import on_commit, on_rollback

from ..contract.models import Author
from ..contract.observing import rows
from .observing import Deliveries, asynchronous, deliveries


def names(engine: Engine) -> list[str]:
    return rows(engine, Author.name)


def work(session: Session) -> weakref.ref[Author]:
    """Write, in the transaction and in a savepoint that stays open."""
    author = Author(name="never")
    session.add(author)
    session.flush()
    session.begin_nested()
    author.age = 3
    session.flush()
    return weakref.ref(author)


def test_it_is_a_rollback_that_calls_nobody_and_leaves_nothing(library: Engine, log: Deliveries):
    """Nobody ended the transaction; its connection goes back to the pool, rolled back."""
    session = Session(library)
    gone = weakref.ref(session), work(session)
    del session
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert log.lines == []
    with Session(library) as session:
        session.add(Author(name="next"))
        session.commit()
    assert log.lines == ["commit created Author(next)"]
    assert names(library) == ["next"]


@asynchronous
async def test_it_is_the_same_behind_an_asyncsession(
    async_engine: AsyncEngine, witness: Engine, log: Deliveries
):
    """The driver's connection is given up; SQLAlchemy and psycopg warn of that."""
    session = AsyncSession(async_engine)
    gone = weakref.ref(session.sync_session), await session.run_sync(work)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The garbage collector is trying", exc.SAWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        del session
        gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert log.lines == []
    async with AsyncSession(async_engine) as session:
        session.add(Author(name="next"))
        await session.commit()
    assert log.lines == ["commit created Author(next)"]
    assert names(witness) == ["next"]


def test_who_waited_for_the_rollback_is_named_in_the_log(
    library: Engine, log: Deliveries, caplog: pytest.LogCaptureFixture
):
    """No receiver can run in the garbage collector, but none is passed over in silence."""

    def cleaned_up() -> None:
        raise AssertionError

    session = Session(library)
    session.add(Author(name="never"))
    session.flush()
    on_rollback(session, cleaned_up)
    del session
    gc.collect()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sqla_signals", logging.WARNING)
    assert "garbage collected" in record.getMessage()
    assert "Deliveries.rolled_back" in record.getMessage()
    assert "cleaned_up" in record.getMessage()
    assert "close()" in record.getMessage()


def test_nothing_is_logged_where_nobody_waited_for_the_rollback(
    library: Engine, installed: sqla_signals.Installation, caplog: pytest.LogCaptureFixture
):
    """What waits for the commit waits in vain, as after any rollback."""
    deliveries(["commit"])
    session = Session(library)
    session.add(Author(name="never"))
    session.flush()
    on_commit(session, lambda: None)
    del session
    gc.collect()
    assert caplog.records == []


def test_nothing_is_logged_of_a_session_that_was_used_up(
    library: Engine, log: Deliveries, caplog: pytest.LogCaptureFixture
):
    """Whatever it did before, and whatever waits for a transaction that has not begun."""
    session = Session(library)
    for end in (session.commit, session.rollback, session.close):
        session.add(Author(name="a"))
        session.flush()
        with session.begin_nested():
            session.add(Author(name="b"))
        session.begin_nested()
        session.add(Author(name="c"))
        session.flush()
        end()
    on_rollback(session, lambda: None)
    del session, end
    gc.collect()
    assert caplog.records == []

"""``raw``, for loading fixtures."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_signals

from .models import Author, Book
from .observing import Log, asynchronous, rows


def sent(log: Log) -> list[tuple[str, bool]]:
    """Name and ``raw`` of what was sent."""
    return [(f"{one.signal} {one.name}", one["raw"]) for one in log.sent]


def test_raw_is_false_as_a_rule_and_true_inside_the_block(session: Session, log: Log):
    """For ``pre_save`` and ``post_save``."""
    session.add(Author(name="a"))
    session.flush()
    with sqla_signals.raw(session):
        session.add(Author(name="b"))
        session.flush()
    session.add(Author(name="c"))
    session.flush()
    assert sent(log) == [
        ("pre_save a", False),
        ("post_save a", False),
        ("pre_save b", True),
        ("post_save b", True),
        ("pre_save c", False),
        ("post_save c", False),
    ]
    assert rows(session, Author.name) == ["a", "b", "c"]


def test_what_is_pending_at_the_end_of_the_block_is_flushed_there(session: Session, log: Log):
    """So that it is raw too."""
    with sqla_signals.raw(session):
        session.add(Author(name="a"))
    assert sent(log) == [("pre_save a", True), ("post_save a", True)]
    assert rows(session, Author.name) == ["a"]


def test_what_the_session_writes_inside_the_block_is_raw_whenever_it_was_added(
    session: Session, log: Log
):
    """Flush before the block what is no fixture."""
    session.add(Author(name="before"))
    with sqla_signals.raw(session):
        session.add(Book(name="fixture"))
    raw = {one.name: one["raw"] for one in log.sent}
    assert raw == {"before": True, "fixture": True}


def test_blocks_nest(session: Session, log: Log):
    """The end of the inner one does not end the outer one."""
    with sqla_signals.raw(session):
        with sqla_signals.raw(session):
            session.add(Author(name="a"))
        session.add(Author(name="b"))
    assert [raw for _, raw in sent(log)] == [True] * 4


def test_an_exception_in_the_block_passes_and_flushes_nothing(session: Session, log: Log):
    """And what comes later is not raw."""
    with pytest.raises(ZeroDivisionError), sqla_signals.raw(session):
        session.add(Author(name="a"))
        raise ZeroDivisionError
    assert log.lines == []
    session.flush()
    assert [raw for _, raw in sent(log)] == [False, False]


def test_a_failing_flush_at_the_end_of_the_block_ends_it_all_the_same(session: Session, log: Log):
    """The session is not raw for ever."""

    def veto(sender, **kwargs):
        raise ZeroDivisionError

    with sqla_signals.pre_save.connected_to(veto, sender=Author):
        with pytest.raises(ZeroDivisionError), sqla_signals.raw(session):
            session.add(Author(name="a"))
    log.clear()
    session.flush()
    assert [raw for _, raw in sent(log)] == [False, False]


def test_other_sessions_are_not_raw(library: Engine, log: Log):
    """The block is for one session."""
    with Session(library) as one, Session(library) as two:
        with sqla_signals.raw(one):
            two.add(Author(name="two"))
            two.commit()
            one.add(Author(name="one"))
        one.commit()
    assert {name: raw for name, raw in sent(log)} == {
        "pre_save two": False,
        "post_save two": False,
        "pre_save one": True,
        "post_save one": True,
    }


def test_a_scoped_session_can_be_raw(library: Engine, log: Log):
    """The block is for the session behind it."""
    scoped = scoped_session(sessionmaker(library))
    with sqla_signals.raw(scoped):
        scoped.add(Author(name="a"))
    scoped.commit()
    scoped.remove()
    assert [raw for _, raw in sent(log)] == [True, True]
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_an_async_session_can_be_raw(async_library: AsyncEngine, library: Engine, log: Log):
    """With ``async with``; the flush at the end is awaited."""
    async with AsyncSession(async_library) as session:
        async with sqla_signals.raw(session):
            session.add(Author(name="a"))
        assert [raw for _, raw in sent(log)] == [True, True]
        session.add(Author(name="b"))
        await session.commit()
    assert [raw for _, raw in sent(log)] == [True, True, False, False]
    assert rows(library, Author.name) == ["a", "b"]


@asynchronous
async def test_an_async_session_in_a_plain_with_says_what_to_write(async_library, installed):
    """It could not flush at the end."""
    async with AsyncSession(async_library) as session:
        with pytest.raises(TypeError, match="async with"):
            with sqla_signals.raw(session):
                pass

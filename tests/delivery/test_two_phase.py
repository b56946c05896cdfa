"""Two-phase sessions work, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_signals import on_commit, on_rollback, post_save, receiver

from ..conftest import before_sqlalchemy, clear_postgresql
from ..contract.models import Author, Base, Tag
from ..contract.observing import rows
from .models import Box, Record
from .observing import Deliveries, Unwanted

pytestmark = pytest.mark.postgresql


@pytest.fixture
def engine(postgresql_url: str) -> Iterator[Engine]:
    """An engine on an empty database; no prepared transaction may be left in it."""
    engine = create_engine(postgresql_url)
    Base.metadata.create_all(engine)
    Record.metadata.create_all(engine)
    yield engine
    assert engine.pool.checkedout() == 0
    with engine.connect() as connection:
        left = connection.exec_driver_sql(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        ).all()
    engine.dispose()
    clear_postgresql(postgresql_url)
    assert left == []


@pytest.fixture
def session(engine: Engine, installed) -> Iterator[Session]:
    """A two-phase session."""
    with Session(engine, twophase=True) as session:
        yield session


def test_a_two_phase_commit_delivers(session: Session, log: Deliveries):
    """Once, after both phases."""
    session.add(Author(name="a"))
    session.commit()
    assert log.lines == ["commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_preparing_delivers_nothing_and_committing_does(session: Session, log: Deliveries):
    """``prepare()`` is the first phase only; it flushes."""
    called = []
    session.add(Author(name="a"))
    on_commit(session, lambda: called.append("commit"))
    on_rollback(session, lambda: called.append("rollback"))
    session.prepare()
    assert log.lines == called == []
    assert rows(session.get_bind(), Author.name) == []
    session.commit()
    assert log.lines == ["commit created Author(a)"]
    assert called == ["commit"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_rolling_back_what_was_prepared_is_a_rollback(session: Session, log: Deliveries):
    """The second phase may also be that."""
    session.add(Author(name="a"))
    session.prepare()
    session.rollback()
    assert log.lines == ["rollback created Author(a)"]
    assert rows(session.get_bind(), Author.name) == []


@pytest.mark.skipif(
    before_sqlalchemy("2.0.55"), reason="SQLAlchemy cannot roll back what it failed to prepare"
)
def test_failing_to_prepare_is_a_rollback(session: Session, log: Deliveries):
    """A deferred constraint is checked in the first phase."""
    session.add(Box(name="on no shelf", shelf_id=99))
    # Not the IntegrityError: SQLAlchemy goes on to roll back what could not be prepared.
    with pytest.raises(DBAPIError):
        session.commit()
    session.rollback()
    assert log.lines == ["rollback created Box(on no shelf)"]
    assert rows(session.get_bind(), Box.name) == []
    session.add(Author(name="next"))
    session.commit()
    assert log.lines[1:] == ["commit created Author(next)"]


def test_savepoints_of_a_two_phase_session_are_like_any(session: Session, log: Deliveries):
    """Released ones join, those rolled back vanish."""
    with session.begin_nested():
        session.add(Author(name="released"))
    savepoint = session.begin_nested()
    session.add(Author(name="undone"))
    session.flush()
    savepoint.rollback()
    session.commit()
    assert log.lines == ["rollback created Author(undone)", "commit created Author(released)"]
    assert rows(session.get_bind(), Author.name) == ["released"]


def test_receivers_of_a_two_phase_session_have_one_too(session: Session, log: Deliveries):
    """With its own transaction, committed in two phases, or rolled back."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def works(sender, instance, session, created, **kwargs):
        found.append(session.twophase)
        if created:
            instance.age = 3

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, instance, session, **kwargs):
        session.add(Tag(name="lost"))
        session.flush()
        raise Unwanted

    with session.begin():
        session.add(Author(name="a"))
    assert found == [True, True]
    assert rows(session.get_bind(), Author.name, Author.age) == [("a", 3)]
    assert rows(session.get_bind(), Tag.name) == []


def test_a_two_phase_session_on_two_databases_delivers_when_both_are_committed(
    engine: Engine, installed, log: Deliveries
):
    """That is what two phases are for."""
    name = f"{engine.url.database}_other"
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    other = create_engine(engine.url.set(database=name))
    seen = []
    try:
        Base.metadata.create_all(other)

        @receiver(post_save, sender=[Author, Tag], on="commit")
        def fn(sender, instance, **kwargs):
            seen.append((rows(engine, Author.name), rows(other, Tag.name)))

        with Session(binds={Author: engine, Tag: other}, twophase=True) as session:
            session.add_all([Author(name="a"), Tag(name="t")])
            session.commit()
        assert sorted(log.lines) == ["commit created Author(a)", "commit created Tag(t)"]
        assert seen == [(["a"], ["t"])] * 2
        assert other.pool.checkedout() == 0
    finally:
        other.dispose()
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")

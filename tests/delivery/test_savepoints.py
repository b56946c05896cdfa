"""State belongs to the transaction, and to the savepoint."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, SessionTransaction

from sqla_signals import on_commit, on_rollback, post_save

from ..contract.models import Author
from ..contract.observing import rows
from .models import Box, Shelf
from .observing import Deliveries, Transaction, Unwanted, session_methods


def names(engine: Engine) -> list[str]:
    return rows(engine, Author.name)


# -- each sentence, in every kind of transaction ---------------------------------------------------


def test_a_savepoints_events_join_its_parent_on_release(committing: Transaction, log: Deliveries):
    """They are delivered with the root transaction, in order, and not before."""
    at_release = []

    def work(session: Session) -> None:
        session.add(Author(name="before"))
        session.flush()
        with session.begin_nested():
            session.add(Author(name="inside"))
        at_release.extend(log.lines)
        session.add(Author(name="after"))

    committing(work)
    assert at_release == []
    assert log.lines == [
        "commit created Author(before)",
        "commit created Author(inside)",
        "commit created Author(after)",
    ]
    assert names(committing.engine) == ["after", "before", "inside"]


def test_a_savepoints_events_vanish_when_it_is_rolled_back(
    committing: Transaction, log: Deliveries
):
    """Its rollback receivers are called there and then, its commit receivers never."""
    at_rollback = []

    def work(session: Session) -> None:
        session.add(Author(name="before"))
        savepoint = session.begin_nested()
        session.add(Author(name="inside"))
        session.flush()
        savepoint.rollback()
        at_rollback.extend(log.lines)
        session.add(Author(name="after"))

    committing(work)
    assert at_rollback == ["rollback created Author(inside)"]
    assert log.lines == [
        "rollback created Author(inside)",
        "commit created Author(before)",
        "commit created Author(after)",
    ]
    assert names(committing.engine) == ["after", "before"]


def test_everything_vanishes_when_the_root_transaction_is_undone(
    undoing: Transaction, log: Deliveries
):
    """Closing, resetting, invalidating, leaving a block by an exception: all are a rollback."""
    seen: list[str] = []

    def work(session: Session) -> None:
        session.add(Author(name="outside"))
        session.flush()
        with session.begin_nested():
            session.add(Author(name="inside"))

    undoing(work, after=lambda: seen.extend(log.lines))
    assert seen == log.lines
    assert log.lines == ["rollback created Author(outside)", "rollback created Author(inside)"]
    assert names(undoing.engine) == []


def test_a_savepoint_that_is_still_open_vanishes_with_the_root_transaction(
    undoing: Transaction, log: Deliveries
):
    """The inner one is over first."""

    def work(session: Session) -> None:
        session.add(Author(name="outside"))
        session.flush()
        session.begin_nested()
        session.add(Author(name="inside"))
        session.flush()

    undoing(work)
    assert log.lines == ["rollback created Author(inside)", "rollback created Author(outside)"]
    assert names(undoing.engine) == []


def test_commit_releases_the_savepoints_that_are_still_open(session: Session, log: Deliveries):
    """``Session.commit()`` commits up to the root."""
    session.add(Author(name="outside"))
    session.begin_nested()
    session.add(Author(name="inside"))
    session.begin_nested()
    session.add(Author(name="innermost"))
    session.commit()
    assert log.lines == [
        "commit created Author(outside)",
        "commit created Author(inside)",
        "commit created Author(innermost)",
    ]
    assert names(session.get_bind()) == ["innermost", "inside", "outside"]


# -- three deep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", list(itertools.product([True, False], repeat=3)), ids=str)
def test_three_savepoints_deep_what_remains_is_delivered(
    session: Session, log: Deliveries, released: tuple[bool, bool, bool]
):
    """A row remains if its own savepoint and all those around it were released."""

    def descend(depth: int) -> None:
        if depth == 3:
            return
        savepoint = session.begin_nested()
        session.add(Author(name=f"{depth} before"))
        session.flush()
        descend(depth + 1)
        session.add(Author(name=f"{depth} after"))
        session.flush()
        if released[depth]:
            savepoint.commit()
        else:
            savepoint.rollback()

    session.add(Author(name="root"))
    session.flush()
    descend(0)
    session.commit()

    remaining = next((depth for depth in range(3) if not released[depth]), 3)
    expected = ["root"]
    expected += [f"{depth} before" for depth in range(remaining)]
    expected += [f"{depth} after" for depth in reversed(range(remaining))]
    assert [line for line in log.lines if line.startswith("commit")] == [
        f"commit created Author({name})" for name in expected
    ]
    undone = {f"{depth} {place}" for depth in range(remaining, 3) for place in ("before", "after")}
    rolled_back = [line for line in log.lines if line.startswith("rollback")]
    assert sorted(rolled_back) == sorted(f"rollback created Author({name})" for name in undone)
    assert names(session.get_bind()) == sorted(expected)


def test_rolling_back_an_outer_savepoint_takes_the_open_ones_inside_along(
    session: Session, log: Deliveries
):
    """They cannot outlive it."""
    outer = session.begin_nested()
    session.add(Author(name="outer"))
    session.flush()
    session.begin_nested()
    session.add(Author(name="inner"))
    session.flush()
    outer.rollback()
    session.add(Author(name="kept"))
    session.commit()
    assert sorted(log.lines) == [
        "commit created Author(kept)",
        "rollback created Author(inner)",
        "rollback created Author(outer)",
    ]
    assert names(session.get_bind()) == ["kept"]


def test_releasing_an_outer_savepoint_takes_the_open_ones_inside_along(
    session: Session, log: Deliveries
):
    """They are released with it."""
    outer = session.begin_nested()
    session.add(Author(name="outer"))
    session.begin_nested()
    session.add(Author(name="inner"))
    outer.commit()
    assert log.lines == []
    session.commit()
    assert log.lines == ["commit created Author(outer)", "commit created Author(inner)"]
    assert names(session.get_bind()) == ["inner", "outer"]


def test_nested_rollback_then_commit(session: Session, log: Deliveries):
    """What was before and after the savepoint is delivered."""
    session.add(Author(name="a"))
    with pytest.raises(Unwanted):
        with session.begin_nested():
            session.add(Author(name="b"))
            session.flush()
            raise Unwanted
    session.add(Author(name="c"))
    session.commit()
    assert log.lines == [
        "rollback created Author(b)",
        "commit created Author(a)",
        "commit created Author(c)",
    ]
    assert names(session.get_bind()) == ["a", "c"]


def test_savepoints_one_after_the_other_are_separate(session: Session, log: Deliveries):
    """Each ends as it ends."""
    for number, name in enumerate("abcde"):
        savepoint = session.begin_nested()
        session.add(Author(name=name))
        session.flush()
        if number % 2:
            savepoint.rollback()
        else:
            savepoint.commit()
    session.commit()
    assert [line for line in log.lines if line.startswith("commit")] == [
        f"commit created Author({name})" for name in "ace"
    ]
    assert [line for line in log.lines if line.startswith("rollback")] == [
        f"rollback created Author({name})" for name in "bd"
    ]
    assert names(session.get_bind()) == ["a", "c", "e"]


def test_work_released_by_an_inner_savepoint_and_undone_by_an_outer_is_told_as_undone_once(
    session: Session, log: Deliveries
):
    """By the outer one: only then was it undone."""
    outer = session.begin_nested()
    with session.begin_nested():
        session.add(Author(name="a"))
    assert log.lines == []
    outer.rollback()
    assert log.lines == ["rollback created Author(a)"]
    session.commit()
    assert log.lines == ["rollback created Author(a)"]
    assert names(session.get_bind()) == []


# -- errors ----------------------------------------------------------------------------------------


def test_an_integrity_error_inside_a_savepoint_undoes_the_savepoint_alone(
    committing: Transaction, log: Deliveries
):
    """What its earlier flushes wrote was undone; the failed flush has written nothing."""

    def work(session: Session) -> None:
        session.add(Author(id=1, name="kept"))
        session.flush()
        try:
            with session.begin_nested():
                session.add(Author(id=2, name="undone"))
                session.flush()
                session.execute(Author.__table__.insert().values(id=3, name="by hand"))
                session.add(Author(id=3, name="refused"))
                session.flush()
        except IntegrityError:
            session.add(Author(id=4, name="after"))
        else:
            raise AssertionError

    committing(work)
    assert log.lines == [
        "rollback created Author(undone)",
        "commit created Author(kept)",
        "commit created Author(after)",
    ]
    assert names(committing.engine) == ["after", "kept"]


def test_a_failed_flush_rolls_everything_back(session: Session, log: Deliveries):
    """The flushes before it are told as undone, once, when the session is rolled back."""
    session.execute(Author.__table__.insert().values(id=1, name="there"))
    session.commit()
    session.add(Author(id=2, name="a"))
    session.flush()
    session.add_all([Author(id=3, name="b"), Author(id=1, name="refused")])
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    assert log.lines == ["rollback created Author(a)"]
    session.add(Author(id=2, name="second try"))
    session.commit()
    assert log.lines[1:] == ["commit created Author(second try)"]
    assert names(session.get_bind()) == ["second try", "there"]


@pytest.mark.parametrize("end", session_methods("rollback", "close", "reset"))
def test_a_failed_commit_delivers_nothing_and_its_end_is_a_rollback(
    session: Session, log: Deliveries, end: Callable[[Session], None]
):
    """Here COMMIT itself fails, by a constraint that the database checks only then."""
    if session.get_bind().dialect.name == "sqlite" and end is not Session.rollback:
        pytest.skip("SQLite keeps the transaction open, and SQLAlchemy's close() leaves it so")
    session.add(Shelf(id=1, name="there"))
    session.add(Box(id=1, name="on no shelf", shelf_id=99))
    called = []
    on_commit(session, lambda: called.append("commit"))
    on_rollback(session, lambda: called.append("rollback"))
    with pytest.raises(IntegrityError):
        session.commit()
    end(session)
    assert sorted(log.lines) == [
        "rollback created Box(on no shelf)",
        "rollback created Shelf(there)",
    ]
    assert called == ["rollback"]
    assert rows(session.get_bind(), Shelf.name) == rows(session.get_bind(), Box.name) == []
    session.add(Shelf(name="next"))
    session.commit()
    assert log.lines[2:] == ["commit created Shelf(next)"]
    assert rows(session.get_bind(), Shelf.name) == ["next"]


def test_a_failed_commit_at_the_end_of_a_block_is_a_rollback(
    committing: Transaction, log: Deliveries
):
    """The exception is that of the database, and nothing is committed or delivered as such."""

    def work(session: Session) -> None:
        session.add(Box(id=1, name="on no shelf", shelf_id=99))

    with pytest.raises(IntegrityError):
        committing(work)
    assert log.lines == ["rollback created Box(on no shelf)"]
    assert rows(committing.engine, Box.name) == []


def test_an_exception_in_before_commit_is_a_rollback(session: Session, log: Deliveries):
    """Nothing was committed."""

    def refuse(session: Session) -> None:
        session.flush()
        raise Unwanted

    event.listen(session, "before_commit", refuse)
    session.add(Author(name="a"))
    with pytest.raises(Unwanted):
        session.commit()
    session.rollback()
    assert log.lines == ["rollback created Author(a)"]
    assert names(session.get_bind()) == []


# -- ending the root from inside of savepoints -----------------------------------------------------


def test_rollback_of_the_session_inside_savepoints_undoes_everything(
    session: Session, log: Deliveries
):
    """As ``Session.rollback()`` does."""
    session.add(Author(name="root"))
    session.flush()
    for name in ("first", "second", "third"):
        session.begin_nested()
        session.add(Author(name=name))
        session.flush()
    session.rollback()
    assert sorted(log.lines) == [
        f"rollback created Author({name})" for name in ("first", "root", "second", "third")
    ]
    assert not session.in_transaction()
    session.add(Author(name="next"))
    session.commit()
    assert log.lines[4:] == ["commit created Author(next)"]
    assert names(session.get_bind()) == ["next"]


@pytest.mark.parametrize("end", session_methods("close", "reset", "invalidate"))
def test_a_savepoint_and_then_the_end_of_the_session(
    session: Session, log: Deliveries, end: Callable[[Session], None]
):
    """Released or not, what it holds is undone, and told once."""
    with session.begin_nested():
        session.add(Author(name="released"))
    session.begin_nested()
    session.add(Author(name="open"))
    session.flush()
    end(session)
    assert sorted(log.lines) == [
        "rollback created Author(open)",
        "rollback created Author(released)",
    ]
    assert names(session.get_bind()) == []


def test_a_session_goes_on_after_each_end_with_nothing_left_over(session: Session, log: Deliveries):
    """Commits and rollbacks in turn, with savepoints in between."""
    for number in range(3):
        with session.begin_nested():
            session.add(Author(name=f"undone {number}"))
        session.rollback()
        with session.begin_nested():
            session.add(Author(name=f"kept {number}"))
        session.commit()
    assert log.lines == [
        f"{end} created Author({fate} {number})"
        for number in range(3)
        for end, fate in (("rollback", "undone"), ("commit", "kept"))
    ]
    assert names(session.get_bind()) == ["kept 0", "kept 1", "kept 2"]


def test_a_transaction_without_changes_delivers_nothing(session: Session, log: Deliveries):
    """Also if it ran statements of its own."""
    session.execute(text("SELECT 1"))
    session.commit()
    session.execute(text("SELECT 1"))
    session.rollback()
    assert log.lines == []


def test_two_sessions_at_the_same_time_are_separate(session: Session, log: Deliveries):
    """State belongs to the transaction, not to the thread."""
    engine = session.get_bind()
    with Session(engine) as other:
        other.add(Author(id=1, name="theirs"))
        session.add(Author(id=2, name="mine"))
        session.flush()
        session.rollback()
        assert log.lines == ["rollback created Author(mine)"]
        other.commit()
    assert log.lines[1:] == ["commit created Author(theirs)"]
    assert names(engine) == ["theirs"]


# -- savepoints that are begun again whenever one ends ---------------------------------------------


def restart_whenever_one_ends(session: Session) -> None:
    """As test suites do it that follow the older manuals of SQLAlchemy."""

    @event.listens_for(session, "after_transaction_end")
    def restart(session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested and not transaction.parent.nested:
            session.expire_all()
            session.begin_nested()


@pytest.fixture
def restarting(library: Engine, installed) -> Iterator[Session]:
    """A session in a transaction of a Connection, in a savepoint that is always there."""
    with library.connect() as connection:
        outer = connection.begin()
        with Session(connection) as session:
            session.begin_nested()
            restart_whenever_one_ends(session)
            yield session
        outer.close()


def inside(session: Session) -> list[str]:
    """The names that the outer transaction sees."""
    with Session(session.connection()) as other:
        return sorted(other.scalars(select(Author.name)))


@pytest.fixture
def told() -> list[str]:
    """Both ends, with the names, which are loaded: that fixture expires all instances."""
    found: list[str] = []
    for end in ("commit", "rollback"):
        post_save.connect(
            lambda sender, instance, end=end, **kwargs: found.append(f"{end} {instance.name}"),
            sender=Author,
            on=end,
            weak=False,
        )
    return found


def test_a_commit_with_savepoints_that_are_begun_again_is_a_commit(
    restarting: Session, told: list[str]
):
    """The root is committed although another savepoint was begun before that."""
    for name in ("a", "b"):
        restarting.add(Author(name=name))
        on_commit(restarting, functools.partial(told.append, f"called back for {name}"))
        on_rollback(restarting, functools.partial(told.append, f"undone {name}"))
        restarting.commit()
        assert told[-2:] == [f"commit {name}", f"called back for {name}"]
    assert len(told) == 4
    assert inside(restarting) == ["a", "b"]


def test_a_rollback_with_savepoints_that_are_begun_again_is_a_rollback(
    restarting: Session, told: list[str]
):
    """SQLAlchemy goes up to the root, and so to the transaction of the Connection."""
    restarting.add(Author(name="a"))
    restarting.commit()
    restarting.add(Author(name="b"))
    restarting.flush()
    restarting.rollback()
    assert told == ["commit a", "rollback b"]
    assert inside(restarting) == []


def test_savepoints_inside_of_those_that_are_begun_again_are_like_any(
    restarting: Session, told: list[str]
):
    """Released ones join, those rolled back vanish."""
    with restarting.begin_nested():
        restarting.add(Author(name="released"))
    savepoint = restarting.begin_nested()
    restarting.add(Author(name="undone"))
    restarting.flush()
    savepoint.rollback()
    restarting.commit()
    assert told == ["rollback undone", "commit released"]
    assert inside(restarting) == ["released"]


def test_a_savepoint_of_the_connection_that_is_begun_again_is_no_other_matter(
    library: Engine, installed, log: Deliveries
):
    """The session joins it with one of its own."""
    with library.connect() as connection:
        outer = connection.begin()
        nested = [connection.begin_nested()]
        with Session(connection) as session:

            @event.listens_for(session, "after_transaction_end")
            def restart(session: Session, transaction: SessionTransaction) -> None:
                if not nested[0].is_active:
                    nested[0] = connection.begin_nested()

            for name in ("a", "b"):
                session.add(Author(name=name))
                session.commit()
            assert log.lines == ["commit created Author(a)", "commit created Author(b)"]
            assert inside(session) == ["a", "b"]
        outer.rollback()
    assert names(library) == []

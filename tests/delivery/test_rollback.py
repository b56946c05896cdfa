"""``on="rollback"``, for work that was undone."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import Engine, inspect
from sqlalchemy.orm import Session, object_session
from sqlalchemy.orm.exc import DetachedInstanceError

from sqla_signals import UNSET, Change, on_rollback, post_delete, post_save, receiver
from sqla_signals import receiver_failed as receiver_failed_signal

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .models import Document
from .observing import Deliveries, Transaction, Unwanted


def test_rollback_receivers_are_called_for_work_undone_before_the_call_returns(
    undoing: Transaction, log: Deliveries
):
    """Once per row, in the order of first occurrence, with the net change."""
    returned: list[str] = []

    def work(session: Session) -> None:
        author = Author(id=1, name="a")
        session.add(author)
        session.flush()
        session.add(Tag(name="t"))
        session.flush()
        author.name = "b"
        session.flush()

    undoing(work, after=lambda: returned.extend(log.lines))
    assert returned == log.lines == ["rollback created Author(b)", "rollback created Tag(t)"]
    assert log.calls[0].changes["name"] == Change(UNSET, "b")
    assert rows(undoing.engine, Author.name) == []


def test_the_instance_is_detached_and_there_is_no_session(undoing: Transaction):
    """The outer transaction of a savepoint may still hold its locks, so none is opened."""
    found = []

    @receiver(post_save, sender=Author, on="rollback")
    def fn(sender, instance, session, created, using, signal, **kwargs):
        found.append((instance.name, instance.id, session, created, signal is post_save))
        assert inspect(instance).detached
        assert object_session(instance) is None
        assert using.dialect.name == undoing.engine.dialect.name
        with pytest.raises(DetachedInstanceError):
            instance.books

    def work(session: Session) -> None:
        session.add(Author(id=1, name="a"))
        session.flush()

    undoing(work)
    assert found == [("a", 1, None, True, True)]
    assert rows(undoing.engine, Author.name) == []


def test_a_deletion_that_was_undone_is_told_with_what_was_deleted(undoing: Transaction):
    """The row is there again."""
    with undoing.engine.begin() as connection:
        connection.execute(Author.__table__.insert().values(id=1, name="a", age=3))
    found = []

    @receiver(post_delete, sender=Author, on="rollback")
    def fn(sender, instance, session, origin, **kwargs):
        found.append((instance.name, instance.age, session, origin))

    def work(session: Session) -> None:
        session.delete(session.get(Author, 1))
        session.flush()

    undoing(work)
    assert found == [("a", 3, None, None)]
    assert rows(undoing.engine, Author.name) == ["a"]


def test_nothing_is_told_as_undone_when_it_is_committed(committing: Transaction, log: Deliveries):
    """One end or the other, never both."""

    def work(session: Session) -> None:
        with session.begin_nested():
            session.add(Author(name="a"))

    committing(work)
    assert log.lines == ["commit created Author(a)"]
    assert rows(committing.engine, Author.name) == ["a"]


def test_work_that_was_never_flushed_was_not_undone(session: Session, log: Deliveries):
    """No row was written."""
    session.add(Author(name="a"))
    session.rollback()
    assert log.lines == []
    assert rows(session.get_bind(), Author.name) == []


def test_a_savepoints_work_is_told_when_it_is_undone_while_the_outer_work_goes_on(
    session: Session, library: Engine
):
    """The receiver runs inside the outer transaction, which others do not see yet."""
    found = []

    @receiver(post_save, sender=Author, on="rollback")
    def fn(sender, instance, **kwargs):
        found.append((instance.name, rows(library, Author.name)))

    session.add(Author(name="outer"))
    session.flush()
    savepoint = session.begin_nested()
    session.add(Author(name="inner"))
    session.flush()
    savepoint.rollback()
    assert found == [("inner", [])]
    session.commit()
    assert found == [("inner", [])]
    assert rows(library, Author.name) == ["outer"]


def test_the_session_may_be_used_by_whoever_undid_a_savepoint(session: Session, log: Deliveries):
    """A rollback receiver leaves no trace in it."""
    session.add(Author(name="kept"))
    with pytest.raises(Unwanted):
        with session.begin_nested():
            session.add(Author(name="undone"))
            session.flush()
            raise Unwanted
    assert [author.name for author in session.query(Author)] == ["kept"]
    session.commit()
    assert log.lines == ["rollback created Author(undone)", "commit created Author(kept)"]
    assert rows(session.get_bind(), Author.name) == ["kept"]


def test_a_rollback_receiver_that_raises_is_logged_and_the_others_run(
    undoing: Transaction, log: Deliveries, caplog: pytest.LogCaptureFixture
):
    """The rollback does not fail either."""
    failed, called = [], []

    def note(sender, **kwargs):
        failed.append((sender, kwargs["receiver"], kwargs["signal"]))

    def fails(sender, **kwargs):
        raise Unwanted("the reason")

    @receiver(post_save, sender=Author, on="rollback")
    def last(sender, instance, **kwargs):
        called.append(instance.name)

    post_save.disconnect(last)
    post_save.connect(fails, Author, weak=False, on="rollback", name="shop.undo")
    post_save.connect(last, Author, weak=False, on="rollback")
    receiver_failed_signal.connect(note, weak=False)

    def work(session: Session) -> None:
        session.add(Author(name="a"))
        session.flush()
        on_rollback(session, lambda: called.append("callback"))

    try:
        undoing(work)
    finally:
        receiver_failed_signal.disconnect(note)
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert record.levelno == logging.ERROR
    assert "shop.undo" in record.getMessage()
    assert "rollback" in record.getMessage()
    assert failed == [(Author, fails, post_save)]
    assert log.lines == ["rollback created Author(a)"]
    assert called == ["a", "callback"]
    assert rows(undoing.engine, Author.name) == []


def test_an_interruption_in_a_rollback_receiver_passes_through(session: Session, log: Deliveries):
    """The transaction is rolled back all the same, and the next one is clean."""

    @receiver(post_save, sender=Author, on="rollback")
    def fn(sender, **kwargs):
        raise KeyboardInterrupt

    session.add(Author(name="a"))
    session.flush()
    with pytest.raises(KeyboardInterrupt):
        session.rollback()
    assert session.get_bind().pool.checkedout() == 0
    post_save.disconnect(fn)
    log.clear()
    session.rollback()
    session.add(Author(name="b"))
    session.commit()
    assert log.lines == ["commit created Author(b)"]
    assert rows(session.get_bind(), Author.name) == ["b"]


def test_a_rollback_receiver_may_work_in_a_session_it_opens(session: Session, library: Engine):
    """Once the whole transaction is undone, no lock is in its way."""

    @receiver(post_save, sender=Author, on="rollback")
    def fn(sender, instance, **kwargs):
        with Session(library) as own, own.begin():
            own.add(Tag(name=f"undone: {instance.name}"))

    session.add(Author(name="a"))
    session.flush()
    session.rollback()
    assert rows(library, Tag.name) == ["undone: a"]
    assert rows(library, Author.name) == []


def test_the_values_are_those_that_were_written(session: Session):
    """Not those that were assigned and never flushed."""
    found = []

    @receiver(post_save, sender=Document, on="rollback")
    def fn(sender, instance, **kwargs):
        found.append((instance.name, instance.plain, dict(instance.tracked)))

    document = Document(name="a", plain={"n": 1}, tracked={"n": 1})
    session.add(document)
    session.flush()
    document.name = "never written"
    document.plain["n"] = document.tracked["n"] = 2
    session.rollback()
    assert found == [("a", {"n": 1}, {"n": 1})]
    assert rows(session.get_bind(), Document.name) == []


def test_each_rollback_receiver_has_an_instance_of_its_own(session: Session):
    """What one does to it, the others and the session do not see."""
    found = []

    def fn(sender, instance, **kwargs):
        found.append((instance, instance.name))
        instance.name = "spoiled"

    post_save.connect(fn, Author, weak=False, on="rollback")
    post_save.connect(lambda s, **kw: fn(s, **kw), Author, weak=False, on="rollback")
    author = Author(name="a")
    session.add(author)
    session.flush()
    session.rollback()
    assert [name for _, name in found] == ["a", "a"]
    assert len({id(instance) for instance, _ in found} | {id(author)}) == 3
    assert author.name == "a"


def test_work_that_was_undone_may_be_done_again(session: Session, log: Deliveries):
    """The instances are transient again, as after any rollback."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    session.rollback()
    session.add(author)
    session.commit()
    assert log.lines == ["rollback created Author(a)", "commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]

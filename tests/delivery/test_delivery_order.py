"""When and in which order ``on="commit"`` receivers are called, and with what."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import (
    UNSET,
    Change,
    on_commit,
    post_delete,
    post_save,
    pre_save,
    receiver,
)
from sqla_signals.errors import ReceiverOptionError

from ..contract.models import Author, Book, Tag
from ..contract.observing import rows
from .observing import Deliveries, Transaction

# -- each sentence, in every kind of transaction ---------------------------------------------------


def test_delivery_is_at_the_end_of_the_root_transaction_before_commit_returns(
    committing: Transaction, log: Deliveries
):
    """Not when something is flushed, and not some time later."""
    flushed, returned = [], []

    def work(session: Session) -> None:
        session.add(Author(name="a"))
        session.flush()
        flushed.extend(log.lines)

    committing(work, after=lambda: returned.extend(log.lines))
    assert flushed == []
    assert returned == log.lines == ["commit created Author(a)"]


def test_what_was_committed_is_there_for_everybody_when_a_receiver_is_called(
    committing: Transaction,
):
    """Another connection sees the rows, and no lock is held any more."""
    seen = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        seen.append(rows(committing.engine, Author.name))
        with committing.engine.begin() as other:
            other.execute(Author.__table__.update().values(age=len(seen)))

    def work(session: Session) -> None:
        session.add_all([Author(name="a"), Author(name="b")])

    committing(work)
    assert seen == [["a", "b"], ["a", "b"]]
    assert rows(committing.engine, Author.age) == [2, 2]


def test_the_callbacks_come_after_the_receivers(committing: Transaction, log: Deliveries):
    """In the order of registration, however the changes were in between."""
    order: list[str] = []

    def work(session: Session) -> None:
        on_commit(session, lambda: order.append(f"first, after {len(log.calls)} receivers"))
        session.add(Author(name="a"))
        session.flush()
        on_commit(session, lambda: order.append("second"))
        session.add(Author(name="b"))

    committing(work)
    assert order == ["first, after 2 receivers", "second"]
    assert log.lines == ["commit created Author(a)", "commit created Author(b)"]
    assert rows(committing.engine, Author.name) == ["a", "b"]


def test_rows_come_in_the_order_of_first_occurrence_and_receivers_in_that_of_connection(
    committing: Transaction,
):
    """One row after the other, each with all its receivers, saves and deletes alike."""
    with committing.engine.begin() as connection:
        connection.execute(Author.__table__.insert().values(id=1, name="old"))
    order = []

    def note(letter: str) -> Any:
        def fn(sender, instance, **kwargs):
            order.append(f"{letter} {sender.__name__}({instance.name})")

        return fn

    for letter, signal, sender in (
        ("a", post_save, Author),
        ("b", post_delete, None),
        ("c", post_save, None),
        ("d", [post_save, post_delete], [Author, Tag]),
    ):
        receiver(signal, sender=sender, on="commit")(note(letter))

    def work(session: Session) -> None:
        session.add(Tag(name="t"))
        session.flush()
        session.delete(session.get(Author, 1))
        session.flush()
        session.add(Author(id=2, name="new"))

    committing(work)
    assert order == [
        "c Tag(t)",
        "d Tag(t)",
        "b Author(old)",
        "d Author(old)",
        "a Author(new)",
        "c Author(new)",
        "d Author(new)",
    ]
    assert rows(committing.engine, Author.name) == ["new"]


def test_flush_and_commit_receivers_are_told_of_the_same_rows(committing: Transaction):
    """The same function may be connected for both."""
    told = []

    def fn(sender, instance, session, created, **kwargs):
        told.append((instance.name, created, session.in_nested_transaction()))

    post_save.connect(fn, Author, weak=False)
    post_save.connect(fn, Author, weak=False, on="commit")
    committing(lambda session: session.add(Author(name="a")))
    assert told == [("a", True, False), ("a", True, False)]
    assert rows(committing.engine, Author.name) == ["a"]


# -- arguments -------------------------------------------------------------------------------------


def test_a_save_carries_what_the_flush_signal_carries(session: Session):
    """The same names, with the meanings of the net change."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, **kwargs):
        found.append((sender, kwargs))

    session.add(Author(id=1, name="a"))
    session.commit()
    session.get(Author, 1).name = "b"
    session.commit()
    (first_sender, first), (second_sender, second) = found
    assert first_sender is second_sender is Author
    for arguments in (first, second):
        assert sorted(arguments) == sorted(post_save.arguments)
        assert arguments["signal"] is post_save
        assert arguments["using"] is session.get_bind()
        assert arguments["raw"] is False
        assert isinstance(arguments["instance"], Author)
        assert type(arguments["session"]) is Session
        assert arguments["session"] is not session
    assert (first["created"], second["created"]) == (True, False)
    assert first["update_fields"] is None
    assert second["update_fields"] == {"name"}
    assert first["changes"]["name"] == Change(UNSET, "a")
    assert second["changes"] == {"name": Change("a", "b")}
    assert rows(session.get_bind(), Author.name) == ["b"]


def test_a_deletion_carries_what_the_flush_signal_carries(session: Session):
    """The same names."""
    author = Author(name="a")
    session.add(author)
    session.commit()
    found = []

    @receiver(post_delete, sender=Author, on="commit")
    def fn(sender, **kwargs):
        found.append((sender, kwargs))

    session.delete(author)
    session.commit()
    ((sender, arguments),) = found
    assert sender is Author
    assert sorted(arguments) == sorted(post_delete.arguments)
    assert arguments["signal"] is post_delete
    assert arguments["using"] is session.get_bind()
    assert arguments["origin"] is None
    assert arguments["instance"] is not author
    assert rows(session.get_bind(), Author.name) == []


def test_changes_cannot_be_spoiled_for_the_next_receiver(session: Session):
    """Each gets its own mapping."""
    found = []

    def fn(sender, changes, **kwargs):
        found.append(dict(changes))
        with pytest.raises(TypeError):
            changes["name"] = Change(1, 2)

    post_save.connect(fn, Author, weak=False, on="commit")
    post_save.connect(lambda s, **kw: fn(s, **kw), Author, weak=False, on="commit")
    session.add(Author(id=1, name="a"))
    session.commit()
    assert found[0] == found[1]
    assert found[0]["name"] == Change(UNSET, "a")
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_raw_work_is_delivered_as_raw(session: Session, log: Deliveries):
    """It is raw if all that was written to the row was."""
    with sqla_signals.raw(session):
        raw, touched = Author(id=1, name="raw"), Author(id=2, name="touched")
        session.add_all([raw, touched])
    touched.age = 3
    session.commit()
    assert [(call.line, call.raw) for call in log.calls] == [
        ("commit created Author(raw)", True),
        ("commit created Author(touched)", False),
    ]
    assert rows(session.get_bind(), Author.name) == ["raw", "touched"]


def test_before_signals_take_only_the_flush():
    """There is nothing to come before, once it was committed."""
    for end in ("commit", "rollback"):
        with pytest.raises(ReceiverOptionError, match="on="):
            pre_save.connect(lambda sender, **kwargs: None, weak=False, on=end)


# -- next to other listeners -----------------------------------------------------------------------


def test_a_listener_to_after_commit_does_not_disturb_delivery(session: Session, log: Deliveries):
    """SQLAlchemy's own event comes before; what it does to the instances does not matter."""

    @event.listens_for(session, "after_commit")
    def after_commit(session: Session) -> None:
        assert log.lines == []
        author.name = "changed after the commit"

    author = Author(name="a")
    session.add(author)
    session.commit()
    assert log.lines == ["commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_change_made_in_before_commit_is_delivered(session: Session, log: Deliveries):
    """It is flushed and committed, so it counts."""

    @event.listens_for(session, "before_commit")
    def before_commit(session: Session) -> None:
        session.add(Author(name="late"))

    session.add(Author(name="a"))
    session.commit()
    assert log.lines == ["commit created Author(a)", "commit created Author(late)"]
    assert rows(session.get_bind(), Author.name) == ["a", "late"]


def test_what_a_flush_receiver_adds_is_delivered(session: Session, log: Deliveries):
    """``commit()`` flushes until clean."""

    @receiver(post_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        session.add(Book(name=f"by {instance.name}", author=instance))

    session.add(Author(name="a"))
    session.commit()
    assert log.lines == ["commit created Author(a)", "commit created Book(by a)"]
    assert rows(session.get_bind(), Book.name) == ["by a"]


def test_the_instances_of_the_session_that_did_the_work_are_left_alone(
    session: Session, library: Engine
):
    """They are what they are after a commit without receivers: expired, and in their session."""
    given = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        given.append(instance is author)
        instance.name = "changed by the receiver"
        fn_done.append(True) if instance.age else setattr(instance, "age", 1)

    fn_done: list[bool] = []
    author = Author(name="a")
    session.add(author)
    session.commit()
    assert author in session
    assert "name" not in author.__dict__
    assert author.name == "changed by the receiver"
    assert given[0] is False
    assert rows(library, Author.name) == ["changed by the receiver"]

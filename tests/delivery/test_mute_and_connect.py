"""Who is called, when that changes between the change and its delivery."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from sqlalchemy import Engine, event, inspect, select, update
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import Change, mute, on_commit, post_delete, post_save, receiver

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .observing import Deliveries, Transaction, deliveries

A_TO_AA = (
    update(Author).where(Author.name == "A").values(name="AA").execution_options(signals="skip")
)

# -- mute ------------------------------------------------------------------------------------------


def test_mute_counts_when_the_change_happens(committing: Transaction, log: Deliveries):
    """What is flushed inside the block is not delivered, although it is committed outside."""

    def work(session: Session) -> None:
        with mute():
            session.add(Author(name="muted"))
            session.flush()
        session.add(Author(name="heard"))

    committing(work)
    assert log.lines == ["commit created Author(heard)"]
    assert rows(committing.engine, Author.name) == ["heard", "muted"]


def test_a_mute_that_counts_for_an_undone_change_counts_for_its_rollback(
    undoing: Transaction, log: Deliveries
):
    """The same rule for the other end."""

    def work(session: Session) -> None:
        with mute():
            session.add(Author(name="muted"))
            session.flush()
        session.add(Author(name="heard"))
        session.flush()

    undoing(work)
    assert log.lines == ["rollback created Author(heard)"]
    assert rows(undoing.engine, Author.name) == []


def test_a_mute_around_commit_silences_only_what_commit_flushes(session: Session, log: Deliveries):
    """What was flushed before is delivered inside the block."""
    session.add(Author(name="before"))
    session.flush()
    session.add(Author(name="flushed by commit"))
    with mute():
        session.commit()
    assert log.lines == ["commit created Author(before)"]
    assert rows(session.get_bind(), Author.name) == ["before", "flushed by commit"]


def test_a_row_of_which_one_change_was_heard_is_delivered_with_its_net_effect(
    session: Session, log: Deliveries
):
    """There is one call, and it tells what has become of the row."""
    author = Author(name="a")
    session.add(author)
    with mute():
        session.flush()
    author.age = 3
    session.flush()
    with mute():
        author.name = "b"
        session.flush()
    session.commit()
    assert log.lines == ["commit created Author(b)"]
    assert log.only.changes["age"].new == 3
    assert rows(session.get_bind(), Author.name, Author.age) == [("b", 3)]


def test_a_muted_deletion_of_a_row_that_was_created_aloud_leaves_nothing(
    session: Session, log: Deliveries
):
    """Nobody is told of a row that is not there."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    with mute():
        session.delete(author)
        session.flush()
    session.commit()
    assert log.lines == []
    assert rows(session.get_bind(), Author.name) == []


@pytest.mark.parametrize("by", ["signal", "sender", "receiver", "name"])
def test_a_mute_silences_what_it_names_and_nothing_else(session: Session, by: str):
    """At the delivery of what happened inside it as in the flush."""
    heard = []

    @receiver([post_save, post_delete], on="commit", name="the one")
    def one(sender, signal, **kwargs):
        heard.append(f"one {signal.name} {sender.__name__}")

    @receiver([post_save, post_delete], on="commit")
    def two(sender, signal, **kwargs):
        heard.append(f"two {signal.name} {sender.__name__}")

    session.execute(Tag.__table__.insert().values(id=1, name="t"))
    tag = session.get(Tag, 1)
    named: dict[str, dict[str, Any]] = {
        "signal": {"signal": post_save},
        "sender": {"sender": Author},
        "receiver": {"receiver": one},
        "name": {"receiver": "the one"},
    }
    with mute(**named[by]):
        session.add(Author(name="a"))
        session.delete(tag)
        session.flush()
    session.commit()
    authors = ["one post_save Author", "two post_save Author"]
    tags = ["one post_delete Tag", "two post_delete Tag"]
    expected = {
        "signal": tags,
        "sender": tags,
        "receiver": [authors[1], tags[1]],
        "name": [authors[1], tags[1]],
    }
    assert heard == expected[by]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_mute_does_not_silence_callbacks(session: Session):
    """They are not signals."""
    called = []
    with mute():
        on_commit(session, lambda: called.append(True))
        session.add(Author(name="a"))
        session.commit()
    assert called == [True]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_receivers_work_is_not_muted_by_what_was_muted_around_the_commit_it_follows(
    session: Session,
):
    """Its own changes happen where it runs: inside the block if ``commit()`` is."""
    log = deliveries(ends=["commit"], sender=Tag)

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        session.add(Tag(name=instance.name))

    session.add(Author(name="outside"))
    with mute(sender=Tag):
        session.flush()
    session.commit()
    session.add(Author(name="inside"))
    session.flush()
    with mute(sender=Tag):
        session.commit()
    assert log.lines == ["commit created Tag(outside)"]
    assert rows(session.get_bind(), Tag.name) == ["inside", "outside"]


# -- connecting and disconnecting ------------------------------------------------------------------


def test_a_receiver_connected_between_flush_and_commit_is_called(
    committing: Transaction, log: Deliveries
):
    """A commit delivery uses the receivers there are when it begins."""
    called = []

    def late(sender, instance, **kwargs):
        called.append(instance.name)

    def work(session: Session) -> None:
        session.add(Author(name="a"))
        session.flush()
        post_save.connect(late, Author, weak=False, on="commit")

    committing(work)
    assert called == ["a"]
    assert rows(committing.engine, Author.name) == ["a"]


def test_a_receiver_disconnected_before_delivery_is_not_called(
    committing: Transaction, log: Deliveries
):
    """The others are."""
    called = []

    @receiver(post_save, sender=Author, on="commit")
    def gone(sender, instance, **kwargs):
        called.append(instance.name)

    def work(session: Session) -> None:
        session.add(Author(name="a"))
        session.flush()
        assert post_save.disconnect(gone)

    committing(work)
    assert called == []
    assert log.lines == ["commit created Author(a)"]
    assert rows(committing.engine, Author.name) == ["a"]


def test_a_receiver_connected_during_delivery_waits_for_the_next(session: Session):
    """Also if there are more rows to come in this one."""
    called = []

    def late(sender, instance, **kwargs):
        called.append(instance.name)

    @receiver(post_save, sender=[Author, Tag], on="commit")
    def connects(sender, instance, session, **kwargs):
        post_save.connect(late, [Author, Tag], weak=False, on="commit")
        if sender is Author:
            session.add(Tag(name=f"for {instance.name}"))

    session.add_all([Author(name="a"), Author(name="b")])
    session.commit()
    assert called == ["for a", "for b"]
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


def test_a_receiver_disconnected_during_delivery_is_called_for_the_rest_of_it(session: Session):
    """It was there when it began."""
    called = []

    @receiver(post_save, sender=[Author, Tag], on="commit")
    def disconnects(sender, instance, session, **kwargs):
        post_save.disconnect(gone)
        if sender is Author:
            session.add(Tag(name=f"for {instance.name}"))

    @receiver(post_save, sender=[Author, Tag], on="commit")
    def gone(sender, instance, **kwargs):
        called.append(instance.name)

    session.add_all([Author(name="a"), Author(name="b")])
    session.commit()
    assert called == ["a", "b"]
    assert rows(session.get_bind(), Tag.name) == ["for a", "for b"]


def test_a_receiver_that_is_garbage_by_then_is_not_called(session: Session, log: Deliveries):
    """It was connected weakly, as blinker does."""
    called = []

    class Weak:
        def saved(self, sender, instance, **kwargs):
            called.append(instance.name)

    weak = Weak()
    post_save.connect(weak.saved, Author, on="commit")
    session.add(Author(name="a"))
    session.flush()
    del weak
    gc.collect()
    session.commit()
    assert called == []
    assert log.lines == ["commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_receiver_of_the_other_end_may_be_connected_late(session: Session):
    """That of the rollback, where only one of the commit was there in the flush."""
    called = []

    @receiver(post_save, sender=Author, on="commit")
    def committed(sender, **kwargs):
        called.append("commit")

    session.add(Author(name="a"))
    session.flush()

    @receiver(post_save, sender=Author, on="rollback")
    def rolled_back(sender, instance, changes, **kwargs):
        called.append(("rollback", inspect(instance).identity, changes["name"].new))

    session.rollback()
    assert called == [("rollback", (1,), "a")]
    assert rows(session.get_bind(), Author.name) == []


# -- installing and removing -----------------------------------------------------------------------


def test_an_installation_removed_before_the_commit_delivers_nothing(library: Engine):
    """And keeps nothing for the next one."""
    log = deliveries()
    installation = sqla_signals.install()
    with Session(library) as session:
        session.add(Author(name="a"))
        session.flush()
        installation.remove()
        session.commit()
        assert log.lines == []
        sqla_signals.install()
        session.add(Author(name="b"))
        session.commit()
    assert log.lines == ["commit created Author(b)"]
    assert rows(library, Author.name) == ["a", "b"]


def test_an_installation_made_before_the_commit_tells_what_it_has_seen(library: Engine):
    """What was flushed earlier, it has not."""
    log = deliveries()
    first = sqla_signals.install()
    first.remove()
    with Session(library) as session:
        session.add(Author(name="before"))
        session.flush()
        sqla_signals.install()
        session.add(Author(name="after"))
        session.commit()
    assert log.lines == ["commit created Author(after)"]
    assert rows(library, Author.name) == ["after", "before"]


def test_a_receiver_may_remove_the_installation_that_calls_it(library: Engine):
    """What it delivers is delivered; the next transaction is not listened to."""
    log = deliveries()
    installation = sqla_signals.install()

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, **kwargs):
        installation.remove()

    with Session(library) as session:
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
        assert log.lines == ["commit created Author(a)", "commit created Author(b)"]
        session.add(Author(name="c"))
        session.commit()
    assert len(log.lines) == 2
    assert rows(library, Author.name) == ["a", "b", "c"]


def test_overlapping_installations_deliver_once(library: Engine, installed):
    """All sessions, their class, and this one."""
    log = deliveries()
    with Session(library) as session:
        sqla_signals.install(Session)
        sqla_signals.install(session)
        called = []
        session.add(Author(name="a"))
        on_commit(session, lambda: called.append(True))
        session.commit()
        session.get(Author, 1).name = "b"
        session.flush()
        session.rollback()
    assert log.lines == ["commit created Author(a)", "rollback updated Author(b)"]
    assert log.calls[1].changes == {"name": Change("a", "b")}
    assert called == [True]
    assert rows(library, Author.name) == ["a"]


def keep_what_happens_to_authors() -> None:
    """Though nobody waits for its commit."""
    for signal in (post_save, post_delete):
        signal.connect(lambda sender, **kwargs: None, sender=Author, on="rollback", weak=False)


def connect_late(found: list[tuple[str, Any]]) -> None:
    """Note from now on which authors a commit has saved and deleted."""

    def saved(sender, instance, **kwargs):
        found.append(("saved", instance.name))

    def deleted(sender, instance, **kwargs):
        found.append(("deleted", instance.name))

    post_save.connect(saved, sender=Author, on="commit", weak=False)
    post_delete.connect(deleted, sender=Author, on="commit", weak=False)


def test_who_connects_while_a_commit_waits_its_turn_gets_the_values_that_it_committed(
    session: Session,
):
    """Whatever has become of the rows in between."""
    found: list[tuple[str, Any]] = []
    session.add_all([Author(name="a"), Author(name="b")])
    session.commit()
    keep_what_happens_to_authors()

    @receiver(post_save, sender=Tag, on="commit")
    def fn(sender, session, **kwargs):
        with Session(session.get_bind()) as other:
            author, another = other.scalars(select(Author).order_by(Author.name))
            author.name = "A"
            another.name = "never committed"
            other.flush()
            other.execute(A_TO_AA)
            other.delete(another)
            other.commit()
            connect_late(found)
            other.delete(author)
            other.commit()

    session.add(Tag(name="t"))
    session.commit()
    assert found == [("saved", "AA"), ("deleted", "b"), ("deleted", "AA")]
    assert rows(session.get_bind(), Author.name) == []


@pytest.mark.parametrize("when", ["before_commit", "after_commit"])
def test_who_connects_on_the_way_to_the_delivery_gets_the_committed_values(
    session: Session, when: str
):
    """Also where nobody else waits for that commit."""
    found: list[tuple[str, Any]] = []
    session.add_all([author := Author(name="a"), another := Author(name="b")])
    session.commit()
    keep_what_happens_to_authors()

    @event.listens_for(session, when)
    def connect(session: Session) -> None:
        connect_late(found)

    assert (author.name, another.name) == ("a", "b")
    author.name = "A"
    another.name = "never committed"
    session.flush()
    session.execute(A_TO_AA)
    session.delete(another)
    session.commit()
    assert found == [("saved", "AA"), ("deleted", "b")]
    assert rows(session.get_bind(), Author.name) == ["AA"]

"""What happens when a commit receiver raises."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

import sqla_signals
from sqla_signals import (
    ReceiverTypeError,
    on_commit,
    post_delete,
    post_save,
    receiver,
    receiver_failed,
)

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .models import Box, Coin
from .observing import Deliveries, Transaction, Unwanted


@pytest.fixture
def failures() -> Any:
    """What ``receiver_failed`` sends."""
    sent: list[tuple[Any, dict[str, Any]]] = []

    def failed(sender: Any, **kwargs: Any) -> None:
        sent.append((sender, kwargs))

    receiver_failed.connect(failed, weak=False)
    yield sent
    receiver_failed.disconnect(failed)


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "sqla_signals"]


def test_commit_does_not_fail_because_it_did_not(committing: Transaction, log: Deliveries):
    """The exception stays with the receiver; the others run."""

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, session, **kwargs):
        session.add(Tag(name="lost"))
        raise Unwanted

    @receiver(post_save, sender=Author, on="commit")
    def works(sender, session, **kwargs):
        session.add(Tag(name="kept"))

    called = []

    def work(session: Session) -> str:
        session.add_all([Author(name="a"), Author(name="b")])
        on_commit(session, lambda: called.append(True))
        return "result"

    assert committing(work) == "result"
    assert [line for line in log.lines if "Author" in line] == [
        "commit created Author(a)",
        "commit created Author(b)",
    ]
    assert called == [True]
    assert rows(committing.engine, Author.name) == ["a", "b"]
    assert rows(committing.engine, Tag.name) == ["kept", "kept"]


def test_a_failure_is_logged_once_with_the_receivers_name(
    committing: Transaction, caplog: pytest.LogCaptureFixture
):
    """With the signal, the sender, the key and the traceback, in the text and as fields."""

    @receiver(post_save, sender=Author, on="commit", name="shop.reindex")
    def fails(sender, **kwargs):
        raise Unwanted("the reason")

    committing(lambda session: session.add(Author(name="a")))
    (record,) = records(caplog)
    assert record.levelno == logging.ERROR
    for part in ("shop.reindex", "test_failures.py:", "post_save", "commit", "Author"):
        assert part in record.getMessage()
    assert "Author 1;" in record.getMessage()
    assert (record.signal, record.phase, record.sender) == ("post_save", "commit", "Author")
    assert record.primary_key == (1,)
    assert record.receiver.startswith("shop.reindex (")
    assert isinstance(record.exc_info[1], Unwanted)
    assert "the reason" in caplog.text
    assert rows(committing.engine, Author.name) == ["a"]


def test_a_key_forges_no_line_of_the_log(committing: Transaction, caplog: pytest.LogCaptureFixture):
    """A primary key may be what a user has typed, with line breaks and escapes of terminals."""

    @receiver(post_save, sender=Coin, on="commit")
    def fails(sender, **kwargs):
        raise Unwanted("the reason")

    committing(lambda session: session.add(Coin(code="a\nERROR b\x1b[2J")))
    (record,) = records(caplog)
    assert r"Coin a\nERROR b\x1b[2J;" in record.getMessage()
    assert rows(committing.engine, Coin.code) == ["a\nERROR b\x1b[2J"]


def test_a_failure_is_sent_as_receiver_failed(committing: Transaction, failures):
    """With the model as the sender."""

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, **kwargs):
        raise error

    error = Unwanted()
    committing(lambda session: session.add(Author(name="a")))
    ((sender, arguments),) = failures
    assert sender is Author
    assert sorted(arguments) == sorted(receiver_failed.arguments)
    assert arguments["receiver"] is fails
    assert arguments["signal"] is post_save
    assert arguments["exception"] is error
    assert arguments["instance"].name == "a"
    assert rows(committing.engine, Author.name) == ["a"]


def test_the_failure_of_a_deletes_receiver_is_told_alike(
    session: Session, failures, caplog: pytest.LogCaptureFixture
):
    """By the signal that it was called for."""

    @receiver(post_delete, sender=Author, on="commit")
    def fails(sender, **kwargs):
        raise Unwanted

    author = Author(name="a")
    session.add(author)
    session.commit()
    session.delete(author)
    session.commit()
    ((sender, arguments),) = failures
    assert (sender, arguments["signal"]) == (Author, post_delete)
    assert arguments["instance"].name == "a"
    assert len(records(caplog)) == 1
    assert rows(session.get_bind(), Author.name) == []


def test_each_failure_is_told_on_its_own(
    session: Session, failures, caplog: pytest.LogCaptureFixture
):
    """One record and one signal per call that failed, in the order of the calls."""

    def first(sender, instance, **kwargs):
        raise Unwanted(f"first {instance.name}")

    def second(sender, instance, **kwargs):
        raise Unwanted(f"second {instance.name}")

    for fn in (first, second):
        post_save.connect(fn, Author, weak=False, on="commit")
    session.add_all([Author(name="a"), Author(name="b")])
    session.commit()
    expected = ["first a", "second a", "first b", "second b"]
    assert [str(arguments["exception"]) for _, arguments in failures] == expected
    assert [str(record.exc_info[1]) for record in records(caplog)] == expected
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


def test_nobody_awaits_who_is_told_of_failures():
    """So it is refused when it is connected, not found in the log after the first failure."""

    async def alarm(sender, **kwargs):
        pass

    with pytest.raises(ReceiverTypeError, match=r"alarm .* is async, .*Make it a plain function"):
        receiver_failed.connect(alarm)
    assert not receiver_failed.receivers


def test_a_failing_receiver_of_receiver_failed_disturbs_nobody(
    session: Session, log: Deliveries, failures, caplog: pytest.LogCaptureFixture
):
    """It is logged, and that is all."""

    def fails_too(sender, **kwargs):
        raise Unwanted("failed about the failure")

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, **kwargs):
        raise Unwanted

    receiver_failed.connect(fails_too)
    session.add(Author(name="a"))
    session.commit()
    receiver_failed.disconnect(fails_too)
    assert len(records(caplog)) == 2
    assert "failed about the failure" in caplog.text
    assert len(failures) == 1
    assert log.lines == ["commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_receiver_whose_own_commit_fails_has_failed(
    session: Session, log: Deliveries, failures, caplog: pytest.LogCaptureFixture
):
    """Returning is not enough: its work has to be committed."""

    @receiver(post_save, sender=Author, on="commit")
    def flush_fails(sender, session, **kwargs):
        session.add(Author(name="lost", age=1))
        session.add(Tag(id=1, name="the id is taken"))

    @receiver(post_save, sender=Author, on="commit")
    def commit_fails(sender, session, **kwargs):
        session.add(Box(name="on no shelf", shelf_id=99))

    session.execute(Tag.__table__.insert().values(id=1, name="there"))
    session.add(Author(id=1, name="a"))
    session.commit()
    assert [type(arguments["exception"]) for _, arguments in failures] == [IntegrityError] * 2
    assert [arguments["receiver"] for _, arguments in failures] == [flush_fails, commit_fails]
    assert len(records(caplog)) == 2
    assert [line for line in log.lines if line.startswith("commit")] == ["commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]
    assert rows(session.get_bind(), Tag.name) == ["there"]
    assert rows(session.get_bind(), Box.name) == []


def test_what_a_failed_receiver_had_written_is_told_as_undone(session: Session, log: Deliveries):
    """Its transaction is one like any other."""

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, session, **kwargs):
        session.add(Tag(name="lost"))
        session.flush()
        raise Unwanted

    session.add(Author(name="a"))
    session.commit()
    assert sorted(log.lines) == ["commit created Author(a)", "rollback created Tag(lost)"]
    assert rows(session.get_bind(), Tag.name) == []


def test_a_receiver_that_swallows_a_database_error_has_failed_if_its_transaction_has(
    session: Session, log: Deliveries, failures
):
    """The next one has a transaction that works."""

    @receiver(post_save, sender=Author, on="commit")
    def swallows(sender, session, **kwargs):
        session.add(Tag(id=1, name="the id is taken"))
        try:
            session.flush()
        except IntegrityError:
            swallowed.append(True)

    @receiver(post_save, sender=Author, on="commit")
    def works(sender, session, **kwargs):
        session.add(Tag(name="kept"))

    swallowed: list[bool] = []
    session.execute(Tag.__table__.insert().values(id=1, name="there"))
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT setval('tags_id_seq', 1)"))
    session.add(Author(id=1, name="a"))
    session.commit()
    assert swallowed == [True]
    assert [arguments["receiver"] for _, arguments in failures] == [swallows]
    assert rows(session.get_bind(), Tag.name) == ["kept", "there"]


@pytest.mark.postgresql
def test_a_receiver_that_loses_its_connection_disturbs_nobody(
    postgresql_engine, installed, failures
):
    """The next one gets another connection."""
    Author.metadata.create_all(postgresql_engine)

    @receiver(post_save, sender=Author, on="commit")
    def loses(sender, session, **kwargs):
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    @receiver(post_save, sender=Author, on="commit")
    def works(sender, session, **kwargs):
        session.add(Tag(name="kept"))

    with Session(postgresql_engine) as session:
        session.add(Author(name="a"))
        session.commit()
    ((_, arguments),) = failures
    assert arguments["receiver"] is loses
    assert isinstance(arguments["exception"], OperationalError)
    assert rows(postgresql_engine, Author.name) == ["a"]
    assert rows(postgresql_engine, Tag.name) == ["kept"]


def test_a_session_factory_that_fails_does_not_fail_the_commit(
    library, log: Deliveries, failures, caplog: pytest.LogCaptureFixture
):
    """Without a session the receiver cannot be called: it has failed, and that is told."""

    def factory() -> Session:
        raise Unwanted("no session today")

    called = []
    own = sessionmaker(library)
    sqla_signals.install(own, session_factory=factory)
    with own() as session:
        session.add(Author(name="a"))
        on_commit(session, lambda: called.append(True))
        session.commit()
    assert log.lines == []
    assert called == [True]
    assert [str(arguments["exception"]) for _, arguments in failures] == ["no session today"]
    assert len(records(caplog)) == 1
    assert rows(library, Author.name) == ["a"]


def test_the_exception_has_a_note_naming_receiver_signal_and_sender(session: Session, failures):
    """As in a flush."""

    @receiver(post_save, sender=Author, on="commit", name="shop.reindex")
    def fails(sender, **kwargs):
        raise Unwanted

    session.add(Author(name="a"))
    session.commit()
    ((_, arguments),) = failures
    (note,) = arguments["exception"].__notes__
    for part in ("shop.reindex", "test_failures.py:", "post_save", "Author"):
        assert part in note

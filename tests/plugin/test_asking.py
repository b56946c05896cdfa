"""The fixture ``signals``: what a test may ask, and what it is told when the answer is no."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select, update
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import (
    Change,
    ReceiverOptionError,
    Signal,
    m2m_changed,
    on_commit,
    post_bulk,
    post_delete,
    post_save,
    pre_save,
    receiver,
    receiver_failed,
)
from sqla_signals.testing import Signals

from ..conftest import create_sqlite_engine
from ..contract.models import Author, Base, Book, Tag, book_tags
from ..contract.observing import rows


@pytest.fixture
def engine(tmp_path: Any) -> Any:
    engine = create_sqlite_engine(tmp_path / "test.db")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine, installed: Any) -> Any:
    with Session(engine) as session:
        yield session


def hear(*signals: Signal, name: str = "hear", fn: Any = None, **options: Any) -> Any:
    return receiver(list(signals), name=name, **options)(fn or (lambda sender, **kwargs: None))


def message(expectation: Any, *arguments: Any, **filters: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        expectation(*arguments, **filters)
    return str(caught.value)


def test_a_signal_is_noted_once_with_all_its_receivers(session: Session, signals: Signals):
    """In the order in which they were called."""
    hear(post_save, name="a", sender=Author)
    hear(post_save, name="b")
    hear(post_save, name="c", sender=Author, on="commit")
    hear(post_save, name="d", sender=Author, on="commit")
    session.add_all([Author(name="x"), Author(name="y")])
    session.commit()
    assert [(str(sent), sent.receivers) for sent in signals.sent()] == [
        ("post_save Author created", ["a", "b"]),
        ("post_save Author created", ["a", "b"]),
        ("post_save Author created on commit", ["c", "d"]),
        ("post_save Author created on commit", ["c", "d"]),
    ]
    assert rows(session.get_bind(), Author.name) == ["x", "y"]


def test_signals_of_two_flushes_are_two_also_where_others_are_called(
    session: Session, signals: Signals
):
    """``fields`` lets the first flush through to one receiver, and the second to another."""
    hear(post_save, name="a", sender=Author, fields={"name"})
    hear(post_save, name="b", sender=Author, fields={"age"})
    author = Author(name="x")
    session.add(author)
    session.flush()
    signals.clear()
    author.name = "y"
    session.flush()
    author.age = 3
    session.flush()
    assert [sent.receivers for sent in signals.sent()] == [["a"], ["b"]]


def test_what_a_receiver_causes_comes_after_it_and_splits_nothing(
    session: Session, signals: Signals
):
    """The next receiver still gets the same signal."""
    mine = Signal("mine")
    hear(mine, name="m")
    hear(post_save, name="a", sender=Author, fn=lambda sender, **kwargs: mine.send("x") and None)
    hear(post_save, name="b", sender=Author)
    session.add(Author(name="x"))
    session.flush()
    assert [(str(sent), sent.receivers) for sent in signals.sent()] == [
        ("post_save Author created", ["a", "b"]),
        ("mine 'x'", ["m"]),
    ]


def test_signals_of_your_own_are_sent_by_anything_with_any_arguments(
    engine: Engine, installed: Any, signals: Signals
):
    """``changes`` and ``action`` may mean something else there, and no sender is loaded."""
    mine = Signal("mine")
    hear(mine, name="m")
    with Session(engine) as session:
        author = Author(name="x")
        session.add(author)
        session.commit()
    mine.send(author)  # expired and detached
    mine.send("x", action=None, changes=["all"])
    mine.send("x", action=7, changes={"all": True}, operation=b"", created=None)
    assert signals.lines == ["mine Author 1", "mine 'x' None", "mine 'x' updated 7 b''"]
    assert "mine 'x' updated 7 b''  to m" in (signals.report() or "")


def test_what_was_sent_can_be_copied(session: Session, signals: Signals):
    """Like other values."""
    hear(post_save, sender=Author)
    session.add(Author(name="x"))
    session.flush()
    (sent,) = signals.sent()
    copied = copy.copy(sent)
    assert (str(copied), copied.instance) == (str(sent), sent.instance)
    with pytest.raises(AttributeError, match="post_save Author created has no colour"):
        copied.colour


def test_each_filter_narrows(session: Session, signals: Signals):
    """Signal, sender, phase, receiver, and the arguments by name."""
    one = hear(pre_save, post_save, name="one", sender=Author)
    hear(post_save, post_delete, name="two", sender=Author, on="commit")
    author = Author(name="x")
    session.add(author)
    session.commit()
    author.name = "y"
    session.commit()
    session.delete(author)
    session.commit()
    everything = signals.sent()
    assert len(everything) == 7
    assert signals.sent(post_save) == [everything[i] for i in (1, 2, 4, 5)]
    assert len(signals.sent(sender="Author")) == len(signals.sent(sender=Base)) == 7
    assert signals.sent(sender="Elsewhere") == []
    assert len(signals.sent(post_save, Author, on="commit")) == 2
    assert len(signals.sent(receiver=one)) == len(signals.sent(receiver="one")) == 4
    assert len(signals.sent(post_save, created=True)) == 2
    assert len(signals.sent(post_save, changes={"name": "y"})) == 2
    assert signals.sent(post_save, changes={"name": Change("x", "z")}) == []
    assert len(signals.sent(post_save, changes=lambda changes: "age" in changes)) == 2
    assert len(signals.sent(post_save, update_fields={"name"})) == 2
    # Before the flush it stands for no row.
    assert len(signals.sent(instance=signals.sent(post_save, on="commit")[0].instance)) == 7


def test_an_instance_stands_for_its_row(session: Session, signals: Signals):
    """A receiver of the commit gets another object for it."""
    hear(post_save, sender=Author, on="commit")
    author = Author(name="x")
    session.add_all([author, Author(name="y")])
    session.commit()
    sent = signals.expect(post_save, instance=author, on="commit")
    assert sent.instance is not author
    assert sent.instance.name == "x"


def test_a_missing_signal_is_told_with_everything_that_was_sent(session: Session, signals: Signals):
    """And what comes close with what is different."""
    hear(pre_save, post_save, name="hear", sender=Author)
    session.add(Author(name="x"))
    session.flush()
    assert message(signals.expect, post_save, Author, on="flush", created=False) == (
        "expected once: post_save Author with on='flush', created=False\n"
        "it was not sent\n"
        "sent, in this order:\n"
        "     1. pre_save Author created  {name: 'x'}  to hear\n"
        "     2. post_save Author created  {id: 1, name: 'x'}  to hear\n"
        "        but not with created=False"
    ).replace("{id: 1, name: 'x'}", _changes(signals, 1)).replace(
        "{name: 'x'}", _changes(signals, 0)
    )


def _changes(signals: Signals, number: int) -> str:
    return signals.sent()[number].details().strip().rpartition("  to ")[0]


def test_too_many_are_told_and_marked(session: Session, signals: Signals):
    """``expect`` means once, or as often as is said."""
    hear(post_save, sender=Author)
    session.add_all([Author(name="x"), Author(name="y")])
    session.flush()
    told = message(signals.expect, post_save, Author)
    assert told.startswith("expected once: post_save Author\nit was sent 2 times\n")
    assert told.count("  *  ") == 2
    assert signals.expect(post_save, Author, times=2).instance.name == "y"


def test_an_order_may_have_gaps_and_is_told_up_to_where_it_broke(
    session: Session, signals: Signals
):
    """What was found is marked."""
    hear(pre_save, post_save, sender=Author)
    hear(post_save, sender=Author, on="commit")
    session.add(Author(name="x"))
    session.commit()
    after = (post_save, Author, {"on": "commit", "created": True})
    signals.expect_order(pre_save, after)
    signals.expect_order((pre_save, Author), (post_save, Author, {"on": "flush"}), after)
    told = message(signals.expect_order, post_save, pre_save, after)
    assert told.startswith(
        "expected in this order:\n"
        "  ok post_save\n"
        "  -> pre_save\n"
        "     post_save Author with on='commit', created=True\n"
        "the one at the arrow was not sent after those before it\n"
        "sent, in this order:\n"
        "     1. pre_save Author created"
    )
    assert "\n  *  2. post_save Author created" in told


def test_nothing_is_expected_only_of_somebody_who_could_have_heard(
    session: Session, signals: Signals
):
    """Otherwise the test would pass whatever happens."""
    told = message(signals.expect_nothing, post_save, Author)
    assert "proves nothing: nobody listens to it" in told
    signals.listen(post_save, Author)
    signals.expect_nothing(post_save, Author)
    assert "nobody listens" in message(signals.expect_nothing, post_save, Author, on="commit")
    session.add(Author(name="x"))
    session.flush()
    assert message(signals.expect_nothing, post_save, Author, created=True).startswith(
        "expected not to be sent: post_save Author with created=True\nsent, in this order:"
    )
    signals.expect_nothing(post_save, Author, created=False)


def test_a_sender_that_never_sends_is_not_expected_to_be_silent(session: Session, signals: Signals):
    """Somebody who listens to every sender would not have heard a misspelt one either."""
    hear(post_save, m2m_changed)
    session.add(Author(name="x"))
    session.flush()
    for sender in ("Auhtor", type("Unmapped", (), {}), session):
        told = message(signals.expect_nothing, post_save, sender)
        assert "proves nothing: nobody listens to it" in told
    assert "nobody listens" in message(signals.expect_nothing, m2m_changed, Author)
    signals.expect_nothing(m2m_changed, book_tags)
    signals.expect_nothing(m2m_changed, Book.tags)
    for sender in (Book, "Book", Base):
        signals.expect_nothing(post_save, sender, created=False)
    mine = Signal("mine")
    hear(mine)
    signals.expect_nothing(mine, "anybody")
    hear(receiver_failed, sender=Author)
    signals.expect_nothing(receiver_failed, "Author")


def test_listening_ends_with_the_test(session: Session):
    """A receiver that the test does not have, without a trace."""
    signals = Signals()
    signals.start()
    signals.listen(post_save, Author, on="commit")
    session.add(Author(name="x"))
    session.commit()
    signals.stop()
    assert signals.lines == ["post_save Author created on commit"]
    assert not post_save.receivers


def test_a_forgotten_install_is_the_reason(engine: Engine, signals: Signals):
    """The fixture does not install: it would hide that the application does not."""
    hear(post_save, sender=Author)
    with Session(engine) as session:
        session.add(Author(name="x"))
        with pytest.warns(sqla_signals.SignalsNotInstalledWarning):
            session.flush()
    assert "sqla_signals is not installed" in message(signals.expect, post_save, Author)


def test_what_is_not_an_argument_is_refused(signals: Signals):
    """A misspelt name would be found nowhere, and so nothing would be found."""
    with pytest.raises(ReceiverOptionError, match="has no argument create; it has instance, cre"):
        signals.sent(post_save, Author, create=True)
    with pytest.raises(ReceiverOptionError, match="Author has no column attribute naem"):
        signals.sent(post_save, Author, changes={"name": "x", "naem": "y"})
    with pytest.raises(ReceiverOptionError, match="one sender at a time"):
        signals.expect_nothing(post_save, [Author, Book])
    with pytest.raises(ReceiverOptionError, match="is not a signal"):
        signals.sent(Author)  # type: ignore[arg-type]
    with pytest.raises(ReceiverOptionError, match="expect_nothing"):
        signals.expect(post_save, times=0)


def test_clear_forgets(session: Session, signals: Signals):
    """And the messages say since when."""
    hear(post_save, sender=Author)
    session.add(Author(name="x"))
    session.flush()
    signals.clear()
    assert signals.lines == []
    assert "nothing was sent since clear()" in message(signals.expect, post_save, Author)


def test_failures_that_are_only_logged_are_there_until_expected(session: Session, signals: Signals):
    """Those of receivers and of callbacks; what a flush receiver raises reaches the test anyway."""

    def fails(sender, **kwargs):
        raise ValueError("no")

    hear(post_save, name="fails", fn=fails, sender=Author, on="commit")
    with signals.expect_failure(ValueError, receiver=fails) as failures:
        session.add(Author(name="x"))
        session.commit()
    assert [str(failure) for failure in failures] == [
        "post_save Author on commit: fails raised ValueError('no')"
    ]
    assert signals.failures == []
    on_commit(session, lambda: 1 / 0)  # type: ignore[func-returns-value]
    session.commit()
    (failure,) = signals.failures
    assert isinstance(failure.exception, ZeroDivisionError)
    assert "ZeroDivisionError" in (signals.take_failures() or "")
    assert signals.failures == []
    assert signals.take_failures() is None


def test_who_is_told_of_failures_may_not_fail_either(session: Session, signals: Signals):
    """That is only logged as well; a test of the first failure does not hide the second."""

    def fails(sender, **kwargs):
        raise ValueError("no")

    def alarm(sender, **kwargs):
        raise ConnectionError("nobody at home")

    hear(post_save, name="fails", fn=fails, sender=Author, on="commit")
    hear(receiver_failed, name="alarm", fn=alarm)
    with signals.expect_failure(ValueError):
        session.add(Author(name="x"))
        session.commit()
    told = signals.take_failures() or ""
    assert "receiver_failed Author: alarm raised ConnectionError('nobody at home')" in told
    assert rows(session.get_bind(), Author.name) == ["x"]


def test_a_failure_of_another_kind_is_not_the_expected_one(session: Session, signals: Signals):
    """It stays, and would fail the test."""

    def fails(sender, **kwargs):
        raise ValueError("no")

    hear(post_save, name="fails", fn=fails, sender=Author, on="commit")

    def commit() -> None:
        with signals.expect_failure(KeyError):
            session.add(Author(name="x"))
            session.commit()

    assert message(commit).startswith("expected a receiver to fail with KeyError")
    assert len(signals.failures) == 1
    signals.failures.clear()


def test_looking_on_changes_neither_statements_nor_calls(engine: Engine, installed: Any):
    """The same program, with and without: SQL, order, arguments, results."""
    calls: list[Any] = []

    def note(name: str) -> Any:
        def fn(sender, signal=None, session=None, changes=None, **kwargs):
            calls.append((name, signal.name, type(session).__name__, dict(changes or {})))
            if name == "adds" and session is not None and len(calls) < 4:
                session.add(Author(name="added"))
            return name

        return fn

    for name, options in [("adds", {}), ("late", {"on": "commit"}), ("undone", {"on": "rollback"})]:
        hear(post_save, post_delete, name=name, fn=note(name), sender=Author, **options)
    hear(pre_save, name="pre", fn=note("pre"), weak=False)
    mine = Signal("mine")
    mine_fn = hear(mine, name="mine", fn=lambda sender, **kwargs: "result")

    def program() -> tuple[Any, ...]:
        calls.clear()
        statements: list[str] = []
        event.listen(
            engine, "before_cursor_execute", log := lambda *args: statements.append(args[2])
        )
        with Session(engine) as session:
            author = Author(name="x")
            session.add(author)
            session.commit()
            author.name = "y"
            session.flush()
            session.rollback()
            for known in session.scalars(select(Author)):
                session.delete(known)
            session.commit()
        event.remove(engine, "before_cursor_execute", log)
        return statements, list(calls), mine.send(1)

    without = program()
    signals = Signals()
    signals.start()
    seen = program()
    signals.stop()
    after = program()
    # A file has no AUTOINCREMENT: the same keys come again.
    assert without == seen == after
    assert seen[2] == [(mine_fn, "result")]
    assert len(signals.sent()) == len(seen[1]) + 1
    assert rows(engine, Author.name) == []


def test_m2m_is_asked_for_by_table_or_relationship(session: Session, signals: Signals):
    """As it is connected."""
    hear(m2m_changed, sender=Book.tags)
    session.add(Book(name="b", tags=[Tag(name="t")]))
    session.flush()
    sent = signals.expect(m2m_changed, Book.tags, action="post_add")
    assert signals.expect(m2m_changed, book_tags, action="post_add") is sent
    assert sent.pk_set == {1}
    assert str(sent) == "m2m_changed book_tags post_add"


def test_bulk_statements_are_seen_with_what_they_do(session: Session, signals: Signals):
    """In the flush phase and at the commit, once for all receivers."""
    for on in ("flush", "commit"):
        hear(post_bulk, name=f"one {on}", sender=Author, on=on)
        hear(post_bulk, name=f"two {on}", sender=Author, on=on)
    session.execute(insert(Author).values(name="x"))
    session.execute(update(Author).values(name="y"))
    session.commit()
    assert signals.lines == [
        "post_bulk Author insert",
        "post_bulk Author update",
        "post_bulk Author insert on commit",
        "post_bulk Author update on commit",
    ]
    sent = signals.expect(post_bulk, Author, on="commit", operation="update", rowcount=1)
    assert sent.receivers == ["one commit", "two commit"]
    assert rows(session.get_bind(), Author.name) == ["y"]

"""Exceptions of flush receivers, and what a receiver must not call."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, insert, update
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import (
    SessionInFlushError,
    Signal,
    SignalsError,
    mute,
    post_bulk,
    post_delete,
    post_save,
    pre_bulk,
    pre_delete,
    pre_save,
    receiver,
    receiver_failed,
    trace,
)
from sqla_signals.receivers.receiver import Phase

from .models import Author, Book, Tag
from .observing import FLUSH_SIGNALS, Log, asynchronous, both, rows

METHODS = ("flush", "commit", "rollback", "close", "reset", "invalidate", "prepare")
# Session.reset() came with SQLAlchemy 2.0.22.
FORBIDDEN = [name for name in METHODS if hasattr(Session, name)]
every_signal = pytest.mark.parametrize("signal", FLUSH_SIGNALS, ids=lambda signal: signal.name)
pre_and_post = pytest.mark.parametrize(
    "signal", [pre_save, post_save], ids=lambda signal: signal.name
)


def cause(signal: Signal, session: Session) -> None:
    """Do what sends ``signal`` for an author."""
    author = Author(name="a")
    session.add(author)
    if signal in (pre_delete, post_delete):
        session.flush()
        session.delete(author)
    session.flush()


# -- exceptions ----------------------------------------------------------------------------------


@every_signal
def test_an_exception_reaches_the_caller_unchanged_with_a_note(session: Session, signal: Signal):
    """The note names signal, receiver with file and line, and sender."""
    error = ZeroDivisionError("once")

    @receiver(signal, sender=Author)
    def fails(sender, **kwargs):
        raise error

    with pytest.raises(ZeroDivisionError) as caught:
        cause(signal, session)
    assert caught.value is error
    assert error.args == ("once",)
    assert error.__cause__ is None
    (note,) = error.__notes__
    assert signal.name in note
    assert "fails" in note
    assert re.search(re.escape(__file__) + r":\d+", note)
    assert "Author" in note
    session.rollback()
    assert rows(session, Author.id) == []


@dataclass(frozen=True)
class Frozen(Exception):
    """Cannot be assigned to."""

    sku: str = "x1"


class RefusesNotes(Exception):
    """Takes no note."""

    def add_note(self, note: str) -> None:
        raise TypeError("no notes")


class HasOtherNotes(Exception):
    """Uses the name for something else."""

    __notes__ = ("mine",)


class HasNoNotes(Exception):
    """Does not even tell."""

    @property
    def __notes__(self) -> list[str]:
        raise AttributeError


UNUSUAL = [Frozen, RefusesNotes, HasOtherNotes, HasNoNotes, StopIteration]
unusual_errors = pytest.mark.parametrize("error_type", UNUSUAL)


@unusual_errors
@every_signal
def test_an_exception_that_takes_no_note_reaches_the_caller_unchanged(
    session: Session, signal: Signal, error_type: type[Exception]
):
    """Also through the blocks of the library; its traceback leads to the receiver."""
    error = error_type()

    @receiver(signal, sender=Author)
    def fails(sender, **kwargs):
        raise error

    with pytest.raises(error_type) as caught, mute(sender=Book), trace():
        with sqla_signals.raw(session), post_save.connected_to(lambda *_, **__: None):
            cause(signal, session)
    assert caught.value is error
    assert caught.traceback[-1].name == "fails"
    assert error.__cause__ is None
    session.rollback()
    assert rows(session, Author.id) == []


@unusual_errors
@pytest.mark.parametrize("signal", [pre_bulk, post_bulk, pre_save, post_save])
def test_so_does_one_of_a_statement(session: Session, signal: Signal, error_type: type[Exception]):
    """Of a receiver of statements, or of their rows."""
    session.add(Author(name="a"))
    session.commit()
    error = error_type()

    @receiver(signal, sender=Author)
    def fails(sender, **kwargs):
        raise error

    with pytest.raises(error_type) as caught:
        session.execute(update(Author).values(name="b"), execution_options={"signals": "rows"})
    assert caught.value is error
    session.rollback()
    assert rows(session, Author.name) == ["a"]


@unusual_errors
@pytest.mark.parametrize("on", ["commit", "rollback"])
def test_so_does_one_after_the_end_of_the_transaction(
    session: Session,
    caplog: pytest.LogCaptureFixture,
    on: Phase,
    error_type: type[Exception],
):
    """As ``receiver_failed`` and the log have it."""
    error = error_type()
    failures: list[Exception] = []

    @receiver(post_save, sender=Author, on=on)
    def fails(sender, **kwargs):
        raise error

    @receiver(receiver_failed)
    def failed(sender, exception, **kwargs):
        failures.append(exception)

    session.add(Author(name="a"))
    session.flush()
    getattr(session, on)()
    assert failures == [error]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]
    assert rows(session, Author.name) == (["a"] if on == "commit" else [])


@unusual_errors
@asynchronous
async def test_so_does_one_of_an_async_receiver(
    async_library: AsyncEngine, library: Engine, installed, error_type: type[Exception]
):
    """Through ``await``; ``StopIteration`` cannot be raised by a coroutine at all."""
    error = error_type() if error_type is not StopIteration else ZeroDivisionError()

    @receiver(post_save, sender=Author)
    async def fails(sender, **kwargs):
        raise error

    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        with pytest.raises(type(error)) as caught:
            await session.flush()
        assert caught.value is error
    assert rows(library, Author.name) == []


def test_an_exception_that_is_raised_again_and_again_has_one_note(session: Session):
    """A module may have one for all; its notes do not grow."""
    error = ZeroDivisionError("the only one")

    @receiver(pre_save, sender=Author)
    def fails(sender, **kwargs):
        raise error

    for _ in range(3):
        session.add(Author(name="a"))
        with pytest.raises(ZeroDivisionError) as caught:
            session.flush()
        assert caught.value is error
        session.rollback()
    (note,) = error.__notes__
    assert "fails" in note
    assert rows(session, Author.id) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pre_and_post
def test_what_is_no_exception_passes_as_well(session: Session, signal: Signal, error):
    """An interrupt in a receiver is handled like one in the flush."""

    @receiver(signal, sender=Author)
    def fails(sender, **kwargs):
        raise error

    with pytest.raises(error):
        cause(signal, session)
    session.rollback()
    signal.disconnect(fails)
    cause(signal, session)
    assert rows(session, Author.name) == ["a"]


def test_the_exception_of_an_inner_session_tells_both_receivers(library: Engine, installed):
    """A receiver that uses another session, whose receiver raises: one note for each."""

    @receiver(pre_save, sender=Book)
    def inner(sender, **kwargs):
        raise ZeroDivisionError

    @receiver(pre_save, sender=Author)
    def outer(sender, **kwargs):
        with Session(library) as own:
            own.add(Book())
            own.flush()

    with Session(library) as session:
        session.add(Author())
        with pytest.raises(ZeroDivisionError) as caught:
            session.flush()
    first, second = caught.value.__notes__
    assert "inner" in first
    assert "Book" in first
    assert "outer" in second
    assert "Author" in second


# -- flush, commit, rollback, close --------------------------------------------------------------


@every_signal
@pytest.mark.parametrize("method", FORBIDDEN)
def test_ending_or_flushing_the_session_in_a_receiver_is_an_error_with_a_remedy(
    session: Session, library: Engine, signal: Signal, method: str
):
    """Nothing is written by halves; afterwards the session works."""

    @receiver(signal, sender=Author)
    def fn(sender, session, **kwargs):
        getattr(session, method)()

    with pytest.raises(SessionInFlushError, match=method) as caught:
        cause(signal, session)
    notes = "\n".join(caught.value.__notes__)
    assert "Remedy" in notes
    assert signal.name in notes
    assert "fn" in notes
    assert isinstance(caught.value, SignalsError)
    assert isinstance(caught.value, InvalidRequestError)
    session.rollback()
    assert rows(library, Author.name) == []
    signal.disconnect(fn)
    session.add(Author(name="b"))
    session.commit()
    assert rows(library, Author.name) == ["b"]
    session.invalidate()
    session.close()


@every_signal
@pytest.mark.parametrize("method", FORBIDDEN)
def test_a_receiver_that_swallows_that_error_does_not_leave_a_half_written_flush(
    session: Session, library: Engine, signal: Signal, method: str
):
    """The call had no effect; the flush goes on to its end."""
    errors = []

    @receiver(signal, sender=[Author, Book])
    def fn(sender, session, **kwargs):
        try:
            getattr(session, method)()
        except SessionInFlushError as error:
            errors.append(error)

    log = Log()
    receiver(signal, sender=[Author, Book])(log)
    author, book = Author(name="a"), Book(name="b")
    session.add_all([author, book])
    session.commit()
    session.delete(author)
    session.delete(book)
    session.commit()
    assert len(errors) == len(log.sent) == 2
    assert rows(library, Author.id) == rows(library, Book.id) == []


@pytest.mark.parametrize(("method", "options"), [("begin_nested", {}), ("begin", {"nested": True})])
def test_a_savepoint_in_a_pre_receiver_is_an_error_with_a_remedy(
    session: Session, library: Engine, method: str, options: dict[str, bool]
):
    """Rolling it back would take what is pending out of the session, silently."""

    @receiver(pre_save, sender=Author)
    def fn(sender, session, **kwargs):
        getattr(session, method)(**options).rollback()

    with pytest.raises(SessionInFlushError, match=rf"{method}\(\)") as caught:
        cause(pre_save, session)
    assert "Remedy" in "\n".join(caught.value.__notes__)
    pre_save.disconnect(fn)
    session.commit()
    assert rows(library, Author.name) == ["a"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_begin_nested_in_a_post_receiver_is_for_the_statements_of_the_receiver(
    session: Session, library: Engine, end: str
):
    """Rolling it back undoes nothing of the flush."""

    @receiver(post_save, sender=Author)
    def fn(sender, session, **kwargs):
        savepoint = session.begin_nested()
        session.execute(insert(Book.__table__).values(name="b"))
        getattr(savepoint, end)()

    author = Author(name="a")
    session.add_all([author, Tag(name="t")])
    session.flush()
    author.name = "c"
    session.commit()
    assert rows(library, Author.name) == ["c"]
    assert rows(library, Tag.name) == ["t"]
    assert rows(library, Book.name) == (["b", "b"] if end == "commit" else [])


begin_savepoint = pytest.mark.parametrize(
    "begin",
    [lambda session: session.begin_nested(), lambda session: session.begin(nested=True)],
    ids=["begin_nested", "begin"],
)


@begin_savepoint
@pytest.mark.parametrize("how", ["added", "changed", "deleted", "pending"])
def test_a_savepoint_in_a_post_receiver_with_unflushed_changes_is_an_error_with_a_remedy(
    session: Session, library: Engine, begin: Callable[[Session], Any], how: str
):
    """No flush would put them into it; a row that is there already would fail the commit."""
    book = Book(name="b")
    session.add(book)
    session.commit()

    @receiver(post_save, sender=Author)
    def tag(sender, instance, session, **kwargs):
        if how == "pending":
            session.add(Tag(name="from before"))
        with suppress(IntegrityError), begin(session):
            match how:
                case "added" | "pending":
                    session.add(Tag(name="t"))
                case "changed":
                    book.name = "c"
                case "deleted":
                    session.delete(book)

    session.add(Author(name="a"))
    with pytest.raises(SessionInFlushError, match="savepoint") as caught:
        session.commit()
    remedy, blamed = caught.value.__notes__
    assert "on_conflict_do_nothing" in remedy
    assert "tag" in blamed
    session.rollback()
    assert rows(library, Author.name) == rows(library, Tag.name) == []
    assert rows(library, Book.name) == ["b"]


@begin_savepoint
def test_a_savepoint_in_a_post_receiver_may_hold_statements_and_what_changes_nothing(
    session: Session, library: Engine, begin: Callable[[Session], Any]
):
    """Whatever an earlier receiver has left for the next flush; the remedy of that error works."""

    @receiver(post_save, sender=Author)
    def adds(sender, instance, session, created, **kwargs):
        if created:
            session.add(Book(name=f"of {instance.name}"))
            instance.age = 1

    @receiver(post_save, sender=Author)
    def tags(sender, instance, session, **kwargs):
        with begin(session):
            instance.name = instance.name
            session.execute(insert(Tag).values(name=instance.name))
            with begin(session):
                session.execute(update(Tag).values(name="t"))

    session.add(Author(name="a"))
    session.commit()
    assert rows(library, Tag.name) == ["t", "t"]  # of the INSERT, and of the UPDATE
    assert rows(library, Book.name) == ["of a"]
    assert rows(library, Author.name, Author.age) == [("a", 1)]


def test_a_savepoint_in_a_post_receiver_that_is_rolled_back_takes_its_changes_along(
    session: Session, library: Engine
):
    """As it does anywhere; nothing else was pending."""

    @receiver(post_save, sender=Author)
    def tags(sender, instance, session, **kwargs):
        with suppress(ZeroDivisionError), session.begin_nested():
            session.add(Tag(name="t"))
            raise ZeroDivisionError

    session.add(Author(name="a"))
    session.commit()
    assert rows(library, Author.name) == ["a"]
    assert rows(library, Tag.name) == []


def test_a_savepoint_in_a_post_receiver_whose_rollback_loses_the_work_of_others_is_an_error(
    session: Session, library: Engine
):
    """What an earlier receiver has left for the next flush would be gone without a word."""

    @receiver(post_save, sender=Author)
    def adds(sender, session, **kwargs):
        session.add(Book(name="audit"))

    @receiver(post_save, sender=Author)
    def tags(sender, session, **kwargs):
        with suppress(ZeroDivisionError), session.begin_nested():
            raise ZeroDivisionError

    session.add(Author(name="a"))
    with pytest.raises(SessionInFlushError, match="thrown away") as caught:
        session.commit()
    remedy, blamed = caught.value.__notes__
    assert "session.connection().begin_nested()" in remedy
    assert "tags" in blamed
    session.rollback()
    assert rows(library, Author.name) == rows(library, Book.name) == []


@asynchronous
async def test_a_savepoint_in_an_async_post_receiver_with_unflushed_changes_is_an_error(
    async_library: AsyncEngine, library: Engine, installed
):
    """With the same remedy, which works there too."""

    @receiver(post_save, sender=Author)
    async def tag(sender, instance, session, **kwargs):
        async with session.begin_nested():
            if instance.name == "a":
                session.add(Tag(name="t"))
            else:
                await session.execute(insert(Tag).values(name="t"))

    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        with pytest.raises(SessionInFlushError, match="savepoint") as caught:
            await session.commit()
        assert "on_conflict_do_nothing" in caught.value.__notes__[0]
        await session.rollback()
        session.add(Author(name="b"))
        await session.commit()
    assert rows(library, Author.name) == ["b"]
    assert rows(library, Tag.name) == ["t"]


@pre_and_post
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_savepoint_of_the_connection_may_be_used_in_any_receiver(
    session: Session, library: Engine, signal: Signal, end: str
):
    """For statements that may fail; the session knows nothing of it."""

    @receiver(signal, sender=Author)
    def fn(sender, session, **kwargs):
        connection = session.connection()
        savepoint = connection.begin_nested()
        connection.execute(insert(Book.__table__).values(name="b"))
        getattr(savepoint, end)()

    cause(signal, session)
    session.commit()
    assert rows(library, Author.name) == ["a"]
    assert rows(library, Book.name) == (["b"] if end == "commit" else [])


@pre_and_post
def test_a_with_block_on_the_session_in_a_receiver_is_an_error(session: Session, signal: Signal):
    """Its end closes the session."""

    @receiver(signal, sender=Author)
    def fn(sender, session, **kwargs):
        with session:
            pass

    with pytest.raises(SessionInFlushError, match="close"):
        cause(signal, session)
    session.rollback()
    assert rows(session, Author.id) == []


@pre_and_post
@pytest.mark.parametrize("method", ["commit", "rollback", "flush", "close", "remove"])
def test_the_same_is_an_error_through_a_scoped_session(
    library: Engine, installed, signal: Signal, method: str
):
    """The proxy ends the same session."""
    scoped = scoped_session(sessionmaker(library))

    @receiver(signal, sender=Author)
    def fn(sender, **kwargs):
        getattr(scoped, method)()

    session = scoped()
    with pytest.raises(SessionInFlushError):
        cause(signal, session)
    session.rollback()
    session.close()
    scoped.remove()
    assert rows(library, Author.id) == []


@pre_and_post
@pytest.mark.parametrize("method", ["flush", "commit", "rollback", "close"])
@pytest.mark.parametrize("kind", ["async", "sync"])
@asynchronous
async def test_in_an_async_session_the_same_is_an_error(
    async_library: AsyncEngine, library: Engine, installed, signal: Signal, method: str, kind: str
):
    """Called on the ``AsyncSession`` by an async receiver, or on the ``Session`` by a sync one."""

    async def calls_async(sender, session, **kwargs):
        assert isinstance(session, AsyncSession)
        await getattr(session, method)()

    def calls_sync(sender, session, **kwargs):
        assert isinstance(session, Session)
        getattr(session, method)()

    fn = calls_async if kind == "async" else calls_sync
    signal.connect(fn, sender=Author)
    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        with pytest.raises(SessionInFlushError, match=method) as caught:
            await session.flush()
        assert "Remedy" in "\n".join(caught.value.__notes__)
        await session.rollback()
        signal.disconnect(fn)
        session.add(Author(name="b"))
        await session.commit()
    assert rows(library, Author.name) == ["b"]


def test_another_session_may_do_all_of_that(library: Engine, installed):
    """Only the session that is being flushed is guarded."""
    other = Session(library)

    @receiver(pre_save, sender=Author)
    def fn(sender, **kwargs):
        other.add(Book(name="b"))
        other.flush()
        other.rollback()
        other.add(Book(name="c"))
        other.commit()
        other.close()

    with Session(library) as session:
        cause(pre_save, session)
        session.commit()
    assert rows(library, Book.name) == ["c"]


def test_methods_that_a_user_put_on_the_session_come_back(session: Session):
    """A session whose ``commit`` was replaced keeps the replacement."""
    calls = []

    @receiver(pre_save, sender=Author)
    def fn(sender, session, **kwargs): ...

    session.commit = lambda: calls.append("commit")  # type: ignore[method-assign]
    cause(pre_save, session)
    session.commit()
    assert calls == ["commit"]
    assert "flush" not in vars(session)
    del session.commit


# -- the classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        value
        for name, value in vars(sqla_signals).items()
        if isinstance(value, type) and issubclass(value, BaseException) and name != "SignalsError"
    ],
    ids=lambda error: error.__name__,
)
def test_every_exception_derives_from_signalserror(error: type[BaseException]):
    """Warnings are warnings; each of the others can be caught at once."""
    if issubclass(error, Warning):
        assert issubclass(error, UserWarning)
    else:
        assert issubclass(error, SignalsError)
    assert error.__doc__
    assert error.__name__ in sqla_signals.__all__


def test_errors_are_raised_in_full(session: Session, log: Log):
    """A veto in between does not disturb what is sent later."""

    @receiver(pre_save, sender=Author)
    def fails(sender, **kwargs):
        raise ZeroDivisionError

    for _ in range(3):
        session.add(Author(name="a"))
        with pytest.raises(ZeroDivisionError):
            session.flush()
        session.rollback()
    pre_save.disconnect(fails)
    log.clear()
    cause(pre_save, session)
    assert log.lines == both("save created Author(a)")


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda one: one.name)
def test_the_change_of_an_attribute_that_was_not_changed_is_an_error_that_says_so(
    session: Session, signal: Signal
):
    """It is the mistake of the receiver, with what to write instead."""
    author = Author(name="a", age=1)
    session.add(author)
    session.commit()
    found: list[Any] = []

    def look(sender, changes, **kwargs):
        found.append((changes.get("age"), changes.get("age", 3), "age" in changes))
        changes["age"]

    signal.connect(look, sender=Author)
    author.name = "b"
    with pytest.raises(KeyError, match=r"'age' was not changed\..*changes.get\('age'\)"):
        session.flush()
    assert found == [(None, 3, False)]
    session.rollback()
    assert rows(session, Author.name, Author.age) == [("a", 1)]

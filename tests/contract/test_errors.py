"""Exceptions of flush receivers, and what a receiver must not call."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import (
    SessionInFlushError,
    Signal,
    SignalsError,
    post_delete,
    post_save,
    pre_delete,
    pre_save,
    receiver,
)

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


def test_begin_nested_in_a_pre_receiver_is_an_error_with_a_remedy(
    session: Session, library: Engine
):
    """Rolling that savepoint back would take what is pending out of the session, silently."""

    @receiver(pre_save, sender=Author)
    def fn(sender, session, **kwargs):
        session.begin_nested().rollback()

    with pytest.raises(SessionInFlushError, match="begin_nested") as caught:
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

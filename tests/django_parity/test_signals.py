"""The behaviours of Django's ``tests/signals``."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, defer, mapped_column

import sqla_signals
from sqla_signals import (
    AsyncReceiverError,
    ReceiverOptionError,
    Signal,
    post_delete,
    post_init,
    post_save,
    pre_delete,
    pre_init,
    pre_save,
    receiver,
)

from ..contract.observing import asynchronous, rows
from .models import Author, Book, Car, Page, Person

Line = tuple[Any, ...]


@pytest.fixture
def saves(installed) -> list[Line]:
    """Instance, sender, created and raw of each save, before and after."""
    lines: list[Line] = []

    @receiver([pre_save, post_save])
    def save(sender, signal, instance, created, raw, **kwargs):
        lines.append((signal.name, sender, instance, created, raw))

    return lines


@pytest.fixture
def deletes(installed) -> list[Line]:
    """Instance, sender and origin of each delete, before and after."""
    lines: list[Line] = []

    @receiver([pre_delete, post_delete])
    def deleted(sender, signal, instance, origin, **kwargs):
        assert instance.id is not None
        lines.append((signal.name, sender, instance, origin))

    return lines


def both(*line: Any) -> list[Line]:
    """The line before, and the line after."""
    return [("pre_save", *line), ("post_save", *line)]


def taken(lines: list[Line]) -> list[Line]:
    """The lines so far; the list starts anew."""
    found = list(lines)
    lines.clear()
    return found


# -- SignalTests -----------------------------------------------------------------------------------


def test_constructing_sends_pre_init_with_the_arguments_and_post_init_with_the_instance(installed):
    """``test_model_pre_init_and_post_init``."""
    heard: list[Any] = []
    pre_init.connect(lambda sender, args, kwargs, **more: heard.append((args, kwargs)), weak=False)
    post_init.connect(lambda sender, instance, **more: heard.append(instance), weak=False)
    person = Person(first_name="John", last_name="Doe")
    assert heard == [((), {"first_name": "John", "last_name": "Doe"}), person]


def test_creating_updating_and_raw_saves_send_pre_save_and_post_save(
    session: Session, saves: list[Line]
):
    """``test_save_signals``: ``created`` and ``raw``; an explicit key does not make an update."""
    john = Person(first_name="John", last_name="Smith")
    session.add(john)
    session.flush()
    assert taken(saves) == both(Person, john, True, False)
    john.first_name = "Tom"
    session.flush()
    assert taken(saves) == both(Person, john, False, False)
    with sqla_signals.raw(session):
        john.first_name = "Tim"
    assert taken(saves) == both(Person, john, False, True)
    james = Person(id=99999, first_name="James", last_name="Jones")
    session.add(james)
    session.commit()
    assert taken(saves) == both(Person, james, True, False)
    assert rows(session.get_bind(), Person.first_name) == ["James", "Tim"]


def test_a_new_primary_key_is_an_update_and_no_second_row(session: Session, saves: list[Line]):
    """``test_save_signals`` differs: Django's ``save()`` would INSERT a row under the new key."""
    james = Person(id=99999)
    session.add(james)
    session.commit()
    saves.clear()
    james.id = 99998
    session.commit()
    assert saves == both(Person, james, False, False)
    assert rows(session.get_bind(), Person.id) == [99998]


def test_saving_what_has_not_changed_sends_nothing(session: Session, saves: list[Line]):
    """``test_save_signals`` differs: there is no ``save()``, and a flush writes no such row."""
    john = Person(first_name="John")
    session.add(john)
    session.commit()
    saves.clear()
    assert john.first_name == "John"
    john.first_name = "John"
    session.add(john)
    session.commit()
    assert saves == []


def test_the_sender_is_the_same_for_an_instance_with_deferred_columns(
    session: Session, saves: list[Line]
):
    """``test_save_signals``, its last part."""
    session.add(Person(first_name="John"))
    session.commit()
    session.expunge_all()
    saves.clear()
    person = session.scalars(select(Person).options(defer(Person.first_name))).one()
    person.last_name = "Reese"
    session.commit()
    assert saves == both(Person, person, False, False)


def test_deleting_sends_pre_delete_and_post_delete_to_any_callable(session: Session):
    """``test_delete_signals``. ``origin`` differs: it is ``None`` for what was deleted itself."""
    heard: list[Line] = []

    class PostDelete:
        def __call__(self, sender, instance, origin, **kwargs) -> None:
            heard.append(("post_delete", sender, instance, instance.id is None, origin))

    @receiver(pre_delete)
    def before(sender, instance, origin, **kwargs):
        heard.append(("pre_delete", sender, instance, instance.id is None, origin))

    after = PostDelete()
    post_delete.connect(after)
    person = Person(first_name="John")
    session.add_all([person, Person(id=99998, first_name="James")])
    session.commit()
    session.delete(person)
    session.commit()
    assert heard == [
        ("pre_delete", Person, person, False, None),
        ("post_delete", Person, person, False, None),
    ]
    assert rows(session.get_bind(), Person.first_name) == ["James"]


def test_a_cascade_has_the_deleted_instance_as_its_origin(session: Session, deletes: list[Line]):
    """``test_delete_signals_origin_model``: all before, then all after, the pages first."""
    book = Book(name="Rayuela", pages=[Page(text="1"), Page(text="2")])
    session.add(book)
    session.commit()
    first, second = book.pages
    session.delete(book)
    session.commit()
    assert set(deletes[:3]) == {
        ("pre_delete", Page, first, book),
        ("pre_delete", Page, second, book),
        ("pre_delete", Book, book, None),
    }
    assert deletes[3:] == [
        ("post_delete", Page, first, book),
        ("post_delete", Page, second, book),
        ("post_delete", Book, book, None),
    ]
    assert rows(session.get_bind(), Page.id) == []


def test_deleting_what_a_query_finds_is_deleting_each_instance(
    session: Session, deletes: list[Line]
):
    """``test_delete_signals_origin_queryset`` differs: there is no queryset to be the origin."""
    session.add(Book(name="Rayuela", pages=[Page(text="1")]))
    session.commit()
    for book in session.scalars(select(Book)):
        session.delete(book)
    session.commit()
    assert [(signal, sender, origin) for signal, sender, _, origin in deletes[2:]] == [
        ("post_delete", Page, book),
        ("post_delete", Book, None),
    ]
    assert rows(session.get_bind(), Book.id) == []


def test_a_delete_statement_can_send_the_signals_of_its_rows(session: Session, deletes: list[Line]):
    """``test_delete_signals_origin_queryset``: what Django does always, if it is asked for."""
    session.add_all([Person(first_name="John"), Person(first_name="James")])
    session.commit()
    statement = delete(Person).where(Person.first_name == "John")
    session.execute(statement, execution_options={"signals": "rows"})
    session.commit()
    assert [(signal, sender, origin) for signal, sender, _, origin in deletes] == [
        ("pre_delete", Person, None),
        ("post_delete", Person, None),
    ]
    assert rows(session.get_bind(), Person.first_name) == ["James"]


def test_a_decorated_receiver_is_called_for_any_sender_or_for_its_own(session: Session):
    """``test_decorators``."""
    heard: list[Any] = []

    @receiver(pre_save)
    def any_model(sender, instance, **kwargs):
        heard.append(("any", instance))

    @receiver(pre_save, sender=Car)
    def cars(sender, instance, **kwargs):
        heard.append(("car", instance))

    car, person = Car(make="Volkswagen"), Person()
    session.add(car)
    session.flush()
    assert heard == [("any", car), ("car", car)]
    session.add(person)
    session.flush()
    assert heard[2:] == [("any", person)]


def test_a_change_of_a_many_to_many_collection_saves_neither_side(
    session: Session, saves: list[Line]
):
    """``test_save_and_delete_signals_with_m2m``: only the association table is written."""
    author, book = Author(name="Neal Stephenson"), Book(name="Snow Crash")
    session.add(author)
    session.flush()
    assert taken(saves) == both(Author, author, True, False)
    session.add(book)
    session.flush()
    assert taken(saves) == both(Book, book, True, False)
    book.authors = [author]
    session.flush()
    assert rows(session, Book.authors.property.secondary.c.author_id) == [author.id]
    book.authors = []
    session.flush()
    assert rows(session, Book.authors.property.secondary.c.author_id) == []
    assert saves == []


def test_receivers_that_disconnect_themselves_do_not_keep_others_from_being_called(
    session: Session,
):
    """``test_disconnect_in_dispatch``."""
    heard: list[str] = []

    class Handler:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, sender, signal, **kwargs) -> None:
            heard.append(self.name)
            signal.disconnect(self, sender=sender)

    for name in "ab":
        post_save.connect(Handler(name), sender=Person, weak=False)
    session.add(Person())
    session.commit()
    assert heard == ["a", "b"]
    assert not post_save.receivers
    session.add(Person())
    session.commit()
    assert heard == ["a", "b"]


def test_connect_holds_a_receiver_weakly_unless_told_otherwise(installed):
    """``test_lazy_model_signal``. The decorator is the other way round: see the next test."""
    heard: list[str] = []

    def make(name: str) -> Callable[..., None]:
        def hear(sender, **kwargs) -> None:
            heard.append(name)

        return hear

    pre_init.connect(make("weak"))
    pre_init.connect(make("strong"), weak=False)
    gc.collect()
    Person()
    assert heard == ["strong"]


def test_the_decorator_holds_a_local_function_strongly(installed):
    """Differs from Django's, where a decorated local function is forgotten without a word."""
    heard: list[str] = []

    def connect() -> None:
        @receiver(pre_init)
        def local(sender, **kwargs):
            heard.append("local")

    connect()
    gc.collect()
    Person()
    assert heard == ["local"]


def test_disconnect_tells_whether_there_was_something_to_disconnect(installed):
    """``test_disconnect_model``."""
    heard = []

    def hear(sender, **kwargs):
        heard.append(sender)

    post_init.connect(hear, sender=Person)
    assert post_init.disconnect(hear, sender=Person) is True
    assert post_init.disconnect(hear, sender=Person) is False
    Person()
    assert heard == []


# -- LazyModelRefTests -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "shop.", ".Order", "shop Order", "shop/Order", "1st"])
def test_a_string_that_can_be_no_name_of_a_class_is_refused(name: str):
    """``test_invalid_sender_model_name``. A bare class name is one here, without an app label."""
    with pytest.raises(ReceiverOptionError, match="is not the name of a class") as caught:
        post_init.connect(lambda sender, **kwargs: None, sender=name, weak=False)
    assert isinstance(caught.value, ValueError)
    assert not post_init.receivers


def heard_of(make: Callable[[], type], sender: str) -> list[str]:
    """Who is heard of when a class with that name is made and called."""
    heard: list[str] = []
    post_init.connect(lambda cls, **kwargs: heard.append(cls.__name__), sender=sender, weak=False)
    make()()
    return heard


@pytest.mark.parametrize("name", ["Book", f"{Book.__module__}.Book"])
def test_a_string_sender_is_a_class_that_is_mapped_already(name: str, installed):
    """``test_already_loaded_model``."""
    assert heard_of(lambda: Book, name) == ["Book"]


def make_created() -> Any:
    """A class that nobody has seen before."""

    class OwnBase(DeclarativeBase):
        pass

    class Created(OwnBase):
        __tablename__ = "created"
        id: Mapped[int] = mapped_column(primary_key=True)

    return Created


@pytest.mark.parametrize("name", ["Created", f"{__name__}.make_created.<locals>.Created"])
def test_a_string_sender_is_a_class_that_is_mapped_later(name: str, installed):
    """``test_not_loaded_model``."""
    assert heard_of(make_created, name) == ["Created"]


def test_a_string_sender_can_be_disconnected_once_its_class_is_mapped(installed):
    """``test_disconnect_registered_model``, and by the class as in ``test_already_loaded_model``.

    Django returns ``None`` for a string sender; here the answer is known, ``True`` or ``False``.
    """
    heard = []

    def hear(sender, **kwargs):
        heard.append(sender)

    created = make_created()
    for connected in ("Created", created):
        for disconnected in ("Created", created):
            post_init.connect(hear, sender=connected)
            assert post_init.disconnect(hear, sender=disconnected) is True
            assert post_init.disconnect(hear, sender=disconnected) is False
    created()
    assert heard == []


def test_disconnecting_one_class_leaves_the_others_of_the_receiver(installed):
    """Also where both were given by name."""
    heard = []

    @receiver(post_init, sender=["Person", "Car", Author])
    def hear(sender, **kwargs):
        heard.append(sender)

    assert post_init.disconnect(hear, sender=[Person, "Author"])
    for make in (Person, Car, Author):
        make()
    assert heard == [Car]


def test_a_string_sender_can_be_disconnected_before_there_is_such_a_class(installed):
    """``test_disconnect_unregistered_model``."""
    heard = []

    def hear(sender, **kwargs):
        heard.append(sender)

    post_init.connect(hear, sender="Created")
    assert post_init.disconnect(hear, sender="Created") is True
    assert post_init.disconnect(hear, sender="Created") is False
    make_created()()
    assert heard == []


def test_a_class_as_the_sender_waits_for_nothing(installed):
    """``test_register_model_class_senders_immediately``: not for mappers to be configured."""
    created = make_created()
    post_init.connect(lambda sender, **kwargs: None, sender=created, weak=False)
    assert not created.__mapper__.configured
    assert post_init.has_receivers_for(created)


# -- AsyncReceiversTests ---------------------------------------------------------------------------


class Sync:
    """A callable that counts."""

    calls = 0

    def __call__(self, sender, **kwargs) -> int:
        self.calls += 1
        return self.calls


class Async:
    """An async callable that counts; nothing else marks it as one."""

    calls = 0

    async def __call__(self, sender, **kwargs) -> int:
        self.calls += 1
        return self.calls


class ReceiverError(Exception):
    """What the receivers below fail with."""


error = ReceiverError()


async def failing(sender, **kwargs):
    raise error


@asynchronous
async def test_send_async_awaits_async_receivers_and_calls_the_others():
    """``test_asend``, ``test_asend_only_async_receivers``: one after the other, in order."""
    done, sync, other = Signal("done"), Sync(), Async()
    done.connect(other)
    assert await done.send_async("x") == [(other, 1)]
    done.connect(sync)
    assert await done.send_async("x") == [(other, 2), (sync, 1)]


def test_send_refuses_async_receivers_before_it_calls_any():
    """``test_send`` differs: Django starts an event loop for them, whatever the caller is doing."""
    done, sync, other = Signal("done"), Sync(), Async()
    done.connect(sync)
    done.connect(other)
    with pytest.raises(AsyncReceiverError, match="send_async"):
        done.send("x")
    assert sync.calls == 0
    results = done.send("x", _async_wrapper=lambda fn: lambda *a, **k: asyncio.run(fn(*a, **k)))
    assert results == [(sync, 1), (other, 1)]


def test_send_robust_returns_what_an_async_receiver_fails_with(caplog: pytest.LogCaptureFixture):
    """``test_send_robust`` differs: it is not called; the list is in the order of connection."""
    done, sync = Signal("done"), Sync()
    done.connect(failing)
    done.connect(sync)
    with caplog.at_level(logging.ERROR, "sqla_signals"):
        (first, result), second = done.send_robust("x")
    assert first is failing
    assert isinstance(result, AsyncReceiverError)
    assert second == (sync, 1)
    assert "failing" in caplog.text


@asynchronous
async def test_receivers_for_lets_async_code_gather_results_and_exceptions():
    """``test_asend_robust``, ``test_asend_robust_only_async_receivers``: asyncio has the means."""
    done, other = Signal("done"), Async()
    done.connect(failing)
    done.connect(other)
    receivers = list(done.receivers_for("x"))
    results = await asyncio.gather(*(fn("x") for fn in receivers), return_exceptions=True)
    assert list(zip(receivers, results, strict=True)) == [(failing, error), (other, 1)]


counted: ContextVar[int] = ContextVar("counted")


def count_up(sender: Any, **kwargs: Any) -> int:
    """A receiver that changes what the next one and the caller can see."""
    counted.set(counted.get() + 1)
    return counted.get()


class CountUp:
    """The same, as often as it is made."""

    def __call__(self, sender: Any, **kwargs: Any) -> int:
        return count_up(sender)


class AsyncCountUp:
    """And async, with the event loop getting its turn in between."""

    async def __call__(self, sender: Any, **kwargs: Any) -> int:
        await asyncio.sleep(0)
        return count_up(sender)


@pytest.mark.parametrize("robust", [False, True], ids=["send", "send_robust"])
def test_receivers_and_their_caller_share_context_variables(robust: bool):
    """``test_send_correct_contextvars_sharing_sync_receivers``, of 6.1.

    And ``test_send_robust_correct_contextvars_sharing_sync_receivers``.
    """
    done, receivers = Signal("done"), [CountUp(), CountUp()]
    for one in receivers:
        done.connect(one)
    counted.set(1)
    results = (done.send_robust if robust else done.send)("x")
    assert results == list(zip(receivers, [2, 3], strict=True))
    assert counted.get() == 3


@pytest.mark.parametrize(
    "kinds", [[AsyncCountUp] * 2, [CountUp] * 2, [CountUp, AsyncCountUp], [AsyncCountUp, CountUp]]
)
@asynchronous
async def test_async_receivers_and_their_caller_share_context_variables(kinds: list[Any]):
    """``test_asend_correct_contextvars_sharing_async_receivers``, of 6.1, and its like.

    These are ``test_asend_correct_contextvars_sharing_sync_receivers`` and
    ``test_asend_correct_contextvars_sharing_mix_receivers``.
    """
    done, receivers = Signal("done"), [kind() for kind in kinds]
    for one in receivers:
        done.connect(one)
    counted.set(1)
    assert await done.send_async("x") == list(zip(receivers, [2, 3], strict=True))
    assert counted.get() == 3


@asynchronous
async def test_receivers_that_are_awaited_robustly_share_context_variables():
    """``test_asend_robust_correct_contextvars_sharing_async_receivers``, of 6.1, and its like.

    These are ``test_asend_robust_correct_contextvars_sharing_sync_receivers`` and
    ``test_asend_robust_correct_contextvars_sharing_mix_receivers``. They differ in that
    ``asyncio.gather`` gives each a context of its own: so they are awaited in turn.
    """
    done, kinds = Signal("done"), [CountUp, AsyncCountUp, failing, AsyncCountUp]
    receivers = [kind if kind is failing else kind() for kind in kinds]
    for one in receivers:
        done.connect(one)
    counted.set(1)
    results = []
    for fn in done.receivers_for("x"):
        try:
            result = fn("x")
            results.append(await result if asyncio.iscoroutine(result) else result)
        except ReceiverError as raised:
            results.append(raised)
    assert results == [2, 3, error, 4]
    assert counted.get() == 4


def test_async_receivers_have_no_context_variables_to_share_with_send():
    """``test_send_correct_contextvars_sharing_async_receivers``, of 6.1, differs: it is refused.

    So do ``test_send_correct_contextvars_sharing_mix_receivers``,
    ``test_send_robust_correct_contextvars_sharing_async_receivers`` and
    ``test_send_robust_correct_contextvars_sharing_mix_receivers``, of which sync receivers remain.
    """
    done, sync, other = Signal("done"), CountUp(), AsyncCountUp()
    done.connect(sync)
    done.connect(other)
    counted.set(1)
    with pytest.raises(AsyncReceiverError):
        done.send("x")
    assert counted.get() == 1
    (_, first), (_, second) = done.send_robust("x")
    assert first == counted.get() == 2
    assert isinstance(second, AsyncReceiverError)


@asynchronous
async def test_receivers_of_a_flush_share_context_variables_with_their_caller(
    database: Engine, async_engine: AsyncEngine, installed: Any
):
    """Also out of the greenlet in which SQLAlchemy does the work of an ``AsyncSession``."""
    for signal in (pre_save, post_save):
        signal.connect(CountUp(), Person, weak=False)
        signal.connect(AsyncCountUp(), Person, weak=False)
    counted.set(1)
    async with AsyncSession(async_engine) as session:
        session.add(Person(first_name="Ada"))
        await session.commit()
        assert (await session.scalars(select(func.count(Person.id)))).one() == 1
    assert counted.get() == 5

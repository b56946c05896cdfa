"""A signal is a blinker signal, without blinker's known defects."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from typing import Any

import blinker
import pytest
from blinker import ANY
from sqlalchemy import Engine
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import (
    AsyncReceiverError,
    ReceiverOptionError,
    Signal,
    post_save,
    pre_delete,
    pre_save,
    receiver,
)

from .models import Author, Base, Book
from .observing import FLUSH_SIGNALS, Log, asynchronous, both, rows


@pytest.fixture
def paid() -> Signal:
    """A user's own signal."""
    return Signal("paid", "Sent when an order was paid.")


def connect(signal: Signal, result: object, **options: Any):
    """Connect a receiver that returns ``result``."""

    def fn(sender, **kwargs):
        return result

    return signal.connect(fn, weak=False, **options)


def results(sent: list[tuple[Any, Any]]) -> list[Any]:
    """The results alone."""
    return [result for _, result in sent]


# -- the class -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", FLUSH_SIGNALS, ids=lambda signal: signal.name)
def test_the_built_in_signals_are_signals_and_blinker_signals(signal: Signal):
    """With a name and a docstring each."""
    assert isinstance(signal, Signal)
    assert isinstance(signal, blinker.NamedSignal)
    assert signal.name in repr(signal)
    assert signal.__doc__
    assert signal.__doc__ != Signal.__doc__


def test_a_signal_of_ones_own_is_usable_at_once(paid: Signal):
    """Its name, its docstring, its receivers."""
    assert (paid.name, paid.__doc__) == ("paid", "Sent when an order was paid.")
    assert not paid.receivers
    fn = connect(paid, "thanks")
    assert paid.receivers
    assert paid.send("an order", amount=3) == [(fn, "thanks")]


def test_a_signal_may_be_subclassed():
    """Without calling more than ``super().__init__``."""

    class Loud(Signal):
        def send(self, *args, **kwargs):
            return [(fn, str(result).upper()) for fn, result in super().send(*args, **kwargs)]

    loud = Loud("loud")
    connect(loud, "hear")
    assert results(loud.send()) == ["HEAR"]


# -- send ----------------------------------------------------------------------------------------


def test_send_returns_pairs_of_receiver_and_result_in_the_order_of_connection(paid: Signal):
    """Blinker's order is that of a set."""
    receivers = [connect(paid, number) for number in range(50)]
    assert paid.send("an order") == list(zip(receivers, range(50), strict=True))


def test_send_passes_sender_and_keyword_arguments(paid: Signal):
    """The sender may be left out, and any keyword may be sent, even those named like ours."""
    seen = []
    paid.connect(lambda sender, **kwargs: seen.append((sender, kwargs)), weak=False)
    paid.send("an order", amount=3, self=1, signal=2, receiver=4)
    paid.send()
    assert seen == [("an order", {"amount": 3, "self": 1, "signal": 2, "receiver": 4}), (None, {})]


def test_an_exception_passes_through_send_and_ends_it(paid: Signal):
    """The receivers behind are not called."""

    @paid.connect
    def fails(sender, **kwargs):
        raise ZeroDivisionError

    later = []
    paid.connect(lambda sender, **kwargs: later.append(sender), weak=False)
    with pytest.raises(ZeroDivisionError):
        paid.send("an order")
    assert later == []


def test_any_object_can_be_the_sender_of_a_signal_of_ones_own(paid: Signal):
    """Strings and numbers are compared by value, other objects by identity."""

    class Shop:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other):
            return True

    here, there = Shop(), Shop()
    connect(paid, "here", sender=here)
    connect(paid, "text", sender="a name")
    connect(paid, "number", sender=1000)
    connect(paid, "class", sender=Shop)
    connect(paid, "any")
    assert results(paid.send(here)) == ["here", "any"]
    assert results(paid.send(there)) == ["any"]
    assert results(paid.send("a " + "name")) == ["text", "any"]
    assert results(paid.send(int("1000"))) == ["number", "any"]
    assert results(paid.send(Shop)) == ["class", "any"]
    assert results(paid.send()) == ["any"]


def test_a_sender_is_held_weakly_and_its_connections_end_with_it(paid: Signal):
    """A new object at the same address does not inherit them."""

    class Shop:
        pass

    shop = Shop()
    connect(paid, "here", sender=shop)
    assert paid.has_receivers_for(shop)
    del shop
    gc.collect()
    assert not paid.receivers


def test_the_built_in_signals_may_be_sent_by_hand(installed: Any):
    """In a test of a receiver, for instance."""
    seen = []

    @receiver(post_save, sender=Author)
    def fn(sender, instance, created, **kwargs):
        seen.append((instance, created))

    author = Author(name="a")
    post_save.send(Author, instance=author, created=True)
    post_save.send(Book, instance=author, created=True)
    assert seen == [(author, True)]


# -- send_async, async receivers -----------------------------------------------------------------


class AsyncCallable:
    """An instance with ``async def __call__``, which blinker takes for a sync one."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def __call__(self, sender, **kwargs):
        await asyncio.sleep(0)
        self.calls.append(sender)
        return "called"


@asynchronous
async def test_send_async_awaits_async_receivers_and_calls_sync_ones_in_one_order(paid: Signal):
    """Each receiver is done before the next one begins."""
    seen = []

    async def slow(sender, **kwargs):
        seen.append("slow begins")
        await asyncio.sleep(0)
        seen.append("slow ends")
        return "slow"

    def sync(sender, **kwargs):
        seen.append("sync")
        return "sync"

    instance = AsyncCallable()
    for fn in (slow, sync, instance):
        paid.connect(fn)
    assert await paid.send_async("an order") == [
        (slow, "slow"),
        (sync, "sync"),
        (instance, "called"),
    ]
    assert seen == ["slow begins", "slow ends", "sync"]
    assert instance.calls == ["an order"]


def test_send_with_an_async_receiver_is_an_error_and_calls_nobody(paid: Signal):
    """The error names the receiver and the remedy, ``send_async``."""
    seen = []
    paid.connect(lambda sender, **kwargs: seen.append(sender), weak=False)
    instance = AsyncCallable()
    paid.connect(instance)
    with pytest.raises(AsyncReceiverError, match=r"paid.*AsyncCallable.*send_async"):
        paid.send("an order")
    assert seen == instance.calls == []


def test_send_with_an_async_wrapper_calls_async_receivers_through_it(paid: Signal):
    """Blinker's ``_async_wrapper``."""

    async def fn(sender, **kwargs):
        return "awaited"

    paid.connect(fn)

    def wrapper(fn):
        return lambda *args, **kwargs: asyncio.run(fn(*args, **kwargs))

    assert paid.send("an order", _async_wrapper=wrapper) == [(fn, "awaited")]


@asynchronous
async def test_send_async_with_a_sync_wrapper_calls_sync_receivers_through_it(paid: Signal):
    """Blinker's ``_sync_wrapper``."""
    fn = connect(paid, "sync")

    def wrapper(fn):
        async def wrapped(*args, **kwargs):
            return f"wrapped {fn(*args, **kwargs)}"

        return wrapped

    assert await paid.send_async("an order", _sync_wrapper=wrapper) == [(fn, "wrapped sync")]


# -- send_robust ---------------------------------------------------------------------------------


def test_send_robust_returns_exceptions_in_the_list_and_logs_them(paid: Signal, caplog):
    """The others are called; the log has signal, receiver and traceback."""
    error = ZeroDivisionError()

    def fails(sender, **kwargs):
        raise error

    paid.connect(fails)
    other = connect(paid, "other")
    with caplog.at_level(logging.ERROR, logger="sqla_signals"):
        assert paid.send_robust("an order", amount=3) == [(fails, error), (other, "other")]
    (record,) = caplog.records
    assert record.name == "sqla_signals"
    assert "paid" in record.getMessage()
    assert "fails" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_send_robust_lets_what_is_no_exception_pass(paid: Signal, error: type[BaseException]):
    """Interrupts are not results."""

    @paid.connect
    def fails(sender, **kwargs):
        raise error

    with pytest.raises(error):
        paid.send_robust("an order")


def test_send_robust_survives_a_sender_that_cannot_be_shown(paid: Signal, caplog):
    """Its ``repr()`` is not what was to be sent."""

    class Detached:
        def __repr__(self) -> str:
            raise LookupError("not bound to a Session")

    @paid.connect
    def fails(sender, **kwargs):
        raise ValueError("no")

    ((_, result),) = paid.send_robust(Detached())
    assert isinstance(result, ValueError)
    assert "Detached object at" in caplog.text


def test_send_robust_with_an_async_receiver_returns_the_error_for_it_alone(paid: Signal, caplog):
    """The sync receivers are called."""
    instance = AsyncCallable()
    paid.connect(instance)
    connect(paid, "other")
    first, second = results(paid.send_robust("an order"))
    assert isinstance(first, AsyncReceiverError)
    assert second == "other"
    assert "AsyncCallable" in caplog.text


# -- connecting ----------------------------------------------------------------------------------


def test_connect_via_is_a_decorator_with_a_sender(session: Session):
    """Blinker's own decorator; weak on demand."""
    seen = []

    @post_save.connect_via(Author)
    def fn(sender, instance, **kwargs):
        seen.append(instance)

    author = Author(name="a")
    session.add_all([author, Book()])
    session.flush()
    assert seen == [author]

    def setup():
        @post_save.connect_via(Book, weak=True)
        def weakly(sender, instance, **kwargs):
            seen.append(instance)

    setup()
    gc.collect()
    session.add(Book())
    session.flush()
    assert seen == [author]


def test_connected_to_connects_for_the_block_alone(session: Session):
    """Also when the block ends with an exception."""
    log = Log()
    with pytest.raises(ZeroDivisionError), post_save.connected_to(log, sender=Author):
        session.add(Author(name="a"))
        session.add(Book(name="b"))
        session.flush()
        raise ZeroDivisionError
    session.add(Author(name="c"))
    session.flush()
    assert log.lines == ["post_save created Author(a)"]
    assert not post_save.receivers


@pytest.mark.parametrize("sender", [ANY, Author])
def test_connected_to_keeps_the_permanent_connection(session: Session, sender: object):
    """Blinker removes it at the end of the block; and inside, one receiver is called once."""
    log = Log()
    post_save.connect(log, sender=Author)
    with post_save.connected_to(log, sender=sender):
        session.add(Author(name="a"))
        session.flush()
    session.add(Author(name="b"))
    session.flush()
    assert log.lines == ["post_save created Author(a)", "post_save created Author(b)"]


def test_connected_to_nests(paid: Signal):
    """The inner block's end does not disconnect what the outer one connected."""
    log = []

    def fn(sender, **kwargs):
        log.append(sender)

    with paid.connected_to(fn):
        with paid.connected_to(fn):
            paid.send(1)
        paid.send(2)
    paid.send(3)
    assert log == [1, 2]


def test_has_receivers_for_says_whether_anybody_would_be_called():
    """For a class: by itself, by its name, by its base, by any."""
    assert not post_save.has_receivers_for(Author)
    for sender in (Author, "Author", Base, ANY, [Book, Author]):
        fn = connect(post_save, None, sender=sender)
        assert post_save.has_receivers_for(Author)
        post_save.disconnect(fn)
    connect(post_save, None, sender=Book)
    assert not post_save.has_receivers_for(Author)


def test_receivers_for_yields_those_who_would_be_called_in_order():
    """The callables themselves."""
    first = connect(post_save, None, sender=Author)
    connect(post_save, None, sender=Book)
    last = connect(post_save, None)
    assert list(post_save.receivers_for(Author)) == [first, last]


def test_receiver_connected_and_disconnected_are_sent(paid: Signal):
    """Blinker's own meta-signals, with its arguments; and silent when nothing happened."""
    seen = []

    def note(signal, **kwargs):
        seen.append((signal, kwargs))

    def fn(sender, **kwargs): ...

    paid.receiver_connected.connect(note)
    paid.receiver_disconnected.connect(note)
    paid.connect(fn, sender="an order", weak=False)
    assert seen == [(paid, {"receiver": fn, "sender": "an order", "weak": False})]
    seen.clear()
    paid.disconnect(fn, sender="an order")
    assert seen == [(paid, {"receiver": fn, "sender": "an order"})]
    seen.clear()
    paid.disconnect(fn)
    assert seen == []


# -- muted ---------------------------------------------------------------------------------------


def test_muted_silences_the_signal_inside_the_block(session: Session, log: Log):
    """Other signals are sent, and rows are written."""
    with post_save.muted():
        assert post_save.is_muted
        session.add(Author(name="a"))
        session.flush()
    assert not post_save.is_muted
    session.add(Author(name="b"))
    session.flush()
    assert log.lines == ["pre_save created Author(a)", *both("save created Author(b)")]
    assert rows(session, Author.name) == ["a", "b"]


def test_muted_ends_with_an_exception_too(paid: Signal):
    """As any context manager should."""
    connect(paid, 1)
    with pytest.raises(ZeroDivisionError), paid.muted():
        raise ZeroDivisionError
    assert results(paid.send()) == [1]


def test_muted_nests(paid: Signal):
    """Blinker un-mutes at the end of the inner block."""
    connect(paid, 1)
    with paid.muted():
        with paid.muted():
            assert paid.send() == []
        assert paid.is_muted
        assert paid.send() == []
    assert results(paid.send()) == [1]


def test_muted_is_not_seen_by_other_threads(paid: Signal):
    """Blinker mutes the whole process."""
    connect(paid, 1)
    sent = []
    with paid.muted():
        thread = threading.Thread(target=lambda: sent.append((paid.is_muted, results(paid.send()))))
        thread.start()
        thread.join()
        assert paid.send() == []
    assert sent == [(False, [1])]


@asynchronous
async def test_muted_is_not_seen_by_other_tasks(paid: Signal):
    """Two tasks take turns; each has its own mute."""
    connect(paid, 1)
    inside, done = asyncio.Event(), asyncio.Event()

    async def mutes():
        with paid.muted():
            inside.set()
            await done.wait()
            return results(paid.send())

    async def sends():
        await inside.wait()
        sent = results(paid.send())
        done.set()
        return sent

    assert await asyncio.gather(mutes(), sends()) == [[], [1]]


def test_mute_counts_when_the_change_happens(session: Session, log: Log):
    """A flush inside the block is silent for good; one behind it sends."""
    with sqla_signals.mute():
        author = Author(name="a")
        session.add(author)
        session.flush()
        author.name = "b"
    session.commit()
    assert log.lines == both("save updated Author(b)")


def test_mute_can_be_narrowed_to_a_signal_a_sender_and_a_receiver(session: Session):
    """Each of the three may be given; blocks add up."""
    one, two = Log(), Log()
    for log in (one, two):
        receiver([pre_save, post_save, pre_delete], sender=[Author, Book])(log)
    with sqla_signals.mute(pre_save), sqla_signals.mute(sender=Book, receiver=two):
        author = Author(name="a")
        session.add(author)
        session.flush()
        session.add(Book(name="b"))
        session.flush()
        session.delete(author)
        session.flush()
    sent = ["post_save created Author(a)", "post_save created Book(b)", "pre_delete Author(a)"]
    assert one.lines == sent
    assert two.lines == [sent[0], sent[2]]


@pytest.mark.parametrize(
    "sender", ["Author", f"{__package__}.models.Author", Base, [Book, "Author"]]
)
def test_mute_takes_senders_as_connect_does(session: Session, log: Log, sender: object):
    """Names, full names, unmapped bases and lists."""
    with sqla_signals.mute(sender=sender):
        session.add(Author(name="a"))
        session.flush()
    assert log.lines == []
    assert rows(session, Author.name) == ["a"]


def test_a_muted_veto_does_not_veto(library: Engine, session: Session):
    """What is muted is not called at all."""

    @receiver(pre_save, sender=Author)
    def veto(sender, **kwargs):
        raise ZeroDivisionError

    with sqla_signals.mute(receiver=veto):
        session.add(Author(name="a"))
        session.commit()
    assert rows(library, Author.name) == ["a"]


def test_disconnect_needs_something_to_disconnect(paid: Signal):
    """Neither a receiver nor a uid is an error and not "everything"."""
    connect(paid, 1)
    with pytest.raises(ReceiverOptionError, match="paid"):
        paid.disconnect()
    assert results(paid.send()) == [1]

"""The behaviours of Django's ``tests/dispatch``, for signals of one's own."""

from __future__ import annotations

import gc
import logging
import weakref
from types import TracebackType
from typing import Any

import pytest

from sqla_signals import ReceiverTypeError, Signal, receiver


def echo(sender: Any, val: Any = None, **kwargs: Any) -> Any:
    """A receiver that returns its argument."""
    return val


class Echo:
    """A receiver that is an instance, and one that is a method."""

    def __call__(self, sender: Any, val: Any = None, **kwargs: Any) -> Any:
        return val

    def method(self, sender: Any, val: Any = None, **kwargs: Any) -> Any:
        return val


class Sender:
    """Anything that sends."""


@pytest.fixture
def signal() -> Signal:
    """A signal without receivers."""
    return Signal("a signal")


@pytest.fixture
def sender() -> Sender:
    """An object that sends."""
    return Sender()


# -- DispatcherTests -------------------------------------------------------------------------------


def test_a_receiver_without_kwargs_is_refused(signal: Signal):
    """``test_cannot_connect_no_kwargs``; here always, and not with ``DEBUG`` alone."""

    def narrow(sender): ...

    with pytest.raises(ReceiverTypeError, match=r"must accept \*\*kwargs"):
        signal.connect(narrow)
    assert not signal.receivers


def test_what_cannot_be_called_is_refused(signal: Signal):
    """``test_cannot_connect_non_callable``."""
    with pytest.raises(TypeError, match="not callable"):
        signal.connect(object())  # type: ignore[type-var]
    assert not signal.receivers


def test_send_returns_the_receivers_with_their_results(signal: Signal, sender: Sender):
    """``test_send``; the sender is the first argument, and given by position."""
    signal.connect(echo, sender=sender)
    assert signal.send(sender, val="test") == [(echo, "test")]
    assert signal.disconnect(echo, sender=sender)
    assert not signal.receivers


@pytest.mark.parametrize("method", ["send", "send_robust"])
def test_sending_to_nobody_returns_an_empty_list(method: str, signal: Signal, sender: Sender):
    """``test_send_no_receivers``, ``test_send_robust_no_receivers``."""
    assert getattr(signal, method)(sender, val="test") == []


@pytest.mark.parametrize("method", ["send", "send_robust"])
def test_a_receiver_without_a_sender_is_called_for_any(method: str, signal: Signal, sender: Sender):
    """``test_send_connected_no_sender``, ``test_send_robust_success``.

    And ``test_send_robust_ignored_sender``.
    """
    signal.connect(echo)
    assert getattr(signal, method)(sender, val="test") == [(echo, "test")]
    assert signal.disconnect(echo)
    assert not signal.receivers


def test_a_receiver_of_another_sender_is_not_called(signal: Signal, sender: Sender):
    """``test_send_different_no_sender``: also where that is the class of the one that sends."""
    signal.connect(echo, sender=Sender)
    signal.connect(echo, sender=object)
    assert signal.send(sender, val="test") == []
    assert signal.send(Sender, val="test") == [(echo, "test")]


def test_a_method_is_forgotten_with_its_instance(signal: Signal, sender: Sender):
    """``test_garbage_collected``; since 6.1 ``test_garbage_collected_receiver``."""
    instance = Echo()
    signal.connect(instance.method, sender=sender)
    assert signal.send(sender, val="test") == [(instance.method, "test")]
    del instance
    gc.collect()
    assert signal.send(sender, val="test") == []
    assert not signal.receivers


def test_an_object_without_weak_references_can_be_a_sender(signal: Signal):
    """``test_unweakrefable_sender``, of 6.1."""
    sender = object()
    signal.connect(echo, sender)
    assert signal.send(sender, val="test") == [(echo, "test")]
    assert signal.send(object(), val="test") == []
    assert signal.disconnect(echo, sender)
    assert not signal.receivers


def test_nobody_hears_of_another_sender_that_has_the_place_of_a_dead_one(signal: Signal):
    """``test_garbage_collected_sender``, of 6.1: an ``id()`` is given out again."""
    signal.connect(echo, sender := Sender())
    place = id(sender)
    del sender
    gc.collect()
    assert not signal.receivers
    others = []
    while id(other := Sender()) != place and len(others) < 10_000:
        others.append(other)
    second = Echo()
    signal.connect(second, other)
    assert signal.send(other, val="test") == [(second, "test")]


def test_what_has_sent_is_not_kept_alive(signal: Signal):
    """``test_cached_garbaged_collected``: receivers are looked up once for each class."""

    class Local: ...

    known = weakref.ref(Local)
    signal.connect(echo)
    signal.send(Local, val="test")
    del Local
    gc.collect()
    assert known() is None
    assert signal.receivers


def test_a_receiver_that_is_connected_many_times_is_called_once(signal: Signal, sender: Sender):
    """``test_multiple_registration``."""
    instance = Echo()
    for _ in range(6):
        signal.connect(instance)
    assert signal.send(sender, val="test") == [(instance, "test")]
    assert len(signal.receivers) == 1
    del instance
    gc.collect()
    assert not signal.receivers


def test_the_second_receiver_with_a_dispatch_uid_is_ignored(signal: Signal, sender: Sender):
    """``test_uid_registration``."""

    @receiver(signal, dispatch_uid="uid")
    def first(sender, **kwargs):
        return 1

    @receiver(signal, dispatch_uid="uid")
    def second(sender, **kwargs):
        return 2

    assert len(signal.receivers) == 1
    assert signal.send(sender) == [(first, 1)]
    assert signal.disconnect(dispatch_uid="uid")
    assert not signal.receivers


def test_send_robust_returns_and_logs_what_a_receiver_raises(
    signal: Signal, sender: Sender, caplog: pytest.LogCaptureFixture
):
    """``test_send_robust_fail``: the logger is ``sqla_signals``, the others are called."""

    @receiver(signal)
    def fails(sender, val, **kwargs):
        raise ValueError("this")

    signal.connect(echo)
    with caplog.at_level(logging.ERROR, "sqla_signals"):
        (failed, error), succeeded = signal.send_robust(sender, val="test")
    assert failed is fails
    assert isinstance(error, ValueError)
    assert error.args == ("this",)
    assert isinstance(error.__traceback__, TracebackType)
    assert succeeded == (echo, "test")
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "fails" in record.getMessage()
    assert "a signal" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_disconnecting_copes_with_receivers_that_are_gone(signal: Signal):
    """``test_disconnection``."""
    first, second, third = Echo(), Echo(), Echo()
    for one in (first, second, third):
        signal.connect(one)
    signal.disconnect(first)
    del second, one
    gc.collect()
    signal.disconnect(third)
    assert not signal.receivers


def test_disconnect_returns_whether_there_was_such_a_receiver(signal: Signal):
    """``test_values_returned_by_disconnection``."""
    first, second = Echo(), Echo()
    signal.connect(first)
    assert signal.disconnect(first) is True
    assert signal.disconnect(second) is False
    assert not signal.receivers


def test_a_signal_tells_whether_it_has_receivers(signal: Signal):
    """``test_has_listeners``: ``receivers`` as a boolean, and ``has_receivers_for``."""
    assert not signal.receivers
    assert not signal.has_receivers_for(object())
    instance = Echo()
    signal.connect(instance)
    assert signal.receivers
    assert signal.has_receivers_for(object())
    signal.disconnect(instance)
    assert not signal.receivers
    assert not signal.has_receivers_for(object())


# -- ReceiverTestCase ------------------------------------------------------------------------------


def test_the_decorator_connects_to_one_signal(signal: Signal, sender: Sender):
    """``test_receiver_single_signal``."""
    heard = []

    @receiver(signal)
    def hear(sender, val, **kwargs):
        heard.append(val)

    signal.send(sender, val=True)
    assert heard == [True]


def test_the_decorator_connects_to_a_list_of_signals(sender: Sender):
    """``test_receiver_signal_list``."""
    a, b, c = Signal("a"), Signal("b"), Signal("c")
    heard = []

    @receiver([a, b, c])
    def hear(sender, val, **kwargs):
        heard.append(val)

    for signal, val in ((a, "a"), (c, "c"), (b, "b")):
        signal.send(sender, val=val)
    assert heard == ["a", "c", "b"]

"""What can be a receiver, and how receivers are called."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy.orm import Session

from sqla_signals import (
    ReceiverTypeError,
    Signal,
    SignalsError,
    post_delete,
    post_save,
    pre_save,
    receiver,
)

from .models import Author, Base, Book, Named
from .observing import rows


def save(session: Session, *instances: object) -> None:
    """Flush new instances, or a new author."""
    session.add_all(instances or [Author(name="a")])
    session.flush()


def test_receiver_returns_the_function_itself():
    """A decorated function can be called as before."""

    def fn(sender, **kwargs):
        return sender

    assert receiver(post_save, sender=Author)(fn) is fn


def test_connect_returns_the_function_itself():
    """As in blinker, so that it can be used as a decorator without options."""

    def fn(sender, **kwargs): ...

    assert post_save.connect(fn) is fn


def test_receiver_takes_a_list_of_signals_and_a_list_of_senders(session: Session):
    """Each signal is connected for each sender, classes and names mixed."""
    seen = []

    @receiver([post_save, post_delete], sender=[Author, "Book"])
    def fn(sender, instance, signal, **kwargs):
        seen.append((signal.name, sender.__name__))

    author, book = Author(name="a"), Book(name="b")
    save(session, author, book)
    session.delete(author)
    session.flush()
    session.delete(book)
    session.flush()
    assert seen == [
        ("post_save", "Author"),
        ("post_save", "Book"),
        ("post_delete", "Author"),
        ("post_delete", "Book"),
    ]
    assert rows(session, Author.id) == rows(session, Book.id) == []


def test_a_receiver_gets_the_sender_first_and_the_rest_by_keyword(session: Session):
    """It names what it needs and leaves the rest in ``**kwargs``."""
    seen = []

    @receiver(post_save, sender=Author)
    def fn(model, *, created, **kwargs):
        seen.append((model, created, sorted(kwargs)))

    save(session)
    others = ["changes", "instance", "raw", "session", "signal", "update_fields", "using"]
    assert seen == [(Author, True, others)]


def test_a_receiver_with_kwargs_alone_is_enough(session: Session):
    """``def fn(sender, **kwargs)`` and ``def fn(*args, **kwargs)`` are receivers."""
    seen = []
    post_save.connect(lambda sender, **kwargs: seen.append(sender), sender=Author, weak=False)
    post_save.connect(lambda *args, **kwargs: seen.append(args), sender=Author, weak=False)
    save(session)
    assert seen == [Author, (Author,)]


# -- order ---------------------------------------------------------------------------------------


def test_receivers_are_called_in_the_order_of_connection_always(session: Session):
    """Whatever their senders are: a class, a name, a base, a mixin, or any."""
    seen = []
    senders = [None, Named, "Author", Author, Base, f"{__package__}.models.Author", [Author, Book]]
    for number in range(70):
        post_save.connect(
            lambda sender, number=number, **kwargs: seen.append(number),
            sender=senders[number * 5 % len(senders)],
            weak=False,
        )
    save(session)
    assert seen == list(range(70))


def test_connecting_again_changes_neither_the_order_nor_the_number_of_calls(session: Session):
    """The same function for the same sender is one connection, in its first place."""
    seen = []

    def first(sender, **kwargs):
        seen.append("first")

    def second(sender, **kwargs):
        seen.append("second")

    for fn in (first, second, first):
        post_save.connect(fn, sender=Author)
    save(session)
    assert seen == ["first", "second"]


def test_a_receiver_that_was_disconnected_comes_last_when_it_is_connected_again(session: Session):
    """Disconnecting gives the place up."""
    seen = []

    def first(sender, **kwargs):
        seen.append("first")

    def second(sender, **kwargs):
        seen.append("second")

    post_save.connect(first, sender=Author)
    post_save.connect(second, sender=Author)
    assert post_save.disconnect(first, sender=Author)
    post_save.connect(first, sender=Author)
    save(session)
    assert seen == ["second", "first"]


def test_a_receiver_is_called_once_per_event_however_many_of_its_senders_match(session: Session):
    """A class, its name, its base, its mixin and any sender are five connections and one call."""
    seen = []

    def fn(sender, instance, **kwargs):
        seen.append(instance)

    for sender in (None, Author, "Author", Named, Base, [Author, Named]):
        post_save.connect(fn, sender=sender)
    author = Author(name="a")
    save(session, author)
    assert seen == [author]


def test_disconnecting_one_of_several_matching_senders_leaves_the_others(session: Session):
    """The receiver is called until its last matching connection is gone."""
    seen = []

    def fn(sender, **kwargs):
        seen.append(sender)

    post_save.connect(fn, sender=Author)
    post_save.connect(fn, sender=Named)
    assert post_save.disconnect(fn, sender=Author)
    save(session)
    assert post_save.disconnect(fn, sender=Named)
    save(session)
    assert seen == [Author]


# -- disconnect ----------------------------------------------------------------------------------


def test_disconnect_returns_whether_something_was_removed():
    """``True`` the first time, ``False`` when nothing was connected like that."""

    def fn(sender, **kwargs): ...

    assert not post_save.disconnect(fn)
    post_save.connect(fn, sender=Author)
    assert not post_save.disconnect(fn, sender=Book)
    assert post_save.disconnect(fn, sender=Author)
    assert not post_save.disconnect(fn, sender=Author)


def test_disconnect_without_a_sender_removes_every_connection_of_the_receiver(session: Session):
    """As in blinker."""
    seen = []

    def fn(sender, **kwargs):
        seen.append(sender)

    post_save.connect(fn, sender=[Author, "Book", Named])
    post_save.connect(fn)
    assert post_save.disconnect(fn)
    save(session, Author(), Book())
    assert seen == []


def test_disconnect_leaves_other_receivers_and_other_signals_alone(session: Session):
    """Only what was named is removed."""
    seen = []

    def fn(sender, signal, **kwargs):
        seen.append(signal.name)

    def other(sender, **kwargs):
        seen.append("other")

    receiver([pre_save, post_save], sender=Author)(fn)
    receiver(post_save, sender=Author)(other)
    assert post_save.disconnect(fn, sender=Author)
    save(session)
    assert seen == ["pre_save", "other"]


# -- what cannot be a receiver -------------------------------------------------------------------


def test_what_is_not_callable_cannot_be_connected():
    """A ``TypeError`` at connect time which names it."""
    with pytest.raises(ReceiverTypeError, match="'not a function'") as caught:
        post_save.connect("not a function")
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, SignalsError)
    assert not post_save.receivers


def without_kwargs(sender, instance, created):
    """A receiver that would break with the next version."""


@dataclass
class CallableWithoutKwargs:
    """An instance that cannot be a receiver, because of its ``__call__``."""

    def __call__(self, sender, instance):
        """Take too little."""


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (without_kwargs, "without_kwargs"),
        (lambda sender: None, "<lambda>"),
        (functools.partial(without_kwargs, created=True), "without_kwargs"),
        (CallableWithoutKwargs(), "CallableWithoutKwargs"),
        (CallableWithoutKwargs().__call__, "CallableWithoutKwargs.__call__"),
    ],
    ids=["function", "lambda", "partial", "instance", "method"],
)
def test_a_receiver_without_kwargs_is_refused_with_the_way_to_mend_it(
    fn: Callable[..., Any], name: str
):
    """The error names the receiver, with file and line, and says to add ``**kwargs``."""
    with pytest.raises(ReceiverTypeError, match=r"Add it: def .*\*\*kwargs\)") as caught:
        receiver(post_save, sender=Author)(fn)
    assert name in str(caught.value)
    assert "post_save" in str(caught.value)
    assert f"{__file__}:" in str(caught.value)
    assert not post_save.receivers


def test_the_way_to_mend_a_receiver_without_kwargs_keeps_its_own_parameters():
    """It can be copied."""

    def fn(sender, instance, *, created=False): ...

    with pytest.raises(ReceiverTypeError) as caught:
        post_save.connect(fn)
    assert str(caught.value).endswith(
        "Add it: def fn(sender, instance, *, created=False, **kwargs)"
    )


def test_a_method_that_is_decorated_in_its_class_is_refused_with_what_to_connect_instead():
    """It would get the sender for ``self``."""
    with pytest.raises(
        ReceiverTypeError, match=r"on_save .*takes self.*post_save\.connect\(self\.on_save\)"
    ):

        class Listener:
            @receiver(post_save, sender=Author)
            def on_save(self, instance, **kwargs): ...

    assert not post_save.receivers


def test_a_signal_that_is_used_as_a_decorator_says_what_to_write():
    """And a signal is no receiver of another one."""
    with pytest.raises(ReceiverTypeError, match=r"post_save is a signal: .*@receiver\(post_save\)"):

        @post_save
        def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverTypeError, match="post_delete is a signal, so it cannot be a"):
        post_save.connect(post_delete)
    assert not post_save.receivers


def test_a_receiver_that_takes_no_sender_is_refused():
    """The first argument is the sender; without room for it, no call could work."""
    with pytest.raises(ReceiverTypeError, match="sender"):
        post_save.connect(lambda **kwargs: None, weak=False)


def test_a_receiver_that_requires_what_is_never_sent_is_refused():
    """``created`` is not sent with a deletion; the error names both."""

    def fn(sender, instance, created, **kwargs): ...

    with pytest.raises(ReceiverTypeError, match="created") as caught:
        post_delete.connect(fn)
    assert "origin" in str(caught.value)
    with pytest.raises(ReceiverTypeError, match="created"):
        receiver([post_save, post_delete])(fn)


def test_a_receiver_of_ones_own_signal_may_require_anything():
    """What a user's own signal sends is not known, unless it was declared."""
    paid = Signal("paid")
    seen = []

    def fn(sender, amount, **kwargs):
        seen.append(amount)

    paid.connect(fn)
    paid.send("an order", amount=3)
    assert seen == [3]
    declared = Signal("paid", arguments=["total"])
    with pytest.raises(ReceiverTypeError, match="amount"):
        declared.connect(fn)


# -- kinds of callables --------------------------------------------------------------------------


class Recorder:
    """Methods of every kind, which note that they were called."""

    seen: list[object] = []

    def method(self, sender, **kwargs):
        self.seen.append(self)

    @classmethod
    def of_class(cls, sender, **kwargs):
        cls.seen.append(cls)

    @staticmethod
    def static(sender, **kwargs):
        Recorder.seen.append("static")


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    """Clear what the methods saw."""
    Recorder.seen.clear()


def test_a_bound_method_is_a_receiver_of_its_instance(session: Session):
    """Two instances are two receivers; the method may be looked up anew to disconnect it."""
    first, second = Recorder(), Recorder()
    post_save.connect(first.method, sender=Author)
    post_save.connect(second.method, sender=Author)
    save(session)
    assert Recorder.seen == [first, second]
    assert post_save.disconnect(first.method, sender=Author)
    save(session)
    assert Recorder.seen == [first, second, second]


def test_a_bound_method_connected_weakly_lives_as_long_as_its_instance(session: Session):
    """The method object itself is gone at once; that does not matter."""
    recorder = Recorder()
    post_save.connect(recorder.method, sender=Author)
    gc.collect()
    save(session)
    assert Recorder.seen == [recorder]
    Recorder.seen.clear()
    del recorder
    gc.collect()
    save(session)
    assert Recorder.seen == []
    assert not post_save.receivers


def test_a_bound_method_connected_strongly_keeps_its_instance(session: Session):
    """``@receiver`` and ``weak=False`` hold what they are given."""
    receiver(post_save, sender=Author)(Recorder().method)
    gc.collect()
    save(session)
    assert [type(one) for one in Recorder.seen] == [Recorder]


def test_class_methods_and_static_methods_are_receivers(session: Session):
    """Looked up on the class or on an instance."""
    recorder = Recorder()
    for fn in (Recorder.of_class, Recorder.static, recorder.of_class, recorder.static):
        post_save.connect(fn, sender=Author, weak=False)
    save(session)
    assert Recorder.seen == [Recorder, "static"]


def test_a_partial_is_a_receiver(session: Session):
    """Each partial object is a receiver of its own, also with the same function."""
    seen = []

    def fn(note, sender, **kwargs):
        seen.append(note)

    one, two = functools.partial(fn, "one"), functools.partial(fn, "two")
    post_save.connect(one, sender=Author)
    post_save.connect(two, sender=Author)
    save(session)
    assert post_save.disconnect(one)
    save(session)
    assert seen == ["one", "two", "two"]


def test_a_callable_instance_is_a_receiver(session: Session):
    """Even one that cannot be hashed and equals others."""

    @dataclass
    class Counter:
        calls: int = 0

        def __call__(self, sender, **kwargs):
            self.calls += 1

    one, two = Counter(), Counter()
    assert one == two
    with pytest.raises(TypeError):
        hash(one)
    post_save.connect(one, sender=Author)
    post_save.connect(two, sender=Author)
    save(session)
    assert post_save.disconnect(two)
    save(session)
    assert (one.calls, two.calls) == (2, 1)


def test_a_wrapped_function_is_judged_by_what_the_wrapper_takes(session: Session):
    """A decorator that passes everything on is a receiver, and is named after its function."""
    seen = []

    def decorate(fn):
        @functools.wraps(fn)
        def wrapper(*args, **kwargs):
            seen.append("wrapper")
            return fn(*args, **kwargs)

        return wrapper

    @receiver(post_save, sender=Author)
    @decorate
    def fn(sender, instance, **kwargs):
        seen.append("fn")

    save(session)
    assert seen == ["wrapper", "fn"]


# -- weak and strong -----------------------------------------------------------------------------


def test_receiver_holds_the_function_strongly(session: Session):
    """A function defined inside another one stays connected."""
    seen = []

    def setup():
        @receiver(post_save, sender=Author)
        def fn(sender, **kwargs):
            seen.append(sender)

    setup()
    gc.collect()
    save(session)
    assert seen == [Author]


@pytest.mark.parametrize(
    "connect",
    [
        lambda fn: post_save.connect(fn, sender=Author),
        lambda fn: post_save.connect(fn, Author, True),
        lambda fn: receiver(post_save, sender=Author, weak=True)(fn),
    ],
    ids=["by default", "by position", "@receiver(weak=True)"],
)
def test_a_weak_connection_ends_with_its_receiver(connect: Callable[..., Any], session: Session):
    """As in blinker: a receiver that is garbage is disconnected."""
    seen = []

    def setup():
        def fn(sender, **kwargs):
            seen.append(sender)

        connect(fn)
        save(session)

    setup()
    gc.collect()
    save(session)
    assert seen == [Author]
    assert not post_save.receivers
    assert not post_save.has_receivers_for(Author)


# -- connecting and disconnecting while a signal is sent -----------------------------------------


def test_a_receiver_connected_by_a_receiver_is_called_from_the_next_send_on(session: Session):
    """A send uses the receivers there were when it began."""
    seen = []

    def late(sender, **kwargs):
        seen.append("late")

    @receiver(post_save, sender=Author)
    def fn(sender, **kwargs):
        seen.append("fn")
        post_save.connect(late, sender=Author)

    save(session)
    assert seen == ["fn"]
    save(session)
    assert seen == ["fn", "fn", "late"]


def test_a_receiver_disconnected_by_a_receiver_is_still_called_by_the_send_under_way(
    session: Session,
):
    """Also when it disconnects itself, and when it comes later in the order."""
    seen = []

    def once(sender, **kwargs):
        seen.append("once")
        post_save.disconnect(once)
        post_save.disconnect(later)

    def later(sender, **kwargs):
        seen.append("later")

    post_save.connect(once, sender=Author)
    post_save.connect(later, sender=Author)
    save(session)
    save(session)
    assert seen == ["once", "later"]
    assert rows(session, Author.name) == ["a", "a"]


def test_connecting_in_a_pre_save_receiver_serves_the_post_save_of_the_same_flush(
    session: Session,
):
    """Each signal looks its receivers up when its own send begins, also for other models."""
    seen = []

    def saved(sender, **kwargs):
        seen.append(sender)

    @receiver(pre_save, sender=Author)
    def fn(sender, session, **kwargs):
        post_save.connect(saved, sender=[Author, Book])
        session.add(Book(name="b"))

    save(session)
    assert sorted(seen, key=repr) == [Author, Book]

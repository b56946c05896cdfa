"""What an observer of calls can rely on, whoever it is."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_signals import (
    AsyncReceiverError,
    Signal,
    on_commit,
    on_rollback,
    post_save,
    pre_save,
    receiver,
    trace,
)
from sqla_signals.receivers.blocks import block
from sqla_signals.receivers.observing import Call, Observer, observers

from .models import Order


class Log(Observer):
    """Notes what it is told, and does something the first time that it is told of one of it."""

    def __init__(self, name: str, lines: list[str], **actions: Callable[[Log], None]) -> None:
        self._name = name
        self._lines = lines
        self._actions = actions

    def _note(self, what: str, about: str) -> None:
        self._lines.append(f"{self._name} {what} {about}")
        self._actions.pop(what, lambda log: None)(self)

    @block
    def around(self, call: Call) -> Iterator[None]:
        name = call.name.rpartition(".")[2]
        self._note("begin", name)
        try:
            yield
        finally:
            error = "" if call.error is None else f": {type(call.error).__name__}"
            self._note("end", f"{name}{error}")

    def called(self, call: Call) -> None:
        assert call.receiver is not None
        assert call.signal is not None
        assert "signal" in call.arguments or not isinstance(call.sender, type)
        self._note("called", f"{call.name.rpartition('.')[2]} {call.on}")

    def transaction_ended(self, session: Session, on: Any) -> None:
        self._note("transaction_ended", on)

    def session_event(self, moment: Any, session: Session, about: Any) -> None:
        self._actions.pop("session_event", lambda log: None)(self)


@contextmanager
def observed_by(*logs: Log) -> Iterator[None]:
    observers.extend(logs)
    try:
        yield
    finally:
        for log in logs:
            if log in observers:
                observers.remove(log)


def leave(log: Log) -> None:
    observers.remove(log)


@dataclass(frozen=True)
class FrozenError(Exception):
    """Cannot be assigned to."""

    reason: str


def test_several_observers_are_told_in_turn_and_leave_in_the_other_order(shop: Engine):
    """Each is entered inside of those before it."""

    @receiver(post_save, sender=Order)
    def saved(sender, **kwargs):
        lines.append("saved")

    lines: list[str] = []
    with observed_by(Log("a", lines), Log("b", lines)), Session(shop) as session:
        session.add(Order())
        session.flush()
        session.rollback()
    assert lines == [
        "a begin saved",
        "b begin saved",
        "a called saved flush",
        "b called saved flush",
        "saved",
        "b end saved",
        "a end saved",
    ]


@pytest.mark.parametrize("moment", ["begin", "called", "end", "transaction_ended", "session_event"])
def test_an_observer_may_leave_at_any_moment(shop: Engine, moment: str):
    """It is told the end of the calls begun and of no other; the one behind it misses nothing."""
    for on in ("flush", "commit", "rollback"):

        def hear(sender, **kwargs):
            pass

        post_save.connect(hear, Order, weak=False, on=on)

    def work() -> None:
        with Session(shop) as session:
            session.add(Order())
            on_commit(session, lambda: None)
            session.commit()
            session.add(Order())
            session.flush()
            on_rollback(session, lambda: None)

    alone: list[str] = []
    with observed_by(Log("stays", alone)):
        work()
    lines: list[str] = []
    with observed_by(Log("leaves", lines, **{moment: leave}), Log("stays", lines)):
        work()
    assert [line for line in lines if line.startswith("stays")] == alone
    left = [line.split()[1] for line in lines if line.startswith("leaves")]
    assert left.count("begin") == left.count("end") <= 1
    with Session(shop) as session:
        assert session.scalars(select(Order.id)).all() == [1, 2]


@pytest.mark.parametrize("on", ["flush", "commit"])
def test_an_observer_added_inside_of_a_call_sees_the_next_one(shop: Engine, on: Any):
    """It is never told the end of a call whose beginning it was not told."""
    lines: list[str] = []
    late = Log("late", lines)

    @receiver(post_save, sender=Order, on=on)
    def first(sender, **kwargs):
        observers.append(late)

    @receiver(post_save, sender=Order, on=on)
    def second(sender, **kwargs):
        pass

    try:
        with observed_by(Log("early", lines)), Session(shop) as session:
            session.add(Order())
            session.commit()
    finally:
        observers.remove(late)
    assert [line for line in lines if line.startswith("late") and "transaction" not in line] == [
        "late begin second",
        f"late called second {on}",
        "late end second",
    ]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [FrozenError("no"), ValueError("no"), StopIteration(1)])
def test_any_exception_passes_through_as_it_is(error: Exception, is_async: bool):
    """Also one that cannot be assigned to, and ``StopIteration``."""
    own = Signal("own")
    lines: list[str] = []

    def fails(sender, **kwargs):
        raise error

    own.connect(fails)
    with (
        observed_by(Log("a", lines), Log("b", lines)),
        pytest.raises((type(error), RuntimeError)) as raised,
    ):
        own.send() if not is_async else asyncio.run(own.send_async())
    if is_async and isinstance(error, StopIteration):  # PEP 479, as without an observer
        assert raised.value.__cause__ is error
    else:
        assert raised.value is error
    end = f"end fails: {type(error).__name__}"
    assert lines[-2:] == [f"b {end}", f"a {end}"]


def test_a_veto_is_the_same_with_an_observer(shop: Engine):
    """The exception reaches the caller, nothing is written, and the session goes on."""
    lines: list[str] = []

    @receiver(pre_save, sender=Order)
    def fails(sender, **kwargs):
        raise FrozenError("no")

    with observed_by(Log("a", lines)), Session(shop) as session:
        session.add(Order())
        with pytest.raises(FrozenError):
            session.flush()
        pre_save.disconnect(fails)
        session.flush()
        assert session.scalars(select(Order.id)).all() == [1]
        session.commit()
    assert lines[:3] == ["a begin fails", "a called fails flush", "a end fails: FrozenError"]


def test_failures_that_are_logged_are_told(shop: Engine, caplog: pytest.LogCaptureFixture):
    """Of receivers and callbacks after the transaction, each with its own error."""
    caplog.set_level(logging.CRITICAL, logger="sqla_signals")
    lines: list[str] = []
    for on in ("commit", "rollback"):

        def fails(sender, **kwargs):
            raise FrozenError("no")

        post_save.connect(fails, Order, weak=False, on=on)

    def breaks() -> None:
        raise KeyError("no")

    with observed_by(Log("a", lines)), Session(shop) as session:
        for end in (on_commit, on_rollback):
            session.add(Order())
            end(session, breaks)
            session.flush()
            session.commit() if end is on_commit else session.rollback()
        assert session.scalars(select(Order.id)).all() == [1]
    assert [line for line in lines if " end " in line] == [
        "a end fails: FrozenError",
        "a end breaks: KeyError",
    ] * 2


def test_each_thread_has_its_own_calls():
    """A call that goes on in one thread is not taken for one of another."""
    own, lines = Signal("own"), list[str]()
    together = threading.Barrier(2)

    def meets(sender, **kwargs):
        together.wait(60)
        if sender == "fails":
            raise ValueError("no")

    own.connect(meets)
    with observed_by(Log("a", lines)):
        threads = [threading.Thread(target=own.send_robust, args=(s,)) for s in ("fails", "works")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(lines) == [
        *["a begin meets"] * 2,
        *["a called meets flush"] * 2,
        "a end meets",
        "a end meets: ValueError",
    ]


def test_calls_of_tasks_that_are_awaited_together_are_told_apart():
    """Each ends when its own receiver was awaited."""
    own, lines = Signal("own"), list[str]()

    async def main() -> None:
        gate = asyncio.Event()

        async def waits(sender, **kwargs):
            await gate.wait()

        async def opens(sender, **kwargs):
            gate.set()

        own.connect(waits, 1, weak=False)
        own.connect(opens, 2, weak=False)
        with observed_by(Log("a", lines)):
            await asyncio.gather(own.send_async(1), own.send_async(2))

    asyncio.run(main())
    assert [line for line in lines if "called" not in line] == [
        "a begin waits",
        "a begin opens",
        "a end opens",
        "a end waits",
    ]


@pytest.fixture
def url(shop: Engine) -> str:
    """The shop, for an ``AsyncEngine``."""
    return f"sqlite+aiosqlite:///{shop.url.database}"


def decorated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function that returns what is to be awaited."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


async def in_async_session(url: str, work: Callable[[AsyncSession], Any]) -> None:
    engine = create_async_engine(url)
    try:
        async with AsyncSession(engine) as session:
            await work(session)
    finally:
        await engine.dispose()


@pytest.mark.parametrize("wrap", [lambda fn: fn, decorated], ids=["async", "decorated"])
@pytest.mark.parametrize("on", ["flush", "commit"])
def test_a_call_of_an_async_receiver_lasts_until_it_was_awaited(
    shop: Engine, url: str, wrap: Any, on: Any
):
    """With ``async def`` and with a function that returns a coroutine."""
    lines: list[str] = []

    async def hear(sender, **kwargs):
        lines.append("awaits")
        await asyncio.sleep(0)
        lines.append("goes on")

    post_save.connect(wrap(hear), Order, weak=False, on=on, name="hear")

    async def work(session: AsyncSession) -> None:
        session.add(Order())
        await session.commit()

    with observed_by(Log("a", lines)):
        asyncio.run(in_async_session(url, work))
    assert [line for line in lines if "transaction" not in line] == [
        "a begin hear",
        f"a called hear {on}",
        "awaits",
        "goes on",
        "a end hear",
    ]
    with Session(shop) as session:
        assert session.scalars(select(Order.id)).all() == [1]


@pytest.mark.parametrize("wrap", [lambda fn: fn, decorated], ids=["async", "decorated"])
@pytest.mark.parametrize("on", ["flush", "commit"])
def test_a_cancelled_receiver_ends_its_call(shop: Engine, url: str, wrap: Any, on: Any):
    """With the ``CancelledError``; the next call is not taken for a part of it."""
    lines: list[str] = []

    async def hear(sender, **kwargs):
        if not calls:
            calls.append(1)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    calls: list[int] = []
    post_save.connect(wrap(hear), Order, weak=False, on=on, name="hear")

    async def work(session: AsyncSession) -> None:
        session.add(Order())
        await session.commit()

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(in_async_session(url, work))
        await in_async_session(url, work)

    with observed_by(Log("a", lines)):
        asyncio.run(main())
    assert [line for line in lines if "transaction" not in line] == [
        "a begin hear",
        f"a called hear {on}",
        "a end hear: CancelledError",
        "a begin hear",
        f"a called hear {on}",
        "a end hear",
    ]
    with Session(shop) as session:
        assert len(session.scalars(select(Order.id)).all()) == (1 if on == "flush" else 2)


def test_what_nobody_can_await_is_the_error_of_its_call(shop: Engine):
    """A decorated coroutine function in a plain session: told as the failure that it is."""
    lines: list[str] = []

    async def hear(sender, **kwargs):
        raise AssertionError

    post_save.connect(decorated(hear), Order, weak=False, name="hear")
    with observed_by(Log("a", lines)), Session(shop) as session:
        session.add(Order())
        with pytest.raises(AsyncReceiverError):
            session.flush()
        session.rollback()
        assert session.scalars(select(Order.id)).all() == []
    assert lines[:3] == ["a begin hear", "a called hear flush", "a end hear: AsyncReceiverError"]


def test_what_passes_through_a_delivery_ends_its_call(shop: Engine):
    """As ``KeyboardInterrupt`` does; the calls behind it are not begun."""
    lines: list[str] = []

    @receiver(post_save, sender=Order, on="commit")
    def hear(sender, **kwargs):
        raise KeyboardInterrupt

    @receiver(post_save, sender=Order, on="commit")
    def behind(sender, **kwargs):
        pass

    with observed_by(Log("a", lines)), Session(shop) as session:
        session.add(Order())
        with pytest.raises(KeyboardInterrupt):
            session.commit()
    assert lines == [
        "a transaction_ended commit",
        "a begin hear",
        "a called hear commit",
        "a end hear: KeyboardInterrupt",
    ]
    with Session(shop) as session:
        assert session.scalars(select(Order.id)).all() == [1]


def test_observers_come_and_go_while_other_threads_call():
    """Each is told the end of exactly the calls whose beginning it was told."""
    own, done = Signal("own"), threading.Event()

    def hear(sender, **kwargs):
        pass

    own.connect(hear)

    def send() -> None:
        while not done.is_set():
            own.send()

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    logs: list[list[str]] = []
    try:
        for _ in range(300):
            logs.append([])
            with observed_by(Log("a", logs[-1])):
                own.send()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    for lines in logs:
        told = [line.split()[1] for line in lines]
        assert told.count("begin") == told.count("called") == told.count("end") >= 1


def test_what_a_signal_of_your_own_sends_is_not_compared():
    """Its values need not have a truth, as the comparisons of arrays have none."""

    class Array:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value is ambiguous")

    own = Signal("own")
    own.connect(lambda sender, **kwargs: None, weak=False)
    own.connect(lambda sender, **kwargs: None, weak=False)
    thing = Array()
    with trace() as traced:
        for _ in range(2):
            own.send(instance=thing, action=Array(), operation=Array())
    kinds = [step.kind for step in traced.root.walk()]
    assert kinds == ["trace", *["signal", "receiver", "receiver"] * 2]

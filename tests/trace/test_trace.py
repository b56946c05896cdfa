"""``trace()``, the tree of what really happened."""

from __future__ import annotations

import asyncio
import functools
import re
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import (
    Signal,
    Trace,
    on_commit,
    on_rollback,
    post_bulk,
    post_delete,
    post_save,
    pre_bulk,
    pre_save,
    receiver,
    receiver_failed,
    trace,
)

from .models import Entry, Order, Tag


def outline(traced: Trace) -> str:
    """The text of a trace without times and places."""
    return re.sub(r", \d+\.\d\d ms| \([^()]*\.py:\d+\)|[\w.]+\.<locals>\.", "", str(traced))


def tree(text: str) -> str:
    return textwrap.dedent(text).strip()


def entries(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Entry.text).order_by(Entry.id)))


def test_senders_are_not_compared_and_no_instance_is_loaded_to_be_shown(shop: Engine):
    """A signal of your own may be sent by an array, and by an instance that is expired."""
    own = Signal("own")
    own.connect(lambda sender, **kwargs: None, weak=False)

    class Array:
        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value of an array is ambiguous")

        def __repr__(self) -> str:
            return "array"

    with Session(shop) as session:
        order = Order()
        session.add(order)
        session.commit()
    with trace() as t:
        own.send(Array())
        own.send(Array())
        own.send(order)  # detached
    assert [step.detail for step in t.root.children] == ["array", "array", "Order 1"]


def test_it_is_the_tree_of_flushes_signals_receivers_and_what_these_have_changed(shop: Engine):
    """A further signal, and a row to be written, stand below the receiver they are from."""
    numbered = Signal("numbered")

    @numbered.connect
    def hear(sender, **kwargs):
        pass

    @receiver(pre_save, sender=Order)
    def number(sender, instance, session, **kwargs):
        instance.number = "A1"
        numbered.send(instance)

    @receiver(post_save, sender=Order)
    def write(sender, session, **kwargs):
        session.add(Entry(text="saved"))

    @receiver(post_save)
    def any_model(sender, **kwargs):
        pass

    with trace() as traced, Session(shop) as session:
        session.add(Order())
        session.commit()
    assert outline(traced) == tree("""
        trace
        └─ commit
           ├─ flush
           │  ├─ pre_save new Order
           │  │  └─ number
           │  │     ├─ numbered new Order
           │  │     │  └─ hear
           │  │     └─ changes new Order: number
           │  ├─ INSERT Order 1, changed by number
           │  └─ post_save Order 1
           │     ├─ write
           │     │  └─ adds new Entry
           │     └─ any_model
           └─ flush
              ├─ INSERT Entry 1, changed by write
              └─ post_save Entry 1
                 └─ any_model
    """)
    assert entries(shop) == ["saved"]
    assert f"({Path(__file__)}:" in str(traced)
    assert re.search(r"flush, \d+\.\d\d ms", str(traced))


def test_updates_deletes_and_rows_of_secondary_tables_are_told(shop: Engine):
    """With the attributes that an UPDATE writes; also of classes that nobody listens to."""

    @receiver(pre_save, sender=Order)
    def change_others(sender, instance, session, **kwargs):
        for order in session.scalars(select(Order).where(Order.id == 2)):
            order.status = "changed"
        for tag in session.scalars(select(Tag).where(Tag.id == 2)):
            session.delete(tag)

    with sqla_signals.mute(), Session(shop) as session:
        session.add_all([Order(tags=[Tag()]), Order(), Tag(), Entry(text="a")])
        session.commit()
    with Session(shop) as session:
        order, entry = session.get(Order, 1), session.get(Entry, 1)
        order.tags.clear()
        order.status = "paid"
        with trace() as traced:
            session.flush()
        entry.text = "b"
        with trace() as traced_alone:
            session.flush()
        session.commit()
    assert outline(traced) == tree("""
        trace
        └─ flush
           ├─ pre_save Order 1
           │  └─ change_others
           │     ├─ deletes Tag 2
           │     └─ changes Order 2: status
           ├─ pre_save Order 2
           │  └─ change_others
           ├─ UPDATE Order 1: status
           ├─ UPDATE Order 2: status, changed by change_others
           ├─ DELETE Tag 2, changed by change_others
           └─ DELETE order_tags: Order 1, Tag 1
    """)
    assert outline(traced_alone) == tree("""
        trace
        └─ flush
           └─ UPDATE Entry 1: text
    """)
    with Session(shop) as session:
        assert list(session.scalars(select(Order.status))) == ["paid", "changed"]
        assert list(session.scalars(select(Tag.id))) == [1]
        assert entries(shop) == ["b"]


def test_what_a_commit_leaves_to_be_delivered_is_part_of_that_commit(
    shop: Engine, caplog: pytest.LogCaptureFixture
):
    """Also where it comes later, because a receiver has committed. A logged failure is shown."""

    @receiver(post_save, sender=Order, on="commit")
    def write(sender, session, **kwargs):
        session.add(Entry(text="committed"))

    @receiver(post_save, sender=Order, on="commit")
    def fail(sender, **kwargs):
        raise ValueError("no")

    @receiver(post_save, sender=Entry, on="commit")
    def entered(sender, **kwargs):
        pass

    @receiver_failed.connect
    def failed(sender, **kwargs):
        pass

    with trace() as traced, Session(shop) as session:
        on_commit(session, lambda: None)
        session.add(Order())
        session.commit()
    assert outline(traced) == tree("""
        trace
        └─ commit
           ├─ flush
           │  └─ INSERT Order 1
           ├─ post_save Order 1, on='commit'
           │  ├─ write
           │  │  └─ commit
           │  │     ├─ flush
           │  │     │  └─ INSERT Entry 1
           │  │     └─ post_save Entry 1, on='commit'
           │  │        └─ entered
           │  └─ fail, failed: ValueError: no
           │     └─ receiver_failed Order 1
           │        └─ failed
           └─ on_commit <lambda>
    """)
    steps = {step.name.rpartition(".")[2]: step for step in traced.root.walk()}
    assert steps["entered"].start_ns > steps["fail"].end_ns
    assert entries(shop) == ["committed"]


def test_a_failure_of_a_commit_receivers_own_transaction_is_its_failure(
    shop: Engine, caplog: pytest.LogCaptureFixture
):
    """Its function has returned by then, and the COMMIT of its session raises."""

    @receiver(post_save, sender=Order, on="commit")
    def repeat(sender, session, **kwargs):
        session.add(Order(number="A"))

    with trace() as traced, Session(shop) as session:
        session.add(Order(number="A"))
        session.commit()
    (step,) = (step for step in traced.root.walk() if step.kind == "receiver")
    assert isinstance(step.error, IntegrityError)
    assert [child.name for child in step.children] == ["commit, not finished"]
    assert [child.name for child in step.children[0].children] == ["flush, not finished"]


def test_what_is_rolled_back_is_marked_and_rollback_receivers_stand_below(shop: Engine):
    """A savepoint's, or the whole transaction's; what was released goes with its parent."""

    @receiver(post_save, sender=Order, on="rollback")
    def undone(sender, **kwargs):
        pass

    with trace() as traced, Session(shop) as session:
        session.add(Order())
        session.flush()
        with session.begin_nested() as savepoint:
            on_rollback(session, lambda: None)
            session.add(Order())
            session.flush()
            savepoint.rollback()
        with session.begin_nested():
            session.add(Order())
    assert outline(traced) == tree("""
        trace
        ├─ flush, rolled back
        │  └─ INSERT Order 1
        ├─ flush, rolled back
        │  └─ INSERT Order 2
        ├─ rollback savepoint
        │  ├─ post_save Order 2, on='rollback'
        │  │  └─ undone
        │  └─ on_rollback <lambda>
        ├─ flush, rolled back
        │  └─ INSERT Order 2
        └─ rollback
           ├─ post_save Order 1, on='rollback'
           │  └─ undone
           └─ post_save Order 2, on='rollback'
              └─ undone
    """)
    with Session(shop) as session:
        assert session.scalars(select(Order)).all() == []


@pytest.mark.parametrize("signal", [pre_save, post_save])
def test_a_receiver_that_raises_ends_its_flush(shop: Engine, signal: Signal):
    """What comes after it is not a part of it."""

    @receiver(signal, sender=Order)
    def refuse(sender, instance, **kwargs):
        if instance.number == "bad":
            raise ValueError("bad")

    with trace() as traced, Session(shop) as session:
        session.add(Order(number="bad"))
        with pytest.raises(ValueError, match="bad"):
            session.commit()
        session.rollback()
        session.add(Order(number="good"))
        session.commit()
    flushes = [step for step in traced.root.walk() if step.kind == "flush"]
    assert [str(step.error) for step in flushes] == ["bad", "None"]
    for flush in flushes:
        assert [step.name for step in flush.walk()].count(signal.name) == 1
    with Session(shop) as session:
        assert list(session.scalars(select(Order.number))) == ["good"]


def test_a_flush_that_the_database_refuses_is_not_finished(shop: Engine):
    """It ends there, and its transaction is rolled back."""
    with trace() as traced, Session(shop) as session:
        session.add_all([Order(number="A"), Order(number="A")])
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        session.add(Entry(text="after"))
        session.commit()
    assert outline(traced) == tree("""
        trace
        ├─ flush, not finished
        └─ commit
           └─ flush
              └─ INSERT Entry 1
    """)


def test_a_trace_may_begin_in_the_middle_of_a_transaction_and_end_before_it(shop: Engine):
    """What is delivered for what came before is there, and what comes after is not."""

    @receiver(post_save, sender=Order, on="commit")
    def committed(sender, **kwargs):
        pass

    with Session(shop) as session:
        session.add(Order())
        session.flush()
        with trace() as traced:
            session.commit()
            session.add(Order())
            session.flush()
        session.commit()
    assert outline(traced) == tree("""
        trace
        ├─ commit
        │  └─ post_save Order 1, on='commit'
        │     └─ committed
        └─ flush
           └─ INSERT Order 2
    """)


def test_traces_nest_and_each_has_everything_inside_of_it(shop: Engine):
    """The inner one takes nothing from the outer one."""

    @receiver(post_save, sender=Order)
    def saved(sender, **kwargs):
        pass

    with trace() as outer, Session(shop) as session:
        session.add(Order())
        session.commit()
        with trace() as inner:
            session.add(Order())
            session.commit()
        session.add(Order())
        session.commit()
    counts = [outline(one).count("─ saved") for one in (outer, inner)]
    assert counts == [3, 1]


def test_another_thread_is_not_in_it(shop: Engine):
    """It may have a trace of its own, at the same time."""
    traces: dict[str, Trace] = {}

    def work(number: str) -> None:
        with trace() as traced, Session(shop) as session:
            session.add(Order(number=number))
            session.commit()
        traces[number] = traced

    @receiver(post_save, sender=Order, on="commit")
    def saved(sender, instance, **kwargs):
        if instance.number == "outer":
            thread = threading.Thread(target=work, args=("inner",))
            thread.start()
            thread.join()

    work("outer")
    for number, order in ("outer", 1), ("inner", 2):
        assert outline(traces[number]) == tree(f"""
            trace
            └─ commit
               ├─ flush
               │  └─ INSERT Order {order}
               └─ post_save Order {order}, on='commit'
                  └─ saved
        """)


@pytest.fixture
def url(tmp_path: Path, shop: Engine) -> str:
    return f"sqlite+aiosqlite:///{shop.url.database}"


def test_tasks_are_not_mixed_but_those_begun_inside_are_in_it(shop: Engine, url: str):
    """As with any context variable. Async receivers are timed until they are done."""
    order: list[str] = []

    @receiver(post_save, sender=Order)
    async def saved(sender, instance, **kwargs):
        await asyncio.sleep(0)
        order.append(instance.number)

    async def place(engine: Any, number: str) -> None:
        async with AsyncSession(engine) as session:
            session.add(Order(number=number))
            await session.commit()

    async def traced_place(engine: Any, number: str) -> Trace:
        with trace() as traced:
            await place(engine, number)
        return traced

    async def main() -> tuple[Trace, Trace, Trace]:
        engine = create_async_engine(url, connect_args={"timeout": 60})
        one, two = await asyncio.gather(traced_place(engine, "a"), traced_place(engine, "b"))
        with trace() as both:
            await asyncio.gather(place(engine, "c"), place(engine, "d"))
        await engine.dispose()
        return one, two, both

    one, two, both = asyncio.run(main())
    assert [outline(traced).count("─ saved") for traced in (one, two, both)] == [1, 1, 2]
    tracks = {step.track for step in both.root.walk() if step.kind == "receiver"}
    assert len(tracks) == 2
    assert sorted(order) == ["a", "b", "c", "d"]


def test_a_task_that_outlives_the_trace_is_recorded_no_more(shop: Engine, url: str):
    """The trace does not change once it is over."""

    async def late(engine: Any, begin: asyncio.Event) -> None:
        await begin.wait()
        async with AsyncSession(engine) as session:
            session.add(Order())
            await session.commit()

    async def main() -> Trace:
        engine = create_async_engine(url)
        begin = asyncio.Event()
        with trace() as traced:
            task = asyncio.create_task(late(engine, begin))
            await asyncio.sleep(0)
        begin.set()
        await task
        await engine.dispose()
        return traced

    assert [step.kind for step in asyncio.run(main()).root.walk()] == ["trace"]


def test_a_decorated_async_receiver_is_one_step_that_ends_when_it_was_awaited(
    shop: Engine, url: str
):
    """It looks like a plain function, and what it returns is to be awaited."""

    def decorated(fn):
        @functools.wraps(fn)
        def call(*args, **kwargs):
            return fn(*args, **kwargs)

        del call.__wrapped__
        return call

    @receiver(post_save, sender=Order)
    @decorated
    async def write(sender, session, **kwargs):
        await asyncio.sleep(0)
        session.add(Entry(text="awaited"))

    async def main() -> Trace:
        engine = create_async_engine(url)
        with trace() as traced:
            async with AsyncSession(engine) as session:
                session.add(Order())
                await session.commit()
        await engine.dispose()
        return traced

    traced = asyncio.run(main())
    (step,) = (step for step in traced.root.walk() if step.kind == "receiver")
    assert [str(child) for child in step.children] == ["adds new Entry"]
    assert entries(shop) == ["awaited"]


def test_a_decorated_async_receiver_that_nobody_can_await_is_an_error_as_ever(shop: Engine):
    """And its coroutine is closed, so nothing else is said about it."""

    async def fn(sender, **kwargs):
        raise AssertionError("never begun")

    @receiver(post_save, sender=Order)
    def plain(sender, **kwargs):
        return fn(sender, **kwargs)

    with trace() as traced, Session(shop) as session:
        session.add(Order())
        with pytest.raises(sqla_signals.AsyncReceiverError):
            session.flush()
    assert outline(traced).count("─ plain") == 1


def test_a_signal_returns_the_receivers_and_not_what_looks_on(shop: Engine):
    """Sent in each way there is; the call itself is in the trace."""
    signal = Signal("tested")

    @signal.connect
    def plain(sender, **kwargs):
        return 1

    @signal.connect
    async def later(sender, **kwargs):
        return 2

    def run(fn):
        def call(*args, **kwargs):
            return asyncio.run(fn(*args, **kwargs))

        return call

    with trace() as traced:
        assert signal.send(_async_wrapper=run) == [(plain, 1), (later, 2)]
        assert asyncio.run(signal.send_async()) == [(plain, 1), (later, 2)]
        signal.disconnect(later)
        assert signal.send_robust() == [(plain, 1)]
        assert list(signal.receivers_for(None)) == [plain]
    assert outline(traced).count("─ plain") == 3
    assert outline(traced).count("─ later") == 2


def test_a_receiver_connected_inside_is_seen_and_a_weak_one_stays_weak():
    """Looking on holds nobody."""
    signal = Signal("tested")
    with trace() as traced:

        def dies(sender, **kwargs):
            pass

        signal.connect(dies)
        signal.send()
        reference = weakref.ref(dies)
        del dies
        assert reference() is None
        assert signal.send() == []
    assert outline(traced).count("─ dies") == 1


def test_a_trace_holds_no_instance(shop: Engine):
    """It can be kept."""

    @receiver(post_save, sender=Order)
    def saved(sender, **kwargs):
        pass

    with trace() as traced:
        with Session(shop) as session:
            order = Order()
            session.add(order)
            session.commit()
            reference = weakref.ref(order)
        del order
        assert reference() is None
    assert "Order 1" in str(traced)


def test_what_receivers_return_may_be_used_as_without_a_trace():
    """A task that they have started is that task, and what is to be awaited can be made one."""
    own = Signal("own")
    done = []

    async def work(what: str) -> str:
        await asyncio.sleep(0)
        done.append(what)
        return what

    tasks = []

    def starts(sender, **kwargs):
        tasks.append(asyncio.create_task(work("started")))
        return tasks[0]

    own.connect(starts)
    own.connect(lambda sender, **kwargs: work("returned"), weak=False)

    async def main() -> None:
        with trace() as t:
            (_, started), (_, returned) = own.send()
            assert started is tasks[0]
            assert await asyncio.create_task(returned) == "returned"
            assert await started == "started"
            own.disconnect(starts)
            ((_, returned),) = own.send()
            cancelled = asyncio.create_task(returned)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        assert [step.end_ns is None for step in t.root.walk()] == [False] * 6

    asyncio.run(main())
    assert sorted(done) == ["returned", "started"]


def test_a_muted_receiver_is_not_called_and_not_in_it(shop: Engine):
    """A trace shows what happened."""

    @receiver(post_delete, sender=Order)
    def deleted(sender, **kwargs):
        pass

    with Session(shop) as session:
        order = Order()
        session.add(order)
        session.commit()
        session.delete(order)
        with trace() as traced, sqla_signals.mute(receiver=deleted):
            session.commit()
    assert outline(traced) == tree("""
        trace
        └─ commit
           └─ flush
              └─ DELETE Order 1
    """)


def test_a_statement_about_many_rows_is_told_by_its_own_signals(shop: Engine):
    """With the operation; delivered after the commit as well."""

    @receiver([pre_bulk, post_bulk], sender=Order)
    @receiver(post_bulk, sender=Order, on="commit")
    def told(sender, **kwargs):
        pass

    with trace() as traced, Session(shop) as session:
        session.execute(update(Order).values(status="paid"))
        session.commit()
    assert outline(traced) == tree("""
        trace
        ├─ pre_bulk Order update
        │  └─ told
        ├─ post_bulk Order update
        │  └─ told
        └─ commit
           └─ post_bulk Order update, on='commit'
              └─ told
    """)


def test_a_flush_of_a_session_that_two_installations_cover_is_one_step(shop: Engine):
    """Also where no receiver listens."""
    second = sqla_signals.install(Session)
    try:
        with trace() as traced, Session(shop) as session:
            session.add(Order())
            session.commit()
            assert session.scalars(select(Order.id)).all() == [1]
    finally:
        second.remove()
    assert [step.kind for step in traced.root.walk()] == ["trace", "commit", "flush", "row"]

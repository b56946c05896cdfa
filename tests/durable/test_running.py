"""A worker runs a message: the arguments, the session, and effects that happen once."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, ForeignKey, String, event, inspect, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    foreign,
    mapped_column,
    object_session,
    relationship,
    sessionmaker,
)

import sqla_signals
from sqla_signals import (
    AsyncReceiverError,
    Change,
    SessionInFlushError,
    SignalsError,
    post_delete,
    post_save,
    receiver,
)
from sqla_signals.durable import (
    SECRET,
    MalformedMessageError,
    Message,
    Relay,
    UnknownModelError,
    UnknownReceiverError,
    UnknownSchemaError,
    Worker,
    outbox_table,
)

from .conftest import drain, events, ledger
from .models import Color, Ledger, Line, Order, Values, outbox
from .test_relay import Recording, place


def messages(engine: Engine) -> list[Message]:
    """Take the messages out of the outbox."""
    publisher = Recording()
    drain(Relay(engine, publisher))
    return publisher.published


def write(name: str = "shop.fn", **options: Any) -> list[Any]:
    """Connect a durable receiver of orders that writes a line into the ledger."""
    calls: list[Any] = []

    @receiver(post_save, sender=Order, durable=True, name=name, **options)
    def fn(sender, instance, session, **kwargs):
        calls.append({"sender": sender, "instance": instance, "session": session, **kwargs})
        session.add(Ledger(entry=f"{instance.status}"))

    return calls


def test_a_receiver_gets_what_a_commit_receiver_gets_and_the_event(shop: Engine):
    """In a session and a transaction of its own."""
    calls = write()
    place(shop, "a")
    (message,) = messages(shop)
    assert Worker(shop).run(message, attempt=3) is True
    (call,) = calls
    assert call.keys() == {*post_save.arguments, "sender", "event"}
    assert (call["sender"], call["signal"], call["using"]) == (Order, post_save, shop)
    assert (call["created"], call["raw"], call["update_fields"]) == (True, False, None)
    event = call["event"]
    assert (event.id, event.attempt, event.sequence) == (message.id, 3, message.sequence)
    assert event.occurred_at == message.occurred_at
    assert abs(datetime.now(UTC) - event.occurred_at) < timedelta(minutes=5)
    assert ledger(shop) == ["a"]


@pytest.mark.parametrize("created", [True, False])
def test_created_is_held_against_what_the_transaction_came_to(shop: Engine, created: bool):
    """The event is written for the rows that the receiver asks for, and for no others."""
    write(created=created)
    place(shop, "a")
    with Session(shop) as session:
        session.scalars(select(Order)).one().status = "b"
        session.commit()
    for message in messages(shop):
        assert Worker(shop).run(message)
    assert ledger(shop) == (["a"] if created else ["b"])


def test_a_receiver_connected_with_different_conditions_runs_what_any_of_them_lets_through(
    shop: Engine,
):
    """The worker knows all its connections, not the first one alone."""

    def fn(sender, instance, session, **kwargs):
        session.add(Ledger(entry=instance.status))

    for options in ({"fields": {"id"}}, {"fields": {"status"}}, {"created": True}):
        post_save.connect(fn, Order, weak=False, durable=True, name="shop.fn", **options)
    place(shop, "a")
    with Session(shop) as session:
        session.scalars(select(Order)).one().status = "b"
        session.commit()
    for message in messages(shop):
        assert Worker(shop).run(message)
    assert ledger(shop) == ["a", "b"]


def test_the_instance_lives_in_the_session(shop: Engine):
    """With the values of the event; relationships are loaded, and changes to it are saved."""
    found: list[Any] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, **kwargs):
        found.append((object_session(instance) is session, instance.status, len(instance.lines)))
        instance.status = "seen"

    with Session(shop) as session:
        order = Order(status="a", lines=[Line(), Line()])
        session.add(order)
        session.commit()
        taken = messages(shop)
        order.lines.pop()
        session.commit()
    Worker(shop).run(taken[0])
    assert found == [(True, "a", 1)]
    with Session(shop) as session:
        assert session.scalars(select(Order.status)).all() == ["seen"]


def test_the_row_may_be_another_one_meanwhile(shop: Engine):
    """The instance shows the event; the receiver may ask for the row as it is now."""
    found: list[Any] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, **kwargs):
        found.append(instance.status)
        try:
            session.refresh(instance)
        except InvalidRequestError:
            found.append("gone")
        else:
            found.append(instance.status)

    place(shop, "a", "b")
    taken = messages(shop)
    with Session(shop) as session:
        first, second = session.scalars(select(Order).order_by(Order.id))
        first.status = "later"
        session.delete(second)
        session.commit()
    worker = Worker(shop)
    assert [worker.run(message) for message in taken] == [True, True]
    assert found == ["a", "later", "b", "gone"]


def test_the_same_message_twice_has_its_effect_once(shop: Engine):
    """The second run finds the first one's row in the inbox, and calls nobody."""
    calls = write()
    place(shop, "a")
    (message,) = messages(shop)
    worker = Worker(shop)
    assert worker.run(message) is True
    assert worker.run(message.to_json()) is False
    assert len(calls) == 1
    assert ledger(shop) == ["a"]


def test_each_receiver_does_an_event_once(shop: Engine):
    """Two receivers, one event: both do."""
    write("shop.one")
    write("shop.two")
    place(shop, "a")
    worker = Worker(shop)
    for message in messages(shop) * 2:
        worker.run(message)
    assert ledger(shop) == ["a", "a"]


def test_names_of_receivers_that_differ_in_case_are_two(shop: Engine):
    """Also on MariaDB, which compares text without it unless told otherwise."""
    for name in ("shop.one", "shop.One", "shop.öne"):
        write(name)
    place(shop, "a")
    worker = Worker(shop)
    assert [worker.run(message) for message in messages(shop) * 2] == [True] * 3 + [False] * 3
    assert ledger(shop) == ["a", "a", "a"]


def test_a_receiver_that_fails_has_done_nothing(shop: Engine):
    """The message can be run again."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, event, **kwargs):
        session.add(Ledger(entry=f"attempt {event.attempt}"))
        session.flush()
        if event.attempt == 1:
            raise ValueError("not yet")

    place(shop, "a")
    (message,) = messages(shop)
    with pytest.raises(ValueError, match="not yet"):
        Worker(shop).run(message, attempt=1)
    assert ledger(shop) == []
    assert Worker(shop).run(message, attempt=2) is True
    assert ledger(shop) == ["attempt 2"]


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
def test_a_receiver_that_ends_its_transaction_has_failed(shop: Engine, method: str):
    """The error says to leave that out; nothing of its work is there, and it is not done."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, event, **kwargs):
        session.add(Ledger(entry="work"))
        if event.attempt == 1:
            getattr(session, method)()

    place(shop, "a")
    (message,) = messages(shop)
    worker = Worker(shop)
    with pytest.raises(
        SessionInFlushError, match=rf"{method}\(\) was called by a receiver"
    ) as caught:
        worker.run(message, attempt=1)
    assert "Remedy: leave it out" in "".join(caught.value.__notes__)
    assert ledger(shop) == []
    assert [worker.run(message, attempt=2), worker.run(message, attempt=3)] == [True, False]
    assert ledger(shop) == ["work"]


def test_a_receiver_that_hides_that_its_commit_was_refused_is_done_once(shop: Engine):
    """Its work is committed at its end, together with the note that it is done."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, **kwargs):
        session.add(Ledger(entry="work"))
        with suppress(SignalsError):
            session.commit()

    place(shop, "a")
    (message,) = messages(shop)
    assert [Worker(shop).run(message) for _ in range(2)] == [True, False]
    assert ledger(shop) == ["work"]


def test_a_savepoint_of_the_receiver_keeps_the_note_that_it_is_done(shop: Engine):
    """One transaction, so one commit: the receiver's work and the row in the inbox."""
    commits: list[int] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, **kwargs):
        event.listen(session.connection(), "commit", lambda _: commits.append(1))
        with session.begin_nested():
            session.add(Ledger(entry="kept"))
        with session.begin_nested() as savepoint:
            session.add(Ledger(entry="undone"))
            session.flush()
            savepoint.rollback()

    place(shop, "a")
    (message,) = messages(shop)
    worker = Worker(shop)
    assert [worker.run(message) for _ in range(2)] == [True, False]
    assert ledger(shop) == ["kept"]
    assert commits == [1]


def test_sessions_that_do_not_begin_by_themselves_do_it_for_receivers(shop: Engine):
    """With ``autobegin=False``."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, **kwargs):
        session.add(Ledger(entry=instance.status))

    place(shop, "a")
    (message,) = messages(shop)
    worker = Worker(sessionmaker(shop, autobegin=False))
    assert worker.run(message) is True
    assert worker.run(message) is False
    assert ledger(shop) == ["a"]


def test_two_workers_with_the_same_message_at_once(shop: Engine):
    """One of them runs it; the other waits, and finds it done."""
    inside, both = threading.Event(), threading.Event()

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, **kwargs):
        inside.set()
        both.wait(30)
        session.add(Ledger(entry="once"))

    place(shop, "a")
    (message,) = messages(shop)
    results: list[bool] = []

    def run() -> None:
        results.append(Worker(shop).run(message))

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    both.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, True]
    assert ledger(shop) == ["once"]


def test_what_a_durable_receiver_commits_is_delivered_in_turn(shop: Engine):
    """Its own changes are committed work like any other."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, created, **kwargs):
        session.add(Ledger(entry=instance.status))
        if created:
            instance.status = "seen"

    place(shop, "a")
    assert drain(Relay(shop)) == 2
    assert ledger(shop) == ["a", "seen"]


def test_origin_is_the_deleted_parent(shop: Engine):
    """Detached, with its key."""
    found: list[Any] = []

    @receiver(post_delete, sender=Line, durable=True, name="shop.fn")
    def fn(sender, instance, origin, **kwargs):
        found.append((type(origin), origin.id, inspect(origin).detached))

    with Session(shop) as session:
        order = Order(lines=[Line()])
        session.add(order)
        session.commit()
        session.delete(order)
        session.commit()
    drain(Relay(shop))
    assert found == [(Order, 1, True)]


class Elsewhere(DeclarativeBase):
    """Models without an outbox."""


class Tenant(Elsewhere):
    __tablename__ = "tenants"
    id: Mapped[int] = mapped_column(primary_key=True)
    rooms: Mapped[list[Room]] = relationship(
        lambda: Room,
        primaryjoin=lambda: Tenant.id == foreign(Room.tenant_id),
        cascade="all, delete-orphan",
    )


class Housed(DeclarativeBase):
    """Models with an outbox of their own."""


class Key(Housed):
    """Who knows its primary key gets in."""

    __tablename__ = "secret_keys"
    token: Mapped[str] = mapped_column(String(20), primary_key=True, info=SECRET)
    name: Mapped[str] = mapped_column(String(20))
    rooms: Mapped[list[Room]] = relationship(cascade="all, delete-orphan")


class Room(Housed):
    __tablename__ = "rooms"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int | None]
    token: Mapped[str | None] = mapped_column(ForeignKey(Key.token), info=SECRET)


housed = outbox_table(Housed.metadata, prefix="housed")


def test_origin_may_be_without_an_outbox_and_tells_no_secret(shop: Engine):
    """Nobody has checked its class: of one whose primary key is secret only the class is told."""
    found: list[Any] = []

    @receiver(post_delete, sender=Room, durable=True, name="shop.fn")
    def fn(sender, instance, origin, **kwargs):
        found.append((type(origin), inspect(origin).identity))

    Elsewhere.metadata.create_all(shop)
    Housed.metadata.create_all(shop)
    parents = [Tenant(id=7, rooms=[Room()]), Key(token="s3cret", name="key", rooms=[Room()])]
    with Session(shop) as session:
        for parent in parents:
            session.add(parent)
            session.commit()
            session.delete(parent)
            session.commit()
    with shop.connect() as connection:
        rows = connection.execute(select(housed.table)).all()
    assert len(rows) == 2
    assert "s3cret" not in str(rows)
    drain(Relay(shop, outbox=housed))
    assert found == [(Tenant, (7,)), (Key, None)]


def test_what_a_receiver_changes_in_place_the_next_one_does_not_see(shop: Engine):
    """Each has values of its own, also beside those in ``changes``."""
    found: list[Any] = []

    def fn(sender, instance, changes, **kwargs):
        found.append((instance.document["list"], changes["document"].new["list"]))
        instance.document["list"].append("mine")

    for name in ("shop.one", "shop.two"):

        def connected(sender, **kwargs):
            fn(sender, **kwargs)

        post_save.connect(connected, sender=Values, durable=True, name=name, weak=False)
    with Session(shop) as session:
        session.add(Values(id=uuid4(), document={"list": []}))
        session.commit()
    drain(Relay(shop))
    assert found == [(["mine"], []), (["mine"], [])]


def test_a_column_that_is_gone_meanwhile_is_left_out(shop: Engine):
    """The message was written before the model lost it."""
    calls: list[Any] = []

    @receiver(post_save, sender=Values, durable=True, name="shop.fn")
    def fn(sender, instance, changes, update_fields, **kwargs):
        calls.append((dict(changes), update_fields))

    with Session(shop) as session:
        values = Values(id=uuid4(), color=Color.RED, number=1)
        session.add(values)
        session.commit()
        session.refresh(values)
        values.color, values.number = Color.BLUE, 2
        session.commit()
    _, message = messages(shop)
    text = message.to_json().replace('"color', '"colour')
    Worker(shop).run(text)
    assert calls == [({"number": Change(1, 2)}, {"number"})]


# -- what a worker refuses -------------------------------------------------------------------------


def test_a_receiver_that_is_not_connected_is_refused(shop: Engine, caplog):
    """Whatever else of that name there is in the process; the log says so each time."""
    write()
    place(shop, "a")
    (message,) = messages(shop)
    worker = Worker(shop)
    for name in ("os.system", "shop.other"):
        with pytest.raises(UnknownReceiverError, match=r"connected here: shop\.fn"):
            worker.run(dataclasses.replace(message, receiver=name))
        assert f"is named '{name}'" in caplog.text
    assert ledger(shop) == []


def test_a_message_of_a_later_version_is_refused(shop: Engine):
    """By a worker that was not upgraded."""
    write()
    place(shop, "a")
    (message,) = messages(shop)
    later = dataclasses.replace(message, data={**message.data, "schema": 2})
    with pytest.raises(UnknownSchemaError, match="Upgrade the workers"):
        Worker(shop).run(later)


def test_a_class_that_is_not_mapped_is_refused(shop: Engine):
    """It may have been moved."""
    write()
    place(shop, "a")
    (message,) = messages(shop)
    with pytest.raises(UnknownModelError, match=r"shop\.Gone"):
        Worker(shop).run(dataclasses.replace(message, model="shop.Gone"))


def test_a_row_whose_primary_key_has_changed_its_columns_is_not_found(shop: Engine):
    """Since the message was written; the error says what to do before such a migration."""
    write()
    place(shop, "a")
    (message,) = messages(shop)
    data = {**message.data, "key": [1, "de"]}
    with pytest.raises(MalformedMessageError, match=r"an? Order by 2 values.* is \(id\)"):
        Worker(shop).run(dataclasses.replace(message, data=data))
    assert ledger(shop) == []


def test_a_class_that_was_moved_is_found_by_its_old_name(shop: Engine, monkeypatch):
    """Where that is still importable, and imported: nothing is imported for a message."""
    calls = write()
    place(shop, "a", "b", "c")
    first, second, third = messages(shop)
    old = ModuleType("shop.old_models")
    old.Order, old.Plain, old.engine = Order, dict, shop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop.old_models", old)
    worker = Worker(shop)
    assert worker.run(dataclasses.replace(first, model="shop.old_models.Order")) is True
    assert [call["sender"] for call in calls] == [Order]
    for name in ("Plain", "engine", "Order.id", "Other", ""):
        with pytest.raises(UnknownModelError, match="keep its old name importable"):
            worker.run(dataclasses.replace(second, model=f"shop.old_models.{name}"))
    assert "this" not in sys.modules
    with pytest.raises(UnknownModelError):
        worker.run(dataclasses.replace(third, model="this.Order"))
    assert "this" not in sys.modules


def test_an_async_receiver_needs_async_sessions(shop: Engine):
    """The error says so; the message can be run elsewhere."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    async def fn(sender, **kwargs): ...

    place(shop, "a")
    (message,) = messages(shop)
    with pytest.raises(AsyncReceiverError, match="async_sessionmaker"):
        Worker(sessionmaker(shop)).run(message)


# -- asynchronous ----------------------------------------------------------------------------------

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_a_relay_with_async_sessions_runs_both_kinds_of_receivers(shop: Engine):
    """On an event loop of its own, also when called from within another one."""
    found: list[Any] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.async")
    async def asynchronous(sender, instance, session, **kwargs):
        await asyncio.sleep(0)
        found.append((type(session), await session.scalar(select(Order.status))))
        session.add(Ledger(entry="async"))

    @receiver(post_save, sender=Order, durable=True, name="shop.sync")
    def synchronous(sender, instance, session, **kwargs):
        found.append((type(session), session.scalar(select(Order.status))))
        session.add(Ledger(entry="sync"))

    place(shop, "a")
    engine = create_async_engine(shop.url.set(drivername=DRIVERS[shop.dialect.name]))
    relay = Relay(async_sessionmaker(engine, expire_on_commit=False))

    async def within_a_loop() -> int:
        return relay.run_once()

    assert asyncio.run(within_a_loop()) == 1
    assert found == [(AsyncSession, "a"), (Session, "a")]
    assert ledger(shop) == ["async", "sync"]
    assert events(shop) == []
    relay.sessions.run(engine.sync_engine.dispose)


@pytest.fixture
def async_worker(shop: Engine) -> Iterator[Worker]:
    """A worker with asynchronous sessions."""
    engine = create_async_engine(shop.url.set(drivername=DRIVERS[shop.dialect.name]))
    worker = Worker(engine)
    yield worker
    worker.sessions.run(engine.sync_engine.dispose)


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_a_receiver_that_something_in_it_cancels_has_failed(shop: Engine, async_worker: Worker):
    """Like any other; nothing of its work remains, and the rest of the batch goes on."""

    @receiver(post_save, sender=Order, durable=True, name="shop.async")
    async def fn(sender, instance, session, **kwargs):
        session.add(Ledger(entry=f"{instance.status}"))
        await session.flush()
        if instance.status == "bad":
            task = asyncio.create_task(asyncio.sleep(60))
            task.cancel()
            await task

    place(shop, "bad", "good")
    relay = Relay(async_worker.sessions, outbox=outbox)
    assert relay.run_once() == 2
    assert ledger(shop) == ["good"]
    (row,) = events(shop)
    assert row.attempts == 1
    assert "was cancelled" in row.last_error


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_what_ends_the_process_passes_through_the_loop(shop: Engine, async_worker: Worker):
    """To the thread that called; the next message can be run."""

    @receiver(post_save, sender=Order, durable=True, name="shop.async")
    async def fn(sender, instance, session, event, **kwargs):
        session.add(Ledger(entry="done"))
        await session.flush()
        if event.attempt == 1:
            raise SystemExit(3)

    place(shop, "a")
    (message,) = messages(shop)
    with pytest.raises(SystemExit):
        async_worker.run(message, attempt=1)
    assert async_worker.run(message, attempt=2) is True
    assert ledger(shop) == ["done"]


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_an_async_receiver_may_stop_its_relay(shop: Engine, async_worker: Worker, in_thread: bool):
    """It does not wait for what waits for it; the batch at hand is done."""
    relay = Relay(async_worker.sessions, outbox=outbox)
    stopped = threading.Event()

    @receiver(post_save, sender=Order, durable=True, name="shop.async")
    async def fn(sender, session, **kwargs):
        session.add(Ledger(entry="done"))
        if in_thread:
            await asyncio.to_thread(relay.stop)
        else:
            relay.stop()
        stopped.set()

    place(shop, "a", "b")
    relay.start()
    thread = relay._thread
    assert thread is not None
    assert stopped.wait(30)
    thread.join(30)
    assert not thread.is_alive()
    relay.stop()
    assert ledger(shop) == ["done", "done"]


def test_the_session_factory_of_install_is_the_default(shop: Engine):
    """For relays and for workers."""
    sqla_signals.install(session_factory=sessionmaker(shop))
    write()
    place(shop, "a")
    assert drain(Relay()) == 1
    assert ledger(shop) == ["a"]


def test_a_class_of_the_same_name_without_an_outbox_is_not_meant(shop: Engine):
    """Another registry may have one, or an earlier cell of a notebook."""
    calls = write()
    place(shop, "a")

    class Other(DeclarativeBase): ...

    class Twin(Other):
        __tablename__ = "twins"
        __module__ = Order.__module__
        __qualname__ = Order.__qualname__
        id: Mapped[int] = mapped_column(primary_key=True)

    assert drain(Relay(shop, outbox=outbox)) == 1
    assert [call["sender"] for call in calls] == [Order]
    assert ledger(shop) == ["a"]
    assert Twin is not Order


def test_models_that_cannot_be_configured_hold_up_no_others(shop: Engine):
    """The events of a complete model are delivered beside a registry that is broken."""
    write()
    place(shop, "a")

    class Broken(DeclarativeBase):
        """Its only model names another one that is nowhere."""

    class Thing(Broken):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)
        other_id: Mapped[int] = mapped_column(ForeignKey("others.id"))
        other: Mapped[Any] = relationship("Nowhere")

    try:
        assert drain(Relay(shop)) == 1
    finally:
        Broken.registry.dispose()
    assert ledger(shop) == ["a"]
    assert events(shop) == []


def test_a_second_class_of_the_same_name_is_noticed_after_messages_were_run(shop: Engine):
    """A message from a broker does not say which of the two is meant."""
    write()
    place(shop, "a", "b", "c")
    first, second, third = (message.to_json() for message in messages(shop))
    assert Worker(shop).run(first)

    class Other(DeclarativeBase): ...

    outbox_table(Other.metadata)

    class Twin(Other):
        __tablename__ = "twins"
        __module__ = Order.__module__
        __qualname__ = Order.__qualname__
        id: Mapped[int] = mapped_column(primary_key=True)

    Other.registry.configure()
    try:
        with pytest.raises(UnknownModelError, match="2 mapped classes are named"):
            Worker(shop).run(second)
    finally:
        Other.registry.dispose()
    assert Worker(shop).run(third)
    assert ledger(shop) == ["a", "c"]
    assert Twin is not Order


def test_a_receiver_may_go_on_after_a_savepoint_in_which_a_flush_has_failed(shop: Engine):
    """The rest of its work is committed, together with the note that it is done."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, **kwargs):
        session.add(Ledger(id=1, entry="first"))
        session.flush()
        session.expunge_all()
        with suppress(IntegrityError), session.begin_nested():
            session.add(Ledger(id=1, entry="again"))
        session.add(Ledger(id=2, entry="second"))

    place(shop, "a")
    (message,) = messages(shop)
    assert [Worker(shop).run(message) for _ in range(2)] == [True, False]
    assert ledger(shop) == ["first", "second"]

"""OpenTelemetry: a span for each call of a receiver, and whose child it is."""

from __future__ import annotations

import asyncio
import functools
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode, get_current_span
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import (
    Signal,
    mute,
    on_commit,
    post_bulk,
    post_delete,
    post_save,
    pre_save,
    receiver,
    trace,
)
from sqla_signals.durable import Message, Relay, UnknownReceiverError, Worker
from sqla_signals.opentelemetry import instrument, uninstrument

from ..durable.models import Base, Ledger, Order, outbox
from ..durable.test_relay import Recording
from .conftest import Spans


def ledger(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Ledger.entry).order_by(Ledger.id)))


def place(engine: Engine, status: str = "new") -> None:
    with Session(engine) as session:
        session.add(Order(status=status))
        session.commit()


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_a_receiver_has_a_span_inside_the_one_around_the_flush(shop: Engine, spans: Spans):
    """What the receiver does itself is inside of that; the database row is named."""

    @receiver(post_save, sender=Order)
    def saved(sender, session, **kwargs):
        with spans.tracer.start_as_current_span("own work"):
            session.add(Ledger(entry="saved"))

    line = saved.__code__.co_firstlineno
    with spans.tracer.start_as_current_span("request"):
        place(shop)
    span = spans.one("saved")
    name = saved.__module__ + "." + saved.__qualname__
    assert (span.name, span.kind) == (f"post_save {name}", SpanKind.INTERNAL)
    assert spans.parent(span) == "request"
    assert spans.parent(spans.one("own work")) == "saved"
    assert span.status.status_code is StatusCode.UNSET
    assert attributes(span) == {
        "sqla_signals.signal": "post_save",
        "sqla_signals.sender": "Order",
        "sqla_signals.receiver": name,
        "sqla_signals.on": "flush",
        "code.function.name": name,
        "code.file.path": __file__,
        "code.line.number": line,
        "db.system.name": "sqlite",
        "db.collection.name": "orders",
        "db.operation.name": "INSERT",
    }
    assert ledger(shop) == ["saved"]


def test_the_operation_is_that_of_the_row(shop: Engine, spans: Spans):
    """In a flush, after a commit, and for statements about many rows; none for your own signals."""

    @receiver([post_save, post_delete], sender=Order)
    @receiver([post_save, post_delete], sender=Order, on="commit")
    @receiver(post_bulk, sender=Order)
    def told(sender, **kwargs):
        pass

    own = Signal("own")
    own.connect(told)
    with Session(shop) as session:
        order = Order()
        session.add(order)
        session.commit()
        order.status = "paid"
        session.commit()
        session.execute(update(Order).values(status="gone"))
        session.delete(order)
        session.commit()
        own.send(shop)
    found = [
        (a.get("db.operation.name"), a["sqla_signals.on"]) for a in map(attributes, spans.all())
    ]
    assert found == [
        ("INSERT", "flush"),
        ("INSERT", "commit"),
        ("UPDATE", "flush"),
        ("UPDATE", "commit"),
        ("UPDATE", "flush"),
        ("DELETE", "flush"),
        ("DELETE", "commit"),
        (None, "flush"),
    ]


def test_a_signal_of_your_own_may_send_anything(shop: Engine, spans: Spans):
    """What model signals call ``action`` may be something else; an instance is named by its key."""
    own = Signal("own")
    own.connect(lambda sender, **kwargs: None, weak=False)
    with Session(shop) as session:
        order = Order()
        session.add(order)
        session.commit()
    own.send(order, using=shop, action=7)  # expired and detached
    (span,) = spans.all()
    assert attributes(span)["sqla_signals.sender"] == "Order 1"
    assert not [name for name in attributes(span) if name.startswith("db.")]


def test_a_commit_receiver_is_a_child_of_the_span_in_which_was_committed(
    shop: Engine, spans: Spans
):
    """Also where it is called when that has ended, because the commit was a receiver's."""

    @receiver(post_save, sender=Order, on="commit")
    def write(sender, session, **kwargs):
        session.add(Ledger(entry="written"))

    @receiver(post_save, sender=Order, on="commit")
    def second(sender, **kwargs):
        pass

    @receiver(post_save, sender=Ledger, on="commit")
    def written(sender, **kwargs):
        pass

    @receiver(post_save, sender=Ledger)
    def flushed(sender, **kwargs):
        pass

    with Session(shop) as session:
        with spans.tracer.start_as_current_span("change"):
            session.add(Order())
            session.flush()
        with spans.tracer.start_as_current_span("request"):
            on_commit(session, lambda: None)
            session.commit()
    tree = {name: spans.parent(spans.one(name)) for name in ("write", "second", "written")}
    assert tree == {"write": "request", "second": "request", "written": "write"}
    # Its own transaction is inside of its span.
    assert spans.parent(spans.one("flushed")) == "write"
    ends = {span.name.rpartition(".")[2]: span.end_time or 0 for span in spans.all()}
    assert ends["write"] < ends["second"] < ends["written"]
    (callback,) = (span for span in spans.all() if span.name.startswith("on_commit "))
    assert spans.parent(callback) == "request"
    assert ledger(shop) == ["written"]


def test_an_exception_that_reaches_the_caller_is_recorded(shop: Engine, spans: Spans):
    """With status and type; it is raised unchanged."""

    @receiver(pre_save, sender=Order)
    def refuse(sender, **kwargs):
        raise ValueError("no")

    with Session(shop) as session:
        session.add(Order())
        with pytest.raises(ValueError, match="no"):
            session.flush()
    assert_failed(spans.one("refuse"), "ValueError: no", "builtins.ValueError")


def assert_failed(span: ReadableSpan, description: str, kind: str) -> None:
    assert span.status.status_code is StatusCode.ERROR
    assert (span.status.description or "").startswith(description)
    assert attributes(span)["error.type"] == kind
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes is not None
    assert event.attributes["exception.type"] == kind.removeprefix("builtins.")


def test_a_failure_that_is_only_logged_is_recorded_as_well(
    shop: Engine, spans: Spans, caplog: pytest.LogCaptureFixture
):
    """Of commit and rollback receivers, of callbacks; and that of a receiver's own COMMIT."""

    @receiver(post_save, sender=Order, on="commit")
    def fails(sender, **kwargs):
        raise ValueError("commit")

    @receiver(post_save, sender=Order, on="commit")
    def commits(sender, session, **kwargs):
        session.add(Ledger())  # without an entry

    @receiver(post_save, sender=Order, on="rollback")
    def fails_too(sender, **kwargs):
        raise ValueError("rollback")

    def calls_back() -> None:
        raise ValueError("callback")

    with Session(shop) as session:
        session.add(Order())
        on_commit(session, calls_back)
        session.commit()
        session.add(Order())
        session.flush()
        session.rollback()
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 4
    assert_failed(spans.one("fails"), "ValueError: commit", "builtins.ValueError")
    assert_failed(spans.one("fails_too"), "ValueError: rollback", "builtins.ValueError")
    assert_failed(spans.one("calls_back"), "ValueError: callback", "builtins.ValueError")
    kind = f"{IntegrityError.__module__}.IntegrityError"
    assert_failed(spans.one("commits"), "IntegrityError: ", kind)


@pytest.fixture
def committed(engine: Engine, installed: sqla_signals.Installation) -> Iterator[Engine]:
    """The shop on SQLite and PostgreSQL, with a durable receiver that writes into the ledger."""
    Base.metadata.create_all(engine)

    @receiver(post_save, sender=Order, durable=True, name="shop.ship")
    def ship(sender, instance, session, event, **kwargs):
        if instance.status == "bad" and event.attempt == 1:
            raise ValueError("bad")
        session.add(Ledger(entry=f"{instance.status} {event.attempt}"))

    @receiver(post_save, sender=Ledger)
    def entered(sender, **kwargs):
        pass

    yield engine
    assert engine.pool.checkedout() == 0


def test_a_durable_message_carries_the_trace_to_the_worker(committed: Engine, spans: Spans):
    """Through the outbox, the relay and JSON, when the request is long over."""
    with spans.tracer.start_as_current_span("request"):
        place(committed)
    create = spans.one("create sqla_signals_outbox")
    assert create.context is not None
    assert (create.kind, spans.parent(create)) == (SpanKind.PRODUCER, "request")
    assert attributes(create) == {
        "messaging.system": "sqla_signals",
        "messaging.operation.name": "create",
        "messaging.operation.type": "create",
        "messaging.destination.name": "sqla_signals_outbox",
        "messaging.batch.message_count": 1,
    }
    publisher = Recording()
    assert Relay(committed, publisher, outbox=outbox).run_once() == 1
    (message,) = publisher.published
    ids = f"{create.context.trace_id:032x}-{create.context.span_id:016x}"
    assert message.headers == {"traceparent": f"00-{ids}-{create.context.trace_flags:02x}"}

    with spans.tracer.start_as_current_span("task"):
        Worker(committed).run(message.to_json())
    process = spans.one("process sqla_signals_outbox")
    assert (process.kind, spans.parent(process)) == (
        SpanKind.CONSUMER,
        "create sqla_signals_outbox",
    )
    assert [link.context.span_id for link in process.links] == [
        create.context.span_id,
        getattr(spans.one("task").context, "span_id", None),
    ]
    assert attributes(process) == {
        "messaging.system": "sqla_signals",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "sqla_signals_outbox",
        "messaging.consumer.group.name": "shop.ship",
        "messaging.message.id": str(message.id),
        "cloudevents.event_id": str(message.id),
        "cloudevents.event_source": "/shop",
        "cloudevents.event_spec_version": "1.0",
        "cloudevents.event_type": f"{message.model}.created",
        "cloudevents.event_subject": message.subject,
        "sqla_signals.receiver": "shop.ship",
        "sqla_signals.on": "durable",
        "sqla_signals.attempt": 1,
    }
    # The flush of the receiver's own transaction is inside of it.
    assert spans.parent(spans.one("entered")) == "process sqla_signals_outbox"
    assert ledger(committed) == ["new 1"]


def test_each_attempt_is_a_child_of_the_same_span_and_a_failed_one_says_so(
    shop: Engine, spans: Spans, caplog: pytest.LogCaptureFixture
):
    """Two spans for a message that was tried twice."""

    @receiver(post_save, sender=Order, durable=True, name="shop.ship")
    def ship(sender, event, session, **kwargs):
        if event.attempt == 1:
            raise ValueError("bad")
        session.add(Ledger(entry="shipped"))

    place(shop)
    publisher = Recording()
    Relay(shop, publisher, outbox=outbox).run_once()
    (message,) = publisher.published
    worker = Worker(shop)
    with pytest.raises(ValueError, match="bad"):
        worker.run(message)
    assert worker.run(message, attempt=2) is True
    first, second = spans.named("process sqla_signals_outbox")
    assert_failed(first, "ValueError: bad", "builtins.ValueError")
    assert second.status.status_code is StatusCode.UNSET
    assert [attributes(one)["sqla_signals.attempt"] for one in (first, second)] == [1, 2]
    assert spans.parent(first) == spans.parent(second) == "create sqla_signals_outbox"
    assert ledger(shop) == ["shipped"]


def test_a_message_without_a_trace_or_a_receiver_has_a_span_where_it_is_run(
    shop: Engine, spans: Spans
):
    """Written before instrumentation; nobody of that name is connected here."""
    uninstrument()

    @receiver(post_save, sender=Order, durable=True, name="shop.ship")
    def ship(sender, **kwargs):
        pass

    place(shop)
    publisher = Recording()
    Relay(shop, publisher, outbox=outbox).run_once()
    (message,) = publisher.published
    assert message.headers == {}
    post_save.disconnect(ship)
    instrument(spans.provider)
    with spans.tracer.start_as_current_span("task"), pytest.raises(UnknownReceiverError):
        Worker(shop).run(message)
    process = spans.one("process sqla_signals_outbox")
    assert (spans.parent(process), process.links) == ("task", ())
    assert process.status.status_code is StatusCode.ERROR


def test_headers_travel_through_json():
    """As attributes of the CloudEvent, which has an extension of that name."""
    headers = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01", "tracestate": "a=b"}
    message = Message.from_json(
        '{"specversion": "1.0", "id": "00000000-0000-7000-8000-000000000000", "source": "/shop",'
        ' "type": "shop.Order.created", "subject": "1", "time": "2024-01-01T00:00:00+00:00",'
        ' "sequence": "1", "receiver": "shop.ship", "attempt": 1, "data": {},'
        f' "traceparent": "{headers["traceparent"]}", "tracestate": "a=b",'
        ' "datacontenttype": "application/json"}'
    )
    assert message.headers == headers
    assert Message.from_json(message.to_json()).headers == headers


def test_async_receivers_have_spans_for_as_long_as_they_are_awaited(shop: Engine, spans: Spans):
    """Plain, decorated, after the commit and durable; two requests at once are not mixed."""

    def decorated(fn):
        @functools.wraps(fn)
        def call(*args, **kwargs):
            return fn(*args, **kwargs)

        del call.__wrapped__
        return call

    async def work(what: str, instance: Order) -> None:
        await asyncio.sleep(0)
        with spans.tracer.start_as_current_span(f"{what} {instance.status}"):
            await asyncio.sleep(0)

    @receiver(post_save, sender=Order)
    async def saved(sender, instance, **kwargs):
        await work("saved", instance)

    @receiver(post_save, sender=Order)
    @decorated
    async def wrapped(sender, instance, **kwargs):
        await work("wrapped", instance)

    @receiver(post_save, sender=Order, on="commit")
    async def committed(sender, instance, **kwargs):
        await work("committed", instance)

    @receiver(post_save, sender=Order, durable=True, name="shop.ship")
    async def ship(sender, instance, **kwargs):
        await work("durable", instance)

    url = f"sqlite+aiosqlite:///{shop.url.database}"

    async def request(engine, name: str) -> None:
        with spans.tracer.start_as_current_span(f"request {name}"):
            async with AsyncSession(engine) as session:
                session.add(Order(status=name))
                await session.commit()
            assert get_current_span().is_recording()

    async def main() -> None:
        engine = create_async_engine(url, connect_args={"timeout": 60})
        await asyncio.gather(request(engine, "a"), request(engine, "b"))
        await engine.dispose()

    asyncio.run(main())
    engine = create_async_engine(url)
    relay = Relay(async_sessionmaker(engine), outbox=outbox)
    assert relay.run_once() == 2
    for name in ("a", "b"):
        (root,) = spans.named(f"request {name}")
        for what in ("saved", "wrapped", "committed"):
            assert spans.parent(spans.one(f"{what} {name}")) == what
        inner = spans.one(f"durable {name}")
        assert spans.parent(inner) == "process sqla_signals_outbox"
        trace_ids = {
            span.context.trace_id
            for span in spans.all()
            if span.context is not None and span.name.endswith(f" {name}")
        }
        assert root.context is not None
        assert trace_ids == {root.context.trace_id}
    for what in ("saved", "wrapped", "committed"):
        assert {spans.parent(span) for span in spans.named(what)} == {"request a", "request b"}
    relay.sessions.run(lambda: engine.sync_engine.dispose())


def test_muted_receivers_have_no_spans(shop: Engine, spans: Spans):
    """Nothing was called."""

    @receiver(post_save, sender=Order)
    def saved(sender, **kwargs):
        pass

    with mute(receiver=saved):
        place(shop)
    assert spans.all() == []
    place(shop)
    assert spans.one("saved")


def test_it_works_together_with_a_trace_and_may_be_called_twice(shop: Engine, spans: Spans):
    """Each sees every call once."""

    @receiver(post_save, sender=Order)
    def saved(sender, **kwargs):
        pass

    instrument(spans.provider)
    with trace() as traced:
        place(shop)
    assert len(spans.named("saved")) == 1
    assert [step.kind for step in traced.root.walk()].count("receiver") == 1
    uninstrument()
    uninstrument()
    place(shop)
    assert len(spans.all()) == 1


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    """The package works without opentelemetry-api."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import sqla_signals, sqla_signals.durable, sqla_signals.cli\n"
        "assert 'sqla_signals.opentelemetry' not in sys.modules\n"
        "try: import sqla_signals.opentelemetry\n"
        "except ModuleNotFoundError as error: print(error.__notes__[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == "Remedy: pip install 'sqla-signals[opentelemetry]'\n"

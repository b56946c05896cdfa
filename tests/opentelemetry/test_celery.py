"""OpenTelemetry and Celery: a relay, a broker in memory, and a real worker in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_signals import post_save, receiver
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import Relay
from sqla_signals.durable.tables import failures

from ..durable.models import Ledger, Order, outbox
from .conftest import Spans


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """A broker in this process, and no pause before what has failed is tried again."""
    monkeypatch.setattr(failures, "FIRST_RETRY", 0)
    app = Celery(
        "shop",
        broker="memory://",
        broker_transport_options={"polling_interval": 0.01},
        task_default_queue=f"queue-{uuid4()}",
    )
    # A worker would give this process its own log, in which later tests find nothing.
    monkeypatch.setattr(app.log, "setup", lambda **_: None)
    yield app
    app.close()


@pytest.fixture
def instrumented(request: pytest.FixtureRequest, spans: Spans) -> Iterator[bool]:
    """Whether Celery's own instrumentation is active as well."""
    if not request.param:
        yield False
        return
    celery = pytest.importorskip("opentelemetry.instrumentation.celery")
    celery.CeleryInstrumentor().instrument(tracer_provider=spans.provider)
    yield True
    celery.CeleryInstrumentor().uninstrument()


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


@pytest.mark.parametrize("instrumented", [False, True], indirect=True, ids=["alone", "both"])
def test_the_trace_goes_through_celery_to_the_worker_and_its_retries(
    app: Celery, shop: Engine, spans: Spans, instrumented: bool
):
    """Below the request, with Celery's own spans linked; its instrumentation changes no parent."""
    done = threading.Event()

    @receiver(post_save, sender=Order, durable=True, name="shop.ship")
    def ship(sender, instance, session, event, **kwargs):
        with spans.tracer.start_as_current_span(f"pack {event.attempt}"):
            session.add(Ledger(entry=f"{instance.status} {event.attempt}"))
            session.flush()
        if event.attempt == 1:
            raise ValueError("the label was not printed")
        done.set()

    celery = CeleryPublisher(app, shop)
    with spans.tracer.start_as_current_span("request"):
        with Session(shop) as session:
            session.add(Order(status="new"))
            session.commit()
    with spans.tracer.start_as_current_span("relay"):
        assert Relay(shop, celery, outbox=outbox).run_once() == 1
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
        assert done.wait(60)
    celery.close()

    failed, succeeded = spans.named("process sqla_signals_outbox")
    assert failed.status.status_code is StatusCode.ERROR
    assert succeeded.status.status_code is StatusCode.UNSET
    create = spans.one("create sqla_signals_outbox")
    assert spans.parent(create) == "request"
    tasks = spans.named("run/sqla_signals.run")
    assert len(tasks) == (2 if instrumented else 0)
    for attempt, process in enumerate([failed, succeeded], start=1):
        assert spans.parent(process) == "create sqla_signals_outbox"
        assert spans.parent(spans.one(f"pack {attempt}")) == "process sqla_signals_outbox"
        around = [span_id(tasks[attempt - 1])] if instrumented else []
        linked = [link.context.span_id for link in process.links]
        assert linked == [span_id(create), *around]
    with Session(shop) as session:
        assert session.scalars(select(Ledger.entry)).all() == ["new 2"]

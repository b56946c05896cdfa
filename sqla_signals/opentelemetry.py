"""OpenTelemetry: a span for each call of a receiver, across commits and durable messages.

What is called in a flush has the span around it as its parent, like any function. A commit receiver
has the span in which the transaction was committed, wherever it is called from. A durable message
carries that span in its ``traceparent``, and the worker's span continues it, whenever and wherever
that is.

The names are those of the semantic conventions for databases, code and messaging (the latter still
in development). Statements have no spans here: ``opentelemetry-instrumentation-sqlalchemy`` makes
those, below these.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from sqlalchemy import Table, inspect
from sqlalchemy.orm import Mapper

try:
    from opentelemetry import context
    from opentelemetry.trace import (
        Link,
        Span,
        SpanKind,
        Status,
        StatusCode,
        Tracer,
        TracerProvider,
        get_current_span,
        get_tracer,
        set_span_in_context,
    )
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as _error:
    _error.add_note("Remedy: pip install 'sqla-signals[opentelemetry]'")
    raise

from . import __version__, observe
from .durable.message.envelope import UnknownModelError
from .durable.message.naming import find_mapper
from .durable.writing import header_sources
from .receivers.blocks import block
from .receivers.installations import model_signals
from .receivers.mapped import known_outbox
from .receivers.receiver import describe_sender

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .durable import Message
    from .durable.tables.tables import OutboxTables
    from .observe import Around, Call
    from .receivers.receiver import Phase

Attributes = dict[str, str | int]

_SYSTEM: Final = "sqla_signals"
_DIALECTS: Final = {"mssql": "microsoft.sql_server", "oracle": "oracle.db"}
"""Where the semantic conventions have another name than SQLAlchemy."""

# The attributes of a CloudEvent are lower-case letters and digits, as the two of the W3C are.
_w3c: Final = TraceContextTextMapPropagator()
_lock: Final = threading.Lock()
_instrumentation: _Instrumentation | None = None


def instrument(tracer_provider: TracerProvider | None = None) -> None:
    """Make a span of each call of a receiver, in every thread, from now on.

    :param tracer_provider: where the spans go; by default the global one.

    Also of functions given to ``on_commit`` and ``on_rollback``. A muted receiver is not called and
    has none. Called again without :func:`uninstrument` in between, it does nothing.
    """
    global _instrumentation
    with _lock:
        if _instrumentation is None:
            tracer = get_tracer(_SYSTEM, __version__, tracer_provider)
            _instrumentation = _Instrumentation(tracer)
            observe.add(_instrumentation)
            header_sources.append(_instrumentation.headers)


def uninstrument() -> None:
    """Undo :func:`instrument`; what is running gets its span to the end. May be called twice."""
    global _instrumentation
    with _lock:
        if _instrumentation is not None:
            observe.remove(_instrumentation)
            header_sources.remove(_instrumentation.headers)
            _instrumentation = None


class _Instrumentation(observe.Observer):
    """Makes the spans."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @block
    def around(self, call: Call) -> Iterator[None]:
        span = call.kept.pop(self, None) or self._start(call)
        token = context.attach(set_span_in_context(span))
        try:
            yield
        finally:
            context.detach(token)
            if call.goes_on:
                call.kept[self] = span
            else:
                _end(span, call.error)

    def delivery(self, session: Session, on: Phase) -> Callable[[], Around]:
        committed = context.get_current()

        @block
        def around() -> Iterator[None]:
            token = context.attach(committed)
            try:
                yield
            finally:
                context.detach(token)

        return around

    def headers(self, outbox: OutboxTables, events: int) -> Mapping[str, str]:
        """What the messages of a transaction carry: a span for their making."""
        name = outbox.table.fullname
        attributes = _messaging("create", name) | {"messaging.batch.message_count": events}
        carrier: dict[str, str] = {}
        with self._tracer.start_as_current_span(
            f"create {name}", kind=SpanKind.PRODUCER, attributes=attributes
        ):
            _w3c.inject(carrier)
        return carrier

    def _start(self, call: Call) -> Span:
        if call.message is not None:
            return self._start_message(call.message)
        if call.receiver is None or call.signal is None:
            return self._tracer.start_span(
                f"on_{call.on} {call.name}", attributes={"code.function.name": call.name}
            )
        path, _, line = call.receiver.location.rpartition(":")
        attributes: Attributes = {
            "sqla_signals.signal": call.signal.name,
            "sqla_signals.sender": describe_sender(call.sender),
            "sqla_signals.receiver": call.name,
            "sqla_signals.on": call.on,
            "code.function.name": call.name,
            **_database(call),
        }
        if path:  # a builtin has none
            attributes |= {"code.file.path": path, "code.line.number": int(line)}
        return self._tracer.start_span(f"{call.signal.name} {call.name}", attributes=attributes)

    def _start_message(self, message: Message) -> Span:
        """The conventions demand a link to where the message was made, and allow it as the parent.

        There is one message to a span, so it is both. What is around the worker is linked.
        """
        around = get_current_span().get_span_context()
        parent = _w3c.extract(message.headers, context.Context())
        created = get_current_span(parent).get_span_context()
        name = _destination(message)
        attributes = _messaging("process", name) | {
            "messaging.consumer.group.name": message.receiver,
            "messaging.message.id": str(message.id),
            "cloudevents.event_id": str(message.id),
            "cloudevents.event_source": message.source,
            "cloudevents.event_spec_version": "1.0",
            "cloudevents.event_type": f"{message.model}.{message.kind}",
            "cloudevents.event_subject": message.subject,
            "sqla_signals.receiver": message.receiver,
            "sqla_signals.on": "durable",
            "sqla_signals.attempt": message.attempt,
        }
        links = []
        if created.is_valid:
            links = [Link(one) for one in (created, around) if one.is_valid]
        return self._tracer.start_span(
            f"process {name}",
            context=parent if created.is_valid else None,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
        )


def _end(span: Span, error: BaseException | None) -> None:
    if error is not None:
        span.record_exception(error)
        span.set_attribute("error.type", f"{type(error).__module__}.{type(error).__qualname__}")
        span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
    span.end()


def _messaging(operation: str, destination: str) -> Attributes:
    return {
        "messaging.system": _SYSTEM,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": destination,
    }


def _destination(message: Message) -> str:
    """The outbox that a message is from; its source where the model is not known here."""
    try:
        return str(known_outbox(find_mapper(message.model)).table.fullname)
    except UnknownModelError:
        return message.source


def _database(call: Call) -> Attributes:
    """Whose row the call is about, and what was done to it; nothing for signals of your own."""
    if call.signal not in model_signals:
        return {}
    using = call.arguments.get("using")
    dialect = getattr(using, "dialect", None)
    if dialect is None:
        return {}
    table = call.sender
    if not isinstance(table, Table):
        mapper = inspect(table, raiseerr=False)
        table = mapper.local_table if isinstance(mapper, Mapper) else None
    system = str(dialect.name)
    attributes: Attributes = {"db.system.name": _DIALECTS.get(system, system)}
    if isinstance(table, Table):
        attributes["db.collection.name"] = table.fullname
    operation = _operation(call)
    if operation is not None:
        attributes["db.operation.name"] = operation
    return attributes


def _operation(call: Call) -> str | None:
    assert call.signal is not None
    bulk = call.arguments.get("operation")
    if bulk is not None:
        return str(bulk).upper()
    if call.signal.name in ("pre_delete", "post_delete"):
        return "DELETE"
    created = call.arguments.get("created")
    if created is not None:
        return "INSERT" if created else "UPDATE"
    action = call.arguments.get("action")
    return None if action is None else "INSERT" if action.endswith("add") else "DELETE"

"""Spans in memory, and the databases of the tests of durable delivery."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer
from sqlalchemy import Engine

import sqla_signals
from sqla_signals.durable.writing import header_sources
from sqla_signals.opentelemetry import instrument, uninstrument
from sqla_signals.receivers.observing import observers

from ..conftest import create_sqlite_engine, create_tables
from ..durable.models import Base


class Spans:
    """What was exported: the spans that have ended, in that order."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = self.provider.get_tracer("tests")

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of the receiver, or with the whole name."""
        return [span for span in self.all() if span.name == name or span.name.endswith(f".{name}")]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def parent(self, span: ReadableSpan) -> str | None:
        """The name of the parent; ``None`` for a root."""
        if span.parent is None:
            return None
        assert span.context is not None
        assert span.parent.trace_id == span.context.trace_id
        (found,) = (
            one.name
            for one in self.all()
            if one.context is not None and one.context.span_id == span.parent.span_id
        )
        return found.rpartition(".")[2]


@pytest.fixture
def spans() -> Iterator[Spans]:
    """The spans that are made in a test."""
    spans = Spans()
    instrument(spans.provider)
    yield spans
    uninstrument()
    assert observers == []
    assert header_sources == []
    spans.provider.shutdown()


@pytest.fixture
def shop(tmp_path: Path, installed: sqla_signals.Installation) -> Iterator[Engine]:
    """An engine on the shop; all its connections must come back."""
    engine = create_sqlite_engine(tmp_path / "shop.db")
    create_tables(engine, Base.metadata)
    yield engine
    assert engine.pool.checkedout() == 0
    engine.dispose()

"""The shop on a file, with signals installed, and a log that may hold errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

import sqla_signals
from sqla_signals.receivers.observing import observers

from ..conftest import create_sqlite_engine, create_tables
from .models import Base


@pytest.fixture(autouse=True)
def nobody_looks_on() -> Iterator[None]:
    """However a test ends, nothing of a trace is left in the way."""
    yield
    assert observers == []


@pytest.fixture
def shop(tmp_path: Path, installed: sqla_signals.Installation) -> Iterator[Engine]:
    """An engine on the shop; all its connections must come back."""
    engine = create_sqlite_engine(tmp_path / "shop.db")
    create_tables(engine, Base.metadata)
    yield engine
    assert engine.pool.checkedout() == 0
    engine.dispose()

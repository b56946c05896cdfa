"""A session on an empty database, with signals installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

import sqla_signals

from ..conftest import create_tables
from ..contract.conftest import async_engine
from .models import Base

__all__ = ["async_engine"]


@pytest.fixture
def database(engine: Engine) -> Engine:
    """The engine, with the tables in it."""
    create_tables(engine, Base.metadata)
    return engine


@pytest.fixture
def session(database: Engine, installed: sqla_signals.Installation) -> Iterator[Session]:
    """A session, with signals installed."""
    with Session(database) as session:
        yield session

"""Sessions on an empty library, and what they send."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, NullPool, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

import sqla_signals

from ..conftest import create_tables
from .models import Base
from .observing import Log, listen


@pytest.fixture
def library(engine: Engine) -> Engine:
    """The engine, with the tables of the library in it."""
    create_tables(engine, Base.metadata)
    return engine


@pytest.fixture
def session(library: Engine, installed: sqla_signals.Installation) -> Iterator[Session]:
    """A session on the library, with signals installed."""
    with Session(library) as session:
        yield session


@pytest.fixture
def log(installed: sqla_signals.Installation) -> Log:
    """Everything that is sent, for any sender."""
    return listen()


@pytest.fixture
def statements(engine: Engine) -> list[str]:
    """The SQL that the engine runs, from now on."""
    found: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _on_execute(connection, cursor, statement, parameters, context, executemany) -> None:
        if statement != "BEGIN":  # the engine for SQLite begins with a statement
            found.append(statement)

    return found


@pytest.fixture
def async_library(library: Engine, async_engine: AsyncEngine) -> AsyncEngine:
    """The ``AsyncEngine``, with the tables of the library in its database."""
    return async_engine


@pytest.fixture
def async_engine(engine: Engine) -> AsyncEngine:
    """An ``AsyncEngine`` on the database of ``engine``: aiosqlite or asyncpg."""
    url = make_url(engine.url)
    driver = "sqlite+aiosqlite" if engine.dialect.name == "sqlite" else "postgresql+asyncpg"
    # Connections belong to an event loop and each test has its own: nothing is pooled.
    return create_async_engine(url.set(drivername=driver), poolclass=NullPool)

"""Transactions of every kind on an empty library, and what their ends deliver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

import sqla_signals

from .. import conftest as shared
from ..conftest import clear_postgresql, create_sqlite_engine
from ..contract.models import Base
from .models import Record
from .observing import (
    COMMITTING,
    DATABASES,
    UNDOING,
    Deliveries,
    Transaction,
    create_async_twin,
    deliveries,
)


def create_tables(engine: Engine) -> None:
    shared.create_tables(engine, Base.metadata, Record.metadata)


@pytest.fixture
def library(engine: Engine) -> Iterator[Engine]:
    """The engine, with the tables in it; all its connections must come back."""
    create_tables(engine)
    yield engine
    assert engine.pool.checkedout() == 0


@pytest.fixture
def session(library: Engine, installed: sqla_signals.Installation) -> Iterator[Session]:
    """A session on the library, with signals installed."""
    with Session(library) as session:
        yield session


@pytest.fixture
def log(installed: sqla_signals.Installation) -> Deliveries:
    """What is delivered to ``on="commit"`` and ``on="rollback"`` receivers, of any sender."""
    return deliveries()


@pytest.fixture
def statements(engine: Engine) -> list[str]:
    """The SQL that the engine runs, from now on."""
    found: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _on_execute(connection, cursor, statement, parameters, context, executemany) -> None:
        if statement != "BEGIN":  # the engine for SQLite begins with a statement
            found.append(statement)

    return found


def database(name: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A plain engine on an empty database with the tables in it."""
    if name == "sqlite":
        tmp_path: Path = request.getfixturevalue("tmp_path")
        engine = create_sqlite_engine(tmp_path / "test.db")
    else:
        url: str = request.getfixturevalue("postgresql_url")
        engine = create_engine(url)
    create_tables(engine)
    yield engine
    assert engine.pool.checkedout() == 0
    engine.dispose()
    if name == "postgresql":
        clear_postgresql(url)


@pytest.fixture
def postgresql_engine(postgresql_url: str) -> Iterator[Engine]:
    """An engine on an empty PostgreSQL database, for what SQLite has not."""
    engine = create_engine(postgresql_url)
    yield engine
    assert engine.pool.checkedout() == 0
    engine.dispose()
    clear_postgresql(postgresql_url)


def marks(driver: str) -> Any:
    return pytest.mark.postgresql if DATABASES[driver] == "postgresql" else ()


def each(ways: tuple[tuple[str, Callable[..., Any]], ...]) -> list[Any]:
    return [
        pytest.param(way, id=f"{way[0]}-{way[1].__name__}", marks=marks(way[0])) for way in ways
    ]


@pytest.fixture(params=each(COMMITTING))
def committing(
    request: pytest.FixtureRequest, installed: sqla_signals.Installation
) -> Iterator[Transaction]:
    """``committing(work)`` does work in a transaction that is committed, in each way there is."""
    driver, how = request.param
    for engine in database(DATABASES[driver], request):
        yield Transaction(engine, driver, how)


@pytest.fixture(params=each(UNDOING))
def undoing(
    request: pytest.FixtureRequest, installed: sqla_signals.Installation
) -> Iterator[Transaction]:
    """``undoing(work)`` does work in a transaction that comes to nothing, in each way there is."""
    driver, how = request.param
    for engine in database(DATABASES[driver], request):
        yield Transaction(engine, driver, how)


@pytest.fixture(
    params=[
        pytest.param(driver, marks=marks(driver))
        for driver in ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg")
    ]
)
def driver(request: pytest.FixtureRequest) -> str:
    """The asynchronous drivers in turn."""
    return request.param


@pytest.fixture
def witness(driver: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A plain engine on the database of ``async_engine``."""
    yield from database(DATABASES[driver], request)


@pytest.fixture
def async_engine(driver: str, witness: Engine, installed: sqla_signals.Installation) -> AsyncEngine:
    """An ``AsyncEngine`` on a database with the tables in it, and signals installed."""
    return create_async_twin(witness.url, driver)

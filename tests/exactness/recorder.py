"""What happened in each flush of one session: statements, signals, SQLAlchemy's own events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, create_engine, event, inspect
from sqlalchemy.orm import Session, object_session
from sqlalchemy.pool import StaticPool

from .models import Base
from .witness import (
    Fate,
    Key,
    Statement,
    Write,
    base_tables,
    by_the_unit_of_work,
    create_triggers,
    fates,
    read_log,
)

BASES = base_tables(Base.registry)


def key_of(instance: object) -> Key | None:
    """The base table and the primary key of the row that `instance` stands for, if it has one."""
    state = inspect(instance)
    if state.identity is None:
        return None
    return state.mapper.base_mapper.local_table.name, tuple(state.identity)


@dataclass(frozen=True)
class Sent:
    """One signal as a receiver got it."""

    at: int
    signal: str
    sender: Any
    instance: Any
    kind: str
    """`created`, `updated` or `deleted`, as the arguments say."""
    key: Key | None
    """When it was sent."""
    in_session: bool
    deleted: bool
    modified: bool
    arguments: Mapping[str, Any]

    @classmethod
    def now(cls, at: int, sender: Any, arguments: Mapping[str, Any]) -> Sent:
        """The signal, with its changes as they are now."""
        instance, signal = arguments["instance"], arguments["signal"].name
        state = inspect(instance)
        if signal.endswith("_save"):
            kind = "created" if arguments["created"] else "updated"
            changes = {name: _frozen(change) for name, change in arguments["changes"].items()}
            arguments = {**arguments, "changes": changes}
        else:
            kind = "deleted"
        return cls(
            at,
            signal,
            sender,
            instance,
            kind,
            key_of(instance),
            instance in arguments["session"],
            state.deleted,
            state.modified,
            arguments,
        )

    def __str__(self) -> str:
        instance = type(self.instance).__name__
        return f"{self.signal}({instance} {self.kind} {self.key and self.key[1]}) at {self.at}"


def _frozen(change: tuple[Any, Any]) -> tuple[Any, Any]:
    """Old and new, which a later change in place leaves as they are."""
    old, new = (dict(value) if isinstance(value, dict) else value for value in change)
    return old, new


@dataclass
class Flush:
    """What happened in one flush."""

    statements: dict[int, Statement] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    born: list[tuple[Any, Key | None]] = field(default_factory=list)
    """Pending instances that became persistent, with their keys."""
    died: list[tuple[Any, Key | None]] = field(default_factory=list)
    """Persistent instances that were deleted."""
    mapper_events: list[Any] = field(default_factory=list)
    """Instances in the order of SQLAlchemy's own `after_insert/update/delete`."""
    fates: list[Fate] = field(default_factory=list)
    cascaded: list[Write] = field(default_factory=list)
    error: BaseException | None = None

    def __str__(self) -> str:
        happened = [(sent.at, str(sent)) for sent in self.sent]
        happened += [(s.at, s.sql) for s in self.statements.values()]
        happened += [(f.first_at, f"  wrote {f.kind} {f.key}") for f in self.fates]
        happened += [(w.statement.at, f"  database cascaded to {w.table}") for w in self.cascaded]
        lines = [f"  {at:4} {what}" for at, what in sorted(happened)]
        return "\n".join(lines if self.error is None else [*lines, f"  failed: {self.error!r}"])


class Recorder:
    """The flushes of one session and the signals sent in and outside of them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.flush: Flush | None = None
        """The one being carried out."""
        self.finished: list[Flush] = []
        """Not yet compared."""
        self.stray: list[Sent] = []
        """Signals sent outside of a flush."""
        self.cascaded_to: set[Key] = set()
        """Rows that the database wrote by itself: what the session knows of them may be stale."""
        self.meddlers: list[Callable[[Sent, Session], None]] = []

    @contextmanager
    def recording(self, session: Session) -> Iterator[None]:
        """Record one flush of `session` and, once it has succeeded, what the witness says of it."""
        self.flush = flush = Flush()
        self.database.flush = flush
        try:
            yield
        except BaseException as error:
            flush.error = error
            raise
        finally:
            self.flush = self.database.flush = None
            self.database.executing = ""
            self.finished.append(flush)
        if flush.statements:
            writes = read_log(session.connection(), flush.statements)
            named, flush.cascaded = by_the_unit_of_work(writes)
            flush.fates = fates(named, BASES)
            for write in flush.cascaded:
                table = BASES[write.table]
                row = write.old or write.new
                self.cascaded_to.add((table.name, tuple(row[c.name] for c in table.primary_key)))

    def receive(self, sender: Any, arguments: Mapping[str, Any]) -> None:
        """Record a signal, then let the meddlers act on it."""
        sent = Sent.now(self.database.tick(), sender, arguments)
        (self.stray if self.flush is None else self.flush.sent).append(sent)
        for meddle in self.meddlers:
            meddle(sent, arguments["session"])


class RecordedSession(Session):
    """A session whose flushes are recorded, by the recorder in its `info`."""

    def flush(self, objects: Any = None) -> None:
        recorder: Recorder | None = self.info.get("recorder")
        if recorder is None or recorder.flush is not None or self._flushing:
            return super().flush(objects)
        with recorder.recording(self):
            super().flush(objects)
        return None


class SignallingSession(RecordedSession):
    """The one whose signals are compared with the witness."""


class ControlSession(RecordedSession):
    """The same for the twin of a program, which runs without signals."""


@event.listens_for(RecordedSession, "pending_to_persistent", propagate=True)
def _on_born(session: Session, instance: object) -> None:
    recorder = session.info.get("recorder")
    if recorder is not None and recorder.flush is not None:
        recorder.flush.born.append((instance, key_of(instance)))


@event.listens_for(RecordedSession, "persistent_to_deleted", propagate=True)
def _on_died(session: Session, instance: object) -> None:
    recorder = session.info.get("recorder")
    if recorder is not None and recorder.flush is not None:
        recorder.flush.died.append((instance, key_of(instance)))


def _on_mapper_event(mapper: Any, connection: Connection, instance: object) -> None:
    session = object_session(instance)
    recorder = session.info.get("recorder") if session is not None else None
    if recorder is not None and recorder.flush is not None:
        recorder.flush.mapper_events.append(instance)


for _name in ("after_insert", "after_update", "after_delete"):
    event.listen(Base, _name, _on_mapper_event, propagate=True)


class Database:
    """An engine with the schema, the triggers and the clock that places all happenings."""

    def __init__(self, url: str = "sqlite://") -> None:
        self.now = 0
        self.flush: Flush | None = None
        self.executing = ""
        self.touched: set[str] = set()
        if url.startswith("sqlite"):
            self.engine = create_engine(url, poolclass=StaticPool)
            event.listen(self.engine, "connect", self._on_connect)
            event.listen(self.engine, "begin", _begin)
        else:
            self.engine = create_engine(url)
        with self.engine.begin() as connection:
            Base.metadata.create_all(connection)
            create_triggers(connection, Base.metadata)
        event.listen(self.engine, "before_cursor_execute", self._on_execute, retval=True)

    def tick(self) -> int:
        """The next place in the order of happenings."""
        self.now += 1
        return self.now

    def clear(self) -> None:
        """Delete what programs wrote, unseen by the triggers' readers."""
        if not self.touched:
            return
        sqlite = self.engine.dialect.name == "sqlite"
        off = "PRAGMA foreign_keys = OFF" if sqlite else "SET session_replication_role = replica"
        on = "PRAGMA foreign_keys = ON" if sqlite else "SET session_replication_role = DEFAULT"
        # On the driver's own connection: the PRAGMA is ignored inside a transaction. The log goes
        # last, since on SQLite emptying the others fills it.
        connection = self.engine.raw_connection()
        cursor = connection.cursor()
        for sql in (off, *(f"DELETE FROM {t}" for t in [*sorted(self.touched), "witness_log"]), on):
            cursor.execute(sql)
        connection.commit()
        connection.close()
        self.touched = set()

    def remove(self) -> None:
        """Drop all that was created and close the connections."""
        if self.engine.dialect.name == "postgresql":
            with self.engine.begin() as connection:
                connection.exec_driver_sql("DROP SCHEMA public CASCADE")
                connection.exec_driver_sql("CREATE SCHEMA public")
        self.engine.dispose()

    def _on_execute(
        self,
        connection: Connection,
        cursor: Any,
        sql: str,
        parameters: Any,
        context: Any,
        executemany: bool,
    ) -> tuple[str, Any]:
        if self.flush is not None and (statement := Statement.parse(self.now + 1, sql)) is not None:
            self.tick()
            self.flush.statements[statement.at] = statement
            self.touched.add(statement.table)
            sql = f"{sql} /*w{statement.at}*/"
            self.executing = sql
        return sql, parameters

    def _on_connect(self, dbapi_connection: Any, record: Any) -> None:
        # The driver's own transaction control breaks savepoints.
        dbapi_connection.isolation_level = None
        dbapi_connection.execute("PRAGMA foreign_keys = ON")
        dbapi_connection.create_function("witness_statement", 0, lambda: self.executing)


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")

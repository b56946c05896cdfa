"""The state machine for what is told after the end of a transaction.

The witness is what another connection sees before and after: a dump of every table. Which row of
the one dump is which row of the other, the triggers' log tells. The log is kept until the program
is over, so the database itself takes out of it what a savepoint undid.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from sqlalchemy import JSON, Column, Connection, create_engine, event, exc, inspect, make_url, text
from sqlalchemy.orm import (
    LoaderCallableStatus,
    Mapper,
    Session,
    make_transient,
    object_session,
)
from sqlalchemy.orm.exc import ObjectDeletedError

import sqla_signals
from sqla_signals import UNSET, on_commit, on_rollback, post_delete, post_save, receiver_failed

from ..conftest import create_sqlite_engine
from .machine import SessionPrograms, pick, picks, plain_columns
from .models import CLUSTERS, Base
from .program import Mismatch, Program, Tally, _is_legal, _traceback
from .recorder import BASES, Database, Flush, RecordedSession, Recorder, key_of
from .witness import (
    STATEMENT_MARK,
    Fate,
    Key,
    Values,
    Write,
    attributes_of,
    by_the_unit_of_work,
    create_triggers,
    fates,
)

MODES = ("conditional_savepoint", "rollback_only", "control_fully", "create_savepoint")
JOINING = (*MODES, "restarting")
"""The kinds of sessions that join; the last is in a savepoint that is begun again when it ends."""
ACTIONS = ("change", "change and flush", "raise", "change and raise", "flush and raise", "nothing")

NESTING = (
    *("begin", "begin", "begin"),
    *("new", "update", "update", "update", "delete", "expunge", "refresh"),
    *("release", "release", "roll back", "violate"),
)

TABLES = Base.metadata.tables
HIERARCHIES: dict[str, list[str]] = defaultdict(list)
"""The tables of each hierarchy, by the name of its base table."""
for _table, _base in BASES.items():
    HIERARCHIES[_base.name].append(_table)
MAPPERS = {
    mapper.local_table.name: mapper for mapper in Base.registry.mappers if not mapper.inherits
}

Rows = dict[tuple[str, tuple[Any, ...]], Values]
"""The values of each row of each table, by table and primary key."""
Cell = tuple[str, str]
"""Table and column."""
MISSING = object()


# -- what is in the database -----------------------------------------------------------------------


class CommitDatabase(Database):
    """A database that another connection can look into."""

    def __init__(self, url: str = "sqlite://") -> None:
        self.now = self.executed = 0
        self.flush = None
        self.executing = ""
        self.touched = set()
        self.directory: TemporaryDirectory[str] | None = None
        self.two_phase = False
        if url.startswith("sqlite"):
            file = make_url(url).database
            if file is None:
                self.directory = TemporaryDirectory(prefix="sqla-signals-")
                file = f"{self.directory.name}/test.db"
            self.engine = create_sqlite_engine(Path(file))
            event.listen(self.engine, "connect", self._on_connect)
        else:
            self.engine = create_engine(url)
        with self.engine.begin() as connection:
            Base.metadata.create_all(connection)
            create_triggers(connection, Base.metadata)
            if connection.dialect.name == "postgresql":
                allowed = connection.exec_driver_sql("SHOW max_prepared_transactions").scalar_one()
                self.two_phase = int(allowed) > 0
        event.listen(self.engine, "before_cursor_execute", self._on_execute, retval=True)
        event.listen(self.engine, "before_cursor_execute", self._count)

    def remove(self) -> None:
        """Drop all that was created and close the connections."""
        super().remove()
        if self.directory is not None:
            self.directory.cleanup()

    def _count(self, *_: Any) -> None:
        self.executed += 1


def dump(connection: Connection) -> Rows:
    """Every row of every table."""
    found: Rows = {}
    for table, row in connection.exec_driver_sql(_DUMPS[connection.dialect.name]):
        values = normal(table, json.loads(row) if isinstance(row, str) else row)
        found[table, primary_key(table, values)] = values
    return found


def _dump_of(row: str) -> str:
    selects = []
    for name, table in TABLES.items():
        pairs = ", ".join(f"'{column.name}', t.{column.name}" for column in table.columns)
        selects.append(f"SELECT '{name}', {row.format(pairs=pairs)} FROM {name} t")
    return " UNION ALL ".join(selects)


_DUMPS = {"sqlite": _dump_of("json_object({pairs})"), "postgresql": _dump_of("to_jsonb(t)")}


def normal(table: str, values: Values) -> Values:
    """The row with its JSON decoded."""
    columns = TABLES[table].c
    return {
        name: json.loads(v) if isinstance(v, str) and isinstance(columns[name].type, JSON) else v
        for name, v in values.items()
    }


def primary_key(table: str, values: Values) -> tuple[Any, ...]:
    """The primary key of a row."""
    return tuple(values[column.name] for column in TABLES[table].primary_key)


def instance_row(rows: Rows, key: Key | None) -> dict[Cell, Any]:
    """The values of one instance, from all tables of its hierarchy."""
    if key is None:
        return {}
    return {
        (table, name): value
        for table in HIERARCHIES[key[0]]
        for name, value in rows.get((table, key[1]), {}).items()
    }


def mapper_of(key: Key, row: dict[Cell, Any]) -> Mapper[Any]:
    """The mapper of an instance, as its discriminator says."""
    mapper = MAPPERS[key[0]]
    if mapper.polymorphic_on is None:
        return mapper
    return mapper.polymorphic_map[row[key[0], mapper.polymorphic_on.name]]


def believed(instance: Any) -> dict[str, Any]:
    """The loaded values of column attributes that the instance takes for those of its row."""
    state = inspect(instance)
    found = {}
    for attribute in set(attributes_of(state.mapper).values()):
        if attribute in state.dict:
            value = state.committed_state.get(attribute, state.dict[attribute])
            if not isinstance(value, LoaderCallableStatus):
                found[attribute] = value
    return found


def is_wrong(mapper: Mapper[Any], attribute: str, value: Any, row: dict[Cell, Any]) -> bool:
    """Whether the row has another value."""
    return all(row.get(cell, MISSING) != value for cell in cells_of(mapper)[attribute])


_cells: dict[Mapper[Any], dict[str, list[Cell]]] = {}


def cells_of(mapper: Mapper[Any]) -> dict[str, list[Cell]]:
    """The columns of each attribute."""
    if mapper not in _cells:
        _cells[mapper] = cells = defaultdict(list)
        for cell, attribute in attributes_of(mapper).items():
            cells[attribute].append(cell)
    return _cells[mapper]


# -- what a transaction did ------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """What one flush wrote."""

    number: int
    writes: list[Write]
    switched: set[Key]
    """Rows that were one instance's before and another's after."""
    lost: set[Key]
    """Rows of new instances that SQLAlchemy deleted for old ones: its session is in error."""
    transaction: Any
    """The transaction or savepoint that it belongs to by now."""


def apply(rows: Rows, groups: Iterable[Group]) -> Rows:
    """`rows` after the writes."""
    rows = dict(rows)
    for group in groups:
        for write in group.writes:
            if write.old:
                del rows[write.table, primary_key(write.table, write.old)]
            if write.new:
                rows[write.table, primary_key(write.table, write.new)] = write.new
    return rows


@dataclass
class Row:
    """What became of one instance's row."""

    start: Key | None
    """Before; None when it is new."""
    end: Key | None
    """After; None when it is deleted."""
    first: int
    """The flush that wrote it first."""
    last_key: Key
    groups: set[int] = field(default_factory=set)
    cells_set: set[Cell] = field(default_factory=set)
    cells_computed: set[Cell] = field(default_factory=set)
    cells_cascaded: set[Cell] = field(default_factory=set)
    """What the database wrote by itself."""
    seen: dict[Cell, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """The values it had."""
    lost: bool = False
    """The database deleted it by itself."""

    @property
    def kind(self) -> str | None:
        """The net effect."""
        if self.start is None:
            return None if self.end is None else "created"
        return "deleted" if self.end is None else "updated"


class Fold:
    """The rows that were written, one by one, over many flushes."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.rows: list[Row] = []
        self._current: dict[Key, Row] = {}
        for group in groups:
            self._add(group)

    def _add(self, group: Group) -> None:
        named, cascaded = by_the_unit_of_work(group.writes)
        switched = set(group.switched)
        for fate in fates(named, BASES):
            if fate.kind == "updated" and fate.key in switched:
                switched.discard(fate.key)
                self._end(fate.key, group)
                row = self._new(None, fate.key, group)
            elif fate.kind == "created":
                row = self._new(None, fate.key, group)
            else:
                row = self._at(_key_before(fate), group)
                self._end(_key_before(fate), group)
                if fate.kind == "updated":
                    row.end = row.last_key = fate.key
                    row.cells_set |= fate.columns_set
                    row.cells_computed |= fate.columns_computed
                    self._current[fate.key] = row
            for values in (fate.old, fate.new):
                for table, columns in values.items():
                    for name, value in columns.items():
                        row.seen[table, name].append(value)
        for key in switched:
            self._end(key, group)
            self._new(None, key, group)
        for write in cascaded:
            self._cascade(write, group)

    def _cascade(self, write: Write, group: Group) -> None:
        if write.table not in BASES:
            return
        key = BASES[write.table].name, primary_key(write.table, write.old)
        row = self._at(key, group)
        if write.operation == "DELETE":
            self._end(key, group)
            row.lost = True
        else:
            changed = {name for name in write.old if write.old[name] != write.new[name]}
            row.cells_cascaded |= {(write.table, name) for name in changed}

    def _new(self, start: Key | None, key: Key, group: Group) -> Row:
        row = self._current[key] = Row(start, key, group.number, key, {group.number})
        self.rows.append(row)
        return row

    def _at(self, key: Key, group: Group) -> Row:
        row = self._current.get(key) or self._new(key, key, group)
        row.groups.add(group.number)
        return row

    def _end(self, key: Key, group: Group) -> None:
        row = self._at(key, group)
        del self._current[key]
        row.end = None


def _key_before(fate: Fate) -> Key:
    base = fate.key[0]
    return (base, primary_key(base, fate.old[base])) if fate.old.get(base) else fate.key


@dataclass
class Call:
    """One call of a receiver."""

    receiver: str
    on: str
    kind: str
    key: Key
    sender: type
    values: dict[str, Any]
    """Those that were loaded."""
    lazy: dict[str, Any]
    """Those that were loaded on access."""
    changes: dict[str, tuple[Any, Any]]
    update_fields: frozenset[str] | None
    problems: list[str]

    def __str__(self) -> str:
        return f"on={self.on} {self.kind} {self.sender.__name__} {self.key[1]}"


@dataclass
class Ending:
    """The end of a root transaction or savepoint: what there is to tell."""

    on: str
    session: Session
    before: Rows
    after: Rows
    groups: list[Group]
    stale: set[tuple[Key, str]]
    """Attributes of which the session had another value than the database, before a flush or so."""
    stale_after: set[tuple[Key, str]]
    """The same at the end."""
    loaded_after: dict[Key, set[str]]
    """What was loaded at the end of each instance that was written."""
    callbacks: list[str]
    calls: list[Call] = field(default_factory=list)
    called_back: list[str] = field(default_factory=list)


class Ledger:
    """The current root transaction of one session."""

    def __init__(self, recorder: CommitRecorder) -> None:
        self.recorder = recorder
        self.before: Rows | None = None
        self.groups: list[Group] = []
        self.connection: Connection | None = None
        self.stale: set[tuple[Key, str]] = set()
        self.callbacks: list[tuple[Any, str]] = []
        """With the transaction each belongs to; None when it waits for one to begin."""
        self.committed: set[Any] = set()
        self.seen: tuple[Rows, set[tuple[Key, str]], dict[Key, set[str]]] = ({}, set(), {})
        """What there was right after the COMMIT."""
        self.writers: dict[Key, int] = {}
        """The instance of each row that was written last."""
        self.is_left = False
        """Whether closing the session leaves what it did to the owner of its transaction."""

    def begin(self, session: Session, connection: Connection) -> None:
        """The root transaction has got its connection."""
        joins = connection.get_transaction() is _watched_names()["outer"]
        mode = session.join_transaction_mode
        self.is_left = joins and (
            mode == "rollback_only"
            or (mode == "conditional_savepoint" and not connection.in_nested_transaction())
        )

    def look(self, session: Session) -> None:
        """Before a flush: see what is there, and what the session knows wrongly."""
        if self.before is None:
            self.before = self.recorder.view(session)
        self.stale |= self._stale(session, apply(self.before, self.groups))[0]

    def add(self, session: Session, flush: Flush) -> None:
        """Note what a flush wrote."""
        self.connection = connection = session.connection()
        number = self.recorder.database.tick()
        writes = []
        for row in connection.exec_driver_sql(_NEW_IN_LOG).mappings().all():
            mark = STATEMENT_MARK.search(row["statement"])
            assert mark is not None, row
            old, new = (
                normal(row["tbl"], (json.loads(v) if isinstance(v, str) else v) or {})
                for v in (row["old_row"], row["new_row"])
            )
            statement = flush.statements[int(mark[1])]
            writes.append(Write(row["tbl"], row["operation"], old, new, statement))
        connection.execute(_ADD_TO_LOG, {"number": str(number)})
        born, dead = ({key for _, key in ones} for ones in (flush.born, flush.died))
        kinds = [(f.key, f.kind) for f in fates(by_the_unit_of_work(writes)[0], BASES)]
        created = {key for key, kind in kinds if kind == "created"}
        switched = {key for key in born & dead if key} - created
        lost = {
            key
            for n, (key, kind) in enumerate(kinds)
            if kind == "deleted" and (key in switched or (key, "created") in kinds[:n])
        }
        transaction = current_transaction(session)
        self.groups.append(Group(number, writes, switched - lost, lost, transaction))
        rows = {row.end for row in Fold(self.groups[-1:]).rows}
        self.writers |= {
            k: id(i) for i in session.identity_map.values() if (k := key_of(i)) in rows
        }
        assert self.before is not None
        self.stale |= self._stale(session, apply(self.before, self.groups))[0]

    def register(self, session: Session, label: str) -> None:
        """Note a callback."""
        self.callbacks.append((current_transaction(session), label))

    def commit(self, session: Session) -> None:
        """The current transaction is committed, or its savepoint released."""
        transaction = current_transaction(session)
        while transaction._state.name != "COMMITTED":  # a savepoint that was begun again
            transaction = transaction.parent
        self.committed.add(transaction)
        if not transaction.nested and self.groups:
            after = self.recorder.view(session)
            stale, loaded = self._stale(session, after)
            ids = {key_of(instance): id(instance) for instance in session.identity_map.values()}
            mine = {
                key: names for key, names in loaded.items() if ids[key] == self.writers.get(key)
            }
            self.seen = after, stale, mine

    def end(self, session: Session, transaction: Any) -> Ending | None:
        """The transaction or savepoint is over."""
        committed = transaction in self.committed
        self.committed.discard(transaction)
        inside = [group for group in self.groups if group.transaction is transaction]
        if transaction.nested and inside:
            how = "released" if committed else "rolled back"
            self.recorder.savepoints[f"{how} at depth {depth(transaction)}"] += 1
        if transaction.nested and committed:
            outer = transaction.parent
            while not outer.nested and outer.parent is not None:
                outer = outer.parent
            for group in inside:
                group.transaction = outer
            self.callbacks = [(outer if t is transaction else t, c) for t, c in self.callbacks]
            return None
        mine = [c for t, c in self.callbacks if t is transaction or not transaction.nested]
        self.callbacks = [(t, c) for t, c in self.callbacks if c not in mine]
        on = "commit" if committed else "rollback"
        if self.is_left and not committed and not transaction.nested:
            on = "left"
        lost = self.groups
        if transaction.nested and self.connection is not None and self.groups:
            found = self.connection.exec_driver_sql(_FLUSHES_IN_LOG)
            numbers = {int(number) for number in found.scalars()}
            lost = [group for group in self.groups if group.number not in numbers]
        kept = [group for group in self.groups if group not in lost]
        self.groups = kept
        before = apply(self.before or {}, kept)
        after, stale_after, loaded = self.seen if committed else (apply(before, lost), set(), {})
        callbacks = [c for c in mine if c.startswith(on)]
        return Ending(
            on,
            session,
            before,
            after,
            lost,
            set(self.stale),
            stale_after,
            loaded,
            callbacks,
        )

    @staticmethod
    def _stale(session: Session, rows: Rows) -> tuple[set[tuple[Key, str]], dict[Key, set[str]]]:
        stale, loaded = set(), {}
        for instance in session.identity_map.values():
            key = key_of(instance)
            if key is None:  # SQLAlchemy forgot it when a flush failed.
                continue
            row, mapper = instance_row(rows, key), inspect(instance).mapper
            values = believed(instance)
            loaded[key] = set(values)
            stale |= {(key, a) for a, v in values.items() if is_wrong(mapper, a, v, row)}
        return stale, loaded


_NEW_IN_LOG = (
    "SELECT * FROM witness_log WHERE seq > "
    "(SELECT coalesce(max(seq), 0) FROM witness_log WHERE tbl = 'flush') ORDER BY seq"
)
_ADD_TO_LOG = text("INSERT INTO witness_log (tbl, operation) VALUES ('flush', :number)")
_FLUSHES_IN_LOG = "SELECT operation FROM witness_log WHERE tbl = 'flush'"


def current_transaction(session: Session) -> Any:
    """The savepoint or root transaction that the session is in."""
    transaction = session._transaction
    while transaction is not None and not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def depth(transaction: Any) -> int:
    """How many savepoints deep it is."""
    found = 0
    while transaction is not None:
        found += transaction.nested
        transaction = transaction.parent
    return found


class CommitRecorder(Recorder):
    """The transactions of a program's session, and of those that its receivers are given."""

    database: CommitDatabase

    def __init__(self, database: CommitDatabase) -> None:
        super().__init__(database)
        self.ledgers: WeakKeyDictionary[Session, Ledger] = WeakKeyDictionary()
        self.endings: list[Ending] = []
        """In order. The first commit is the program's, the others are its receivers'."""
        self.delivered: list[Call | str] = []
        """Calls and callbacks after a commit, in order."""
        self.actions: list[str] = []
        """What the receiver that acts is going to do."""
        self.expected_failures: list[BaseException] = []
        self.failures: list[tuple[Key, BaseException]] = []
        self.changed = 0
        self.savepoints: Counter[str] = Counter()
        """Those that something was written in, by depth and end."""

    def ledger(self, session: Session) -> Ledger:
        """That of the session's current transaction."""
        if session not in self.ledgers:
            self.ledgers[session] = Ledger(self)
        return self.ledgers[session]

    def view(self, session: Session) -> Rows:
        """What others see; where the session joined a transaction, what that sees."""
        bind = session.bind
        if isinstance(bind, Connection) and not bind.closed and bind.in_transaction():
            return dump(bind)
        with self.database.engine.connect() as connection:
            return dump(connection)

    @contextmanager
    def recording(self, session: Session) -> Iterator[None]:
        """Record one flush of `session` and, once it has succeeded, what the witness says of it."""
        if session.new or session.deleted or session.dirty:
            self.ledger(session).look(session)
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
        if flush.statements or flush.born:
            self.ledger(session).add(session, flush)
        flush.born, flush.died, flush.mapper_events = [], [], []

    def ended(self, session: Session, transaction: Any) -> None:
        """A root transaction or savepoint is over."""
        ending = self.ledger(session).end(session, transaction)
        if not transaction.nested:
            del self.ledgers[session]
        if ending is not None:
            self.endings.append(ending)

    def told(self, label: str) -> Callable[[], None]:
        """A callback to register right away."""
        assert _watched is not None
        self.ledger(_watched.session).register(_watched.session, label)

        def callback() -> None:
            if label.startswith("commit"):
                self.delivered.append(label)
            else:
                self.endings[-1].called_back.append(label)

        return callback


class CommitSession(RecordedSession):
    """The session whose signals after the end of a transaction are compared with the witness."""


@event.listens_for(CommitSession, "after_begin")
def _on_begin(session: Session, transaction: Any, connection: Connection) -> None:
    if not transaction.nested:
        session.info["recorder"].ledger(session).begin(session, connection)


@event.listens_for(CommitSession, "after_rollback")
def _on_rollback(session: Session) -> None:
    root = session.get_transaction()
    if root is not None and root._state.name == "DEACTIVE":
        session.info["recorder"].ledger(session).is_left = False


@event.listens_for(CommitSession, "after_commit")
def _on_commit(session: Session) -> None:
    session.info["recorder"].ledger(session).commit(session)


@event.listens_for(CommitSession, "after_transaction_end")
def _on_transaction_end(session: Session, transaction: Any) -> None:
    if transaction.nested or transaction.parent is None:
        session.info["recorder"].ended(session, transaction)


def restart_whenever_one_ends(session: Session) -> None:
    """Keep the session in a savepoint, as test suites do it after SQLAlchemy's older manuals."""

    @event.listens_for(session, "after_transaction_end")
    def restart(session: Session, transaction: Any) -> None:
        if transaction.nested and not transaction.parent.nested:
            session.expire_all()
            session.begin_nested()


# -- receivers -------------------------------------------------------------------------------------

_watched: CommitProgram | None = None
"""The program that is running."""


def _watched_names() -> dict[str, Any]:
    assert _watched is not None
    return _watched.namespace


class Unwanted(Exception):
    """Raised by the receiver that acts."""


def _observer(name: str, on: str) -> Callable[..., None]:
    """A receiver that notes what it is given."""

    def receive(sender: type, instance: Any, session: Any, signal: Any, **rest: Any) -> None:
        assert _watched is not None
        recorder = _watched.recorder
        kind = "deleted" if signal is post_delete else "created" if rest["created"] else "updated"
        state = inspect(instance)
        problems = []
        own = set(attributes_of(state.mapper).values())
        executed = recorder.database.executed
        values = {a: _frozen(getattr(instance, a)) for a in own & state.dict.keys()}
        if recorder.database.executed != executed:
            problems.append("reading what was loaded took SQL")
        if sender is not type(instance):
            problems.append("sender is not the exact class")
        if on == "rollback":
            if session is not None:
                problems.append("session is not None")
        elif session is _watched.session or not isinstance(session, CommitSession):
            problems.append(f"session is {session!r}")
        elif rest["using"] is not session.get_bind():
            problems.append(f"using is {rest['using']!r}")
        if on == "rollback" or kind == "deleted":
            if not state.detached:
                problems.append("the instance is not detached")
        elif not state.persistent or object_session(instance) is not session:
            problems.append("the instance is not in the session")
        key = key_of(instance)
        assert key is not None
        lazy = {}
        if name == "first" and on == "commit" and kind != "deleted" and executed % 2:
            try:
                lazy = {a: _frozen(getattr(instance, a)) for a in own - values.keys()}
            except ObjectDeletedError:
                lazy = {}
        changes = {a: (c.old, _frozen(c.new)) for a, c in rest.get("changes", {}).items()}
        fields = rest.get("update_fields")
        call = Call(name, on, kind, key, sender, values, lazy, changes, fields, problems)
        if on == "commit":
            recorder.delivered.append(call)
        else:
            recorder.endings[-1].calls.append(call)

    return receive


def _frozen(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, dict) else value


def _act(sender: type, instance: Any, session: Session, signal: Any, **rest: Any) -> None:
    """The receiver that changes its instance, or raises."""
    assert _watched is not None
    recorder = _watched.recorder
    marks = {f"by receiver {n}" for n in range(recorder.changed + 1)}
    marks |= {1000 + n for n in range(recorder.changed + 1)}
    if not recorder.actions:
        return
    is_own = any(
        isinstance(change.new, str | int) and change.new in marks
        for change in rest.get("changes", {}).values()
    )
    if is_own and not rest.get("created"):
        return
    action = recorder.actions.pop(0)
    columns = plain_columns(sender)
    if signal is post_save and columns and ("change" in action or "flush" in action):
        attribute, column = columns[0]
        if not isinstance(column.type, JSON):
            recorder.changed += 1
            text = column.type.python_type is str
            n = recorder.changed
            setattr(instance, attribute, f"by receiver {n}" if text else 1000 + n)
            if "flush" in action:
                session.flush()
    if "raise" in action:
        error = Unwanted(action)
        recorder.expected_failures.append(error)
        raise error


def _act_on_rollback(sender: type, **rest: Any) -> None:
    assert _watched is not None
    recorder = _watched.recorder
    if recorder.actions and recorder.actions[0] == "raise":
        error = Unwanted(recorder.actions.pop(0))
        recorder.expected_failures.append(error)
        raise error


def _on_failure(sender: type, instance: Any, exception: BaseException, **rest: Any) -> None:
    assert _watched is not None
    _watched.recorder.failures.append(
        (key_of(instance) if instance is not None else None, exception)
    )


class _Log(logging.Handler):
    """The records that the library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_log = _Log()


@contextmanager
def signals_after_the_end() -> Iterator[None]:
    """Install the library on `CommitSession`, with the receivers; and keep its log to ourselves."""
    installation = sqla_signals.install(CommitSession)
    receivers: list[tuple[Any, Any, Any]] = []
    for signal in (post_save, post_delete):
        for on, act in (("commit", _act), ("rollback", _act_on_rollback)):
            for fn in (_observer("first", on), act, _observer("last", on)):
                signal.connect(fn, sender=None, weak=False, on=on)
                receivers.append((signal, fn, None))
    receiver_failed.connect(_on_failure, weak=False)
    logger = logging.getLogger("sqla_signals")
    logger.addHandler(_log)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(_log)
        logger.propagate = propagate
        receiver_failed.disconnect(_on_failure)
        for signal, fn, sender in receivers:
            signal.disconnect(fn, sender=sender)
        installation.remove()


# -- the comparison --------------------------------------------------------------------------------


class CommitTally(Tally):
    """What was done and found, over many programs."""

    def __init__(self, tolerated: re.Pattern[str] | None = None) -> None:
        super().__init__(tolerated)
        self.endings: Counter[str] = Counter()
        self.savepoints: Counter[str] = Counter()
        """Those that something was written in."""
        self.kinds: Counter[str] = Counter()
        """Commits of the program's session that something was written in, by kind of session."""
        self.compared: Counter[str] = Counter()
        """Rows told, and rows not told, by kind."""
        self.lenient: Counter[str] = Counter()
        """Rows that could not be compared in full, by reason."""


def mismatches(ending: Ending, calls: list[Call], tally: CommitTally) -> Iterator[str]:
    """Each way in which the calls differ from the net effect of the transaction."""
    want: dict[tuple[str, Key], list[_Expected]] = defaultdict(list)
    rows = Fold(ending.groups).rows
    for row in rows:
        expected = _Expected(row, ending)
        for kind in expected.kinds:
            want[kind, expected.key_of(kind)].append(expected)
        tally.compared[f"{ending.on} {row.kind if expected.kinds else 'none'}"] += 1
    if ending.groups and ending.after != (logged := apply(ending.before, ending.groups)):
        missed = {
            key
            for key in ending.after.keys() | logged.keys()
            if ending.after.get(key) != logged.get(key)
        }
        yield f"the witness has missed something: {missed}"
    written = {key for row in rows for key in (row.start, row.end)}
    untouched = instance_keys(ending.after) - written
    tally.compared[f"{ending.on} untouched"] += len(untouched)
    for key in untouched:
        if instance_row(ending.before, key) != instance_row(ending.after, key):
            yield f"the witness has missed a write: {key}"

    lost = {key for group in ending.groups for key in group.lost}
    tally.lenient["SQLAlchemy has lost the row"] += len(lost)
    got: dict[tuple[str, Key], list[Call]] = defaultdict(list)
    for call in calls:
        yield from (f"{problem}: {call}" for problem in call.problems)
        got[call.kind, call.key].append(call)
    for at in want.keys() | got.keys():
        if at[1] in lost:
            continue
        expected_rows, told = want.get(at, []), got.get(at, [])
        required = [e for e in expected_rows if e.must_be_told]
        if len(told) < len(required):
            yield f"not told on={ending.on}: {at[0]} {at[1]} ({len(told)} of {len(required)})"
        elif len(told) > len(expected_rows):
            count = f"{len(told)} of {len(expected_rows)}"
            yield f"told on={ending.on}, but not so: {at[0]} {at[1]} ({count})"
        elif len(told) == len(expected_rows) == 1:
            expected_rows[0].call = told[0]
            yield from expected_rows[0].mismatches(told[0], tally)
    order = [
        (e.row.first, call)
        for call in calls
        if len(es := want.get((call.kind, call.key), [])) == 1
        and (e := es[0]).must_be_told
        and len(e.row.groups) < 3
        and call.key not in lost
    ]
    for (first, call), (second, later) in itertools.pairwise(order):
        if first > second:
            yield f"not in the order of first occurrence: {call}, {later}"


def instance_keys(rows: Rows) -> set[Key]:
    """The keys of all instances."""
    return {(table, key) for table, key in rows if table in MAPPERS}


class _Expected:
    """What is to be told of one row."""

    def __init__(self, row: Row, ending: Ending) -> None:
        self.row, self.ending = row, ending
        self.call: Call | None = None
        self.old = instance_row(ending.before, row.start)
        self.new = instance_row(ending.after, row.end)
        key, values = row.end or row.start, self.new or self.old
        self.must_be_told = not row.lost
        self.kinds: tuple[str, ...] = ()
        if row.lost:
            # The session does not know that the row is gone.
            if row.start is None:
                self.kinds = ("created",)
            elif row.cells_set:
                self.kinds = ("updated", "deleted")
            return
        if row.kind is None:
            return
        assert key is not None
        self.kinds = (row.kind,)
        self.mapper = mapper_of(key, values)
        attributes = attributes_of(self.mapper)
        self.cascaded = {attributes[c] for c in row.cells_cascaded if c in attributes}
        keys = {row.start, row.end}
        self.stale = {attribute for key, attribute in ending.stale if key in keys}
        self.stale_after = {attribute for key, attribute in ending.stale_after if key in keys}
        self.computed = {attributes[c] for c in row.cells_computed if c in attributes}
        self.written = {attributes[c] for c in row.cells_set if c in attributes}
        if row.kind == "updated":
            if not self.written:  # by the database itself
                self.kinds, self.must_be_told = (), False
                return
            differing = {a for c, a in attributes.items() if self.old.get(c) != self.new.get(c)}
            self.must = (differing & self.written) - self.cascaded - self.stale
            self.must_be_told = bool(self.must)

    def key_of(self, kind: str) -> Key:
        """By what the receiver is to know the row."""
        row = self.row
        if row.lost:
            return row.last_key
        key = row.start if kind == "deleted" or self.ending.on == "rollback" else row.end
        return key or row.last_key

    def mismatches(self, call: Call, tally: CommitTally) -> Iterator[str]:
        """How the call differs."""
        if self.row.lost:
            tally.lenient["deleted by the database"] += 1
            return
        if call.sender is not self.mapper.class_:
            if self._kind() in self.stale:  # its key was taken over in work that was closed
                tally.lenient["the session knew another class"] += 1
            else:
                yield f"the row is a {self.mapper.class_.__name__}: {call}"
            return
        yield from self._values(call, tally)
        if self.row.kind == "created":
            yield from self._created(call)
        elif self.row.kind == "updated":
            yield from self._updated(call, tally)

    def _kind(self) -> str | None:
        """The attribute that tells the class of the row, where there is one."""
        column = self.mapper.polymorphic_on
        return None if column is None else self.mapper.get_property_by_column(column).key

    def _values(self, call: Call, tally: CommitTally) -> Iterator[str]:
        for attribute, value in {**call.values, **call.lazy}.items():
            cells = cells_of(self.mapper)[attribute]
            if self.ending.on == "rollback":
                known = [v for c in cells for v in (self.old.get(c), self.new.get(c))]
                known += [v for c in cells for v in self.row.seen.get(c, ())]
                wrong, doubtful = value not in known, self.stale
            elif call.kind == "deleted":
                wrong = is_wrong(self.mapper, attribute, value, self.old)
                doubtful = self.stale
            else:
                wrong = is_wrong(self.mapper, attribute, value, self.new)
                doubtful = self.stale_after if attribute in call.values else set()
                if call.key not in self.ending.loaded_after:  # expunged with what it knew
                    doubtful = doubtful | self.stale
            if wrong and attribute in doubtful | self.cascaded:
                tally.lenient["the session knew another value"] += 1
            elif wrong:
                row = self.old if call.kind == "deleted" else self.new
                yield f"instance.{attribute} is {value!r}, not {row.get(cells[0])!r}: {call}"
        if self.ending.on == "commit" and call.kind != "deleted":
            missing = self.ending.loaded_after.get(call.key, set()) - call.values.keys()
            if missing:
                yield f"not loaded any more: {missing}: {call}"

    def _created(self, call: Call) -> Iterator[str]:
        if call.update_fields is not None:
            yield f"update_fields is {call.update_fields!r} though the row is new: {call}"
        for attribute, cells in cells_of(self.mapper).items():
            value = self.new.get(cells[0])
            if attribute not in call.changes:
                if value is not None and not any(_made_by_flush(self.mapper, c) for c in cells):
                    yield f"{attribute} is {value!r}, but not in changes: {call}"
                continue
            old, new = call.changes[attribute]
            if old is not UNSET:
                yield f"{attribute}: old is {old!r} though the row is new: {call}"
            if new is not UNSET and attribute not in self.cascaded | self.stale:
                known = [self.new.get(c) for c in cells]
                if self.ending.on == "rollback":
                    known += [v for c in cells for v in self.row.seen.get(c, ())]
                if new not in known:
                    yield f"{attribute}: new is {new!r}, written was {value!r}: {call}"

    def _updated(self, call: Call, tally: CommitTally) -> Iterator[str]:
        doubtful = self.cascaded | self.stale
        for attribute, (old, new) in call.changes.items():
            wrong_old = old is not UNSET and is_wrong(self.mapper, attribute, old, self.old)
            if wrong_old and attribute not in doubtful:
                was = self.old.get(cells_of(self.mapper)[attribute][0])
                yield f"{attribute}: old is {old!r}, was {was!r}: {call}"
            known = new is not UNSET and attribute not in doubtful
            if known and is_wrong(self.mapper, attribute, new, self.new):
                is_now = self.new.get(cells_of(self.mapper)[attribute][0])
                yield f"{attribute}: new is {new!r}, written was {is_now!r}: {call}"
            known = old is not UNSET and new is not UNSET
            if known and old == new and attribute not in self.computed | doubtful:
                yield f"{attribute}: {(old, new)!r} is no change: {call}"
        fields = call.update_fields
        if not isinstance(fields, frozenset) or not self.must <= fields <= self.written:
            yield f"update_fields {fields!r}, changed {self.must}, written {self.written}: {call}"
        elif not call.changes.keys() <= fields:
            yield f"update_fields {fields!r} lacks some of {set(call.changes)}: {call}"
        elif not self.must_be_told:
            if self.written & doubtful:
                tally.lenient["equal, but the session knew another value"] += 1
            elif any(UNSET in change for change in call.changes.values()):
                tally.lenient["equal, but a value was not known"] += 1
            elif fields - call.changes.keys():
                tally.lenient["equal, but written along"] += 1
            elif set(call.changes) & self.computed:
                tally.lenient["equal, but computed"] += 1
            else:
                yield f"nothing changed: {call} {call.changes}"


def _made_by_flush(mapper: Mapper[Any], cell: Cell) -> bool:
    column: Column[Any] = TABLES[cell[0]].c[cell[1]]
    return (
        column is mapper.version_id_col
        or column is mapper.polymorphic_on
        or column.primary_key
        or column.default is not None
        or column.server_default is not None
        or column.computed is not None
    )


# -- programs --------------------------------------------------------------------------------------


class CommitProgram(Program):
    """A program whose transactions are compared when they end."""

    database: CommitDatabase
    recorder: CommitRecorder
    tally: CommitTally

    def __init__(self, database: CommitDatabase, tally: CommitTally) -> None:
        global _watched
        super().__init__(database, CommitSession, tally)
        self.recorder = recorder = CommitRecorder(database)
        options: dict[str, Any] = {}
        self.sessions: list[Session] = []

        def new_session(bind: Connection | None = None, **more: Any) -> Session:
            session = CommitSession(
                bind or database.engine, info={"recorder": recorder}, **options, **more
            )
            self.sessions.append(session)
            return session

        def act(*actions: str) -> None:
            recorder.actions = list(actions)

        self.namespace |= {
            "options": options,
            "act": act,
            "new_session": new_session,
            "session": new_session(),
            "engine": database.engine,
            "text": text,
            "make_transient": make_transient,
            "on_commit": on_commit,
            "on_rollback": on_rollback,
            "told": recorder.told,
            "restart_whenever_one_ends": restart_whenever_one_ends,
            "failed": (ValueError, ValueError("of the program"), None),
            "succeeded": (None, None, None),
            "block": None,
            "connection": None,
            "outer": None,
            "point": None,
        }
        self._own = set(self.namespace)
        self.is_over = False
        """Whether SQLAlchemy has failed to roll back: its session is of no use any more."""
        _watched = self

    def run(self, line: str) -> BaseException | None:
        """Run one line and compare what was told; the result is the legal error it ended with."""
        if self.is_over:
            return None
        recorder = self.recorder
        _log.records.clear()
        recorder.endings, recorder.delivered = [], []
        recorder.failures, recorder.expected_failures = [], []
        finished: list[Flush] = []
        recorder.finished = finished
        error = super().run(line)
        in_flush = any(flush.error is not None for flush in finished)
        if error is not None:
            self.tally.errors[type(error).__name__] += 1
            self.is_over = _cannot_roll_back(error)
            if self.is_over:
                return error
            if _is_of_the_witness(error) or not _is_legal(error, in_flush=in_flush):
                self._mismatch(_traceback(error), [f"no program should see {type(error).__name__}"])
        found = [one for one in self._mismatches() if not self.tally.tolerates(one)]
        if found:
            happened = [f"  {one}" for ending in recorder.endings for one in _story(ending)]
            happened += [f"  {one}" for one in recorder.delivered]
            self._mismatch("\n".join(happened), found)
        return error

    def _mismatches(self) -> Iterator[str]:
        recorder = self.recorder
        for ending in recorder.endings:
            self.tally.endings[ending.on] += 1
            if ending.on == "commit" and ending.groups and ending.session is self.session:
                self.tally.kinds[_kind(ending.session)] += 1
        self.tally.savepoints += recorder.savepoints
        recorder.savepoints.clear()
        commits = [one for one in recorder.endings if one.on == "commit"]
        of_receivers = [one for one in commits if one.session is not self.session and one.groups]
        mine = [one for one in commits if one.session is self.session]
        for ending in recorder.endings:
            if ending.on == "left" and (ending.calls or ending.called_back):
                told = [*map(str, ending.calls), *ending.called_back]
                yield f"told of what was left to the owner of the transaction: {told}"
            if ending.on == "rollback":
                yield from self._compare_calls(ending, list(ending.calls))
                if ending.called_back != ending.callbacks:
                    yield f"on_rollback called {ending.called_back}, not {ending.callbacks}"
        left = list(recorder.delivered)
        for ending in reversed(of_receivers):
            yield from self._compare_calls(ending, left[-2:])
            del left[-2:]
        callbacks = mine[0].callbacks if mine else []
        called_back = left[len(left) - len(callbacks) :]
        del left[len(left) - len(callbacks) :]
        if called_back != callbacks:
            yield f"on_commit called {called_back}, not {callbacks}"
        if mine:
            yield from self._compare_calls(mine[0], left)
        elif left:
            yield f"told without a commit: {left}"
        yield from self._failures(commits)

    def _compare_calls(self, ending: Ending, calls: list[Any]) -> Iterator[str]:
        first, last = calls[::2], calls[1::2]
        if any(isinstance(call, str) for call in calls):
            yield f"callbacks among the calls: {calls}"
            return
        pairs = zip(first, last, strict=False)
        if len(first) != len(last) or any(not _alike(one, other) for one, other in pairs):
            yield f"two receivers were told different things: {[*map(str, calls)]}"
        yield from mismatches(ending, first, self.tally)
        yield from (f"{problem}: {call}" for call in last for problem in call.problems)

    def _failures(self, commits: list[Ending]) -> Iterator[str]:
        recorder = self.recorder
        for key, error in recorder.failures:
            stale = {k for ending in commits for k, _ in ending.stale_after}
            stale |= {k for ending in commits for group in ending.groups for k in group.lost}
            if error in recorder.expected_failures:
                recorder.expected_failures.remove(error)
            elif key in stale or isinstance(error, ObjectDeletedError):
                self.tally.lenient["the receiver was given a stale row"] += 1
            else:
                yield f"a receiver has failed for {key}: {_traceback(error)}"
        yield from (f"not said to have failed: {e!r}" for e in recorder.expected_failures)
        if len(_log.records) != len(recorder.failures):
            yield f"logged: {[record.getMessage() for record in _log.records]}"

    def end(self) -> None:
        """Close everything and empty the database."""
        if self.namespace:
            connections = [self.namespace["connection"], *(one.bind for one in self.sessions)]
            for session in self.sessions:
                session.close()
            for connection in connections:
                if isinstance(connection, Connection):
                    connection.close()
            self.sessions = []
        super().end()


def _kind(session: Session) -> str:
    if isinstance(session.bind, Connection):
        return session.join_transaction_mode
    return "two-phase" if session.twophase else "plain"


def _is_of_the_witness(error: BaseException) -> bool:
    places = {(f.filename, f.name) for f in traceback.extract_tb(error.__traceback__)}
    return not places.isdisjoint((__file__, name) for name in ("add", "look", "end", "commit"))


def _cannot_roll_back(error: BaseException) -> bool:
    """Whether a flush failed, and then SQLAlchemy in setting back the instances.

    It does, with signals or without, when an instance is deleted whose row is gone already.
    """
    places = {f.name for f in traceback.extract_tb(error.__traceback__)}
    return "_restore_snapshot" in places and not isinstance(error, exc.DBAPIError)


def _alike(one: Call, other: Call) -> bool:
    return (one.receiver, other.receiver) == ("first", "last") and (
        (one.kind, one.key, one.values, one.changes, one.update_fields)
        == (other.kind, other.key, other.values, other.changes, other.update_fields)
    )


def _story(ending: Ending) -> Iterator[str]:
    yield f"{ending.on} of {'a savepoint' if ending.on == 'rollback' else 'the transaction'}"
    for group in ending.groups:
        for write in group.writes:
            yield f"  {write.statement.at} {write.operation} {write.table} {write.old} {write.new}"
        if group.switched:
            yield f"  another instance took over {group.switched}"
    for call in ending.calls:
        yield f"  {call}"


class CommitPrograms(SessionPrograms):
    """Random programs of transactions, savepoints and callbacks. Subclasses set the database."""

    database: CommitDatabase
    tally: CommitTally

    @initialize(
        clusters=st.lists(st.sampled_from(range(len(CLUSTERS))), min_size=1, max_size=2),
        population=st.lists(st.tuples(picks, picks, picks), max_size=6),
        autoflush=st.booleans(),
        expire_on_commit=st.booleans(),
        kind=st.sampled_from(["plain", "with", "two-phase", *JOINING]),
        outer_savepoint=st.booleans(),
    )
    def begin(
        self,
        clusters: list[int],
        population: list[tuple[int, int, int]],
        autoflush: bool,
        expire_on_commit: bool,
        kind: str,
        outer_savepoint: bool,
    ) -> None:
        self.classes = [c for n in dict.fromkeys(clusters) for c in CLUSTERS[n]]
        self.control = None  # There is no twin.
        self.kind = kind
        self.outer_savepoint = outer_savepoint
        self.labels = 0
        self.start(self.tally)
        self.tally.programs += 1
        options = {"autoflush": autoflush, "expire_on_commit": expire_on_commit}
        if kind == "two-phase" and self.database.two_phase:
            options["twophase"] = True
        self.run(f"options |= {options}; session = new_session()")
        for cls, value, parent in population:
            self.new(cls, value, parent)
        if population:
            self.run("session.commit()")
        if kind in JOINING:
            self.join()

    def start(self, tally: Tally) -> None:
        """Begin a program."""
        if not isinstance(tally, CommitTally):
            tally = CommitTally(tally.tolerated)
        self.program: CommitProgram = CommitProgram(self.database, tally)

    # Savepoints.

    # What a program does may depend on the order of a set: no precondition may ask for its state.

    @rule(callbacks=picks)
    def begin_savepoint(self, callbacks: int) -> None:
        enter = ".__enter__()" if self.kind == "with" else ""
        if len(self.savepoints) < 3:
            if callbacks % 4 == 3:
                self.call_back(commit=callbacks > 5)
            self.run(f"savepoints.append(session.begin_nested(){enter})")
            if callbacks % 3 == 2:
                self.call_back(commit=callbacks % 2 == 0)

    @rule(outermost=st.booleans())
    def release_savepoint(self, outermost: bool) -> None:
        if not self.savepoints:
            return
        if self.kind == "with":
            self.run("savepoints.pop().__exit__(*succeeded)")
        elif outermost:
            self.run("savepoints[0].commit(); savepoints.clear()")
        else:
            self.run("savepoints.pop().commit()")

    @rule(outermost=st.booleans())
    def roll_back_savepoint(self, outermost: bool) -> None:
        if not self.savepoints:
            return
        if outermost and self.kind != "with":
            self.run("savepoints[0].rollback(); savepoints.clear()")
        else:
            self.undo_savepoint()

    @property
    def savepoints(self) -> list[Any]:
        """Those that the program is in."""
        savepoints: list[Any] = self.program.namespace["savepoints"]
        return savepoints

    def undo_savepoint(self) -> None:
        how = ".__exit__(*failed)" if self.kind == "with" else ".rollback()"
        self.run_only(f"savepoints.pop(){how}")

    @rule(steps=st.lists(st.tuples(st.sampled_from(NESTING), picks, picks, picks), max_size=12))
    def nest(self, steps: list[tuple[str, int, int, int]]) -> None:
        for what, first, second, third in steps:
            if what == "begin":
                self.begin_savepoint(first)
            elif what == "new":
                self.new(first, second, third)
                self.run("session.flush()")
            elif what == "update":
                self.update(first, second, 2 * third + 1)
            elif what == "delete":
                self.delete_now(first)
            elif what == "expunge":
                self.expunge(first)
            elif what == "refresh":
                self.refresh(first)
            elif what == "violate":
                self.violate(first, second, duplicate=third % 2 == 0)
            elif what == "release":
                self.release_savepoint(outermost=first == 11)
            else:
                self.roll_back_savepoint(outermost=first == 11)

    @rule(instance=picks, column=picks, duplicate=st.booleans())
    def violate(self, instance: int, column: int, duplicate: bool) -> None:
        name = self.variable(instance, Base, "pending", "persistent")
        if name is None:
            return
        mapper = inspect(self.program.variables[name]).mapper
        columns = [
            (attr.key, attr.columns[0])
            for attr in mapper.column_attrs
            if getattr(attr.columns[0], "foreign_keys", None) and not attr.columns[0].primary_key
        ]
        if columns and not duplicate:
            attribute, sql_column = pick(columns, column)
            self.run(f"{name}.{attribute} = {sql_column.type.python_type('999')!r}")
            self.run("session.flush()")
        else:
            table = mapper.base_mapper.local_table
            keys = ", ".join(c.name for c in table.primary_key)
            statement = f"INSERT INTO {table} ({keys}) SELECT {keys} FROM {table}"
            self.run(f"session.execute(text({statement!r}))")

    # Work that makes something to tell of.

    @rule(instance=picks, column=picks, value=picks)
    def update(self, instance: int, column: int, value: int) -> None:
        self.set_column(instance, column, value)
        if value % 2:
            self.run("session.flush()")

    @rule(instance=picks)
    def delete_now(self, instance: int) -> None:
        self.delete(instance)
        self.run("session.flush()")

    @rule(changes=st.lists(st.tuples(picks, picks, picks), min_size=2, max_size=4))
    def update_some(self, changes: list[tuple[int, int, int]]) -> None:
        for instance, column, value in changes:
            self.set_column(instance, column, value)
        self.run("session.flush()")

    @rule(instance=picks)
    def copy(self, instance: int) -> None:
        name = self.variable(instance, Base, "persistent")
        mapper = name and inspect(self.program.variables[name]).mapper
        if name and mapper and "id" in mapper.column_attrs and not mapper.relationships:
            self.run(f"make_transient({name}); {name}.id = None; session.add({name})")

    @rule(cls=picks, row=picks, column=picks, value=picks)
    def load_and_update(self, cls: int, row: int, column: int, value: int) -> None:
        self.load(cls, row)
        self.update(len(self.program.variables) - 1, column, value)

    # The end of a transaction.

    @precondition(lambda self: self.kind == "with")
    @rule()
    def begin_block(self) -> None:
        if self.program.namespace["block"] is None and not self.program.session.in_transaction():
            self.run("block = session.begin().__enter__()")

    @rule()
    def commit(self) -> None:
        self.end(0)

    @rule()
    def expunge_all(self) -> None:
        self.run("session.expunge_all()")

    @rule(how=picks)
    def end(self, how: int) -> None:
        self.leave(how)
        names = self.program.namespace
        if names["block"] is not None:
            if how == 5:
                self.run("session.commit()")
            elif how == 8:
                self.run("session.rollback()")
            elif how == 11:
                self.run("session.close()")
            self.run(f"block.__exit__(*{'succeeded' if how < 7 else 'failed'})")
            self.run("block = None")
        elif how < 6:
            if self.program.session.twophase and how % 2:
                self.run("session.prepare()")
            self.run("savepoints.clear(); session.commit()")
        elif how < 8:
            if self.program.session.twophase and how % 2:
                self.run("session.prepare()")
            self.run("savepoints.clear(); session.rollback()")
        elif how < 10 or self.kind in JOINING:
            self.run("savepoints.clear(); session.close()")
        else:
            self.run("savepoints.clear(); session.close(); session = new_session()")
        if how % 2 == 0:
            self.add_again()

    def leave(self, how: int) -> None:
        """Leave the `with` blocks of savepoints."""
        if self.kind == "with":
            while self.savepoints:
                self.run(f"savepoints.pop().__exit__(*{'failed' if how == 6 else 'succeeded'})")

    def roll_back(self) -> None:
        if self.kind == "with":
            self.run_only("while savepoints: savepoints.pop().__exit__(*failed)")
            if self.program.namespace["block"] is not None:
                self.run_only("block.__exit__(*failed)")
                self.run_only("block = None")
        self.run_only("savepoints.clear(); session.rollback()")

    # Transactions that the session joins.

    def join(self) -> None:
        self.run("session.close(); connection = engine.connect(); outer = connection.begin()")
        if self.outer_savepoint:
            self.run("point = connection.begin_nested()")
        mode = self.kind if self.kind in MODES else "conditional_savepoint"
        self.run(f"session = new_session(connection, join_transaction_mode={mode!r})")
        if self.kind == "restarting":
            self.run("session.begin_nested(); restart_whenever_one_ends(session)")
        self.add_again()

    def add_again(self) -> None:
        """Give the instances of a session that was closed to the current one."""
        for name, instance in self.program.variables.items():
            if inspect(instance).detached and not inspect(instance).was_deleted:
                self.run(f"session.add({name})")

    @precondition(lambda self: self.kind in JOINING)
    @rule(commit=st.booleans(), point=st.booleans(), goes_on=st.booleans())
    def end_outside(self, commit: bool, point: bool, goes_on: bool) -> None:
        if self.program.session.in_transaction():
            self.run("savepoints.clear(); session.close()")
        names = self.program.namespace
        how = "commit()" if commit else "rollback()"
        if names["point"] is not None and names["point"].is_active and point:
            self.run(f"point.{how}")
            if goes_on:
                return
        if names["outer"].is_active and self.run_only(f"outer.{how}") is not None:
            # After a COMMIT that failed, SQLAlchemy takes the transaction on SQLite for ended.
            self.run("connection.invalidate()")
        if goes_on and not names["connection"].in_transaction():
            self.run("outer = connection.begin()")
        else:
            self.run("session.close(); connection.close()")
            self.join()

    # Receivers and callbacks.

    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3))
    def let_a_receiver_act(self, actions: list[str]) -> None:
        self.run(f"act({', '.join(map(repr, actions))})")

    @rule(commit=st.booleans())
    def call_back(self, commit: bool) -> None:
        self.labels += 1
        on = "commit" if commit else "rollback"
        self.run(f"on_{on}(session, told('{on} {self.labels}'))")

    # How rules run.

    def run(self, line: str) -> None:
        """Run the line; roll back where that is all that is left to do."""
        error = self.run_only(line)
        if isinstance(error, exc.InvalidRequestError) and "context manager" in str(error):
            self.roll_back()
        elif self.program.must_roll_back:
            if self.savepoints:
                self.undo_savepoint()
            if self.program.must_roll_back:
                self.roll_back()

    def run_only(self, line: str) -> BaseException | None:
        """Run the line, whatever comes of it."""
        self.tally.steps += 1
        try:
            return self.program.run(line)
        except Mismatch as mismatch:
            raise self.minimal(mismatch) from None

"""The witness: triggers that log every row written, and what their log says about one flush.

The triggers know rows, not instances. `fates` turns the log of one flush into the fate of each
mapped row: the tables of one joined hierarchy are one row, several writes to it are one fate, and a
key that changes is followed. Rows that the database itself cascaded to are set apart: a trigger
fired for a table other than the one its statement names. No cascade of this schema stays within one
table, so that test is exact.

Nothing here knows about signals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Connection, MetaData, Table, text
from sqlalchemy.orm import Mapper, registry

STATEMENT_MARK = re.compile(r"/\*w(\d+)\*/")
_TARGET = re.compile(
    r"\s*(INSERT)\s+INTO\s+\"?(\w+)|\s*(UPDATE)\s+\"?(\w+)|\s*(DELETE)\s+FROM\s+\"?(\w+)", re.I
)
_SET = re.compile(r"\bSET\s+(.*?)(?:\s+WHERE\s|\s+RETURNING\s|$)", re.I | re.S)
_SET_VALUE = re.compile(r"(?:^|,\s*)\"?(\w+)\"?=(?:\?|%\()")
_SET_COLUMN = re.compile(r"(?:^|,\s*)\"?(\w+)\"?=(?!=)")

Values = Mapping[str, Any]
Key = tuple[str, tuple[Any, ...]]
"""The base table of a hierarchy, and the primary key in it."""


@dataclass(frozen=True)
class Statement:
    """One INSERT, UPDATE or DELETE as the engine sent it; `at` is its place among happenings."""

    at: int
    operation: str
    table: str
    sql: str

    @classmethod
    def parse(cls, at: int, sql: str) -> Statement | None:
        """The statement, or None when it writes no rows."""
        match = _TARGET.match(sql)
        if match is None:
            return None
        operation, table = (group for group in match.groups() if group is not None)
        return cls(at, operation.upper(), table, sql)

    @property
    def columns_set(self) -> frozenset[str]:
        """The columns that an UPDATE assigns."""
        return self._set(_SET_COLUMN)

    @property
    def columns_computed(self) -> frozenset[str]:
        """Those that it assigns an expression of SQL, rather than a value."""
        return self.columns_set - self._set(_SET_VALUE)

    def _set(self, pattern: re.Pattern[str]) -> frozenset[str]:
        match = _SET.search(self.sql)
        return frozenset(pattern.findall(match[1])) if match else frozenset()


@dataclass(frozen=True)
class Write:
    """One row written, as a trigger saw it."""

    table: str
    operation: str
    old: Values
    new: Values
    statement: Statement


@dataclass
class Fate:
    """What one flush did to one mapped row."""

    key: Key
    """After the flush."""
    created: bool = False
    deleted: bool = False
    old: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By table: the values before the first write to it."""
    new: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By table: the values after the last write to it."""
    columns_set: set[tuple[str, str]] = field(default_factory=set)
    """(table, column) of every column that an UPDATE of the row assigned."""
    columns_computed: set[tuple[str, str]] = field(default_factory=set)
    """Those of them that were assigned an expression of SQL."""
    first_at: int = 0
    """The place of the first statement that wrote the row."""

    @property
    def kind(self) -> str:
        """`created` wins over its own later UPDATE, `deleted` over an earlier one."""
        return "created" if self.created else "deleted" if self.deleted else "updated"


def base_tables(registry: registry) -> dict[str, Table]:
    """The base table of each mapped table's hierarchy, by the name of the table."""
    found: dict[str, Table] = {}
    for mapper in registry.mappers:
        base = mapper.base_mapper.local_table
        assert isinstance(base, Table)
        for table in mapper.tables:
            assert isinstance(table, Table)
            found[table.name] = base
    return found


def fates(writes: Iterable[Write], bases: Mapping[str, Table]) -> list[Fate]:
    """The fate of each mapped row that `writes` tell of, in the order of the first write."""
    fates: list[Fate] = []
    current: dict[Key, Fate] = {}
    for write in writes:
        base = bases.get(write.table)
        if base is None:  # The table of a many-to-many: no instance stands for its rows.
            continue

        def key(values: Values, base: Table = base) -> Key:
            return base.name, tuple(values[column.name] for column in base.primary_key)

        before, after = key(write.old or write.new), key(write.new or write.old)
        fate = current.get(before)
        # The unit of work never inserts and deletes one instance: then the row is another's.
        another = fate is not None and (
            (write.operation == "INSERT" and fate.deleted)
            or (write.operation == "DELETE" and fate.created)
        )
        if fate is None or another:
            fate = Fate(before, first_at=write.statement.at)
            fates.append(fate)
        elif current.get(before) is fate:
            del current[before]
        fate.key = after
        current[after] = fate
        if write.operation == "INSERT":
            fate.created = fate.created or write.table == base.name
        elif write.operation == "DELETE":
            fate.deleted = fate.deleted or write.table == base.name
        else:
            fate.columns_set |= {(write.table, c) for c in write.statement.columns_set}
            fate.columns_computed |= {(write.table, c) for c in write.statement.columns_computed}
        fate.old.setdefault(write.table, dict(write.old))
        fate.new[write.table] = dict(write.new)
    return fates


def by_the_unit_of_work(writes: Iterable[Write]) -> tuple[list[Write], list[Write]]:
    """`writes` divided into those the statements name and those the database cascaded to."""
    named: list[Write] = []
    cascaded: list[Write] = []
    for write in writes:
        (named if write.table == write.statement.table else cascaded).append(write)
    return named, cascaded


def attributes_of(mapper: Mapper[Any]) -> dict[tuple[str, str], str]:
    """The attribute of `mapper` for each (table, column)."""
    return {
        (column.table.name, column.name): attribute.key
        for attribute in mapper.column_attrs
        for column in attribute.columns
        if isinstance(column, Column) and isinstance(column.table, Table)
    }


_SQLITE_LOG = """
CREATE TABLE witness_log (
    seq INTEGER PRIMARY KEY, tbl TEXT, operation TEXT, old_row TEXT, new_row TEXT, statement TEXT
)
"""
_POSTGRESQL_LOG = """
CREATE TABLE witness_log (
    seq BIGSERIAL PRIMARY KEY, tbl TEXT, operation TEXT,
    old_row JSONB, new_row JSONB, statement TEXT
);
CREATE FUNCTION witness_row() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO witness_log (tbl, operation, old_row, new_row, statement)
    VALUES (TG_TABLE_NAME, TG_OP,
            CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END,
            CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END,
            current_query());
    RETURN NULL;
END $$;
"""


def create_triggers(connection: Connection, metadata: MetaData) -> None:
    """Create the log and a trigger for each table of `metadata`.

    On SQLite, the connection needs a function `witness_statement()` that returns the statement
    being executed.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(_POSTGRESQL_LOG)
        for table in metadata.tables:
            connection.exec_driver_sql(
                f"CREATE TRIGGER witness_{table} AFTER INSERT OR UPDATE OR DELETE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION witness_row()"
            )
        return
    connection.exec_driver_sql(_SQLITE_LOG)
    for table in metadata.tables.values():
        for operation in ("INSERT", "UPDATE", "DELETE"):
            old = _sqlite_row("OLD", table) if operation != "INSERT" else "NULL"
            new = _sqlite_row("NEW", table) if operation != "DELETE" else "NULL"
            connection.exec_driver_sql(
                f"CREATE TRIGGER witness_{table.name}_{operation} "
                f"AFTER {operation} ON {table.name} FOR EACH ROW BEGIN "
                "INSERT INTO witness_log (tbl, operation, old_row, new_row, statement) "
                f"VALUES ('{table.name}', '{operation}', {old}, {new}, witness_statement()); END"
            )


def _sqlite_row(which: str, table: Table) -> str:
    values = ", ".join(f"'{column.name}', {which}.{column.name}" for column in table.c)
    return f"json_object({values})"


def read_log(connection: Connection, statements: Mapping[int, Statement]) -> list[Write]:
    """The log, which is emptied. `statements`, by place, are those of the flush being read."""
    rows = connection.execute(text("SELECT * FROM witness_log ORDER BY seq")).mappings().all()
    if rows:
        connection.execute(text("DELETE FROM witness_log"))
    writes = []
    for row in rows:
        mark = STATEMENT_MARK.search(row["statement"] or "")
        assert mark is not None, f"written outside of a flush: {row}"
        old, new = _decoded(row["old_row"]), _decoded(row["new_row"])
        writes.append(Write(row["tbl"], row["operation"], old, new, statements[int(mark[1])]))
    return writes


def _decoded(row: Any) -> Values:
    if row is None:
        return {}
    decoded: Values = json.loads(row) if isinstance(row, str) else row
    return decoded

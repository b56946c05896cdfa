"""``{"signals": "rows"}`` for an UPDATE or a DELETE: its rows are looked up and locked first.

The statement is then restricted to these rows, so that it does not change a row that another
connection adds in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import false, select
from sqlalchemy.orm.exc import StaleDataError

from ..._sqlalchemy.instances import set_deleted
from ..._sqlalchemy.mappers import attribute_of
from ..._sqlalchemy.statements import (
    as_core,
    by_attribute,
    by_column,
    dml_strategy,
    dml_table,
    execution_options_of,
    is_beyond_its_condition,
    is_extended,
    matching,
    set_values,
    without_where,
)
from ...changes.change import UNSET
from ...changes.effects import DELETED
from ...signals.builtin import pre_delete
from ..calling.guard import IN_STATEMENT, guarded
from ..columns.values import is_expression
from .refusals import check_condition, refusal
from .rows import Rows, Written
from .table import Row, Values

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql import ColumnElement, Select

    from ..calling.calls import Calls
    from .keys import Key

    Found = dict[Hashable, Row]


def changed_rows(context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> Rows:
    """The row signals of an UPDATE or DELETE."""
    by_key = context.is_update and dml_strategy(context) == "bulk"
    check_condition(context, by_key=by_key)
    if by_key:
        return UpdatedByKey(context, mapper, calls)
    return (UpdatedRows if context.is_update else DeletedRows)(context, mapper, calls)


class ChangedRows(Rows):
    """The row signals of a statement that changes rows which are there."""

    _fields: frozenset[str] = frozenset()
    """The attributes that it sets."""
    _count = -1
    """How many rows it has changed, if the database cannot return which; else -1."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        is_mysql = self._table.dialect.name in ("mysql", "mariadb")
        if is_extended(self._statement) or (is_mysql and is_beyond_its_condition(self._statement)):
            raise refusal(
                "which rows a LIMIT picks, and which rows of a second table are set, is not known "
                "before. Say in where() which rows they are, and update one table at a time"
            )
        # Instances follow a DELETE only if SQLAlchemy is asked for it, those of an UPDATE always.
        options = execution_options_of(context)
        self._synchronizes = options.get("synchronize_session", "auto") not in (None, False)
        self._rows: Found = {}
        """The rows that the statement changes, with their values before it."""
        self._instances: dict[Hashable, Any] = {}

    def _look_up(self, *, again: bool = False) -> None:
        if again:
            self._rows = self._matched([row.key for row in self._rows.values()])
            return
        self._table.lock()
        self._rows = self._matched()
        self._instances = self._table.load(row.key for row in self._rows.values())

    def _matched(self, keys: Iterable[Key] | None = None) -> Found:
        """The rows that the statement would change now, locked, with their present values.

        :param keys: only those of these keys.
        """
        self._table.flush()
        names = list(self._fields)
        query = self._matching([*self._table.key_columns, *map(self._table.column, names)])
        if keys is not None:
            query = query.where(self._among(keys))
        found: Found = {}
        for row in self._table.rows(query, names):
            # Joined with another table, a row may come several times.
            found.setdefault(self._key.identity(row.key), row)
        return found

    def _matching(self, columns: list[Any]) -> Select[Any]:
        query = matching(self._statement, columns)
        return query.with_for_update(of=dml_table(self._statement))

    def _own_key(self) -> list[Any]:
        table = dml_table(self._statement)  # which may be an alias
        return list(map(table.corresponding_column, self._table.key_columns))

    def _among(self, keys: Iterable[Key]) -> ColumnElement[bool]:
        return self._key.among(self._own_key(), keys)

    def _write(self) -> tuple[Result[Any], Found]:
        """Execute the statement for these rows, of which it may change fewer.

        Rows of other tables, which its condition looks at, are not locked.
        """
        statement = self._statement.where(self._among([row.key for row in self._rows.values()]))
        # What SQLAlchemy's ways to synchronize find out is known here, and for each row once.
        once = {"synchronize_session": False}
        if not self._rows or not self._tells_changed():
            result = self._table.execute(statement, self._parameters, **once)
            self._count = getattr(result, "rowcount", -1)
        else:
            result, returned = self._table.execute_returning(
                statement, self._parameters, self._own_key(), **once
            )
            changed = set(map(self._key.identity, returned))
            self._rows = {key: row for key, row in self._rows.items() if key in changed}
        return result, self._rows

    def _tells_changed(self) -> bool:
        """Whether the database can return the keys of the rows that it changes."""
        if not self._mapper.local_table.implicit_returning:  # type: ignore[attr-defined]
            return False
        dialect, several = self._table.dialect, len(matching(self._statement).get_final_froms()) > 1
        if self._context.is_update:
            return dialect.update_returning_multifrom if several else dialect.update_returning
        return dialect.delete_returning_multifrom if several else dialect.delete_returning

    def send_post(self) -> None:
        """Send the ``post_`` signals, if the rows are those that were announced."""
        if self._count not in (-1, len(self._written)):
            raise StaleDataError(
                f"statement on {self._mapper.class_.__name__} was to change the "
                f"{len(self._written)} row(s) that it matched, but changed {self._count}, and this "
                f"database does not tell which. Execute it again"
            )
        super().send_post()


class DeletedRows(ChangedRows):
    """The row signals of a DELETE."""

    def _announce(self) -> bool:
        called = False
        with guarded(self._session, IN_STATEMENT):
            for instance in self._instances.values():
                model = self._model(instance)
                receivers = model.receivers(pre_delete)
                model.delete(pre_delete, receivers, instance, None, self._table.bind)
                called |= bool(receivers)
        return called

    def _note(self) -> None:
        deleted = [self._instances[identity] for identity in self._rows]
        if self._synchronizes:
            set_deleted(self._session, deleted)
        self._written = [Written(DELETED, instance, {}, None) for instance in deleted]


class UpdatedRows(ChangedRows):
    """The row signals of an UPDATE with a condition."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        self._stated = set_values(self._statement, mapper)
        """What it sets in each row, Python values or SQL."""
        if not self._by_key:
            self._stated |= by_attribute(self._parameters or {}, mapper)
        self._check_key(self._stated)
        self._fields = self._written_by(self._stated)

    def _written_by(self, names: Iterable[str]) -> frozenset[str]:
        """The attributes that an UPDATE writes which sets these."""
        is_alias = dml_table(self._statement) is not self._table.table
        # SQLAlchemy finds no defaults of an alias.
        return self._written_with(names, () if is_alias else (self._table.table,))

    def _set_in(self, identity: Hashable) -> tuple[Values, frozenset[str]]:
        """What the statement sets in a row, and the attributes that it writes there."""
        return self._stated, self._fields

    def _announce(self) -> bool:
        called = False
        with guarded(self._session, IN_STATEMENT):
            for identity, instance in self._instances.items():
                same, old = self._model(instance).columns.same, self._rows[identity].values
                pairs = {
                    name: (old[name], UNSET if is_expression(new) else new)
                    for name, new in self._set_in(identity)[0].items()
                    if is_expression(new) or not same(name, old[name], new)
                }
                called |= self._announce_update(instance, pairs, frozenset(pairs))
        return called

    def _note(self) -> None:
        """Read what the UPDATE has written; the instances get the new values."""
        keys = [row.key for row in self._rows.values()]
        present = self._table.read(self._fields, keys)
        for identity, row in self._rows.items():
            self._note_update(
                self._instances[identity],
                row.values,
                present[identity],
                self._set_in(identity)[1],
                keep_pending=not self._synchronizes,
            )
        self._load_computed(keys)


class UpdatedByKey(UpdatedRows):
    """The row signals of an UPDATE by primary key, with a list of parameters."""

    _by_key = True

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        keys = {attribute_of(key, mapper) for table in mapper.tables for key in table.primary_key}
        self._settable = calls[mapper].columns.keys.difference(self._table.key_names, keys)
        self._version = (
            None
            if mapper.version_id_col is None
            else mapper.get_property_by_column(mapper.version_id_col).key
        )
        self._given = [
            one
            for one in by_column(self._parameters, mapper)
            if self._stated or not self._settable.isdisjoint(one)  # else SQLAlchemy leaves it out
        ]
        self._fields = self._written_by({name for one in self._given for name in self._set_by(one)})
        self._fields_by_names: dict[frozenset[str], frozenset[str]] = {}
        self._values: dict[Hashable, dict[str, Any]] = {}
        """What is set in each row that was found."""
        self._with_row: list[tuple[Mapping[str, Any], Hashable]] = []
        """The parameters that have a row, and which."""

    def _set_by(self, parameters: Values) -> dict[str, Any]:
        given = {name: value for name, value in parameters.items() if name in self._settable}
        return {**self._stated, **given}

    def _written_by(self, names: Iterable[str]) -> frozenset[str]:
        attributes = self._mapper.column_attrs
        tables = {column.table for name in names for column in attributes[name].columns}
        return self._written_with(names, tables)

    def _set_in(self, identity: Hashable) -> tuple[Values, frozenset[str]]:
        values = self._values[identity]
        names = frozenset(values)
        if names not in self._fields_by_names:
            self._fields_by_names[names] = self._written_by(names)
        return values, self._fields_by_names[names]

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it changed."""
        version = [] if self._version is None else [self._version]
        if any(
            any(one.get(name) is None for name in self._table.key_names)
            or any(name not in one for name in version)
            for one in self._given
        ):
            # SQLAlchemy has an error for it.
            return self._table.execute(self._statement, self._parameters), 0
        return super().execute()

    def _matched(self, keys: Iterable[Key] | None = None) -> Found:
        if keys is not None:
            return super()._matched(keys)
        given = [tuple(one[name] for name in self._table.key_names) for one in self._given]
        found = self._key.found(given, super()._matched)
        rows: Found = {}
        for one, key in zip(self._given, given, strict=True):
            row = found.get(self._key.identity(key))
            if row is not None and self._has_version(row, one):
                identity = self._key.identity(row.key)
                rows[identity] = row
                self._values.setdefault(identity, {}).update(self._set_by(one))
                self._with_row.append((one, identity))
        self._check_matched()
        return rows

    def _has_version(self, row: Row, parameters: Values) -> bool:
        name = self._version
        if name is None or parameters[name] is None:
            return True
        return self._calls[self._mapper].columns.same(name, row.values[name], parameters[name])

    def _check_matched(self) -> None:
        if self._statement.whereclause is None and len(self._with_row) < len(self._given):
            raise StaleDataError(
                f"UPDATE statement on table '{self._mapper.local_table!s}' expected to update "
                f"{len(self._given)} row(s); {len(self._with_row)} were matched."
            )

    def _matching(self, columns: list[Any]) -> Select[Any]:
        query: Any = select(*columns).select_from(self._table.table)
        if self._statement.whereclause is not None:
            query = query.where(self._statement.whereclause)
        return as_core(query).with_for_update(of=self._mapper.tables)

    def _own_key(self) -> list[Any]:
        return list(self._table.key_columns)

    def _write(self) -> tuple[Result[Any], Found]:
        """Execute the statement for these rows, which are locked, so that its condition holds."""
        self._with_row = [(one, key) for one, key in self._with_row if key in self._rows]
        self._check_matched()
        if self._with_row:
            parameters = [one for one, _ in self._with_row]
            return self._table.execute(without_where(self._statement), parameters), self._rows
        nothing = self._statement.where(false())
        result = self._table.execute(nothing, self._parameters, synchronize_session=None)
        return result, self._rows

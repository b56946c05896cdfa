"""``{"signals": "rows"}`` for an UPDATE or a DELETE: its rows are looked up and locked first.

The statement is then restricted to them, so that what another connection adds in between is neither
changed nor missing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import false, select
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.expression import BindParameter
from sqlalchemy.sql.visitors import iterate

from ..._sqlalchemy.instances import set_deleted
from ..._sqlalchemy.mappers import attribute_of
from ..._sqlalchemy.statements import (
    as_core,
    by_column,
    dml_strategy,
    dml_table,
    is_beyond_its_condition,
    is_extended,
    matching,
    set_values,
    without_where,
)
from ...changes.change import UNSET
from ...changes.effects import DELETED
from ...errors import BulkOptionError
from ...signals.builtin import pre_delete
from ..calling.guard import IN_STATEMENT, guarded
from ..columns.values import is_expression
from .keys import Key
from .rows import Row, Rows, Values, Written

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql import ColumnElement, Select

    from ..calling.calls import Calls

    Found = dict[Hashable, Row]


def changed_rows(context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> Rows:
    """The row signals of an UPDATE or DELETE."""
    is_by_key = context.is_update and dml_strategy(context) == "bulk"
    _refuse_unknown(context, mapper, is_by_key)
    if is_by_key:
        return UpdatedByKey(context, mapper, calls)
    return (UpdatedRows if context.is_update else DeletedRows)(context, mapper, calls)


def _refuse_unknown(context: ORMExecuteState, mapper: Mapper[Any], is_by_key: bool) -> None:
    parts = list(iterate(matching(context.statement)))
    if isinstance(context.parameters, list) and not (
        is_by_key and all(one.unique for one in parts if isinstance(one, BindParameter))
    ):
        raise BulkOptionError(
            'execution option signals="rows" takes a list of parameters for an UPDATE by primary '
            "key only, and without bindparam() in its where(). Execute the statement for one after "
            "the other, or connect to post_bulk"
        )
    if any(getattr(one, "is_dml", False) for one in parts):
        raise BulkOptionError(
            'execution option signals="rows": the where() contains a statement that writes, which '
            "would be executed to look the rows up, too. Execute it before"
        )


class ChangedRows(Rows):
    """The row signals of a statement that changes rows which are there."""

    _fields: frozenset[str] = frozenset()
    """The attributes that it sets."""
    _count = -1
    """How many rows it has changed, where the database tells no more than that."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        is_mysql = self._dialect.name in ("mysql", "mariadb")
        if is_extended(self._statement) or (is_mysql and is_beyond_its_condition(self._statement)):
            raise BulkOptionError(
                'execution option signals="rows": which rows a LIMIT picks, and which rows of a '
                "second table are set, is not known before. Say in where() which rows they are, "
                "and update one table at a time"
            )

    @property
    def _synchronizes(self) -> bool:
        """Whether instances follow what the statement does; those of updated rows always do."""
        return self._options.get("synchronize_session", "auto") not in (None, False)

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it changed."""
        self._lock()
        rows = self._look_up()
        instances = self._load(row.key for row in rows.values())
        if self._announce(rows, instances):
            rows = self._look_up([row.key for row in rows.values()])
        result, rows = self._change(rows)
        self._note(rows, instances)
        return result, len(rows)

    def _announce(self, rows: Found, instances: Mapping[Hashable, Any]) -> bool:
        """Send the ``pre_`` signals; return whether any receiver was called."""
        raise NotImplementedError

    def _note(self, rows: Found, instances: Mapping[Hashable, Any]) -> None:
        """Note what the statement has done to each row, for the ``post_`` signals."""
        raise NotImplementedError

    def _look_up(self, keys: Iterable[Key] | None = None) -> Found:
        """The rows that the statement would change now, locked, with their present values.

        :param keys: only those of these keys.
        """
        self._flush()
        names = list(self._fields)
        query = self._matching([*self._key_columns, *map(self._column, names)])
        if keys is not None:
            query = query.where(self._among(keys))
        found: Found = {}
        for row in self._rows(query, names):
            # Joined with another table, a row may come several times.
            found.setdefault(self._key.identity(row.key), row)
        return found

    def _matching(self, columns: list[Any]) -> Select[Any]:
        query = matching(self._statement, columns)
        return query.with_for_update(of=dml_table(self._statement))

    def _among(self, keys: Iterable[Key]) -> ColumnElement[bool]:
        table = dml_table(self._statement)
        return self._key.among(list(map(table.corresponding_column, self._key_columns)), keys)

    def _change(self, rows: Found) -> tuple[Result[Any], Found]:
        """Execute the statement for these rows; the result, and the rows that it has changed.

        They can be fewer: rows of other tables, which its condition looks at, are not locked.
        """
        statement = self._statement.where(self._among([row.key for row in rows.values()]))
        # What SQLAlchemy's ways to synchronize find out is known here, and for each row once.
        once = {"synchronize_session": False}
        if not rows or not self._tells_changed():
            result = self._execute(statement, **once)
            self._count = getattr(result, "rowcount", -1)
            return result, rows
        table = dml_table(self._statement)
        own = list(map(table.corresponding_column, self._key_columns))
        result, returned = self._returning(statement, own, **once)
        changed = set(map(self._key.identity, returned))
        return result, {identity: row for identity, row in rows.items() if identity in changed}

    def _tells_changed(self) -> bool:
        """Whether the database can return the keys of the rows that it changes."""
        dialect, is_update = self._dialect, self._context.is_update
        if not self._mapper.local_table.implicit_returning:  # type: ignore[attr-defined]
            return False
        if len(matching(self._statement).get_final_froms()) > 1:
            return bool(
                dialect.update_returning_multifrom
                if is_update
                else dialect.delete_returning_multifrom
            )
        return bool(dialect.update_returning if is_update else dialect.delete_returning)

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

    def _announce(self, rows: Found, instances: Mapping[Hashable, Any]) -> bool:
        called = False
        with guarded(self._session, IN_STATEMENT):
            for instance in instances.values():
                model = self._model(instance)
                receivers = model.receivers(pre_delete)
                model.delete(pre_delete, receivers, instance, None, self._using)
                called = called or bool(receivers)
        return called

    def _note(self, rows: Found, instances: Mapping[Hashable, Any]) -> None:
        deleted = [instances[identity] for identity in rows]
        if self._synchronizes:
            set_deleted(self._session, deleted)
        self._written = [Written(DELETED, instance, {}, None) for instance in deleted]


class _UpdatedRows(ChangedRows):
    """What the two kinds of UPDATE have in common."""

    def _values_of(self, identity: Hashable) -> Values:
        """What the statement sets in a row, Python values or SQL."""
        raise NotImplementedError

    def _fields_of(self, identity: Hashable) -> frozenset[str]:
        """The attributes that it writes there."""
        raise NotImplementedError

    def _announce(self, rows: Found, instances: Mapping[Hashable, Any]) -> bool:
        called = False
        with guarded(self._session, IN_STATEMENT):
            for identity, instance in instances.items():
                same, old = self._model(instance).columns.same, rows[identity].values
                pairs = {
                    name: (old[name], UNSET if is_expression(new) else new)
                    for name, new in self._values_of(identity).items()
                    if is_expression(new) or not same(name, old[name], new)
                }
                called |= self._announce_update(instance, pairs, frozenset(pairs))
        return called

    def _note(self, rows: Found, instances: Mapping[Hashable, Any]) -> None:
        """Note what the UPDATE has done, by reading it; the instances get the new values."""
        present = self._read(self._fields, [row.key for row in rows.values()])
        for identity, row in rows.items():
            self._note_update(
                instances[identity],
                row.values,
                present[identity],
                self._fields_of(identity),
                keep_pending=not self._synchronizes,
            )
        if self._computed:
            self._load(row.key for row in rows.values())


class UpdatedRows(_UpdatedRows):
    """The row signals of an UPDATE with a condition."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        self._values = set_values(self._statement, mapper)
        for key, value in (self._parameters or {}).items():
            name = attribute_of(key, mapper)
            if name is not None:
                self._values[name] = value
        self._check_key(self._values)
        is_alias = dml_table(self._statement) is not self._table
        # SQLAlchemy finds no defaults of an alias.
        self._fields = self._written_with(self._values, () if is_alias else (self._table,))

    def _values_of(self, identity: Hashable) -> Values:
        return self._values

    def _fields_of(self, identity: Hashable) -> frozenset[str]:
        return self._fields


class UpdatedByKey(_UpdatedRows):
    """The row signals of an UPDATE by primary key, with a list of parameters."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        # orm/bulk_persistence.py, _bulk_update(), hands no execution options on.
        own = self._connection.get_execution_options()
        self._schema = {"schema_translate_map": own.get("schema_translate_map")}
        # It writes each table of a joined subclass.
        self._table, self._key_columns = mapper.persist_selectable, mapper.primary_key
        self._stated = set_values(self._statement, mapper)
        self._check_key(self._stated)
        keys = {attribute_of(key, mapper) for table in mapper.tables for key in table.primary_key}
        self._settable = calls[mapper].columns.keys.difference(self._names, keys)
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
        names = {name for one in self._given for name in self._set_by(one)}
        self._fields = self._written_by(names)
        self._fields_by_names: dict[frozenset[str], frozenset[str]] = {}
        self._values: dict[Hashable, dict[str, Any]] = {}
        """What is set in each row that was found."""
        self._matched: list[tuple[Mapping[str, Any], Hashable]] = []
        """The parameters that have a row, and which."""

    def _set_by(self, parameters: Values) -> dict[str, Any]:
        given = {name: value for name, value in parameters.items() if name in self._settable}
        return {**self._stated, **given}

    def _written_by(self, names: Iterable[str]) -> frozenset[str]:
        attributes = self._mapper.column_attrs
        tables = {column.table for name in names for column in attributes[name].columns}
        return self._written_with(names, tables)

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it changed."""
        versions = () if self._version is None else (self._version,)
        if any(
            any(one.get(name) is None for name in self._names)
            or any(name not in one for name in versions)
            for one in self._given
        ):
            return self._execute(self._statement), 0  # SQLAlchemy has an error for it
        return super().execute()

    def _values_of(self, identity: Hashable) -> Values:
        return self._values[identity]

    def _fields_of(self, identity: Hashable) -> frozenset[str]:
        names = frozenset(self._values[identity])
        if names not in self._fields_by_names:
            self._fields_by_names[names] = self._written_by(names)
        return self._fields_by_names[names]

    def _look_up(self, keys: Iterable[Key] | None = None) -> Found:
        if keys is not None:
            return super()._look_up(keys)
        given = [tuple(one[name] for name in self._names) for one in self._given]
        found = self._key.found(given, super()._look_up)
        rows: Found = {}
        for one, key in zip(self._given, given, strict=True):
            row = found.get(self._key.identity(key))
            if row is not None and self._has_version(row, one):
                identity = self._key.identity(row.key)
                rows[identity] = row
                self._values.setdefault(identity, {}).update(self._set_by(one))
                self._matched.append((one, identity))
        self._check_matched()
        return rows

    def _has_version(self, row: Row, parameters: Values) -> bool:
        name = self._version
        if name is None or parameters[name] is None:
            return True
        return self._calls[self._mapper].columns.same(name, row.values[name], parameters[name])

    def _check_matched(self) -> None:
        if self._statement.whereclause is None and len(self._matched) < len(self._given):
            raise StaleDataError(
                f"UPDATE statement on table '{self._mapper.local_table!s}' expected to update "
                f"{len(self._given)} row(s); {len(self._matched)} were matched."
            )

    def _matching(self, columns: list[Any]) -> Select[Any]:
        query: Any = select(*columns).select_from(self._table)
        if self._statement.whereclause is not None:
            query = query.where(self._statement.whereclause)
        return as_core(query).with_for_update(of=self._mapper.tables)

    def _among(self, keys: Iterable[Key]) -> ColumnElement[bool]:
        return self._key.among(self._key_columns, keys)

    def _change(self, rows: Found) -> tuple[Result[Any], Found]:
        """Execute the statement for these rows, which are locked, so that its condition holds."""
        self._matched = [(one, identity) for one, identity in self._matched if identity in rows]
        self._check_matched()
        if self._matched:
            self._parameters = [one for one, _ in self._matched]
            return self._execute(without_where(self._statement)), rows
        nothing = self._statement.where(false())
        return self._execute(nothing, synchronize_session=None), rows

"""``{"signals": "rows"}`` for an UPDATE or a DELETE: its rows are looked up and locked first.

The statement is then restricted to them, so that what another connection adds in between is neither
changed nor missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, select
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.expression import BindParameter
from sqlalchemy.sql.visitors import iterate

from .._sqlalchemy import by_column, dml_entity, set_values, with_options_of
from ..changes import UNSET
from ..errors import BulkOptionError
from ..net import DELETED
from ..signals import pre_delete
from .bulk_rows import Key, Rows, Values, Written
from .columns import is_expression
from .guard import IN_STATEMENT, guarded

if TYPE_CHECKING:
    from sqlalchemy.engine import Result


class ChangedRows(Rows):
    """The row signals of one UPDATE or DELETE."""

    _count = -1
    """How many rows it has changed, where the database tells no more than that."""

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it changed."""
        parameters: Any = self._context.parameters
        many = isinstance(parameters, list)
        if many and not self._by_key():
            raise BulkOptionError(
                'execution option signals="rows" takes a list of parameters for an UPDATE by '
                "primary key only, and without bindparam() in its where(). Execute the statement "
                "for one after the other, or connect to post_bulk"
            )
        self._lock()
        if self._context.is_delete:
            return self._delete()
        if many:
            return self._update_many(parameters)
        return self._update()

    def _delete(self) -> tuple[Result[Any], int]:
        rows = self._select([])
        instances = self._load(rows)
        if self._announce_deletes(instances.values()):
            rows = self._select([], rows)
        result, rows = self._invoke(rows)
        self._written = [Written(DELETED, instances[key], {}, None) for key in rows]
        return result, len(rows)

    def _by_key(self) -> bool:
        """Whether a list of parameters says by the primary key which rows to update."""
        strategy = self._context.execution_options.get("dml_strategy", "auto")
        where = self._statement.whereclause
        return (
            self._context.is_update
            and strategy in ("auto", "bulk")
            and not any(
                isinstance(one, BindParameter) and not one.unique
                for one in (() if where is None else iterate(where))
            )
        )

    def _update(self) -> tuple[Result[Any], int]:
        values = set_values(self._statement, self._mapper)
        parameters: Any = self._context.parameters or {}
        for name, value in parameters.items():
            if name in self._mapper.column_attrs:
                values[name] = value
        self._check_key(values)
        fields = frozenset(values) | self._written_along()
        rows = self._select(fields)
        instances = self._load(rows)
        if self._announce_updates(instances, rows, dict.fromkeys(rows, values)):
            rows = self._select(fields, rows)
        result, rows = self._invoke(rows)
        self._note_updates(instances, rows, dict.fromkeys(rows, fields))
        return result, len(rows)

    def _update_many(self, parameters: list[dict[str, Any]]) -> tuple[Result[Any], int]:
        """An UPDATE by primary key, with a list of parameters."""
        parameters = by_column(parameters, self._mapper)
        if not all(one.keys() >= set(self._key) for one in parameters):
            return self._context.invoke_statement(), 0  # SQLAlchemy refuses it
        along = self._written_along()
        written = self._calls[self._mapper].columns.keys.difference(self._key)
        values: dict[Key, dict[str, Any]] = {}
        for one in parameters:
            new = {name: value for name, value in one.items() if name in written}
            if new or self._mapper.version_id_col is not None:  # else it is no UPDATE
                values.setdefault(self._key_of(one), {}).update(new)
        fields = frozenset(name for one in values.values() for name in one) | along
        rows = self._select(fields, values)
        instances = self._load(rows)
        if self._announce_updates(instances, rows, values):
            rows = self._select(fields, rows)
        if len(rows) < len(values) and self._statement.whereclause is None:
            raise StaleDataError(
                f"UPDATE statement on table {self._mapper.local_table!s} expected to update "
                f"{len(values)} row(s); {len(rows)} were matched."
            )
        if rows:
            self._context.parameters = [one for one in parameters if self._key_of(one) in rows]
        result = self._invoke_statement()
        self._note_updates(instances, rows, {key: frozenset(values[key]) | along for key in rows})
        return result, len(rows)

    def _key_of(self, parameters: Values) -> Key:
        return tuple(parameters[name] for name in self._key)

    def _written_along(self) -> frozenset[str]:
        if inspect(dml_entity(self._statement)).is_aliased_class:
            return frozenset()  # SQLAlchemy finds no defaults of an alias
        return frozenset(
            prop.key
            for prop in self._mapper.column_attrs
            for column in prop.columns
            if getattr(column, "table", None) is self._mapper.local_table
            and (column.onupdate is not None or column.server_onupdate is not None)
        )

    # -- the rows, before and after ----------------------------------------------------------------

    def _select(
        self, fields: Iterable[str], only: Iterable[Key] | None = None
    ) -> dict[Key, Values]:
        """The rows that the statement would change now, locked, with their present values."""
        entity = dml_entity(self._statement)
        names = list(fields)
        key = [getattr(entity, name) for name in self._key]
        query: Any = select(*key, *(getattr(entity, name) for name in names)).select_from(entity)
        if self._statement.whereclause is not None:
            query = query.where(self._statement.whereclause)
        if only is not None:
            query = query.where(self._are(entity, only))
        query = with_options_of(query, self._statement).with_for_update(of=key)
        found: dict[Key, Values] = {}
        for row in self._query(query, autoflush=True):
            # Joined with another table, a row may come several times.
            found.setdefault(tuple(row[: len(key)]), dict(zip(names, row[len(key) :], strict=True)))
        return found

    def _invoke(self, rows: dict[Key, Values]) -> tuple[Result[Any], dict[Key, Values]]:
        """Execute the statement for these rows; the result, and the rows that it has changed.

        They can be fewer: rows of other tables, which its condition looks at, are not locked.
        """
        entity = dml_entity(self._statement)
        statement = self._statement.where(self._are(entity, rows))
        dialect: Any = self._using.dialect
        if not rows or not dialect.delete_returning_multifrom:  # SQLite counts too late with it
            result = self._invoke_statement(statement)
            self._count = getattr(result, "rowcount", -1)
            return result, rows
        result, returned = self._returning(statement, [getattr(entity, name) for name in self._key])
        changed = set(returned)
        return result, {key: values for key, values in rows.items() if key in changed}

    def send_post(self) -> None:
        """Send the ``post_`` signals, if the rows are those that were announced."""
        if self._count not in (-1, len(self._written)):
            raise StaleDataError(
                f"statement on {self._mapper.class_.__name__} was to change the "
                f"{len(self._written)} row(s) that it matched, but changed {self._count}, and this "
                f"database does not tell which. Execute it again"
            )
        super().send_post()

    # -- sending -----------------------------------------------------------------------------------

    def _announce_deletes(self, instances: Iterable[Any]) -> bool:
        called = False
        with guarded(self._session, IN_STATEMENT):
            for instance in instances:
                model = self._model(instance)
                receivers = model.pre_delete.receivers()
                model.delete(pre_delete, receivers, instance, None, self._using)
                called = called or bool(receivers)
        return called

    def _announce_updates(
        self,
        instances: Mapping[Key, Any],
        rows: Mapping[Key, Values],
        values: Mapping[Key, Values],
    ) -> bool:
        called = False
        with guarded(self._session, IN_STATEMENT):
            for key, instance in instances.items():
                same = self._model(instance).columns.same
                pairs = {
                    name: (old, UNSET if is_expression(new) else new)
                    for name, new in values[key].items()
                    if (old := rows[key].get(name, UNSET)) is UNSET
                    or is_expression(new)
                    or not same(name, old, new)
                }
                called |= self._announce_update(instance, pairs, frozenset(pairs))
        return called

    def _note_updates(
        self,
        instances: Mapping[Key, Any],
        rows: Mapping[Key, Values],
        fields: Mapping[Key, frozenset[str]],
    ) -> None:
        """What the UPDATE has done, by reading it again; the instances get the new values."""
        names = frozenset(name for one in fields.values() for name in one)
        for key, new in self._read(names, rows).items():
            self._note_update(instances[key], rows[key], new, fields[key])

"""``{"signals": "rows"}`` for an UPDATE or a DELETE: its rows are looked up and locked first.

The statement is then restricted to them, so that what another connection adds in between is neither
changed nor missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, select
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from .._sqlalchemy import dml_entity, set_values, state_of, with_options_of
from ..changes import UNSET
from ..errors import BulkOptionError
from ..net import DELETED
from ..signals import pre_delete
from .bulk_rows import Key, Rows, Values, Written
from .columns import is_expression
from .guard import guarded_bulk

if TYPE_CHECKING:
    from sqlalchemy.engine import Result


class ChangedRows(Rows):
    """The row signals of one UPDATE or DELETE."""

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it changed."""
        self._lock()
        if self._context.is_delete:
            return self._delete()
        parameters: Any = self._context.parameters
        if isinstance(parameters, list):
            return self._update_many(parameters)
        return self._update()

    def _delete(self) -> tuple[Result[Any], int]:
        rows = self._select([])
        instances = self._load(rows)
        if self._announce_deletes(instances.values()):
            rows = self._select([], rows)
        result = self._context.invoke_statement(self._restricted(rows))
        self._written = [Written(DELETED, instances[key], {}, None) for key in rows]
        return result, len(rows)

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
        result = self._context.invoke_statement(self._restricted(rows))
        self._note_updates(instances, rows, dict.fromkeys(rows, fields))
        return result, len(rows)

    def _update_many(self, parameters: list[dict[str, Any]]) -> tuple[Result[Any], int]:
        """An UPDATE by primary key, with a list of parameters."""
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
        result = self._context.invoke_statement()
        self._note_updates(instances, rows, {key: frozenset(values[key]) | along for key in rows})
        return result, len(rows)

    def _key_of(self, parameters: Values) -> Key:
        return tuple(parameters[name] for name in self._key)

    def _check_key(self, values: Values) -> None:
        if not set(self._key).isdisjoint(values):
            raise BulkOptionError(
                f'execution option signals="rows": the statement sets the primary key of '
                f"{self._mapper.class_.__name__}, so that its rows cannot be found again. Change "
                f"the instances instead, or connect to post_bulk"
            )

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

    def _restricted(self, keys: Iterable[Key]) -> Any:
        return self._statement.where(self._are(dml_entity(self._statement), keys))

    def _read(self, names: Iterable[str], keys: Iterable[Key]) -> dict[Key, Values]:
        cls, names, wanted = self._mapper.class_, list(names), list(keys)
        if not wanted:
            return {}
        columns = [getattr(cls, name) for name in (*self._key, *names)]
        size = len(self._key)
        found = {
            tuple(row[:size]): dict(zip(names, row[size:], strict=True))
            for row in self._query(select(*columns).where(self._are(cls, wanted)), autoflush=False)
        }
        return {key: found[key] for key in wanted}

    # -- sending -----------------------------------------------------------------------------------

    def _announce_deletes(self, instances: Iterable[Any]) -> bool:
        called = False
        with guarded_bulk(self._session):
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
        with guarded_bulk(self._session):
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
            instance = instances[key]
            state = state_of(instance)
            for name, value in new.items():
                if name not in state.committed_state:  # else the session has a change pending
                    set_committed_value(instance, name, value)
            self._note_update(instance, rows[key], new, fields[key])

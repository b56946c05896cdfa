"""``{"signals": "rows"}`` for an INSERT, whose rows RETURNING identifies.

``pre_save`` gets an instance with the given values that is in no session; what receivers assign to
it goes into the statement. An upsert both inserts and updates. PostgreSQL returns which rows are
new; with another database, the rows that are in the way are looked up and locked before.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Boolean, inspect, literal_column, select
from sqlalchemy.orm.attributes import set_committed_value

from ..._sqlalchemy.instances import altered, state_of
from ..._sqlalchemy.statements import (
    by_attribute,
    by_column,
    dml_strategy,
    has_many_values,
    inserted_values,
    upsert_of,
)
from ...changes.change import UNSET, NewRow, PendingRow
from ...changes.effects import CREATED
from ...signals.builtin import pre_save
from ..calling.guard import IN_STATEMENT, guarded
from ..columns.values import is_expression
from .keys import Key, KeyColumns
from .refusals import refusal
from .rows import Rows, Written
from .table import Row, Values

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql import ColumnElement

    from ..._sqlalchemy.statements import Upsert
    from ..calling.calls import Calls


def inserted_rows(context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> Rows:
    """The row signals of an INSERT."""
    try:
        upsert = upsert_of(context.statement, mapper)
    except TypeError:
        raise refusal(
            "which rows this kind of upsert inserts and which it updates is not known; connect to "
            "post_bulk"
        ) from None
    if upsert is None:
        return InsertedRows(context, mapper, calls)
    return UpsertedRows(context, mapper, calls, upsert)


class Inserted(NamedTuple):
    """A row that the statement has written."""

    key: Key
    is_new: bool


class InsertedRows(Rows):
    """The row signals of an INSERT that writes new rows only."""

    _tells_new: Sequence[ColumnElement[bool]] = ()
    """SQL to return whether a row is new, if the database has such a thing."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        if not self._table.dialect.insert_returning:
            raise refusal(
                f"{self._table.dialect.name} has no INSERT … RETURNING, so the rows that it "
                f"inserts are not known. Add the instances to the session instead"
            )
        self._is_bulk = dml_strategy(context) == "bulk"
        self._given = self._given_rows()
        """The rows to be inserted, by attribute; ``None`` if the statement selects them."""
        self._rows: dict[Hashable, Inserted] = {}

    def _given_rows(self) -> list[dict[str, Any]] | None:
        stated = inserted_values(self._statement, self._mapper)
        if stated is None or not self._parameters:
            return stated
        many = self._parameters if isinstance(self._parameters, list) else [self._parameters]
        if self._is_bulk:
            many = self._parameters = by_column(many, self._mapper)
        else:  # by the names of columns
            many = [by_attribute(one, self._mapper) for one in many]
        return [{**stated[0], **one} for one in many]

    def _look_up(self, *, again: bool = False) -> None:
        self._table.flush()

    def _announce(self) -> bool:
        assigned: dict[int, Values] = {}
        called = False
        with guarded(self._session, IN_STATEMENT):
            for place, values in enumerate(self._given or ()):
                was_called, new = self._announce_row(values)
                called |= was_called
                if new:
                    assigned[place] = new
                    values.update(new)
        if assigned:
            self._assign(assigned)
        return called

    def _announce_row(self, values: Values) -> tuple[bool, Values]:
        """Send ``pre_save``; return whether it was called, and what it assigned to a new row."""
        model = self._calls[self._mapper_for(values)]
        receivers, columns = model.receivers(pre_save), model.columns
        if not receivers:
            return False, {}
        instance = model.mapper.class_manager.new_instance()
        plain = {
            name: value
            for name, value in values.items()
            if name in columns.keys and not is_expression(value)
        }
        for name, value in plain.items():
            set_committed_value(instance, name, value)
        row = state_of(instance).dict
        raw, bind = self._calls.raw, self._table.bind
        for receiver in receivers:
            changes = PendingRow(columns.absent, dict(row))
            model.save(pre_save, (receiver,), instance, True, changes, None, raw, bind)
        assigned = {
            name: value
            for name, value in row.items()
            if name in columns.keys and (name not in plain or value is not plain[name])
        }
        return True, assigned

    def _mapper_for(self, values: Values) -> Mapper[Any]:
        if self._mapper.polymorphic_on is None:
            return self._mapper
        name = self._mapper.get_property_by_column(self._mapper.polymorphic_on).key
        return self._mapper.polymorphic_map.get(values.get(name), self._mapper)

    def _assign(self, assigned: Mapping[int, Values]) -> None:
        """Let the statement insert what ``pre_save`` receivers have assigned, by row."""
        if isinstance(self._parameters, list):
            self._parameters = [
                {**one, **self._named(assigned.get(i, {}))}
                for i, one in enumerate(self._parameters)
            ]
        elif self._parameters:
            self._parameters = {**self._parameters, **self._named(assigned[0])}
        elif has_many_values(self._statement):
            raise refusal(
                f"a pre_save receiver has assigned "
                f"{', '.join(sorted(next(iter(assigned.values()))))}, which cannot be put into a "
                f"list in values(). Give the list as the parameters of execute()"
            )
        else:
            self._statement = self._statement.values(
                {getattr(self._mapper.class_, name): value for name, value in assigned[0].items()}
            )

    def _named(self, values: Values) -> Values:
        """Values by the names that parameters have."""
        if self._is_bulk:
            return values
        return {self._table.column(name).key: value for name, value in values.items()}

    def _write(self) -> tuple[Result[Any], Mapping[Hashable, Inserted]]:
        # With a list SQLAlchemy inserts into each of several tables, and returns whole instances.
        is_joined = self._is_bulk and len(self._mapper.tables) > 1
        own = [self._mapper.class_] if is_joined else self._table.key_columns
        result, returned = self._table.execute_returning(
            self._statement, self._parameters, [*own, *self._tells_new]
        )
        for row in returned:
            key = inspect(row[0]).identity if is_joined else row[: len(own)]
            identity = self._key.identity(key)
            # A row that one statement creates and updates again was created.
            is_new = self._is_new(identity, row[len(own) :])
            self._rows.setdefault(identity, Inserted(key, is_new))
        return result, self._rows

    def _is_new(self, identity: Hashable, returned: Sequence[bool]) -> bool:
        return True

    def _note(self) -> None:
        keys = [row.key for row in self._rows.values()]
        for instance in self._table.load(keys, refresh=True).values():
            self._note_created(instance)

    def _note_created(self, instance: Any) -> None:
        state = state_of(instance)
        altered(self._session, state)
        changes = NewRow(self._model(instance).columns.absent, dict(state.dict))
        self._written.append(Written(CREATED, instance, changes, None))


class UpsertedRows(InsertedRows):
    """The row signals of an INSERT … ON CONFLICT."""

    def __init__(
        self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls, upsert: Upsert
    ) -> None:
        super().__init__(context, mapper, calls)
        table, dialect = self._table.table, self._table.dialect
        self._updates = upsert.updates
        self._target = upsert.target
        self._target_key = KeyColumns(map(self._table.column, self._target), dialect)
        self._fields = self._written_with(self._updates, [table], ("server_onupdate",))
        if self._updates and dialect.name == "postgresql":
            if table.dialect_options["postgresql"]["partition_by"]:
                raise refusal(
                    f"{table!s} is partitioned, and of such a table PostgreSQL does not tell which "
                    f"rows an upsert has inserted. Name the class of a partition, or connect to "
                    f"post_bulk"
                )
            self._tells_new = [literal_column("xmax = 0", Boolean)]
        self._check_key(self._updates.difference(self._target))
        self._in_the_way: dict[Hashable, Row] = {}
        """The rows that are in the way, by the identity of their values for ``_target``."""
        self._instances: dict[Hashable, Any] = {}
        """Their instances, by the identity of the primary key."""
        if self._updates and not self._tells_new:
            self._check_target()

    def _check_target(self) -> None:
        """Refuse an upsert if it cannot be known before which rows it is going to update."""
        if not self._target:
            raise refusal(
                "say with index_elements= which rows are in the way, so that they can be told from "
                "new ones"
            )
        columns = self._mapper.columns
        if self._given is None or any(
            is_expression(one[name])
            if name in one
            else columns[name].default is not None or columns[name].server_default is not None
            for one in self._given
            for name in self._target
        ):
            raise refusal(
                f"give plain values for {', '.join(self._target)}, so that rows that are in the "
                f"way can be told from new ones, or connect to post_bulk"
            )

    def _look_up(self, *, again: bool = False) -> None:
        """Find the rows that are in the way now, and lock them."""
        super()._look_up()
        self._table.lock()
        if not self._target:
            return
        keys = [tuple(map(one.get, self._target)) for one in self._given or ()]
        # A row that is given NULL, or SQL, is not known to be in the way of another.
        keys = [
            key for key in keys if not any(value is None or is_expression(value) for value in key)
        ]
        self._in_the_way = self._target_key.found(keys, self._rows_with)
        self._instances = self._table.load(row.key for row in self._in_the_way.values())

    def _rows_with(self, keys: list[Key]) -> dict[Hashable, Row]:
        table = self._table
        target = list(map(table.column, self._target))
        query: Any = select(*table.key_columns, *map(table.column, self._fields), *target)
        query = query.select_from(table.table).where(self._target_key.among(target, keys))
        query = query.with_for_update(of=table.table)
        size = len(self._key) + len(self._fields)
        found = {}
        for row in table.tuples(query):
            values = dict(zip(self._fields, row[len(self._key) : size], strict=True))
            found[self._target_key.identity(row[size:])] = Row(row[: len(self._key)], values)
        return found

    def _announce_row(self, values: Values) -> tuple[bool, Values]:
        target = tuple(map(values.get, self._target))
        row = self._in_the_way.get(self._target_key.identity(target)) if self._in_the_way else None
        if row is None:
            return super()._announce_row(values)
        if not self._updates:
            return False, {}
        instance = self._instances[self._key.identity(row.key)]
        pairs = {name: (value, UNSET) for name, value in row.values.items()}
        return self._announce_update(instance, pairs, self._fields), {}

    def _is_new(self, identity: Hashable, returned: Sequence[bool]) -> bool:
        if returned:
            return returned[0]
        return not self._updates or identity not in self._instances

    def _note(self) -> None:
        new = [row.key for row in self._rows.values() if row.is_new]
        updated = [row.key for row in self._rows.values() if not row.is_new]
        created = self._table.load(new, refresh=True)
        instances, present = self._table.load(updated), self._table.read(self._fields, updated)
        old = {self._key.identity(row.key): row.values for row in self._in_the_way.values()}
        for identity, row in self._rows.items():
            if row.is_new:
                self._note_created(created[identity])
            else:
                self._note_update(
                    instances[identity],
                    old.get(identity, {}),
                    present[identity],
                    self._fields,
                    keep_pending=True,
                )
        self._load_computed(updated)

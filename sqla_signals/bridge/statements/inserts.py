"""``{"signals": "rows"}`` for an INSERT: its rows are known by what RETURNING tells of them.

``pre_save`` gets an instance made up of the values given, in no session; what receivers assign to
it goes into the statement. Of an upsert the database says afterwards which rows were created:
PostgreSQL itself, elsewhere what was looked up under a lock before.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Boolean, inspect, literal_column, select
from sqlalchemy.orm.attributes import set_committed_value

from ..._sqlalchemy.instances import altered, state_of
from ..._sqlalchemy.mappers import attribute_of
from ..._sqlalchemy.statements import (
    by_column,
    dml_strategy,
    has_many_values,
    inserted_values,
    upsert_of,
)
from ...changes.change import UNSET, NewRow, PendingRow
from ...changes.effects import CREATED
from ...errors import BulkOptionError
from ...signals.builtin import pre_save
from ..calling.guard import IN_STATEMENT, guarded
from ..columns.values import is_expression
from .keys import Key, KeyColumns
from .rows import Row, Rows, Values, Written

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
        raise BulkOptionError(
            'execution option signals="rows": which rows this kind of upsert inserts and which '
            "it updates is not known; connect to post_bulk"
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
    """SQL that says of a row whether it is new, where the database can say so afterwards."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        super().__init__(context, mapper, calls)
        if not self._dialect.insert_returning:
            raise BulkOptionError(
                f'execution option signals="rows": {self._dialect.name} has no INSERT … RETURNING, '
                f"which tells the rows that were inserted. Add the instances to the session instead"
            )
        self._is_bulk = dml_strategy(context) == "bulk"
        self._given = self._given_rows()

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it wrote."""
        self._look_up()
        if self._announce():
            self._look_up()
        result, rows = self._insert()
        self._note(rows)
        return result, len(rows)

    def _look_up(self) -> None:
        """Find out about the rows that are there, before receivers are called and after it."""
        self._flush()

    def _given_rows(self) -> list[dict[str, Any]] | None:
        """The rows to be inserted, by attribute; ``None`` if the statement selects them."""
        stated = inserted_values(self._statement, self._mapper)
        if stated is None or not self._parameters:
            return stated
        many = self._parameters if isinstance(self._parameters, list) else [self._parameters]
        if self._is_bulk:
            many = self._parameters = by_column(many, self._mapper)
        else:  # by the names of columns
            many = [self._by_attribute(one) for one in many]
        return [{**stated[0], **one} for one in many]

    def _by_attribute(self, parameters: Values) -> dict[str, Any]:
        named = {attribute_of(name, self._mapper): value for name, value in parameters.items()}
        return {name: value for name, value in named.items() if name is not None}

    def _announce(self) -> bool:
        """Send ``pre_save`` for each row, and let receivers assign to new ones.

        :returns: whether any receiver was called.
        """
        assigned: dict[int, Values] = {}
        called = False
        with guarded(self._session, IN_STATEMENT):
            for place, values in enumerate(self._given or ()):
                new, was_called = self._announce_row(values)
                called = called or was_called
                if new:
                    assigned[place] = new
        if assigned and self._given is not None:
            self._assign(assigned)
            self._given = [
                {**one, **assigned.get(place, {})} for place, one in enumerate(self._given)
            ]
        return called

    def _announce_row(self, values: Values) -> tuple[Values, bool]:
        """Send ``pre_save``; return what was assigned to a new row, and if anybody was called."""
        model = self._calls[self._mapper_for(values)]
        receivers, columns = model.receivers(pre_save), model.columns
        if not receivers:
            return {}, False
        instance = model.mapper.class_manager.new_instance()
        plain = {
            name: value
            for name, value in values.items()
            if name in columns.keys and not is_expression(value)
        }
        for name, value in plain.items():
            set_committed_value(instance, name, value)
        state = state_of(instance)
        for receiver in receivers:
            changes = PendingRow(columns.absent, dict(state.dict))
            model.save(
                pre_save,
                (receiver,),
                instance,
                True,
                changes,
                None,
                self._calls.raw,
                self._using,
            )
        assigned = {
            name: value
            for name, value in state.dict.items()
            if name in columns.keys and (name not in plain or value is not plain[name])
        }
        return assigned, True

    def _mapper_for(self, values: Values) -> Mapper[Any]:
        if self._mapper.polymorphic_on is None:
            return self._mapper
        name = self._mapper.get_property_by_column(self._mapper.polymorphic_on).key
        return self._mapper.polymorphic_map.get(values.get(name), self._mapper)

    def _assign(self, assigned: Mapping[int, Values]) -> None:
        """Let the statement insert what ``pre_save`` receivers have assigned."""
        if self._parameters:
            is_list = isinstance(self._parameters, list)
            many = self._parameters if is_list else [self._parameters]
            many = [{**one, **self._named(assigned.get(i, {}))} for i, one in enumerate(many)]
            self._parameters = many if is_list else many[0]
        elif has_many_values(self._statement):
            raise BulkOptionError(
                'execution option signals="rows": a pre_save receiver has assigned '
                f"{', '.join(sorted(next(iter(assigned.values()))))}, which cannot be put into a "
                "list in values(). Give the list as the parameters of execute()"
            )
        else:
            self._statement = self._statement.values(
                {getattr(self._mapper.class_, name): value for name, value in assigned[0].items()}
            )

    def _named(self, values: Values) -> Values:
        """Values by the names that parameters have."""
        if self._is_bulk:
            return values
        return {self._column(name).key: value for name, value in values.items()}

    def _insert(self) -> tuple[Result[Any], dict[Hashable, Inserted]]:
        """Execute the statement; the result for the caller, and the rows that it has written."""
        # With a list SQLAlchemy inserts into each of several tables, and returns whole instances.
        is_joined = self._is_bulk and len(self._mapper.tables) > 1
        own = [self._mapper.class_] if is_joined else self._key_columns
        result, returned = self._returning(self._statement, [*own, *self._tells_new])
        rows: dict[Hashable, Inserted] = {}
        for row in returned:
            key = inspect(row[0]).identity if is_joined else row[: len(own)]
            identity = self._key.identity(key)
            # What one statement creates and updates again, it has created.
            rows.setdefault(identity, Inserted(key, self._is_new(identity, row[len(own) :])))
        return result, rows

    def _is_new(self, identity: Hashable, told: Sequence[bool]) -> bool:
        return True

    def _note(self, rows: Mapping[Hashable, Inserted]) -> None:
        """Note what the statement has done to each row, for the ``post_`` signals."""
        for instance in self._load((row.key for row in rows.values()), refresh=True).values():
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
        self._updates = upsert.updates
        self._target: list[str] = upsert.target or []
        """The attributes that tell which row is in the way; none if the statement does not say."""
        self._target_key = KeyColumns(map(self._column, self._target), self._dialect)
        self._fields = self._written_with(self._updates, [self._table], ("server_onupdate",))
        if self._updates and self._dialect.name == "postgresql":
            if self._table.dialect_options["postgresql"]["partition_by"]:
                raise BulkOptionError(
                    f'execution option signals="rows": {self._table!s} is partitioned, and of such '
                    f"a table PostgreSQL does not tell which rows an upsert has inserted. Name the "
                    f"class of a partition, or connect to post_bulk"
                )
            self._tells_new = [literal_column("xmax = 0", Boolean)]
        self._check_key(self._updates.difference(self._target))
        self._in_the_way: dict[Hashable, Row] = {}
        """The rows that it meets, by the identity of what is in the way."""
        self._instances: dict[Hashable, Any] = {}
        """Their instances, by the identity of the primary key."""
        if self._updates and not self._tells_new:
            self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        """Refuse what leaves it open which rows are updated, where nobody says so afterwards."""
        if not self._target:
            raise BulkOptionError(
                'execution option signals="rows": say with index_elements= which rows are in '
                "the way, so that they can be told from new ones"
            )
        columns = self._mapper.columns
        if self._given is None or any(
            is_expression(one[name])
            if name in one
            else columns[name].default is not None or columns[name].server_default is not None
            for one in self._given
            for name in self._target
        ):
            raise BulkOptionError(
                f'execution option signals="rows": give plain values for '
                f"{', '.join(self._target)}, so that rows that are in the way can be told from new "
                f"ones, or connect to post_bulk"
            )

    def _look_up(self) -> None:
        """Find the rows that are in the way now, and lock them."""
        super()._look_up()
        self._lock()
        if not self._target:
            return
        keys = [tuple(map(one.get, self._target)) for one in self._given or ()]
        # A row that is given NULL, or SQL, is not known to be in the way of another.
        keys = [
            key for key in keys if not any(value is None or is_expression(value) for value in key)
        ]
        self._in_the_way = self._target_key.found(keys, self._rows_with)
        self._instances = self._load(row.key for row in self._in_the_way.values())

    def _is_new(self, identity: Hashable, told: Sequence[bool]) -> bool:
        if told:
            return told[0]
        return not self._updates or identity not in self._instances

    def _rows_with(self, keys: list[Key]) -> dict[Hashable, Row]:
        columns, names = list(map(self._column, self._target)), list(self._fields)
        query: Any = select(*self._key_columns, *map(self._column, names), *columns)
        query = query.select_from(self._table).where(self._target_key.among(columns, keys))
        query = query.with_for_update(of=self._table)
        size = len(self._key) + len(names)
        found = {}
        for row in self._tuples(query):
            values = dict(zip(names, row[len(self._key) : size], strict=True))
            found[self._target_key.identity(row[size:])] = Row(row[: len(self._key)], values)
        return found

    def _announce_row(self, values: Values) -> tuple[Values, bool]:
        row = None
        if self._in_the_way:
            row = self._in_the_way.get(
                self._target_key.identity(tuple(map(values.get, self._target)))
            )
        if row is None:
            return super()._announce_row(values)
        if not self._updates:
            return {}, False
        instance = self._instances[self._key.identity(row.key)]
        pairs = {name: (value, UNSET) for name, value in row.values.items()}
        return {}, self._announce_update(instance, pairs, self._fields)

    def _note(self, rows: Mapping[Hashable, Inserted]) -> None:
        new = self._load((row.key for row in rows.values() if row.is_new), refresh=True)
        updated = [row.key for row in rows.values() if not row.is_new]
        instances, present = self._load(updated), self._read(self._fields, updated)
        old = {self._key.identity(row.key): row.values for row in self._in_the_way.values()}
        for identity in rows:
            if identity in new:
                self._note_created(new[identity])
            else:
                self._note_update(
                    instances[identity],
                    old.get(identity, {}),
                    present[identity],
                    self._fields,
                    keep_pending=True,
                )
        if self._computed:
            self._load(updated)

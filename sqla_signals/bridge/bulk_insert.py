"""``{"signals": "rows"}`` for an INSERT: its rows are known by what RETURNING tells of them.

``pre_save`` gets an instance made up of the values given, in no session; what receivers assign to
it goes into the statement. Of an upsert the database says afterwards which rows were created:
PostgreSQL itself, elsewhere what was looked up under a lock before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, literal_column, select, tuple_
from sqlalchemy.orm.attributes import set_committed_value

from .._sqlalchemy import (
    altered,
    by_column,
    has_many_values,
    inserted_values,
    state_of,
    upsert_of,
)
from ..changes import UNSET, NewRow, PendingRow
from ..errors import BulkOptionError
from ..net import CREATED
from ..signals import pre_save
from .bulk_rows import Key, Rows, Values, Written
from .columns import is_expression
from .guard import IN_STATEMENT, guarded

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper

    from ..receivers import Receiver


class InsertedRows(Rows):
    """The row signals of one INSERT."""

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it wrote."""
        dialect = self._session.connection(bind_arguments=self._bind()).dialect
        try:
            self._upsert = upsert_of(self._statement, self._mapper)
        except TypeError:
            raise BulkOptionError(
                'execution option signals="rows": which rows this kind of upsert inserts and which '
                "it updates is not known; connect to post_bulk"
            ) from None
        if not dialect.insert_returning:
            raise BulkOptionError(
                f'execution option signals="rows": {dialect.name} has no INSERT … RETURNING, which '
                f"tells the rows that were inserted. Add the instances to the session instead"
            )
        self._tells_created = dialect.name == "postgresql" and self._upsert is not None
        if self._upsert is not None:
            self._check_key(self._upsert.updates.difference(self._upsert.target or ()))
            self._lock()
            if self._must_know and self._upsert.target is None:
                raise BulkOptionError(
                    'execution option signals="rows": say with index_elements= which rows are in '
                    "the way, so that they can be told from new ones"
                )
        given = self._given()
        in_the_way = self._in_the_way(given)
        given, called = self._announce(given, in_the_way)
        if called:
            in_the_way = self._in_the_way(given)
        # With a list SQLAlchemy inserts into each of several tables, and returns whole instances.
        joined = len(self._mapper.tables) > 1 and isinstance(self._context.parameters, list)
        cls: Any = self._mapper.class_
        own: list[Any] = [cls] if joined else [getattr(cls, name) for name in self._key]
        if self._tells_created:
            own.append(literal_column("xmax = 0"))
        result, returned = self._returning(self._statement, own)
        old = dict(in_the_way.values())
        rows: dict[Key, bool] = {}
        for row in returned:
            key = inspect(row[0]).identity if joined else row[: len(self._key)]
            # What one statement creates and updates again, it has created.
            rows.setdefault(key, bool(row[-1]) if self._tells_created else key not in old)
        self._note(rows, old)
        return result, len(rows)

    @property
    def _must_know(self) -> bool:
        """Whether rows that are updated have to be found before; nobody says so afterwards."""
        return self._upsert is not None and bool(self._upsert.updates) and not self._tells_created

    def _given(self) -> list[dict[str, Any]] | None:
        """The rows to be inserted, by attribute; ``None`` if the statement selects them."""
        stated = inserted_values(self._statement, self._mapper)
        parameters: Any = self._context.parameters
        if stated is None or not parameters:
            return stated
        many = by_column(parameters if isinstance(parameters, list) else [parameters], self._mapper)
        self._context.parameters = many if isinstance(parameters, list) else many[0]
        return [{**stated[0], **one} for one in many]

    def _in_the_way(self, given: list[dict[str, Any]] | None) -> dict[Key, tuple[Key, Values]]:
        """The rows that an upsert meets: by what identifies them, their keys and values."""
        target = self._upsert.target if self._upsert is not None else None
        if self._upsert is None or target is None:
            return {}
        if self._must_know and not self._tells_target(given, target):
            raise BulkOptionError(
                f'execution option signals="rows": give plain values for {", ".join(target)}, so '
                f"that rows that are in the way can be told from new ones, or connect to post_bulk"
            )
        cls = self._mapper.class_
        # A row that is given none, or SQL, is not known to be in the way of another.
        wanted = {
            values
            for one in given or ()
            if not any(map(is_expression, values := tuple(one.get(name) for name in target)))
        }
        columns = [getattr(cls, name) for name in target]
        names = list(self._upsert.updates)
        key = [getattr(cls, name) for name in self._key]
        query = select(*key, *columns, *(getattr(cls, name) for name in names))
        query = query.where(tuple_(*columns).in_(sorted(wanted, key=repr))).with_for_update(of=key)
        found: dict[Key, tuple[Key, Values]] = {}
        for row in self._query(query, autoflush=True):
            values = tuple(row)
            end = len(key) + len(columns)
            found[values[len(key) : end]] = (
                values[: len(key)],
                dict(zip(names, values[end:], strict=True)),
            )
        return found

    def _tells_target(self, given: list[dict[str, Any]] | None, target: Sequence[str]) -> bool:
        """Whether the values that a row may be in the way of are all known."""
        column_of = self._mapper.columns
        return given is not None and not any(
            is_expression(one[name])
            if name in one
            else column_of[name].default is not None or column_of[name].server_default is not None
            for one in given
            for name in target
        )

    def _announce(
        self,
        given: list[dict[str, Any]] | None,
        in_the_way: Mapping[Key, tuple[Key, Values]],
    ) -> tuple[list[dict[str, Any]] | None, bool]:
        """Send ``pre_save`` for each row; return the rows after that, and if anybody was called."""
        target = (self._upsert.target if self._upsert is not None else None) or ()
        instances = self._load([key for key, _ in in_the_way.values()])
        changed: dict[int, Values] = {}
        called = False
        with guarded(self._session, IN_STATEMENT):
            for place, values in enumerate(given or ()):
                known = in_the_way.get(tuple(values.get(name) for name in target))
                if known is None:
                    assigned, receivers = self._announce_new(values)
                    called = called or bool(receivers)
                    if assigned:
                        changed[place] = assigned
                elif self._upsert is not None and self._upsert.updates:
                    key, old = known
                    pairs = {name: (value, UNSET) for name, value in old.items()}
                    called |= self._announce_update(instances[key], pairs, self._upsert.updates)
        if changed and given is not None:
            self._assign(changed)
            given = [{**one, **changed.get(place, {})} for place, one in enumerate(given)]
        return given, called

    def _announce_new(self, values: Values) -> tuple[Values, Sequence[Receiver]]:
        """Send ``pre_save`` for a row to be inserted; return what was assigned, and who heard."""
        model = self._calls[self._mapper_for(values)]
        receivers, columns = model.pre_save.receivers(), model.columns
        if not receivers:
            return {}, ()
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
        return assigned, receivers

    def _mapper_for(self, values: Values) -> Mapper[Any]:
        if self._mapper.polymorphic_on is None:
            return self._mapper
        name = self._mapper.get_property_by_column(self._mapper.polymorphic_on).key
        return self._mapper.polymorphic_map.get(values.get(name), self._mapper)

    def _assign(self, changed: Mapping[int, Values]) -> None:
        """Let the statement insert what ``pre_save`` receivers have assigned."""
        parameters: Any = self._context.parameters
        if isinstance(parameters, list):
            self._context.parameters = [
                {**one, **changed.get(place, {})} for place, one in enumerate(parameters)
            ]
        elif parameters:
            self._context.parameters = {**parameters, **changed[0]}
        elif has_many_values(self._statement):
            raise BulkOptionError(
                'execution option signals="rows": a pre_save receiver has assigned '
                f"{', '.join(sorted(next(iter(changed.values()))))}, which cannot be put into a "
                "list in values(). Give the list as the parameters of execute()"
            )
        else:
            self._statement = self._statement.values(
                {getattr(self._mapper.class_, name): value for name, value in changed[0].items()}
            )

    def _note(self, rows: Mapping[Key, bool], old: Mapping[Key, Values]) -> None:
        created = [key for key in rows if rows[key]]
        instances = self._load(created, refresh=True)  # of rows before, there may be stale ones
        present: dict[Key, Values] = {}
        fields: frozenset[str] = frozenset()
        if len(created) < len(rows):
            assert self._upsert is not None
            updated, fields = [key for key in rows if not rows[key]], self._upsert.updates
            instances |= self._load(updated)
            present = self._read(fields, updated)
        for key in rows:
            instance = instances[key]
            if rows[key]:
                altered(self._session, state_of(instance))
                values = dict(state_of(instance).dict)
                changes = NewRow(self._model(instance).columns.absent, values)
                self._written.append(Written(CREATED, instance, changes, None))
            else:
                self._note_update(instance, old.get(key, {}), present[key], fields)

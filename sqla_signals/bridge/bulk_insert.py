"""``{"signals": "rows"}`` for an INSERT: its rows are known by what RETURNING tells of them.

``pre_save`` gets an instance made up of the values given, in no session; what receivers assign to
it goes into the statement. Of an upsert the database says afterwards which rows were created:
PostgreSQL itself, elsewhere what was looked up under a lock before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import literal_column, select, tuple_
from sqlalchemy.orm.attributes import set_committed_value

from .._sqlalchemy import has_many_values, inserted_values, state_of, upsert_of
from ..changes import UNSET, NewRow, PendingRow
from ..errors import BulkOptionError
from ..net import CREATED
from ..signals import pre_save
from .bulk_rows import Key, Rows, Values, Written
from .columns import is_expression
from .guard import guarded_bulk

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper


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
        tells_created = dialect.name == "postgresql" and self._upsert is not None
        if self._upsert is not None:
            self._lock()
            if self._upsert.updates and self._upsert.target is None and not tells_created:
                raise BulkOptionError(
                    'execution option signals="rows": say with index_elements= which rows are in '
                    "the way, so that they can be told from new ones"
                )
        given = self._given()
        in_the_way = self._in_the_way(given)
        self._announce(given, in_the_way)
        own = [getattr(self._mapper.class_, name) for name in self._key]
        if tells_created:
            own.append(literal_column("xmax = 0"))
        # For the caller. SQLite counts while the rows are fetched: nothing is to be kept before.
        counts = {} if dialect.name == "sqlite" else {"preserve_rowcount": True}
        result: Any = self._context.invoke_statement(
            self._statement.returning(*own), execution_options=counts
        )
        theirs = len(result.keys()) - len(own)
        frozen = result.freeze()
        old = dict(in_the_way.values())
        rows: dict[Key, bool] = {}
        for row in frozen():
            key = tuple(row[theirs : theirs + len(self._key)])
            rows[key] = bool(row[-1]) if tells_created else key not in old
        self._note(rows, old)
        if theirs:
            return frozen().columns(*range(theirs)), len(rows)
        return getattr(result, "raw", None) or frozen(), len(rows)

    def _given(self) -> list[dict[str, Any]] | None:
        """The rows to be inserted, by attribute; ``None`` if the statement selects them."""
        stated = inserted_values(self._statement, self._mapper)
        parameters: Any = self._context.parameters
        if stated is None or not parameters:
            return stated
        many = parameters if isinstance(parameters, list) else [parameters]
        return [{**stated[0], **one} for one in many]

    def _in_the_way(self, given: list[dict[str, Any]] | None) -> dict[Key, tuple[Key, Values]]:
        """The rows that an upsert meets: by what identifies them, their keys and values."""
        target = self._upsert.target if self._upsert is not None else None
        if self._upsert is None or target is None or given is None:
            return {}
        for one in given:
            if any(name not in one or is_expression(one[name]) for name in target):
                return {}
        cls = self._mapper.class_
        wanted = {tuple(one[name] for name in target) for one in given}
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

    def _announce(
        self,
        given: list[dict[str, Any]] | None,
        in_the_way: Mapping[Key, tuple[Key, Values]],
    ) -> None:
        target = (self._upsert.target if self._upsert is not None else None) or ()
        instances = self._load([key for key, _ in in_the_way.values()])
        changed: dict[int, Values] = {}
        with guarded_bulk(self._session):
            for place, values in enumerate(given or ()):
                known = in_the_way.get(tuple(values.get(name) for name in target))
                if known is None:
                    assigned = self._announce_new(values)
                    if assigned:
                        changed[place] = assigned
                elif self._upsert is not None and self._upsert.updates:
                    key, old = known
                    pairs = {name: (value, UNSET) for name, value in old.items()}
                    self._announce_update(instances[key], pairs, self._upsert.updates)
        if changed:
            self._assign(changed)

    def _announce_new(self, values: Values) -> Values:
        """Send ``pre_save`` for a row to be inserted; return what the receivers have assigned."""
        model = self._calls[self._mapper_for(values)]
        receivers, columns = model.pre_save.receivers(), model.columns
        if not receivers:
            return {}
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
        return {
            name: value
            for name, value in state.dict.items()
            if name in columns.keys and (name not in plain or value is not plain[name])
        }

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
        instances = self._load(rows, refresh=self._upsert is not None)
        for key, created in rows.items():
            instance = instances[key]
            values = dict(state_of(instance).dict)
            if created:
                changes = NewRow(self._model(instance).columns.absent, values)
                self._written.append(Written(CREATED, instance, changes, None))
            else:
                assert self._upsert is not None
                self._note_update(instance, old.get(key, {}), values, self._upsert.updates)

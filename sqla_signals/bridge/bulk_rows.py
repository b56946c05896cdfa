"""``execution_options={"signals": "rows"}``: the signals of each row that a statement changes.

The rows are looked up and locked first, and the statement is restricted to them, so that what
another connection adds in between is neither changed nor missing. SQLite knows no row locks; there
an UPDATE of no row takes the lock of the whole database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import bindparam, false, select, tuple_, update
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from .._sqlalchemy import dml_entity, set_values, state_of, with_options_of
from ..changes import UNSET, Change, Changes, NewRow, Pairs
from ..dispatch import active_mutes
from ..errors import BulkOptionError
from ..net import CREATED, DELETED, UPDATED, Effect, Kind, Source
from ..signals import post_delete, post_save, pre_delete, pre_save
from . import owed, transactions
from .columns import is_expression
from .guard import guarded_bulk

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql import ColumnElement

    from .calls import Calls, ModelCalls

Key = tuple[Any, ...]
Values = Mapping[str, Any]

MAX_PARAMETERS: Final = 1000
"""How many keys are bound as parameters; more are written into the statement.

Drivers take some tens of thousands at most.
"""


class Written(NamedTuple):
    """What the statement has done to one row."""

    kind: Kind
    instance: Any
    changes: Mapping[str, Change]
    fields: frozenset[str] | None


class Rows:
    """The row signals of one statement."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        self._context = context
        self._session = context.session
        self._statement: Any = context.statement
        self._mapper = mapper
        self._calls = calls
        self._using = self._session.get_bind(**context.bind_arguments)
        self._key = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        self._written: list[Written] = []

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it changed."""
        self._lock()
        if self._context.is_delete:
            return self._delete()
        parameters: Any = self._context.parameters
        if isinstance(parameters, list):
            return self._update_many(parameters)
        return self._update()

    # -- the three kinds ---------------------------------------------------------------------------

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
        along = self._written_along()
        given = {tuple(one.get(name) for name in self._key): one for one in parameters}
        values = {
            key: {name: value for name, value in one.items() if name not in self._key}
            for key, one in given.items()
        }
        fields = frozenset(name for one in values.values() for name in one) | along
        rows = self._select(fields, given)
        instances = self._load(rows)
        if self._announce_updates(instances, rows, values):
            rows = self._select(fields, rows)
        if len(rows) < len(given) and self._statement.whereclause is None:
            raise StaleDataError(
                f"UPDATE statement on table {self._mapper.local_table!s} expected to update "
                f"{len(given)} row(s); {len(rows)} were matched."
            )
        if rows:
            self._context.parameters = [one for key, one in given.items() if key in rows]
        result = self._context.invoke_statement()
        self._note_updates(instances, rows, {key: frozenset(values[key]) | along for key in rows})
        return result, len(rows)

    def _check_key(self, values: Values) -> None:
        if not set(self._key).isdisjoint(values):
            raise BulkOptionError(
                f'execution option signals="rows": the statement sets the primary key of '
                f"{self._mapper.class_.__name__}, so that its rows cannot be found again. Change "
                f"the instances instead, or connect to post_bulk"
            )

    def _written_along(self) -> frozenset[str]:
        return frozenset(
            prop.key
            for prop in self._mapper.column_attrs
            for column in prop.columns
            if getattr(column, "table", None) is self._mapper.local_table
            and (column.onupdate is not None or column.server_onupdate is not None)
        )

    # -- finding the rows --------------------------------------------------------------------------

    def _lock(self) -> None:
        connection = self._session.connection(bind_arguments=self._bind())
        if connection.dialect.name == "sqlite":
            if self._may_autoflush():
                self._session.flush()
            table: Any = self._mapper.local_table
            column = next(iter(table.primary_key))
            connection.execute(update(table).values({column: column}).where(false()))

    def _bind(self) -> dict[str, Any]:
        given = self._context.bind_arguments
        return {name: value for name, value in given.items() if name in ("mapper", "bind")}

    def _may_autoflush(self) -> bool:
        given = self._context.execution_options.get("autoflush", True)
        return bool(given) and self._session.autoflush

    def _query(self, query: Any, autoflush: bool) -> Result[Any]:
        parameters = self._context.parameters
        return self._session.execute(
            query,
            parameters if isinstance(parameters, dict) else None,
            execution_options={"autoflush": autoflush and self._may_autoflush()},
            bind_arguments=self._bind(),
        )

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

    def _are(self, entity: Any, keys: Iterable[Key]) -> ColumnElement[bool]:
        columns = [getattr(entity, name) for name in self._key]
        wanted = list(keys)
        if not wanted:
            return false()
        one = columns[0] if len(columns) == 1 else tuple_(*columns)
        values = [key[0] for key in wanted] if len(columns) == 1 else wanted
        if len(wanted) <= MAX_PARAMETERS:
            return one.in_(values)
        many: Any = bindparam(None, values, expanding=True, literal_execute=True, unique=True)
        return one.in_(many)

    def _restricted(self, keys: Iterable[Key]) -> Any:
        return self._statement.where(self._are(dml_entity(self._statement), keys))

    def _load(self, keys: Iterable[Key], *, refresh: bool = False) -> dict[Key, Any]:
        """The instances of these rows, with nothing expired; in that order."""
        identity = {key: self._mapper.identity_key_from_primary_key(key) for key in keys}
        known = self._session.identity_map
        found: dict[Key, Any] = {}
        for key, one in identity.items():
            instance = known.get(one)
            if instance is not None and not state_of(instance).expired_attributes:
                found[key] = instance
        missing = list(identity) if refresh else [key for key in identity if key not in found]
        if missing:
            query = select(self._mapper).where(self._are(self._mapper.class_, missing))
            query = query.execution_options(populate_existing=refresh)
            for instance in self._query(query, autoflush=False).unique().scalars():
                found[tuple(state_of(instance).key[1])] = instance  # type: ignore[index]
        return {key: found[key] for key in identity if key in found}

    # -- sending -----------------------------------------------------------------------------------

    def _model(self, instance: Any) -> ModelCalls:
        return self._calls[state_of(instance).manager.mapper]

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

    def _announce_update(self, instance: Any, pairs: Pairs, fields: frozenset[str]) -> bool:
        model = self._model(instance)
        receivers = model.pre_save.receivers()
        model.save(
            pre_save,
            receivers,
            instance,
            False,
            Changes(pairs),
            fields,
            self._calls.raw,
            self._using,
        )
        return bool(receivers)

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

    def _note_update(self, instance: Any, old: Values, new: Values, fields: frozenset[str]) -> None:
        same = self._model(instance).columns.same
        pairs = {
            name: (old.get(name, UNSET), new[name])
            for name in fields
            if name not in old or not same(name, old[name], new[name])
        }
        self._written.append(Written(UPDATED, instance, Changes(pairs), fields))

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

    def send_post(self) -> None:
        """Send the ``post_`` signals, and keep for the end of the transaction what is needed."""
        effects = [effect for one in self._written if (effect := self._effect(one)) is not None]
        if effects:
            transactions.frame_of(self._session).add(effects)
            owed.flushed(self._session, effects)
        with guarded_bulk(self._session):
            for kind, instance, changes, fields in self._written:
                model = self._model(instance)
                if kind is DELETED:
                    receivers = model.post_delete.receivers()
                    model.delete(post_delete, receivers, instance, None, self._using)
                else:
                    model.save(
                        post_save,
                        model.post_save.receivers(),
                        instance,
                        kind is CREATED,
                        changes,
                        fields,
                        self._calls.raw,
                        self._using,
                    )

    def _effect(self, one: Written) -> Effect | None:
        """What the transaction keeps of a row, if somebody waits for its end."""
        model = self._model(one.instance)
        undone = model.awaits("rollback")
        if not undone and not model.awaits("commit") and not model.awaits("durable"):
            return None
        state, columns = state_of(one.instance), model.columns
        values = columns.values(state) if undone or one.kind is not UPDATED else None
        changes: Mapping[str, Change] = {}
        if one.kind is CREATED:
            changes = NewRow(columns.absent, values or {})
        elif one.kind is UPDATED:
            changes = Changes(columns.own_pairs(dict(one.changes)))
        return Effect(
            one.kind,
            state.key,
            one.instance,
            Source(
                columns.same,
                columns.unfetched,
                self._calls.raw,
                self._using,
                (active_mutes(),),
            ),
            changes=changes,
            along=(one.fields or frozenset()).difference(one.changes),
            values=values if undone or one.kind is DELETED else None,
        )

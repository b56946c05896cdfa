"""``execution_options={"signals": "rows"}``: the signals of each row that a statement writes.

What every kind of statement needs for that: a lock, the instances of rows, and the sending. SQLite
knows no row locks; there an UPDATE of no row takes the lock of the whole database.

The queries here are not seen by other listeners for ``do_orm_execute``: these have had their say
about the statement, which alone decides which rows it is about, and where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Column, false, select, update
from sqlalchemy.orm import selectin_polymorphic
from sqlalchemy.orm.exc import StaleDataError

from ..._sqlalchemy.instances import set_written, state_of
from ..._sqlalchemy.mappers import key_columns_of
from ..._sqlalchemy.statements import execution_options_of
from ..._sqlalchemy.unit_of_work import flush_as_query_does
from ...changes.change import UNSET, Change, Changes, NewRow, Pairs, diff_of
from ...changes.effects import CREATED, DELETED, UPDATED, Effect, Kind, Source
from ...errors import BulkOptionError
from ...receivers.dispatch import active_mutes
from ...signals.builtin import post_delete, post_save, pre_save
from ..calling.audience import audience_of
from ..calling.guard import IN_STATEMENT, guarded
from ..transaction import durable as owed
from ..transaction import frames as transactions
from .binds import bind_of, one_bind
from .keys import Key, KeyColumns

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql import Select

    from ..calling.calls import Calls, ModelCalls

Values = Mapping[str, Any]


class Row(NamedTuple):
    """A row that was looked up."""

    key: Key
    values: Values
    """Those that the statement is going to set, as they are before it."""


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
        self._parameters: Any = context.parameters
        self._options = execution_options_of(context)
        self._mapper = mapper
        self._calls = calls
        self._using = bind_of(context, mapper)
        self._names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        """The attributes of the primary key."""
        with one_bind(self._session, mapper, self._using):
            # Some dialects know what their database can do once they are connected.
            connection = self._session.connection(bind_arguments={"bind": self._using})
        self._connection = connection
        name = "schema_translate_map"
        local = context.local_execution_options
        self._schema: dict[str, Any] = {name: local[name]} if name in local else {}
        self._dialect = connection.dialect
        self._key = KeyColumns(mapper.primary_key, self._dialect)
        self._table: Any = mapper.local_table
        """What the statement writes; of a joined subclass it may be its last table alone."""
        self._key_columns: Sequence[Any] = key_columns_of(mapper)
        self._computed = {
            prop.key
            for one in mapper.self_and_descendants
            for prop in one.column_attrs
            if prop.expire_on_flush and not isinstance(prop.columns[0], Column)
        }
        """The attributes that a query computes, which a flush expires."""
        self._written: list[Written] = []
        self.executed: bool = False
        """Whether the statement was executed, so that what fails now has to undo it."""

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it wrote."""
        raise NotImplementedError

    def _flush(self) -> None:
        """Flush what is pending, as SQLAlchemy does before it executes a statement."""
        if self._options.get("autoflush", True):
            flush_as_query_does(self._session)

    def _lock(self) -> None:
        if self._dialect.name == "sqlite":
            column = self._key_columns[0]
            nothing = update(column.table).values({column: column}).where(false())
            self._connection.execute(self._like_statement(nothing), execution_options=self._schema)

    def _like_statement(self, other: Any) -> Any:
        """Another statement with the execution options that the user's statement has itself."""
        return other.execution_options(**self._statement.get_execution_options())

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Let all that is read and written go to the bind of the statement, and flush nothing."""
        with self._session.no_autoflush, one_bind(self._session, self._mapper, self._using):
            yield

    def _query(self, query: Select[Any], *, refresh: bool = False) -> Result[Any]:
        """The result of a query on the bind of the statement, and in its schema.

        To be fetched inside of :meth:`_together`, like what is loaded along with it.
        """
        self._context.parameters = self._parameters if isinstance(self._parameters, dict) else None
        return self._context.invoke_statement(
            self._like_statement(query),
            execution_options={
                **self._schema,
                "autoflush": False,
                "populate_existing": refresh,
                "stream_results": False,
                "yield_per": None,
            },
            bind_arguments={"bind": self._using},
        )

    def _column(self, name: str) -> Any:
        """The column of an attribute in the table that the statement writes."""
        for column in self._mapper.column_attrs[name].columns:
            if self._table.c.contains_column(column):
                return column
        raise BulkOptionError(
            f'execution option signals="rows": {self._mapper.class_.__name__}.{name} is not in the '
            f"table {self._table!s}. Execute a statement on the class whose table it is in"
        )

    def _load(self, keys: Iterable[Key], *, refresh: bool = False) -> dict[Hashable, Any]:
        """The instances of these rows, with nothing expired; in that order."""
        token = self._options.get("identity_token")
        wanted = {
            self._key.identity(key): self._mapper.identity_key_from_primary_key(key, token)
            for key in keys
        }
        found: dict[Hashable, Any] = {}
        try:
            for identity, key in wanted.items():
                instance = self._session.identity_map.get(key)
                if instance is not None and not state_of(instance).expired_attributes:
                    found[identity] = instance
        except TypeError:
            raise BulkOptionError(
                f'execution option signals="rows": SQLAlchemy loads no instances of '
                f"{self._mapper.class_.__name__}, whose primary key has values that are not "
                f"hashable. Connect to post_bulk"
            ) from None
        missing = [
            tuple(key[1]) for identity, key in wanted.items() if refresh or identity not in found
        ]
        if missing:
            with self._together():
                result = self._query(self._entities(missing), refresh=refresh)
                # Of a row whose key is NULL the ORM makes None.
                instances = [one for one in result.unique().scalars() if one is not None]
            for instance in instances:
                found[self._key.identity(tuple(state_of(instance).key[1]))] = instance  # type: ignore[index]
        return self._all_of(found, wanted)

    def _entities(self, keys: Iterable[Key]) -> Select[Any]:
        mapper, cls = self._mapper, self._mapper.class_
        attributes = [getattr(cls, name) for name in self._names]
        query = select(cls).where(self._key.among(attributes, keys))
        subclasses = [one.class_ for one in mapper.self_and_descendants if one is not mapper]
        if subclasses and not any(one.concrete for one in mapper.self_and_descendants):
            query = query.options(selectin_polymorphic(cls, subclasses))
        return query

    def _read(self, names: Iterable[str], keys: Iterable[Key]) -> dict[Hashable, Values]:
        """The present values of these rows; in that order."""
        names, keys = list(names), list(keys)
        if not keys:
            return {}
        query: Any = select(*self._key_columns, *map(self._column, names))
        query = query.select_from(self._table)
        query = query.where(self._key.among(self._key_columns, keys))
        found = {self._key.identity(row.key): row.values for row in self._rows(query, names)}
        return self._all_of(found, map(self._key.identity, keys))

    def _rows(self, query: Select[Any], names: Sequence[str]) -> Iterator[Row]:
        """What a query for the key and these attributes finds."""
        size = len(self._key)
        for row in self._tuples(query):
            yield Row(row[:size], dict(zip(names, row[size:], strict=True)))

    def _tuples(self, query: Select[Any]) -> Iterator[tuple[Any, ...]]:
        with self._together():
            found = self._query(query).all()
        return map(tuple, found)

    def _all_of(
        self, found: Mapping[Hashable, Any], identities: Iterable[Hashable]
    ) -> dict[Hashable, Any]:
        try:
            return {identity: found[identity] for identity in identities}
        except KeyError as error:
            kind = StaleDataError if self.executed else BulkOptionError
            raise kind(
                f'execution option signals="rows": SQLAlchemy loads no instance of '
                f"{self._mapper.class_.__name__} for the row {error}. Connect to post_bulk"
            ) from None

    def _execute(self, statement: Any, **options: Any) -> Result[Any]:
        """Execute the statement, or what was made of it."""
        self._context.parameters = self._parameters
        with self._together():
            result: Result[Any] = self._context.invoke_statement(
                statement, execution_options=options, bind_arguments={"bind": self._using}
            )
        self.executed = True
        return result

    def _returning(
        self, statement: Any, own: Sequence[Any], **options: Any
    ) -> tuple[Result[Any], list[Key]]:
        """Execute a statement; the result for the caller, and what it returns of ``own``."""
        with self._together():
            result: Any = self._execute(statement.returning(*own), **options)
            frozen = result.freeze()
        theirs = len(result.keys()) - len(own)
        returned = [tuple(row[theirs:]) for row in frozen()]
        if theirs:
            return frozen().columns(*range(theirs)), returned
        result = getattr(result, "raw", None) or frozen()
        result.rowcount = len(returned)  # SQLite has counted none before they were fetched
        return result, returned

    def _written_with(
        self,
        names: Iterable[str],
        tables: Collection[Any],
        defaults: Collection[str] = ("onupdate", "server_onupdate"),
    ) -> frozenset[str]:
        """These attributes, and those that an UPDATE of the tables sets besides."""
        return frozenset(names).union(
            prop.key
            for prop in self._mapper.column_attrs
            for column in prop.columns
            if getattr(column, "table", None) in tables
            and any(getattr(column, default) is not None for default in defaults)
        )

    def _check_key(self, names: Iterable[str]) -> None:
        if not set(self._names).isdisjoint(names):
            raise BulkOptionError(
                f'execution option signals="rows": the statement sets the primary key of '
                f"{self._mapper.class_.__name__}, so that its rows cannot be found again. Change "
                f"the instances instead, or connect to post_bulk"
            )

    def _model(self, instance: Any) -> ModelCalls:
        return self._calls[state_of(instance).manager.mapper]

    def _announce_update(self, instance: Any, pairs: Pairs, fields: frozenset[str]) -> bool:
        model = self._model(instance)
        receivers = model.receivers(pre_save)
        model.save(
            pre_save,
            receivers,
            instance,
            False,
            Changes(diff_of(pairs)),
            fields,
            self._calls.raw,
            self._using,
        )
        return bool(receivers)

    def _note_update(
        self,
        instance: Any,
        old: Values,
        new: Values,
        fields: frozenset[str],
        *,
        keep_pending: bool,
    ) -> None:
        set_written(self._session, instance, new, keep_pending=keep_pending)
        stale = self._computed.intersection(state_of(instance).dict) if self._computed else ()
        if stale:
            self._session.expire(instance, stale)
        same = self._model(instance).columns.same
        pairs = {
            name: (old.get(name, UNSET), new[name])
            for name in fields
            if name not in old or not same(name, old[name], new[name])
        }
        self._written.append(Written(UPDATED, instance, Changes(diff_of(pairs)), fields))

    def send_post(self) -> None:
        """Send the ``post_`` signals, and keep for the end of the transaction what is needed."""
        effects = [effect for one in self._written if (effect := self._effect(one)) is not None]
        if effects:
            transactions.frame_of(self._session).add(effects)
            owed.flushed(self._session, effects)
        with guarded(self._session, IN_STATEMENT):
            for kind, instance, changes, fields in self._written:
                model = self._model(instance)
                if kind is DELETED:
                    receivers = model.receivers(post_delete)
                    model.delete(post_delete, receivers, instance, None, self._using)
                else:
                    model.save(
                        post_save,
                        model.receivers(post_save),
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
        audience = audience_of(model.mapper)
        if not audience.outlasts_flush:
            return None
        undone = audience.waits["rollback"]
        state, columns = state_of(one.instance), model.columns
        values = columns.values(state) if undone or one.kind is not UPDATED else None
        changes: Mapping[str, Change] = {}
        if one.kind is CREATED:
            changes = NewRow(columns.absent, values or {})
        elif one.kind is UPDATED:
            changes = Changes(columns.own_diff(columns.diff_of(one.changes)))
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
            unknown=frozenset(),
            values=values if undone or one.kind is DELETED else None,
        )

"""The table that a statement writes: how its rows are read, locked and written.

Everything goes to the bind of the statement, and to its schema. Other listeners for
``do_orm_execute`` do not see these queries: they have had their say about the statement, which
alone decides about which rows it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Column, false, select, update
from sqlalchemy.orm import selectin_polymorphic
from sqlalchemy.orm.exc import StaleDataError

from ..._sqlalchemy.instances import state_of
from ..._sqlalchemy.mappers import key_columns_of
from ..._sqlalchemy.statements import execution_options_of
from ..._sqlalchemy.unit_of_work import flush_as_query_does
from ...errors import BulkOptionError
from .binds import bind_of, one_bind
from .keys import Key, KeyColumns
from .refusals import refusal

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql import Select

Values = Mapping[str, Any]


class Row(NamedTuple):
    """A row that was looked up."""

    key: Key
    values: Values
    """Those that the statement is going to set, as they are before it."""


class WrittenTable:
    """The table of one statement.

    :param by_key: whether the statement is an UPDATE by primary key.
    """

    def __init__(
        self, context: ORMExecuteState, mapper: Mapper[Any], *, by_key: bool = False
    ) -> None:
        self._context = context
        self._session = context.session
        self._statement: Any = context.statement
        self._parameters = context.parameters if isinstance(context.parameters, dict) else None
        self._mapper = mapper
        self.bind = bind_of(context, mapper)
        with one_bind(self._session, mapper, self.bind):
            # Some dialects know what their database can do once they are connected.
            self._connection = self._session.connection(bind_arguments={"bind": self.bind})
        self.dialect = self._connection.dialect
        self.table: Any = mapper.local_table
        """Of a joined subclass, its own table."""
        self.key_columns: Sequence[Any] = key_columns_of(mapper)
        options: Mapping[str, Any] = context.local_execution_options
        if by_key:
            # orm/bulk_persistence.py, _bulk_update(), writes each table of a joined subclass, and
            # hands no execution options on.
            self.table, self.key_columns = mapper.persist_selectable, mapper.primary_key
            options = self._connection.get_execution_options()
        name = "schema_translate_map"
        self._schema = {name: options.get(name)} if by_key or name in options else {}
        self.key = KeyColumns(mapper.primary_key, self.dialect)
        self.key_names = [
            mapper.get_property_by_column(column).key for column in mapper.primary_key
        ]
        """The attributes of the primary key."""
        self.computed = {
            prop.key
            for one in mapper.self_and_descendants
            for prop in one.column_attrs
            if prop.expire_on_flush and not isinstance(prop.columns[0], Column)
        }
        """The attributes that a query computes, which a flush expires."""
        self.executed: bool = False
        """Whether the statement was executed, so that what fails now has to undo it."""

    def column(self, name: str) -> Any:
        """The column of an attribute in this table."""
        for column in self._mapper.column_attrs[name].columns:
            if self.table.c.contains_column(column):
                return column
        raise refusal(
            f"{self._mapper.class_.__name__}.{name} is not in the table {self.table!s}. Execute a "
            f"statement on the class whose table it is in"
        )

    def flush(self) -> None:
        """Flush what is pending, as SQLAlchemy does before it executes a statement."""
        if execution_options_of(self._context).get("autoflush", True):
            flush_as_query_does(self._session)

    def lock(self) -> None:
        """Lock the whole database if it is one of SQLite, which has no locks of rows."""
        if self.dialect.name == "sqlite":
            column = self.key_columns[0]
            nothing = update(column.table).values({column: column}).where(false())
            self._connection.execute(self._with_options(nothing), execution_options=self._schema)

    def load(self, keys: Iterable[Key], *, refresh: bool = False) -> dict[Hashable, Any]:
        """The instances of these rows, with nothing expired; in that order."""
        token = execution_options_of(self._context).get("identity_token")
        wanted = {
            self.key.identity(key): self._mapper.identity_key_from_primary_key(key, token)
            for key in keys
        }
        found: dict[Hashable, Any] = {}
        try:
            for identity, key in wanted.items():
                instance = self._session.identity_map.get(key)
                if instance is not None and not state_of(instance).expired_attributes:
                    found[identity] = instance
        except TypeError:
            raise refusal(
                f"SQLAlchemy loads no instances of {self._mapper.class_.__name__}, whose primary "
                f"key has values that are not hashable. Connect to post_bulk"
            ) from None
        missing = [
            tuple(key[1]) for identity, key in wanted.items() if refresh or identity not in found
        ]
        if missing:
            with self._together():
                result = self._query(self._entities(missing), refresh=refresh)
                # The ORM makes None of a row whose key is NULL.
                instances = [one for one in result.unique().scalars() if one is not None]
            for instance in instances:
                found[self.key.identity(tuple(state_of(instance).key[1]))] = instance  # type: ignore[index]
        return self._all_of(found, wanted)

    def _entities(self, keys: Iterable[Key]) -> Select[Any]:
        mapper, cls = self._mapper, self._mapper.class_
        attributes = [getattr(cls, name) for name in self.key_names]
        query = select(cls).where(self.key.among(attributes, keys))
        subclasses = [one.class_ for one in mapper.self_and_descendants if one is not mapper]
        if subclasses and not any(one.concrete for one in mapper.self_and_descendants):
            query = query.options(selectin_polymorphic(cls, subclasses))
        return query

    def read(self, names: Iterable[str], keys: Iterable[Key]) -> dict[Hashable, Values]:
        """The present values of these rows; in that order."""
        names, keys = list(names), list(keys)
        if not keys:
            return {}
        query: Any = select(*self.key_columns, *map(self.column, names)).select_from(self.table)
        query = query.where(self.key.among(self.key_columns, keys))
        found = {self.key.identity(row.key): row.values for row in self.rows(query, names)}
        return self._all_of(found, map(self.key.identity, keys))

    def rows(self, query: Select[Any], names: Sequence[str]) -> Iterator[Row]:
        """The rows that a query finds, which selects the key and these attributes."""
        size = len(self.key)
        for row in self.tuples(query):
            yield Row(row[:size], dict(zip(names, row[size:], strict=True)))

    def tuples(self, query: Select[Any]) -> Iterator[tuple[Any, ...]]:
        """The rows that a query finds, as they are."""
        with self._together():
            found = self._query(query).all()
        return map(tuple, found)

    def _all_of(
        self, found: Mapping[Hashable, Any], identities: Iterable[Hashable]
    ) -> dict[Hashable, Any]:
        try:
            return {identity: found[identity] for identity in identities}
        except KeyError as error:
            raise refusal(
                f"SQLAlchemy loads no instance of {self._mapper.class_.__name__} for the row "
                f"{error}. Connect to post_bulk",
                StaleDataError if self.executed else BulkOptionError,
            ) from None

    def execute(self, statement: Any, parameters: Any, **options: Any) -> Result[Any]:
        """Execute the user's statement, or what was made of it."""
        self._context.parameters = parameters
        with self._together():
            result: Result[Any] = self._context.invoke_statement(
                statement, execution_options=options, bind_arguments={"bind": self.bind}
            )
        self.executed = True
        return result

    def execute_returning(
        self, statement: Any, parameters: Any, own: Sequence[Any], **options: Any
    ) -> tuple[Result[Any], list[Key]]:
        """Execute a statement that also returns ``own``; the result without that, and that."""
        with self._together():
            result: Any = self.execute(statement.returning(*own), parameters, **options)
            frozen = result.freeze()
        theirs = len(result.keys()) - len(own)
        returned = [tuple(row[theirs:]) for row in frozen()]
        if theirs:
            return frozen().columns(*range(theirs)), returned
        result = getattr(result, "raw", None) or frozen()
        result.rowcount = len(returned)  # SQLite has counted none before they were fetched
        return result, returned

    def _query(self, query: Select[Any], *, refresh: bool = False) -> Result[Any]:
        """The result of a query, to be fetched inside of :meth:`_together`."""
        self._context.parameters = self._parameters
        return self._context.invoke_statement(
            self._with_options(query),
            execution_options={
                **self._schema,
                "autoflush": False,
                "populate_existing": refresh,
                "stream_results": False,
                "yield_per": None,
            },
            bind_arguments={"bind": self.bind},
        )

    def _with_options(self, other: Any) -> Any:
        """Another statement with the execution options that the user's statement has itself."""
        return other.execution_options(**self._statement.get_execution_options())

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Let all that is read and written go to one bind, and flush nothing."""
        with self._session.no_autoflush, one_bind(self._session, self._mapper, self.bind):
            yield

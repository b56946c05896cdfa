"""``execution_options={"signals": "rows"}``: the signals of each row that a statement writes.

What every kind of statement needs for that: a lock, the instances of rows, and the sending. SQLite
knows no row locks; there an UPDATE of no row takes the lock of the whole database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import bindparam, false, select, tuple_, update
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from .._sqlalchemy import altered, state_of
from ..changes import UNSET, Change, Changes, NewRow, Pairs, diff_of
from ..dispatch import active_mutes
from ..errors import BulkOptionError
from ..net import CREATED, DELETED, UPDATED, Effect, Kind, Source
from ..signals import post_delete, post_save, pre_save
from . import owed, transactions
from .guard import IN_STATEMENT, guarded

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
        self.executed: bool = False
        """Whether the statement was executed, so that what fails now has to undo it."""

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it wrote."""
        raise NotImplementedError

    # -- finding the rows --------------------------------------------------------------------------

    def _lock(self) -> None:
        connection = self._session.connection(bind_arguments=self._bind())
        if connection.dialect.name == "sqlite":
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
            # "signals" for listeners that restrict each SELECT, to leave this one alone.
            execution_options={
                "autoflush": autoflush and self._may_autoflush(),
                "signals": "rows",
            },
            bind_arguments=self._bind(),
        )

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
        return self._all_of(found, identity)

    def _read(self, names: Iterable[str], keys: Iterable[Key]) -> dict[Key, Values]:
        """The present values of these rows; in that order."""
        cls, names, wanted = self._mapper.class_, list(names), list(keys)
        if not wanted:
            return {}
        columns = [getattr(cls, name) for name in (*self._key, *names)]
        size = len(self._key)
        found = {
            tuple(row[:size]): dict(zip(names, row[size:], strict=True))
            for row in self._query(select(*columns).where(self._are(cls, wanted)), autoflush=False)
        }
        return self._all_of(found, wanted)

    def _all_of(self, found: Mapping[Key, Any], keys: Iterable[Key]) -> dict[Key, Any]:
        try:
            return {key: found[key] for key in keys}
        except KeyError as error:
            raise StaleDataError(
                f"the row {error} of {self._mapper.class_.__name__} cannot be read. If a listener "
                f"for do_orm_execute restricts each SELECT, let it leave those alone that have the "
                f'execution option "signals"; or connect to post_bulk'
            ) from None

    # -- executing ---------------------------------------------------------------------------------

    def _invoke_statement(self, statement: Any = None, **options: Any) -> Result[Any]:
        result: Result[Any] = self._context.invoke_statement(statement, execution_options=options)
        self.executed = True
        return result

    def _returning(self, statement: Any, own: Sequence[Any]) -> tuple[Result[Any], list[Key]]:
        """Execute a statement; the result for the caller, and what it returns of ``own``."""
        # For the caller. SQLite counts while the rows are fetched: nothing is to be kept before.
        sqlite = self._using.dialect.name == "sqlite"
        counts: Any = {} if sqlite else {"preserve_rowcount": True}
        result: Any = self._invoke_statement(statement.returning(*own), **counts)
        theirs = len(result.keys()) - len(own)
        frozen = result.freeze()
        returned = [tuple(row[theirs:]) for row in frozen()]
        if theirs:
            return frozen().columns(*range(theirs)), returned
        return getattr(result, "raw", None) or frozen(), returned

    def _check_key(self, names: Iterable[str]) -> None:
        if not set(self._key).isdisjoint(names):
            raise BulkOptionError(
                f'execution option signals="rows": the statement sets the primary key of '
                f"{self._mapper.class_.__name__}, so that its rows cannot be found again. Change "
                f"the instances instead, or connect to post_bulk"
            )

    # -- sending -----------------------------------------------------------------------------------

    def _model(self, instance: Any) -> ModelCalls:
        return self._calls[state_of(instance).manager.mapper]

    def _announce_update(self, instance: Any, pairs: Pairs, fields: frozenset[str]) -> bool:
        model = self._model(instance)
        receivers = model.pre_save.receivers()
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

    def _note_update(self, instance: Any, old: Values, new: Values, fields: frozenset[str]) -> None:
        state = state_of(instance)
        altered(self._session, state)
        for name, value in new.items():
            if name in state.committed_state:  # the session has a change of it pending
                state.committed_state[name] = value
            else:
                set_committed_value(instance, name, value)
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

"""``execution_options={"signals": "rows"}``: the signals of each row that a statement writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

from ..._sqlalchemy.instances import set_written, state_of
from ...changes.change import UNSET, Change, Changes, NewRow, Pairs, diff_of
from ...changes.effects import CREATED, DELETED, UPDATED, Effect, Kind, Source
from ...receivers.dispatch import active_mutes
from ...signals.builtin import post_delete, post_save, pre_save
from ..calling.audience import audience_of
from ..calling.guard import IN_STATEMENT, guarded
from ..transaction import durable, frames
from .refusals import refusal
from .table import Values, WrittenTable

if TYPE_CHECKING:
    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState

    from ..calling.calls import Calls, ModelCalls
    from .keys import Key


class Written(NamedTuple):
    """What the statement has done to one row."""

    kind: Kind
    instance: Any
    changes: Mapping[str, Change]
    fields: frozenset[str] | None


class Rows:
    """The row signals of one statement."""

    _by_key = False
    """Whether it is an UPDATE by primary key."""

    def __init__(self, context: ORMExecuteState, mapper: Mapper[Any], calls: Calls) -> None:
        self._context = context
        self._session = context.session
        self._statement: Any = context.statement
        self._parameters: Any = context.parameters
        self._mapper = mapper
        self._calls = calls
        self._table = WrittenTable(context, mapper, by_key=self._by_key)
        self._key = self._table.key
        self._written: list[Written] = []

    @property
    def are_written(self) -> bool:
        """Whether the statement was executed, so that what fails now has to undo it."""
        return self._table.executed

    def execute(self) -> tuple[Result[Any], int]:
        """Send the ``pre_`` signals and execute the statement; return how many rows it wrote."""
        self._look_up()
        if self._announce():
            self._look_up(again=True)
        result, rows = self._write()
        self._note()
        return result, len(rows)

    def _look_up(self, *, again: bool = False) -> None:
        """Find and lock the rows that are there; ``again`` after receivers, who may change them."""
        raise NotImplementedError

    def _announce(self) -> bool:
        """Send the ``pre_`` signals; return whether any receiver was called."""
        raise NotImplementedError

    def _write(self) -> tuple[Result[Any], Sized]:
        """Execute the statement; return its result for the caller, and the rows it has written."""
        raise NotImplementedError

    def _note(self) -> None:
        """Note what the statement has done to each row, for the ``post_`` signals."""
        raise NotImplementedError

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
        if not set(self._table.key_names).isdisjoint(names):
            raise refusal(
                f"the statement sets the primary key of {self._mapper.class_.__name__}, so that "
                f"its rows cannot be found again. Change the instances instead, or connect to "
                f"post_bulk"
            )

    def _model(self, instance: Any) -> ModelCalls:
        return self._calls[state_of(instance).manager.mapper]

    def _announce_update(self, instance: Any, pairs: Pairs, fields: frozenset[str]) -> bool:
        model, raw, bind = self._model(instance), self._calls.raw, self._table.bind
        receivers, changes = model.receivers(pre_save), Changes(diff_of(pairs))
        model.save(pre_save, receivers, instance, False, changes, fields, raw, bind)
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
        stale = self._table.computed.intersection(state_of(instance).dict)
        if stale:
            self._session.expire(instance, stale)
        same = self._model(instance).columns.same
        pairs = {
            name: (old.get(name, UNSET), new[name])
            for name in fields
            if name not in old or not same(name, old[name], new[name])
        }
        self._written.append(Written(UPDATED, instance, Changes(diff_of(pairs)), fields))

    def _load_computed(self, keys: Iterable[Key]) -> None:
        """Load what :meth:`_note_update` has expired, all rows with one query."""
        if self._table.computed:
            self._table.load(keys)

    def send_post(self) -> None:
        """Send the ``post_`` signals, and keep for the end of the transaction what is needed."""
        effects = [effect for one in self._written if (effect := self._effect(one)) is not None]
        if effects:
            frames.frame_of(self._session).add(effects)
            durable.flushed(self._session, effects)
        bind, raw = self._table.bind, self._calls.raw
        with guarded(self._session, IN_STATEMENT):
            for kind, instance, changes, fields in self._written:
                model = self._model(instance)
                if kind is DELETED:
                    receivers = model.receivers(post_delete)
                    model.delete(post_delete, receivers, instance, None, bind)
                else:
                    created, receivers = kind is CREATED, model.receivers(post_save)
                    model.save(post_save, receivers, instance, created, changes, fields, raw, bind)

    def _effect(self, one: Written) -> Effect | None:
        """What the transaction keeps of a row, if a receiver is called at its end."""
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
        mutes, raw, bind = (active_mutes(),), self._calls.raw, self._table.bind
        return Effect(
            one.kind,
            state.key,
            one.instance,
            Source(columns.same, columns.unfetched, raw, bind, mutes),
            changes=changes,
            along=(one.fields or frozenset()).difference(one.changes),
            unknown=frozenset(),
            values=values if undone or one.kind is DELETED else None,
        )

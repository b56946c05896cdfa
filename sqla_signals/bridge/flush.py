"""One flush: ``pre_*`` before its first statement, ``post_*`` after its bookkeeping.

``before_flush`` foresees the rows and announces them, the mapper events note what is really
written (and announce what could not be foreseen), ``after_flush`` completes the notes while the
history is still there, ``after_flush_postexec`` sends the ``post_*`` signals, when the session
takes changes again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.orm.exc import ObjectDeletedError

from .._sqlalchemy import (
    contains_state,
    deleted_states,
    is_deleted,
    pending_states,
    postupdated_states,
    state_with_key_of,
)
from ..changes import UNSET, Change, Changes
from ..dispatch import active_mutes, audible
from ..errors import SignalRecursionError
from ..net import CREATED, DELETED, UPDATED, Effect, Kind
from ..receivers import Receiver
from ..signals import Signal, post_delete, post_save, pre_delete, pre_save
from . import transactions
from .calls import Calls
from .columns import NO_HISTORY, NOTHING, History, columns_of
from .foresight import Foresight, cascade_origins
from .guard import GUARDED_BEFORE, guarded

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, Session, UOWTransaction

    State = InstanceState[Any]

MAX_ROUNDS: Final = 100
"""How often ``pre_*`` receivers may add to one flush; SQLAlchemy's own limit in ``commit()``."""

_KEY: Final = "sqla_signals"
_flushes: dict[int | None, weakref.ref[Flush]] = {}


class Written(NamedTuple):
    """One row that the flush has written."""

    instance: Any
    kind: Kind
    key: Any
    """The identity key before the flush."""
    changed: dict[str, Change] | None
    """Of an update: what the UPDATE changed."""
    values: Mapping[str, Any]
    """Of a created row: what the instance held right after the INSERT."""


class Flush:
    """The signals of one ``Session.flush()``, from its beginning to its end."""

    def __init__(
        self, session: Session, context: UOWTransaction, objects: Sequence[object] | None
    ) -> None:
        self.session = session
        # Not held: it holds us, and a cycle would keep the instances until garbage collection.
        self._context = weakref.ref(context)
        self._objects = objects
        self._calls = Calls(session)
        self._announced: dict[State, bool] = {}
        """Whose ``pre_*`` was sent, and whether that was ``pre_delete``."""
        self._origins: dict[State, Any] = {}
        self._history: dict[State, History] = {}
        self._written: dict[State, Written | None] = {}
        """In the order of the ``after_*`` events; ``None``: flushed, but no row written so far."""
        self._foresight: Foresight | None = None
        # The unit of work holds us, and it dies with the flush however that ends.
        context.attributes[_KEY] = self
        _flushes[session.hash_key] = weakref.ref(self, _forget(session.hash_key))

    @staticmethod
    def of(state: State) -> Flush | None:
        """The flush that the state's session is in, if its session is listened to."""
        reference = _flushes.get(state.session_id)
        return reference() if reference is not None else None

    @staticmethod
    def in_progress() -> bool:
        """Whether any session is in a flush that is listened to."""
        return any(reference() is not None for reference in list(_flushes.values()))

    @staticmethod
    def of_context(context: UOWTransaction) -> Flush | None:
        """The flush that was begun with this unit of work."""
        found: Flush | None = context.attributes.get(_KEY)
        return found

    @property
    def context(self) -> UOWTransaction:
        """The unit of work of this flush."""
        context = self._context()
        assert context is not None
        return context

    # -- before the first statement --------------------------------------------------------------

    def announce(self) -> None:
        """Send ``pre_*`` for every row foreseen, until the receivers add nothing new."""
        if not (pre_save.receivers or pre_delete.receivers):
            return
        with guarded(self.session, GUARDED_BEFORE):
            callers: deque[list[Receiver]] = deque(maxlen=10)
            for _ in range(MAX_ROUNDS):
                called = self._announce_round()
                if not called:
                    return
                callers.append(called)
            names = " → ".join(dict.fromkeys(str(one) for called in callers for one in called))
            raise SignalRecursionError(
                f"pre_* receivers kept adding to the flush for {MAX_ROUNDS} rounds: {names}. "
                f"Let one of them do nothing for what another one has caused."
            )

    def _announce_round(self) -> list[Receiver]:
        """Look at what the flush is going to write; announce what was not announced.

        Returns the receivers that were called, none if there was nothing new. Each row is looked
        at again right before its own signal, because the receivers before may have changed its
        fate; what they have brought up is found in the next round.
        """
        session, announced = self.session, self._announced
        # Held until the next round or the end of the flush, with what it loaded, so that
        # no row comes back as another object.
        foresight = self._foresight = Foresight(session, self._objects)
        derived = [
            row
            for row in foresight.derived()
            if announced.get(row.state) is not row.is_delete
            and self._announces(row.state.manager.mapper, row.is_delete)
        ]
        assigned = {row.state for row in derived}
        saves = [
            state
            for state in (*foresight.inserts, *foresight.updates)
            if announced.get(state) is not False
            and state not in assigned
            and self._announces(state.manager.mapper, False)
        ]
        deletes = [
            state
            for state in foresight.deletes
            if announced.get(state) is not True and self._announces(state.manager.mapper, True)
        ]
        held = [state.obj() for state in (*saves, *deletes)]
        callers: list[Receiver] = []
        for state in saves:
            callers += self._announce_save(state, NOTHING)
        for row in derived:
            if not row.is_delete and row.still_stands(session):
                callers += self._announce_save(row.state, row.assigns)
        origins = foresight.origins() if deletes or any(row.is_delete for row in derived) else {}
        for state in deletes:
            if state in deleted_states(session):
                callers += self._announce_delete(state, origins.get(state))
        for row in derived:
            if row.is_delete and row.still_stands(session):
                callers += self._announce_delete(row.state, origins.get(row.state))
        del held
        return callers

    @property
    def mappers(self) -> Iterable[Mapper[Any]]:
        """The mappers whose rows ``pre_save`` was sent for, or could have been."""
        foresight = self._foresight
        return {state.manager.mapper for state in foresight.updates} if foresight else ()

    def _is_kept(self, state: State) -> bool:
        return self._foresight is not None and state in self._foresight.kept

    def _announces(self, mapper: Mapper[Any], is_delete: bool) -> bool:
        return bool(self._receivers(pre_delete if is_delete else pre_save, mapper))

    def announce_late(self, state: State, is_delete: bool) -> None:
        """Send ``pre_*`` right before the statement, for a row that could not be foreseen."""
        if self._announced.get(state) is is_delete or not self._announces(state.mapper, is_delete):
            return
        with guarded(self.session, GUARDED_BEFORE):
            if is_delete:
                self._announce_delete(state, None)
            else:
                self._announce_save(state, NOTHING)

    # -- while the statements are emitted ---------------------------------------------------------

    def remember(self, state: State) -> None:
        """Keep the history that an UPDATE may wipe out."""
        if state.committed_state or state.expired_attributes:
            self._history[state] = columns_of(state.mapper).history(state)

    def keep_readable(self, state: State) -> None:
        """Load the expired attributes of a row that is about to be deleted.

        Committing expires instances, so one that is loaded, committed and deleted would come to
        its ``post_delete`` receivers with nothing to read.
        """
        if state.expired_attributes and post_delete.has_receivers_for(state.class_):
            # Gone already, by ON DELETE CASCADE or another transaction: there is nothing to load.
            with suppress(ObjectDeletedError):
                getattr(state.obj(), next(iter(state.expired_attributes)))

    def inserted(self, state: State) -> None:
        """An INSERT was emitted for the state."""
        values = dict(state.dict)
        for key in state.expired_attributes:  # computed by the database and not fetched
            values.setdefault(key, UNSET)
        self._written[state] = Written(state.obj(), CREATED, None, None, values)

    def saved(self, state: State) -> None:
        """The state went through an UPDATE, which may have written nothing."""
        if state in pending_states(self.session):
            self._row_switched(state)
            return
        before = self._history.pop(state, NO_HISTORY)
        changed = columns_of(state.mapper).updated(state, before, self.context)
        row = Written(state.obj(), UPDATED, state.key, changed, {}) if changed else None
        self._written[state] = row

    def _row_switched(self, state: State) -> None:
        """The row of a deleted instance was turned into the row of a new one."""
        replaced = state_with_key_of(self.session, state)
        if replaced is not None:
            self.deleted(replaced)
        self.inserted(state)

    def deleted(self, state: State) -> None:
        """A DELETE was emitted for the state."""
        self._written[state] = Written(state.obj(), DELETED, state.key, None, {})

    def complete(self) -> None:
        """Add what has no mapper event, while the history is still there."""
        for state, (is_delete, listonly) in self.context.states.items():
            if is_delete and listonly and state not in self._written:
                self.deleted(state)
        for state, columns in postupdated_states(self.context):
            if not is_deleted(self.context, state):
                self._post_updated(state, columns)
        if post_delete.receivers:
            deletes = [s for s, row in self._written.items() if row and row.kind is DELETED]
            self._origins = cascade_origins(self.session, deletes)

    def _post_updated(self, state: State, columns: set[Any]) -> None:
        known = self._written.get(state)
        changed = columns_of(state.mapper).post_updated(state, columns, self.context)
        if not changed:
            return
        if known is None:
            self._written[state] = Written(state.obj(), UPDATED, state.key, changed, {})
        elif known.kind is CREATED:
            values = {**known.values, **{key: change.new for key, change in changed.items()}}
            self._written[state] = known._replace(values=values)
        else:
            self._written[state] = known._replace(changed={**(known.changed or {}), **changed})

    # -- after the bookkeeping --------------------------------------------------------------------

    def finish(self) -> None:
        """Send ``post_*`` for every row written."""
        rows = [(state, row) for state, row in self._written.items() if row is not None]
        self._written = {}
        if not rows:
            return
        effects = [effect for state, row in rows if (effect := self._effect(state, row))]
        if effects:
            transactions.frame_of(self.session).add(effects)
        with guarded(self.session):
            for state, row in rows:
                if row.kind is DELETED:
                    origin = self._origins.get(state)
                    self._send_delete(post_delete, row.instance, state.mapper, origin)
                else:
                    self._send_post_save(state, row)

    def _effect(self, state: State, row: Written) -> Effect | None:
        """What the transaction keeps of a row, if somebody waits for its end."""
        cls = state.class_
        lookup = (post_delete if row.kind is DELETED else post_save).table.lookup
        undone = lookup(cls, "rollback")
        if not undone and not lookup(cls, "commit"):
            return None
        columns = columns_of(state.mapper)
        changes: Mapping[str, Change] = row.changed or {}
        if row.kind is CREATED:
            changes = Changes(partial(columns.inserted, row.values))
        return Effect(
            row.kind,
            state.key,
            row.instance,
            was=row.key,
            changes=changes,
            equal=columns.same,
            along=columns.written_along(changes) if row.kind is UPDATED else frozenset(),
            values=columns.values(state) if undone else None,
            origin=self._origins.get(state),
            raw=self._calls.raw,
            mutes=active_mutes(),
        )

    # -- calling receivers ------------------------------------------------------------------------

    def _announce_save(self, state: State, assigns: Mapping[str, Any]) -> Sequence[Receiver]:
        """Send ``pre_save``, unless the row is not going to be written any more.

        :param assigns: what the flush is going to assign to it.
        """
        session, mapper, instance = self.session, state.manager.mapper, state.obj()
        columns = columns_of(mapper)
        if state not in pending_states(session) and (
            (state in deleted_states(session) and not self._is_kept(state))
            or not contains_state(session, state)
            or not columns.will_write(state, assigns)
        ):
            return ()
        self._announced[state] = False
        receivers = self._receivers(pre_save, mapper)
        for receiver in receivers:
            # Taken anew for each receiver: the one before may have assigned something.
            created = state in pending_states(session)
            if created:
                values = dict(state.dict)
                changes = Changes(partial(columns.given, values))
                update_fields = None
            else:
                changed = columns.assigned(state)
                changes = Changes(changed.copy)
                update_fields = frozenset(changed)
                if receiver.fields is not None and receiver.columns(mapper).isdisjoint(
                    update_fields.union(assigns)
                ):
                    continue
            self._call_save(pre_save, receiver, mapper, instance, created, changes, update_fields)
        return receivers

    def _announce_delete(self, state: State, origin: Any) -> Sequence[Receiver]:
        self._announced[state] = True
        return self._send_delete(pre_delete, state.obj(), state.manager.mapper, origin)

    def _send_post_save(self, state: State, row: Written) -> None:
        mapper = state.mapper
        columns = columns_of(mapper)
        created = row.kind is CREATED
        if created:
            changes = Changes(partial(columns.inserted, row.values))
            update_fields = None
        else:
            changed = row.changed or {}
            changes = Changes(changed.copy)
            update_fields = columns.written_along(changed)
        for receiver in self._receivers(post_save, mapper):
            if (
                update_fields is None
                or receiver.fields is None
                or not receiver.columns(mapper).isdisjoint(changes)
            ):
                self._call_save(
                    post_save, receiver, mapper, row.instance, created, changes, update_fields
                )

    def _call_save(
        self,
        signal: Signal,
        receiver: Receiver,
        mapper: Mapper[Any],
        instance: Any,
        created: bool,
        changes: Changes,
        update_fields: frozenset[str] | None,
    ) -> None:
        calls = self._calls
        calls.call(
            signal,
            receiver,
            mapper.class_,
            {
                "instance": instance,
                "created": created,
                "changes": changes,
                "update_fields": update_fields,
                "raw": calls.raw,
                "using": calls.using(mapper, instance),
                "session": self.session,
                "signal": signal,
            },
        )

    def _send_delete(
        self, signal: Signal, instance: Any, mapper: Mapper[Any], origin: Any
    ) -> Sequence[Receiver]:
        receivers = self._receivers(signal, mapper)
        for receiver in receivers:
            self._calls.call(
                signal,
                receiver,
                mapper.class_,
                {
                    "instance": instance,
                    "origin": origin,
                    "using": self._calls.using(mapper, instance),
                    "session": self.session,
                    "signal": signal,
                },
            )
        return receivers

    def _receivers(self, signal: Signal, mapper: Mapper[Any]) -> tuple[Receiver, ...]:
        cls = mapper.class_
        return audible(signal, cls, signal.table.lookup(cls))


def _forget(key: int) -> Any:
    def forget(reference: weakref.ref[Flush]) -> None:
        if _flushes.get(key) is reference:
            del _flushes[key]

    return forget

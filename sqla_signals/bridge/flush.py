"""One flush: ``pre_*`` before its first statement, ``post_*`` after its bookkeeping.

``before_flush`` foresees the rows and announces them, the mapper events note what is really
written (and announce what could not be foreseen), ``after_flush`` completes the notes while the
history is still there, ``after_flush_postexec`` sends the ``post_*`` signals, when the session
takes changes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .._sqlalchemy import keep_readable, pending_states
from ..changes import Change, Changes
from ..dispatch import active_mutes
from ..net import CREATED, DELETED, Effect
from ..signals import post_delete, post_save
from . import owed, transactions
from .announcement import Announcement
from .calls import Calls
from .foresight import cascade_origins
from .guard import guarded
from .m2m import M2M
from .record import Record, Written

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Session, UOWTransaction

    State = InstanceState[Any]

_KEY: Final = "sqla_signals"
_flushes: dict[int | None, weakref.ref[Flush]] = {}


class Flush:
    """The signals of one ``Session.flush()``, from its beginning to its end."""

    def __init__(
        self, session: Session, context: UOWTransaction, objects: Sequence[object] | None
    ) -> None:
        self.session: Session = session
        # Not held: it holds us, and a cycle would keep the instances until garbage collection.
        self._context = weakref.ref(context)
        self._calls = Calls(session)
        self._m2m = M2M(session, self._calls)
        self.announcement: Announcement = Announcement(session, objects, self._calls, self._m2m)
        self._record = Record(session)
        self._origins: dict[State, Any] = {}
        # The unit of work holds us, and it dies with the flush however that ends.
        context.attributes[_KEY] = self
        _flushes[session.hash_key] = weakref.ref(self, _forget(session.hash_key))

    @staticmethod
    def of(state: State) -> Flush | None:
        """The flush that the state's session is in, if its session is listened to."""
        reference = _flushes.get(state.session_id)
        return reference() if reference is not None else None

    @staticmethod
    def of_context(context: UOWTransaction) -> Flush | None:
        """The flush that was begun with this unit of work."""
        found: Flush | None = context.attributes.get(_KEY)
        return found

    @staticmethod
    def in_progress() -> bool:
        """Whether any session is in a flush that is listened to."""
        return any(reference() is not None for reference in list(_flushes.values()))

    # -- mapper events ----------------------------------------------------------------------------

    def before_insert(self, state: State) -> None:
        """An INSERT is emitted next."""
        self.announcement.send_late(state, is_delete=False)

    def before_update(self, state: State) -> None:
        """An UPDATE may be emitted next, if anything has changed."""
        self.announcement.send_late(state, is_delete=False)
        self._record.remember(state)

    def before_delete(self, state: State) -> None:
        """A DELETE is emitted next; keep what could not be read after it.

        Committing expires instances, so one that is loaded, committed and deleted would come to
        its ``post_delete`` receivers with nothing to read.
        """
        if state.key is None:
            return  # pending, so no row is its own; mostly an error or a warning follows
        self.announcement.send_late(state, is_delete=True)
        if not state.expired_attributes or not post_delete.has_receivers_for(state.class_):
            return
        expired = state.expired_attributes & self._calls.of(state.manager.mapper).columns.keys
        if expired:
            keep_readable(state, next(iter(expired)))

    def after_insert(self, state: State) -> None:
        """An INSERT was emitted."""
        self._record.inserted(state)

    def after_update(self, state: State) -> None:
        """An UPDATE was emitted, or nothing."""
        if state in pending_states(self.session):
            self._record.row_switched(state)
        else:
            context = self._context()
            assert context is not None
            self._record.updated(state, context)

    def after_delete(self, state: State) -> None:
        """A DELETE was emitted."""
        if state.key is not None:
            self._record.deleted(state)

    # -- session events ---------------------------------------------------------------------------

    def after_flush(self, context: UOWTransaction) -> None:
        """Every statement was emitted; the history is still there."""
        self._record.complete(context)
        self._m2m.record(context)
        deletes = self._record.deletes() if post_delete.receivers else ()
        if deletes:
            # Also of classes that nobody listens to: what was deleted first may be one of those.
            others = [state for state, (is_delete, _) in context.states.items() if is_delete]
            self._origins = cascade_origins(self.session, [*deletes, *others])

    def after_flush_postexec(self) -> None:
        """The session takes changes again: send ``post_*`` for every row written."""
        rows = self._record.take()
        if not rows and not self._m2m.has_rows:  # nothing written, or another one has sent it
            return
        effects = [effect for state, row in rows if (effect := self._effect(state, row))]
        if effects:
            transactions.frame_of(self.session).add(effects)
            owed.flushed(self.session, effects)
        with guarded(self.session):
            for state, row in rows:
                if row.kind is DELETED:
                    self._send_delete(state, row)
                else:
                    self._send_save(state, row)
            self._m2m.send_post()

    def _send_save(self, state: State, row: Written) -> None:
        calls = self._calls.of(state.manager.mapper)
        receivers = calls.receivers(post_save)
        if not receivers:
            return
        created = row.kind is CREATED
        changes: Mapping[str, Change]
        if created:
            changes = Changes(partial(calls.columns.inserted, row.values))
            fields = None
        else:
            changes = Changes(partial(dict, row.changed))
            fields = row.fields
        for receiver in receivers:
            if fields is None or receiver.passes(calls.mapper, row.changed):
                calls.save(
                    post_save, receiver, row.instance, created, changes, fields, self._calls.raw
                )

    def _send_delete(self, state: State, row: Written) -> None:
        calls = self._calls.of(state.manager.mapper)
        for receiver in calls.receivers(post_delete):
            calls.delete(post_delete, receiver, row.instance, self._origins.get(state))

    def _effect(self, state: State, row: Written) -> Effect | None:
        """What the transaction keeps of a row, if somebody waits for its end."""
        calls = self._calls.of(state.manager.mapper)
        # Also what nobody listens to: a row created and deleted again is no created row.
        undone = calls.awaits("rollback")
        if not undone and not calls.awaits("commit") and not calls.awaits("durable"):
            return None
        columns = calls.columns
        # Copies, because the instance lives on until the transaction ends.
        if row.kind is CREATED:
            changes: Mapping[str, Change]
            changes = Changes(partial(columns.inserted, columns.own_values(row.values)))
        else:
            changes = columns.own_changes(row.changed)
        return Effect(
            row.kind,
            state.key,
            row.instance,
            was=row.key,
            changes=changes,
            equal=columns.same,
            along=row.fields.difference(row.changed),
            unfetched=columns.unfetched,
            # A deleted instance may be refreshed from a row that has taken over its key.
            values=columns.values(state) if undone or row.kind is DELETED else None,
            origin=self._origins.get(state),
            raw=self._calls.raw,
            using=calls.using(row.instance),
            mutes=active_mutes(),
        )


def _forget(key: int) -> Callable[[weakref.ref[Flush]], None]:
    def forget(reference: weakref.ref[Flush]) -> None:
        if _flushes.get(key) is reference:
            del _flushes[key]

    return forget

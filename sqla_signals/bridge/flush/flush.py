"""One flush: ``pre_*`` before its first statement, ``post_*`` after its bookkeeping.

``before_flush`` foresees the rows and announces them, the mapper events note what is really
written (and announce what could not be foreseen), ``after_flush`` completes the notes while the
history is still there, ``after_flush_postexec`` sends the ``post_*`` signals, when the session
takes changes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..._sqlalchemy.instances import keep_readable
from ..._sqlalchemy.unit_of_work import is_flushing
from ...changes.change import NO_DIFF, Change, Changes, NewRow
from ...changes.effects import CREATED, DELETED, UPDATED, Effect, Source
from ...receivers.dispatch import active_mutes
from ...signals.builtin import m2m_changed, post_delete, post_save, pre_delete, pre_save
from ...signals.signal import logger
from ..calling.audience import audience_of
from ..calling.calls import Calls, ModelCalls, is_sharded
from ..calling.guard import IN_POST, guarded
from ..transaction import durable
from ..transaction import frames as transactions
from .announcement import Announcement
from .foresight import Foresight, cascade_origins
from .m2m import M2M
from .record import Record, Written

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, Session, UOWTransaction

    State = InstanceState[Any]

_KEY: Final = "sqla_signals"
flushes: Final[dict[int | None, Callable[[], Flush | None]]] = {}
"""By the hash key of each session in a flush that is listened to: a weak reference to that."""


def no_flush() -> None:
    """What a session that is in no such flush has in :data:`flushes`."""


class Flush:
    """The signals of one ``Session.flush()``, from its beginning to its end."""

    def __init__(
        self, session: Session, context: UOWTransaction, objects: Iterable[object] | None
    ) -> None:
        self.session: Session = session
        self._calls = Calls(session)
        self._m2m = M2M(session, self._calls)
        self.announcement: Announcement = Announcement(session, objects, self._calls, self._m2m)
        self.record: Record = Record(self._calls, self.announcement.updates, context)
        self._origins: dict[State, Any] = {}
        self.is_over: bool = False
        """Whether it needs no listener any more."""
        # The unit of work holds us, and it dies with the flush however that ends.
        context.attributes[_KEY] = self
        reference: weakref.ref[Flush] = weakref.ref(self, _forget(session.hash_key))
        flushes[session.hash_key] = reference

    @staticmethod
    def of_context(context: UOWTransaction) -> Flush | None:
        """The flush that was begun with this unit of work."""
        found: Flush | None = context.attributes.get(_KEY)
        return found

    @staticmethod
    def any_is_under_way() -> bool:
        """Whether any session is in a flush that is listened to."""
        found = [reference() for reference in list(flushes.values())]
        # One that has failed lives on for as long as somebody keeps its exception.
        return any(one and not one.is_over and is_flushing(one.session) for one in found)

    @staticmethod
    def ended(session: Session) -> None:
        """The flush that the session was in, if any, is over."""
        flush = flushes.get(session.hash_key, no_flush)()
        if flush is not None:
            flush.is_over = True

    def give_up(self, context: UOWTransaction) -> None:
        """Let the flush go on as if nobody listened."""
        self.is_over = True
        del context.attributes[_KEY]

    # -- mapper events ----------------------------------------------------------------------------

    def before_delete(self, state: State) -> None:
        """A DELETE is emitted next; keep what could not be read after it.

        Committing expires instances, so one that is loaded, committed and deleted would come to
        its ``post_delete`` receivers with nothing to read.
        """
        if state.key is None:
            return  # pending, so no row is its own; mostly an error or a warning follows
        if state not in self.announcement.deletes:
            self.announcement.send_late(state, is_delete=True)
        if not state.expired_attributes or not post_delete.has_receivers_for(state.class_):
            return
        expired = state.expired_attributes & self._calls[state.manager.mapper].columns.keys
        if expired:
            keep_readable(state, next(iter(expired)))

    # -- session events ---------------------------------------------------------------------------

    def after_flush(self, context: UOWTransaction) -> None:
        """Every statement was emitted; the history is still there."""
        if self.announcement.failure is not None:  # and the flush did not fail of it
            logger.warning(
                "The rows of a flush could not be foreseen, so that pre_* signals may have come "
                "right before their own statements. The dry run of SQLAlchemy raised:\n%s",
                self.announcement.failure,
            )
        self.record.complete(context)
        self._m2m.record(context)
        deletes = self.record.deletes() if post_delete.table.receivers else ()
        if deletes:
            # Also of classes that nobody listens to: what was deleted first may be one of those.
            others = [state for state, (is_delete, _) in context.states.items() if is_delete]
            self._origins = cascade_origins(self.session, [*deletes, *others])

    def after_flush_postexec(self) -> None:
        """The session takes changes again: send ``post_*`` for every row written."""
        rows = self.record.take()
        if not rows and not self._m2m.has_rows:  # nothing written, or another one has sent it
            return
        effects = self._effects(rows) if _anybody_waits() else None
        if effects:
            transactions.frame_of(self.session).add(effects)
            durable.flushed(self.session, effects)
        if post_save.table.flush or post_delete.table.flush or self._m2m.has_rows:
            self._send_post(rows)

    def _send_post(self, rows: Mapping[State, Written]) -> None:
        calls = self._calls
        raw = calls.raw
        with guarded(self.session, IN_POST):
            for state, row in rows.items():
                if row is NO_DIFF:
                    continue
                model = calls[state.manager.mapper]
                if row is DELETED:
                    receivers = model.receivers(post_delete)
                    if receivers:
                        origin = self._origins.get(state)
                        model.delete(post_delete, receivers, state.obj(), origin)
                    continue
                receivers = model.receivers(post_save)
                if not receivers:
                    continue
                if isinstance(row, dict):
                    changes: Mapping[str, Change] = NewRow(model.columns.absent, row)
                    model.save(post_save, receivers, state.obj(), True, changes, None, raw)
                else:
                    changes, fields, unknown = Changes(row), row[0].written, row[0].unknown
                    model.save(
                        post_save,
                        receivers,
                        state.obj(),
                        False,
                        changes,
                        fields,
                        raw,
                        unknown=unknown,
                    )
            self._m2m.send_post()

    def _effects(self, rows: Mapping[State, Written]) -> list[Effect]:
        """What the transaction keeps of the rows that somebody waits for."""
        awaited = _Awaited(self._calls)
        sharded, keys_before = is_sharded(self.session), self.record.keys_before
        effects: list[Effect] = []
        for state, row in rows.items():
            awaits = awaited[state.manager.mapper]
            if awaits is None or row is NO_DIFF:
                continue
            model, source, undone = awaits
            instance = state.obj()
            if sharded:
                source = source._replace(using=model.using(instance))
            columns = model.columns
            # A deleted instance may be refreshed from a row that has taken over its key.
            values = columns.values(state) if undone or row is DELETED else None
            # Copies, because the instance lives on until the transaction ends.
            if row is DELETED:
                origin = self._origins.get(state)
                effect = Effect(DELETED, state.key, instance, source, values=values, origin=origin)
            elif isinstance(row, dict):
                effect = Effect(
                    CREATED,
                    state.key,
                    instance,
                    source,
                    changes=NewRow(columns.absent, columns.own_values(row)),
                    values=values,
                )
            else:
                effect = Effect(
                    UPDATED,
                    state.key,
                    instance,
                    source,
                    was=keys_before.get(state),
                    changes=Changes(columns.own_diff(row)),
                    along=row[0].along,
                    unknown=row[0].unknown,
                    fields=row[0].written,
                    values=values,
                )
            effects.append(effect)
        return effects


def anybody_listens() -> bool:
    """Whether there is a receiver of a signal that a flush sends."""
    return bool(
        pre_save.table.receivers
        or post_save.table.receivers
        or pre_delete.table.receivers
        or post_delete.table.receivers
        or m2m_changed.table.receivers
    )


def states_in_flush(session: Session) -> list[State]:
    """What the session is writing right now; empty outside of a flush that is listened to."""
    flush = flushes.get(session.hash_key, no_flush)()
    return flush.record.states() if flush is not None else []


def states_to_flush(session: Session, objects: Iterable[object] | None) -> list[State]:
    """What a flush that begins is going to write."""
    rows = Foresight(session, objects)
    derived = [row.state for row in rows.derived()]
    return [*rows.inserts, *rows.updates, *rows.deletes, *derived]


def _anybody_waits() -> bool:
    return post_save.table.outlasts_flush or post_delete.table.outlasts_flush


class _Awaited(dict["Mapper[Any]", "tuple[ModelCalls, Source, bool] | None"]):
    """For each mapper: what its effects have in common, and whether a rollback is waited for.

    ``None`` where nobody waits for the end of the transaction.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls
        self._mutes = (active_mutes(),)

    def __missing__(self, mapper: Mapper[Any]) -> tuple[ModelCalls, Source, bool] | None:
        found, audience = None, audience_of(mapper)
        if audience.outlasts_flush:
            model = self._calls[mapper]
            columns = model.columns
            using = None if is_sharded(self._calls.session) else model.using(None)
            source = Source(columns.same, raw=self._calls.raw, using=using, mutes=self._mutes)
            found = model, source, audience.waits["rollback"]
        self[mapper] = found
        return found


def _forget(key: int) -> Callable[[weakref.ref[Flush]], None]:
    def forget(reference: weakref.ref[Flush]) -> None:
        if flushes.get(key) is reference:
            del flushes[key]

    return forget

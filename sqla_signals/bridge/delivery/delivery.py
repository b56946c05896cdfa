"""After the end of a transaction: calling ``on="commit"`` and ``on="rollback"`` receivers.

A commit receiver gets a session and a transaction of its own, and an instance that lives in it.
What it commits itself is delivered after what is being delivered, never inside of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.util import await_only

from ..._sqlalchemy.instances import detached_copy, state_of
from ..._sqlalchemy.sessions import current_task, ends_session_block
from ...changes.change import UNSET
from ...changes.effects import DELETED, NEVER_MUTED, UPDATED, Effect, Executed, Frame
from ...errors import AsyncReceiverError, SignalRecursionError
from ...receivers import watching
from ...receivers.dispatch import was_audible
from ...receivers.receiver import Phase, Receiver, is_async
from ...signals.builtin import post_bulk, post_delete, post_save
from ...signals.signal import logger
from ..calling.calls import PLAIN_SESSION, Calls, async_session_of, cannot_await
from ..columns.columns import ColumnsByMapper, columns_of
from ..columns.copies import copies_of
from .effect_calls import call_for, failed, signal_of
from .session import DeliverySession, SchemaMaps, SessionSource

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper, Session

MAX_DEPTH: Final = 100
"""How many commits may follow from one another through receivers."""


class Batch(NamedTuple):
    """What one root transaction leaves to be delivered."""

    source: SessionSource
    schemas: SchemaMaps
    frame: Frame
    cause: Cause | None
    watched: watching.WatchedDelivery | None


class Cause(NamedTuple):
    """The receiver whose commit caused a batch, and what caused the call of that receiver."""

    receiver: Receiver | Callable[[], Any]
    """Or the function given to ``on_commit``."""
    depth: int
    cause: Cause | None


class _Delivery:
    """The batch being delivered, and those that wait behind it."""

    def __init__(self, first: Batch) -> None:
        self._batch: Batch | None = first
        self._thread, self._task = threading.get_ident(), current_task()
        self._waiting: deque[Batch] = deque()
        self._is_open = True
        self._lock = threading.Lock()

    def waits_for_us(self) -> bool:
        """Whether the receiver being called goes on only after what is happening here.

        Not so in a thread or a task of its own that it has started.
        """
        task = current_task()
        return threading.get_ident() == self._thread and (
            task is self._task or (task is not None and ends_session_block(task))
        )

    def add(self, batch: Batch) -> bool:
        """Let a batch wait; ``False`` if this delivery is over."""
        with self._lock:
            if self._is_open:
                self._waiting.append(batch)
            return self._is_open

    def add_callback(self, session: Session, fn: Callable[[], Any]) -> bool:
        """Call ``fn`` after the other callbacks; ``False`` if those are of another session."""
        with self._lock:
            batch = self._batch
            if not self._is_open or batch is None or batch.source.like is not session:
                return False
            batch.frame.on_commit.append(fn)
            return True

    def next(self) -> Batch | None:
        """The batch to deliver next; after ``None`` this delivery is over."""
        with self._lock:
            self._is_open = bool(self._waiting)
            self._batch = self._waiting.popleft() if self._waiting else None
            return self._batch

    def end(self) -> None:
        """Nothing more is delivered, because something passes through."""
        with self._lock:
            self._is_open = False


_current: ContextVar[tuple[_Delivery, Cause] | None] = ContextVar(
    "sqla_signals_delivery", default=None
)
"""The delivery around us, and the call it is making. A task inherits it, and may outlive it."""


def keep_values(session: Session, frame: Frame) -> None:
    """Keep the committed values of the rows, before the instances are expired."""
    # Rows may have changed again by its turn, and nobody knows who is connected by then.
    waits_its_turn = _current.get() is not None
    columns = ColumnsByMapper()
    audience = Audience("commit") if _anybody_waits(frame) else None
    for effect in frame.effects:
        if (
            waits_its_turn
            or effect.kind is DELETED
            or (audience is not None and audience.of(effect).saves)
        ):
            effect.values = known_values(session, frame, effect, columns)
        else:
            effect.values = None  # as of the flush: who is connected by then loads them


def known_values(
    session: Session, frame: Frame, effect: Effect, columns: ColumnsByMapper
) -> Mapping[str, Any]:
    """The column values of a row that are committed, or are going to be.

    Where the instance may not know them, they are left to be loaded.
    """
    state = state_of(effect.instance)
    if effect.kind is DELETED:  # the values that were committed, not what came in between
        values = {**(effect.values or {}), **effect.before}
        return {key: value for key, value in values.items() if value is not UNSET}
    # Closing a session has expunged them all.
    holder = None if frame.is_closed else session.hash_key
    if state.session_id == holder and state.key == effect.row and state not in frame.stale:
        return columns[state.manager.mapper].values(state)
    return {}


def committed(
    session: Session,
    frame: Frame,
    source_for: Callable[[Session], SessionSource],
    schemas: SchemaMaps,
) -> None:
    """Deliver what a committed root transaction did, now or after what is being delivered."""
    delivery, cause = _current.get() or (None, None)
    watcher = watching.watcher
    if delivery is None and watcher is None and not _anybody_waits(frame):
        return
    watched = watcher.delivery(session, "commit") if watcher is not None else None
    is_waiting = delivery is not None and delivery.waits_for_us()
    batch = Batch(source_for(session), schemas, frame, cause if is_waiting else None, watched)
    if delivery is not None and is_waiting and delivery.add(batch):
        return
    delivery = _Delivery(batch)
    following: Batch | None = batch
    try:
        while following is not None:
            _deliver(delivery, following)
            following = delivery.next()
    finally:
        delivery.end()


def follows(session: Session, fn: Callable[[], Any]) -> bool:
    """Whether ``fn`` is called in the delivery that is going on: of this session's last commit."""
    delivery, _ = _current.get() or (None, None)
    return delivery is not None and delivery.waits_for_us() and delivery.add_callback(session, fn)


def _anybody_waits(frame: Frame) -> bool:
    """Whether there are commit receivers, of whatever, or callbacks."""
    return (
        post_save.table.commit
        or post_delete.table.commit
        or post_bulk.table.commit
        or bool(frame.on_commit)
    )


def _deliver(delivery: _Delivery, batch: Batch) -> None:
    depth = batch.cause.depth + 1 if batch.cause is not None else 0
    if depth > MAX_DEPTH:
        _log_recursion(batch)
        return
    if not _anybody_waits(batch.frame):
        return
    # Settled now: what receivers connect and disconnect on the way is for the next delivery.
    runs = _runs(batch.frame.occurrences)
    if not runs and not batch.frame.on_commit:
        return
    session = DeliverySession(batch.source, batch.schemas)
    call, call_back = session.call, _call_back
    if batch.watched is not None:
        call = partial(batch.watched.receiver, call)
        call_back = partial(batch.watched.callback, call_back)
    outer = _current.set(None)
    try:
        calling: Receiver | None = None
        for receivers, effects in runs:
            for effect in effects:
                for receiver in receivers:
                    if receiver is not calling:
                        calling = receiver
                        _current.set((delivery, Cause(receiver, depth, batch.cause)))
                    call(receiver, effect)
        session.close()
        _call_back_all(delivery, batch, depth, call_back)
    finally:
        session.close()
        _current.reset(outer)


def _call_back_all(
    delivery: _Delivery,
    batch: Batch,
    depth: int,
    call_back: Callable[[Session, Callable[[], Any], str], None],
) -> None:
    """Call the ``on_commit`` callbacks, and those that they add."""
    frame, called = batch.frame, 0
    for _ in range(MAX_DEPTH):
        called, added = len(frame.on_commit), frame.on_commit[called:]
        for fn in added:
            _current.set((delivery, Cause(fn, depth, batch.cause)))
            call_back(batch.source.like, fn, "on_commit")
        if not added:
            return
    names = ", ".join(dict.fromkeys(repr(fn) for fn in frame.on_commit[called:]))
    error = SignalRecursionError(
        f"on_commit() callbacks have added callbacks for {MAX_DEPTH} rounds; the last ones are not "
        f"called: {names}. Let one of them add nothing."
    )
    logger.error("%s", error, exc_info=error)


def _runs(
    occurrences: Iterable[Effect | Executed],
) -> list[tuple[Sequence[Receiver], list[Effect | Executed]]]:
    """Who is to be called for what, in order; what goes to the same receivers is taken together."""
    audience = Audience("commit")
    runs: list[tuple[Sequence[Receiver], list[Effect | Executed]]] = []
    current: Sequence[Receiver] = ()
    effects: list[Effect | Executed] = []
    for effect in occurrences:
        receivers = audience.for_effect(effect)
        if receivers is not current:
            current, effects = receivers, []
            runs.append((receivers, effects))
        effects.append(effect)
    return [(receivers, effects) for receivers, effects in runs if receivers]


def _log_recursion(batch: Batch) -> None:
    names: list[str] = []
    cause = batch.cause
    while cause is not None and str(cause.receiver) not in names:
        names.append(str(cause.receiver))
        cause = cause.cause
    cycle = " → ".join([*reversed(names), names[-1]])
    error = SignalRecursionError(
        f"{MAX_DEPTH} commits have followed from one another: {cycle}. What was committed stays; "
        f"the receivers of the last commit are not called. Let one of them do nothing for what "
        f"another one has caused."
    )
    logger.error("%s", error, exc_info=error)


def rolled_back(session: Session, frame: Frame) -> None:
    """Call the ``on="rollback"`` receivers and callbacks of work that was undone."""
    calls = Calls(session, detached=True)

    def call(receiver: Receiver, effect: Effect | Executed) -> None:
        instance = None
        try:
            if isinstance(effect, Effect):
                mapper = state_of(effect.instance).manager.mapper
                instance = detached_copy(mapper, effect.was, copies_of(effect.values or {}))
                call_for(effect, calls[mapper], receiver, instance)
            else:
                calls.call(post_bulk, receiver, effect.sender, **effect.arguments)
        except Exception as error:
            failed(effect, receiver, instance, error, "rollback")

    call_back = _call_back
    if (watcher := watching.watcher) is not None:
        watched = watcher.delivery(session, "rollback")
        call, call_back = partial(watched.receiver, call), partial(watched.callback, call_back)
    audience = Audience("rollback")
    for effect in frame.occurrences:
        for receiver in audience.for_effect(effect):
            call(receiver, effect)
    for fn in frame.on_rollback:
        call_back(session, fn, "on_rollback")


def _call_back(session: Session, fn: Callable[[], Any], what: str) -> None:
    """Call a function given to ``on_commit`` or ``on_rollback``."""
    try:
        awaits = async_session_of(session) is not None
        error = AsyncReceiverError(f"{what}({fn!r}) is async, but was called by {PLAIN_SESSION}")
        if is_async(fn) and not awaits:
            raise error
        result = fn()
        if isawaitable(result):
            if not awaits:
                cannot_await(result, error)
            await_only(result)
    except Exception as error:
        logger.exception("%s: callback %r failed", what, fn)
        if (watcher := watching.watcher) is not None:
            watcher.failed(error)


class Waiting(NamedTuple):
    """Who waits for the end of a transaction because of one class."""

    saves: Sequence[Receiver]
    some_choose: bool
    """Whether one of them has ``fields``."""
    deletes: Sequence[Receiver]


class Audience(dict["Mapper[Any]", Waiting]):
    """Who waits for the end of a transaction: looked up once for each mapper."""

    def __init__(self, on: Phase) -> None:
        super().__init__()
        self._on: Phase = on

    def __missing__(self, mapper: Mapper[Any] | None) -> Waiting:
        if mapper is None:  # orm/instrumentation.py, ClassManager.unregister: disposed of since
            return Waiting((), False, ())
        saves = post_save.table.lookup(mapper.class_, self._on)
        deletes = post_delete.table.lookup(mapper.class_, self._on)
        found = self[mapper] = Waiting(saves, any(one.fields for one in saves), deletes)
        return found

    def of(self, effect: Effect) -> Waiting:
        """Who waits because of the class of this instance, muted or not."""
        return self[state_of(effect.instance).manager.mapper]

    def for_effect(self, effect: Effect | Executed) -> Sequence[Receiver]:
        """Who is to be called for a net effect, or for a statement, in order."""
        if isinstance(effect, Executed):
            sender, occasion = effect.sender, (effect.mutes,)
            found = post_bulk.table.lookup(sender, self._on)
            return [one for one in found if was_audible(post_bulk, sender, one, occasion)]
        mapper = state_of(effect.instance).manager.mapper
        saves, some_choose, deletes = self[mapper]
        receivers = deletes if effect.kind is DELETED else saves
        if some_choose and effect.kind is UPDATED:
            unknown = columns_of(mapper).still_unknown(effect.changes, effect.unknown)
            receivers = [one for one in receivers if one.passes(mapper, effect.changes, unknown)]
        mutes = effect.source.mutes
        if receivers and mutes != NEVER_MUTED:
            signal, cls = signal_of(effect), mapper.class_
            receivers = [r for r in receivers if was_audible(signal, cls, r, mutes)]
        return receivers

"""After the end of a transaction: calling ``on="commit"`` and ``on="rollback"`` receivers.

A commit receiver gets a session and a transaction of its own, and an instance that lives in it.
What it commits itself is delivered after what is being delivered, never inside of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .._sqlalchemy import (
    async_session_like,
    attached_copy,
    current_task,
    detached_copy,
    ends_session_block,
    session_like,
    state_of,
    unused_copy,
)
from ..changes import UNSET, Changes
from ..dispatch import was_audible
from ..errors import AsyncReceiverError, SignalRecursionError
from ..net import CREATED, DELETED, Effect, Executed, Frame
from ..receivers import Call, Phase, Receiver, is_async
from ..signal import Signal, logger
from ..signals import post_bulk, post_delete, post_save, receiver_failed
from .calls import PLAIN_SESSION, WAITING, Calls, async_session_of, wait_for
from .columns import columns_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

MAX_DEPTH: Final = 100
"""How many commits may follow from one another through receivers."""


class Batch(NamedTuple):
    """What one root transaction leaves to be delivered."""

    session: Session
    async_session: AsyncSession | None
    """The one in front, held: a session that waits for its batch may be held by nobody else."""
    session_factory: Callable[[], Any] | None
    frame: Frame
    cause: Cause | None


class Cause(NamedTuple):
    """The receiver whose commit caused a batch, and what caused the call of that receiver."""

    receiver: Receiver | Callable[[], Any]
    """Or the function given to ``on_commit``."""
    depth: int
    cause: Cause | None


class _Delivery:
    """The batches that wait behind the one being delivered."""

    def __init__(self) -> None:
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

    def next(self) -> Batch | None:
        """The batch to deliver next; after ``None`` this delivery is over."""
        with self._lock:
            self._is_open = bool(self._waiting)
            return self._waiting.popleft() if self._waiting else None

    def end(self) -> None:
        """Nothing more is delivered, because something passes through."""
        with self._lock:
            self._is_open = False


_current: ContextVar[tuple[_Delivery, Cause] | None] = ContextVar(
    "sqla_signals_delivery", default=None
)
"""The delivery around us, and the call it is making. A task inherits it, and may outlive it."""
_open: set[_Delivery] = set()


def in_progress() -> bool:
    """Whether anything is being delivered anywhere."""
    return bool(_open)


def keep_values(session: Session, frame: Frame) -> None:
    """Keep the committed values of the rows, before the instances are expired."""
    if post_save.table.commit or post_delete.table.commit:
        for effect in frame.effects:
            effect.values = known_values(session, frame, effect)


def known_values(session: Session, frame: Frame, effect: Effect) -> Mapping[str, Any]:
    """The column values of a row that are committed, or are going to be.

    Where the instance may not know them, they are left to be loaded.
    """
    state = state_of(effect.instance)
    if effect.kind is DELETED:  # the values that were committed, not what came in between
        values = {**(effect.values or {}), **effect.before}
        return {key: value for key, value in values.items() if value is not UNSET}
    if state.key == effect.row and (
        state.session_id == session.hash_key
        # Expunged: it misses what a rollback to a savepoint sets back.
        or (state.session_id is None and not frame.went_back)
    ):
        return columns_of(state.manager.mapper).values(state)
    return {}


def committed(session: Session, frame: Frame, session_factory: Callable[[], Any] | None) -> None:
    """Deliver what a committed root transaction did, now or after what is being delivered."""
    delivery, cause = _current.get() or (None, None)
    batch = Batch(session, async_session_of(session), session_factory, frame, cause)
    if delivery is not None and delivery.waits_for_us() and delivery.add(batch):
        return
    delivery = _Delivery()
    _open.add(delivery)
    waiting: Batch | None = batch
    try:
        while waiting is not None:
            _deliver(delivery, waiting)
            waiting = delivery.next()
    finally:
        delivery.end()
        _open.discard(delivery)


def _deliver(delivery: _Delivery, batch: Batch) -> None:
    depth = batch.cause.depth + 1 if batch.cause is not None else 0
    if depth > MAX_DEPTH:
        _log_recursion(batch)
        return
    own = _OwnSessions(batch.session, batch.async_session, batch.session_factory)
    outer = _current.set(None)
    try:
        # Settled now: what receivers connect and disconnect on the way is for the next delivery.
        calls = [
            (effect, *call)
            for effect in batch.frame.occurrences
            for call in receivers_of(effect, "commit")
        ]
        for effect, signal, receiver in calls:
            _current.set((delivery, Cause(receiver, depth, batch.cause)))
            own.call(signal, receiver, effect)
        for fn in batch.frame.on_commit:
            _current.set((delivery, Cause(fn, depth, batch.cause)))
            _call_back(batch.session, fn, "on_commit")
    finally:
        _current.reset(outer)


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
    for effect in frame.occurrences:
        for signal, receiver in receivers_of(effect, "rollback"):
            instance = None
            try:
                if isinstance(effect, Effect):
                    mapper = state_of(effect.instance).manager.mapper
                    instance = detached_copy(mapper, effect.was, effect.values or {})
                _call(calls, signal, receiver, effect, instance)
            except Exception as error:
                _failed(signal, receiver, _sender(effect), instance, error, "rollback")
    for fn in frame.on_rollback:
        _call_back(session, fn, "on_rollback")


def forgotten(frame: Frame) -> None:
    """Log that nobody has ended a transaction, and that it was undone without a word.

    The garbage collector may run in any thread, in the middle of anything: no place to call
    receivers.
    """
    names = {
        str(receiver): None
        for effect in frame.occurrences
        for _, receiver in receivers_of(effect, "rollback")
    }
    names.update((repr(fn), None) for fn in frame.on_rollback)
    if names:
        logger.warning(
            "A session was garbage collected in the middle of a transaction, which undid its work. "
            "Not called: %s. Use 'with Session(...)', or call rollback() or close().",
            ", ".join(names),
        )


class _OwnSessions:
    """Makes the session of its own that each call gets."""

    def __init__(
        self, like: Session, front: AsyncSession | None, factory: Callable[[], Any] | None
    ) -> None:
        self._factory = factory
        self._async_session = front
        self._unused = session_like(like) if factory is None else None

    def call(self, signal: Signal, receiver: Receiver, effect: Effect | Executed) -> None:
        """Call one receiver in a transaction that is committed if it returns."""
        session: Session | None = None
        instance = None
        try:
            calls = self._open()
            session = calls.session
            if isinstance(effect, Effect):
                mapper = state_of(effect.instance).manager.mapper
                values = effect.values or {}
                if effect.kind is DELETED:
                    instance = detached_copy(mapper, effect.was, values)
                else:
                    instance = attached_copy(session, mapper, effect.row, values)
            _call(calls, signal, receiver, effect, instance)
            if _has_begun(session):
                session.commit()
        except Exception as error:
            if session is not None and _has_begun(session):
                try:
                    session.rollback()
                except Exception:
                    logger.exception("rolling back after the failure of receiver %s", receiver)
            _failed(signal, receiver, _sender(effect), instance, error, "commit")
        finally:
            # A factory's session may hold what it was made with. Ours is left open only by what
            # passes through, such as KeyboardInterrupt.
            if session is not None and (self._factory is not None or session.in_transaction()):
                _close(session)

    def _open(self) -> Calls:
        if self._unused is not None:
            sync = unused_copy(self._unused)
            front = self._async_session
            return Calls(sync, async_session_like(front, sync) if front is not None else None)
        assert self._factory is not None
        made = self._factory()
        sync = getattr(made, "sync_session", made)
        return Calls(sync, made if made is not sync else None)


def _has_begun(session: Session) -> bool:
    """Whether there is anything to commit or to roll back."""
    if WAITING in session.info and not session.in_transaction():
        session.begin()  # for the callbacks, which are work as well
    return session.in_transaction()


def _close(session: Session) -> None:
    try:
        session.close()
    except BaseException:
        # Cancelled again while rolling back: let the pool throw the connection away.
        session.invalidate()
        raise


def _sender(effect: Effect | Executed) -> type:
    if isinstance(effect, Executed):
        return effect.sender
    return state_of(effect.instance).manager.mapper.class_


def _call(
    session_calls: Calls,
    signal: Signal,
    receiver: Receiver,
    effect: Effect | Executed,
    instance: Any,
) -> None:
    if isinstance(effect, Executed):
        session_calls.call(signal, receiver, effect.sender, **effect.arguments)
        return
    calls = session_calls[state_of(effect.instance).manager.mapper]
    if effect.kind is DELETED:
        calls.delete(signal, (receiver,), instance, effect.origin, effect.source.using)
        return
    created = effect.kind is CREATED
    # A receiver may change what is mutable; the next one must not see it.
    changes = Changes(calls.columns.own_pairs(effect.changes))
    fields = None if created else effect.along.union(effect.changes)
    calls.save(
        signal, (receiver,), instance, created, changes, fields, effect.raw, effect.source.using
    )


def _failed(
    signal: Signal,
    receiver: Receiver,
    sender: type,
    instance: Any,
    error: Exception,
    on: Phase,
) -> None:
    logger.error(
        "%s on=%r: receiver %s failed for %s; nothing but its own work is undone by that",
        signal.name,
        on,
        receiver,
        sender.__name__,
        exc_info=error,
    )
    receiver_failed.send_robust(
        sender,
        receiver=receiver.fn,
        signal=signal,
        instance=instance,
        exception=error,
    )


def _call_back(session: Session, fn: Callable[[], Any], what: str) -> None:
    """Call a function given to ``on_commit`` or ``on_rollback``."""
    try:
        awaits = async_session_of(session) is not None
        error = AsyncReceiverError(f"{what}({fn!r}) is async, but was called by {PLAIN_SESSION}")
        if is_async(fn) and not awaits:
            raise error
        result = fn()
        if isawaitable(result):
            wait_for(result, awaits, error)
    except Exception:
        logger.exception("%s: callback %r failed", what, fn)


def receivers_of(effect: Effect | Executed, on: Call) -> Iterator[tuple[Signal, Receiver]]:
    """Who is to be called for a net effect, in order, and by which signal."""
    if isinstance(effect, Executed):
        for receiver in post_bulk.table.lookup(effect.sender, on):
            if was_audible(post_bulk, effect.sender, receiver, (effect.mutes,)):
                yield post_bulk, receiver
        return
    signal = post_delete if effect.kind is DELETED else post_save
    mapper = state_of(effect.instance).manager.mapper
    for receiver in signal.table.lookup(mapper.class_, on):
        if (
            effect.kind is not DELETED
            and effect.kind is not CREATED
            and not receiver.passes(mapper, effect.changes)
        ):
            continue
        if was_audible(signal, mapper.class_, receiver, effect.mutes):
            yield signal, receiver

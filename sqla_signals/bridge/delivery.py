"""After the end of a transaction: calling ``on="commit"`` and ``on="rollback"`` receivers.

A commit receiver gets a session and a transaction of its own, and an instance that lives in it.
What it commits itself is delivered after what is being delivered, never inside of it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.util import await_only

from .._sqlalchemy import attached_copy, detached_copy, session_like, state_of
from ..changes import Changes
from ..dispatch import was_audible
from ..errors import AsyncReceiverError, SignalRecursionError
from ..net import CREATED, DELETED, Effect, Frame
from ..receivers import Phase, Receiver, is_async
from ..signals import ModelSignal, logger, post_delete, post_save, receiver_failed
from .calls import PLAIN_SESSION, Calls, ModelCalls, async_session_of
from .columns import columns_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper, Session

MAX_DEPTH: Final = 100
"""How many commits may follow from one another through receivers."""


class Batch(NamedTuple):
    """What one root transaction leaves to be delivered."""

    session: Session
    session_factory: Callable[[], Any] | None
    frame: Frame
    cause: Cause | None


class Cause(NamedTuple):
    """The receiver whose commit caused a batch, and what caused the call of that receiver."""

    receiver: str
    depth: int
    cause: Cause | None


class _Delivery:
    """The batches that wait, and the call being made, in one thread or task."""

    __slots__ = ("cause", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Batch] = deque()
        self.cause: Cause | None = None


_running: dict[tuple[int, Any], _Delivery] = {}


def in_progress() -> bool:
    """Whether anything is being delivered anywhere."""
    return bool(_running)


def _here() -> tuple[int, Any]:
    """This thread and task. A context variable would be inherited by tasks that outlive us."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def keep_values(effects: Iterable[Effect]) -> None:
    """Keep the committed values of the rows, before the instances are expired."""
    for effect in effects:
        state = state_of(effect.instance)
        effect.values = columns_of(state.manager.mapper).values(state)


def committed(session: Session, frame: Frame, session_factory: Callable[[], Any] | None) -> None:
    """Deliver what a committed root transaction did, now or after what is being delivered."""
    here = _here()
    running = _running.get(here)
    if running is not None:
        running.waiting.append(Batch(session, session_factory, frame, running.cause))
        return
    running = _running[here] = _Delivery()
    running.waiting.append(Batch(session, session_factory, frame, None))
    try:
        while running.waiting:
            _deliver(running, running.waiting.popleft())
    finally:
        del _running[here]


def _deliver(running: _Delivery, batch: Batch) -> None:
    depth = batch.cause.depth + 1 if batch.cause is not None else 0
    if depth > MAX_DEPTH:
        _log_recursion(batch)
        return
    own = _OwnSession(batch.session, batch.session_factory)
    try:
        for effect in batch.frame.effects:
            for signal, receiver in _receivers(effect, "commit"):
                running.cause = Cause(str(receiver), depth, batch.cause)
                own.call(signal, receiver, effect)
        for fn in batch.frame.on_commit:
            running.cause = Cause(f"on_commit({fn!r})", depth, batch.cause)
            _call_back(batch.session, fn, "on_commit")
    finally:
        running.cause = None
        own.close()


def _log_recursion(batch: Batch) -> None:
    names: list[str] = []
    cause = batch.cause
    while cause is not None and cause.receiver not in names:
        names.append(cause.receiver)
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
    for effect in frame.effects:
        for signal, receiver in _receivers(effect, "rollback"):
            mapper = state_of(effect.instance).manager.mapper
            instance = detached_copy(mapper, effect.was, effect.values or {})
            try:
                _call(calls.of(mapper), signal, receiver, effect, instance)
            except Exception as error:
                _failed(signal, receiver, mapper, instance, error, "rollback")
    for fn in frame.on_rollback:
        _call_back(session, fn, "on_rollback")


class _OwnSession:
    """The session of its own that each call gets; one after the other where nobody can tell."""

    def __init__(self, like: Session, factory: Callable[[], Any] | None) -> None:
        self._like = like
        self._factory = factory
        self._calls: Calls | None = None

    def call(self, signal: ModelSignal, receiver: Receiver, effect: Effect) -> None:
        """Call one receiver in a transaction that is committed if it returns."""
        calls = self._calls
        if calls is None:
            calls = self._calls = self._open()
        session = calls.session
        mapper = state_of(effect.instance).manager.mapper
        make = detached_copy if effect.kind is DELETED else partial(attached_copy, session)
        instance = make(mapper, effect.row, effect.values or {})
        held = calls.references()
        try:
            _call(calls.of(mapper), signal, receiver, effect, instance)
            if session.in_transaction():
                session.commit()
        except Exception as error:
            session.rollback()
            _failed(signal, receiver, mapper, instance, error, "commit")
            del error
        except BaseException:
            self.close()
            raise
        session.expunge_all()
        if calls.references() != held:
            self.close()  # the receiver kept it, or a failure's traceback has

    def close(self) -> None:
        """Give up the session and what it holds."""
        if self._calls is not None:
            calls, self._calls = self._calls, None
            try:
                calls.session.close()
            except BaseException:
                # Cancelled again while rolling back: let the pool throw the connection away.
                calls.session.invalidate()
                raise

    def _open(self) -> Calls:
        if self._factory is None:
            return Calls(*session_like(self._like, async_session_of(self._like)))
        made = self._factory()
        sync: Session = getattr(made, "sync_session", made)
        return Calls(sync, made if made is not sync else None)


def _call(
    calls: ModelCalls, signal: ModelSignal, receiver: Receiver, effect: Effect, instance: Any
) -> None:
    if effect.kind is DELETED:
        calls.delete(signal, receiver, instance, effect.origin)
        return
    created = effect.kind is CREATED
    changes = Changes(partial(dict, effect.changes))
    fields = None if created else effect.along.union(effect.changes)
    calls.save(signal, receiver, instance, created, changes, fields, effect.raw)


def _failed(
    signal: ModelSignal,
    receiver: Receiver,
    mapper: Mapper[Any],
    instance: Any,
    error: Exception,
    on: Phase,
) -> None:
    logger.error(
        "%s on=%r: receiver %s failed for %s; its own work was rolled back, nothing else",
        signal.name,
        on,
        receiver,
        mapper.class_.__name__,
        exc_info=error,
    )
    receiver_failed.send_robust(
        mapper.class_,
        receiver=receiver.fn,
        signal=signal,
        instance=instance,
        exception=error,
    )


def _call_back(session: Session, fn: Callable[[], Any], what: str) -> None:
    """Call a function given to ``on_commit`` or ``on_rollback``."""
    try:
        awaits = async_session_of(session) is not None
        if is_async(fn) and not awaits:
            raise AsyncReceiverError(f"{what}({fn!r}) is async, but was called by {PLAIN_SESSION}")
        result = fn()
        if awaits and isawaitable(result):
            await_only(result)
    except Exception:
        logger.exception("%s: callback %r failed", what, fn)


def _receivers(effect: Effect, on: Phase) -> Iterator[tuple[ModelSignal, Receiver]]:
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

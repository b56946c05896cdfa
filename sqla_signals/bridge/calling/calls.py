"""Calling the receivers of one session: their arguments, awaiting, and notes on exceptions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sqlalchemy.util import await_only

from ..._sqlalchemy.instances import state_of
from ...changes.change import Change
from ...errors import AsyncReceiverError, note
from ...receivers.dispatch import active_mutes, audible, unawaitable
from ...receivers.observing import observed, observers
from ...receivers.receiver import Receiver, describe_sender
from ..columns.columns import Columns
from .audience import audience_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Mapper, Session

    from ...signals.signal import Signal

RAW: Final = "sqla_signals.raw"
"""Key in ``Session.info`` while inside :func:`sqla_signals.raw`."""


NOTHING_UNKNOWN: Final[frozenset[str]] = frozenset()


class Calls(dict["Mapper[Any]", "ModelCalls"]):
    """The calls of one session, by mapper; made for a flush or a delivery.

    :param detached: whether receivers get ``session=None``.
    """

    __slots__ = ("async_session", "detached", "raw", "session")

    def __init__(
        self, session: Session, async_session: AsyncSession | None = None, *, detached: bool = False
    ) -> None:
        super().__init__()
        self.session: Session = session
        self.detached: bool = detached
        self.raw: bool = bool(session.info.get(RAW))
        self.async_session: AsyncSession | None = async_session or async_session_of(session)

    def __missing__(self, mapper: Mapper[Any]) -> ModelCalls:
        self[mapper] = found = ModelCalls(self, mapper)
        return found

    def call(self, signal: Signal, receiver: Receiver, sender: Any, **arguments: Any) -> None:
        """Call one receiver of a signal that is sent for something else than one row."""
        fn = receiver.strong or receiver.fn
        if fn is None:
            return
        try:
            session = self.session_for(signal, receiver, sender)
            if observers:
                fn = _observed(fn, self.async_session, signal, receiver, sender)
            result = fn(sender, **arguments, session=session, signal=signal)
            if result is not None and inspect.isawaitable(result):
                _wait_for(self.async_session, signal, receiver, sender, result)
        except BaseException as error:
            _note(error, signal, receiver, sender)
            raise

    def session_for(self, signal: Signal, receiver: Receiver, sender: Any) -> Any:
        """The ``session=`` argument; an error before an async receiver is called in vain."""
        if receiver.is_async and self.async_session is None:
            raise unawaitable(signal, receiver, sender, PLAIN_SESSION)
        if self.detached:
            return None
        return self.async_session if receiver.is_async else self.session


def _wait_for(
    async_session: AsyncSession | None,
    signal: Signal,
    receiver: Receiver,
    sender: Any,
    result: Awaitable[Any],
) -> None:
    """Await what a receiver has returned."""
    if async_session is None:
        cannot_await(result, unawaitable(signal, receiver, sender, PLAIN_SESSION))
    await_only(result)


def _observed(
    fn: Callable[..., Any],
    async_session: AsyncSession | None,
    signal: Signal,
    receiver: Receiver,
    sender: Any,
) -> Callable[..., Any]:
    """``fn``, which tells the observers, and awaits its own result inside of that."""
    wait_for = partial(_wait_for, async_session, signal, receiver, sender)
    return observed(fn, signal, receiver, wait_for)


def cannot_await(result: Awaitable[Any], error: AsyncReceiverError) -> NoReturn:
    """Raise ``error`` for the result of a call that nothing here can await."""
    close = getattr(result, "close", None)
    if close is not None:  # a coroutine, which would complain otherwise
        close()
    raise error


def send(
    signal: Signal, sender: Any, receivers: Iterable[Receiver], where: str, **arguments: Any
) -> None:
    """Call receivers of a signal that belongs to no session, with the same arguments each.

    :param where: what we are called from, for the message that nothing can be awaited there.
    """
    for receiver in receivers:
        fn = receiver.strong or receiver.fn
        if fn is None:
            continue
        if observers:
            error = unawaitable(signal, receiver, sender, where)
            fn = observed(fn, signal, receiver, partial(cannot_await, error=error))
        try:
            result = fn(sender, **arguments, signal=signal)
            if result is not None and inspect.isawaitable(result):
                cannot_await(result, unawaitable(signal, receiver, sender, where))
        except BaseException as error:
            _note(error, signal, receiver, sender)
            raise


class ModelCalls:
    """The calls of one session for one mapped class: what is the same for each row."""

    __slots__ = (
        "_async_session",
        "_audience",
        "_bind",
        "_detached",
        "_session",
        "cls",
        "columns",
        "mapper",
    )

    def __init__(self, calls: Calls, mapper: Mapper[Any]) -> None:
        # Not the calls themselves: a cycle would keep the session until garbage collection.
        self._session = calls.session
        self._async_session = calls.async_session
        self._detached = calls.detached
        self.mapper: Mapper[Any] = mapper
        cls: type = mapper.class_
        self.cls: type = cls
        self._audience = audience_of(mapper)
        self.columns: Columns = self._audience.columns_of(mapper)
        self._bind: Engine | Connection | None = None

    def receivers(self, signal: Signal) -> tuple[Receiver, ...]:
        """The receivers to call at once, as they are now, without those that are muted."""
        if signal.table is not self._audience.table_of[signal]:
            self._audience = audience_of(self.mapper)
        found = self._audience.phases[signal]["flush"]
        return audible(signal, self.cls, found) if found and active_mutes() else found

    def save(
        self,
        signal: Signal,
        receivers: Iterable[Receiver],
        instance: Any,
        created: bool,
        changes: Mapping[str, Change],
        update_fields: frozenset[str] | None,
        raw: bool,
        using: Engine | Connection | None = None,
        unknown: frozenset[str] = NOTHING_UNKNOWN,
    ) -> None:
        """Call those receivers of ``pre_save`` or ``post_save`` whose conditions let it through.

        :param unknown: what may have another value besides ``changes``.
        """
        cls = self.cls
        session = None if self._detached else self._session
        if using is None:
            using = self._bind or self.using(instance)
        for receiver in receivers:
            fn = receiver.strong or receiver.fn
            if fn is None or (
                receiver.chooses and not receiver.passes(self.mapper, created, changes, unknown)
            ):
                continue
            if observers:
                fn = _observed(fn, self._async_session, signal, receiver, cls)
            try:
                result = fn(
                    cls,
                    instance=instance,
                    created=created,
                    changes=changes,
                    update_fields=update_fields,
                    raw=raw,
                    using=using,
                    session=self._for_async(signal, receiver) if receiver.is_async else session,
                    signal=signal,
                )
                if result is not None and inspect.isawaitable(result):
                    _wait_for(self._async_session, signal, receiver, cls, result)
            except BaseException as error:
                _note(error, signal, receiver, cls)
                raise

    def delete(
        self,
        signal: Signal,
        receivers: Iterable[Receiver],
        instance: Any,
        origin: Any,
        using: Engine | Connection | None = None,
    ) -> None:
        """Call receivers of ``pre_delete`` or ``post_delete``."""
        cls = self.cls
        session = None if self._detached else self._session
        if using is None:
            using = self._bind or self.using(instance)
        for receiver in receivers:
            fn = receiver.strong or receiver.fn
            if fn is None:
                continue
            if observers:
                fn = _observed(fn, self._async_session, signal, receiver, cls)
            try:
                result = fn(
                    cls,
                    instance=instance,
                    origin=origin,
                    using=using,
                    session=self._for_async(signal, receiver) if receiver.is_async else session,
                    signal=signal,
                )
                if result is not None and inspect.isawaitable(result):
                    _wait_for(self._async_session, signal, receiver, cls, result)
            except BaseException as error:
                _note(error, signal, receiver, cls)
                raise

    def _for_async(self, signal: Signal, receiver: Receiver) -> AsyncSession | None:
        """The ``session=`` argument of an async receiver; an error before it is called in vain."""
        if self._async_session is None:
            raise unawaitable(signal, receiver, self.cls, PLAIN_SESSION)
        return None if self._detached else self._async_session

    def using(self, instance: Any) -> Engine | Connection:
        """The bind that the row of an instance goes to."""
        if self._bind is not None:
            return self._bind
        session = self._session
        if is_sharded(session):
            # Session.get_bind() would settle the shard of a new instance, which is for the flush to
            # do, and give the chooser one more argument than the flush does
            # (ext/horizontal_shard.py, ShardedSession.connection_callable).
            state = state_of(instance)
            shard = state.key[2] if state.key is not None else state.identity_token
            choose = getattr(session, "shard_chooser", None)
            if shard is None and choose is not None:
                shard = choose(self.mapper.base_mapper, instance)
            return session.get_bind(self.mapper, instance=instance, shard_id=shard)
        # A flush asks for the connection of the whole hierarchy.
        self._bind = session.get_bind(self.mapper.base_mapper)
        return self._bind


def is_sharded(session: Session) -> bool:
    """Whether each row may have a bind of its own."""
    return session.connection_callable is not None


def _note(error: BaseException, signal: Signal, receiver: Receiver, sender: Any) -> None:
    sent_by = describe_sender(sender)
    note(error, f"Raised by receiver {receiver} of {signal.name}, sender {sent_by}.")


PLAIN_SESSION: Final = (
    "a plain Session, which cannot await. Use an AsyncSession for this work, or make the receiver "
    "a plain function"
)


def async_session_of(session: Session) -> AsyncSession | None:
    """The ``AsyncSession`` in front of a session, if there is one."""
    # Where nobody has imported the extension there is none; importing it would need greenlet.
    extension = sys.modules.get("sqlalchemy.ext.asyncio.session")
    found: AsyncSession | None = extension.async_session(session) if extension else None
    return found

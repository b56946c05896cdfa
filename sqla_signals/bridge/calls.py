"""Calling the receivers of one session: their arguments, awaiting, and notes on exceptions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.util import await_only

from .._sqlalchemy import state_of
from ..changes import Change
from ..dispatch import Table, audible, unawaitable
from ..errors import AsyncReceiverError
from ..receivers import Call, Receiver, describe_sender
from ..signals import post_delete, post_save
from .columns import Columns, columns_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Mapper, Session

    from ..signal import Signal

RAW: Final = "sqla_signals.raw"
"""Key in ``Session.info`` while inside :func:`sqla_signals.raw`."""

WAITING: Final = "sqla_signals.waiting"
"""Key in ``Session.info`` of a frame with callbacks for a transaction that has not begun."""


class Calls:
    """What the calls of one session have in common; made for a flush or a delivery.

    :param detached: whether receivers get ``session=None``.
    """

    __slots__ = ("_async_session", "_models", "detached", "raw", "session")

    def __init__(
        self, session: Session, async_session: AsyncSession | None = None, *, detached: bool = False
    ) -> None:
        self.session: Session = session
        self.detached: bool = detached
        self.raw: bool = bool(session.info.get(RAW))
        self._async_session = async_session or async_session_of(session)
        self._models: dict[Mapper[Any], ModelCalls] = {}

    def of(self, mapper: Mapper[Any]) -> ModelCalls:
        """The calls for one mapped class."""
        found = self._models.get(mapper)
        if found is None:
            found = self._models[mapper] = ModelCalls(self, mapper)
        return found

    def session_for(self, receiver: Receiver) -> Any:
        """The ``session=`` argument."""
        if self.detached:
            return None
        return self._async_session if receiver.is_async else self.session

    def wait_for(
        self, result: Awaitable[Any], signal: Signal, receiver: Receiver, sender: Any
    ) -> None:
        """Await what a receiver returned."""
        error = unawaitable(signal, receiver, sender, PLAIN_SESSION)
        wait_for(result, self._async_session is not None, error)

    def call(self, signal: Signal, receiver: Receiver, sender: Any, **arguments: Any) -> None:
        """Call one receiver of a signal that is sent for something else than one row."""
        fn = receiver.strong or receiver.fn
        if fn is None:
            return
        try:
            self.check_awaitable(signal, receiver, sender)
            result = fn(sender, **arguments, session=self.session_for(receiver), signal=signal)
            if result is not None and inspect.isawaitable(result):
                self.wait_for(result, signal, receiver, sender)
        except BaseException as error:
            _note(error, signal, receiver, sender)
            raise

    def check_awaitable(self, signal: Signal, receiver: Receiver, sender: Any) -> None:
        """Raise :class:`AsyncReceiverError` before an async receiver is called in vain."""
        if receiver.is_async and self._async_session is None:
            raise unawaitable(signal, receiver, sender, PLAIN_SESSION)


def wait_for(result: Awaitable[Any], awaits: bool, error: AsyncReceiverError) -> None:
    """Await the result of a call; raise ``error`` where nothing can."""
    if awaits:
        await_only(result)
        return
    if inspect.iscoroutine(result):
        result.close()
    raise error


class ModelCalls:
    """The calls of one session for one mapped class: what is the same for each row."""

    __slots__ = ("_calls", "_found", "_using", "cls", "columns", "mapper")

    def __init__(self, calls: Calls, mapper: Mapper[Any]) -> None:
        self._calls = calls
        self.mapper: Mapper[Any] = mapper
        self.cls: type = mapper.class_
        self.columns: Columns = columns_of(mapper)
        self._using: Engine | Connection | None = None
        self._found: dict[Signal, tuple[Table, Mapping[Call, tuple[Receiver, ...]]]] = {}

    def receivers(self, signal: Signal) -> tuple[Receiver, ...]:
        """The flush receivers of a signal for this class, as they are now, unless muted."""
        found = self._lookup(signal)["flush"]
        return audible(signal, self.cls, found) if found else ()

    def awaits(self, on: Call) -> bool:
        """Whether anybody waits for the transaction to end like this, muted or not."""
        return bool(self._lookup(post_save)[on] or self._lookup(post_delete)[on])

    def _lookup(self, signal: Signal) -> Mapping[Call, tuple[Receiver, ...]]:
        table = signal.table
        found = self._found.get(signal)
        if found is None or found[0] is not table:
            found = self._found[signal] = (table, table.phases(self.cls))
        return found[1]

    def save(
        self,
        signal: Signal,
        receiver: Receiver,
        instance: Any,
        created: bool,
        changes: Mapping[str, Change],
        update_fields: frozenset[str] | None,
        raw: bool,
        using: Engine | Connection | None = None,
    ) -> None:
        """Call one receiver of ``pre_save`` or ``post_save``."""
        fn = receiver.strong or receiver.fn
        if fn is None:
            return
        calls, cls = self._calls, self.cls
        try:
            if receiver.is_async:
                calls.check_awaitable(signal, receiver, cls)
            result = fn(
                cls,
                instance=instance,
                created=created,
                changes=changes,
                update_fields=update_fields,
                raw=raw,
                using=using or self.using(instance),
                session=calls.session_for(receiver),
                signal=signal,
            )
            if result is not None and inspect.isawaitable(result):
                calls.wait_for(result, signal, receiver, cls)
        except BaseException as error:
            _note(error, signal, receiver, cls)
            raise

    def delete(
        self,
        signal: Signal,
        receiver: Receiver,
        instance: Any,
        origin: Any,
        using: Engine | Connection | None = None,
    ) -> None:
        """Call one receiver of ``pre_delete`` or ``post_delete``."""
        fn = receiver.strong or receiver.fn
        if fn is None:
            return
        calls, cls = self._calls, self.cls
        try:
            if receiver.is_async:
                calls.check_awaitable(signal, receiver, cls)
            result = fn(
                cls,
                instance=instance,
                origin=origin,
                using=using or self.using(instance),
                session=calls.session_for(receiver),
                signal=signal,
            )
            if result is not None and inspect.isawaitable(result):
                calls.wait_for(result, signal, receiver, cls)
        except BaseException as error:
            _note(error, signal, receiver, cls)
            raise

    def using(self, instance: Any) -> Engine | Connection:
        """The bind that the row of an instance goes to."""
        if self._using is not None:
            return self._using
        session = self._calls.session
        if session.connection_callable is not None:  # horizontal sharding: each row has its own
            # Asking settles the shard of a new instance; that is for the flush to do.
            state = state_of(instance)
            token = state.identity_token
            bind = session.get_bind(self.mapper, instance=instance)
            state.identity_token = token
            return bind
        # A flush asks for the connection of the whole hierarchy.
        self._using = session.get_bind(self.mapper.base_mapper)
        return self._using


def _note(error: BaseException, signal: Signal, receiver: Receiver, sender: Any) -> None:
    error.add_note(
        f"Raised by receiver {receiver} of {signal.name}, sender {describe_sender(sender)}."
    )


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

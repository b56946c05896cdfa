"""Calling the receivers of one session: their arguments, awaiting, and notes on exceptions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.util import await_only

from ..dispatch import unawaitable
from ..receivers import Receiver, describe_sender

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Mapper, Session

    from ..signals import Signal

RAW: Final = "sqla_signals.raw"
"""Key in ``Session.info`` while inside :func:`sqla_signals.raw`."""


class Calls:
    """What the calls of one session have in common; made for a flush or a delivery."""

    __slots__ = ("_async_session", "_binds", "raw", "session")

    def __init__(self, session: Session, async_session: AsyncSession | None = None) -> None:
        self.session = session
        self.raw = bool(session.info.get(RAW))
        self._async_session = async_session or async_session_of(session)
        self._binds: dict[Mapper[Any], Engine | Connection] = {}

    def using(self, mapper: Mapper[Any], instance: object) -> Engine | Connection:
        """The bind that the row of ``instance`` goes to."""
        if self.session.connection_callable is not None:  # horizontal sharding: per instance
            return self.session.get_bind(mapper, instance=instance)
        bind = self._binds.get(mapper)
        if bind is None:
            bind = self._binds[mapper] = self.session.get_bind(mapper)
        return bind

    def references(self) -> tuple[int, int]:
        """How often the sessions are referred to; more than before: somebody kept one."""
        return sys.getrefcount(self.session), sys.getrefcount(self._async_session)

    def call(
        self, signal: Signal, receiver: Receiver, sender: type, arguments: dict[str, Any]
    ) -> None:
        """Call one receiver, awaiting it if it is async; an exception gets a note and goes on."""
        fn = receiver.fn
        if fn is None:
            return
        try:
            if receiver.is_async:
                self._call_async(signal, receiver, fn, sender, arguments)
            else:
                result = fn(sender, **arguments)
                if result is not None and inspect.isawaitable(result):
                    self._wait_for(result, signal, receiver, sender)
        except BaseException as error:
            error.add_note(
                f"Raised by receiver {receiver} of {signal.name}, sender {describe_sender(sender)}."
            )
            raise

    def _call_async(
        self,
        signal: Signal,
        receiver: Receiver,
        fn: Callable[..., Awaitable[Any]],
        sender: type,
        arguments: dict[str, Any],
    ) -> None:
        if self._async_session is None:
            raise unawaitable(signal, receiver, sender, PLAIN_SESSION)
        if arguments["session"] is not None:
            arguments = {**arguments, "session": self._async_session}
        await_only(fn(sender, **arguments))

    def _wait_for(
        self, result: Awaitable[Any], signal: Signal, receiver: Receiver, sender: type
    ) -> None:
        """A plain function returned an awaitable: a decorated or partial async receiver."""
        if self._async_session is None:
            if inspect.iscoroutine(result):
                result.close()
            raise unawaitable(signal, receiver, sender, PLAIN_SESSION)
        await_only(result)


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

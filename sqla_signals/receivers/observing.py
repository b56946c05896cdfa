"""Observing calls of receivers: what ``trace()``, OpenTelemetry and the pytest plugin share.

An :class:`Observer` in :data:`observers` is told of every call. The code that makes a call asks
``if observers:`` first, so that this costs nothing while there is none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import inspect

from .blocks import block
from .receiver import Receiver, identity

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .receiver import Phase

Moment = Literal[
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "before_commit",
    "after_commit",
    "after_transaction_end",
]
"""SQLAlchemy's session events of those names."""


@dataclass(eq=False, slots=True, kw_only=True)
class Call:
    """One call of a receiver, or of a function given to ``on_commit`` or ``on_rollback``."""

    on: Phase
    name: str
    """Of the receiver or the function."""
    signal: Any = None
    """``None`` for a function, and for a durable message until its receiver is called."""
    receiver: Receiver | None = None
    sender: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The keyword arguments, as far as they are known."""
    message: Any = None
    """The :class:`~sqla_signals.durable.Message`, with ``on="durable"``."""
    notes: Mapping[Observer, Any] = field(default_factory=dict)
    """What each observer noted when the transaction ended that left this call."""
    error: BaseException | None = None
    """Set once the call has failed, also where the exception is logged and not raised."""
    observers: tuple[Observer, ...] = ()
    """The observers that were told of its beginning."""

    @property
    def event(self) -> tuple[Any, ...]:
        """Equal for the calls of all receivers that one event calls; it holds no instance."""
        known = self.arguments
        about: tuple[Any, ...]
        if "instance" in known:  # with on="commit", each receiver gets one of its own
            about = row_of(known["instance"]), identity(known.get("action"))
        elif "statement" in known:
            about = (id(known["statement"]),)
        else:
            about = tuple((name, id(value)) for name, value in known.items())
        return self.signal, self.on, identity(self.sender), about


def row_of(instance: Any) -> Any:
    """Return what is equal for the instances that stand for one row."""
    state = inspect(instance, raiseerr=False)
    key = getattr(state, "key", None)
    return key if key is not None else id(instance)


class Observer:
    """Override what is wanted. An observer must not raise."""

    def around(self, call: Call) -> AbstractContextManager[object]:
        """Return what is entered for the length of a call; ``call.error`` is set when it is left.

        With ``on="commit"`` the call includes the receiver's own transaction, with ``on="durable"``
        everything that a worker does with the message, and with each the awaiting.
        """
        return nullcontext()

    def called(self, call: Call) -> None:
        """Inside of :meth:`around`, the receiver is called now: every attribute of ``call`` is set.

        Not for functions given to ``on_commit`` or ``on_rollback``.
        """

    def transaction_ended(self, session: Session, on: Phase) -> Any:
        """A transaction has ended; return a note for the ``call.notes`` of the calls it leaves.

        Those come later if a commit receiver committed it.
        """

    def session_event(self, moment: Moment, session: Session, about: Any) -> None:
        """SQLAlchemy sent this event for a session that an installation listens to.

        Several installations may tell of the same event.

        :param about: the unit of work, or the transaction.
        """


def tell(moment: Moment, session: Session, about: Any = None) -> None:
    """Tell the observers of one of SQLAlchemy's session events."""
    for observer in tuple(observers):
        observer.session_event(moment, session, about)


def transaction_notes(session: Session, on: Phase) -> dict[Observer, Any]:
    """Tell the observers that a transaction has ended; return what each of them notes."""
    return {observer: observer.transaction_ended(session, on) for observer in tuple(observers)}


observers: Final[list[Observer]] = []
"""Who observes, in every thread: append and remove at any moment.

A removed observer is still told the end of the calls whose beginning it was told.
"""

_innermost: ContextVar[Call | None] = ContextVar("sqla_signals_call", default=None)


@block
def observe(call: Call) -> Iterator[None]:
    """Tell the observers of a call that is made inside the ``with`` block."""
    outer = _innermost.get()
    call.observers = tuple(observers)
    with ExitStack() as stack:
        for observer in call.observers:
            stack.enter_context(observer.around(call))
        _innermost.set(call)
        try:
            yield
        except BaseException as error:
            call.error = error
            raise
        finally:
            _innermost.set(outer)


def note_failure(error: Exception) -> None:
    """Tell the observers that the call being made has failed, where that is only logged."""
    call = _innermost.get()
    if call is not None:
        call.error = error


def observed(
    fn: Callable[..., Any],
    signal: Any,
    receiver: Receiver,
    wait_for: Callable[[Awaitable[Any]], None] | None = None,
) -> Callable[..., Any]:
    """Make a function that calls ``fn`` for a receiver, and tells the observers.

    :param wait_for: awaits what ``fn`` returns, so that this belongs to the call as well.
    """

    def call(sender: Any, /, **arguments: Any) -> Any:
        with _calling(signal, receiver, sender, arguments):
            result = fn(sender, **arguments)
            if wait_for is not None and isawaitable(result):
                return wait_for(result)
            return result

    return call


def observed_async(
    fn: Callable[..., Any], signal: Any, receiver: Receiver
) -> Callable[..., Awaitable[Any]]:
    """Make an ``async`` function that calls and awaits ``fn``, and tells the observers."""

    async def call(sender: Any, /, **arguments: Any) -> Any:
        with _calling(signal, receiver, sender, arguments):
            result = fn(sender, **arguments)
            return await result if isawaitable(result) else result

    return call


@block
def _calling(
    signal: Any, receiver: Receiver, sender: Any, arguments: Mapping[str, Any]
) -> Iterator[None]:
    """The receiver is called inside the block, with these arguments."""
    call, on = _innermost.get(), receiver.phase
    if on == "flush" or call is None or call.on != on:
        call = Call(on=on, name=receiver.name)
        around: AbstractContextManager[object] = observe(call)
    else:  # the delivery or the worker is observing it already
        around = nullcontext()
    call.signal, call.receiver, call.sender, call.arguments = signal, receiver, sender, arguments
    with around:
        for observer in call.observers:
            observer.called(call)
        yield

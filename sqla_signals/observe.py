"""Looking on: what ``trace()``, the OpenTelemetry integration and the pytest plugin share.

An :class:`Observer` is entered around each call of a receiver, and told of flushes and of the ends
of transactions. While there is none, nothing of this is in the way: the tables of the signals hold
the receivers themselves.
"""

from __future__ import annotations

import threading
from asyncio import isfuture
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ._sqlalchemy.instances import state_of
from .bridge.delivery.effect_calls import signal_of
from .changes.effects import CREATED, DELETED, Effect, Executed
from .receivers.blocks import block
from .receivers.receiver import Receiver, dotted_name
from .signals.signal import watch

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .durable.message.envelope import Message
    from .receivers.receiver import Phase
    from .receivers.watching import Moment
    from .signals.signal import Signal

T = TypeVar("T")
Around = AbstractContextManager[object]


@dataclass(eq=False, slots=True, kw_only=True)
class Call:
    """One call of a receiver, or of a function given to ``on_commit`` or ``on_rollback``."""

    on: Phase
    name: str
    """Of the receiver or the function."""
    signal: Signal | None = None
    """``None`` for a function, and for a durable message."""
    receiver: Receiver | None = None
    sender: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the keyword arguments."""
    message: Message | None = None
    """With ``on="durable"``."""
    error: BaseException | None = None
    """Once it has failed; also where that is logged and not raised."""
    goes_on: bool = False
    """It has returned something to be awaited. Observers are entered again when that is done."""
    kept: dict[Observer, Any] = field(default_factory=dict)
    """What observers keep until then."""


class Observer:
    """Looks on. Override what is wanted; nothing may be raised."""

    def around(self, call: Call) -> Around:
        """Entered for the length of a call; ``call.error`` is there when it is left.

        With ``on="commit"`` that includes the receiver's own transaction, with ``on="durable"``
        everything that a worker does with the message.
        """
        return nullcontext()

    def called(self, call: Call) -> None:
        """Told inside of :meth:`around`, right before the receiver is called.

        ``call`` has everything by then: also with ``on="durable"`` the signal and the receiver,
        and in every phase the arguments that this receiver gets.
        """

    def delivery(self, session: Session, on: Phase) -> Callable[[], Around]:
        """A transaction has ended; return what is entered around each call that it leaves.

        The calls come later where a commit receiver has committed.
        """
        return nullcontext

    def session_event(self, moment: Moment, session: Session, about: Any) -> None:
        """One of SQLAlchemy's events, of a session that an installation listens to."""


_observers: tuple[Observer, ...] = ()
_lock: Final = threading.Lock()
_innermost: ContextVar[Call | None] = ContextVar("sqla_signals_call", default=None)


def add(observer: Observer) -> None:
    """Let an observer look on, in every thread, from the next call on."""
    global _observers
    with _lock:
        _observers = (*_observers, observer)
        if len(_observers) == 1:
            watch(_Watch())


def remove(observer: Observer) -> None:
    """Let it look on no more; it is left out of calls to come, and told the end of those begun."""
    global _observers
    with _lock:
        _observers = tuple(one for one in _observers if one is not observer)
        if not _observers:
            watch(None)


@block
def _seen(call: Call) -> Iterator[None]:
    outer = _innermost.get()
    with ExitStack() as stack:
        for observer in _observers:
            stack.enter_context(observer.around(call))
        _innermost.set(call)
        try:
            yield
        except BaseException as error:
            call.error = error
            raise
        finally:
            _innermost.set(outer)


class _Watch:
    """Tells the observers."""

    def watched(self, signal: Signal, receivers: Iterable[Receiver]) -> Iterable[Receiver]:
        return [
            # The others are called by what holds their transaction, and are seen there.
            receiver.calling(
                _telling(signal, receiver)
                if receiver.phase == "flush"
                else _completing(signal, receiver)
            )
            for receiver in receivers
        ]

    def session_event(self, moment: Moment, session: Session, about: Any = None) -> None:
        for observer in _observers:
            observer.session_event(moment, session, about)

    def delivery(self, session: Session, on: Phase) -> _Delivery:
        return _Delivery(on, [observer.delivery(session, on) for observer in _observers])

    def message(self, run: Callable[[], T], message: Message) -> T:
        with _seen(Call(on="durable", name=message.receiver, message=message)):
            return run()

    def failed(self, error: Exception) -> None:
        call = _innermost.get()
        if call is not None:
            call.error = error


class _Delivery:
    """What one transaction leaves to be done."""

    def __init__(self, on: Phase, inside: list[Callable[[], Around]]) -> None:
        self._on: Phase = on
        self._inside = inside

    @block
    def _seen(self, call: Call) -> Iterator[None]:
        with ExitStack() as stack:
            for around in self._inside:
                stack.enter_context(around())
            stack.enter_context(_seen(call))
            yield

    def receiver(
        self,
        call: Callable[[Receiver, Effect | Executed], None],
        receiver: Receiver,
        effect: Effect | Executed,
    ) -> None:
        sender: Any
        arguments: dict[str, Any]
        if isinstance(effect, Executed):
            sender, arguments = effect.sender, dict(effect.arguments)
        else:
            sender = state_of(effect.instance).manager.class_
            arguments = {"instance": effect.instance, "using": effect.source.using}
            if effect.kind is not DELETED:
                arguments["created"] = effect.kind is CREATED
        seen = Call(
            on=self._on,
            name=receiver.name,
            signal=signal_of(effect),
            receiver=receiver,
            sender=sender,
            arguments=arguments,
        )
        with self._seen(seen):
            call(receiver, effect)

    def callback(
        self,
        call: Callable[[Session, Callable[[], Any], str], None],
        session: Session,
        fn: Callable[[], Any],
        what: str,
    ) -> None:
        with self._seen(Call(on=self._on, name=dotted_name(fn))):
            call(session, fn, what)


def _telling(signal: Signal, receiver: Receiver) -> Callable[..., Any]:
    """A function that calls the receiver and lets the observers see it."""

    def seen(sender: Any, arguments: Mapping[str, Any]) -> Call:
        return Call(
            on="flush",
            name=receiver.name,
            signal=signal,
            receiver=receiver,
            sender=sender,
            arguments=arguments,
        )

    def call(sender: Any, /, **arguments: Any) -> Any:
        fn = receiver.fn
        if fn is None:  # garbage, by now
            return None
        this = seen(sender, arguments)
        with _seen(this):
            _told(this)
            result = fn(sender, **arguments)
            # A task goes on by itself, and whoever gets it may want to do more than await it.
            this.goes_on = isawaitable(result) and not isfuture(result)
        return _Awaited(result, this) if this.goes_on else result

    async def call_async(sender: Any, /, **arguments: Any) -> Any:
        fn = receiver.fn
        if fn is None:
            return None
        this = seen(sender, arguments)
        with _seen(this):
            _told(this)
            return await fn(sender, **arguments)

    return call_async if receiver.is_async else call


def _completing(signal: Signal, receiver: Receiver) -> Callable[..., Any]:
    """A function that calls the receiver, inside of a call that is seen, and says with what."""

    def call(sender: Any, /, **arguments: Any) -> Any:
        fn = receiver.fn
        if fn is None:
            return None
        this = _innermost.get()
        if this is not None and this.on == receiver.phase:
            this.signal, this.receiver = signal, receiver
            this.sender, this.arguments = sender, arguments
            _told(this)
        return fn(sender, **arguments)

    return call


def _told(call: Call) -> None:
    for observer in _observers:
        observer.called(call)


class _Awaited(Coroutine[Any, Any, Any]):
    """What a decorated ``async def`` has returned."""

    def __init__(self, result: Any, call: Call) -> None:
        self._result = result
        self._call = call
        self._steps = self._run()

    def _run(self) -> Generator[Any, Any, Any]:
        self._call.goes_on = False
        with _seen(self._call):
            return (yield from self._result.__await__())

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._steps

    def send(self, value: Any) -> Any:
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        if self._call.goes_on:  # a task that is cancelled before it has begun
            self.close()
        return self._steps.throw(*error)

    def close(self) -> None:
        if not self._call.goes_on:
            self._steps.close()
            return
        self._call.goes_on = False
        with _seen(self._call):
            close = getattr(self._result, "close", None)
            if close is not None:
                close()

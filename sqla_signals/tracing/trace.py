"""``trace``: what really happened, as a tree of flushes, signals, receivers and what these changed.

Recorded in the context (thread or task) of the ``with`` block and in what inherits it, for sessions
that an installation listens to. For looking into an application, not for running it: at each call
of a receiver it looks through everything that the session holds changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..receivers.blocks import block
from ..receivers.observing import Observer, observers
from .recording import Trace, session_of
from .rows import Pending
from .steps import TracedStep

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ..receivers.observing import Call, Moment
    from ..receivers.receiver import Call as Way


class _Place(NamedTuple):
    """Where in a trace we are."""

    trace: Trace
    step: TracedStep


_here: ContextVar[tuple[_Place, ...]] = ContextVar("sqla_signals_trace", default=())


def _places() -> list[_Place]:
    """Where we are; a task that has outlived a trace is nowhere in it."""
    return [place for place in _here.get() if place.trace.root.end_ns is None]


class _Recorder(Observer):
    """Tells the traces of the context of what happens in it."""

    def __init__(self) -> None:
        self._traces = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        with self._lock:
            self._traces += 1
            if self._traces == 1:
                observers.append(self)

    def end(self) -> None:
        with self._lock:
            self._traces -= 1
            if not self._traces:
                observers.remove(self)

    @block
    def around(self, call: Call) -> Iterator[None]:
        outer = _here.get()
        places = call.notes.get(self, _places())
        if not places:
            yield
            return
        steps = {trace: trace.begin_call(step, call) for trace, step in places}
        session = session_of(call)
        pending = Pending(session, call.arguments.get("instance")) if session else None
        _here.set(tuple(_Place(trace, step) for trace, step in steps.items()))
        try:
            yield
        finally:
            _here.set(outer)
            for trace, step in steps.items():
                if session and pending:
                    trace.changed_by(step, pending, session)
                trace.end_call(step, call)

    def transaction_ended(self, session: Session, on: Way) -> list[_Place]:
        return [_Place(trace, trace.delivery(session, on, step)) for trace, step in _places()]

    def session_event(self, moment: Moment, session: Session, about: Any) -> None:
        for trace, step in _places():
            match moment:
                case "before_flush":
                    trace.before_flush(session, step)
                case "after_flush":
                    trace.after_flush(session, about)
                case "after_flush_postexec":
                    trace.after_flush_postexec(session)
                case "before_commit":
                    trace.before_commit(session, step)
                case "after_commit":
                    trace.after_commit(session)
                case "after_transaction_end":
                    trace.after_transaction_end(session, about, step)


_recorder: Final = _Recorder()


@block
def trace() -> Iterator[Trace]:
    """Record what the sessions and receivers do inside a ``with`` block.

    :returns: for ``with trace() as t:``, a :class:`Trace`. ``print(t)`` shows the tree with times,
        ``t.save_chrome(path)`` writes it for https://ui.perfetto.dev, and ``t.root`` is its first
        step.

    What happens in other threads and tasks is not in it, but for those that were started inside the
    block and have inherited its context, as ``asyncio.gather()`` and ``asyncio.to_thread()`` do.
    Blocks may nest; each records everything inside of it. Sessions that no installation listens to
    are not seen.

    Outside of such a block nothing is recorded, and a row costs what it has always cost.
    """
    recorded = Trace()
    _recorder.begin()
    _here.set((*_here.get(), _Place(recorded, recorded.root)))
    try:
        yield recorded
    finally:
        recorded.root.end()
        _here.set(tuple(place for place in _here.get() if place.trace is not recorded))
        _recorder.end()

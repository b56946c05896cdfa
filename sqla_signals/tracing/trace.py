"""``trace``: what really happened, as a tree of flushes, signals, receivers and what these changed.

Recorded in the context (thread or task) of the ``with`` block and in what inherits it, for sessions
that an installation listens to. For looking into an application, not for running it: at each call
of a receiver it looks through everything that the session holds changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .. import observe
from ..receivers.blocks import block
from .recording import Trace, session_of
from .rows import Pending
from .steps import TracedStep

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ..observe import Around, Call
    from ..receivers.receiver import Phase
    from ..receivers.watching import Moment


class _Place(NamedTuple):
    """Where in a trace we are."""

    trace: Trace
    step: TracedStep


_here: ContextVar[tuple[_Place, ...]] = ContextVar("sqla_signals_trace", default=())


def _places() -> list[_Place]:
    """Where we are; a task that has outlived a trace is nowhere in it."""
    return [place for place in _here.get() if place.trace.root.end_ns is None]


class _LookingOn(observe.Observer):
    """Tells the traces of the context of what happens in it."""

    def __init__(self) -> None:
        self._traces = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        with self._lock:
            self._traces += 1
            if self._traces == 1:
                observe.add(self)

    def end(self) -> None:
        with self._lock:
            self._traces -= 1
            if not self._traces:
                observe.remove(self)

    @block
    def around(self, call: Call) -> Iterator[None]:
        outer = _here.get()
        places = _places()
        if not places:
            yield
            return
        kept: dict[Trace, TracedStep] = call.kept.pop(self, {})
        steps = {
            trace: kept[trace] if trace in kept else trace.begin_call(step, call)
            for trace, step in places
        }
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
            if call.goes_on:
                call.kept[self] = steps

    def delivery(self, session: Session, on: Phase) -> Callable[[], Around]:
        places = tuple(
            _Place(trace, trace.delivery(session, on, step)) for trace, step in _places()
        )

        @block
        def around() -> Iterator[None]:
            outer = _here.get()
            _here.set(places)
            try:
                yield
            finally:
                _here.set(outer)

        return around

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


_looking_on: Final = _LookingOn()


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
    _looking_on.begin()
    _here.set((*_here.get(), _Place(recorded, recorded.root)))
    try:
        yield recorded
    finally:
        recorded.root.end()
        _here.set(tuple(place for place in _here.get() if place.trace is not recorded))
        _looking_on.end()

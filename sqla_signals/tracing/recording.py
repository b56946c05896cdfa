"""``trace``: what really happened, as a tree of flushes, signals, receivers and what these changed.

The parent of a step is the call around it, with two exceptions. Signals that a flush sends are a
part of the flush, which is no call. Calls after a commit are a part of that commit, though they may
be made after the receiver that committed has returned.

For looking into an application, not for running it: at each call of a receiver, a trace looks
through everything that the session holds changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.orm import Session

from .._sqlalchemy.sessions import plain_session
from .._sqlalchemy.transactions import is_committing
from ..receivers.blocks import block
from ..receivers.installations import model_signals
from ..receivers.observing import Observer, observers
from ..receivers.receiver import describe_sender
from .rows import Pending, association_rows, row_name, rows_of, state_or_none
from .steps import Kind, Trace, TracedStep

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, SessionTransaction, UOWTransaction

    from ..receivers.observing import Call, Moment
    from ..receivers.receiver import Phase

    State = InstanceState[Any]


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
    recorder = _Recorder()
    recorded = recorder.trace
    observers.append(recorder)
    _here.set({**_here.get(), recorder: recorded.root})
    try:
        yield recorded
    finally:
        observers.remove(recorder)
        recorded.root.end()
        _here.set({one: step for one, step in _here.get().items() if one is not recorder})


@dataclass
class _Work:
    """The steps of a transaction or a savepoint."""

    flushes: list[TracedStep] = field(default_factory=list)
    commit: TracedStep | None = None
    is_committed: bool = False


class _Recorder(Observer):
    """Records one trace."""

    def __init__(self) -> None:
        self.trace: Trace = Trace()
        self._flushes: WeakKeyDictionary[Session, TracedStep] = WeakKeyDictionary()
        """The last flush of each session."""
        self._work: WeakKeyDictionary[SessionTransaction, _Work] = WeakKeyDictionary()
        self._ends: WeakKeyDictionary[Session, TracedStep] = WeakKeyDictionary()
        """The last commit or rollback of each session, until its calls begin."""
        self._causes: WeakKeyDictionary[State, str] = WeakKeyDictionary()
        """The receivers that have changed instances which are not flushed yet."""

    def _begin(
        self, parent: TracedStep, kind: Kind, name: str, detail: str = "", about: Any = None
    ) -> TracedStep:
        step = TracedStep(
            kind=kind, name=name, detail=detail, about=about, track=self.trace.tracks.here()
        )
        parent.children.append(step)
        return step

    # -- calls -------------------------------------------------------------------------------------

    @block
    def around(self, call: Call) -> Iterator[None]:
        outer = _here.get()
        parent = call.notes.get(self, outer.get(self))
        if parent is None:
            yield
            return
        step = self._begin_call(parent, call)
        session = _session_of(call)
        pending = Pending(session, call.arguments.get("instance")) if session else None
        _here.set({**outer, self: step})
        try:
            yield
        finally:
            _here.set(outer)
            for what, state, fields in pending.differences() if pending else ():
                self._begin(step, "change", what, f"{row_name(state)}{fields}").end()
                self._causes[state] = step.name
            step.end(call.error)
            flush = self._open_flush(session) if session else None
            if flush is not None and call.error is not None and call.signal in model_signals:
                self._end_flush(flush, call.error)  # a veto, which no event of SQLAlchemy follows

    def _begin_call(self, parent: TracedStep, call: Call) -> TracedStep:
        if call.message is not None:
            message = call.message
            what = f"{message.model} {message.subject} {message.kind}, attempt {message.attempt}"
            return self._begin(parent, "message", call.name, f"({what})")
        if call.receiver is None:
            return self._begin(parent, "callback", f"on_{call.on}", call.name)
        session = _session_of(call)
        if session is not None and call.signal in model_signals:
            parent = self._open_flush(session) or parent
        signal = self._signal(parent, call)
        step = self._begin(signal, "receiver", call.name, call.receiver.location, call.receiver)
        step.signal = signal
        return step

    def _signal(self, parent: TracedStep, call: Call) -> TracedStep:
        """The step of the event, the same for all receivers that it calls."""
        assert call.receiver is not None
        event = call.event
        last = parent.children[-1] if parent.children else None
        if (
            last is not None
            and last.about == event
            and last.track == self.trace.tracks.here()
            and last.children[-1].about.serial < call.receiver.serial
        ):
            return last
        state = state_or_none(call.arguments.get("instance", call.sender))
        detail = describe_sender(call.sender) if state is None else row_name(state)
        action = call.arguments.get("action", call.arguments.get("operation"))
        if action is not None:
            detail = f"{detail} {action}"
        if call.on != "flush":
            detail += f", on={call.on!r}"
        return self._begin(parent, "signal", call.signal.name, detail, event)

    def transaction_ended(self, session: Session, on: Phase) -> TracedStep | None:
        here = _here.get().get(self)
        if here is None:
            return None
        end = self._ends.pop(session, None)
        if end is None:  # the transaction had begun before the trace
            end = self._begin(here, "commit" if on == "commit" else "rollback", str(on))
            end.end()
        return end

    # -- flushes and transactions ------------------------------------------------------------------

    def session_event(self, moment: Moment, session: Session, about: Any) -> None:
        here = _here.get().get(self)
        if here is None:
            return
        match moment:
            case "before_flush":
                self._before_flush(session, about, here)
            case "after_flush":
                self._after_flush(session, about)
            case "after_flush_postexec":
                flush = self._open_flush(session)
                if flush is not None:
                    self._end_flush(flush)
            case "before_commit":
                self._before_commit(session, here)
            case "after_commit":
                self._after_commit(session)
            case "after_transaction_end":
                self._after_transaction_end(session, about, here)

    def _open_flush(self, session: Session) -> TracedStep | None:
        flush = self._flushes.get(session)
        return flush if flush is not None and flush.end_ns is None else None

    def _end_flush(self, flush: TracedStep, error: BaseException | None = None) -> None:
        flush.about = None
        flush.end(error)

    def _before_flush(self, session: Session, context: UOWTransaction, parent: TracedStep) -> None:
        flush = self._open_flush(session)
        if flush is not None and flush.about is context:  # another installation has told
            return
        transaction = session.get_transaction()
        work = self._work.get(transaction) if transaction is not None else None
        commit = work.commit if work is not None else None
        self._flushes[session] = self._begin(commit or parent, "flush", "flush", about=context)

    def _after_flush(self, session: Session, context: UOWTransaction) -> None:
        flush = self._open_flush(session)
        if flush is None or flush.about is not context:
            return
        flush.about = None
        for statement, state, fields in rows_of(session, context):
            cause = self._causes.pop(state, None)
            row = f"{row_name(state)}{fields}{', changed by ' + cause if cause else ''}"
            self._begin(flush, "row", statement, row)
        for what in association_rows(context):
            self._begin(flush, "row", what)
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is not None:
            self._work_of(transaction).flushes.append(flush)

    def _work_of(self, transaction: SessionTransaction) -> _Work:
        return self._work.setdefault(transaction, _Work())

    def _before_commit(self, session: Session, parent: TracedStep) -> None:
        root = session.get_transaction()
        if root is not None and is_committing(root):  # not the release of a savepoint
            work = self._work_of(root)
            if work.commit is None:
                work.commit = self._begin(parent, "commit", "commit")

    def _after_commit(self, session: Session) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is None:
            return
        work = self._work_of(transaction)
        if not work.is_committed and work.commit is not None:
            work.commit.end()
            self._ends[session] = work.commit
        work.is_committed = True

    def _after_transaction_end(
        self, session: Session, transaction: SessionTransaction, parent: TracedStep
    ) -> None:
        flush = self._open_flush(session)
        if flush is not None:
            self._end_flush(flush)
            flush.name = "flush, not finished"
        if transaction.parent is not None and not transaction.nested:
            return  # a subtransaction, as each flush has one
        work = self._work.pop(transaction, _Work())
        if not work.is_committed:
            self._ends.pop(session, None)
            if work.commit is not None:
                work.commit.end()
                work.commit.name = "commit, not finished"
            for flush in work.flushes:
                flush.undone = True
            if work.flushes:
                what = "savepoint" if transaction.nested else ""
                self._ends[session] = rollback = self._begin(parent, "rollback", "rollback", what)
                rollback.end()
        elif work.flushes and transaction.nested:
            outer = transaction.parent
            while outer is not None and outer.parent is not None and not outer.nested:
                outer = outer.parent
            if outer is not None:
                self._work_of(outer).flushes.extend(work.flushes)


_here: ContextVar[Mapping[_Recorder, TracedStep]] = ContextVar(
    "sqla_signals_trace", default=MappingProxyType({})
)
"""For each trace around us, the step that we are in."""


def _session_of(call: Call) -> Session | None:
    """The session in which a flush receiver is called."""
    session = call.arguments.get("session") if call.on == "flush" else None
    session = plain_session(session)
    return session if isinstance(session, Session) else None

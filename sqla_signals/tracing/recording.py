"""Where a step belongs: the flush, the transaction or the receiver that it is a part of.

The parent of a step is the call around it, but for two things. What a flush sends is a part of the
flush, which no call surrounds; and what a commit leaves to be delivered is a part of the commit,
though it may come after the receiver that has committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy.orm import Session

from .._sqlalchemy.transactions import is_committing
from ..receivers.installations import model_signals
from ..receivers.receiver import describe_sender, identity
from .rows import Pending, association_rows, row_name, rows_of, state_or_none
from .steps import Kind, TracedStep, Tracks, as_chrome, as_text

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, SessionTransaction, UOWTransaction

    from ..observe import Call
    from ..receivers.receiver import Phase

    State = InstanceState[Any]


class Trace:
    """What :func:`trace` gives: ``print()`` it, look at its steps, or save it."""

    def __init__(self) -> None:
        self._tracks = Tracks()
        self.root: TracedStep = TracedStep(kind="trace", name="trace", track=self._tracks.here())
        """The first step, which contains the others."""
        self._flushes: WeakKeyDictionary[Session, TracedStep] = WeakKeyDictionary()
        """The last one of each session."""
        self._commits: WeakKeyDictionary[SessionTransaction, TracedStep] = WeakKeyDictionary()
        """That have begun."""
        self._committed: WeakSet[SessionTransaction] = WeakSet()
        self._written: WeakKeyDictionary[SessionTransaction, list[TracedStep]] = WeakKeyDictionary()
        """What was flushed in each."""
        self._ends: WeakKeyDictionary[Session, TracedStep] = WeakKeyDictionary()
        """How the last transaction of each session has ended."""
        self._causes: WeakKeyDictionary[State, str] = WeakKeyDictionary()
        """The receivers that have changed what is not written yet."""

    def __str__(self) -> str:
        return as_text(self.root)

    def to_chrome(self) -> dict[str, Any]:
        """The trace in Chrome's format, which https://ui.perfetto.dev opens, ready for JSON."""
        return as_chrome(self.root, self._tracks)

    def save_chrome(self, path: str | Path) -> None:
        """Write :meth:`to_chrome` into a file."""
        Path(path).write_text(json.dumps(self.to_chrome()), encoding="utf-8")

    # -- recording -----------------------------------------------------------------------------

    def begin(
        self, parent: TracedStep, kind: Kind, name: str, detail: str = "", about: Any = None
    ) -> TracedStep:
        """A step begins."""
        step = TracedStep(
            kind=kind, name=name, detail=detail, about=about, track=self._tracks.here()
        )
        parent.children.append(step)
        return step

    def begin_call(self, parent: TracedStep, call: Call) -> TracedStep:
        """A receiver is called, or a callback."""
        if call.message is not None:
            message = call.message
            what = f"{message.model} {message.subject} {message.kind}, attempt {message.attempt}"
            return self.begin(parent, "message", call.name, f"({what})")
        if call.signal is None:
            return self.begin(parent, "callback", f"on_{call.on}", call.name)
        assert call.receiver is not None
        session = session_of(call)
        if session is not None and call.signal in model_signals:
            parent = self._open_flush(session) or parent
        signal = self._signal(parent, call)
        step = self.begin(signal, "receiver", call.name, call.receiver.location, call.receiver)
        step.signal = signal
        return step

    def end_call(self, step: TracedStep, call: Call) -> None:
        """It has returned, or raised."""
        step.end(call.error)
        session = session_of(call)
        if call.error is not None and session is not None and call.signal in model_signals:
            flush = self._open_flush(session)
            if flush is not None and call.on == "flush":  # a veto, which no event tells of
                flush.end(call.error)

    def _open_flush(self, session: Session) -> TracedStep | None:
        flush = self._flushes.get(session)
        return flush if flush is not None and flush.end_ns is None else None

    def _signal(self, parent: TracedStep, call: Call) -> TracedStep:
        """The step of the event, the same for all receivers that it calls."""
        assert call.signal is not None
        state = state_or_none(call.arguments.get("instance", call.sender))
        action = call.arguments.get("action", call.arguments.get("operation"))
        # By identity: a sender need not be comparable.
        about = (call.signal, call.on, identity(call.sender if state is None else state), action)
        last = parent.children[-1] if parent.children else None
        if (
            last is not None
            and last.about == about
            and last.track == self._tracks.here()
            and all(child.about is not call.receiver for child in last.children)
        ):
            return last
        detail = describe_sender(call.sender) if state is None else row_name(state)
        if action is not None:
            detail = f"{detail} {action}"
        if call.on != "flush":
            detail += f", on={call.on!r}"
        return self.begin(parent, "signal", call.signal.name, detail, about)

    def before_flush(self, session: Session, parent: TracedStep) -> None:
        """A flush begins, inside of a commit or not."""
        transaction = session.get_transaction()
        commit = self._commits.get(transaction) if transaction is not None else None
        self._flushes[session] = self.begin(commit or parent, "flush", "flush")

    def after_flush(self, session: Session, context: UOWTransaction) -> None:
        """A flush has written everything."""
        flush = self._open_flush(session)
        if flush is None or flush.about is context:
            return
        flush.about = context
        for statement, state, fields in rows_of(session, context):
            cause = self._causes.pop(state, None)
            row = f"{row_name(state)}{fields}{', changed by ' + cause if cause else ''}"
            self.begin(flush, "row", statement, row)
        for what in association_rows(context):
            self.begin(flush, "row", what)
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is not None:
            self._written.setdefault(transaction, []).append(flush)

    def after_flush_postexec(self, session: Session) -> None:
        """A flush is over."""
        flush = self._open_flush(session)
        if flush is not None:
            flush.about = None
            flush.end()

    def before_commit(self, session: Session, parent: TracedStep) -> None:
        """The root transaction commits, or a savepoint is released, which is no step."""
        root = session.get_transaction()
        if root is not None and root not in self._commits and is_committing(root):
            self._commits[root] = self.begin(parent, "commit", "commit")

    def after_commit(self, session: Session) -> None:
        """The root transaction was committed, or a savepoint released."""
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is None or transaction in self._committed:
            return
        self._committed.add(transaction)
        commit = self._commits.get(transaction)
        if commit is not None and not transaction.nested:
            commit.end()
            self._ends[session] = commit

    def after_transaction_end(
        self, session: Session, transaction: SessionTransaction, parent: TracedStep
    ) -> None:
        """A transaction, a savepoint or a subtransaction is over."""
        flush = self._open_flush(session)
        if flush is not None:
            flush.about = None
            flush.end()
            flush.name = "flush, not finished"
        if transaction.parent is not None and not transaction.nested:
            return
        written = self._written.pop(transaction, [])
        if transaction not in self._committed:
            commit = self._commits.pop(transaction, None)
            if commit is not None:
                commit.end()
                commit.name = "commit, not finished"
            for flush in written:
                flush.undone = True
            self._ends.pop(session, None)
            if written:
                what = "savepoint" if transaction.nested else ""
                rollback = self.begin(parent, "rollback", "rollback", what)
                rollback.end()
                self._ends[session] = rollback
        elif transaction.nested and written:
            outer = transaction.parent
            while outer is not None and outer.parent is not None and not outer.nested:
                outer = outer.parent
            if outer is not None:
                self._written.setdefault(outer, []).extend(written)

    def delivery(self, session: Session, on: Phase, parent: TracedStep) -> TracedStep:
        """What is called now is for the end of the last transaction."""
        end = self._ends.pop(session, None)
        if end is None:  # it had begun before the trace
            end = self.begin(parent, "commit" if on == "commit" else "rollback", str(on))
            end.end()
        return end

    def changed_by(self, receiver: TracedStep, before: Pending, session: Session) -> None:
        """Note what a receiver has changed and a flush is going to write."""
        for what, state, detail in before.differences(session):
            change = self.begin(receiver, "change", what, f"{row_name(state)}{detail}")
            change.end()
            self._causes[state] = receiver.name


def session_of(call: Call) -> Session | None:
    """The session in which a flush receiver was called."""
    session = call.arguments.get("session") if call.on == "flush" else None
    session = getattr(session, "sync_session", session)
    return session if isinstance(session, Session) else None

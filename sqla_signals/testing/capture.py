"""Noting what is sent: each signal that reaches a receiver, in any thread or task.

This observes calls and connects nothing, so that the code under test does what it does without it:
a signal without receivers is not sent, and a commit receiver gets the session that it would get.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from traceback import format_exception, walk_tb
from typing import TYPE_CHECKING, Any

from .._sqlalchemy.sessions import current_task
from ..changes.change import UNSET, Change
from ..receivers.blocks import block
from ..receivers.observing import Call, Observer
from ..receivers.receiver import describe_sender
from ..signals.builtin import receiver_failed

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ..receivers.observing import Moment
    from ..receivers.receiver import Phase, Receiver
    from ..signals.signal import Signal


class Sent:
    """One signal that was sent: once, however many receivers it was sent to.

    The arguments are attributes as well: ``sent.created``, ``sent.instance``.
    """

    def __init__(
        self, signal: Signal, on: Phase, sender: Any, arguments: Mapping[str, Any]
    ) -> None:
        self.signal: Signal = signal
        """Which signal."""
        self.on: Phase = on
        """When: ``"flush"``, ``"commit"``, ``"rollback"``, or ``"durable"``, by a worker."""
        self.sender: Any = sender
        """What sent it: mostly the exact class."""
        self.arguments: dict[str, Any] = {
            name: dict(value) if name == "changes" and isinstance(value, Mapping) else value
            for name, value in arguments.items()
            if name not in ("session", "signal")  # a session that is held is not closed
        }
        """As the first receiver got them, but for ``session``."""
        self.called: list[Receiver] = []
        self._what = self._describe()

    @property
    def receivers(self) -> list[str]:
        """The names of the receivers that were called, in order."""
        return [receiver.name for receiver in self.called]

    def __getattr__(self, name: str) -> Any:
        arguments = self.__dict__.get("arguments")
        if arguments is None:  # copy makes one without
            raise AttributeError(name)
        try:
            return arguments[name]
        except KeyError:
            raise AttributeError(f"{self} has no {name}") from None

    def __str__(self) -> str:
        return self._what

    def __repr__(self) -> str:
        return f"<Sent {self}>"

    def details(self) -> str:
        """The changes, and the receivers that were called."""
        given = self.arguments.get("changes")
        found = given.items() if isinstance(given, Mapping) else ()
        changes = ", ".join(
            f"{name}: {change.new!r}"
            if change.old is UNSET
            else f"{name}: {change.old!r} → {change.new!r}"
            for name, change in found
            if isinstance(change, Change)  # not what a signal of one's own calls so
        )
        return f"{f'  {{{changes}}}' if changes else ''}  to {', '.join(self.receivers)}"

    def _describe(self) -> str:
        words = [self.signal.name, describe_sender(self.sender)]
        if "created" in self.arguments:
            words.append("created" if self.created else "updated")
        words += [
            str(self.arguments[name]) for name in ("action", "operation") if name in self.arguments
        ]
        if self.on != "flush":
            words.append("durable" if self.on == "durable" else f"on {self.on}")
        return " ".join(words)


class Failure:
    """A receiver or a callback that raised after the transaction, where it was only logged."""

    def __init__(self, call: Call) -> None:
        assert call.error is not None
        self.exception: BaseException = call.error
        """What was raised."""
        self.receiver: str = call.name
        """The name of the receiver or of the function."""
        self.signal: Signal | None = call.signal
        """``None`` for a function given to ``on_commit()`` or ``on_rollback()``."""
        self.on: Phase = call.on
        """When: ``"commit"``, ``"rollback"`` or ``"durable"``; ``"flush"`` for a receiver of
        ``receiver_failed``."""
        self.sender: Any = call.sender
        """What has sent the signal: mostly the exact class."""
        self.function: Any = call.receiver.fn if call.receiver is not None else None

    def __str__(self) -> str:
        what = f"{self.signal.name} {describe_sender(self.sender)} " if self.signal else ""
        when = {"flush": "", "durable": "durable"}.get(self.on, f"on {self.on}")
        return f"{f'{what}{when}'.rstrip()}: {self.receiver} raised {self.exception!r}"

    def __repr__(self) -> str:
        return f"<Failure {self}>"

    def traceback(self) -> str:
        """Where it was raised, from the receiver on."""
        lines = format_exception(self.exception)
        code = getattr(self.function, "__code__", None)
        entries = walk_tb(self.exception.__traceback__)
        place = next((n for n, (f, _) in enumerate(entries) if f.f_code is code), None)
        if place is not None:  # what is before is ours
            lines = [lines[0], *lines[1 + place :]]
        return "".join(lines).rstrip()


class Capture(Observer):
    """Notes what it is told, in :attr:`sent` and :attr:`failures`."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.failures: list[Failure] = []
        # The last call to end in each thread and task: the next receiver may get the same signal.
        self._last: dict[Any, tuple[Sent, Any]] = {}
        self._sent_by: dict[Call, Sent] = {}

    @block
    def around(self, call: Call) -> Iterator[None]:
        """Note a failure that is only logged."""
        try:
            yield
        finally:
            sent = self._sent_by.pop(call, None)
            if sent is not None:
                self._last[_here()] = (sent, call.event)
            logged = call.on != "flush" or call.signal is receiver_failed
            if call.error is not None and logged:
                self.failures.append(Failure(call))

    def called(self, call: Call) -> None:
        """Note the signal, unless the receiver before was called with the same one."""
        assert call.signal is not None
        assert call.receiver is not None
        sent, event = self._last.pop(_here(), (None, None))
        if sent is None or event != call.event or sent.called[-1].serial >= call.receiver.serial:
            sent = Sent(call.signal, call.on, call.sender, call.arguments)
            self.sent.append(sent)
        sent.called.append(call.receiver)
        self._sent_by[call] = sent

    def session_event(self, moment: Moment, session: Session, about: Any) -> None:
        """End the signal that was sent before: the next one is another."""
        self._last.pop(_here(), None)


def _here() -> tuple[int, Any]:
    task = current_task()
    return threading.get_ident(), id(task) if task is not None else None

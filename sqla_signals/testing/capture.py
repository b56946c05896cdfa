"""Noting what is sent: each signal that reaches a receiver, in whatever thread or task.

It looks on and connects nothing, so that the code under test does what it does without it: no
signal is sent that nobody listens to, and a receiver of the commit gets the session it would get.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from traceback import format_exception, walk_tb
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect

from .._sqlalchemy.sessions import current_task
from ..changes.change import UNSET, Change
from ..observe import Call, Observer
from ..receivers.blocks import block
from ..receivers.receiver import describe_sender, identity
from ..signals.builtin import receiver_failed

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ..receivers.receiver import Phase, Receiver
    from ..receivers.watching import Moment
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
        """What was changed, and who was called."""
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
        """When: ``"commit"``, ``"rollback"`` or ``"durable"``; ``"flush"`` if told of
        another failure by ``receiver_failed``."""
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
    """Looks on while it is added; what it has seen is in :attr:`sent` and :attr:`failures`."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.failures: list[Failure] = []
        # The last call to end in each thread and task: the next receiver may get the same signal.
        self._last: dict[Any, tuple[Sent, Call] | None] = {}

    @block
    def around(self, call: Call) -> Iterator[None]:
        """Note how it ends."""
        try:
            yield
        finally:
            if not call.goes_on:
                noted = call.kept.get(self)
                if noted is not None:
                    self._last[_here()] = (noted, call)
                logged = call.on != "flush" or call.signal is receiver_failed
                if call.error is not None and logged:
                    self.failures.append(Failure(call))

    def called(self, call: Call) -> None:
        """Note what is sent, unless another receiver was called with it."""
        assert call.signal is not None
        assert call.receiver is not None
        last = self._last.pop(_here(), None)
        if last is not None and _is_same(last[1], call):
            sent = last[0]
        else:
            sent = Sent(call.signal, call.on, call.sender, call.arguments)
            self.sent.append(sent)
        sent.called.append(call.receiver)
        call.kept[self] = sent

    def session_event(self, moment: Moment, session: Session, about: Any) -> None:
        """What comes now is not what was sent before."""
        self._last.pop(_here(), None)


def _here() -> tuple[int, Any]:
    task = current_task()
    return threading.get_ident(), id(task) if task is not None else None


def _is_same(before: Call, call: Call) -> bool:
    """Whether two calls that follow each other are two receivers of one signal that was sent."""
    if (before.signal, before.on) != (call.signal, call.on):
        return False
    if identity(before.sender) != identity(call.sender):
        return False
    assert before.receiver is not None
    assert call.receiver is not None
    if before.receiver.serial >= call.receiver.serial:
        return False
    old, new = before.arguments, call.arguments
    if "instance" in old:
        return row_of(old["instance"]) == row_of(new.get("instance")) and old.get(
            "action"
        ) == new.get("action")
    if "statement" in old:
        return old["statement"] is new.get("statement")
    return old.keys() == new.keys() and all(old[name] is new[name] for name in old)


def row_of(instance: Any) -> Any:
    """What an instance stands for: with ``on="commit"`` each receiver gets one of its own."""
    state = inspect(instance, raiseerr=False)
    key = getattr(state, "key", None)
    return key if key is not None else id(instance)

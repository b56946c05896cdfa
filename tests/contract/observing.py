"""What the tests look at: the signals that were sent and the rows that are there."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, inspect, select
from sqlalchemy.orm import Session

from sqla_signals import post_delete, post_save, pre_delete, pre_save

FLUSH_SIGNALS = (pre_save, post_save, pre_delete, post_delete)


@dataclass(frozen=True, eq=False)
class Sent:
    """One call of a receiver, with what was true at that moment."""

    signal: str
    sender: type
    instance: Any
    name: str
    arguments: Mapping[str, Any]
    changes: Mapping[str, Any] | None

    @property
    def line(self) -> str:
        """One line to compare with: ``post_save created Author(a)``."""
        if "created" not in self.arguments:
            return f"{self.signal} {self.sender.__name__}({self.name})"
        kind = "created" if self.arguments["created"] else "updated"
        return f"{self.signal} {kind} {self.sender.__name__}({self.name})"

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]


class Log:
    """A receiver that writes down every call."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []

    def __call__(self, sender: type, **arguments: Any) -> None:
        instance = arguments["instance"]
        # Without loading anything: reading an expired attribute would be SQL that no user wrote.
        name = inspect(instance).dict.get("name", "?")
        changes = dict(arguments["changes"]) if "changes" in arguments else None
        self.sent.append(Sent(arguments["signal"].name, sender, instance, name, arguments, changes))

    @property
    def lines(self) -> list[str]:
        """What was sent, in order."""
        return [sent.line for sent in self.sent]

    @property
    def post(self) -> list[str]:
        """What was sent after the statements, in order."""
        return [sent.line for sent in self.sent if sent.signal.startswith("post_")]

    @property
    def pre(self) -> list[str]:
        """What was sent before the statements, in order."""
        return [sent.line for sent in self.sent if sent.signal.startswith("pre_")]

    def one(self, signal: str, instance: object = None) -> Sent:
        """The only call for that signal (and instance)."""
        found = [
            sent
            for sent in self.sent
            if sent.signal == signal and (instance is None or sent.instance is instance)
        ]
        assert len(found) == 1, f"{signal}: {self.lines}"
        return found[0]

    def clear(self) -> None:
        """Forget what was sent so far."""
        self.sent.clear()


def listen(log: Log | None = None, **options: Any) -> Log:
    """Connect a log to the four flush signals."""
    log = log or Log()
    for signal in FLUSH_SIGNALS:
        signal.connect(log, weak=False, **options)
    return log


def both(*lines: str) -> list[str]:
    """Each line as ``pre_…`` and, after all of those, as ``post_…``.

    ``both("save created Author(a)")`` is what a flush that inserts one author sends.
    """
    return [f"pre_{line}" for line in lines] + [f"post_{line}" for line in lines]


def rows(source: Session | Engine, *columns: Any) -> list[Any]:
    """The rows of a table as the database has them, sorted; bare values for a single column.

    A session shows its own transaction, an engine what was committed.
    """
    statement = select(*columns)
    if isinstance(source, Session):
        found = source.connection().execute(statement).all()
    else:
        with source.connect() as connection:
            found = connection.execute(statement).all()
    return sorted((row[0] if len(row) == 1 else tuple(row) for row in found), key=repr)


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let pytest run an ``async def`` test, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run

"""What an explanation is made of: plain values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..receivers.receiver import Phase

NOT_INSTALLED = (
    "nothing is sent, because sqla_signals is not installed. Add one line where the application "
    "starts: sqla_signals.install()"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A receiver at its place in the order, with the options it was connected with."""

    receiver: str
    """Its name."""
    file: str | None
    """Where it is defined, relative to the current directory if it is below; ``None`` for a
    builtin."""
    line: int | None
    sender: str
    """What it was connected to: a class, a name in quotes, a relationship, ``any sender``."""
    fields: tuple[str, ...] | None
    propagate: bool
    durable: bool
    is_async: bool
    weak: bool
    muted: bool
    """Whether a ``mute`` block silenced it where ``explain`` was called."""
    dispatch_uid: str | None

    @property
    def location(self) -> str:
        """``file:line``."""
        return f"{self.file}:{self.line}" if self.file else "<built-in>"

    @property
    def options(self) -> list[str]:
        """The options that are not the default, as one would write them."""
        given = []
        if self.fields is not None:
            given.append(f"fields={{{', '.join(map(repr, self.fields))}}}")
        if self.dispatch_uid is not None:
            given.append(f"dispatch_uid={self.dispatch_uid}")
        words = {
            "propagate": self.propagate,
            "async": self.is_async,
            "weak": self.weak,
            "muted": self.muted,
        }
        return given + [word for word, holds in words.items() if holds]


@dataclass(frozen=True, slots=True)
class Step:
    """The receivers of one signal that are called at the same time, in order."""

    signal: str
    phase: Phase
    """When: ``"flush"``, ``"commit"``, ``"rollback"``, or ``"durable"``, by a worker."""
    through: str | None
    """The ``secondary`` table that ``m2m_changed`` is about, else ``None``."""
    receivers: tuple[Entry, ...]

    @property
    def title(self) -> str:
        """The signal and the phase, as one would write them."""
        phase = "durable=True" if self.phase == "durable" else f'on="{self.phase}"'
        through = f" through {self.through}" if self.through else ""
        return f"{self.signal} {phase}{through}"


@dataclass(frozen=True, slots=True)
class Group:
    """Senders that the same receivers listen to, and these."""

    senders: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about a receiver that its author does not expect."""

    signal: str
    receiver: str
    location: str
    never: bool
    """Whether it means that the receiver can never be called."""
    text: str

    def __str__(self) -> str:
        called = "can never be called" if self.never else "is not called for every change"
        return f"{self.signal}: {self.receiver} ({self.location}) {called}: {self.text}"


def printable(name: str) -> str:
    """The name without what would break a line, a terminal or a file format."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def place_of(location: str) -> tuple[str | None, int | None]:
    """The file, relative to the current directory if it is below, and the line."""
    file, _, line = location.rpartition(":")
    if not line.isdecimal():
        return None, None
    return file.removeprefix(os.path.join(os.getcwd(), "")), int(line)

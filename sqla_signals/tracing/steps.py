"""What a trace is made of: a tree of steps with times, as text and in Chrome's trace format."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final, Literal

from .._sqlalchemy.sessions import current_task

Kind = Literal[
    "trace",
    "flush",
    "commit",
    "rollback",
    "signal",
    "receiver",
    "callback",
    "message",
    "row",
    "change",
]

MOMENTS: Final = ("row", "change", "rollback")
"""Kinds of steps that take no time."""


@dataclass(eq=False, slots=True, kw_only=True)
class TracedStep:
    """One thing that happened, and what it has caused."""

    kind: Kind
    """What it is. A ``"row"`` was written by the flush around it; a ``"change"`` is what a receiver
    did to an instance, for a flush to write. A ``"callback"`` was given to ``on_commit`` or
    ``on_rollback``, a ``"message"`` is a durable one that was run."""
    name: str
    """Of the receiver or the signal; else what is shown."""
    detail: str = ""
    """Which instance, or where the receiver is."""
    start_ns: int = field(default_factory=perf_counter_ns)
    end_ns: int | None = None
    """``None`` while it goes on."""
    error: BaseException | None = None
    """What was raised, also if it was only logged."""
    undone: bool = False
    """A flush whose transaction, or savepoint, was rolled back."""
    children: list[TracedStep] = field(default_factory=list)
    track: Any = None
    """The thread or task."""
    signal: TracedStep | None = None
    """The step of the signal, for a receiver."""
    about: Any = None
    """What the recorder recognizes it by."""

    @property
    def duration(self) -> float:
        """Seconds that it took; what it left to be delivered after a commit is not in them."""
        return 0.0 if self.end_ns is None else (self.end_ns - self.start_ns) / 1e9

    def end(self, error: BaseException | None = None) -> None:
        """Note that it is over, and with which error."""
        self.end_ns = perf_counter_ns()
        self.error = error
        if self.signal is not None:  # which has called the last of its receivers, as far as we know
            self.signal.end_ns = self.end_ns

    def walk(self) -> Iterator[TracedStep]:
        """Yield this step and everything below, in the order of the text."""
        yield self
        for child in self.children:
            yield from child.walk()

    def __str__(self) -> str:
        """One line, without the children."""
        line = f"{self.name} {self.detail}".rstrip()
        if self.kind == "receiver":
            line = f"{self.name} ({self.detail})"
        if self.undone:
            line += ", rolled back"
        if self.kind not in MOMENTS:
            line += f", {self.duration * 1e3:.2f} ms" if self.end_ns is not None else ", unfinished"
        if self.error is not None:
            line += f", failed: {type(self.error).__name__}: {self.error}".rstrip(": ")
        return line


def _lines(step: TracedStep, head: str, tail: str) -> Iterator[str]:
    first, *more = str(step).splitlines()
    below = tail + ("│  " if step.children else "   ")
    yield head + first
    yield from (below + line for line in more)
    for number, child in enumerate(step.children):
        is_last = number == len(step.children) - 1
        yield from _lines(
            child, tail + ("└─ " if is_last else "├─ "), tail + ("   " if is_last else "│  ")
        )


class Tracks:
    """Numbers for the threads and tasks in which something happened."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._numbers: dict[Any, int] = {}
        self._lock = threading.Lock()

    def here(self) -> int:
        """The number of this task, or else of this thread."""
        thread, task = threading.current_thread(), current_task()
        key: Any = thread.ident if task is None else weakref.ref(task)
        with self._lock:
            number = self._numbers.setdefault(key, len(self._numbers) + 1)
            self.names.setdefault(number, thread.name if task is None else task.get_name())
        return number


class Trace:
    """What :func:`sqla_signals.trace` gives: ``print()`` it, look at its steps, or save it."""

    def __init__(self) -> None:
        self.tracks: Tracks = Tracks()
        self.root: TracedStep = TracedStep(kind="trace", name="trace", track=self.tracks.here())
        """The first step, which contains the others."""

    def __str__(self) -> str:
        return "\n".join(_lines(self.root, "", ""))

    def to_chrome(self) -> dict[str, Any]:
        """The trace in Chrome's format, which https://ui.perfetto.dev opens, ready for JSON.

        https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
        """
        pid = os.getpid()
        names = [("process_name", 1, "sqla_signals")]
        names += [("thread_name", number, name) for number, name in self.tracks.names.items()]
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}
            for what, tid, name in names
        ]
        for step in self.root.walk():
            is_receiver = step.kind == "receiver"
            event: dict[str, Any] = {
                "name": step.name if is_receiver else f"{step.name} {step.detail}".rstrip(),
                "cat": step.kind,
                "pid": pid,
                "tid": step.track,
                "ts": (step.start_ns - self.root.start_ns) / 1e3,
            }
            if step.kind in MOMENTS:
                event |= {"ph": "i", "s": "t"}
            else:
                end = step.end_ns if step.end_ns is not None else perf_counter_ns()
                event |= {"ph": "X", "dur": (end - step.start_ns) / 1e3}
            args = {
                "location": step.detail if is_receiver else None,
                "rolled back": step.undone,
                "error": step.error and f"{type(step.error).__name__}: {step.error}",
                "rows": [str(child) for child in step.children if child.kind == "row"],
                "changes": [str(child) for child in step.children if child.kind == "change"],
            }
            events.append(event | {"args": {name: arg for name, arg in args.items() if arg}})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save_chrome(self, path: str | Path) -> None:
        """Write :meth:`to_chrome` into a file."""
        Path(path).write_text(json.dumps(self.to_chrome()), encoding="utf-8")

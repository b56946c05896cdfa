"""A signal of one's own, beside blinker's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import blinker
import pytest

from sqla_signals import Signal

from .conftest import Report
from .models import Thing
from .pairs import Side, Work, alternate

SENDS = 20_000


def receivers(count: int) -> list[Callable[..., None]]:
    """Functions that are all different."""

    def make() -> Callable[..., None]:
        def receiver(sender: Any, **kwargs: Any) -> None: ...

        return receiver

    return [make() for _ in range(count)]


def sending(signal: blinker.Signal, sender: Any) -> Side:
    @contextmanager
    def program() -> Iterator[Work]:
        def work() -> None:
            for _ in range(SENDS):
                signal.send(sender, value=1)

        yield work

    return program


@pytest.mark.parametrize("sender", [Thing, Thing(a=1, b="x")], ids=["class", "object"])
@pytest.mark.parametrize("count", [0, 1, 10])
def bench_send(benchmark: Any, report: Report, blocks: int, count: int, sender: Any) -> None:
    """Sending to receivers that were connected to the sender."""
    ours, theirs = Signal("ours"), blinker.NamedSignal("theirs")
    functions = receivers(count)
    for function in functions:
        ours.connect(function, sender)
        theirs.connect(function, sender)
    sides = sending(ours, sender), sending(theirs, sender)
    times = alternate(benchmark, *sides, blocks=2 * blocks)
    kind = "a class" if sender is Thing else "an object"
    report.compare(
        f"`Signal.send` of {kind}, {count} receivers", "blinker's", times, goal=1.0, rows=SENDS
    )

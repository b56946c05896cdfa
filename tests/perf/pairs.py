"""The measurement: sides that alternate in one process, and what their times come to.

A *side* prepares its work outside of the clock and undoes it afterwards; what it yields is timed.
One *block* runs all sides forth and back (A B B A), because the speed of a machine drifts, and two
processes differ by more than what is measured here. A figure is the median over the blocks, each
compared with itself alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

Work = Callable[[], object]
Side = Callable[[], AbstractContextManager[Work]]
Times = Sequence[float]
"""CPU seconds of each side in one block."""


class Figure(NamedTuple):
    """A median, and the quartiles around it."""

    value: float
    low: float
    high: float


def seconds(side: Side) -> float:
    """The CPU time that the work of one side takes."""
    with side() as work:
        gc.collect()
        began = time.process_time()
        work()
        return time.process_time() - began


def alternate(benchmark: Any, *sides: Side, blocks: int, warm: bool = True) -> list[Times]:
    """Run the sides in blocks and return their times, block by block.

    ``benchmark`` repeats the blocks, and saves the sides' times with its own; it has no clock for
    two functions that alternate.
    """
    there_and_back = [*range(len(sides)), *reversed(range(len(sides)))]
    measured: list[Times] = []

    def block() -> None:
        times = [0.0] * len(sides)
        for i in there_and_back:
            times[i] += seconds(sides[i]) / 2
        measured.append(times)

    if warm:  # what only the first run of a process does is nobody's cost
        for side in sides:
            seconds(side)
    benchmark.pedantic(block, rounds=blocks)
    benchmark.extra_info["seconds"] = measured
    return measured


def figure(blocks: Sequence[Times], of: Callable[..., float]) -> Figure:
    """What ``of`` makes of the times of a block, over all blocks."""
    values = [of(*times) for times in blocks]
    if len(values) == 1:
        return Figure(values[0], values[0], values[0])
    low, value, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(value, low, high)


def ratio(ours: float, theirs: float) -> float:
    """How many times as long we take."""
    return ours / theirs

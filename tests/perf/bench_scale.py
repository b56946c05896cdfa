"""What grows with what: many models, many receivers, many rows; and memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import pytest
from sqlalchemy.orm import Mapped, mapped_column

from sqla_signals import Signal, post_save, pre_save

from .bench_commit import reads_two
from .bench_flush import after, before
from .bench_signal import receivers
from .conftest import Report
from .models import Base, Kind, Surroundings, Thing, engine, installed, plain, side, writing
from .pairs import Figure, Side, alternate, figure

MODELS, RECEIVERS = 200, 40
FEW, MANY = 1_000, 100_000
Connection = tuple[Signal, Any, dict[str, Any]]


@pytest.fixture(scope="module")
def models() -> Iterator[list[Any]]:
    """Many models like ``Thing``."""
    made = [
        type(
            f"Model{i}",
            (Base,),
            {
                "__tablename__": f"model_{i}",
                "__annotations__": {"id": Mapped[int], "a": Mapped[int], "b": Mapped[str]},
                "id": mapped_column(primary_key=True),
            },
        )
        for i in range(MODELS)
    ]
    Base.metadata.create_all(engine)
    yield made
    tables = [model.__table__ for model in made]
    Base.metadata.drop_all(engine, tables=tables)
    for table in tables:
        Base.metadata.remove(table)


def connections(models: list[Any], count: int) -> list[Connection]:
    return [(post_save, receiver, {"sender": models}) for receiver in receivers(count)]


@pytest.mark.parametrize("kind", get_args(Kind))
def bench_connected_elsewhere(
    benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind, models: list[Any]
) -> None:
    """Rows of a model with one receiver, while many others have many."""
    one = connections([Thing], 1)
    program = partial(writing, kind, rows)
    many = side(installed(*one, *connections(models, RECEIVERS)), program)
    times = alternate(benchmark, many, side(installed(*one), program), blocks=blocks)
    case = f"{MODELS} more models with {RECEIVERS} receivers each, per row: {kind}"
    report.compare(case, "1 model, 1 receiver", times, goal=1.05)


@pytest.mark.parametrize("kind", get_args(Kind))
def bench_calls(
    benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind, models: list[Any]
) -> None:
    """Rows of many models with many receivers each: what one call adds."""
    many, one = connections(models, RECEIVERS), connections([Thing], 1)
    spread, together = partial(writing, kind, rows, *models), partial(writing, kind, rows)
    times = alternate(
        benchmark,
        side(installed(*many), spread),
        side(plain, spread),
        side(installed(*one), together),
        side(plain, together),
        blocks=blocks,
    )

    def for_many(many: float, without: float, *_: float) -> float:
        return (many - without) / RECEIVERS

    def for_one(many: float, without: float, one: float, bare: float) -> float:
        return one - bare

    micros = [figure(times, of).value / rows * 1e6 for of in (for_many, for_one)]
    report.add(
        f"rows of {MODELS} models, {RECEIVERS} receivers each, added per call: {kind}",
        "1 model, 1 receiver, added per call",
        figure(times, lambda *block: for_many(*block) / for_one(*block)),
        goal=1.05,
        micros=" ÷ ".join(f"{value:.2f}" for value in micros),
    )


@pytest.mark.parametrize("kind", get_args(Kind))
def bench_growth(benchmark: Any, report: Report, blocks: int, kind: Kind) -> None:
    """The cost of a row does not grow with the number of rows."""
    ours = installed((pre_save, before, {"sender": Thing}), (post_save, after, {"sender": Thing}))

    def rows_at_once(surroundings: Surroundings, rows: int) -> Side:
        return side(surroundings, partial(writing, kind, rows))

    times = alternate(
        benchmark,
        rows_at_once(ours, MANY),
        rows_at_once(plain, MANY),
        *[rows_at_once(ours, FEW), rows_at_once(plain, FEW)] * 5,
        blocks=max(1, blocks // 3),
        warm=False,
    )

    def growth(many: float, many_plain: float, *few: float) -> float:
        return (many / sum(few[::2])) / (many_plain / sum(few[1::2]))

    report.add(
        f"{MANY:,} rows in one flush, per row, ÷ {FEW:,} rows: {kind}",
        "the same growth without us",
        figure(times, growth),
        goal=1.05,
    )


FLUSH = installed((pre_save, before, {"sender": Thing}), (post_save, after, {"sender": Thing}))
COMMIT = installed((post_save, reads_two, {"sender": Thing, "on": "commit"}))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    ("case", "surroundings", "commit", "goal"),
    [("flush", FLUSH, False, 400), ("commit", COMMIT, True, 1_500)],
    ids=["flush", "commit"],
)
def bench_memory(
    benchmark: Any,
    report: Report,
    rows: int,
    kind: Kind,
    case: str,
    surroundings: Surroundings,
    commit: bool,
    goal: int,
) -> None:
    """The peak of what is allocated while the rows are written."""
    program = partial(writing, kind, rows, commit=commit)

    def peak(surroundings: Surroundings) -> int:
        with side(surroundings, program)() as work:
            gc.collect()
            tracemalloc.start()
            work()
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found

    def added() -> float:
        return (peak(surroundings) - peak(plain)) / rows

    value = benchmark.pedantic(added, rounds=1, warmup_rounds=1)
    report.add(
        f"peak memory added by {case} receivers, per row: {kind}",
        "not installed",
        Figure(value, value, value),
        goal=goal,
        unit=" B",
    )


@pytest.mark.parametrize("kind", get_args(Kind))
def bench_memory_held(benchmark: Any, report: Report, rows: int, kind: Kind) -> None:
    """What stays allocated until the commit, after the rows were flushed."""

    def held(surroundings: Surroundings) -> int:
        with side(surroundings, partial(writing, kind, rows))() as work:
            gc.collect()
            tracemalloc.start()
            work()
            gc.collect()
            found = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
        return found

    def added() -> float:
        return (held(COMMIT) - held(plain)) / rows

    value = benchmark.pedantic(added, rounds=1, warmup_rounds=1)
    report.add(
        f"memory held for commit receivers from the flush to the commit, per row: {kind}",
        "not installed",
        Figure(value, value, value),
        goal=1_500,
        unit=" B",
    )

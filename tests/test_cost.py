"""What signals cost, in function calls and SQL statements: the same on every machine.

Function calls are counted as SQLAlchemy's own profiling tests do, but relative: to the same work
without signals, or with hand-written mapper listeners in place of receivers. So they differ little
between versions. Clocks are for ``make bench``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any, get_args

import blinker
import pytest
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_signals import Signal, post_save, pre_save

from .perf.models import (
    ONE_ROW,
    Kind,
    Other,
    Surroundings,
    Thing,
    database,
    engine,
    installed,
    listening,
    plain,
    requests,
    writing,
)
from .perf.pairs import Work

each_kind = pytest.mark.parametrize("kind", get_args(Kind))


@pytest.fixture(scope="module", autouse=True)
def tables() -> Iterator[None]:
    with database():
        yield


def before(sender: Any, instance: Any, **kwargs: Any) -> None: ...


def after(sender: Any, instance: Any, **kwargs: Any) -> None: ...


def reads(sender: Any, instance: Any, **kwargs: Any) -> None:
    instance.a
    instance.b


def listens_before(mapper: Any, connection: Any, target: Any) -> None: ...


def listens_after(mapper: Any, connection: Any, target: Any) -> None: ...


def on(model: Any) -> Surroundings:
    return installed((pre_save, before, {"sender": model}), (post_save, after, {"sender": model}))


LISTENERS = listening(
    ("before_insert", listens_before),
    ("before_update", listens_before),
    ("after_insert", listens_after),
    ("after_update", listens_after),
)
COMMIT = installed((post_save, reads, {"sender": Thing, "on": "commit"}))

# Calls per row. What makes one of these smaller may lower it, what makes it larger has to say why.
MORE_THAN_LISTENERS = {"insert": 15, "update": 32}
MORE_THAN_A_COMMIT = {"insert": 51, "update": 64}
MORE_THAN_ONE_ROW = {
    "no receivers": {"insert": 42, "update": 42},
    "another model": {"insert": 125, "update": 145},
    "pre + post": {"insert": 320, "update": 360},
    "commit": {"insert": 360, "update": 390},
}


def calls_in(work: Work) -> int:
    """How many functions are called."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what it finds is not in the count
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def calls(surroundings: Surroundings, kind: Kind, rows: int, *, commit: bool = False) -> int:
    """How many functions are called while ``rows`` rows are written."""
    with surroundings():
        with writing(kind, 1, commit=commit) as work:
            work()  # after a receiver was connected, the first flush looks at every mapper
        with writing(kind, rows, commit=commit) as work:
            return calls_in(work)


def calls_per_row(surroundings: Surroundings, kind: Kind, *, commit: bool = False) -> float:
    """What one more row adds."""
    calls(surroundings, kind, 10, commit=commit)  # SQLAlchemy has compiled its statements
    few, many = (calls(surroundings, kind, rows, commit=commit) for rows in (100, 200))
    return (many - few) / 100


@each_kind
@pytest.mark.parametrize(
    ("surroundings", "at_most"),
    [(installed(), 30), (on(Other), 300)],
    ids=["none", "on_another_model"],
)
def test_where_nobody_listens_a_flush_costs_the_same_for_any_number_of_rows(
    kind: Kind, surroundings: Surroundings, at_most: int
) -> None:
    """Nothing is called per row; per flush a handful."""
    for rows in (10, 100, 500):
        calls(plain, kind, rows)
    extra = {
        rows: calls(surroundings, kind, rows) - calls(plain, kind, rows) for rows in (10, 100, 500)
    }
    assert len(set(extra.values())) == 1, extra
    assert 0 < extra[10] <= at_most


@each_kind
def test_a_receiver_costs_little_more_than_a_mapper_listener(kind: Kind) -> None:
    """``pre_save`` and ``post_save`` of each row, beside ``before_*`` and ``after_*`` listeners."""
    extra = calls_per_row(on(Thing), kind) - calls_per_row(LISTENERS, kind)
    assert extra <= MORE_THAN_LISTENERS[kind]


@each_kind
def test_a_commit_receiver_costs_little_more_than_the_commit(kind: Kind) -> None:
    """From the event to the call, in a session that has the instance."""
    ours = calls_per_row(COMMIT, kind, commit=True)
    extra = ours - calls_per_row(plain, kind, commit=True)
    assert extra <= MORE_THAN_A_COMMIT[kind]


@each_kind
@pytest.mark.parametrize("case", ONE_ROW)
def test_one_row_in_a_transaction_costs_few_calls(case: str, kind: Kind) -> None:
    """From the new session to its end; most transactions of a web application have one row."""

    def calls_of(surroundings: Surroundings) -> int:
        with surroundings(), requests(kind, 1) as work:
            for _ in range(10):  # what the first ones set up is set up for all
                work()
            return calls_in(work)

    extra = calls_of(ONE_ROW[case]) - calls_of(plain)
    assert 0 < extra <= MORE_THAN_ONE_ROW[case][kind]


@each_kind
@pytest.mark.parametrize(
    ("surroundings", "commit"), [(on(Thing), False), (COMMIT, True)], ids=["flush", "commit"]
)
def test_the_cost_grows_with_the_rows_and_not_faster(
    kind: Kind, surroundings: Surroundings, commit: bool
) -> None:
    """Twice the rows, twice the calls."""
    calls(surroundings, kind, 1_000, commit=commit)
    some, twice = (calls(surroundings, kind, rows, commit=commit) for rows in (1_000, 2_000))
    assert 1.95 * some < twice <= 2 * some


@contextmanager
def elsewhere(models: int, receivers: int) -> Iterator[None]:
    """Many models with many receivers each."""

    class Base(DeclarativeBase):
        pass

    def model(i: int) -> type:
        members = {"__tablename__": f"model_{i}", "id": mapped_column(primary_key=True)}
        return type(f"Model{i}", (Base,), members | {"__annotations__": {"id": Mapped[int]}})

    classes = [model(i) for i in range(models)]
    Base.registry.configure()
    with ExitStack() as stack:
        for i in range(receivers):
            for signal in (pre_save, post_save):
                function = partial(before, i=i)
                signal.connect(function, sender=classes, weak=False)
                stack.callback(signal.disconnect, function)
        yield
    Base.registry.dispose()


@each_kind
def test_a_row_costs_the_same_however_many_receivers_other_models_have(kind: Kind) -> None:
    """Who is called was found out before, once for the class."""
    calls(on(Thing), kind, 10)
    alone = calls(on(Thing), kind, 100)
    with elsewhere(models=20, receivers=10):
        assert calls(on(Thing), kind, 100) == alone


def test_finding_out_who_is_called_grows_with_the_receivers_and_not_faster() -> None:
    """The first flush asks about every model; not every receiver about every model."""

    def first_flush(models: int) -> int:
        with elsewhere(models, receivers=10), installed()(), Session(engine) as session:
            session.add(Thing(a=1, b="x"))
            gc.collect()
            assert pre_save.receivers  # forgets those of models that were collected
            assert post_save.receivers
            return calls_in(session.flush)

    first_flush(1)
    assert first_flush(40) < 2.1 * first_flush(20)


def test_the_flush_after_a_connect_looks_at_the_models_of_that_receiver_alone() -> None:
    """However many models there are; a receiver may be connected in each request or test."""

    def flush_after_connect(models: int) -> int:
        def late(sender: Any, **kwargs: Any) -> None: ...

        with elsewhere(models, receivers=0), on(Thing)(), Session(engine) as session:
            for _ in range(2):
                session.add(Thing(a=1, b="x"))
                session.flush()
            session.add(Thing(a=1, b="x"))
            post_save.connect(late, sender=Thing)
            try:
                return calls_in(session.flush)
            finally:
                post_save.disconnect(late)

    flush_after_connect(1)
    assert flush_after_connect(100) == flush_after_connect(10)


@contextmanager
def statements() -> Iterator[list[str]]:
    """What is sent to the database, with the beginnings and ends of transactions."""
    seen: list[str] = []

    def execute(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    def begin(connection: Any) -> None:
        seen.append("BEGIN")

    def commit(connection: Any) -> None:
        seen.append("COMMIT")

    listeners = {"before_cursor_execute": execute, "begin": begin, "commit": commit}
    for name, listener in listeners.items():
        event.listen(engine, name, listener)
    try:
        yield seen
    finally:
        for name, listener in listeners.items():
            event.remove(engine, name, listener)


@each_kind
@pytest.mark.parametrize(
    ("surroundings", "commit"),
    [(on(Thing), False), (COMMIT, True), (installed(), True)],
    ids=["flush", "commit", "no_receivers"],
)
def test_receivers_that_read_what_is_loaded_add_no_statement(
    kind: Kind, surroundings: Surroundings, commit: bool
) -> None:
    """In the flush and after the commit, there is only what would be there without signals."""
    seen: list[list[str]] = []
    for around in (plain, surroundings):
        with around(), writing(kind, 20, commit=commit) as work, statements() as sent:
            work()
            seen.append(list(sent))
    assert seen[0] == seen[1]
    assert any(statement.startswith(kind.upper()) for statement in seen[0])


@each_kind
def test_a_thousand_calls_after_a_commit_share_a_session_that_nobody_uses(kind: Kind) -> None:
    """A receiver that only reads leaves its session as it was, for the next one."""
    called: list[int] = []
    sessions: set[int] = set()

    def reads_id(sender: Any, instance: Any, session: Session, **kwargs: Any) -> None:
        called.append(instance.id)
        sessions.add(session.hash_key)  # no two of a process have the same

    around = installed((post_save, reads_id, {"sender": Thing, "on": "commit"}))
    with writing(kind, 1_000, commit=True) as work, around():
        work()
    assert len(called) == len(set(called)) == 1_000
    assert len(sessions) == 1


@pytest.mark.parametrize("count", [0, 1, 10])
@pytest.mark.parametrize("sender", [Thing, object()], ids=["class", "object"])
def test_sending_makes_no_more_calls_than_blinker(count: int, sender: Any) -> None:
    """The order, and all that blinker does not have, cost nothing."""
    ours, theirs = Signal("ours"), blinker.NamedSignal("theirs")
    functions = [partial(before, instance=i) for i in range(count)]
    for function in functions:
        ours.connect(function, sender)
        theirs.connect(function, sender)
    assert len(ours.send(sender, value=1)) == len(theirs.send(sender, value=1)) == count
    assert calls_in(lambda: ours.send(sender, value=1)) <= calls_in(
        lambda: theirs.send(sender, value=1)
    )

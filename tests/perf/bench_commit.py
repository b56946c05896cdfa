"""Receivers after the commit, beside none and beside a collector written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session, object_session

from sqla_signals import post_save

from .conftest import Report
from .models import Kind, Surroundings, Thing, engine, installed, plain, side, writing
from .pairs import alternate


def reads_two(sender: Any, instance: Any, **kwargs: Any) -> None:
    instance.a
    instance.b


def one_session(keys: list[Any]) -> None:
    with Session(engine) as session:
        for key in keys:
            reads_two(Thing, session.get(Thing, key))


def session_for_each(keys: list[Any]) -> None:
    for key in keys:
        one_session([key])


def collecting(read: Callable[[list[Any]], None]) -> Surroundings:
    """What people write: mapper listeners note keys, ``after_commit`` reads the rows again."""

    def note(mapper: Any, connection: Any, target: Thing) -> None:
        object_session(target).info.setdefault("written", {})[target.id] = None

    def after_commit(session: Session) -> None:
        keys = session.info.pop("written", ())
        if keys:
            read(list(keys))

    @contextmanager
    def surroundings() -> Iterator[None]:
        event.listen(Thing, "after_insert", note)
        event.listen(Thing, "after_update", note)
        event.listen(Session, "after_commit", after_commit)
        try:
            yield
        finally:
            event.remove(Session, "after_commit", after_commit)
            event.remove(Thing, "after_update", note)
            event.remove(Thing, "after_insert", note)

    return surroundings


ours = installed((post_save, reads_two, {"sender": Thing, "on": "commit"}))
CASE = '`post_save` with `on="commit"`, reading two attributes'
GOALS = {"insert": 1.40, "update": 1.50}


@pytest.mark.parametrize("kind", get_args(Kind))
def bench_control(benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind) -> None:
    """How far a ratio is off when there is nothing to see."""
    program = side(plain, partial(writing, kind, rows, commit=True))
    times = alternate(benchmark, program, program, blocks=blocks)
    report.compare(f"plain flush and commit (the control): {kind}", "the same", times)


@pytest.mark.parametrize("kind", get_args(Kind))
def bench_commit(benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind) -> None:
    """A flush and a commit, with a receiver and without."""
    program = partial(writing, kind, rows, commit=True)
    times = alternate(benchmark, side(ours, program), side(plain, program), blocks=blocks)
    report.compare(f"{CASE}: {kind}", "plain flush and commit", times, goal=GOALS[kind])


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("read", [one_session, session_for_each])
def bench_collector(
    benchmark: Any,
    report: Report,
    rows: int,
    blocks: int,
    kind: Kind,
    read: Callable[[list[Any]], None],
) -> None:
    """A flush and a commit, with a receiver and with a collector."""
    program = partial(writing, kind, rows, commit=True)
    theirs = side(collecting(read), program)
    times = alternate(benchmark, side(ours, program), theirs, blocks=max(1, blocks // 2))
    where = "one new session" if read is one_session else "a new session for each"
    against = f"an `after_commit` collector that reads each row again, in {where}"
    report.compare(f"{CASE}: {kind}", against, times, goal=0.33)

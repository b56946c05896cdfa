"""Receivers inside the flush, beside the same functions as hand-written mapper listeners."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import pytest
from sqlalchemy import inspect
from sqlalchemy.orm import object_session

from sqla_signals import post_save, pre_save

from .conftest import Report
from .models import Kind, Other, Surroundings, Thing, installed, listening, plain, side, writing
from .pairs import alternate


def before(sender: Any, instance: Any, **kwargs: Any) -> None: ...


def after(sender: Any, instance: Any, **kwargs: Any) -> None: ...


def reads_change(sender: Any, instance: Any, changes: Any, **kwargs: Any) -> None:
    changes["a"]


def listens_before(mapper: Any, connection: Any, target: Any) -> None: ...


def listens_after(mapper: Any, connection: Any, target: Any) -> None: ...


def listens_and_reads(mapper: Any, connection: Any, target: Any) -> None:
    inspect(target).attrs.a.history


def changes_by_hand(target: Any) -> dict[str, tuple[Any, Any]]:
    """What was assigned, and what it was before."""
    changes = {}
    for attribute in inspect(target).mapper.column_attrs:
        history = inspect(target).attrs[attribute.key].history
        if history.has_changes():
            old = history.deleted[0] if history.deleted else None
            changes[attribute.key] = old, history.added[0]
    return changes


def tells(receiver: Any, created: bool) -> Any:
    """A listener that tells a receiver what a signal tells, as one would write it by hand."""

    def listener(mapper: Any, connection: Any, target: Any) -> None:
        changes = changes_by_hand(target)
        if changes or created:  # it is called for what is not written too
            receiver(
                type(target),
                instance=target,
                created=created,
                changes=changes,
                update_fields=None if created else frozenset(changes),
                raw=False,
                using=connection.engine,
                session=object_session(target),
                signal=None,
            )

    return listener


def on_thing(signal: Any, receiver: Any) -> tuple[Any, Any, dict[str, Any]]:
    return (signal, receiver, {"sender": Thing})


BY_HAND = (
    ("before_insert", tells(before, True)),
    ("before_update", tells(before, False)),
    ("after_insert", tells(after, True)),
    ("after_update", tells(after, False)),
)
BEFORE = (("before_insert", listens_before), ("before_update", listens_before))
AFTER = (("after_insert", listens_after), ("after_update", listens_after))

CASES: list[tuple[str, str, float | None, Surroundings, Surroundings]] = [
    ("plain (the control)", "plain", None, plain, plain),
    ("installed, no receivers", "not installed", 1.01, installed(), plain),
    (
        "receivers on another model only",
        "not installed",
        1.03,
        installed(
            (pre_save, before, {"sender": Other}),
            (post_save, after, {"sender": Other}),
        ),
        plain,
    ),
    (
        "`pre_save` and `post_save`",
        "two mapper listeners, `before_*` and `after_*`",
        1.10,
        installed(on_thing(pre_save, before), on_thing(post_save, after)),
        listening(*BEFORE, *AFTER),
    ),
    (
        "`pre_save` and `post_save`",
        "two mapper listeners that call the same functions with the same arguments",
        None,
        installed(on_thing(pre_save, before), on_thing(post_save, after)),
        listening(*BY_HAND),
    ),
    (
        '`post_save` that reads `changes["a"]`',
        "`after_*` that reads `inspect(instance).attrs.a.history`",
        1.00,
        installed(on_thing(post_save, reads_change)),
        listening(("after_insert", listens_and_reads), ("after_update", listens_and_reads)),
    ),
    (
        '`pre_save` that reads `changes["a"]`',
        "`before_*` that reads `inspect(instance).attrs.a.history`",
        1.00,
        installed(on_thing(pre_save, reads_change)),
        listening(("before_insert", listens_and_reads), ("before_update", listens_and_reads)),
    ),
]


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    ("case", "against", "goal", "ours", "theirs"),
    CASES,
    ids=[f"{case[0]} ÷ {case[1]}" for case in CASES],
)
def bench_flush(
    benchmark: Any,
    report: Report,
    rows: int,
    blocks: int,
    kind: Kind,
    case: str,
    against: str,
    goal: float | None,
    ours: Surroundings,
    theirs: Surroundings,
) -> None:
    """One flush of many rows."""
    program = partial(writing, kind, rows)
    times = alternate(benchmark, side(ours, program), side(theirs, program), blocks=blocks)
    report.compare(f"{case}: {kind}", against, times, goal=goal)


def bench_keywords(benchmark: Any, report: Report, rows: int, blocks: int) -> None:
    """What no implementation can avoid: a receiver takes eight keywords, a listener nothing."""
    thing = Thing(a=1, b="x")

    @contextmanager
    def receiver() -> Any:
        def work() -> None:
            for _ in range(rows):
                after(
                    Thing,
                    instance=thing,
                    created=True,
                    changes=None,
                    update_fields=None,
                    raw=False,
                    using=None,
                    session=None,
                    signal=post_save,
                )

        yield work

    @contextmanager
    def listener() -> Any:
        def work() -> None:
            for _ in range(rows):
                listens_after(None, None, thing)

        yield work

    times = alternate(benchmark, receiver, listener, blocks=blocks)
    report.compare("an empty receiver, called by hand", "an empty listener, called by hand", times)

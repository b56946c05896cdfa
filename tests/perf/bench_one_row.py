"""One row in a transaction of its own, as a web request writes it."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest

from .conftest import Report
from .models import ONE_ROW, Kind, Surroundings, plain, requests, side
from .pairs import alternate

REQUESTS = 500
GOALS = {"no receivers": 1.03, "another model": 1.08, "pre + post": 1.35, "commit": 1.40}


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(("case", "surroundings"), ONE_ROW.items(), ids=[*ONE_ROW])
def bench_one_row(
    benchmark: Any, report: Report, blocks: int, case: str, surroundings: Surroundings, kind: Kind
) -> None:
    """A new session, one INSERT, or a row that is loaded and updated, and a commit."""
    program = partial(requests, kind, REQUESTS)
    times = alternate(benchmark, side(surroundings, program), side(plain, program), blocks=blocks)
    what = "insert" if kind == "insert" else "get and update"
    report.compare(
        f"one row, {case}: {what}", "not installed", times, goal=GOALS[case], rows=REQUESTS
    )

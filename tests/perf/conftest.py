"""One table of all figures at the end; with ``--write-docs`` it goes to docs/performance.md too."""

from __future__ import annotations

import platform
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from .models import database
from .pairs import Figure, Times, figure, ratio

collect_ignore = ["bench_durable.py"]  # a program of its own: it needs servers

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
PACKAGES = [
    "sqla-signals",
    "SQLAlchemy",
    "blinker",
    "Flask-SQLAlchemy",
    "SQLAlchemy-Continuum",
    "fastapi-toolsets",
    "Django",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perf")
    group.addoption("--rows", type=int, default=10_000, help="rows in one flush")
    group.addoption("--blocks", type=int, default=7, help="blocks (A B B A) of each case")
    group.addoption("--write-docs", action="store_true", help=f"write the table to {PAGE.name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=time.process_time, disable_gc=False))


@dataclass
class Report:
    """The figures of this run, as rows of a table."""

    rows: int
    blocks: int
    lines: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def add(
        self,
        case: str,
        against: str,
        reached: Figure,
        *,
        goal: float | None = None,
        below: float | None = None,
        unit: str = "",
        micros: str = "",
    ) -> None:
        """Add a row.

        ``goal`` and ``below`` bound the value, which is bold if out of bounds; ``micros`` are the
        times behind it.
        """
        digits = 0 if unit else 2
        shown = f"{reached.value:.{digits}f}{unit}"
        if reached.high > reached.low:
            shown += f" ({reached.low:.{digits}f}–{reached.high:.{digits}f})"
        seen = round(reached.value, digits)  # what is compared is what is shown
        wanted = ""
        if goal is not None:
            wanted = f"≤ {goal:,.{digits}f}{unit}"
        elif below is not None:
            wanted = f"< {below:,.{digits}f}{unit}"
        if (goal is not None and seen > goal) or (below is not None and seen >= below):
            shown = f"**{shown}**"
        self.lines.append((case, against, wanted, shown, micros))

    def compare(
        self,
        case: str,
        against: str,
        times: Sequence[Times],
        *,
        goal: float | None = None,
        below: float | None = None,
        rows: int | None = None,
    ) -> None:
        """Add how many times as long the first side takes as the second."""
        per_row = 1e6 / (rows or self.rows)
        ours = figure(times, lambda ours, theirs: ours).value * per_row
        other = figure(times, lambda ours, theirs: theirs).value * per_row
        micros = f"{ours:.2f} ÷ {other:.2f}"
        self.add(case, against, figure(times, ratio), goal=goal, below=below, micros=micros)

    def table(self) -> str:
        head = ("case", "compared with", "goal", "reached", "µs per row (or call)")
        rule = ("---", "---", "---", "---", "---")
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *self.lines))

    def versions(self) -> str:
        found = [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
        for package in PACKAGES:
            try:
                found.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                continue
        return (
            f"{', '.join(found)}; {platform.system()} on {platform.machine()}; "
            f"{self.rows:,} rows in one flush, {self.blocks} blocks of each case."
        )


_KEY = pytest.StashKey[Report]()


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    """Where the figures go."""
    return request.config.stash.setdefault(
        _KEY,
        Report(request.config.getoption("--rows"), request.config.getoption("--blocks")),
    )


@pytest.fixture(scope="session", autouse=True)
def tables() -> Iterator[None]:
    """A database, for the whole run."""
    with database():
        yield


@pytest.fixture(scope="session")
def rows(report: Report) -> int:
    """Rows in one flush."""
    return report.rows


@pytest.fixture(scope="session")
def blocks(report: Report) -> int:
    """Blocks of each case."""
    return report.blocks


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash.get(_KEY, None)
    if report is None or not report.lines:
        return
    terminalreporter.section("performance")
    terminalreporter.write_line(report.table())
    terminalreporter.write_line(report.versions())
    if config.getoption("--write-docs"):
        written = f"{report.table()}\n\n{report.versions()}\n"
        between = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- until here -->)", re.DOTALL)
        PAGE.write_text(between.sub(lambda _: written, PAGE.read_text("utf-8")), "utf-8")
        terminalreporter.write_line(f"written to {PAGE}")

"""A pytest plugin that runs SQLAlchemy's own tests with the signals of all sessions installed.

For `-p tests.conformance.plugin`, in a directory of SQLAlchemy's sources. `--report FILE` receives
the outcome of each test and, unless `--plain` is given, what the witness has found.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, inspect

import sqla_signals
from sqla_signals import (
    class_prepared,
    m2m_changed,
    post_bulk,
    post_delete,
    post_init,
    post_save,
    pre_bulk,
    pre_init,
)

from .witness import Witness


def nothing(sender: object, **kwargs: object) -> None:
    """A receiver that leaves everything as it is."""


def nothing_of_fields(sender: object, **kwargs: object) -> None:
    """The receiver of :func:`watch_fields`."""


def watch_fields(sender: type, **kwargs: object) -> None:
    """Connect a receiver for each column attribute of a class."""
    attributes = inspect(sender).column_attrs
    fields = {prop.key for prop in attributes if isinstance(prop.columns[0], Column)}
    post_save.connect(nothing_of_fields, sender=sender, fields=fields, weak=False)


ALSO: dict[str, list[tuple[sqla_signals.Signal, Any, dict[str, Any]]]] = {
    "commit": [(signal, nothing, {"on": "commit"}) for signal in (post_save, post_delete)],
    "rollback": [(signal, nothing, {"on": "rollback"}) for signal in (post_save, post_delete)],
    "fields": [(class_prepared, watch_fields, {})],
    "m2m": [(m2m_changed, nothing, {})],
    "init": [(signal, nothing, {}) for signal in (pre_init, post_init)],
    "bulk": [(signal, nothing, {}) for signal in (pre_bulk, post_bulk)],
}
"""Receivers that `--also` connects: signal, receiver, options of `connect`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--report", type=Path, required=True)
    group.addoption("--plain", action="store_true", help="install nothing")
    group.addoption("--also", action="append", choices=ALSO, default=[], help="more receivers")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Outcomes(config) if not is_worker else object())
    if is_worker and not config.getoption("plain"):
        config.pluginmanager.register(WithSignals(config))


class WithSignals:
    """In a worker: each test runs with our signals installed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config: Any = config
        self._witness = Witness()
        self._witness.start()
        for name in config.getoption("also"):
            for signal, receiver, options in ALSO[name]:
                signal.connect(receiver, weak=False, **options)

    # Around all fixtures: those of a class may flush, and some remove all listeners at their end.
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        self._installation = sqla_signals.install()
        self._witness.listen()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        try:
            return (yield)
        finally:
            self._witness.stop_listening()
            self._installation.remove()
            # Another test may map the same class to another table.
            post_save.disconnect(nothing_of_fields)

    def pytest_sessionfinish(self) -> None:
        self._config.workeroutput["found"] = dataclasses.asdict(self._witness.report)


class Outcomes:
    """In the controller: what the workers tell, for the report."""

    def __init__(self, config: pytest.Config) -> None:
        self._path: Path = config.getoption("report")
        self._outcomes: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._found: list[Any] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of its three phases is the outcome of a test."""
        if self._outcomes.get(report.nodeid, "passed") == "passed":
            self._outcomes[report.nodeid] = report.outcome
        if report.failed:
            self._errors[report.nodeid] = report.longreprtext

    def pytest_testnodedown(self, node: Any) -> None:
        self._found.append(getattr(node, "workeroutput", {}).get("found"))

    def pytest_unconfigure(self) -> None:
        report = {"outcomes": self._outcomes, "errors": self._errors, "found": self._found}
        self._path.write_text(json.dumps(report))

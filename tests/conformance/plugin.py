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

import sqla_signals
from sqla_signals import (
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


ALSO: dict[str, list[tuple[sqla_signals.Signal, dict[str, Any]]]] = {
    "commit": [(signal, {"on": "commit"}) for signal in (post_save, post_delete)],
    "rollback": [(signal, {"on": "rollback"}) for signal in (post_save, post_delete)],
    "fields": [(post_save, {"fields": {"id", "name", "data", "value", "version_id"}})],
    "batch": [(signal, {"batch": True}) for signal in (post_save, post_delete)],
    "m2m": [(m2m_changed, {})],
    "init": [(signal, {}) for signal in (pre_init, post_init)],
    "bulk": [(signal, {}) for signal in (pre_bulk, post_bulk)],
}
"""Receivers that `--also` connects: the signals, with the options of `connect`."""


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
            for signal, options in ALSO[name]:
                signal.connect(nothing, weak=False, **options)

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

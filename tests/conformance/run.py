"""Runs SQLAlchemy's own tests of the ORM with our signals installed; see `make conformance`.

Each version is run twice on SQLite in memory, without us and with us, from its sources, which are
kept below the virtual environment. It fails where a test that passes without us does not pass with
us, where a signal does not match what the unit of work wrote, and where so few rows were compared
that nothing was shown.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path(sys.prefix, "conformance")

VERSIONS = {"2.0.58": 12_000, "2.1.9": 12_000}
"""How many rows must be compared at least, for each version of SQLAlchemy."""

MODULES = (
    "association backref_mutations cascade collection composites cycles defaults dynamic events"
    " manytomany mapper merge naturalpks onetoone relationships session transaction unitofwork"
    " unitofworkv2 versioning"
)
SELECTION = (*(f"test/orm/test_{name}.py" for name in MODULES.split()), "test/orm/inheritance")

ALSO = ("--also=commit", "--also=rollback")
"""Receivers that are connected besides those of the flush."""

_LOADS = "counts load events: an instance is loaded for a commit receiver"
EXCLUDED = {
    "test_events.py::SessionEventsTest::test_sessionmaker_gen_after_session_listen": (
        "calls the listeners of before_flush without arguments, as no flush does"
    ),
    "test_events.py::LoadTest::test_just_loaded": _LOADS,
    "test_events.py::LoadTest::test_repeated_rows": _LOADS,
    "test_events.py::MapperEventsTest::test_merge": _LOADS,
    "test_events.py::RefreshTest::test_populate_existing": _LOADS,
    "test_events.py::RefreshTest::test_repeated_rows": _LOADS,
    "test_events.py::RefreshTest::test_via_refresh_state": _LOADS,
    "test_events.py::RefreshTest::test_was_expired_via_commit": _LOADS,
    "test_merge.py::MergeTest::test_attribute_cascade": _LOADS,
    "test_merge.py::MergeTest::test_many_to_many_cascade": _LOADS,
    "test_merge.py::MergeTest::test_one_to_many_cascade": _LOADS,
    "test_merge.py::MergeTest::test_one_to_one_cascade": _LOADS,
}
"""Tests that do not pass with our listeners, below `test/orm`, with the reason."""


def main(selection: tuple[str, ...], options: tuple[str, ...]) -> int:
    """Run the tests for each version; 0 if all is well."""
    is_whole = not selection
    return max(
        check(version, minimum if is_whole else 0, selection or SELECTION, options)
        for version, minimum in VERSIONS.items()
    )


def check(version: str, minimum: int, selection: tuple[str, ...], options: tuple[str, ...]) -> int:
    """Run the tests of one version without and with us, and print what differs."""
    print(f"SQLAlchemy {version}: running its tests without signals, then with them", flush=True)
    plain = run(version, selection, ("--plain",))
    report = run(version, selection, options or ALSO)
    outcomes = report["outcomes"]
    passed = [test for test, outcome in plain["outcomes"].items() if outcome == "passed"]
    failed = [test for test in passed if outcomes.get(test) != "passed"]
    known = tuple(f"test/orm/{name}" for name in EXCLUDED)
    excluded = {test for test in failed if test.startswith(known)}
    problems = [
        f"passes without signals only: {test}\n{report['errors'].get(test, 'It was not run.')}"
        for test in failed
        if test not in excluded
    ]
    if None in report["found"]:
        problems.append("a process of pytest has died")
    found = [one for one in report["found"] if one is not None]
    mismatches = [text for one in found for text in one["mismatches"]]
    late = [text for one in found for text in one["late"]]
    rows, instances = (sum(one[what] for one in found) for what in ("rows", "instances"))
    problems += [f"mismatch: {text}" for text in mismatches]
    problems += [f"late: {text}" for text in late]
    if minimum:
        problems += [
            f"excluded, but passes: {name}"
            for name in known
            if not any(test.startswith(name) for test in excluded)
        ]
    if rows < minimum:
        problems.append(f"only {rows} rows were compared, not {minimum} at least")
    print(*problems, sep="\n")
    print(
        f"SQLAlchemy {version}: {len(passed) - len(failed)} of {len(passed)} tests pass as without"
        f" signals, {len(excluded)} excluded; {rows} rows of {instances} instances compared,"
        f" {len(mismatches)} mismatches, {len(late)} late signals",
        flush=True,
    )
    return 1 if problems or not passed else 0


def run(version: str, selection: tuple[str, ...], options: tuple[str, ...]) -> dict[str, Any]:
    """Run tests of one version of SQLAlchemy; what the plugin reports."""
    directory = sources(version)
    with tempfile.TemporaryDirectory() as reports:
        report, log = Path(reports, "report.json"), Path(reports, "log")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--tb=short", "-p", "xdist"]
        command += ["-p", "no:cacheprovider", "-p", "tests.conformance.plugin", "-o", "addopts="]
        command += ["--report", str(report), *options, *selection]
        # The tests import SQLAlchemy from their own sources. Other plugins stay out, ours too.
        paths = os.pathsep.join((str(directory / "lib"), str(ROOT)))
        environment = {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        with log.open("wb") as output:
            subprocess.run(
                command,
                cwd=directory,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not report.exists():
            sys.exit(log.read_text())
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def sources(version: str) -> Path:
    """The unpacked sources of a version, fetched if they are not there."""
    directory = CACHE / f"sqlalchemy-{version}"
    if not directory.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as download:
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            what = ["--no-deps", "--no-binary", "SQLAlchemy", f"SQLAlchemy=={version}"]
            subprocess.run([*pip, "download", "--dest", download, *what], check=True)
            (archive,) = Path(download).glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                opened.extractall(download, filter="data")
            (unpacked,) = (path for path in Path(download).iterdir() if path.is_dir())
            shutil.move(unpacked, directory)
    return directory


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(
        main(
            tuple(one for one in arguments if not one.startswith("-")),
            tuple(one for one in arguments if one.startswith("-")),
        )
    )

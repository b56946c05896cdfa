"""The versions in pyproject.toml are those that ``.ci/run`` runs; whatever names them agrees."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import sqlalchemy

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWEST = dict(one.split(">=") for one in PROJECT["dependencies"])
PYTHONS = [
    found[1]
    for line in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_a_page_promises_the_versions_of_the_package(page: str):
    """From the first to the last Python, and from the lower bounds of the dependencies."""
    text = " ".join((ROOT / page).read_text().split())
    assert (
        f"Python {PYTHONS[0]} to {PYTHONS[-1]} with SQLAlchemy 2.0 (from {LOWEST['SQLAlchemy']}) "
        f"or 2.1 and blinker (from {LOWEST['blinker']})"
    ) in text


def test_the_classifiers_leave_no_version_out():
    """Each from ``requires-python`` on; pip would install the package on one in between."""
    first, last = (int(version.removeprefix("3.")) for version in (PYTHONS[0], PYTHONS[-1]))
    assert PROJECT["requires-python"] == f">=3.{first}"
    assert [f"3.{minor}" for minor in range(first, last + 1)] == PYTHONS


def test_an_extra_needs_no_newer_sqlalchemy():
    """``sqla-signals[asyncio]`` names it again."""
    assert PROJECT["optional-dependencies"]["asyncio"] == [
        f"SQLAlchemy[asyncio]>={LOWEST['SQLAlchemy']}"
    ]


def test_make_looks_for_each_version_of_python():
    """By its name on PATH."""
    makefile = (ROOT / "Makefile").read_text()
    assert sorted(set(re.findall(r"python(3\.\d+)", makefile))) == PYTHONS


def test_the_suite_runs_on_what_is_supported():
    """On a Python and a SQLAlchemy that are not named it proves nothing."""
    assert "{}.{}".format(*sys.version_info) in PYTHONS
    assert sqlalchemy.__version__.startswith(("2.0.", "2.1."))

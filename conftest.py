"""Runs every Python snippet of README.md and docs/ as a test.

The snippets of one page are run in order and share a namespace, as if typed into a shell. So they
stay on one worker of pytest-xdist, while all other tests go to whichever is free.
"""

from __future__ import annotations

import gc
from doctest import ELLIPSIS
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, registry
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

import sqla_signals
import sqla_signals.opentelemetry
from sqla_signals.receivers.installations import installations, model_signals

OTHER_SIGNALS = (
    sqla_signals.receiver_failed,
    sqla_signals.pre_migrate,
    sqla_signals.post_migrate,
)


def open_page(namespace: dict[str, Any]) -> None:
    """Give the page the name that a shell has."""
    namespace["__name__"] = "__main__"


def close_page(namespace: dict[str, Any]) -> None:
    """Undo what a page left behind, so that the next one starts like a new process."""
    sqla_signals.opentelemetry.uninstrument()
    for installation in list(installations):
        installation.remove()
    for signal in (*model_signals, *OTHER_SIGNALS):
        signal._clear_state()
    for session in [value for value in namespace.values() if isinstance(value, Session)]:
        session.close()
    for engine in [value for value in namespace.values() if isinstance(value, Engine)]:
        engine.dispose()
    # Else its classes live on until they are collected; two pages may have some of the same name.
    for base in [value for value in namespace.values() if is_base_of_page(value)]:
        base.registry.dispose(cascade=True)


def is_base_of_page(value: object) -> bool:
    """Whether a declarative base was defined on the page, not imported."""
    base = isinstance(value, type) and isinstance(value.__dict__.get("registry"), registry)
    return base and value.__module__ == "__main__"


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS)],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    excludes=["docs/_build/*"],
    setup=open_page,
    teardown=close_page,
).pytest()


def pytest_collection_finish() -> None:
    """Spare the garbage collector the thousands of tests: each call of it would look at all."""
    gc.collect()
    gc.freeze()


class PagesTogether(LoadScopeScheduling):
    """The scope of a snippet is its page, that of any other test is the test itself."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, _ = nodeid.partition("::")
        return path if path.endswith(".md") else nodeid


# Not --dist=loadgroup: pytest 9.2 broke it (pytest-dev/pytest-xdist#1386).
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> PagesTogether:
    return PagesTogether(config, log)

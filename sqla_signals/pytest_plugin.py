"""The pytest plugin: the fixture ``signals``, and nothing for a test that does not use it.

pytest imports this in every project where the package is installed, so nothing else is imported
here before the fixture is used.

pytest finds it by its entry point; ``-p no:sqla_signals`` leaves it out.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing import Signals

_KEY = pytest.StashKey["Signals"]()


@pytest.fixture
def signals(request: pytest.FixtureRequest) -> Generator[Signals]:
    """What signals were sent, to be asked in a test.

    A receiver that fails after the transaction, where that is only logged, fails the test.
    """
    from .testing import Signals

    found = Signals()
    node: Any = request.node
    node.stash[_KEY] = found
    found.start()
    try:
        yield found
    finally:
        found.stop()
    # What failed since the test itself was over, in the teardown of other fixtures.
    _fail_for(found)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail the test itself, not its teardown, for what was only logged."""
    result = yield
    found = item.stash.get(_KEY, None)
    if found is not None:
        _fail_for(found)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what was sent below the failure of a test."""
    report = yield
    found = item.stash.get(_KEY, None)
    if found is not None and report.when == "call" and report.failed:
        told = found.report()
        if told is not None:
            report.sections.append(("Captured signals call", told))
    return report


def _fail_for(found: Signals) -> None:
    failures = found.take_failures()
    if failures is not None:
        pytest.fail(failures, pytrace=False)

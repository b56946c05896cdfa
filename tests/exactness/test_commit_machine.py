"""Random programs: what is told after a transaction is what another connection sees of it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from .commit_machine import (
    MODES,
    CommitDatabase,
    CommitPrograms,
    CommitTally,
    signals_after_the_end,
)
from .program import expected_warnings, spare_the_collector

pytestmark = pytest.mark.timeout(1200)  # a loaded machine takes minutes, an idle one seconds


def run(url: str, programs: int) -> CommitTally:
    """Run so many programs, each against an emptied database, the same in every run."""
    database = CommitDatabase(url)
    tally = CommitTally()
    machine = type("Machine", (CommitPrograms,), {"database": database, "tally": tally})
    profile = settings(
        max_examples=programs,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # Programs are made short by the machine itself.
        suppress_health_check=list(HealthCheck),
    )
    spare_the_collector()
    try:
        with signals_after_the_end(), expected_warnings():
            run_state_machine_as_test(machine, settings=profile)
    finally:
        database.remove()
    return tally


def test_what_is_told_after_the_end_is_the_net_effect_of_the_transaction():
    """One call for each row that differs, with its columns; and callbacks, in order."""
    tally = run("sqlite://", 300)
    assert min(tally.compared[f"commit {kind}"] for kind in ("created", "updated", "deleted")) > 5
    assert min(tally.compared[f"rollback {kind}"] for kind in ("created", "updated")) > 5
    assert sum(tally.savepoints.values()) > 20
    assert tally.kinds.keys() & set(MODES)


@pytest.mark.postgresql
def test_what_is_told_after_the_end_on_postgresql(postgresql_url: str):
    """The same on PostgreSQL."""
    tally = run(postgresql_url, 15)
    assert tally.endings["commit"]

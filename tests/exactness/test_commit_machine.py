"""Random programs: what is told after a transaction is what another connection sees of it."""

from __future__ import annotations

import pytest

from .commit_machine import (
    MODES,
    CommitDatabase,
    CommitPrograms,
    CommitTally,
    signals_after_the_end,
)
from .program import run_programs

pytestmark = pytest.mark.timeout(1200)  # a loaded machine takes minutes, an idle one seconds


def run(url: str, programs: int) -> CommitTally:
    """Run so many programs, each against an emptied database, the same in every run."""
    database = CommitDatabase(url)
    tally = CommitTally()
    machine = type("Machine", (CommitPrograms,), {"database": database, "tally": tally})
    try:
        with signals_after_the_end():
            run_programs(machine, programs)
    finally:
        database.remove()
    return tally


def test_what_is_told_after_the_end_is_the_net_effect_of_the_transaction():
    """One call for each row that differs, with its columns; and callbacks, in order."""
    tally = run("sqlite://", 100)
    assert min(tally.compared[f"commit {kind}"] for kind in ("created", "updated", "deleted")) > 5
    assert min(tally.compared[f"rollback {kind}"] for kind in ("created", "updated")) > 5
    assert sum(tally.savepoints.values()) > 20
    assert tally.kinds.keys() & set(MODES)


@pytest.mark.postgresql
def test_what_is_told_after_the_end_on_postgresql(postgresql_url: str):
    """The same on PostgreSQL."""
    tally = run(postgresql_url, 15)
    assert tally.endings["commit"]

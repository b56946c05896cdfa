"""Random programs: the signals of each flush are those that the database's triggers testify to."""

from __future__ import annotations

import pytest

from .machine import SessionPrograms
from .order import drawn_orders
from .program import Tally, run_programs, signals_received
from .recorder import Database

pytestmark = pytest.mark.timeout(1200)  # a loaded machine takes minutes, an idle one seconds


def run(
    machine: type[SessionPrograms],
    url: str,
    programs: int,
    *,
    meddling: bool = False,
    control: bool = False,
) -> Tally:
    """Run so many programs, each against an emptied database, the same in every run."""
    database, twin = Database(url), Database() if control else None
    machine = type(
        machine.__name__,
        (machine,),
        {
            "database": database,
            "control_database": twin,
            "tally": Tally(),
            "meddling": meddling,
        },
    )
    try:
        with signals_received(), drawn_orders():
            run_programs(machine, programs)
    finally:
        database.remove()
        if twin is not None:
            twin.remove()
    return machine.tally


def test_every_row_written_has_its_signals_and_nothing_else_has():
    """One pre and one post for each row, with what changed; and SQL as without signals."""
    tally = run(SessionPrograms, "sqlite://", 120, control=True)
    assert min(tally.rows[kind] for kind in ("created", "updated", "deleted")) > 3
    assert not tally.late


def test_every_row_written_has_its_signals_when_receivers_act():
    """Receivers add, change, delete, expunge and veto: what is written then is announced too."""
    tally = run(SessionPrograms, "sqlite://", 70, meddling=True)
    assert min(tally.rows[kind] for kind in ("created", "updated", "deleted")) > 10


@pytest.mark.postgresql
def test_every_row_written_on_postgresql_has_its_signals(postgresql_url: str):
    """The same on PostgreSQL, with its RETURNING, its sequences and its deferred constraints."""
    tally = run(SessionPrograms, postgresql_url, 25)
    assert not tally.late

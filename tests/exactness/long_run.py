"""Run the state machine for long: `python -m tests.exactness.long_run --steps 100000`.

Prints what was run and found; the exit status is 1 when anything did not match.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test

from .commit_machine import CommitDatabase, CommitPrograms, CommitTally, signals_after_the_end
from .machine import SessionPrograms
from .order import drawn_orders, lost_states
from .program import Mismatch, Tally, expected_warnings, signals_received, spare_the_collector
from .recorder import Database


def main() -> int:
    """Run until there were enough steps or the time is up."""
    parser = argparse.ArgumentParser(prog="python -m tests.exactness.long_run", description=__doc__)
    parser.add_argument(
        "--machine", choices=["flush", "commit"], default="flush", help="which signals to compare"
    )
    parser.add_argument("--steps", type=int, default=100_000, help="at least so many rule steps")
    parser.add_argument("--minutes", type=float, default=60, help="at most so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of programs")
    parser.add_argument("--url", default="sqlite://", help="of an empty database")
    parser.add_argument("--control-url", help="of another; default: another one in memory")
    parser.add_argument("--meddling", action="store_true", help="with receivers that act")
    parser.add_argument("--length", type=int, default=40, help="of a program, in steps at most")
    parser.add_argument("--mismatches", type=int, default=1, help="stop after so many")
    parser.add_argument("--tolerate", metavar="REGEX", help="do not report such mismatches")
    options = parser.parse_args()
    spare_the_collector()

    commits = options.machine == "commit"
    tally = CommitTally() if commits else Tally()
    tally.tolerated = re.compile(options.tolerate) if options.tolerate else None
    database = CommitDatabase(options.url) if commits else Database(options.url)
    control_database = None
    if not commits and (options.control_url or options.url.startswith("sqlite")):
        control_database = Database(options.control_url or "sqlite://")
    Machine = type(
        "Machine",
        (CommitPrograms if commits else SessionPrograms,),
        {
            "database": database,
            "control_database": control_database,
            "tally": tally,
            "meddling": options.meddling,
        },
    )
    profile = settings(
        max_examples=100,
        stateful_step_count=options.length,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # Programs are made short by the machine itself.
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    began, batch = time.monotonic(), options.seed
    found: list[str] = []
    steps = 0
    received = signals_after_the_end() if commits else signals_received()
    with received, expected_warnings(), drawn_orders():
        while steps < options.steps and time.monotonic() - began < options.minutes * 60:
            before = tally.steps
            try:
                run_state_machine_as_test(seed(batch)(Machine), settings=profile)
            except (Mismatch, Flaky) as error:
                parts = getattr(error, "exceptions", [error])
                found.append(f"seed {batch}: " + "\n".join(map(str, parts)))
                print(f"\n{found[-1]}", flush=True)
                if len(found) >= options.mismatches:
                    break
            steps += tally.steps - before
            batch += 1
    database.remove()
    report(tally, found, time.monotonic() - began)
    return 1 if found else 0


def report(tally: Tally, found: list[str], seconds: float) -> None:
    """Print the numbers."""
    late = sum(tally.late.values())
    print(f"steps {tally.steps} in {tally.programs} programs, {seconds:.0f} s")
    if isinstance(tally, CommitTally):
        print(f"ends: {counts(tally.endings)}")
        print(f"commits with changes: {counts(tally.kinds)}")
        print(f"savepoints with changes: {counts(tally.savepoints)}")
        print(f"rows compared {sum(tally.compared.values())}: {counts(tally.compared)}")
        print(f"not compared in full: {counts(tally.lenient)}")
        print(f"programs' own errors: {counts(tally.errors)}")
        print(f"mismatches {len(found)}")
        return
    print(f"flushes {tally.flushes}, of which failed {tally.failed}")
    print(f"rows written {sum(tally.rows.values())}: {counts(tally.rows)}")
    print(f"programs' own errors: {counts(tally.errors)}")
    print(f"pre signals {tally.pre}, late {late} ({late / max(tally.pre, 1):.4%}): ", end="")
    print(counts(tally.late))
    print(f"rejected, SQLAlchemy's own order decides: {tally.undecided}")
    print(f"states that SQLAlchemy could not discard: {counts(lost_states)}")
    print(f"mismatches {len(found)}")


def counts(counter: Counter[str]) -> str:
    """The counter in one line."""
    return ", ".join(f"{name} {n}" for name, n in counter.most_common()) or "none"


if __name__ == "__main__":
    sys.exit(main())

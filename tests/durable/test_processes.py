"""Processes that are killed: nothing committed is lost, nothing undone is delivered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from .conftest import events, ledger, make_due

ROOT = Path(__file__).parents[2]
APPLICATION = f"{__package__}.application"
KILLED = -signal.SIGKILL

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(url: str) -> Run:
    """``run(*arguments, dies="")`` runs python in a process of its own, to its end."""

    def run(*arguments: str, dies: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SHOP_URL": url, "SHOP_DIES": dies}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def place(run: Run, *statuses: str, dies: str = "") -> int:
    return run("-m", APPLICATION, *statuses, dies=dies).returncode


def signals(run: Run, *arguments: str, dies: str = "") -> subprocess.CompletedProcess[str]:
    """The command ``sqla-signals``."""
    return run("-m", "sqla_signals", *arguments, "--app", f"{APPLICATION}:relay", dies=dies)


def test_an_application_killed_right_after_commit_has_its_events_delivered(shop: Engine, run: Run):
    """By a relay that is started later."""
    assert place(run, "a", dies="after commit") == KILLED
    assert len(events(shop)) == 1
    assert signals(run, "relay", "--once").returncode == 0
    assert ledger(shop) == ["a"]
    assert events(shop) == []


def test_an_application_killed_right_before_commit_has_nothing_delivered(shop: Engine, run: Run):
    """The events are undone with the work."""
    assert place(run, "a", dies="before commit") == KILLED
    assert events(shop) == []
    assert signals(run, "relay", "--once").returncode == 0
    assert ledger(shop) == []


def test_a_relay_killed_in_a_receiver_leaves_the_rest_to_the_next(shop: Engine, run: Run):
    """What was done is not done again, what was not is done."""
    assert place(run, "a", "b", "c") == 0
    assert signals(run, "relay", "--once", dies="in receiver b").returncode == KILLED
    assert ledger(shop) == ["a"]
    if shop.dialect.name == "sqlite":
        make_due(shop)  # the lease of the dead relay runs out
    second = signals(run, "relay", "--once")
    assert second.returncode == 0
    assert ledger(shop) == ["a", "b", "c"]
    assert events(shop) == []
    called = [line.split()[1] for line in second.stdout.splitlines() if line.startswith("called")]
    assert called == ["b", "c"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_relay_stops_when_it_is_told_to(shop: Engine, url: str, number: signal.Signals):
    """It ends the batch at hand, and returns 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sqla_signals", "relay", "--app", f"{APPLICATION}:relay"],
        cwd=ROOT,
        env={**os.environ, "SHOP_URL": url},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "is running" in process.stderr.readline()
    process.send_signal(number)
    _, output = process.communicate(timeout=60)
    assert "has stopped" in output
    assert process.returncode == 0


def test_the_state_of_the_outbox_is_the_status_of_a_process(shop: Engine, run: Run):
    """For monitoring: 1 where nobody delivers."""
    assert place(run, "poison") == 0
    fresh = signals(run, "outbox", "list")
    assert (fresh.returncode, fresh.stdout.splitlines()[0][:21]) == (0, "waiting: 1, the oldes")
    late = signals(run, "outbox", "list", "--max-age", "0")
    assert late.returncode == 1
    assert "is a relay running?" in late.stdout

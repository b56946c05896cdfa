"""One event whose receiver ends, hangs or starves its relay: a dead letter, alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_signals import post_save, receiver
from sqla_signals.durable import LocalPublisher, Relay

from .conftest import events, ledger, make_due
from .models import Ledger, Order, outbox
from .test_relay import place

PROGRAM = """
import os, resource, signal, sys, time
from sqlalchemy import create_engine
import sqla_signals
from sqla_signals import post_save, receiver
from sqla_signals.durable import Relay
from tests.durable.models import Ledger, Order, outbox

url, folder = sys.argv[1:]
sqla_signals.install()

@receiver(post_save, sender=Order, durable=True, name="shop.fn")
def fn(sender, instance, session, event, **kwargs):
    session.add(Ledger(entry=instance.status))
    if instance.status == "bad":
        session.flush()
        with open(f"{folder}/attempts", "a") as file:
            file.write(f"{event.attempt}\\n")
        KIND

options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
relay = Relay(create_engine(url, **options), outbox=outbox, max_attempts=3)
while relay.run_once():
    pass
"""

KINDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "sys.exit(1)",
    "hangs": "time.sleep(3600)",
    "out of memory": (
        "resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); "
        "a = [bytearray(2**27) for _ in 'abcdef']"
    ),
}


def start(shop: Engine, kind: str, folder: Path) -> subprocess.Popen[bytes]:
    url = shop.url.render_as_string(hide_password=False)
    code = PROGRAM.replace("KIND", KINDS[kind])
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(folder)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )


def attempts(folder: Path) -> list[int]:
    file = folder / "attempts"
    return [*map(int, file.read_text().split())] if file.exists() else []


def end(process: subprocess.Popen[bytes], kind: str, folder: Path, before: int) -> None:
    """Wait for the end of a relay, or kill one that hangs."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        if kind == "hangs" and len(attempts(folder)) > before:
            os.kill(process.pid, signal.SIGKILL)
        process.poll() is None and time.sleep(0.05)


@pytest.mark.parametrize("relays", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_dead_letter_after_its_attempts_and_all_others_are_delivered(
    shop: Engine, kind: str, relays: int, tmp_path: Path
):
    """However often relays are restarted, and however many there are."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, **kwargs): ...

    place(shop, "a", "bad", *(f"b{number}" for number in range(12)))
    for _ in range(8):
        make_due(shop)
        before = len(attempts(tmp_path))
        processes = [start(shop, kind, tmp_path) for _ in range(relays)]
        for process in processes:
            end(process, kind, tmp_path, before)
        if not events(shop):
            break
    assert events(shop) == []
    assert sorted(ledger(shop)) == sorted(["a", *(f"b{number}" for number in range(12))])
    with shop.connect() as connection:
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
        assert connection.scalar(select(func.count()).select_from(outbox.started)) == 0
    assert (dead.aggregate_id, dead.receivers) == ("2", ["shop.fn"])
    if kind == "hangs" and relays == 2:
        # This test may have killed one between its note that it begins, and its receiver.
        assert attempts(tmp_path) in ([1, 2, 3], [1, 2], [1, 3], [2, 3])
    else:
        assert attempts(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("url", "kill"),
    [
        pytest.param(
            "postgresql",
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where state = 'idle in transaction' and query like '%outbox%'",
            marks=pytest.mark.postgresql,
        ),
        pytest.param("mariadb", None, marks=pytest.mark.mariadb),
    ],
    indirect=["url"],
)
def test_a_connection_that_is_cut_while_a_receiver_runs_loses_nothing(shop: Engine, kill):
    """The relay settles on another one, what it did and what has failed."""
    admin = shop.execution_options(isolation_level="AUTOCOMMIT")
    calls: list[tuple[str, int]] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, event, **kwargs):
        calls.append((instance.status, event.attempt))
        with admin.connect() as connection:
            if kill is not None:
                connection.execute(text(kill))
            else:
                for (number,) in connection.exec_driver_sql(
                    "select trx_mysql_thread_id from information_schema.innodb_trx "
                    "where trx_rows_locked > 0 and trx_rows_modified = 0"
                ).all():
                    connection.exec_driver_sql(f"kill {number}")
        if instance.status == "bad":
            raise ValueError("never")
        session.add(Ledger(entry=instance.status))

    place(shop, "a", "bad", "b")
    relay = Relay(shop, LocalPublisher(shop), outbox=outbox, max_attempts=2)
    for _ in range(3):
        relay.run_once()
        make_due(shop)
    assert sorted(calls) == [("a", 1), ("b", 1), ("bad", 1), ("bad", 2)]
    assert sorted(ledger(shop)) == ["a", "b"]
    assert events(shop) == []
    with Session(shop) as session:
        (dead,) = session.execute(select(outbox.dead_letters)).all()
    assert dead.last_error == "shop.fn: ValueError: never"

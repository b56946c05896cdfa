"""One event whose receiver ends, hangs or starves its relay: a dead letter, alone."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, func, select, text
from sqlalchemy.orm import Session

from sqla_signals import post_save, receiver
from sqla_signals.durable import LocalPublisher, Relay

from .bad_relay import KINDS, run
from .conftest import events, ledger, make_due
from .models import Ledger, Order, outbox
from .test_relay import place

# It has imported everything once, and each relay is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.durable.bad_relay"])


def attempts(file: Path) -> list[tuple[int, int]]:
    """The calls with the bad event: which attempt, and in which process."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(attempt), int(process)) for attempt, process in map(str.split, lines)]


def run_relays(shop: Engine, kind: str, file: Path, count: int) -> None:
    """Wait for the end of relays, and kill those that hang."""
    url = shop.url.render_as_string(hide_password=False)
    relays = [processes.Process(target=run, args=(url, kind, str(file))) for _ in range(count)]
    for relay in relays:
        relay.start()
    deadline = time.monotonic() + 60
    while any(relay.is_alive() for relay in relays):
        assert time.monotonic() < deadline
        hanging = [process for _, process in attempts(file)] if kind == "hangs" else []
        for relay in relays:
            if relay.pid in hanging:
                relay.kill()
            relay.join(0.02)


@pytest.mark.parametrize(("kind", "relays"), [("killed", 1), *((kind, 2) for kind in KINDS)])
def test_it_is_a_dead_letter_after_its_attempts_and_all_others_are_delivered(
    shop: Engine, kind: str, relays: int, tmp_path: Path
):
    """However often relays are restarted, and however many there are."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, **kwargs): ...

    place(shop, "a", "bad", *(f"b{number}" for number in range(12)))
    file = tmp_path / "attempts"
    for _ in range(8):
        make_due(shop)
        run_relays(shop, kind, file, relays)
        if not events(shop):
            break
    assert events(shop) == []
    assert sorted(ledger(shop)) == sorted(["a", *(f"b{number}" for number in range(12))])
    with shop.connect() as connection:
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
        assert connection.scalar(select(func.count()).select_from(outbox.started)) == 0
    assert (dead.aggregate_id, dead.receivers) == ("2", ["shop.fn"])
    assert [attempt for attempt, _ in attempts(file)] == [1, 2, 3]


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
            if len(calls) > 1:
                pass
            elif kill is not None:
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


@pytest.mark.parametrize(
    ("url", "patience", "own", "there"),
    [
        pytest.param(
            "postgresql",
            "set idle_in_transaction_session_timeout = 100",
            "select pg_backend_pid()",
            "select count(*) from pg_stat_activity where pid = :id",
            marks=pytest.mark.postgresql,
        ),
        pytest.param(
            "mariadb",
            "set idle_transaction_timeout = 1",
            "select connection_id()",
            "select count(*) from information_schema.processlist where id = :id",
            marks=pytest.mark.mariadb,
        ),
    ],
    indirect=["url"],
)
def test_what_outlives_the_patience_of_the_database_is_a_dead_letter_alone(
    shop: Engine, patience: str, own: str, there: str
):
    """The transactions of the receiver and of its relay are ended for being idle."""
    admin = shop.execution_options(isolation_level="AUTOCOMMIT")
    engine = create_engine(shop.url)
    calls: list[tuple[str, int]] = []

    @event.listens_for(engine, "connect")
    def set_patience(connection, _):
        cursor = connection.cursor()
        cursor.execute(patience)
        cursor.close()
        connection.commit()

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, event, **kwargs):
        calls.append((instance.status, event.attempt))
        session.add(Ledger(entry=instance.status))
        if instance.status == "bad":
            session.flush()
            number = session.scalar(text(own))
            with admin.connect() as connection:
                while connection.scalar(text(there), {"id": number}):
                    pass

    place(shop, "a", "bad", "b")
    relay = Relay(engine, outbox=outbox, max_attempts=2)
    for _ in range(4):
        relay.run_once()
        make_due(shop)
    engine.dispose()
    assert sorted(calls) == [("a", 1), ("b", 1), ("bad", 1), ("bad", 2)]
    assert sorted(ledger(shop)) == ["a", "b"]
    assert events(shop) == []
    with Session(shop) as session:
        (dead,) = session.execute(select(outbox.dead_letters)).all()
        assert session.scalar(select(func.count()).select_from(outbox.started)) == 0
    assert (dead.aggregate_id, dead.attempts) == ("2", 2)

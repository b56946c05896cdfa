"""What durable delivery costs: ``python -m tests.perf.bench_durable``.

Needs PostgreSQL, which it starts, and Redis (``SQLA_SIGNALS_REDIS_URL``, or redis-server on PATH).
Not part of the suite: it measures time. Each comparison alternates between its sides, and gives
the ratio of the medians of wall-clock time and of CPU time, this process and the backends of
PostgreSQL together; on a busy machine believe the latter. Ends with status 1 if a limit is missed.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from celery import Celery
from sqlalchemy import Engine, create_engine, func, insert, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sqla_signals
from sqla_signals import post_save, receiver
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import Relay, outbox_table
from tests.conftest import start_postgresql

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Base(DeclarativeBase):
    """The declarative base."""


outbox = outbox_table(Base.metadata)


class Order(Base):
    """A row as rows are."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    status: Mapped[str]
    total: Mapped[int]


def saved(sender: type[Order], **kwargs: Any) -> None:
    """Never called here."""


class Cost(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def backends(folder: Path) -> float:
    """CPU seconds of all processes of PostgreSQL that there are."""
    postmaster = (folder / "postmaster.pid").read_text().split()[0]
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == postmaster:
            total += int(fields[11]) + int(fields[12])
    return total * TICK


def measured(folder: Path, work: Callable[[], object]) -> Cost:
    """Do it once."""
    wall, cpu, server = time.perf_counter(), time.process_time(), backends(folder)
    work()
    return Cost(
        time.perf_counter() - wall, time.process_time() - cpu + max(0.0, backends(folder) - server)
    )


def compare(
    folder: Path, plain: Callable[[], object], *others: Callable[[], object]
) -> Sequence[Cost]:
    """The ratios of the medians, the others to plain; after one round that does not count."""
    sides = (plain, *others)
    for side in sides:
        side()
    rounds = [[measured(folder, side) for side in sides] for _ in range(ROUNDS)]
    theirs, *ours = [
        Cost(*(statistics.median(cost[i] for cost in costs) for i in range(2)))
        for costs in zip(*rounds, strict=True)
    ]
    return [Cost(one.wall / theirs.wall, one.cpu / theirs.cpu) for one in ours]


# -- what is compared ------------------------------------------------------------------------------


def write(engine: Engine, rows: int, transactions: int) -> None:
    with Session(engine) as session:
        for _ in range(transactions):
            session.add_all(
                [Order(customer=f"customer {n}", status="new", total=n) for n in range(rows)]
            )
            session.commit()


def write_by_hand(engine: Engine, rows: int, transactions: int) -> None:
    """The same, and the plainest outbox there can be: one INSERT in each transaction."""
    statement = (
        insert(outbox.table).values(occurred_at=func.now(), available_at=func.now()).inline()
    )
    with Session(engine) as session:
        for _ in range(transactions):
            orders = [Order(customer=f"customer {n}", status="new", total=n) for n in range(rows)]
            session.add_all(orders)
            session.flush()
            events = [
                {
                    "id": uuid4(),
                    "aggregate_type": "bench.Order",
                    "aggregate_id": str(order.id),
                    "event_type": "created",
                    "payload": {
                        "id": order.id,
                        "customer": order.customer,
                        "status": order.status,
                        "total": order.total,
                    },
                    "headers": {},
                    "receivers": ["bench.saved"],
                    "attempts": 0,
                }
                for order in orders
            ]
            session.connection().execute(statement, events)
            session.commit()


def clear(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE orders, {outbox.table.name}")


def writing(engine: Engine, folder: Path, rows: int, transactions: int) -> Sequence[Cost]:
    """The same transactions with a durable receiver, an outbox by hand, and once more plain."""

    def durable() -> None:
        installation = sqla_signals.install()
        write(engine, rows, transactions)
        installation.remove()

    def plain() -> None:
        write(engine, rows, transactions)

    def by_hand() -> None:
        write_by_hand(engine, rows, transactions)

    clear(engine)
    ratios = compare(folder, plain, durable, by_hand, plain)
    clear(engine)
    return ratios


def publishing(engine: Engine, folder: Path, url: str, events: int, per_message: int) -> Cost:
    """The throughput of a relay, in that of a bare loop of ``send_task``: bare to ours."""
    app = Celery("bench", broker=url, task_default_queue=f"bench-{os.getpid()}")
    app.conf.broker_transport_options = {"visibility_timeout": 600}
    name = f"bench.run{per_message}"
    publisher = CeleryPublisher(app, engine, events_per_message=per_message, name=name)
    relay = Relay(engine, publisher, outbox=outbox)
    installation = sqla_signals.install()
    write(engine, events, 1)
    installation.remove()
    with engine.connect() as connection:
        rows = [dict(row._mapping) for row in connection.execute(select(outbox.table))]
    keep = f"CREATE TABLE kept AS SELECT * FROM {outbox.table.name}"
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS kept")
        connection.exec_driver_sql(keep)
    texts: list[str] = []
    publish = publisher.publish

    def listening(messages: Any) -> Any:
        texts.extend(message.to_json() for message in messages)
        return publish(messages)

    relay.publisher.publish = listening  # type: ignore[method-assign]
    while relay.run_once():
        pass
    relay.publisher.publish = publish  # type: ignore[method-assign]
    assert len(texts) == len(rows) == events
    producer = app.amqp.Producer(app.connection_for_write(), auto_declare=False)

    def bare() -> None:
        for text in texts:
            app.send_task(name, (text,), producer=producer, ignore_result=True)

    def relayed() -> None:
        while relay.run_once():
            pass

    def refilled() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"INSERT INTO {outbox.table.name} SELECT * FROM kept")

    costs = []
    for _ in range(ROUNDS):
        refilled()
        costs.append((measured(folder, bare), measured(folder, relayed)))
    app.connection_for_write().default_channel.queue_purge(app.conf.task_default_queue)
    publisher.close()
    producer.connection.close()
    clear(engine)
    ratio = Cost(
        *(
            statistics.median(their[i] for their, _ in costs)
            / statistics.median(our[i] for _, our in costs)
            for i in range(2)
        )
    )
    speeds = [events / statistics.median(cost[side].wall for cost in costs) for side in (0, 1)]
    print(f"    bare {speeds[0]:,.0f} events/s, relay {speeds[1]:,.0f} events/s")
    return ratio


def polling(engine: Engine) -> tuple[float, float, float]:
    """Milliseconds of an empty poll after a million events: the first, before and after VACUUM."""
    columns = (
        "id, aggregate_type, aggregate_id, event_type, occurred_at, payload, headers, receivers"
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO {outbox.table.name} ({columns}, attempts, available_at) "
            "SELECT gen_random_uuid(), 'm.Order', n::text, 'created', now(), '{}', '{}', '[]', "
            "0, now() "
            "FROM generate_series(1, 1000000) n"
        )
        connection.exec_driver_sql(
            f"INSERT INTO {outbox.inbox.name} SELECT id, 'bench.saved', now() FROM "
            f"{outbox.table.name}"
        )
        connection.exec_driver_sql(f"DELETE FROM {outbox.table.name}")
    relay = Relay(engine, outbox=outbox)

    def poll() -> float:
        start = time.perf_counter()
        assert relay.run_once() == 0
        return (time.perf_counter() - start) * 1000

    first = poll()
    before = statistics.median(poll() for _ in range(200))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"VACUUM ANALYZE {outbox.table.name}")
    return first, before, statistics.median(poll() for _ in range(500))


# -- servers ---------------------------------------------------------------------------------------


@contextmanager
def postgresql() -> Iterator[tuple[Engine, Path]]:
    """A server of our own, with the tables in it."""
    with tempfile.TemporaryDirectory(prefix="bench-pg-", ignore_cleanup_errors=True) as parent:
        folder = Path(parent, "data")
        server = start_postgresql(folder)
        # Durable again, as in production: the suite's servers are not.
        server.psql("ALTER SYSTEM RESET ALL")
        server.psql("SELECT pg_reload_conf()")
        engine = create_engine(make_url(server.get_uri()).set(drivername="postgresql+psycopg"))
        Base.metadata.create_all(engine)
        yield engine, folder
        engine.dispose()
        server.cleanup()


@contextmanager
def redis() -> Iterator[str]:
    """The server that the environment names, or one of our own."""
    if url := os.environ.get("SQLA_SIGNALS_REDIS_URL"):
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("no Redis: set SQLA_SIGNALS_REDIS_URL, or install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "--port", str(port), "--save", "", "--loglevel", "warning"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait()


def main() -> int:
    """Measure everything; print it beside the limits."""
    missed = 0
    sqla_signals.install().remove()
    receiver(post_save, sender=Order, durable=True, name="bench.saved")(saved)

    def report(what: str, limit: str, good: bool, *figures: str) -> None:
        nonlocal missed
        missed += not good
        print(f"{'ok    ' if good else 'MISSED'} {what}: {', '.join(figures)} (limit {limit})")
        sys.stdout.flush()

    with postgresql() as (engine, folder), redis() as url:
        for rows, transactions in ((10_000, 1), (1, 1000)):
            ratio, by_hand, control = writing(engine, folder, rows, transactions)
            report(
                f"writing, {rows:,} rows in a transaction, durable to plain",
                "1.40",
                ratio.cpu <= 1.40,
                f"CPU {ratio.cpu:.2f}",
                f"wall {ratio.wall:.2f}",
            )
            for side, cost in (("an outbox by hand", by_hand), ("plain once more", control)):
                print(f"    {side}, to plain: CPU {cost.cpu:.2f}, wall {cost.wall:.2f}")
        for per_message, least in ((1, 0.95), (100, 5.0)):
            ratio = publishing(engine, folder, url, 2000, per_message)
            report(
                f"relay to Celery and Redis, {per_message} events per message, relay to bare loop",
                f"{least:.2f}",
                ratio.cpu >= least,
                f"CPU {ratio.cpu:.2f}",
                f"wall {ratio.wall:.2f}",
            )
        first, before, after = polling(engine)
        report(
            "an empty poll after 1,000,000 delivered events",
            "1 ms",
            after < 1,
            f"first {first:.1f} ms",
            f"before VACUUM {before:.2f} ms",
            f"after {after:.2f} ms",
        )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())

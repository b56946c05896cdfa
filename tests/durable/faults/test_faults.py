"""Whatever dies: nothing committed is lost, nothing undone is delivered, effects happen once.

Each test has processes of its own, and a ledger that is outside of all of them. What runs on SQLite
and ``filesystem://`` needs no server; the rest runs where the environment names one.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from .conftest import APPLICATION, IN_CI, RedisServer, Scene, stop_postgresql
from .proxy import Proxy

KILLED = -signal.SIGKILL

QUICK = ("sqlite", "filesystem")
POSTGRESQL_REDIS = pytest.param(
    "postgresql", "redis", marks=[pytest.mark.postgresql, pytest.mark.redis]
)
POSTGRESQL_RABBITMQ = pytest.param(
    "postgresql", "rabbitmq", marks=[pytest.mark.postgresql, pytest.mark.rabbitmq]
)
MARIADB_RABBITMQ = pytest.param(
    "mariadb", "rabbitmq", marks=[pytest.mark.mariadb, pytest.mark.rabbitmq]
)
MARIADB_REDIS = pytest.param("mariadb", "redis", marks=[pytest.mark.mariadb, pytest.mark.redis])


def on(*servers: Any) -> Callable[[Any], Any]:
    """The databases and brokers that a test runs on."""
    return pytest.mark.parametrize(("url", "broker"), servers, indirect=True)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


@on(QUICK)
def test_nothing_outlives_its_scene(scene: Scene):
    """A relay behind a command of its own would otherwise take the events of the next test."""
    file = scene.folder / "child"
    scene.relay(prefix=("sh", "-c", f'"$@" & echo $! > {file}; wait', "sh"))
    scene.until("the relay is running", lambda: "is running" in scene.log())
    command = Path(f"/proc/{int(file.read_text())}/cmdline")
    assert b"sqla_signals" in command.read_bytes()
    scene.stop()
    # Nobody may have asked what became of it: then it is there, and has no command any more.
    scene.until("the relay has ended", lambda: not command.exists() or not command.read_bytes())


@on(QUICK, POSTGRESQL_REDIS)
def test_the_application_is_killed_before_and_after_commit(scene: Scene):
    """What it has committed is delivered, and what it has not is not."""
    assert scene.place("a", dies="before commit") == KILLED
    os.remove(scene.folder / "died")
    assert scene.place("b", "c", dies="after commit") == KILLED
    scene.relay()
    scene.worker()
    scene.settle("application killed right before COMMIT, and right after", events=1)
    assert scene.calls().total() == 1


@on(QUICK, POSTGRESQL_RABBITMQ)
def test_the_relay_is_killed_while_it_publishes(scene: Scene):
    """The next one begins the batch again; what comes twice has its effect once."""
    scene.place(*names("a", 10))
    assert scene.relay(dies="relay 5", lease=2).wait(60) == KILLED
    scene.relay()
    scene.worker()
    found = scene.settle("relay killed in the middle of a batch", events=10)
    assert found.delivered_twice <= 5
    assert scene.calls().total() == 10


@on(POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ, MARIADB_REDIS)
def test_the_relay_is_killed_when_it_has_published(scene: Scene):
    """Before the outbox knows: all of them come twice, and each has its effect once."""
    scene.place(*names("a", 10))
    assert scene.relay(dies="relay published").wait(60) == KILLED
    scene.relay()
    scene.worker()
    scene.until("both batches arrived", lambda: scene.count().delivered_twice == 10)
    scene.settle("relay killed between the broker and its own COMMIT", events=10)
    assert scene.calls().total() == 10


@on(QUICK, POSTGRESQL_REDIS, MARIADB_RABBITMQ)
def test_three_relays_at_once(scene: Scene):
    """None gets what another has."""
    scene.place(*names("a", 25), "moody")
    for _ in range(3):
        scene.relay()
    scene.worker()
    found = scene.settle("three relays at once", events=26)
    assert found.delivered_twice == 1  # the moody one, which failed at first
    assert scene.calls().total() == 27


@on(QUICK, POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ)
def test_poison(scene: Scene):
    """What can never be done ends as a dead letter, each with its reason; the rest goes on."""
    scene.place("a", "poison", "x" * 1200)
    events = scene.table("outbox")
    with scene.engine.begin() as connection:
        first = connection.execute(events.select().order_by(events.c.sequence)).first()
        assert first is not None
        row = dict(first._mapping)
        payload = row["payload"]
        del row["sequence"]
        for change in ({"receivers": ["os.system"]}, {"payload": {**payload, "schema": 99}}):
            connection.execute(insert(events), {**row, **change})
    scene.relay(relay_attempts=1, max_bytes=1000)
    scene.worker()
    scene.until("four dead letters", lambda: scene.rows("dead_letters") == 4)
    scene.settle("poison of four kinds", events=3)
    assert sorted(error.split(": ")[1] for error in scene.letters()) == [
        "MessageTooLargeError",
        "UnknownReceiverError",
        "UnknownSchemaError",
        "ValueError",
    ]


@on(POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ, MARIADB_RABBITMQ)
def test_a_worker_is_killed_in_a_receiver(scene: Scene):
    """With all its processes: another worker gets what it had, and begins again."""
    scene.options = {"visibility_timeout": 2}
    scene.relay()
    scene.place(*names("a", 5), "deadly", *names("b", 5))
    assert scene.worker(dies="receiver deadly").wait(90) == KILLED
    scene.worker()
    found = scene.settle("worker killed with -9 in a receiver", events=11)
    assert found.delivered_twice >= 1
    assert scene.calls().total() == 12


@on(POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ)
def test_a_process_of_a_workers_pool_is_killed_in_a_receiver(scene: Scene):
    """The worker notices, and puts the task back at once."""
    scene.relay()
    scene.worker("prefork", dies="receiver deadly")
    scene.place(*names("a", 5), "deadly", *names("b", 5))
    scene.settle("process of a worker's pool killed with -9 in a receiver", events=11)
    assert scene.died()
    assert scene.calls().total() >= 12


@on(POSTGRESQL_REDIS)
def test_async_receivers_in_a_worker_that_forks(scene: Scene):
    """Written from an AsyncSession, run on a loop of the worker's own."""
    scene.options = {"async": True}
    scene.relay()
    scene.worker("prefork")
    scene.place(*names("a", 10), "moody")
    scene.settle("async receivers, one of which fails once", events=11)
    assert scene.calls().total() == 12


@on(POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ)
def test_a_worker_is_killed_in_a_message_of_several_events(scene: Scene):
    """What was done of it is not done again."""
    scene.options = {"events_per_message": 10, "visibility_timeout": 2}
    scene.place(*names("a", 5), "deadly", *names("b", 5))
    scene.relay()
    assert scene.worker(dies="receiver deadly").wait(90) == KILLED
    scene.worker()
    scene.settle("worker killed in a message of several events", events=11)
    assert scene.calls().total() == 12


@on(POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ)
def test_the_broker_is_away_for_a_while(scene: Scene, broker_proxy: Proxy):
    """Under relay and worker; what is committed meanwhile waits."""
    scene.relay(broker_url=broker_proxy.url)
    scene.worker(broker_url=broker_proxy.url)
    scene.place(*names("a", 5))
    scene.until("the first are done", scene.all_done)
    broker_proxy.cut()
    scene.place(*names("b", 10))
    scene.until("the relay is in trouble", lambda: "trying again in" in scene.log())
    assert scene.rows("outbox") == 10
    broker_proxy.mend()
    scene.settle("broker away for some seconds", events=15)
    assert scene.letters() == []


@on(pytest.param("postgresql", "filesystem", marks=[pytest.mark.postgresql, pytest.mark.redis]))
def test_redis_is_killed_and_restarted_and_full(scene: Scene, redis_server: RedisServer):
    """It writes to its disk, so it has what it took; what it refuses waits in the outbox."""
    scene.environment["FAULTS_BROKER_URL"] = redis_server.url
    scene.place(*names("a", 5))
    scene.relay()
    scene.until("all published", lambda: scene.rows("outbox") == 0)
    redis_server.kill()
    scene.place(*names("b", 5))
    scene.until("the relay is in trouble", lambda: "trying again in" in scene.log())
    redis_server.start()
    scene.until("all published", lambda: scene.rows("outbox") == 0)
    redis_server.client().config_set("maxmemory", 1)
    scene.place(*names("c", 5))
    scene.until("refused", lambda: scene.log().count("command not allowed") > 2)
    assert scene.rows("outbox") == 5
    redis_server.client().config_set("maxmemory", 0)
    scene.worker()
    scene.settle("Redis killed with -9, restarted, then full", events=15)
    assert scene.letters() == []


@on(POSTGRESQL_RABBITMQ)
def test_the_queue_is_full(scene: Scene):
    """RabbitMQ refuses what does not fit: that waits, however long, and no attempt counts."""
    scene.options = {"max_length": 5, "relay_attempts": 2}
    scene.place(*names("a", 30))
    scene.relay()
    # Whole batches: the first, of which five events fit in, is over.
    scene.until("refused often", lambda: scene.log().count("trying again in") > 3)
    assert scene.rows("outbox") == 25
    scene.worker()
    scene.settle("queue full", events=30)
    assert scene.letters() == []


@on(POSTGRESQL_RABBITMQ)
def test_a_message_that_has_no_queue(scene: Scene):
    """Comes back: it waits in the outbox, and says so there, until somebody binds one."""
    from kombu import Connection, Exchange

    name = f"faults-{os.urandom(4).hex()}"
    with Connection(scene.environment["FAULTS_BROKER_URL"]) as connection:
        exchange = Exchange(name, type="topic", durable=True)(connection.default_channel)
        exchange.declare()
        scene.place("a", "b")
        relay = scene.relay(exchange=name)
        scene.until("returned", lambda: "UnroutableError" in str(scene.errors()))
        assert scene.rows("outbox") == 2
        exchange.delete()
        scene.until("no exchange", lambda: "NOT_FOUND" in str(scene.errors()))
    assert relay.poll() is None
    relay.terminate()
    scene.relay()
    scene.worker()
    scene.settle("unroutable, then no exchange", events=2)


@on(POSTGRESQL_REDIS, POSTGRESQL_RABBITMQ)
def test_postgresql_is_restarted(scene: Scene):
    """Under relay and worker, whose connections it cuts."""
    scene.relay()
    scene.worker()
    scene.place(*names("a", 5))
    scene.until("the first are done", scene.all_done)
    start = stop_postgresql(scene.engine)
    try:
        scene.until("the relay is in trouble", lambda: "trying again in" in scene.log())
    finally:
        start()
    scene.place(*names("b", 10))
    scene.settle("database restarted under relay and worker", events=15)


@on(MARIADB_REDIS)
def test_mariadb_is_away_for_a_while(scene: Scene, url: str):
    """Under relay and worker."""
    with Proxy(url) as proxy:
        scene.relay(database_url=proxy.url)
        scene.worker(database_url=proxy.url)
        scene.place(*names("a", 5))
        scene.until("the first are done", scene.all_done)
        proxy.cut()
        scene.place(*names("b", 10))
        scene.until("the relay is in trouble", lambda: "trying again in" in scene.log())
        proxy.mend()
        scene.settle("database away for some seconds", events=15)


@on(POSTGRESQL_REDIS, MARIADB_RABBITMQ)
def test_transactions_commit_in_another_order_than_they_were_numbered(scene: Scene):
    """The first is committed when the second is delivered."""
    scene.relay()
    scene.worker()
    code = f"""
import time
from sqlalchemy import func, select
from {APPLICATION} import *

def second_first(_):
    with Session(engine) as other:
        other.add(Order(id=2, status="second"))
        other.commit()
        while not other.scalar(select(func.count()).select_from(Effect)):
            other.rollback()
            time.sleep(0.05)

with Session(engine) as session:
    session.add(Order(id=1, status="first"))
    event.listen(session.connection(), "commit", second_first, once=True)
    session.commit()
"""
    assert scene.run("-c", code) == 0
    scene.settle("commits out of order", events=2)
    assert (scene.folder / "calls").read_text().split() == ["2", "1"]


@on(POSTGRESQL_REDIS)
def test_the_clocks_of_relays_are_off_by_an_hour(scene: Scene):
    """One is fast, one is slow; only the clock of the database counts."""
    if shutil.which("faketime") is None:
        if IN_CI:
            pytest.fail("faketime is not installed")
        pytest.skip("faketime is not installed")
    # The time of day alone: by the other clock a process waits, and it would do so for an hour.
    faketime = ("faketime", "--exclude-monotonic", "-f")
    scene.relay(prefix=(*faketime, "+1h"))
    scene.relay(prefix=(*faketime, "-1h"))
    scene.worker()
    scene.place(*names("a", 10), "moody")
    scene.settle("clocks of the relays an hour fast and an hour slow", events=11)
    assert scene.letters() == []


@on(QUICK, POSTGRESQL_REDIS)
def test_rolled_back_work_is_not_delivered(scene: Scene):
    """Nor what a savepoint took back."""
    code = f"""
from {APPLICATION} import *
with Session(engine) as session:
    session.add(Order(id=1, status="kept"))
    with session.begin_nested() as savepoint:
        session.add(Order(id=2, status="undone"))
        session.flush()
        savepoint.rollback()
    session.commit()
    session.add(Order(id=3, status="rolled back"))
    session.flush()
    session.rollback()
"""
    assert scene.run("-c", code) == 0
    scene.relay()
    scene.worker()
    scene.settle("rollback, and rollback to a savepoint", events=1)
    assert list(scene.calls()) == [1]

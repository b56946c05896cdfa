"""The Celery publisher, in one process: what it sends, and what its task does with that."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4, uuid5

import billiard.common
import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_init
from kombu.transport import filesystem
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from sqla_signals import InstallError, ReceiverOptionError, post_delete, post_save, receiver
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import Relay, upkeep

from .conftest import drain, events, ledger, make_due
from .models import Ledger, Order, outbox

on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


@pytest.fixture
def app() -> Iterator[Celery]:
    """A Celery app with a broker in this process, and a queue of its own."""
    app = Celery("shop", broker="memory://", task_default_queue=f"queue-{uuid4()}")
    yield app
    app.close()


@pytest.fixture
def publisher(app: Celery, shop: Engine) -> Iterator[CeleryPublisher]:
    publisher = CeleryPublisher(app, shop, max_attempts=3)
    yield publisher
    publisher.close()


@pytest.fixture
def relay(shop: Engine, publisher: CeleryPublisher) -> Relay:
    return Relay(shop, publisher, outbox=outbox, max_attempts=3)


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    """What two durable receivers of orders were called with; one fails for bad orders."""
    calls: list[tuple[str, int]] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.first")
    def first(sender, instance, session, event, **kwargs):
        calls.append((f"first {instance.status}", event.attempt))
        session.add(Ledger(entry=f"first {instance.status}"))
        session.flush()
        if instance.status == "bad":
            raise ValueError("no such order")

    @receiver(post_save, sender=Order, durable=True, fields={"status"}, name="shop.second")
    def second(sender, instance, session, event, **kwargs):
        calls.append((f"second {instance.status}", event.attempt))
        session.add(Ledger(entry=f"second {instance.status}"))
        session.flush()
        if instance.status in ("bad", "half"):
            raise ValueError("not this one")

    return calls


def place(engine: Engine, *statuses: str) -> None:
    with Session(engine) as session:
        session.add_all([Order(status=status) for status in statuses])
        session.commit()


def sent(app: Celery) -> list[Any]:
    """Take what is in the queue."""
    found = []
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        while queue.qsize():
            message = queue.get(block=False)
            message.ack()
            found.append(message)
        queue.close()
    return found


def run(publisher: CeleryPublisher, message: Any) -> Any:
    """Do what a worker does with a task."""
    args, _, _ = message.payload
    headers = message.headers
    return publisher.task.apply(args, retries=headers["retries"], task_id=headers["id"])


def work(app: Celery, publisher: CeleryPublisher) -> list[str]:
    """Run everything in the queue, also what is put back; return the states."""
    states = []
    while messages := sent(app):
        states += [run(publisher, message).state for message in messages]
    return states


def dead(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(outbox.dead_letters)))


@on_sqlite
def test_a_worker_never_finds_half_a_file(shop, calls, tmp_path, monkeypatch):
    """With ``filesystem://`` it takes a file as soon as it is there, written or not."""
    folder = tmp_path / "queue"
    folder.mkdir()
    options = {name: str(folder) for name in ("data_folder_in", "data_folder_out")}
    options["control_folder"] = str(tmp_path / "control")
    app = Celery("shop", broker="filesystem://")
    app.conf.broker_transport_options = options
    found = []

    def looks(file: Any, flags: int) -> None:
        if str(file.name).endswith(".msg"):  # created, and nothing is written yet
            found.append(len(sent(app)))

    monkeypatch.setattr(filesystem, "lock", looks)
    publisher = CeleryPublisher(app, shop)
    place(shop, "a", "b")
    assert Relay(shop, publisher, outbox=outbox).run_once() == 2
    assert found == [0] * 4
    # A process that ends without a word leaves nothing else behind.
    assert {path.suffix for path in folder.iterdir()} == {".msg"}
    publisher.close()
    assert {path.suffix for path in folder.iterdir()} == {".msg"}
    shadows = Counter(message.headers["shadow"] for message in sent(app))
    assert shadows == {"shop.first": 2, "shop.second": 2}
    assert list(folder.iterdir()) == []
    app.close()


@on_sqlite
def test_each_event_is_one_task_for_each_receiver(shop, app, publisher, relay, calls):
    """With an id that is the same each time, and the CloudEvent as its only argument."""
    place(shop, "a")
    (row,) = events(shop)
    assert relay.run_once() == 1
    assert events(shop) == []
    messages = sent(app)
    assert [m.headers["shadow"] for m in messages] == ["shop.first", "shop.second"]
    assert [m.headers["id"] for m in messages] == [
        str(uuid5(row.id, name)) for name in ("shop.first", "shop.second")
    ]
    (text,), kwargs, _ = messages[0].payload
    assert kwargs == {}
    event = json.loads(text)
    assert (event["specversion"], event["id"]) == ("1.0", str(row.id))
    assert event["data"]["snapshot"]["status"] == "a"
    assert "4111" not in str(messages[0].headers)
    assert messages[0].content_type == "application/json"
    assert [run(publisher, message).state for message in messages] == ["SUCCESS"] * 2
    assert ledger(shop) == ["first a", "second a"]
    assert calls == [("first a", 1), ("second a", 1)]


@on_sqlite
def test_a_second_publisher_of_the_same_name_is_refused(app, publisher, shop):
    """Its messages would be run with the sessions of the first one."""
    with pytest.raises(ReceiverOptionError, match=r"CeleryPublisher\(\.\.\., name="):
        CeleryPublisher(app, shop)
    other = CeleryPublisher(app, shop, name="sqla_signals.other")
    assert other.task.name == "sqla_signals.other"
    other.close()


@on_sqlite
def test_a_task_that_comes_again_calls_nobody(shop, app, publisher, relay, calls):
    """The inbox knows that it was done."""
    place(shop, "a")
    drain(relay)
    (message, _) = sent(app)
    assert run(publisher, message).state == run(publisher, message).state == "SUCCESS"
    assert calls == [("first a", 1)]
    assert ledger(shop) == ["first a"]


@on_sqlite
def test_a_receiver_that_fails_is_sent_again_for_later(shop, app, publisher, relay, calls):
    """With the same id and a pause that grows; nothing that it wrote remains."""
    place(shop, "bad")
    drain(relay)
    first, _ = sent(app)
    pauses = []
    message = first
    for attempt in (1, 2):
        assert run(publisher, message).state == "RETRY"
        (message,) = sent(app)
        assert message.headers["id"] == first.headers["id"]
        assert message.headers["retries"] == attempt
        assert message.payload[0] == first.payload[0]
        eta = datetime.fromisoformat(message.headers["eta"])
        pauses.append((eta - datetime.now(UTC)).total_seconds())
    assert 0 < pauses[0] <= 75 < pauses[1] <= 150
    assert ledger(shop) == []
    assert calls == [("first bad", 1), ("first bad", 2)]


@on_sqlite
def test_a_receiver_that_exits_has_failed_and_the_worker_goes_on(
    shop, app, publisher, relay, caplog
):
    """Else it would end a process of the pool each time, without end."""

    @receiver(post_save, sender=Order, durable=True, name="shop.exits")
    def exits(sender, session, **kwargs):
        session.add(Ledger(entry="undone"))
        session.flush()
        sys.exit(3)

    place(shop, "a")
    drain(relay)
    assert work(app, publisher) == ["RETRY", "RETRY", "FAILURE"]
    assert ledger(shop) == []
    (row,) = dead(shop)
    assert row.last_error.startswith("shop.exits: SignalsError: a receiver ended with SystemExit")
    assert "Raised by receiver shop.exits (" in row.last_error
    assert "test_celery.py" in row.last_error
    logged = [one for one in caplog.records if one.name == "sqla_signals" and one.exc_info]
    assert ["ended with SystemExit(3)" in one.getMessage() for one in logged] == [True] * 3


@on_sqlite
def test_a_worker_that_is_told_to_end_ends(shop, app, publisher, relay, monkeypatch):
    """Also in the middle of a receiver; the task is not done, and not gone."""
    monkeypatch.setattr(billiard.common, "_should_have_exited", [False])
    monkeypatch.setattr(billiard.common, "maybe_setsignal", lambda number, handler: None)

    @receiver(post_save, sender=Order, durable=True, name="shop.interrupted")
    def interrupted(sender, **kwargs):
        billiard.common._shutdown_cleanup(signal.SIGTERM, None)

    place(shop, "a")
    drain(relay)
    (message,) = sent(app)
    with pytest.raises(SystemExit):
        run(publisher, message)
    assert sent(app) == []
    assert dead(shop) == []


def test_what_fails_too_often_is_a_dead_letter_for_its_receivers(
    shop, app, publisher, relay, calls
):
    """And retry puts each back, for the receiver that has not done it."""
    place(shop, "bad", "half", "good")
    drain(relay)
    states = work(app, publisher)
    assert (states.count("SUCCESS"), states.count("RETRY"), states.count("FAILURE")) == (3, 6, 3)
    assert sorted(ledger(shop)) == ["first good", "first half", "second good"]
    letters = sorted(dead(shop), key=lambda row: (row.aggregate_id, row.receivers))
    assert [row.last_error for row in letters] == [
        "shop.first: ValueError: no such order",
        "shop.second: ValueError: not this one",
        "shop.second: ValueError: not this one",
    ]
    assert (letters[2].receivers, letters[2].attempts) == (["shop.second"], 3)
    assert letters[2].payload["snapshot"]["status"] == "half"

    with shop.begin() as connection:
        assert upkeep.retry(connection, outbox) == 3
    assert dead(shop) == []
    assert [len(row.receivers) for row in events(shop)] == [1, 1, 1]
    calls.clear()
    drain(relay)
    for message in sent(app):
        run(publisher, message)
    assert calls == [("first bad", 1), ("second bad", 1), ("second half", 1)]


def test_a_dead_letter_that_is_put_back_is_a_new_event_of_the_outbox(
    shop, app, publisher, relay, calls
):
    """With the identity of its event: it may still be there for another receiver."""
    publisher.max_attempts = 1
    place(shop, "half")
    with shop.connect() as connection:
        row = connection.execute(select(outbox.table)).one()._mapping
    drain(relay)
    work(app, publisher)
    with shop.begin() as connection:
        connection.execute(outbox.table.insert(), {**row, "receivers": ["shop.first"]})
        assert upkeep.retry(connection, outbox) == 1
    first, second = events(shop)
    assert (first.receivers, second.receivers) == (["shop.first"], ["shop.second"])
    assert first.id == second.id
    assert first.sequence < second.sequence


def test_a_message_that_comes_again_after_it_was_given_up_is_one_dead_letter(
    shop, app, publisher, relay, calls
):
    """A broker may bring it twice."""
    publisher.max_attempts = 1
    place(shop, "half")
    drain(relay)
    _, message = sent(app)
    for _ in range(2):
        assert run(publisher, message).state == "FAILURE"
    assert len(dead(shop)) == 1


@on_sqlite
def test_several_events_travel_as_one_task_where_asked_for(shop, app, calls):
    """They run one after the other; what fails is sent again by itself."""
    publisher = CeleryPublisher(
        app, shop, max_attempts=2, events_per_message=4, name="shop.several"
    )
    relay = Relay(shop, publisher, outbox=outbox)
    place(shop, "a", "half", "b")
    relay.run_once()
    messages = sent(app)
    assert [len(message.payload[0]) for message in messages] == [4, 2]
    assert [run(publisher, message).state for message in messages] == ["SUCCESS"] * 2
    assert ledger(shop) == ["first a", "second a", "first half", "first b", "second b"]
    (again,) = sent(app)
    assert (again.headers["shadow"], again.headers["retries"]) == ("shop.second", 1)
    assert run(publisher, again).state == "FAILURE"
    assert [row.receivers for row in dead(shop)] == [["shop.second"]]
    publisher.close()


@on_sqlite
def test_what_has_not_begun_at_the_soft_time_limit_is_sent_again_by_itself(shop, app):
    """The limit comes once for each task: what hangs next would be killed, and not count."""
    calls = []

    @receiver(post_save, sender=Order, durable=True, name="shop.slow")
    def slow(sender, instance, session, event, **kwargs):
        calls.append((instance.status, event.attempt))
        session.add(Ledger(entry=instance.status))
        session.flush()
        if instance.status == "hangs":
            raise SoftTimeLimitExceeded

    publisher = CeleryPublisher(
        app, shop, max_attempts=2, events_per_message=9, name="shop.several"
    )
    place(shop, "a", "hangs", "b", "hangs")
    Relay(shop, publisher, outbox=outbox).run_once()
    (message,) = sent(app)
    assert run(publisher, message).state == "SUCCESS"
    assert calls == [("a", 1), ("hangs", 1)]
    again = sent(app)
    assert [one.headers["retries"] for one in again] == [0, 0, 1]
    assert [one.headers["eta"] is None for one in again] == [True, True, False]
    assert [run(publisher, one).state for one in again] == ["SUCCESS", "RETRY", "FAILURE"]
    assert work(app, publisher) == ["FAILURE"]
    assert calls[2:] == [("b", 1), ("hangs", 1), ("hangs", 2), ("hangs", 2)]
    assert ledger(shop) == ["a", "b"]
    assert [row.attempts for row in dead(shop)] == [2, 2]
    publisher.close()


@on_sqlite
def test_a_task_of_several_events_has_the_same_id_each_time(shop, app, calls):
    """The relay may die after sending it, and send it again."""
    publisher = CeleryPublisher(app, shop, events_per_message=10, name="shop.several")
    relay = Relay(shop, publisher, outbox=outbox)
    place(shop, "a", "b")
    with shop.connect() as connection:
        rows = [dict(row._mapping) for row in connection.execute(select(outbox.table))]
    relay.run_once()
    with shop.begin() as connection:
        connection.execute(outbox.table.insert(), rows)
    relay.run_once()
    first, second = sent(app)
    assert first.headers["id"] == second.headers["id"]
    for message in (first, second):
        assert run(publisher, message).state == "SUCCESS"
    assert len(calls) == len(ledger(shop)) == 4
    publisher.close()


@on_sqlite
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"receiver": "os.system"}, "UnknownReceiverError"),
        ({"type": "os.path.created"}, "UnknownModelError"),
        ({"schema": 99}, "UnknownSchemaError"),
    ],
    ids=["receiver", "model", "schema"],
)
def test_what_this_process_does_not_know_is_refused(
    shop, app, publisher, relay, calls, change, error
):
    """Another worker may know it, so it is tried again; in the end it is a dead letter."""
    place(shop, "a")
    drain(relay)
    message, _ = sent(app)
    event = json.loads(message.payload[0][0])
    event["data"]["schema"] = change.pop("schema", 1)
    task = publisher.task.apply([json.dumps({**event, **change})], retries=2)
    assert type(task.result).__name__ == error
    assert calls == ledger(shop) == []
    (letter,) = dead(shop)
    assert error in letter.last_error
    with shop.begin() as connection:
        assert upkeep.purge(connection, outbox) == 1


@on_sqlite
def test_what_is_no_message_is_not_run(app, publisher, shop, calls, caplog):
    """Alone it is a failed task; it is logged, and kept as a dead letter for nobody."""
    assert publisher.task.apply(["{}"]).state == "FAILURE"
    caplog.clear()
    with caplog.at_level(logging.ERROR, "sqla_signals"):
        assert publisher.task.apply([{"a": 1}, "rm -rf\n\ud800\0"]).state == "SUCCESS"
    said = [record.getMessage() for record in caplog.records if record.name == "sqla_signals"]
    assert len(said) == 2
    assert all("(no message)" in line and "was given up" in line for line in said)
    assert calls == sent(app) == []
    assert [row.payload["text"] for row in dead(shop)] == ["{}", "{'a': 1}", "rm -rf\n\ud800\0"]
    assert [row.receivers for row in dead(shop)] == [[], [], []]


@on_sqlite
def test_a_message_that_is_too_large_stays_in_the_outbox(shop, app, calls):
    """With the reason, and what to do; the others are sent."""
    publisher = CeleryPublisher(app, shop, max_bytes=1000, name="shop.small")
    relay = Relay(shop, publisher, outbox=outbox, max_attempts=2)
    place(shop, "a", "x" * 1000)
    relay.run_once()
    assert len(sent(app)) == 2
    (row,) = events(shop)
    assert row.attempts == 1
    assert "max_bytes is 1,000" in row.last_error
    make_due(shop)
    relay.run_once()
    assert events(shop) == []
    assert len(dead(shop)) == 1
    publisher.close()


@on_sqlite
def test_while_the_broker_is_down_events_wait(shop, calls):
    """And no attempt counts."""
    app = Celery("shop", broker="redis://127.0.0.1:1/0")
    app.conf.broker_transport_options = {"visibility_timeout": 60}
    publisher = CeleryPublisher(app, shop)
    relay = Relay(shop, publisher, outbox=outbox)
    place(shop, "a")
    with pytest.raises(Exception, match="refused"):
        relay.run_once()
    (row,) = events(shop)
    assert (row.attempts, row.last_error) == (0, None)
    app.close()


@on_sqlite
def test_a_dead_letter_that_cannot_be_written_is_not_lost(
    shop, app, publisher, relay, calls, caplog
):
    """The task is sent again until it can be."""
    place(shop, "half")
    drain(relay)
    _, message = sent(app)
    message.headers["retries"] = 2
    outbox.dead_letters.drop(shop)
    assert run(publisher, message).state == "RETRY"
    assert "could not be made a dead letter" in caplog.text
    outbox.dead_letters.create(shop)
    assert work(app, publisher) == ["FAILURE"]
    assert len(dead(shop)) == 1


@on_sqlite
def test_async_receivers_run_on_a_loop_of_the_workers_own(shop, url, app):
    """With an async_sessionmaker, beside plain ones."""
    engine = create_async_engine(url.replace("sqlite://", "sqlite+aiosqlite://"))
    publisher = CeleryPublisher(app, async_sessionmaker(engine), name="shop.async")
    found = []

    @receiver(post_save, sender=Order, durable=True, name="shop.awaited")
    async def awaited(sender, instance, session, **kwargs):
        await session.execute(select(Order))
        session.add(Ledger(entry=f"awaited {instance.status}"))

    @receiver(post_delete, sender=Order, durable=True, name="shop.plain")
    def plain(sender, instance, session, **kwargs):
        found.append(instance.status)

    place(shop, "a")
    with Session(shop) as session:
        session.delete(session.scalars(select(Order)).one())
        session.commit()
    Relay(shop, publisher, outbox=outbox).run_once()
    assert work(app, publisher) == ["SUCCESS", "SUCCESS"]
    assert (ledger(shop), found) == (["awaited a"], ["a"])
    publisher.worker.sessions.run(lambda: engine.sync_engine.dispose())
    publisher.close()


def settings(**conf: Any) -> Celery:
    """An app with these settings."""
    app = Celery("shop")
    app.conf.update(conf)
    return app


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ({"broker_url": "redis://h"}, ["visibility_timeout"]),
        (
            {
                "broker_url": "redis://h",
                "broker_transport_options": {"visibility_timeout": 60},
                "task_time_limit": 90,
                "task_soft_time_limit": 80,
            },
            ["more than task_time_limit (90)"],
        ),
        (
            {
                "broker_url": "amqp://h",
                "task_default_delivery_mode": 1,
                "task_time_limit": 90,
                "accept_content": ["pickle"],
                "task_annotations": {"*": {"acks_late": False}},
            },
            [
                "task_default_delivery_mode: 2",
                "task_soft_time_limit",
                "accept_content",
                "acks_late",
            ],
        ),
        ({"broker_url": "filesystem://"}, ["data_folder_in", "data_folder_out"]),
        (
            {
                "broker_url": "filesystem://",
                "broker_transport_options": {
                    "data_folder_in": "/does/not/exist",
                    "data_folder_out": "/does/not/exist",
                },
            },
            ["/does/not/exist"],
        ),
    ],
    ids=["redis", "redis-limit", "amqp", "filesystem", "folder"],
)
def test_settings_that_could_lose_events_are_refused_in_one_message(conf, said):
    """With what to set; when the publisher is made, so before the first event."""
    with pytest.raises(InstallError) as caught:
        CeleryPublisher(settings(**conf))
    assert all(part in str(caught.value) for part in said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"queue_arguments": {"x-max-length": 9}}, "'x-overflow': 'reject-publish'"),
        ({"max_length": 9}, "'x-overflow': 'reject-publish'"),
        ({"message_ttl": 9}, "no message_ttl"),
        ({"durable": False}, "durable=True"),
    ],
    ids=["arguments", "max_length", "ttl", "transient"],
)
def test_a_rabbitmq_queue_that_drops_messages_is_refused(arguments, said):
    """As far as it is declared in the app."""
    from kombu import Queue

    app = settings(broker_url="amqp://h", task_queues=[Queue("orders", **arguments)])
    with pytest.raises(InstallError, match="orders") as caught:
        CeleryPublisher(app)
    assert said in str(caught.value)


def test_good_settings_are_accepted():
    """RabbitMQ needs none, Redis one."""
    CeleryPublisher(settings(broker_url="amqp://h"))
    options = {"visibility_timeout": 60}
    CeleryPublisher(settings(broker_url="redis://h", broker_transport_options=options))
    CeleryPublisher(settings(broker_url="amqp://h", task_time_limit=9, task_soft_time_limit=5))


@on_sqlite
def test_a_worker_that_does_not_fork_keeps_its_connections(shop, publisher):
    """Celery's pool ``solo`` says that a process begins, which is the one that there was."""
    with shop.connect():
        pass
    pool = shop.pool
    assert pool.checkedin() == 1
    worker_process_init.send(sender="solo")
    assert shop.pool is pool
    assert pool.checkedin() == 1


@pytest.mark.parametrize("name", ["events_per_message", "max_attempts", "max_bytes", "batch_size"])
def test_a_number_that_would_deliver_nothing_is_refused(name):
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ReceiverOptionError, match=rf"CeleryPublisher\({name}=0\)"):
        CeleryPublisher(settings(broker_url="amqp://h"), **options)


@on_sqlite
def test_the_task_keeps_its_message_until_it_is_done(publisher):
    """Whatever the app's defaults are."""
    task = publisher.task
    assert (task.acks_late, task.reject_on_worker_lost, task.ignore_result) == (True, True, True)
    assert task.serializer == "json"

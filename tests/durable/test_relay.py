"""The relay: what it claims, what it forgets, and what it keeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

import pytest
from sqlalchemy import (
    Connection,
    Engine,
    String,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from sqla_signals import InstallError, ReceiverOptionError, post_save, receiver, receiver_failed
from sqla_signals.durable import BusyError, Message, Relay, outbox_table, upkeep
from sqla_signals.durable.tables.clock import database_time
from sqla_signals.durable.waiting import Polling, waiting_for

from .conftest import drain, engine_for, events, ledger, make_due
from .models import Ledger, Order, outbox


class Recording:
    """A publisher that keeps what it is given, and fails as it is told."""

    batch_size = 100

    def __init__(self) -> None:
        self.published: list[Message] = []
        self.failing: dict[str, Exception] = {}
        self.down: Exception | None = None

    def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
        if self.down is not None:
            raise self.down
        failures = {
            message: self.failing[message.receiver]
            for message in messages
            if message.receiver in self.failing
        }
        self.published += [message for message in messages if message not in failures]
        return failures


@pytest.fixture
def publisher() -> Recording:
    return Recording()


@pytest.fixture
def relay(shop: Engine, publisher: Recording) -> Relay:
    return Relay(shop, publisher, outbox=outbox, max_attempts=3)


@pytest.fixture
def connected() -> None:
    """Two durable receivers of orders."""

    @receiver(post_save, sender=Order, durable=True, name="shop.first")
    def first(sender, **kwargs): ...

    @receiver(post_save, sender=Order, durable=True, name="shop.second")
    def second(sender, **kwargs): ...


def place(engine: Engine, *statuses: str) -> None:
    with Session(engine) as session:
        session.add_all([Order(status=status) for status in statuses])
        session.commit()


def statuses(messages: Sequence[Message]) -> list[str]:
    return [f"{m.receiver} {m.data['snapshot']['status']}" for m in messages]


def test_each_event_is_published_for_each_receiver_in_order(shop, relay, publisher, connected):
    """And then forgotten."""
    place(shop, "a", "b")
    assert len(events(shop)) == 2
    assert relay.run_once() == 2
    assert statuses(publisher.published) == [
        "shop.first a",
        "shop.second a",
        "shop.first b",
        "shop.second b",
    ]
    assert [message.attempt for message in publisher.published] == [1, 1, 1, 1]
    first, second, *_ = publisher.published
    assert first.id == second.id
    assert first.key != second.key
    assert events(shop) == []
    assert relay.run_once() == 0


def test_a_failed_message_is_put_off_and_the_others_are_forgotten(
    shop, relay, publisher, connected
):
    """The next attempt is for the receiver that failed alone."""
    publisher.failing["shop.second"] = ValueError("no")
    place(shop, "a")
    assert relay.run_once() == 1
    (row,) = events(shop)
    assert (row.receivers, row.attempts) == (["shop.second"], 1)
    assert row.last_error == "shop.second: ValueError: no"
    assert row.available_at > row.occurred_at
    assert relay.run_once() == 0  # not due yet

    publisher.failing.clear()
    make_due(shop)
    assert relay.run_once() == 1
    assert statuses(publisher.published) == ["shop.first a", "shop.second a"]
    assert [message.attempt for message in publisher.published] == [1, 2]
    assert events(shop) == []


def test_what_is_put_off_and_what_is_given_up_is_in_the_log(
    shop, relay, publisher, connected, caplog
):
    """The publisher did not take it, and nobody else says so."""
    publisher.failing["shop.second"] = ValueError("too large")
    place(shop, "a")
    for _ in range(3):
        relay.run_once()
        make_due(shop)
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "too large" in r.getMessage()]
    assert [level for level, _ in said] == ["WARNING", "WARNING", "ERROR"]
    assert "shop.second: ValueError: too large" in said[0][1]
    assert "again in" in said[1][1]
    assert "given up after 3 attempts" in said[2][1]


def test_any_number_of_dead_letters_is_put_back(shop, relay, publisher, connected):
    """In statements that no database finds too long."""
    publisher.failing = dict.fromkeys(("shop.first", "shop.second"), ValueError("no"))
    relay = Relay(shop, publisher, outbox=outbox, max_attempts=1)
    place(shop, "1")
    drain(relay)
    letters = outbox.dead_letters
    with shop.begin() as connection:
        ((letter,),) = [connection.execute(select(letters)).mappings().all()]
        first = letter["sequence"]
        more = [
            {**letter, "sequence": first + one, "id": uuid4(), "aggregate_id": str(1 + one)}
            for one in range(1, 1200)
        ]
        connection.execute(insert(letters), more)
    longest = 0

    @event.listens_for(shop, "before_cursor_execute")
    def _execute(connection, cursor, statement, parameters, context, executemany) -> None:
        nonlocal longest
        if not executemany:
            longest = max(longest, len(parameters))

    with shop.begin() as connection:
        assert upkeep.retry(connection, outbox) == 1200
        assert upkeep.retry(connection, outbox) == 0
    assert longest < 1000
    assert [row.aggregate_id for row in events(shop)] == [*map(str, range(1, 1201))]


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("not \0 text"), r"ValueError: not \x00 text"),
        (FileNotFoundError("caf\udce9"), r"FileNotFoundError: caf\udce9"),
        (Speechless(), "Speechless: "),
        (ValueError("very " * 100_000), "ValueError: very very"),
    ],
    ids=["NUL", "surrogate", "speechless", "long"],
)
def test_whatever_an_error_says_the_event_is_put_off_and_given_up(
    shop, relay, publisher, connected, error, said
):
    """Also where no database takes that as text; the events beside it are forgotten."""
    place(shop, "a")
    publisher.failing["shop.second"] = error
    for _ in range(2):
        assert relay.run_once() == 1
        make_due(shop)
        (row,) = events(shop)
        assert said in row.last_error
    assert relay.run_once() == 1
    assert events(shop) == []
    with shop.connect() as connection:
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
    assert (dead.attempts, dead.receivers) == (3, ["shop.second"])
    assert said in dead.last_error


def test_the_pause_before_the_next_attempt_grows(shop, relay, publisher, connected):
    """About twice as long each time, by the clock of the database."""
    publisher.failing["shop.second"] = ValueError("no")
    place(shop, "a")
    pauses = []
    for _ in range(2):
        assert relay.run_once() == 1
        with shop.connect() as connection:
            table = outbox.table
            (pause,) = connection.execute(select(table.c.available_at, database_time())).all()
        pauses.append((pause[0] - pause[1]).total_seconds())
        make_due(shop)
    assert 0 < pauses[0] <= 75 < pauses[1] <= 150


def test_after_the_last_attempt_an_event_is_a_dead_letter(shop, relay, publisher, connected):
    """With what was to be done, and the last error."""
    publisher.failing["shop.second"] = ValueError("no")
    place(shop, "a")
    for _ in range(3):
        make_due(shop)
        assert relay.run_once() == 1
    make_due(shop)
    assert relay.run_once() == 0
    assert events(shop) == []
    with shop.connect() as connection:
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
    assert (dead.receivers, dead.attempts) == (["shop.second"], 3)
    assert dead.last_error == "shop.second: ValueError: no"
    assert dead.payload["snapshot"]["status"] == "a"


def test_what_a_publisher_is_too_busy_for_is_put_off_and_no_attempt_counts(
    shop, relay, publisher, connected
):
    """However often that happens; the others are forgotten."""
    publisher.failing["shop.second"] = BusyError("full")
    place(shop, "a")
    for _ in range(5):
        make_due(shop)
        assert relay.run_once() == 1
        (row,) = events(shop)
        assert (row.receivers, row.attempts) == (["shop.second"], 0)
        assert row.last_error == "shop.second: BusyError: full"
    publisher.failing.clear()
    make_due(shop)
    assert relay.run_once() == 1
    assert statuses(publisher.published) == ["shop.first a", "shop.second a"]
    assert events(shop) == []


def test_while_the_broker_is_down_nothing_is_lost_and_no_attempt_counts(
    shop, relay, publisher, connected
):
    """The error reaches whoever called run_once()."""
    place(shop, "a")
    publisher.down = ConnectionError("refused")
    for _ in range(5):
        with pytest.raises(ConnectionError):
            relay.run_once()
    (row,) = events(shop)
    assert row.attempts == 0
    publisher.down = None
    assert relay.run_once() == 1
    assert [message.attempt for message in publisher.published] == [1, 1]
    assert events(shop) == []


def test_two_relays_never_have_the_same_event(shop, url, publisher, connected):
    """The second takes what the first has not."""
    place(shop, *"abcd")
    other_engine = engine_for(url)
    other = Recording()

    class Meanwhile(Recording):
        batch_size = 2

        def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
            if not other.published:
                assert Relay(other_engine, other, batch_size=2).run_once() == 2
            return super().publish(messages)

    first = Meanwhile()
    assert drain(Relay(shop, first)) == 2
    assert sorted(statuses(first.published + other.published)) == sorted(
        f"shop.{name} {status}" for name in ("first", "second") for status in "abcd"
    )
    assert statuses(other.published)[0] == "shop.first c"
    other_engine.dispose()


def test_a_transaction_that_commits_late_is_not_passed_over(shop, relay, publisher, connected):
    """Its rows have lower numbers than what was published before."""
    if shop.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time, so nothing commits out of order")
    with Session(shop) as slow:
        slow.add(Order(status="slow"))

        # After the events were written, which was before_commit, and before the COMMIT.
        @event.listens_for(slow.connection(), "commit")
        def _commit(connection: Connection) -> None:
            place(shop, "quick")
            assert relay.run_once() == 1

        slow.commit()
    assert relay.run_once() == 1
    assert statuses(publisher.published)[::2] == ["shop.first quick", "shop.first slow"]
    assert publisher.published[2].sequence < publisher.published[0].sequence


def test_an_outbox_is_needed(installed):
    """And a database that a relay works on."""
    engine = create_engine("sqlite://")
    engine.dialect.name = "oracle"
    with pytest.raises(InstallError, match="not on oracle"):
        Relay(engine, outbox=outbox)
    with pytest.raises(InstallError, match="makes no sessions"):
        Relay(7)
    with pytest.raises(InstallError, match="makes no Session and no AsyncSession"):
        Relay(lambda: scoped_session(sessionmaker(engine)), outbox=outbox)
    with pytest.raises(InstallError, match="get its sessions from"):
        Relay()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_attempts": 0}])
def test_a_number_that_would_deliver_nothing_is_refused(shop, options):
    with pytest.raises(ReceiverOptionError, match=f"{next(iter(options))}=0"):
        Relay(shop, outbox=outbox, **options)


def test_a_failing_receiver_is_logged_announced_and_tried_again(shop, caplog):
    """Nothing of its work in the session remains; the other receiver is not called again."""
    calls: list[str] = []
    failures: list[Exception] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.fragile")
    def fragile(sender, instance, session, event, **kwargs):
        calls.append(f"fragile {event.attempt}")
        session.add(Ledger(entry="fragile"))
        session.flush()
        if event.attempt == 1:
            raise ValueError("not yet")

    @receiver(post_save, sender=Order, durable=True, name="shop.steady")
    def steady(sender, session, **kwargs):
        calls.append("steady")
        session.add(Ledger(entry="steady"))

    receiver_failed.connect(lambda sender, exception, **kw: failures.append(exception), weak=False)
    place(shop, "a")
    relay = Relay(shop)
    assert drain(relay) == 1
    assert ledger(shop) == ["steady"]
    assert [str(failure) for failure in failures] == ["not yet"]
    assert "shop.fragile" in caplog.text
    make_due(shop)
    assert drain(relay) == 1
    assert calls == ["fragile 1", "steady", "fragile 2"]
    assert ledger(shop) == ["steady", "fragile"]


def test_a_relay_runs_in_a_thread_until_it_is_stopped(shop):
    """What is committed meanwhile is delivered."""
    delivered = threading.Event()

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, **kwargs):
        session.add(Ledger(entry="done"))
        delivered.set()

    with Relay(shop):
        place(shop, "a")
        assert delivered.wait(30)
    assert ledger(shop) == ["done"]
    assert events(shop) == []


def test_a_relay_that_a_receiver_has_stopped_can_be_started_before_it_has_ended(shop):
    """Its thread is still there then, and on its way out."""
    stopped, go_on, delivered = threading.Event(), threading.Event(), threading.Event()

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, **kwargs):
        session.add(Ledger(entry=instance.status))
        if instance.status == "last":
            relay.stop()
            stopped.set()
            assert go_on.wait(30)
        else:
            delivered.set()

    relay = Relay(shop)
    place(shop, "last")
    relay.start()
    assert stopped.wait(30)
    starting = threading.Thread(target=relay.start)
    starting.start()
    go_on.set()
    starting.join(30)
    place(shop, "next")
    assert delivered.wait(30)
    relay.stop()
    assert ledger(shop) == ["last", "next"]
    assert events(shop) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_relay_in_a_thread_that_a_receiver_has_ended_says_so_and_can_be_started(shop, caplog):
    """Nobody sees a SystemExit that ends a thread."""
    endings = [SystemExit("no")]

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, session, **kwargs):
        if endings:
            raise endings.pop()
        session.add(Ledger(entry="done"))

    place(shop, "a")
    relay = Relay(shop)
    relay.start()
    assert relay._thread is not None
    relay._thread.join(30)
    assert "nothing more is delivered" in caplog.text
    with relay:
        while events(shop):
            relay._stopping.wait(0.01)
    assert ledger(shop) == ["done"]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_lease_that_has_run_out_is_taken_over(shop, publisher, connected):
    """SQLite: the relay died while it was publishing several events; each has begun once."""
    place(shop, "a", "b")
    begin(shop, 1, 2)
    assert Relay(shop, publisher).run_once() == 0
    make_due(shop)
    relay = Relay(shop, publisher)
    assert [relay.run_once() for _ in range(3)] == [1, 1, 0]
    assert [message.attempt for message in publisher.published] == [2, 2, 2, 2]


def test_what_kills_the_relay_each_time_is_a_dead_letter(shop, publisher, connected):
    """After as many attempts as any other failure."""
    place(shop, "a")
    for _ in range(3):
        begin(shop, 1)
    make_due(shop)
    relay = Relay(shop, publisher, max_attempts=3)
    assert relay.run_once() == 1
    assert publisher.published == []
    assert events(shop) == []
    with shop.connect() as connection:
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
        assert connection.execute(select(outbox.started)).all() == []
    assert "killed" in dead.last_error
    assert dead.attempts == 3


def test_what_is_done_is_no_dead_letter_though_each_relay_was_killed_after_it(shop, connected):
    """The inbox says that it is done, and for whom."""
    relay = Relay(shop, outbox=outbox, max_attempts=1)
    place(shop, "a", "b")
    with shop.begin() as connection:
        for row in events(shop):
            for name in row.receivers[: 1 + (row.sequence == 1)]:
                connection.execute(
                    outbox.inbox.insert().values(
                        event_id=row.id, receiver=name, done_at=database_time()
                    )
                )
    begin(shop, 1)
    begin(shop, 2)
    make_due(shop)
    assert drain(relay) == 2
    assert events(shop) == []
    with shop.connect() as connection:
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
    assert (dead.aggregate_id, dead.receivers) == ("2", ["shop.second"])


def begin(engine: Engine, *sequences: int) -> None:
    """Begin with these events, and die; with one that has begun before, alone."""
    claims = Relay(engine, outbox=outbox)._claims
    make_due(engine)
    with claims._connections() as (connection, notes):
        again = bool(claims._noted(connection, sequences))
        claims._claim(connection, notes, dict.fromkeys(sequences), again)


@pytest.mark.mariadb
@pytest.mark.parametrize("url", ["mariadb"], indirect=True)
def test_inserting_does_not_wait_for_the_relay(shop, connected):
    """MariaDB: no gap at the end of the table is locked while events are published."""

    class Meanwhile(Recording):
        def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
            if not self.published:
                with Session(shop) as session:
                    session.connection().exec_driver_sql("SET innodb_lock_wait_timeout = 1")
                    session.add(Order(status="b"))
                    session.commit()
            return super().publish(messages)

    place(shop, "a")
    publisher = Meanwhile()
    assert drain(Relay(shop, publisher)) == 2
    assert len(publisher.published) == 4


class Queue(DeclarativeBase):
    """Its outbox keeps the order."""


ordered = outbox_table(Queue.metadata, prefix="ordered", ordered=True)


class Ticket(Queue):
    """What events are about."""

    __tablename__ = "tickets"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(String(20))


def test_an_ordered_outbox_publishes_the_events_of_a_row_one_after_the_other(shop, publisher):
    """A later one waits for the earlier one; the events of other rows do not."""

    @receiver(post_save, sender=Ticket, durable=True, name="tickets.fn")
    def fn(sender, **kwargs): ...

    Queue.metadata.create_all(shop)
    with Session(shop) as session:
        first, second = Ticket(status="1a"), Ticket(status="2a")
        session.add_all([first, second])
        session.commit()
        first.status = "1b"
        session.commit()
    publisher.failing["tickets.fn"] = ValueError("no")
    relay = Relay(shop, publisher, outbox=ordered, batch_size=1)
    assert relay.run_once() == 1
    publisher.failing.clear()
    assert drain(relay) == 1
    assert statuses(publisher.published) == ["tickets.fn 2a"]  # 1b waits for 1a
    with shop.begin() as connection:
        connection.execute(ordered.table.update().values(available_at=ordered.table.c.occurred_at))

    other = Recording()

    class Meanwhile(Recording):
        def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
            if not self.published:
                assert Relay(shop, other, outbox=ordered).run_once() == 0
            return super().publish(messages)

    last = Meanwhile()
    assert drain(Relay(shop, last, outbox=ordered)) == 2
    assert statuses(last.published) == ["tickets.fn 1a", "tickets.fn 1b"]
    Queue.metadata.drop_all(shop)


def test_in_an_ordered_outbox_the_last_attempt_holds_up_what_is_behind_it(shop, publisher):
    """It is made alone, and a later event of its row is in no batch before."""

    @receiver(post_save, sender=Ticket, durable=True, name="tickets.fn")
    def fn(sender, **kwargs): ...

    Queue.metadata.create_all(shop)
    with Session(shop) as session:
        for status in ("1a", "2a"):
            session.add(Ticket(status=status))
            session.commit()
        session.get(Ticket, 2).status = "2b"
        session.commit()
    table = ordered.table
    with shop.begin() as connection:
        first = (table.c.aggregate_id == "2") & (table.c.event_type == "created")
        connection.execute(update(table).where(first).values(attempts=1))
    relay = Relay(shop, publisher, outbox=ordered, max_attempts=2)
    found = []
    for _ in range(3):
        relay.run_once()
        found.append(statuses(publisher.published))
        publisher.published.clear()
    assert found == [["tickets.fn 1a"], ["tickets.fn 2a"], ["tickets.fn 2b"]]
    Queue.metadata.drop_all(shop)


def test_notes_without_their_events_hold_up_nothing(shop, publisher, connected):
    """Somebody may have deleted these."""
    place(shop, "a")
    begin(shop, 1)
    with shop.begin() as connection:
        rows = [{"sequence": number, "attempts": 0} for number in range(1000, 2000)]
        connection.execute(outbox.started.insert(), rows)
    make_due(shop)
    assert drain(Relay(shop, publisher)) == 1
    assert events(shop) == []


@pytest.mark.parametrize(
    "url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_a_batch_costs_the_same_however_many_events_of_one_row_there_are(shop, publisher):
    """PostgreSQL compares them with no other, and does not sort them all to find the first."""
    receiver(post_save, sender=Ticket, durable=True, name="tickets.fn")(lambda sender, **_: None)
    Queue.metadata.create_all(shop)
    with Session(shop) as session:
        session.add(Ticket(status="a"))
        session.commit()
    with shop.begin() as connection:
        (row,) = connection.execute(select(ordered.table)).mappings()
        more = [{**row, "sequence": number, "id": uuid4()} for number in range(2, 3000)]
        connection.execute(ordered.table.insert(), more)
    plans: list[str] = []

    @event.listens_for(shop, "before_cursor_execute")
    def _execute(connection, cursor, statement, parameters, context, executemany) -> None:
        if statement.startswith("SELECT ordered_outbox"):
            cursor.execute(f"EXPLAIN {statement}", parameters)
            plans.append("\n".join(line for (line,) in cursor.fetchall()))

    relay = Relay(shop, publisher, outbox=ordered, batch_size=10)
    assert relay.run_once() == 10
    # Nobody has made statistics of the table yet.
    assert len(plans) > 1
    assert [plan for plan in plans if "Seq Scan" in plan] == []
    plans.clear()
    # The first one waits, and all others for it: these are looked at once, to find other rows.
    with shop.begin() as connection:
        later = database_time(3600)
        first = connection.scalar(select(func.min(ordered.table.c.sequence)))
        table = ordered.table
        connection.execute(
            update(table).where(table.c.sequence == first).values(available_at=later)
        )
    assert relay.run_once() == 0
    assert "Aggregate" in plans[-1]
    Queue.metadata.drop_all(shop)


class Loud(DeclarativeBase):
    """Its outbox notifies."""


loud = outbox_table(Loud.metadata, prefix="loud", notify=True)


class Alarm(Loud):
    """What events are about."""

    __tablename__ = "alarms"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize(
    "url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_an_outbox_that_notifies_wakes_the_relay(shop):
    """PostgreSQL: what is waited for comes long before the time is over."""

    @receiver(post_save, sender=Alarm, durable=True, name="alarms.fn")
    def fn(sender, **kwargs): ...

    Loud.metadata.create_all(shop)
    waiting = waiting_for(loud, shop, threading.Event())
    waiting.wait(0)  # from now on it listens
    with Session(shop) as session:
        session.add(Alarm())
        session.commit()
    begun = time.monotonic()
    waiting.wait(250)
    assert time.monotonic() - begun < 200
    waiting.end()
    assert events(shop) == []
    assert Relay(shop, Recording(), outbox=loud).run_once() == 1


@pytest.mark.parametrize(
    "url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_a_relay_that_cannot_listen_says_so_once_and_polls(shop, caplog):
    """PostgreSQL: with asynchronous sessions, or where listening fails."""
    asynchronous = create_async_engine(shop.url)
    assert type(waiting_for(loud, asynchronous.sync_engine, threading.Event())) is Polling
    assert "psycopg and plain sessions only; polling" in caplog.text
    caplog.clear()

    waiting = waiting_for(loud, shop, threading.Event())
    waiting._channel = ""  # type: ignore[attr-defined]
    for _ in range(2):
        waiting.wait(0)
    assert caplog.text.count("listening on") == 1
    waiting._channel = "channel"  # type: ignore[attr-defined]
    waiting.wait(0)
    waiting.end()
    assert caplog.text.count("listening on") == 1


def test_a_relay_whose_outbox_is_gone_goes_on_trying(shop, connected, caplog):
    """It says so in the log, and delivers once the outbox is back."""
    outbox.table.drop(shop)
    relay = Relay(shop, outbox=outbox)
    with relay:
        while "trying again" not in caplog.text:
            relay._stopping.wait(0.01)
        outbox.table.create(shop)
        place(shop, "a")
        while events(shop):
            relay._stopping.wait(0.01)
    assert events(shop) == []


@pytest.mark.parametrize("receivers", [[], {}, None, 5], ids=repr)
def test_an_event_for_nobody_is_a_dead_letter(shop, publisher, connected, receivers):
    """Whatever its attempts are: nothing that was committed goes away without a word."""
    place(shop, "a", "b")
    table = outbox.table
    with shop.begin() as connection:
        connection.execute(update(table).values(receivers=receivers))
        connection.execute(update(table).where(table.c.sequence == 1).values(attempts=99))
    drain(Relay(shop, publisher))
    assert events(shop) == publisher.published == []
    with shop.connect() as connection:
        assert len(connection.execute(select(outbox.dead_letters.c.id)).all()) == 2

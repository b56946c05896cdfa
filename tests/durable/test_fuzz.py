"""Whatever somebody writes into a message or a row: a right call, a refusal, a dead letter."""

from __future__ import annotations

import json
import logging
import os
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Date,
    DateTime,
    Double,
    Engine,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Text,
    Time,
    Uuid,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session

from sqla_signals import post_delete, post_save, receiver
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import MessageError, Relay, Worker
from sqla_signals.durable.message.types import form_of

from .conftest import events, make_due
from .fuzz import check_call, mutated_row, mutated_text
from .models import Color, Money, MoneyType, Order, Point, PointType, Values, outbox
from .test_encoding import EVERYTHING, KEY

TIMES = int(os.environ.get("SQLA_SIGNALS_FUZZ", "1"))
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


class Calls:
    """What the receiver was called with is checked right there."""

    def __init__(self) -> None:
        self.count = 0
        self.good: list[str] = []
        self.wrong: list[AssertionError] = []


@pytest.fixture
def calls() -> Calls:
    found = Calls()

    @receiver([post_save, post_delete], sender=Values, durable=True, name="shop.fuzzed")
    def fuzzed(sender, instance, **kwargs):
        found.count += 1
        try:
            check_call(instance, kwargs)
        except AssertionError as error:
            found.wrong.append(error)

    @receiver(post_save, sender=Order, durable=True, name="shop.good")
    def good(sender, instance, **kwargs):
        found.good.append(instance.status)

    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def messages(engine: Engine) -> list[str]:
    """Three good messages of all types."""
    texts: list[str] = []

    class Keeping:
        batch_size = 100

        def publish(self, messages: Any) -> Any:
            texts.extend(message.to_json() for message in messages)
            return {}

    with Session(engine) as session:
        values = Values(id=KEY, **EVERYTHING)
        session.add(values)
        session.commit()
        values.number, values.total, values.document = 1, None, {"b": 2}
        session.commit()
        session.delete(values)
        session.commit()
    Relay(engine, Keeping(), outbox=outbox).run_once()
    return texts


@on_sqlite
def test_mutated_messages_through_a_worker(shop: Engine, calls: Calls):
    """A worker refuses a message, or calls its receiver with values of the right types."""
    good = messages(shop)
    worker = Worker(shop)
    chance = random.Random(13)
    for _ in range(1000 * TIMES):
        with shop.begin() as connection:
            connection.execute(outbox.inbox.delete())
        with suppress(MessageError):
            worker.run(mutated_text(chance.choice(good), chance))
    assert calls.wrong == []
    assert calls.count > 100 * TIMES


@on_sqlite
def test_mutated_messages_through_a_task_of_celery(shop: Engine, calls: Calls):
    """Each ends; the good one in the same task is run."""
    app = Celery("fuzz", broker="memory://")
    publisher = CeleryPublisher(app, shop, events_per_message=10, max_attempts=1)
    bad = messages(shop)
    with Session(shop) as session:
        session.add(Order(status="good"))
        session.commit()
    found: list[str] = []

    class Keeping:
        batch_size = 10

        def publish(self, messages: Any) -> Any:
            found.extend(message.to_json() for message in messages)
            return {}

    Relay(shop, Keeping(), outbox=outbox).run_once()
    chance = random.Random(14)
    for _ in range(200 * TIMES):
        with shop.begin() as connection:
            connection.execute(outbox.inbox.delete())
        calls.good.clear()
        odd = mutated_text(chance.choice(bad), chance)
        result = publisher.task.apply([odd, found[0]], retries=chance.choice((0, 5, -1)))
        assert (result.state, calls.good) == ("SUCCESS", ["good"]), odd
    assert calls.wrong == []
    publisher.close()
    app.close()


def test_mutated_rows_of_the_outbox(shop: Engine, calls: Calls):
    """On each database: what is behind them is delivered, and each is done or a dead letter."""
    count = 50 * TIMES
    chance = random.Random(15)
    with Session(shop) as session:
        session.add(Values(id=KEY, **EVERYTHING))
        session.commit()
    (row,) = events(shop)
    made = []
    with shop.begin() as connection:
        connection.execute(outbox.table.delete())
        json_type = "::json" if shop.dialect.name == "postgresql" else ""
        for _ in range(count):
            values = mutated_row(row._mapping, chance)
            documents = {n: values.pop(n) for n in ("payload", "headers", "receivers")}
            try:
                with connection.begin_nested():
                    connection.execute(
                        insert(outbox.table).values(
                            **values,
                            occurred_at=row.occurred_at,
                            available_at=row.available_at,
                            **{
                                name: text(
                                    f":{name}{json_type}".replace("::", "\\:\\:")
                                ).bindparams(**{name: document})
                                for name, document in documents.items()
                            },
                        )
                    )
                made.append(values)
            except Exception:  # the database itself refuses it
                continue
    with Session(shop) as session:
        session.add(Order(status="good"))
        session.commit()
    relay = Relay(shop, outbox=outbox, max_attempts=2)
    while relay.run_once():
        pass
    assert calls.good == ["good"]
    for _ in range(3):
        make_due(shop)
        while relay.run_once():
            pass
    assert events(shop) == []
    assert calls.wrong == []
    with shop.connect() as connection:
        dead = connection.scalar(select(func.count()).select_from(outbox.dead_letters))
        done = connection.scalar(select(func.count()).select_from(outbox.inbox))
    assert dead + done > len(made) > count // 2


@on_sqlite
@pytest.mark.parametrize(
    "body",
    [
        '"' + "x" * 4_000_000 + '"',
        "[" * 1_000_000,
        '{"a":' * 200_000,
        "9" * 4_000_000,
        "[" + '"",' * 1_000_000 + '""]',
    ],
    ids=["text", "lists", "objects", "digits", "many"],
)
def test_a_large_message_takes_a_few_times_its_size(shop: Engine, calls: Calls, body: str):
    """Whether it is run or refused."""
    good = messages(shop)[0]
    message = good.replace('"text":"\\u00fc"', f'"text":{body}')
    assert len(message) > len(body)
    worker = Worker(shop)
    tracemalloc.start()
    with suppress(MessageError):
        worker.run(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(message) + 5_000_000


# -- values ----------------------------------------------------------------------------------------

TEXTS = st.text(max_size=20)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
KINDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Integer(), INTEGERS),
    (BigInteger(), INTEGERS),
    (Boolean(), st.booleans()),
    (String(20), TEXTS),
    (Text(), TEXTS),
    (Numeric(20, 4), DECIMALS),
    (Numeric(asdecimal=False), st.floats(allow_nan=False)),
    (Float(), st.floats(allow_nan=False)),
    (Double(), st.floats(allow_nan=False)),
    (DateTime(), st.datetimes()),
    (DateTime(timezone=True), st.datetimes(timezones=st.timezones())),
    (Date(), st.dates()),
    (Time(), st.times()),
    (Interval(), st.timedeltas()),
    (Uuid(), st.uuids()),
    (Uuid(as_uuid=False), st.uuids().map(str)),
    (LargeBinary(), st.binary(max_size=20)),
    (Enum(Color), st.sampled_from(Color)),
    (Enum("a", "b", name="letters"), st.sampled_from(["a", "b"])),
    (JSON(), JSONS),
    (PointType(), st.builds(Point, INTEGERS, INTEGERS)),
    (MoneyType(), st.builds(Money, DECIMALS)),
    (ARRAY(Integer), st.lists(INTEGERS | st.none())),
    (ARRAY(Float), st.lists(st.floats(allow_nan=False) | st.none())),
    (ARRAY(DateTime), st.lists(st.datetimes())),
    (ARRAY(Enum(Color), dimensions=2), st.lists(st.lists(st.sampled_from(Color)))),
    (postgresql.JSONB(), JSONS),
    (postgresql.HSTORE(), st.dictionaries(TEXTS, TEXTS | st.none())),
    (postgresql.INET(), st.ip_addresses()),
    (postgresql.CIDR(), st.ip_addresses(v=4).map(lambda one: f"{one}/32")),
    (postgresql.INTERVAL(), st.timedeltas()),
    (postgresql.BYTEA(), st.binary(max_size=20)),
    (mysql.SET("a", "b"), st.sets(st.sampled_from(["a", "b"]), min_size=1)),
    (mysql.LONGBLOB(), st.binary(max_size=20)),
]
DIALECTS = [postgresql.psycopg.dialect(), mysql.pymysql.dialect(), sqlite.dialect()]  # type: ignore[no-untyped-call]


@settings(
    max_examples=500 * TIMES,
    deadline=None,
    derandomize=TIMES == 1,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(st.data())
def test_values_of_all_types_of_columns_come_back(data: Any):
    """Through JSON, on each kind of database."""
    kind, values = data.draw(st.sampled_from(KINDS))
    dialect = data.draw(st.sampled_from(DIALECTS))
    value = data.draw(values | st.none())
    form = form_of(kind, dialect)
    if form is None:
        assert isinstance(kind, mysql.SET)
        return
    encoded = json.loads(json.dumps(form.encode(value)))
    if value is not None and type(value) in form.plain:
        assert encoded == value
    decoded = form.decode(encoded)
    if isinstance(kind, postgresql.INET | postgresql.CIDR):
        assert str(decoded) == str(value)
    elif isinstance(value, datetime):  # an hour that comes twice a year does not equal itself
        assert decoded.replace(tzinfo=None) == value.replace(tzinfo=None, fold=0)
        assert decoded.utcoffset() == value.utcoffset()
    else:
        assert decoded == value
    assert type(decoded) is type(value) or isinstance(kind, postgresql.CIDR)

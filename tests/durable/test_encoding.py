"""What a message holds, and that a receiver gets back what was written."""

from __future__ import annotations

import base64
import enum
import json
import pickle
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import (
    ARRAY,
    DateTime,
    Engine,
    Enum,
    Integer,
    Numeric,
    PickleType,
    String,
    TypeDecorator,
    Uuid,
    create_engine,
    inspect,
)
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column

from sqla_signals import UNSET, Change, ReceiverOptionError, post_delete, post_save, receiver
from sqla_signals.durable import (
    SECRET,
    MalformedMessageError,
    Message,
    Relay,
    UnknownReceiverError,
    Worker,
    outbox_table,
)

from .conftest import drain, events
from .models import Color, Money, Order, Point, Seat, Values, outbox

EVERYTHING: dict[str, Any] = {
    "number": 10**9,
    "real": 1.5,
    "yes": True,
    "total": Decimal("12.5000"),
    "at": datetime(2024, 2, 29, 12, 30, 15, 123000),
    "day": date(2024, 2, 29),
    "hour": time(23, 59, 59),
    "span": timedelta(days=2, seconds=5),
    "blob": b"\x00\xff",
    "color": Color.BLUE,
    "point": Point(3, 4),
    "text": "ü",
    "price": Money(Decimal("9.5000")),
    "ratio": Money(Decimal("0.25")),
    "document": {"a": [1, None, {"decimal": "x"}], "ü": 1.25},
}
KEY = UUID("00000000-0000-4000-8000-00000000002a")


def collect(sender: type) -> list[dict[str, Any]]:
    """Connect a durable receiver that keeps what it reads without any SQL."""
    found: list[dict[str, Any]] = []

    @receiver([post_save, post_delete], sender=sender, durable=True, name="shop.collect")
    def keep(sender, instance, **kwargs):
        held = {k: v for k, v in vars(instance).items() if not k.startswith("_")}
        found.append({**kwargs, "held": held, "key": inspect(instance).identity})

    return found


def test_every_type_of_value_arrives_as_it_was(session: Session, relay: Relay):
    """In the instance and in the changes; JSON's own types and all others."""
    found = collect(Values)
    session.add(Values(id=KEY, **EVERYTHING))
    session.commit()
    drain(relay)
    (call,) = found
    assert call["held"] == {"id": KEY, **EVERYTHING}
    assert {key: type(value) for key, value in call["held"].items() if key != "document"} == {
        "id": UUID,
        **{key: type(value) for key, value in EVERYTHING.items() if key != "document"},
    }
    assert call["changes"] == {
        key: Change(UNSET, value) for key, value in {"id": KEY, **EVERYTHING}.items()
    }
    assert isinstance(call["held"]["document"], MutableDict)
    assert call["key"] == (KEY,)
    assert call["created"] is True
    assert call["update_fields"] is None


def test_changes_arrive_with_old_and_new(session: Session, relay: Relay):
    """As what the column gives back: a number that was assigned as an ``int``, too."""
    found = collect(Values)
    values = Values(id=KEY, **EVERYTHING)
    session.add(values)
    session.commit()
    drain(relay)
    session.refresh(values)
    values.total = 7  # type: ignore[assignment]
    values.color = None
    values.point = Point(5, 6)
    session.commit()
    drain(relay)
    assert found[1]["changes"] == {
        "total": Change(Decimal("12.5000"), Decimal(7)),
        "color": Change(Color.BLUE, None),
        "point": Change(Point(3, 4), Point(5, 6)),
    }
    assert type(found[1]["changes"]["total"].new) is Decimal
    assert found[1]["update_fields"] == {"total", "color", "point"}
    assert found[1]["created"] is False


def test_a_deleted_row_arrives_detached_and_readable(session: Session, relay: Relay):
    """With the values that were committed before."""
    found = collect(Seat)
    seat = Seat(row="A", number=7, taken_by="Ann")
    session.add(seat)
    session.commit()
    session.delete(seat)
    session.commit()
    drain(relay)
    assert [call["signal"] for call in found] == [post_save, post_delete]
    assert found[1]["held"] == {"row": "A", "number": 7, "taken_by": "Ann"}
    assert found[1]["key"] == ("A", 7)
    assert found[1]["origin"] is None


def test_the_row_in_the_outbox_is_plain_json(session: Session, relay: Relay):
    """Anybody can read it: the values, as the types of their columns write them."""
    collect(Values)
    session.add(Values(id=KEY, **EVERYTHING))
    session.commit()
    (row,) = events(relay.engine)
    assert (row.aggregate_type, row.aggregate_id) == (f"{Values.__module__}.Values", str(KEY))
    assert (row.event_type, row.receivers) == ("created", ["shop.collect"])
    assert row.payload["snapshot"]["total"] == "12.5000"
    assert row.payload["snapshot"]["day"] == "2024-02-29"
    assert row.payload["snapshot"]["document"] == EVERYTHING["document"]
    assert row.payload["snapshot"]["blob"] == "AP8="
    assert row.payload["snapshot"]["span"] == 172_805_000_000
    assert row.payload["snapshot"]["color"] == "BLUE"
    assert row.payload["snapshot"]["point"] == "3,4"
    assert "changes" not in row.payload  # as in the snapshot
    assert row.payload["schema"] == 1


MESSAGE = Message(
    id=KEY,
    sequence=42,
    occurred_at=datetime(2024, 2, 29, tzinfo=UTC),
    source="/shop",
    model="shop.models.Order",
    subject="7",
    kind="created",
    data={"schema": 1},
    receiver="shop.fn",
    headers={"traceparent": "00-0af7-b7ad-01"},
)


def test_a_message_is_a_cloudevent():
    """With the attributes that the specification requires."""
    message = MESSAGE
    assert json.loads(message.to_json()) == {
        "specversion": "1.0",
        "id": str(KEY),
        "source": "/shop",
        "type": "shop.models.Order.created",
        "subject": "7",
        "time": "2024-02-29T00:00:00+00:00",
        "datacontenttype": "application/json",
        "sequence": "42",
        "receiver": "shop.fn",
        "attempt": 1,
        "traceparent": "00-0af7-b7ad-01",
        "data": {"schema": 1},
    }
    again = Message.from_json(message.to_json())
    assert again.to_json() == message.to_json()
    assert again.key == message.key


def test_an_empty_primary_key_is_no_subject():
    """The specification wants a subject that is not empty, or none."""
    message = replace(MESSAGE, subject="")
    assert "subject" not in json.loads(message.to_json())
    assert Message.from_json(message.to_json()).subject == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"specversion": "2.0"}', "nonsense", b"\xff"])
def test_what_is_no_message_is_refused(text: Any):
    """With an error that says so."""
    with pytest.raises(MalformedMessageError, match="not a message of sqla_signals"):
        Message.from_json(text)


def test_a_secret_column_is_in_no_message(session: Session, relay: Relay):
    """Only that it changed is; the receiver loads the value from the database."""
    found: list[Any] = []

    @receiver(post_save, sender=Order, durable=True, name="shop.cards", fields={"card"})
    def card_changed(sender, instance, changes, created, **kwargs):
        found.append((created, changes["card"], instance.card))

    order = Order(status="new", card="4111")
    session.add(order)
    session.commit()
    assert order.card == "4111"
    order.card = "4222"
    session.commit()
    order.status = "sent"  # not for this receiver
    session.commit()
    assert len(events(relay.engine)) == 2
    assert "4111" not in str(events(relay.engine))
    assert "4222" not in str(events(relay.engine))
    drain(relay)
    unknown = Change(UNSET, UNSET)
    assert found == [(True, unknown, "4222"), (False, unknown, "4222")]


class Status(enum.StrEnum):
    OPEN = "open"


class Level(enum.IntEnum):
    HIGH = 3


class Frozen(datetime):
    """Such as freezegun and pendulum have."""


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ({"text": Status.OPEN}, "open"),
        ({"number": Level.HIGH}, 3),
        ({"at": Frozen(2024, 2, 29, 12)}, datetime(2024, 2, 29, 12)),
        ({"blob": bytearray(b"\x00\xff")}, b"\x00\xff"),
        ({"document": {"a": (1, 2), "of": Status.OPEN}}, {"a": [1, 2], "of": "open"}),
        ({"document": {"at": {1: 2}}}, {"at": {"1": 2}}),
        ({"document": {"at": 1e300}}, {"at": 1e300}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_the_database_takes_for_a_simpler_value_arrives_as_that(
    session: Session, relay: Relay, values: dict[str, Any], stored: Any
):
    """A ``str`` that is an enum too, and the like: as if it was loaded."""
    found = collect(Values)
    session.add(Values(id=KEY, **values))
    session.commit()
    drain(relay)
    (name,) = values
    (call,) = found
    assert (type(call["held"][name]), call["held"][name]) == (
        MutableDict if name == "document" else type(stored),
        stored,
    )
    assert repr(call["changes"][name]) == repr(Change(UNSET, stored))
    assert getattr(session.get(Values, KEY), name) == stored


def test_a_buffer_that_can_be_overwritten_arrives_as_its_bytes(session: Session, relay: Relay):
    """In the changes and in the instance."""
    found = collect(Values)
    session.add(Values(id=KEY, blob=memoryview(b"\x00\xff")))
    session.commit()
    drain(relay)
    assert found[0]["held"]["blob"] == b"\x00\xff"
    assert found[0]["changes"]["blob"] == Change(UNSET, b"\x00\xff")


def test_numbers_of_a_custom_type_arrive_to_the_last_digit(session: Session, relay: Relay):
    """``Decimal`` and ``float`` behind a ``TypeDecorator``, and floats beyond the integers."""
    found = collect(Values)
    price = Money(Decimal("12345678901234567.8901"))
    session.add(Values(id=KEY, price=price, ratio=Money(Decimal("0.1")), real=1e300))
    session.commit()
    drain(relay)
    held = found[0]["held"]
    assert (held["price"], held["ratio"]) == (price, Money(Decimal("0.1")))
    assert (held["real"], type(held["real"])) == (1e300, float)


def test_what_only_the_engine_can_write_arrives_as_it_is_stored(shop: Engine):
    """Its own functions for JSON are asked, both ways."""
    found = collect(Values)
    engine = create_engine(
        shop.url,
        json_serializer=partial(json.dumps, default=str),
        json_deserializer=partial(json.loads, parse_float=Decimal),
    )
    with Session(engine) as session:
        session.add(Values(id=KEY, document={"at": date(2024, 2, 29), "sum": 1.5}))
        session.commit()
        stored = dict(session.get(Values, KEY).document or {})
    drain(Relay(engine, outbox=outbox))
    assert stored == found[0]["held"]["document"] == {"at": "2024-02-29", "sum": Decimal("1.5")}
    engine.dispose()


def test_a_value_that_its_type_cannot_write_is_loaded_when_it_is_read(shop: Engine):
    """SQLite takes anything; the message is without it, and says that it has changed."""
    found = collect(Values)
    with Session(shop) as session:
        session.add(Values(id=KEY, number="much"))
        if shop.dialect.name != "sqlite":
            with pytest.raises(StatementError):
                session.commit()
            return
        session.commit()
    drain(Relay(shop, outbox=outbox))
    assert "number" not in found[0]["held"]
    assert found[0]["changes"]["number"] == Change(UNSET, UNSET)


ARRAYS: dict[str, Any] = {
    "ids": [KEY, None],
    "totals": [Decimal("12345678901234567.8901"), Decimal("1.0000")],
    "moments": [datetime(2024, 2, 29, 12, tzinfo=UTC)],
    "colors": [[Color.RED, Color.BLUE], [Color.BLUE, None]],
    "numbers": (1, 2),
    "nothing": [],
}


@pytest.mark.parametrize(
    "url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_arrays_arrive_as_they_were(shop: Engine):
    """PostgreSQL: also of what JSON does not know, and of several dimensions."""

    class Arrays(DeclarativeBase): ...

    outbox = outbox_table(Arrays.metadata, prefix="arrays")

    class Lists(Arrays):
        __tablename__ = "lists"
        id: Mapped[int] = mapped_column(primary_key=True)
        ids: Mapped[list[Any]] = mapped_column(ARRAY(Uuid))
        totals: Mapped[list[Any]] = mapped_column(ARRAY(Numeric(24, 4)))
        moments: Mapped[list[Any]] = mapped_column(ARRAY(DateTime(timezone=True)))
        colors: Mapped[list[Any]] = mapped_column(
            ARRAY(Enum(Color, native_enum=False), dimensions=2)
        )
        numbers: Mapped[tuple[Any]] = mapped_column(ARRAY(Integer, as_tuple=True))
        nothing: Mapped[list[Any]] = mapped_column(ARRAY(Numeric))

    Arrays.metadata.create_all(shop)
    found = collect(Lists)
    with Session(shop) as session:
        session.add(Lists(id=1, **ARRAYS))
        session.commit()
        drain(Relay(shop, outbox=outbox))
        assert found[0]["held"] == {"id": 1, **ARRAYS}
        assert found[0]["changes"] == {
            name: Change(UNSET, value) for name, value in {"id": 1, **ARRAYS}.items()
        }
        session.get(Lists, 1).totals = [Decimal("2.0000")]
        session.commit()
    drain(Relay(shop, outbox=outbox))
    assert found[1]["changes"] == {"totals": Change(ARRAYS["totals"], [Decimal("2.0000")])}
    Arrays.metadata.drop_all(shop)


def test_a_pickled_column_is_refused_when_mappers_are_configured():
    """A message never holds a pickle; a secret one is left out."""

    class Base(DeclarativeBase): ...

    outbox_table(Base.metadata)

    class Pickled(Base):
        __tablename__ = "pickled"
        id: Mapped[int] = mapped_column(primary_key=True)
        blob: Mapped[Any] = mapped_column(PickleType)

    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError, match=r"Pickled\.blob has the type .*a pickle"):
        post_save.connect(fn, sender=Pickled, durable=True, name="shop.fn")

    class Hidden(Base):
        __tablename__ = "hidden"
        id: Mapped[int] = mapped_column(primary_key=True)
        blob: Mapped[Any] = mapped_column(PickleType, info={**SECRET})

    configure_mappers()
    post_save.connect(fn, sender=Hidden, durable=True, name="shop.fn")


class Wrapped(TypeDecorator[Any]):
    impl = PickleType
    cache_ok = True


class WrappedAgain(TypeDecorator[Any]):
    impl = Wrapped
    cache_ok = True


@pytest.mark.parametrize(
    "kind", [PickleType(), Wrapped(), WrappedAgain(), ARRAY(PickleType), ARRAY(WrappedAgain)]
)
def test_a_pickle_is_known_behind_what_decorates_it(kind: Any):
    """Behind two decorators it was written as one."""

    class Base(DeclarativeBase): ...

    outbox_table(Base.metadata)

    class Pickled(Base):
        __tablename__ = "pickled"
        id: Mapped[int] = mapped_column(primary_key=True)
        blob: Mapped[Any] = mapped_column(kind)

    configure_mappers()
    with pytest.raises(ReceiverOptionError, match=r"Pickled\.blob has the type .*a pickle"):
        post_save.connect(lambda sender, **_: None, sender=Pickled, durable=True, name="shop.fn")


unpickled: list[str] = []


class Bomb:
    """Says that it was unpickled."""

    def __reduce__(self) -> Any:
        return unpickled.append, ("boom",)


class Vault(DeclarativeBase): ...


outbox_table(Vault.metadata, prefix="vault")


class Box(Vault):
    """What is in it is secret, because it is a pickle."""

    __tablename__ = "boxes"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[Any] = mapped_column(PickleType, info=SECRET)


class Crate(Vault):
    """No durable receiver, so nobody has asked for a secret."""

    __tablename__ = "crates"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[Any] = mapped_column(PickleType)


@pytest.mark.parametrize("model", [Box, Crate])
@pytest.mark.parametrize("connected", [Box, (Box, Crate)])
@pytest.mark.parametrize("where", ["snapshot", "old", "new"])
def test_a_pickle_that_somebody_has_forged_is_not_loaded(
    shop: Engine, monkeypatch: pytest.MonkeyPatch, model: type, connected: Any, where: str
):
    """Who can write messages makes receivers run for what they are connected for, and no code."""
    seen: list[Any] = []
    # A worker that was told otherwise when it was configured.
    monkeypatch.setattr("sqla_signals.durable.outbox.check_columns", lambda *_: None)

    @receiver(post_save, sender=connected, durable=True, name="vault.fn")
    def fn(sender, instance, changes, **kwargs):
        seen.append((inspect(instance).dict.get("content"), changes.get("content")))

    Vault.metadata.create_all(shop)
    forged = base64.b64encode(pickle.dumps(Bomb())).decode()
    data: dict[str, Any] = {"schema": 1, "key": [1], "snapshot": {"id": 1}}
    if where == "snapshot":
        data["snapshot"]["content"] = forged
    else:
        data["changes"] = {"content": {where: forged}}
    message = Message(
        id=uuid4(),
        sequence=1,
        occurred_at=datetime.now(UTC),
        source="/",
        model=f"{model.__module__}.{model.__qualname__}",
        subject="1",
        kind="updated",
        data=data,
        receiver="vault.fn",
    )
    run = partial(Worker(shop).run, message)
    if model is Box:
        run()
        assert seen == [(None, None if where == "snapshot" else Change(UNSET, UNSET))]
    elif connected is Box:
        with pytest.raises(UnknownReceiverError, match=r"vault\.fn .* not connected for .*Crate"):
            run()
    else:
        with pytest.raises(MalformedMessageError, match=r"Crate\.content, which no message"):
            run()
    assert unpickled == []


def test_a_secret_primary_key_is_refused():
    """Nothing else names the row."""

    class Base(DeclarativeBase): ...

    outbox_table(Base.metadata)

    class Account(Base):
        __tablename__ = "accounts"
        iban: Mapped[str] = mapped_column(String(34), primary_key=True, info={**SECRET})

    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError, match=r"Account\.iban is secret"):
        post_save.connect(fn, sender=Account, durable=True, name="shop.fn")

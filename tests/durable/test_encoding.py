"""What a message holds, and that a receiver gets back what was written."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import PickleType, String, inspect
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column

from sqla_signals import UNSET, Change, ReceiverOptionError, post_delete, post_save, receiver
from sqla_signals.durable import (
    SECRET,
    MalformedMessageError,
    Message,
    Relay,
    UnserializableError,
    outbox_table,
)

from .conftest import drain, events
from .models import Color, Order, Point, Seat, Values

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
    """Also where the two are of different types."""
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
        "total": Change(Decimal("12.5000"), 7),
        "color": Change(Color.BLUE, None),
        "point": Change(Point(3, 4), Point(5, 6)),
    }
    assert type(found[1]["changes"]["total"].new) is int
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
    """Anybody can read it: the values, and beside them the types that JSON does not know."""
    collect(Values)
    session.add(Values(id=KEY, **EVERYTHING))
    session.commit()
    (row,) = events(relay.engine)
    assert (row.aggregate_type, row.aggregate_id) == (f"{Values.__module__}.Values", str(KEY))
    assert (row.event_type, row.receivers) == ("created", ["shop.collect"])
    assert row.payload["snapshot"]["total"] == "12.5000"
    assert row.payload["snapshot"]["day"] == "2024-02-29"
    assert row.payload["snapshot"]["document"] == EVERYTHING["document"]
    assert row.payload["types"]["total"] == "decimal"
    assert "number" not in row.payload["types"]
    assert "changes" not in row.payload  # as in the snapshot
    assert row.payload["schema"] == 1


def test_a_message_is_a_cloudevent():
    """With the attributes that the specification requires."""
    message = Message(
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


def test_what_cannot_be_written_is_refused_before_the_commit(session: Session, relay: Relay):
    """With the name of the attribute; nothing is committed."""
    collect(Values)

    session.add(Values(id=KEY, real=1.0, document={"at": {1: 2}}))
    with pytest.raises(UnserializableError, match=r"Values\.document holds"):
        session.commit()
    session.rollback()
    assert session.get(Values, KEY) is None
    assert events(relay.engine) == []


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

    with pytest.raises(ReceiverOptionError, match=r"Pickled\.blob is a pickle"):
        post_save.connect(fn, sender=Pickled, durable=True, name="shop.fn")

    class Hidden(Base):
        __tablename__ = "hidden"
        id: Mapped[int] = mapped_column(primary_key=True)
        blob: Mapped[Any] = mapped_column(PickleType, info={**SECRET})

    configure_mappers()
    post_save.connect(fn, sender=Hidden, durable=True, name="shop.fn")


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

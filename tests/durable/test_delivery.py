"""What is committed is delivered, and nothing else."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_signals import post_delete, post_save, receiver
from sqla_signals.durable import Relay

from .conftest import drain, events, ledger
from .models import Ledger, Order


@pytest.fixture
def lines(shop: Engine) -> list[str]:
    """What a durable receiver of orders is told; it writes the same into the ledger."""
    found: list[str] = []

    @receiver([post_save, post_delete], sender=Order, durable=True, name="shop.orders")
    def order_changed(sender, instance, session, signal, created=None, changes=None, **kwargs):
        what = "deleted" if signal is post_delete else "created" if created else "updated"
        line = f"{what} {instance.status}"
        if what == "updated":
            line += f" was {changes['status'].old}"
        found.append(line)
        session.add(Ledger(entry=line))

    return found


def test_a_committed_save_is_delivered(shop: Engine, session: Session, relay: Relay, lines):
    """Once, and nothing is left in the outbox."""
    session.add(Order(status="new"))
    session.commit()
    assert lines == []
    assert len(events(shop)) == 1
    assert drain(relay) == 1
    assert lines == ledger(shop) == ["created new"]
    assert events(shop) == []
    assert drain(relay) == 0


def test_what_is_rolled_back_is_not_delivered(shop: Engine, session: Session, relay: Relay, lines):
    """Neither by rollback() nor by close()."""
    session.add(Order(status="new"))
    session.flush()
    session.rollback()
    session.add(Order(status="other"))
    session.flush()
    session.close()
    assert events(shop) == []
    assert drain(relay) == 0
    assert lines == ledger(shop) == []


def test_what_a_savepoint_takes_back_is_not_delivered(
    shop: Engine, session: Session, relay: Relay, lines
):
    """The rest of the transaction is."""
    session.add(Order(status="kept"))
    session.flush()
    with session.begin_nested() as savepoint:
        session.add(Order(status="undone"))
        session.flush()
        savepoint.rollback()
    with session.begin_nested():
        session.add(Order(status="released"))
    session.commit()
    assert drain(relay) == 2
    assert lines == ledger(shop) == ["created kept", "created released"]


def test_a_row_changed_in_five_flushes_is_one_event(
    shop: Engine, session: Session, relay: Relay, lines
):
    """From the first old to the last new value; and created and deleted again is none."""
    order = Order(status="0")
    session.add(order)
    session.commit()
    assert order.status == "0"
    for status in "12345":
        order.status = status
        session.flush()
    passing = Order(status="passing")
    session.add(passing)
    session.flush()
    session.delete(passing)
    session.commit()
    created, updated = events(shop)
    assert (created.event_type, updated.event_type) == ("created", "updated")
    assert updated.payload["changes"] == {"status": {"old": "0", "new": "5"}}
    drain(relay)
    assert lines == ledger(shop) == ["created 0", "updated 5 was 0"]

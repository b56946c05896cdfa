"""Without a transaction a row and its event are no unit: refused before the row is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select
from sqlalchemy.orm import Session

from sqla_signals import AutocommitError, mute, post_delete, post_save, receiver
from sqla_signals.durable import Relay

from ..conftest import before_sqlalchemy
from .conftest import engine_for, events, ledger, make_due
from .models import Base, Ledger, Line, Order, Seat, outbox


@pytest.fixture(autouse=True)
def connected() -> None:
    """A durable receiver of lines, and none of orders."""

    @receiver([post_save, post_delete], sender=Line, durable=True, name="shop.lines")
    def fn(sender, **kwargs): ...


def by_engine(engine: Engine) -> Session:
    return Session(engine.execution_options(isolation_level="AUTOCOMMIT"))


def by_connection(engine: Engine) -> Session:
    session = Session(engine)
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    return session


def by_connection_after_a_query(engine: Engine) -> Session:
    session = by_engine(engine)
    session.scalars(select(Order)).all()
    return session


each_way = pytest.mark.parametrize(
    "autocommitting", [by_engine, by_connection, by_connection_after_a_query]
)


def rows(engine: Engine) -> tuple[int, int]:
    """How many orders and lines there are."""
    with Session(engine) as session:
        orders, lines = (session.scalars(select(model)).all() for model in (Order, Line))
        return len(orders), len(lines)


@each_way
def test_rows_with_durable_receivers_are_not_inserted(
    shop: Engine, autocommitting: Callable[[Engine], Session]
):
    """Nor those that are flushed with them, before them."""
    with autocommitting(shop) as session:
        session.add(Order(status="a", lines=[Line()]))
        with pytest.raises(AutocommitError) as caught:
            session.flush()
    message = str(caught.value)
    assert "post_save: receiver" in message
    assert "test_autocommit.py" in message
    assert "writes Line with isolation_level='AUTOCOMMIT'" in message
    assert rows(shop) == (0, 0)
    assert events(shop) == []


@each_way
@pytest.mark.parametrize("how", ["update", "delete", "cascade", "orphan"])
def test_nor_are_they_updated_or_deleted(
    shop: Engine, autocommitting: Callable[[Engine], Session], how: str
):
    """By themselves, or because of another row."""
    with Session(shop) as session, mute():
        session.add(Order(status="a", lines=[Line()]))
        session.commit()
    with autocommitting(shop) as session:
        order = session.scalars(select(Order)).one()
        if how == "update":
            order.lines[0].order_id = None
        elif how == "delete":
            session.delete(order.lines[0])
        elif how == "cascade":
            session.delete(order)
        else:
            order.lines.clear()
        with pytest.raises(AutocommitError, match="durable"):
            session.commit()
    assert rows(shop) == (1, 1)
    with Session(shop) as session:
        assert session.scalars(select(Line.order_id)).one() is not None


@each_way
def test_other_rows_are_written(shop: Engine, autocommitting: Callable[[Engine], Session]):
    """Also where a commit receiver waits for them."""
    seen: list[Any] = []

    @receiver(post_save, sender=Order, on="commit")
    def fn(sender, instance, **kwargs):
        seen.append(instance.status)

    with autocommitting(shop) as session:
        session.add(Order(status="a"))
        session.add(Seat(row="A", number=1))
        session.commit()
    assert seen == ["a"]
    assert rows(shop) == (1, 0)


def test_each_bind_counts_for_its_own_rows(shop: Engine, tmp_path: Any):
    """What is on another database may commit as it likes."""
    other = engine_for(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(other)
    committing = other.execution_options(isolation_level="AUTOCOMMIT")
    with Session(shop, binds={Seat: committing}) as session:
        session.add(Seat(row="A", number=1))
        session.flush()
        session.add(Order(status="a", lines=[Line()]))
        session.commit()
    other.dispose()
    assert rows(shop) == (1, 1)
    assert len(events(shop)) == 1


def test_what_a_statement_has_written_is_an_error_at_the_commit(shop: Engine):
    """That is late, and says so."""
    with by_engine(shop) as session:
        session.execute(insert(Line), [{}], execution_options={"signals": "rows"})
        with pytest.raises(AutocommitError, match="without the 1 events"):
            session.commit()
    assert events(shop) == []


def test_a_receiver_is_not_called_where_the_note_that_it_is_done_would_outlive_its_failure(
    shop: Engine, caplog: pytest.LogCaptureFixture
):
    """Its event stays in the outbox, and is delivered by a relay with transactions."""
    if shop.dialect.name != "sqlite" and before_sqlalchemy("2.0.38"):
        pytest.skip("SQLAlchemy gives no isolation level to an engine that has options")

    @receiver(post_save, sender=Seat, durable=True, name="shop.seats")
    def fn(sender, session, event, **kwargs):
        session.add(Ledger(entry=f"attempt {event.attempt}"))
        session.flush()
        if event.attempt < 3:
            raise ValueError("not yet")

    with Session(shop) as session:
        session.add(Seat(row="A", number=1))
        session.commit()
    relay = Relay(shop.execution_options(isolation_level="AUTOCOMMIT"), outbox=outbox)
    assert relay.run_once() == 1
    assert "AutocommitError: post_save: receiver shop.seats" in events(shop)[0].last_error
    assert ledger(shop) == []
    for _ in range(2):
        make_due(shop)
        Relay(shop, outbox=outbox).run_once()
    assert ledger(shop) == ["attempt 3"]
    assert events(shop) == []

"""Sessions that know several databases: an event is where its row is, and so is its inbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Delete, Engine, Update, event, select, update
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from sqla_signals import Installation, InstallError, post_save, receiver
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import LocalPublisher, Relay, outbox_table

from ..conftest import create_sqlite_engine


class Sales(DeclarativeBase):
    """One database."""


class Stock(DeclarativeBase):
    """Another one."""


sales_outbox = outbox_table(Sales.metadata)
stock_outbox = outbox_table(Stock.metadata, prefix="stock")


class Sale(Sales):
    __tablename__ = "sales"
    id: Mapped[int] = mapped_column(primary_key=True)


class Return(Sales):
    """Of the same base, and kept elsewhere in some tests."""

    __tablename__ = "returns"
    id: Mapped[int] = mapped_column(primary_key=True)


class Item(Stock):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def sales(tmp_path: Path, installed: Installation) -> Iterator[Engine]:
    engine = create_sqlite_engine(tmp_path / "sales.db")
    Sales.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[Engine]:
    engine = create_sqlite_engine(tmp_path / "stock.db")
    Stock.metadata.create_all(engine)
    yield engine
    engine.dispose()


def listen(*senders: type) -> list[tuple[str, Any]]:
    """Connect a durable receiver."""
    calls: list[tuple[str, Any]] = []

    @receiver(post_save, sender=[*senders], durable=True, name="shop.fn")
    def fn(sender, using, **kwargs):
        calls.append((sender.__name__, using))

    return calls


def rows(engine: Engine, table: Any) -> int:
    with engine.connect() as connection:
        return len(connection.execute(select(table)).all())


@pytest.mark.parametrize("default", [False, True])
def test_a_relay_works_where_the_rows_of_the_models_are(sales, stock, default):
    """Whatever other database the sessions know, by default or for other models."""
    calls = listen(Sale, Item)
    Stock.metadata.create_all(sales)  # nothing is looked for there
    sessions = (
        sessionmaker(sales, binds={Stock: stock})
        if default
        else sessionmaker(binds={Sales: sales, Stock: stock})
    )
    with sessions() as session:
        session.add_all([Sale(), Item()])
        session.commit()
    for outbox, engine in ((sales_outbox, sales), (stock_outbox, stock)):
        assert rows(engine, outbox.table) == 1
        relay = Relay(sessions, outbox=outbox)
        assert relay.engine is engine
        assert [relay.run_once(), relay.run_once()] == [1, 0]
        assert rows(engine, outbox.inbox) == 1
    assert calls == [("Sale", sales), ("Item", stock)]
    assert rows(sales, stock_outbox.inbox) == 0


def test_an_outbox_on_several_databases_has_a_relay_for_each(sales, stock):
    """The error says how; the receivers run with the sessions of the application."""
    calls = listen(Sale, Return)
    Sales.metadata.create_all(stock)
    sessions = sessionmaker(binds={Sale: sales, Return: stock})
    with sessions() as session:
        session.add_all([Sale(), Return()])
        session.commit()
    with pytest.raises(InstallError, match=r"Relay\(engine, LocalPublisher\(sessions\)\)"):
        Relay(sessions, outbox=sales_outbox)
    for engine in (sales, stock):
        relay = Relay(engine, LocalPublisher(sessions), outbox=sales_outbox)
        assert [relay.run_once(), relay.run_once()] == [1, 0]
        assert rows(engine, sales_outbox.inbox) == 1
    assert calls == [("Sale", sales), ("Return", stock)]


def test_a_model_that_nobody_listens_to_says_nothing_about_the_outbox(sales, stock):
    """No event of it is written."""
    calls = listen(Return)
    Sales.metadata.create_all(stock)
    sessions = sessionmaker(binds={Sale: sales, Return: stock})
    with sessions() as session:
        session.add_all([Sale(), Return()])
        session.commit()
    assert Relay(sessions, outbox=sales_outbox).run_once() == 1
    assert calls == [("Return", stock)]


def test_sessions_that_know_no_database_for_the_models_are_refused(stock):
    """With what they lack."""
    with pytest.raises(InstallError, match="know no database for"):
        Relay(sessionmaker(binds={Stock: stock}), outbox=sales_outbox)


@pytest.fixture
def sharded(sales: Engine, stock: Engine) -> sessionmaker[ShardedSession]:
    """Sales on two databases, odd and even; what has no number is on none of them."""
    Sales.metadata.create_all(stock)
    names = ("even", "odd")

    def shard_of(mapper: Any, instance: Any, clause: Any = None) -> str:
        return names[instance.id % 2]

    return sessionmaker(
        class_=ShardedSession,
        shards=dict(zip(names, (sales, stock), strict=True)),
        shard_chooser=shard_of,
        identity_chooser=lambda mapper, key, **_: [names[key[0] % 2]],
        execute_chooser=lambda _: names,
    )


def test_sharded_sessions_are_refused_by_name(sales, stock, sharded):
    """A message would say in which shard a receiver works; flush and commit receivers stay."""
    heard = []

    @receiver(post_save, sender=Sale)
    def flushed(sender, **kwargs):
        heard.append("flush")

    with sharded() as session:
        session.add(Sale(id=1))
        session.commit()
    assert heard == ["flush"]
    listen(Sale)
    with sharded() as session:
        session.add(Sale(id=2))
        with pytest.raises(InstallError, match=r"Sale.*ShardedSession.*on='commit'"):
            session.commit()
    assert (rows(sales, Sale), rows(stock, Sale)) == (0, 1)
    for make in (Relay, lambda given: Relay(sales, LocalPublisher(given), outbox=sales_outbox)):
        with pytest.raises(InstallError, match="does not work with ShardedSession"):
            make(sharded)


class RoutingSession(Session):
    """SQLAlchemy's recipe for a leader that is written to and a follower that is read."""

    leader: Engine
    follower: Engine

    def get_bind(self, mapper=None, clause=None):
        writes = self._flushing or isinstance(clause, Update | Delete)
        return self.leader if writes else self.follower


def test_what_writes_elsewhere_than_it_reads_is_followed_to_where_it_writes(sales, stock):
    """Outbox, inbox, relay, and the work of the receiver: the follower is only read."""
    Sales.metadata.create_all(stock)
    calls = []

    class Routed(RoutingSession):
        leader, follower = sales, stock

    @event.listens_for(stock, "before_cursor_execute")
    def _refuse(connection, cursor, statement, *rest):
        assert statement.startswith("SELECT")

    @receiver(post_save, sender=Sale, durable=True, name="shop.fn")
    def fn(sender, instance, session, using, **kwargs):
        calls.append(using)
        session.add(Return(id=instance.id))

    sessions = sessionmaker(class_=Routed)
    for make in (
        lambda: Relay(sessions, outbox=sales_outbox),
        lambda: Relay(sales, LocalPublisher(sessions), outbox=sales_outbox),
    ):
        with sessions() as session:
            session.add(Sale())
            session.commit()
        assert make().run_once() == 1
    assert calls == [sales, sales]
    assert rows(sales, Return) == rows(sales, sales_outbox.inbox) == 2
    assert rows(sales, sales_outbox.table) == 0


def test_a_relay_runs_what_its_own_outbox_is_for(sales, stock):
    """Who can write one outbox has no receiver run for a model of another."""
    calls = listen(Sale, Item)
    sessions = sessionmaker(binds={Sales: sales, Stock: stock})
    with sessions() as session:
        session.add(Item())
        session.commit()
    forged = stock_outbox.table
    with stock.begin() as connection:
        connection.execute(update(forged).values(aggregate_type=f"{__name__}.Sale"))
    relay = Relay(sessions, outbox=stock_outbox, max_attempts=1)
    assert relay.run_once() == 1
    assert calls == []
    assert rows(stock, stock_outbox.dead_letters) == 1
    assert rows(sales, sales_outbox.inbox) == 0


def test_a_worker_of_celery_gives_an_event_up_where_its_row_is(sales, stock):
    """As the relay does."""
    from celery import Celery

    @receiver(post_save, sender=[Sale, Item], durable=True, name="shop.fn")
    def fn(sender, **kwargs):
        raise ValueError("no")

    sessions = sessionmaker(sales, binds={Stock: stock})
    app = Celery("binds", broker="memory://")
    publisher = CeleryPublisher(app, sessions, max_attempts=1)
    with Session(stock) as session:
        session.add(Item())
        session.commit()

    class Keeping(LocalPublisher):
        def publish(self, messages: Any) -> Any:
            texts.extend(message.to_json() for message in messages)
            return {}

    texts: list[str] = []
    Relay(sessions, Keeping(sessions), outbox=stock_outbox).run_once()
    assert publisher.task.apply(texts).state == "FAILURE"
    assert rows(stock, stock_outbox.dead_letters) == 1
    publisher.close()
    app.close()

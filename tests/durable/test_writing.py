"""How events get into the outbox: in the transaction, once, for whoever is owed one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from sqlalchemy import Engine, delete, event, select, update
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column

from sqla_signals import ReceiverOptionError, mute, post_delete, post_save, receiver
from sqla_signals.durable import outbox_table
from sqla_signals.durable.writing import header_sources, new_ids

from .conftest import clear_postgresql, engine_for, events
from .models import Base, Line, Order, Seat, outbox


@pytest.fixture(autouse=True)
def connected() -> None:
    """A durable receiver of whatever happens to orders."""

    @receiver([post_save, post_delete], sender=Order, durable=True, name="shop.orders")
    def fn(sender, **kwargs): ...


@pytest.fixture
def inserts(shop: Engine) -> list[Any]:
    """Parameters of the statements that write into the outbox."""
    found: list[Any] = []

    @event.listens_for(shop, "before_cursor_execute")
    def _execute(connection, cursor, statement, parameters, context, executemany) -> None:
        if statement.startswith("INSERT INTO sqla_signals_outbox"):
            assert "RETURNING" not in statement
            found.append(parameters)

    return found


def kinds(engine: Engine) -> list[tuple[str, str, Any]]:
    """What the outbox holds."""
    return [
        (
            row.aggregate_type.rpartition(".")[2],
            row.event_type,
            row.payload["snapshot"].get("status"),
        )
        for row in events(engine)
    ]


def test_a_transaction_writes_its_events_with_one_statement(shop, session, inserts):
    """However many there are, of whatever classes; without RETURNING."""

    @receiver(post_save, sender=Line, durable=True, name="shop.lines")
    def fn(sender, **kwargs): ...

    session.add_all([Order(status=str(n), lines=[Line()]) for n in range(20)])
    session.commit()
    assert len(inserts) == 1
    assert len(events(shop)) == 40


def test_who_has_no_durable_receiver_writes_nothing(shop, session, inserts):
    """Also where commit receivers wait for it."""

    @receiver(post_save, sender=Seat, on="commit")
    def fn(sender, **kwargs): ...

    session.add(Seat(row="A", number=1))
    session.commit()
    assert inserts == []


def test_what_is_still_pending_at_commit_is_written(shop, session):
    """Commit flushes after its event; that is not too late."""
    session.add(Order(status="new"))
    session.commit()
    assert kinds(shop) == [("Order", "created", "new")]


def test_what_flush_receivers_add_is_written(shop, session):
    """Until nothing new appears."""

    @receiver(post_save, sender=Order)
    def next_one(sender, instance, session, created, **kwargs):
        if created and instance.status < "3":
            session.add(Order(status=str(int(instance.status) + 1)))

    session.add(Order(status="1"))
    session.commit()
    assert [kind[2] for kind in kinds(shop)] == ["1", "2", "3"]


def test_what_a_later_before_commit_listener_changes_is_written(shop, session):
    """In a statement of its own."""

    @event.listens_for(session, "before_commit")
    def _before_commit(session: Session) -> None:
        if not session.info.get("done"):
            session.info["done"] = True
            session.add(Order(status="late"))

    session.add(Order(status="early"))
    session.commit()
    assert [kind[2] for kind in kinds(shop)] == ["early", "late"]


def test_what_statements_do_to_rows_is_written(shop, session):
    """With ``signals="rows"``: in net, together with what was flushed; late ones by themselves."""
    rows: Any = {"signals": "rows"}

    @event.listens_for(session, "before_commit")
    def _before_commit(session: Session) -> None:
        if session.info.pop("late", False):
            late = update(Order).where(Order.status == "b").values(status="late")
            session.execute(late, execution_options=rows)

    session.add_all([Order(status=status) for status in "abc"])
    session.flush()
    session.execute(delete(Order).where(Order.status == "c"), execution_options=rows)
    changed = update(Order).where(Order.status == "a").values(status="d")
    session.execute(changed, execution_options=rows)
    session.commit()
    assert kinds(shop) == [("Order", "created", "d"), ("Order", "created", "b")]
    session.info["late"] = True
    session.execute(delete(Order).where(Order.status == "d"), execution_options=rows)
    session.commit()
    assert kinds(shop)[2:] == [("Order", "deleted", "d"), ("Order", "updated", "late")]


def test_an_open_savepoint_is_committed_with_its_root(shop, session):
    """Its events are written with the root's, in net."""
    root = session.begin()
    order = Order(status="a")
    session.add(order)
    session.flush()
    session.begin_nested()
    order.status = "b"
    session.add(Order(status="c"))
    root.commit()
    assert kinds(shop) == [("Order", "created", "b"), ("Order", "created", "c")]


def test_savepoints_write_nothing_themselves(shop, session, inserts):
    """Only the root does, in the end."""
    for status in "ab":
        with session.begin_nested():
            session.add(Order(status=status))
        assert inserts == []
    session.commit()
    assert len(inserts) == 1
    assert [kind[2] for kind in kinds(shop)] == ["a", "b"]


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ],
    indirect=True,
)
def test_a_prepared_transaction_brings_its_events(shop):
    """They are written before PREPARE, and appear with COMMIT PREPARED."""
    with Session(shop, twophase=True) as session:
        session.add(Order(status="kept"))
        session.prepare()
        assert events(shop) == []
        session.commit()
        session.add(Order(status="undone"))
        session.prepare()
        session.rollback()
    assert [kind[2] for kind in kinds(shop)] == ["kept"]


@pytest.mark.parametrize(
    "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
)
@pytest.mark.parametrize("committed", [True, False])
def test_events_share_the_fate_of_an_outer_transaction(shop, mode, committed):
    """They are written where the rows are, in every join_transaction_mode."""
    with shop.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            session.add(Order(status="a"))
            session.commit()
        if outer.is_active:
            outer.commit() if committed else outer.rollback()
        else:
            assert mode == "control_fully"
            committed = True
    with Session(shop) as session:
        stored = session.scalars(select(Order.status)).all()
    assert [kind[2] for kind in kinds(shop)] == list(stored) == (["a"] if committed else [])


def test_a_mute_counts_when_the_change_happens(shop, session):
    """Who was muted is owed nothing."""

    @receiver(post_save, sender=Order, durable=True, name="shop.other")
    def other(sender, **kwargs): ...

    with mute(receiver=other):
        session.add(Order(status="a"))
        session.flush()
    with mute():
        session.add(Order(status="b"))
        session.flush()
    session.commit()
    assert [(row.payload["snapshot"]["status"], row.receivers) for row in events(shop)] == [
        ("a", ["shop.orders"])
    ]


def test_an_error_while_writing_leaves_nothing_committed(shop, session):
    """Neither the row nor the event."""
    with shop.begin() as connection:
        outbox.table.drop(connection)
    session.add(Order(status="a"))
    with pytest.raises(Exception, match="sqla_signals_outbox"):
        session.commit()
    session.rollback()
    with Session(shop) as other:
        assert other.scalars(select(Order)).all() == []


@pytest.mark.parametrize("in_savepoint", [False, True])
def test_after_an_error_while_writing_a_second_commit_commits_nothing(
    shop, session, inserts, in_savepoint
):
    """As after a flush that failed: else the rows would be there without their events."""

    def refuse(outbox: Any, count: int) -> dict[str, str]:
        raise LookupError("no headers today")

    session.add(Order(status="a"))
    session.flush()
    if in_savepoint:
        session.begin_nested()
        session.add(Order(status="b"))
    header_sources.append(refuse)
    with pytest.raises(LookupError, match="no headers today"):
        session.commit()
    header_sources.remove(refuse)
    with pytest.raises(PendingRollbackError, match="no headers today"):
        session.commit()
    session.rollback()
    assert session.scalars(select(Order)).all() == []
    session.add(Order(status="c"))
    session.commit()
    assert kinds(shop) == [("Order", "created", "c")]
    assert len(inserts) == 1


def test_a_cascaded_delete_says_what_it_came_from(shop, session):
    """``origin`` travels as the identity of the other row."""

    @receiver(post_delete, sender=Line, durable=True, name="shop.lines")
    def fn(sender, **kwargs): ...

    order = Order(status="a", lines=[Line()])
    session.add(order)
    session.commit()
    session.delete(order)
    session.commit()
    deleted = [row for row in events(shop) if row.event_type == "deleted"]
    origins = {row.aggregate_type.rpartition(".")[2]: row.payload.get("origin") for row in deleted}
    assert origins["Order"] is None
    assert origins["Line"]["key"] == [1]


# -- what is checked beforehand --------------------------------------------------------------------


def test_a_model_without_an_outbox_is_an_error_when_it_is_mapped():
    """Not when the first order is lost."""

    class Other(DeclarativeBase): ...

    def fn(sender, **kwargs): ...

    post_save.connect(fn, sender="Misplaced", durable=True, name="shop.fn")

    class Misplaced(Other):
        __tablename__ = "misplaced"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ReceiverOptionError, match=r"outbox_table\(Misplaced\.metadata\)"):
        configure_mappers()
    post_save.disconnect(fn)


def test_a_second_receiver_of_the_same_name_is_refused():
    """A worker could not tell them apart; the same function twice is fine."""

    def one(sender, **kwargs): ...

    def two(sender, **kwargs): ...

    post_save.connect(one, sender=Order, durable=True, name="shop.same")
    post_delete.connect(one, sender=Order, durable=True, name="shop.same")
    with pytest.raises(ReceiverOptionError, match=r"has the name 'shop\.same' already"):
        post_delete.connect(two, sender=Order, durable=True, name="shop.same")
    two_connected: Callable[..., Any] = post_delete.connect(
        two, sender=Order, on="commit", name="shop.same"
    )
    assert two_connected is two


def test_a_name_that_does_not_last_is_refused():
    """A lambda, or a function inside of another."""

    def local(sender, **kwargs): ...

    for fn in (local, lambda sender, **kwargs: None):
        with pytest.raises(ReceiverOptionError, match="name="):
            post_save.connect(fn, sender=Order, durable=True, weak=False)
    with pytest.raises(ReceiverOptionError, match="255 characters"):
        post_save.connect(local, sender=Order, durable=True, name="x" * 256)


def test_a_durable_receiver_may_require_the_event():
    """And no other receiver may."""

    def fn(sender, instance, event, **kwargs): ...

    post_save.connect(fn, sender=Order, durable=True, name="shop.fn")
    with pytest.raises(TypeError, match="event"):
        post_save.connect(fn, sender=Order, on="commit")


def test_the_outbox_is_added_once():
    """The same options give the same tables, others are an error."""
    assert outbox_table(Base.metadata, source="/shop") is outbox
    with pytest.raises(ReceiverOptionError, match="other options"):
        outbox_table(Base.metadata, source="/other")


# -- asynchronous ----------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        "sqlite+aiosqlite",
        pytest.param("postgresql+asyncpg", marks=pytest.mark.postgresql),
        pytest.param("postgresql+psycopg", marks=pytest.mark.postgresql),
    ]
)
def async_engine(request, tmp_path, installed) -> Any:
    driver: str = request.param
    plain = (
        f"sqlite:///{tmp_path / 'test.db'}"
        if driver.startswith("sqlite")
        else request.getfixturevalue("postgresql_url")
    )
    witness = engine_for(plain)
    Base.metadata.create_all(witness)
    yield create_async_engine(witness.url.set(drivername=driver)), witness
    witness.dispose()
    if not driver.startswith("sqlite"):
        clear_postgresql(plain)


def test_an_async_session_writes_events(async_engine: tuple[AsyncEngine, Engine]):
    """What is committed, and not what is undone."""
    engine, witness = async_engine

    async def work() -> None:
        async with AsyncSession(engine) as session:
            session.add(Order(status="a"))
            await session.commit()
            session.add(Order(status="b"))
            await session.flush()
            await session.rollback()
            async with session.begin():
                session.add(Order(status="c"))
        await engine.dispose()

    asyncio.run(work())
    assert [kind[2] for kind in kinds(witness)] == ["a", "c"]


def test_the_ids_of_events_are_in_the_order_of_time():
    """Version 7 UUIDs, all of them different."""
    first, second = new_ids(1000), new_ids(1000)
    assert len({*first, *second}) == 2000
    assert [*sorted(first)] == first
    assert {UUID(one).version for one in first} == {7}
    assert {UUID(one).variant for one in first} == {RFC_4122}
    milliseconds = [int(ids[0], 16) >> 80 for ids in (first, second)]
    assert sorted(milliseconds) == milliseconds


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only"])
@pytest.mark.parametrize("owner", ["commit", "rollback"])
def test_the_events_of_a_session_that_is_closed_in_anothers_transaction_are_left_there(
    shop: Engine, mode: str, owner: str
):
    """As its rows are: whoever owns the transaction commits both or neither."""
    with shop.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            session.add(Order(status="left"))
            session.flush()
        assert not session.in_transaction()
        getattr(outer, owner)()
    expected = ["left"] if owner == "commit" else []
    assert kinds(shop) == [("Order", "created", status) for status in expected]
    with Session(shop) as session:
        assert session.scalars(select(Order.status)).all() == expected


def test_events_that_come_too_late_to_be_written_are_logged(
    shop: Engine, caplog: pytest.LogCaptureFixture
):
    """The owner has ended the transaction, and with it the rows' chance of an event."""
    with shop.connect() as connection:
        outer = connection.begin()
        session = Session(connection)
        session.add(Order(status="left"))
        session.flush()
        outer.commit()
        session.close()
        assert not connection.in_transaction()
    (record,) = caplog.records
    assert "events of durable receivers could not be written" in record.getMessage()
    assert kinds(shop) == []
    caplog.clear()

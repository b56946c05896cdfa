"""``pre_bulk`` and ``post_bulk``, and what is done where nobody hears of a statement."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    String,
    TypeDecorator,
    delete,
    event,
    insert,
    literal_column,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError, PendingRollbackError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import (
    AsyncReceiverError,
    BulkBypassError,
    BulkBypassWarning,
    BulkOptionError,
    InstallError,
    ReceiverOptionError,
    SessionInFlushError,
    mute,
    post_bulk,
    post_delete,
    post_save,
    pre_bulk,
    pre_save,
    receiver,
)
from tests.contract.observing import asynchronous, rows

from ..conftest import before_sqlalchemy
from .shop import Base, Clerk, Customer, Employee, Heard, Manager, Order, inserted, witnessed

SKIP: Any = {"signals": "skip"}
ROWS: Any = {"signals": "rows"}


def listen(sender: Any = None, **options: Any) -> Heard:
    """A receiver of the two signals of statements."""
    heard = Heard()
    pre_bulk.connect(heard, sender, weak=False)
    post_bulk.connect(heard, sender, weak=False, **options)
    return heard


def fill(session: Session) -> None:
    """Three orders, committed."""
    values = [{"id": key, "number": key * 10, "status": "open"} for key in (1, 2, 3)]
    session.connection().execute(
        insert(Order.__table__),
        [{"id": one["id"], "number": one["number"], "state": one["status"]} for one in values],
    )
    session.commit()
    witnessed(session)
    session.commit()


# -- what is sent --------------------------------------------------------------------------------


def upsert(session: Session) -> Any:
    """The insert() of the dialect."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    return dialect.insert(Order)


STATEMENTS = {
    "insert values": (lambda s: insert(Order).values(id=7), None, "insert", 1),
    "insert list of values": (
        lambda s: insert(Order).values([{"id": 7}, {"id": 8}]), None, "insert", 2,
    ),
    "insert dictionary": (lambda s: insert(Order), {"id": 7}, "insert", 1),
    "insert list": (lambda s: insert(Order), [{"id": 7}, {"id": 8}], "insert", 2),
    "insert returning": (
        lambda s: insert(Order).returning(Order), [{"id": 7}, {"id": 8}], "insert", 2,
    ),
    "insert values returning": (
        lambda s: insert(Order).values(id=7).returning(Order.id), None, "insert", 1,
    ),
    "insert from select": (
        lambda s: insert(Order).from_select(["id"], select(Order.id + 10)), None, "insert", 3,
    ),
    "upsert": (
        lambda s: upsert(s).values(number=10).on_conflict_do_update(
            index_elements=["number"], set_={"state": "x"}
        ), None, "insert", 1,
    ),
    "upsert nothing": (
        lambda s: upsert(s).values(number=10).on_conflict_do_nothing(), None, "insert", 0,
    ),
    "upsert list": (
        lambda s: upsert(s).on_conflict_do_nothing(), [{"number": 10}, {"id": 9}], "insert", -1,
    ),
    "update": (lambda s: update(Order).where(Order.id > 1).values(status="x"), None, "update", 2),
    "update returning": (
        lambda s: update(Order).where(Order.id > 1).values(status="x").returning(Order),
        None, "update", 2,
    ),
    "update list": (
        lambda s: update(Order), [{"id": 1, "status": "x"}, {"id": 2, "status": "y"}], "update", 2,
    ),
    "delete": (lambda s: delete(Order).where(Order.id > 1), None, "delete", 2),
    "delete returning": (
        lambda s: delete(Order).where(Order.id > 1).returning(Order.id), None, "delete", 2,
    ),
    "from_statement": (
        lambda s: select(Order).from_statement(insert(Order).values(id=7).returning(Order)),
        None, "insert", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATEMENTS)
def test_each_kind_of_statement(session: Session, name: str):
    """Before and after, with what was executed and how many rows it was."""
    fill(session)
    statement, parameters, operation, rowcount = STATEMENTS[name]
    heard = listen()
    result = session.execute(statement(session), parameters)
    if "returning" in name or name == "from_statement":
        assert len(result.all()) == rowcount
    elif operation == "insert" and parameters is None:
        rowcount = inserted(session, rowcount)
    after = f"post_bulk {operation} Order {rowcount}"
    assert heard.statements == [f"pre_bulk {operation} Order", after]
    for call in heard.calls:
        assert call["sender"] is Order
        assert call["parameters"] == parameters
        assert call["using"] is session.bind
        assert call["session"] is session
        assert call["signal"] in (pre_bulk, post_bulk)
        assert call["statement"].is_dml
    if rowcount != -1:
        assert len(witnessed(session)) == rowcount


def test_a_statement_keeps_the_execution_options_that_it_was_given(session: Session, shop: Engine):
    """An INSERT has one of SQLAlchemy's besides, where somebody is told the number of rows."""
    fill(session)
    listen(Order)
    seen = []

    @event.listens_for(shop, "before_cursor_execute")
    def look(conn, cursor, statement, parameters, context, executemany):
        if statement.startswith(("UPDATE", "INSERT", "DELETE")):
            seen.append({key for key in context.execution_options if not key.startswith("_")})

    for given in ({"mine": 1, "signals": "skip"}, {"mine": 1}):
        session.execute(update(Order).values(status="sent"), execution_options=given)
        session.execute(delete(Order).where(Order.id == 3), execution_options=given)
        session.execute(insert(Order).values(id=3, status="sent"), execution_options=given)
    assert seen == [*[{"mine", "signals"}] * 3, *[{"mine"}] * 2, {"mine", "preserve_rowcount"}]
    assert rows(session, Order.status) == ["sent"] * 3


@pytest.mark.parametrize("operation", ["update", "upsert", "upserts"])
def test_a_returned_row_touches_its_instance_when_it_is_read(session: Session, operation: str):
    """The rows are counted before, but nothing is made of them."""
    if operation == "update" and before_sqlalchemy("2.0.36"):
        pytest.skip("an UPDATE does not populate existing instances there")
    fill(session)
    heard = listen(Order)
    order: Any = session.get(Order, 1)
    upserted = upsert(session).on_conflict_do_update(index_elements=["id"], set_={"state": "sent"})
    statement: Any = {
        "update": update(Order).where(Order.id == 1).values(status="sent"),
        "upsert": upserted.values(id=1),
        "upserts": upserted,
    }[operation]
    result = session.execute(
        statement.returning(Order),
        [{"id": 1}] if operation == "upserts" else None,
        execution_options={"populate_existing": True, "synchronize_session": False},
    )
    assert heard.statements[1].endswith(" Order 1")
    assert order.status == "open"
    assert result.raw.context is not None
    assert result.all() == [(order,)]
    assert order.status == "sent"
    assert rows(session, Order.id, Order.status)[0] == (1, "sent")


READ: dict[str, Callable[[Any], Any]] = {
    "all": lambda result: result.all(),
    "fetchmany": lambda result: [*result.fetchmany(2), *result.fetchmany(2)],
    "iteration": list,
    "partitions": lambda result: [row for part in result.partitions(2) for row in part],
    "unique": lambda result: result.unique().all(),
    "yield_per": lambda result: list(result.yield_per(1)),
    "columns": lambda result: result.columns(0, 1).all(),
    "mappings": lambda result: [tuple(row.values()) for row in result.mappings()],
    "scalars": lambda result: [(number, "x") for number in result.scalars()],
    "frozen": lambda result: result.freeze()().all(),
}


@pytest.mark.parametrize("how", READ)
@pytest.mark.parametrize("returned", ["attributes", "star"])
def test_returned_rows_are_read_in_any_way(session: Session, how: str, returned: str):
    """With values that its column type has made of what the driver gave, each once."""

    class Marked(TypeDecorator[str]):
        impl = String
        cache_ok = True

        def process_result_value(self, value: Any, dialect: Any) -> Any:
            return f"<{value}>"

    fill(session)
    heard = listen(Order)
    marked = type_coerce(Order.status, Marked())
    statement = update(Order).where(Order.id > 1).values(status="x")
    if returned == "star":
        statement = statement.returning(literal_column("*"))
        result = session.execute(statement, execution_options={"synchronize_session": False})
        assert heard.statements[1] == "post_bulk update Order 2"
        assert sorted(row[0] for row in READ[how](result)) == [2, 3]
    else:
        result = session.execute(statement.returning(Order.id, marked))
        assert heard.statements[1] == "post_bulk update Order 2"
        status = "x" if how == "scalars" else "<x>"
        assert sorted(map(tuple, READ[how](result))) == [(2, status), (3, status)]
    assert rows(session, Order.status) == ["open", "x", "x"]


@pytest.mark.parametrize("how", ["first", "close", "not read"])
def test_returned_rows_need_not_be_read(session: Session, how: str):
    """The connection can be used for something else."""
    fill(session)
    heard = listen(Order)
    result = session.execute(update(Order).values(status="x").returning(Order.id))
    if how == "first":
        assert result.first() is not None
    elif how == "close":
        result.close()
        with pytest.raises(ResourceClosedError):
            result.all()
    assert heard.statements[1] == "post_bulk update Order 3"
    assert rows(session, Order.status) == ["x"] * 3
    session.rollback()


def test_query_update_and_delete(session: Session):
    """The legacy methods are statements too."""
    fill(session)
    heard = listen()
    assert session.query(Order).filter(Order.id > 1).update({"status": "x"}) == 2
    assert session.query(Order).delete() == 3
    assert heard.statements == [
        "pre_bulk update Order",
        "post_bulk update Order 2",
        "pre_bulk delete Order",
        "post_bulk delete Order 3",
    ]
    assert rows(session, Order.id) == []


@pytest.mark.parametrize("synchronize", ["auto", "evaluate", "fetch", False])
def test_the_session_is_synchronized_as_without_signals(session: Session, synchronize: Any):
    """What SQLAlchemy does about the instances in the session is its own affair."""
    fill(session)
    order = session.get(Order, 1)
    listen()
    session.execute(
        update(Order).values(status="x"), execution_options={"synchronize_session": synchronize}
    )
    assert order.status == ("x" if synchronize else "open")


def test_senders(session: Session):
    """The class that the statement names, exactly; its subclasses with propagate."""
    exact, base, other = listen(Employee), listen(Base), listen(Order)
    propagated = Heard()
    post_bulk.connect(propagated, Employee, propagate=True)
    session.execute(update(Employee).values(name="x"))
    session.execute(update(Clerk).values(name="x"))
    session.execute(update(Manager).values(budget=1))
    assert len(exact.calls) == 2
    assert [call["sender"] for call in base.calls][::2] == [Employee, Clerk, Manager]
    assert [call["sender"] for call in propagated.calls] == [Employee, Clerk, Manager]
    assert other.calls == []


def test_core_statements_are_not_told(session: Session):
    """On the table of a model, also where the ORM has a part in them, and on a connection."""
    fill(session)
    heard = listen()
    post_save.connect(heard)
    table = Order.__table__
    session.execute(update(table).where(table.c.id == 1).values(state="x"))
    session.execute(update(table).where(Order.id == 2).values(state="x"))
    session.execute(text("UPDATE orders SET state = 'x' WHERE id = 3"))
    session.connection().execute(update(Order).values(total=1))
    assert heard.calls == []
    assert rows(session, Order.status) == ["x", "x", "x"]


def test_selects_are_not_told(session: Session):
    """Of no kind."""
    fill(session)
    heard = listen()
    assert len(session.scalars(select(Order)).all()) == 3
    assert session.scalar(text("SELECT 1")) == 1
    assert heard.calls == []


def test_skip(session: Session):
    """A statement that is meant to be silent says so; on itself or where it is executed."""
    fill(session)
    heard = listen()
    post_save.connect(heard)
    session.execute(update(Order).values(status="x"), execution_options=SKIP)
    session.execute(update(Order).values(status="y").execution_options(signals="skip"))
    assert heard.calls == []
    assert rows(session, Order.status) == ["y"] * 3


def test_another_value_of_the_option_is_refused(session: Session):
    """The message says which there are."""
    fill(session)
    listen()
    with pytest.raises(BulkOptionError, match=r"'row'.*\"rows\".*\"skip\""):
        session.execute(update(Order).values(status="x"), execution_options={"signals": "row"})
    assert witnessed(session) == []


@pytest.mark.parametrize("on_itself", [True, False])
@pytest.mark.parametrize("operation", ["insert", "update", "delete", "from_statement"])
def test_signals_of_rows_are_refused_for_a_statement_on_a_table(
    session: Session, operation: str, on_itself: bool
):
    """It has been asked for them, and there is no telling which class the rows are of."""
    fill(session)
    post_save.connect(listen())
    orders = Order.__table__
    statement: Any = {
        "insert": insert(orders).values(id=7),
        "delete": delete(orders),
        "update": update(orders).values(state="x"),
        "from_statement": select(Order).from_statement(
            update(orders).values(state="x").returning(orders)
        ),
    }[operation]
    options: Any = ROWS
    if on_itself:
        statement, options = statement.execution_options(**ROWS), {}
    with pytest.raises(BulkOptionError, match=r"\(\) of the Table 'orders'.*name the class"):
        session.execute(statement, execution_options=options)
    assert witnessed(session) == []


def test_what_a_session_asks_for_in_general_does_not_keep_it_from_tables(
    shop: Engine, session: Session
):
    """SQLAlchemy 2.1 takes execution options for all that a session executes."""
    if not hasattr(session, "execution_options"):
        pytest.skip("new in SQLAlchemy 2.1")
    fill(session)
    post_save.connect(listen())
    with Session(shop, execution_options=ROWS) as general:
        general.execute(update(Order.__table__).values(state="x"))
        general.commit()
    assert rows(session, Order.status) == ["x"] * 3


def test_mute(session: Session):
    """Muted as any signal."""
    fill(session)
    heard = listen()
    with mute(pre_bulk), mute(post_bulk, sender=Order):
        session.execute(update(Order).values(status="x"))
    assert heard.calls == []


def test_overlapping_installations_send_once(session: Session):
    """Installed for all, and for this session."""
    fill(session)
    installation = sqla_signals.install(session)
    heard = listen()
    post_save.connect(heard)
    session.execute(update(Order).values(status="x"), execution_options={"signals": "rows"})
    installation.remove()
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 3"]
    assert len(heard.rows("post")) == 3


def test_a_removed_installation_sends_nothing(shop: Engine):
    """Also when a receiver has removed it."""
    installation = sqla_signals.install()
    heard = listen()
    heard.meddle = lambda sender, **kwargs: installation.remove()
    with Session(shop) as session:
        session.execute(insert(Order).values(id=1))
        session.execute(insert(Order).values(id=2))
    assert heard.statements == [
        "pre_bulk insert Order",
        f"post_bulk insert Order {inserted(session, 1)}",
    ]


def test_a_statement_inside_of_a_receiver(session: Session):
    """Has signals of its own."""
    fill(session)
    heard = listen()

    def meddle(sender: Any, operation: str, signal: Any, session: Session, **kwargs: Any) -> None:
        if operation == "update" and signal is post_bulk:
            session.execute(delete(Order).where(Order.id == 1))

    heard.meddle = meddle
    session.execute(update(Order).values(status="x"))
    assert heard.statements[1:] == [
        "post_bulk update Order 3",
        "pre_bulk delete Order",
        "post_bulk delete Order 1",
    ]


# -- every pre_bulk has its post_bulk, or an exception -------------------------------------------


def test_raising_in_pre_bulk_vetoes(session: Session, statements: list[str]):
    """Nothing is executed, and the session goes on."""
    fill(session)
    heard = listen()

    @receiver(pre_bulk, sender=Order)
    def refuse(sender: Any, **kwargs: Any) -> None:
        raise ValueError("no")

    del statements[:]
    with pytest.raises(ValueError, match="no") as caught:
        session.execute(update(Order).values(status="x"))
    assert "of pre_bulk, sender Order" in caught.value.__notes__[0]
    assert statements == []
    assert heard.statements == ["pre_bulk update Order"]
    pre_bulk.disconnect(refuse)
    session.execute(update(Order).values(status="x"))
    session.commit()
    assert rows(session, Order.status) == ["x"] * 3


def test_a_statement_that_fails(session: Session):
    """A pre_bulk and an exception; no post_bulk, not even after the transaction."""
    fill(session)
    heard, later = listen(), Heard()
    post_bulk.connect(later, on="rollback")
    with pytest.raises(IntegrityError):
        session.execute(insert(Order).values(id=1))
    session.rollback()
    assert heard.statements == ["pre_bulk insert Order"]
    assert later.calls == []


def test_raising_in_post_bulk_rolls_back(session: Session):
    """The statement cannot be committed by mistake, nor what came before it without a word."""
    fill(session)

    @receiver(post_bulk, sender=Order)
    def refuse(sender: Any, **kwargs: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        session.execute(update(Order).values(status="x"))
    with pytest.raises(PendingRollbackError):
        session.commit()
    session.rollback()
    assert rows(session, Order.status) == ["open"] * 3


def test_raising_in_post_bulk_undoes_no_more_than_the_savepoint(session: Session):
    """As with a flush, who catches it around the savepoint goes on in the transaction."""
    fill(session)
    ends: list[Any] = []

    @receiver(post_bulk, sender=Order)
    def refuse(sender: Any, **kwargs: Any) -> None:
        raise ValueError("no")

    @receiver(post_save, sender=Customer, on="commit")
    @receiver(post_save, sender=Customer, on="rollback")
    def ended(sender: Any, instance: Any, session: Any, **kwargs: Any) -> None:
        ends.append((instance.id, session is not None))

    session.add(Customer(id=8))
    session.flush()
    with pytest.raises(ValueError, match="no"):
        with session.begin_nested():
            session.add(Customer(id=9))
            session.execute(update(Order).values(status="x"))
    assert ends == [(9, False)]
    session.add(Customer(id=10))
    session.commit()
    assert ends == [(9, False), (8, True), (10, True)]
    assert rows(session, Order.status) == ["open"] * 3
    assert {8, 9, 10}.intersection(rows(session, Customer.id)) == {8, 10}


@pytest.mark.parametrize("signal", [pre_bulk, post_bulk], ids=["pre", "post"])
@pytest.mark.parametrize("call", ["commit", "rollback", "close"])
def test_ending_the_session_in_a_receiver_is_an_error(session: Session, signal: Any, call: str):
    """The caller is in the middle of something."""
    fill(session)

    @receiver(signal, sender=Order)
    def impatient(sender: Any, session: Session, **kwargs: Any) -> None:
        getattr(session, call)()

    with pytest.raises(SessionInFlushError, match=call):
        session.execute(update(Order).values(status="x"))
    session.rollback()
    assert rows(session, Order.status) == ["open"] * 3


def test_a_receiver_may_change_the_session(session: Session):
    """What pre_bulk adds is flushed before the statement."""
    fill(session)

    @receiver(pre_bulk, sender=Order)
    def add(sender: Any, session: Session, **kwargs: Any) -> None:
        session.add(Order(id=9))
        session.flush()
        session.add(Order(id=10))

    session.execute(update(Order).values(status="x"))
    assert rows(session, Order.status) == ["x"] * 5


def test_an_async_receiver_of_a_plain_session(session: Session):
    """Nothing can await it; the error comes before the statement."""
    fill(session)

    @receiver(pre_bulk, sender=Order)
    async def hear(sender: Any, **kwargs: Any) -> None: ...

    with pytest.raises(AsyncReceiverError, match="pre_bulk"):
        session.execute(update(Order).values(status="x"))
    assert witnessed(session) == []


@asynchronous
async def test_an_async_session(shop: Engine, async_engine: AsyncEngine):
    """Async receivers are awaited, with the AsyncSession."""
    found = []
    installation = sqla_signals.install(bulk="raise")

    @receiver([pre_bulk, post_bulk], sender=Order)
    async def hear(sender: Any, signal: Any, session: Any, **kwargs: Any) -> None:
        assert isinstance(session, AsyncSession)
        number = (await session.execute(text("SELECT count(*) FROM orders"))).scalar_one()
        found.append((signal.name, number))

    @receiver(post_bulk, sender=Order, on="commit")
    async def later(sender: Any, rowcount: int, session: Any, **kwargs: Any) -> None:
        number = (await session.execute(text("SELECT count(*) FROM orders"))).scalar_one()
        found.append(("commit", number))

    async with AsyncSession(async_engine) as session:
        await session.execute(insert(Order), [{"id": 1}, {"id": 2}])
        await session.commit()
    assert found == [("pre_bulk", 0), ("post_bulk", 2), ("commit", 2)]
    installation.remove()


# -- after the transaction -----------------------------------------------------------------------


def test_on_commit(session: Session):
    """Once for each statement that was committed, in a session of its own, in its place."""
    fill(session)
    heard = Heard()
    post_bulk.connect(heard, Order, on="commit")
    post_save.connect(heard, Order, on="commit")
    session.execute(update(Order).values(status="x"))
    session.add(Order(id=9))
    session.flush()
    with session.begin_nested():
        session.execute(update(Order).values(status="y"))
        with session.begin_nested() as savepoint:
            session.execute(delete(Order))
            savepoint.rollback()
    assert heard.calls == []
    session.commit()
    assert [
        f"{call['signal'].name} {call.get('operation', '')} {call.get('rowcount', '')}"
        for call in heard.calls
    ] == ["post_bulk update 3", "post_save  ", "post_bulk update 4"]
    assert all(call["session"] is not session for call in heard.calls)
    assert rows(session, Order.status) == ["y"] * 4


def test_on_commit_after_a_rollback(session: Session):
    """Nothing was committed, so nobody is called."""
    fill(session)
    heard = Heard()
    post_bulk.connect(heard, Order, on="commit")
    session.execute(update(Order).values(status="x"))
    session.rollback()
    session.commit()
    assert heard.calls == []


def test_on_rollback(session: Session):
    """Once for each statement that was undone, of a savepoint at once."""
    fill(session)
    heard = Heard()
    post_bulk.connect(heard, Order, on="rollback")
    with session.begin_nested() as savepoint:
        session.execute(delete(Order))
        savepoint.rollback()
    assert heard.statements == ["post_bulk delete Order 3"]
    session.execute(update(Order).values(status="x"))
    session.close()
    assert heard.statements == ["post_bulk delete Order 3", "post_bulk update Order 3"]
    assert heard.calls[0]["session"] is None


def test_a_commit_receiver_that_fails(session: Session, caplog: pytest.LogCaptureFixture):
    """It is logged and told of, and the others are called."""
    fill(session)
    failed = []

    @sqla_signals.receiver_failed.connect
    def hear(sender: Any, signal: Any, instance: Any, exception: Any, **kwargs: Any) -> None:
        failed.append((sender, signal, instance, str(exception)))

    @receiver(post_bulk, sender=Order, on="commit")
    def fail(sender: Any, session: Session, **kwargs: Any) -> None:
        session.add(Order(id=50))
        raise ValueError("no")

    heard = Heard()
    post_bulk.connect(heard, Order, on="commit")
    session.execute(update(Order).values(status="x"))
    session.commit()
    assert failed == [(Order, post_bulk, None, "no")]
    assert heard.statements == ["post_bulk update Order 3"]
    assert "post_bulk" in caplog.text
    assert rows(session, Order.id) == [1, 2, 3]


# -- what bypasses the receivers of rows ---------------------------------------------------------


def row_saved(sender: Any, **kwargs: Any) -> None:
    """A receiver of rows."""


@pytest.fixture
def warned(shop: Engine) -> Session:
    """A session whose installation warns, as by default."""
    sqla_signals.install()
    return Session(shop)


def line() -> int:
    """The line that calls this."""
    return sys._getframe(1).f_lineno


def test_the_warning_points_at_the_line_of_the_caller(warned: Session):
    """Through session, scoped_session, query, scalars."""
    post_save.connect(row_saved, Order)
    scoped = scoped_session(lambda: warned)
    statement = update(Order).values(status="x")
    with pytest.warns(BulkBypassWarning) as caught:  # noqa: PT031
        here = line()
        warned.execute(statement)
        scoped.execute(statement)
        warned.query(Order).update({"status": "y"})
        warned.scalars(statement.returning(Order)).all()
    assert [(one.filename, one.lineno) for one in caught] == [
        (__file__, here + number) for number in (1, 2, 3, 4)
    ]
    message = str(caught[0].message)
    assert "update(Order)" in message
    assert "test_statements.row_saved" in message
    assert '{"signals": "rows"}' in message
    warned.close()


@asynchronous
async def test_the_warning_points_at_the_line_of_an_async_caller(
    shop: Engine, async_engine: AsyncEngine
):
    """Out of the greenlet in which SQLAlchemy does the work."""
    sqla_signals.install()
    post_save.connect(row_saved, Order)
    async with async_sessionmaker(async_engine)() as session:
        with pytest.warns(BulkBypassWarning) as caught:  # noqa: PT031
            here = line()
            await session.execute(update(Order).values(status="x"))
            await session.scalars(update(Order).values(status="x").returning(Order.id))
    assert [(one.filename, one.lineno) for one in caught] == [
        (__file__, here + 1),
        (__file__, here + 2),
    ]


def test_the_default_filter_shows_the_warning_once_per_line(warned: Session):
    """As Python does with every warning."""
    post_save.connect(row_saved, Order)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warned.execute(update(Order).values(status="x"))
    assert len(caught) == 1
    warned.close()


@pytest.mark.parametrize(
    ("statement", "signal"),
    [
        (insert(Order).values(id=1), pre_save),
        (update(Order).values(status="x"), post_save),
        (delete(Order), post_delete),
        (update(Employee).values(name="x"), post_save),
    ],
    ids=["insert", "update", "delete", "base"],
)
@pytest.mark.parametrize("on", ["flush", "commit"])
def test_what_is_warned_of(warned: Session, statement: Any, signal: Any, on: Any):
    """Receivers of the rows that it may write, of subclasses too, in whatever phase."""
    if signal is pre_save and on == "commit":
        pytest.skip("there is no such phase")
    signal.connect(row_saved, [Order, Manager], on=on)
    with pytest.warns(BulkBypassWarning, match="row_saved"):
        warned.execute(statement)
    warned.close()


def test_what_is_not_warned_of(warned: Session):
    """Other receivers, other classes, muted ones, and where somebody hears of the statement."""
    warned.execute(update(Order).values(status="x"))
    post_delete.connect(row_saved, Order)
    post_save.connect(row_saved, Customer)
    warned.execute(update(Order).values(status="x"))
    post_save.connect(row_saved, Order)
    with mute(sender=Order):
        warned.execute(update(Order).values(status="x"))
    warned.execute(update(Order).values(status="x"), execution_options=SKIP)
    heard = Heard()
    post_bulk.connect(heard, Order, on="commit")
    warned.execute(update(Order).values(status="x"))
    warned.close()


def test_raise(session: Session):
    """With bulk="raise" the statement is not executed."""
    fill(session)
    post_save.connect(row_saved, Order)
    with pytest.raises(BulkBypassError, match="row_saved"):
        session.execute(update(Order).values(status="x"))
    assert witnessed(session) == []


def test_ignore(shop: Engine):
    """With bulk="ignore" nothing is said; the option "rows" works all the same."""
    sqla_signals.install(bulk="ignore")
    heard = Heard()
    post_save.connect(heard, Order)
    with Session(shop) as session:
        fill(session)
        session.execute(update(Order).values(status="x"))
        assert heard.calls == []
        session.execute(update(Order).values(status="y"), execution_options={"signals": "rows"})
        assert len(heard.calls) == 3


def test_the_closest_installation_decides(shop: Engine):
    """Of one for all sessions and one for a factory."""
    factory = sessionmaker(shop)
    sqla_signals.install(factory, bulk="ignore")
    sqla_signals.install(bulk="raise")
    post_save.connect(row_saved, Order)
    with factory() as session:
        session.execute(update(Order).values(status="x"))
    with Session(shop) as session, pytest.raises(BulkBypassError):
        session.execute(update(Order).values(status="x"))


def test_another_policy_is_refused():
    """The message says which there are."""
    with pytest.raises(InstallError, match=r"'loud'.*'warn'"):
        sqla_signals.install(bulk="loud")  # type: ignore[arg-type]


def test_options_that_make_no_sense_are_refused():
    """pre_bulk knows one phase, and neither of the two has fields."""
    with pytest.raises(ReceiverOptionError, match="'flush'"):
        pre_bulk.connect(row_saved, Order, on="commit")
    with pytest.raises(ReceiverOptionError, match="fields"):
        post_bulk.connect(row_saved, Order, fields={"status"})
    with pytest.raises(ReceiverOptionError, match="mapped class"):
        post_bulk.connect(row_saved, Order.__table__)


# -- what it costs -------------------------------------------------------------------------------


def calls_of(session: Session) -> int:
    """How many functions are called by one SELECT and one UPDATE, once the caches are full."""
    return min(_calls_of(session) for _ in range(10))


def _calls_of(session: Session) -> int:
    statements = (select(Order), update(Order).values(total=1))
    number = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal number
        number += event == "call"

    sys.setprofile(count)
    try:
        for statement in statements:
            session.execute(statement)
    finally:
        sys.setprofile(None)
    return number


def test_without_receivers_a_statement_costs_nothing(shop: Engine):
    """Not one function call more than without the library."""
    with Session(shop) as session:
        without = calls_of(session)
        installation = sqla_signals.install()
        sqla_signals.m2m_changed.connect(row_saved)
        assert calls_of(session) == without
        post_save.connect(row_saved, Customer)
        with_receivers = calls_of(session)
        assert with_receivers > without
        installation.remove()
        assert calls_of(session) == without

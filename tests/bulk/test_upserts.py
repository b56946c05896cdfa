"""``{"signals": "rows"}`` for upserts: which rows were created, and which were in the way."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, func, insert, inspect, literal, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_signals import UNSET, BulkOptionError, Change, pre_save
from tests.contract.observing import rows

from .shop import Heard, Order, witnessed
from .test_rows import ROWS, fill, told, updates, upsert


def upsert_by_number(session: Session) -> Any:
    """An upsert that takes over the status."""
    statement = upsert(session)
    return statement.on_conflict_do_update(
        index_elements=["number"], set_={"state": statement.excluded.state}
    )


def knows_afterwards(session: Session) -> bool:
    """Whether the database tells which rows it has created."""
    return session.get_bind().dialect.name == "postgresql"


def test_a_row_without_a_value_for_the_target_is_in_nobodys_way(session: Session):
    """The others of the list are looked up all the same."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        upsert_by_number(session),
        [{"id": 8, "number": 20, "status": "x"}, {"id": 9, "number": None, "status": "y"}],
        execution_options=ROWS,
    )
    assert told(session, heard) == [("insert", "9"), ("update", "2")]
    heard.clear()
    for one in ({"number": 30, "status": "x"}, {"id": 10, "status": "y"}):
        session.execute(upsert_by_number(session), [one], execution_options=ROWS)
    assert told(session, heard) == [("insert", "10"), ("update", "3")]


@pytest.mark.parametrize("given", ["select", "expression"])
def test_a_target_that_the_database_computes(session: Session, given: str):
    """Rows in the way cannot be found before; where nobody says so after, that is an error."""
    fill(session)
    heard = Heard().connect(Order)
    statement = upsert(session)
    if given == "select":
        query = select(Order.number, literal("x")).where(Order.id == 2)
        statement = statement.from_select(["number", "state"], query)
    else:
        statement = statement.values(number=func.abs(20), status="x")
    statement = statement.on_conflict_do_update(
        index_elements=["number"], set_={"state": statement.excluded.state}
    )
    if knows_afterwards(session):
        session.execute(statement, execution_options=ROWS)
        assert heard.rows("post") == witnessed(session) == updates(2)
        assert heard.of("post_save")[0]["changes"] == {"status": Change(UNSET, "x")}
    else:
        with pytest.raises(BulkOptionError, match="plain values for number"):
            session.execute(statement, execution_options=ROWS)
        assert witnessed(session) == heard.rows("pre") == []


def test_a_target_with_a_default(session: Session):
    """What the default will be is not known before either."""

    class OwnBase(DeclarativeBase):
        pass

    class Counter(OwnBase):
        __tablename__ = "counters"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True, default="all")
        value: Mapped[int]

    OwnBase.metadata.create_all(session.connection())
    session.execute(insert(Counter), [{"id": 1, "value": 1}])
    heard = Heard().connect(Counter)
    table: Any = Counter.__table__
    statement = upsert(session, Counter).values(value=2)
    statement = statement.on_conflict_do_update(index_elements=[table.c.name], set_={"value": 2})
    if knows_afterwards(session):
        session.execute(statement, execution_options=ROWS)
        assert heard.rows("post") == updates(1)
    else:
        with pytest.raises(BulkOptionError, match="plain values for name"):
            session.execute(statement, execution_options=ROWS)
        assert rows(session, Counter.value) == [1]


def test_a_primary_key_that_is_set_is_refused(session: Session):
    """As for an update: the row cannot be found again."""
    fill(session)
    heard = Heard().connect(Order)
    statement = upsert(session).values(id=77, number=20)
    statement = statement.on_conflict_do_update(
        index_elements=["number"], set_={"id": statement.excluded.id}
    )
    with pytest.raises(BulkOptionError, match="primary key"):
        session.execute(statement, execution_options=ROWS)
    assert witnessed(session) == heard.rows("pre") == []


def test_every_column_may_be_set_where_the_key_is_the_target(session: Session):
    """It is set to what it is."""
    fill(session)
    heard = Heard().connect(Order)
    statement = upsert(session).values(id=2, number=21, status="x", total=2, customer_id=1)
    statement = statement.on_conflict_do_update(
        index_elements=["id"], set_={column.name: column for column in statement.excluded}
    )
    session.execute(statement, execution_options=ROWS)
    assert told(session, heard) == updates(2)
    assert heard.of("post_save")[0]["changes"] == {
        "number": Change(20, 21),
        "status": Change("open", "x"),
    }


def test_a_row_that_the_statement_creates_and_updates_was_created(session: Session):
    """It is told of once. PostgreSQL refuses that, but for lists that SQLAlchemy splits."""
    heard = Heard().connect(Order)
    between = [{"id": key, "number": key} for key in range(2, 1100)]
    last = {"id": 2000, "number": 1, "status": "y"}
    session.execute(
        upsert_by_number(session),
        [{"id": 1, "number": 1, "status": "x"}, *between, last],
        execution_options=ROWS,
    )
    written = [("insert", str(one["id"])) for one in between] + [("insert", "1")]
    assert witnessed(session) == sorted([*written, ("update", "1")])
    assert heard.rows("post") == sorted(written)
    assert heard.of("post_save")[0]["seen"]["status"] == "y"


@pytest.mark.parametrize("how", ["inserts", "assigns"])
def test_a_pre_receiver_brings_a_row_into_the_way(session: Session, how: str):
    """By a row of its own, or by what it assigns: created is what the database does then."""
    fill(session)
    heard = Heard().connect(Order)

    def meddle(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is not pre_save:
            return
        if how == "inserts":
            row = insert(Order.__table__).values(id=60, number=90)
            kwargs["session"].connection().execute(row)
            witnessed(kwargs["session"])
        elif kwargs["created"]:
            kwargs["instance"].number = 20

    heard.meddle = meddle
    session.execute(
        upsert_by_number(session), [{"id": 8, "number": 90, "status": "x"}], execution_options=ROWS
    )
    expected = updates(60 if how == "inserts" else 2)
    assert heard.rows("post") == witnessed(session) == expected
    assert heard.of("post_save")[0]["changes"]["status"].new == "x"


def test_pending_changes_of_a_row_in_the_way_are_kept(session: Session):
    """Without autoflush they wait; what the statement has set is read."""
    fill(session)
    session.autoflush = False
    held = session.get(Order, 2)
    held.total = 99

    def meddle(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_save:
            kwargs["instance"].customer_id = 2

    heard = Heard(meddle=meddle).connect(Order)
    session.execute(
        upsert_by_number(session), [{"number": 20, "status": "x"}], execution_options=ROWS
    )
    assert told(session, heard) == updates(2)
    assert (held.status, held.total, held.customer_id) == ("x", 99, 2)
    assert inspect(held).attrs.total.history == ([99], (), [2])
    session.commit()
    found = session.execute(select(Order.status, Order.total, Order.customer_id).filter_by(id=2))
    assert found.one() == ("x", 99, 2)


class PartBase(DeclarativeBase):
    """The base of classes whose tables PostgreSQL keeps no ``xmax`` for."""


class Reading(PartBase):
    """In partitions."""

    __tablename__ = "readings"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str | None]
    __table_args__ = {"postgresql_partition_by": "RANGE (id)"}


class Viewed(PartBase):
    """A view of a table."""

    __tablename__ = "viewed"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str | None]


@pytest.fixture
def partitions(session: Session) -> Session:
    """A session with both, each with the rows 1 and 11."""
    if session.get_bind().dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has them")
    connection = session.connection()
    Reading.__table__.create(connection)  # type: ignore[attr-defined]
    for statement in (
        "CREATE TABLE early PARTITION OF readings FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE late PARTITION OF readings FOR VALUES FROM (10) TO (100)",
        "CREATE TABLE seen (id INTEGER PRIMARY KEY, text VARCHAR)",
        "CREATE VIEW viewed AS SELECT id, text FROM seen",
    ):
        connection.exec_driver_sql(statement)
    for cls in (Reading, Viewed):
        connection.execute(insert(cls.__table__), [{"id": 1, "text": "a"}, {"id": 11, "text": "a"}])
    session.commit()
    return session


@pytest.mark.parametrize("cls", [Reading, Viewed])
@pytest.mark.parametrize("target", [None, ["id"]])
def test_do_nothing_on_a_partitioned_table_or_a_view(partitions: Session, cls: Any, target: Any):
    """What is returned was inserted, so nothing else has to be asked."""
    heard = Heard().connect(cls)
    statement = postgresql.insert(cls).on_conflict_do_nothing(
        index_elements=target if cls is Reading else None
    )
    values = [{"id": 1, "text": "b"}, {"id": 12, "text": "b"}]
    partitions.execute(statement, values, execution_options=ROWS)
    assert heard.rows("post") == [("insert", "12")]
    assert rows(partitions, cls.id, cls.text) == [(1, "a"), (11, "a"), (12, "b")]


@pytest.mark.parametrize("cls", [Reading, Viewed])
def test_other_statements_on_a_partitioned_table_or_a_view(partitions: Session, cls: Any):
    """They are about rows as elsewhere."""
    heard = Heard().connect(cls)
    partitions.execute(insert(cls), [{"id": 2}, {"id": 12}], execution_options=ROWS)
    partitions.execute(update(cls).where(cls.id > 2).values(text="b"), execution_options=ROWS)
    partitions.execute(update(cls), [{"id": 1, "text": "c"}], execution_options=ROWS)
    partitions.execute(delete(cls).where(cls.id > 11), execution_options=ROWS)
    changed = [("delete", "12"), ("insert", "12"), ("insert", "2"), *updates(1, 11, 12)]
    assert heard.rows("post") == heard.rows("pre") == changed
    assert rows(partitions, cls.id, cls.text) == [(1, "c"), (11, "b"), (2, None)]


@pytest.mark.parametrize("values", [[{"id": 1, "text": "b"}], [{"id": 1}, {"id": 12}]], ids=str)
def test_an_upsert_that_updates_a_partitioned_table_is_refused(partitions: Session, values: Any):
    """PostgreSQL does not tell which rows of it were new."""
    heard = Heard().connect(Reading)
    statement = postgresql.insert(Reading).on_conflict_do_update(
        index_elements=["id"], set_={"text": "z"}
    )
    with pytest.raises(BulkOptionError, match=r"readings is partitioned.*post_bulk"):
        partitions.execute(statement, values, execution_options=ROWS)
    assert heard.calls == []
    assert rows(partitions, Reading.id, Reading.text) == [(1, "a"), (11, "a")]

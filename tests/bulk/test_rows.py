"""``{"signals": "rows"}``: the rows told of are just those that triggers saw."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    Integer,
    bindparam,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    mapped_column,
    with_loader_criteria,
)
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

import sqla_signals
from sqla_signals import UNSET, BulkOptionError, Change, post_save, pre_delete, pre_save
from tests.contract.observing import asynchronous, rows

from ..conftest import before_sqlalchemy
from .shop import (
    Clerk,
    Customer,
    Desk,
    Director,
    Employee,
    Heard,
    Manager,
    Order,
    Point,
    Seat,
    Stamped,
    witnessed,
)

ROWS: Any = {"signals": "rows"}


def fill(session: Session) -> None:
    """Five orders of two customers, committed; nothing of it is heard."""
    session.add_all([Customer(id=1, name="ada"), Customer(id=2, name="bob")])
    session.flush()
    session.add_all(
        [
            Order(id=key, number=key * 10, status="open", total=key, customer_id=1 + key % 2)
            for key in range(1, 6)
        ]
    )
    session.commit()
    witnessed(session)
    session.commit()


def told(session: Session, heard: Heard, *tables: str) -> list[tuple[str, str]]:
    """What was told of before and after, which must be what the triggers saw."""
    seen = witnessed(session, *tables)
    assert heard.rows("post") == seen
    assert heard.rows("pre") == seen
    return seen


def updates(*keys: int) -> list[tuple[str, str]]:
    return [("update", str(key)) for key in keys]


# -- update --------------------------------------------------------------------------------------


SYNCHRONIZE = ["auto", "evaluate", "fetch", False]


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "unloaded"])
def test_update(session: Session, synchronize: Any, loaded: bool):
    """Each matched row has its pre_save and post_save, with the old and the new value."""
    fill(session)
    held = session.scalars(select(Order)).all() if loaded else []
    heard = Heard().connect(Order)
    result = session.execute(
        update(Order).where(Order.id > 3).values(status="paid"),
        execution_options={**ROWS, "synchronize_session": synchronize},
    )
    assert result.rowcount == 2
    assert told(session, heard) == updates(4, 5)
    for call in [*heard.of("pre_save"), *heard.of("post_save")]:
        assert call["changes"] == {"status": Change("open", "paid")}
        assert call["update_fields"] == {"status"}
        assert call["created"] is False
        assert call["raw"] is False
        assert call["using"] is session.bind
        assert call["session"] is session
        assert call["sender"] is Order
    assert [call["seen"]["status"] for call in heard.of("post_save")] == ["paid", "paid"]
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 2"]
    assert all(session.get(Order, order.id) is order for order in held)
    assert rows(session, Order.status) == ["open"] * 3 + ["paid"] * 2


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
def test_update_with_an_expression(session: Session, synchronize: Any):
    """What the database computes is not known before, and is read for after."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.id == 2).values(total=Order.total * 10, status="x"),
        execution_options={**ROWS, "synchronize_session": synchronize},
    )
    assert told(session, heard) == updates(2)
    (before,), (after,) = heard.of("pre_save"), heard.of("post_save")
    assert before["changes"] == {"total": Change(2, UNSET), "status": Change("open", "x")}
    assert after["changes"] == {"total": Change(2, 20), "status": Change("open", "x")}
    assert after["seen"]["total"] == 20


@pytest.mark.parametrize("assigned", [99, 1], ids=["another", "the same"])
def test_pending_changes_of_a_row_that_is_set_behind_their_back(session: Session, assigned: int):
    """Where nothing is flushed before nor synchronized, they stay, and are written over it."""
    fill(session)
    held = session.get(Order, 1)
    held.total = 7
    held.total = assigned
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.id == 1).values(total=50, status="x"),
        execution_options={**ROWS, "synchronize_session": False, "autoflush": False},
    )
    assert told(session, heard) == updates(1)
    assert (held.total, held.status) == (assigned, "x")
    heard.clear()
    session.flush()
    assert told(session, heard) == updates(1)
    assert heard.of("post_save")[0]["changes"] == {"total": Change(50, assigned)}
    assert session.scalars(select(Order.total).where(Order.id == 1)).one() == assigned


def test_update_that_matches_nothing(session: Session):
    """No row, no signal of rows; the statement itself is told of."""
    fill(session)
    heard = Heard().connect(Order)
    result = session.execute(
        update(Order).where(Order.id > 99).values(status="x"), execution_options=ROWS
    )
    assert result.rowcount == 0
    assert told(session, heard) == []
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 0"]


def test_update_to_the_value_that_is_there(session: Session):
    """The row gets an UPDATE, so it was saved; nothing has changed."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.id == 1).values(status="open"), execution_options=ROWS
    )
    assert told(session, heard) == updates(1)
    (call,) = heard.of("post_save")
    assert call["changes"] == {}
    assert call["update_fields"] == {"status"}


def test_fields_choose_by_what_has_changed(session: Session):
    """A receiver with fields= hears only of rows in which one of them has changed."""
    fill(session)
    session.execute(update(Order).where(Order.id == 1).values(status="paid"))
    heard = Heard()
    post_save.connect(heard, Order, fields={"status"})
    session.execute(update(Order).values(status="paid", total=0), execution_options=ROWS)
    assert [key for _, key in heard.rows("post")] == ["2", "3", "4", "5"]


def test_update_with_a_condition_on_another_table(session: Session):
    """Joined with another table, a row is told of once."""
    fill(session)
    session.add_all([Customer(id=3, name="ada"), Customer(id=4, name="ada")])
    session.flush()
    witnessed(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order)
        .where(Order.customer_id <= Customer.id, Customer.name == "ada", Order.total > 2)
        .values(status="paid"),
        execution_options={**ROWS, "synchronize_session": False},
    )
    assert told(session, heard) == updates(3, 4, 5)


def test_update_with_a_subquery(session: Session):
    """A condition that selects."""
    fill(session)
    heard = Heard().connect(Order)
    ada = select(Customer.id).where(Customer.name == "ada").scalar_subquery()
    session.execute(
        update(Order).where(Order.customer_id == ada).values(status="x"), execution_options=ROWS
    )
    assert told(session, heard) == updates(2, 4)


# Before 2.0.21 SQLAlchemy names the table beside its alias, and warns of that.
on_an_alias = pytest.mark.skipif(
    before_sqlalchemy("2.0.21"), reason="SQLAlchemy updates no alias without a warning"
)


@on_an_alias
def test_update_of_an_alias(session: Session):
    """An alias stands for its class."""
    fill(session)
    heard = Heard().connect(Order)
    other = aliased(Order)
    session.execute(
        update(other).where(other.id == 2).values(status="x"),
        execution_options={**ROWS, "synchronize_session": False},
    )
    assert told(session, heard) == updates(2)


@on_an_alias
@pytest.mark.parametrize("how", ["values", "ordered", "expression", "column", "name"])
def test_an_update_of_an_alias_tells_what_it_sets(session: Session, how: str):
    """By attributes of the alias, by columns of its table, or by name."""
    fill(session)
    heard = Heard().connect(Order)
    chosen = Heard()
    post_save.connect(chosen, Order, fields={"status"}, weak=False)
    other = aliased(Order)
    statement: Any = update(other).where(other.id == 2)
    statement = {
        "values": statement.values({other.status: "x"}),
        "ordered": statement.ordered_values((other.status, "x")),
        "expression": statement.values({other.status: func.substr("wxyz", 2, 1)}),
        "column": statement.values({inspect(other).selectable.c.state: "x"}),
        "name": statement.values(status="x"),
    }[how]
    options = {**ROWS, "synchronize_session": False}
    session.execute(statement, execution_options=options)
    assert told(session, heard) == updates(2)
    assert heard.of("post_save")[0]["changes"] == {"status": Change("open", "x")}
    assert heard.of("post_save")[0]["update_fields"] == {"status"}
    assert len(chosen.calls) == 1
    assert rows(session, Order.status) == ["open", "open", "open", "open", "x"]


def test_an_update_of_the_primary_key_of_an_alias_is_refused(session: Session):
    """As without an alias."""
    fill(session)
    heard = Heard().connect(Order)
    other = aliased(Order)
    with pytest.raises(BulkOptionError, match="primary key"):
        session.execute(
            update(other).where(other.id == 1).values({other.id: 99}), execution_options=ROWS
        )
    assert witnessed(session) == heard.rows("pre") == []


def test_update_of_a_part_of_a_value(session: Session):
    """An element of an array of PostgreSQL: what becomes of the whole is not known before."""
    if session.get_bind().dialect.name != "postgresql":
        pytest.skip("only PostgreSQL assigns to a subscript")

    class OwnBase(DeclarativeBase):
        pass

    class Board(OwnBase):
        __tablename__ = "boards"
        id: Mapped[int] = mapped_column(primary_key=True)
        scores: Mapped[list[int]] = mapped_column(postgresql.ARRAY(Integer))

    OwnBase.metadata.create_all(session.connection())
    session.add(Board(id=1, scores=[1, 2]))
    session.flush()
    heard = Heard().connect(Board)
    session.execute(update(Board).values({Board.scores[1]: 7}), execution_options=ROWS)
    assert [call["changes"] for call in heard.of("pre_save")] == [{"scores": Change([1, 2], UNSET)}]
    assert [call["changes"] for call in heard.of("post_save")] == [
        {"scores": Change([1, 2], [7, 2])}
    ]
    assert session.scalars(select(Board.scores)).all() == [[7, 2]]


def test_update_with_parameters(session: Session):
    """Values and bound parameters given to execute()."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.id == bindparam("key")).values(status=bindparam("new")),
        {"key": 2, "new": "x"},
        execution_options={**ROWS, "synchronize_session": False},
    )
    assert told(session, heard) == updates(2)
    assert heard.of("post_save")[0]["changes"] == {"status": Change("open", "x")}


def test_update_with_ordered_values(session: Session):
    """``ordered_values()`` sets as ``values()`` does."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.id == 2).ordered_values((Order.status, "x"), (Order.total, 5)),
        execution_options=ROWS,
    )
    assert told(session, heard) == updates(2)
    assert heard.of("post_save")[0]["update_fields"] == {"status", "total"}


def test_update_with_returning(session: Session):
    """The caller gets what they asked for."""
    fill(session)
    heard = Heard().connect(Order)
    statement = update(Order).where(Order.id < 3).values(status="x").returning(Order.id, Order)
    found = session.execute(statement, execution_options=ROWS).all()
    assert sorted(row[0] for row in found) == [1, 2]
    assert all(row[1] is session.get(Order, row[0]) for row in found)
    assert told(session, heard) == updates(1, 2)


def test_update_with_loader_criteria(session: Session):
    """Options that restrict the statement restrict the rows told of."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).values(status="x").options(with_loader_criteria(Order, Order.total == 3)),
        execution_options=ROWS,
    )
    assert told(session, heard) == updates(3)


def test_query_update_and_delete(session: Session):
    """The legacy methods take the execution option too."""
    fill(session)
    heard = Heard().connect(Order)
    query = session.query(Order).execution_options(**ROWS)
    assert query.filter(Order.id > 3).update({"status": "x"}) == 2
    assert told(session, heard) == updates(4, 5)
    heard.clear()
    assert query.filter(Order.id > 3).delete() == 2
    assert told(session, heard) == [("delete", "4"), ("delete", "5")]
    assert heard.statements == ["pre_bulk delete Order", "post_bulk delete Order 2"]


def test_update_writes_onupdate_columns_along(session: Session):
    """A Python-side onupdate is among the fields and the changes."""
    session.add(Stamped(id=1, name="a"))
    session.commit()
    witnessed(session)
    heard = Heard().connect(Stamped)
    session.execute(update(Stamped).values(name="b"), execution_options=ROWS)
    assert told(session, heard) == updates(1)
    (call,) = heard.of("post_save")
    assert call["update_fields"] == {"name", "writes"}
    assert call["changes"] == {"name": Change("a", "b"), "writes": Change(0, 7)}


@on_an_alias
def test_update_of_an_alias_writes_no_onupdate_columns(session: Session):
    """SQLAlchemy leaves them alone then, and so they are not among the fields."""
    session.add(Stamped(id=1, name="a"))
    session.commit()
    heard = Heard().connect(Stamped)
    witnessed(session)
    session.execute(update(aliased(Stamped)).values(name="b"), execution_options=ROWS)
    assert told(session, heard) == updates(1)
    assert heard.of("post_save")[0]["update_fields"] == {"name"}
    assert rows(session, Stamped.writes) == [0]


def test_update_of_a_primary_key_is_refused(session: Session):
    """Rows whose key changes cannot be found again."""
    fill(session)
    heard = Heard().connect(Order)
    with pytest.raises(BulkOptionError, match="primary key"):
        session.execute(update(Order).where(Order.id == 1).values(id=99), execution_options=ROWS)
    assert witnessed(session) == heard.rows("pre") == []


def test_a_key_of_several_columns(session: Session):
    """Update, delete and insert."""
    heard = Heard().connect(Seat)
    session.execute(
        insert(Seat), [{"row": 1, "number": n} for n in (1, 2, 3)], execution_options=ROWS
    )
    assert told(session, heard) == [("insert", f"1 {n}") for n in (1, 2, 3)]
    heard.clear()
    session.execute(update(Seat).where(Seat.number > 1).values(taken="x"), execution_options=ROWS)
    assert told(session, heard) == [("update", "1 2"), ("update", "1 3")]
    heard.clear()
    session.execute(delete(Seat).where(Seat.taken == "x"), execution_options=ROWS)
    assert told(session, heard) == [("delete", "1 2"), ("delete", "1 3")]


def test_more_rows_than_a_statement_takes_parameters(session: Session):
    """The keys are written into the statement then."""
    session.execute(insert(Order), [{"id": key, "status": "open"} for key in range(1, 2501)])
    witnessed(session)
    heard = Heard().connect(Order)
    bound: list[int] = []

    def before(conn: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        bound.append(len(parameters))

    event.listen(session.get_bind(), "before_cursor_execute", before)
    session.execute(update(Order).values(status="x"), execution_options=ROWS)
    assert max(bound) < 100
    assert len(told(session, heard)) == 2500


# -- update by primary key -----------------------------------------------------------------------


def test_update_by_primary_key(session: Session):
    """A list of parameters: each row with its own values."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order),
        [{"id": 1, "status": "a"}, {"id": 2, "status": "b", "total": 9}],
        execution_options=ROWS,
    )
    assert told(session, heard) == updates(1, 2)
    assert [call["changes"] for call in heard.of("post_save")] == [
        {"status": Change("open", "a")},
        {"status": Change("open", "b"), "total": Change(2, 9)},
    ]
    assert [call["update_fields"] for call in heard.of("post_save")] == [
        {"status"},
        {"status", "total"},
    ]
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 2"]


def test_update_by_primary_key_of_a_missing_row(session: Session):
    """As without signals: an error, before anything is written."""
    fill(session)
    heard = Heard().connect(Order)
    with pytest.raises(StaleDataError):
        session.execute(
            update(Order),
            [{"id": 1, "status": "a"}, {"id": 99, "status": "b"}],
            execution_options=ROWS,
        )
    assert heard.rows("post") == witnessed(session) == []


def test_update_by_primary_key_of_one_row_twice(session: Session):
    """Both are executed, and the row is told of once, with what both have changed."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order),
        [{"id": 1, "total": 7}, {"id": 2, "total": 8}, {"id": 1, "status": "paid"}],
        execution_options=ROWS,
    )
    assert heard.rows("pre") == heard.rows("post") == updates(1, 2)
    assert set(witnessed(session)) == set(updates(1, 2))
    changes = heard.of("post_save")[0]["changes"]
    assert changes == {"total": Change(1, 7), "status": Change("open", "paid")}
    assert session.execute(
        select(Order.total, Order.status).where(Order.id < 3).order_by(Order.id)
    ).all() == [
        (7, "paid"),
        (8, "open"),
    ]


def test_update_by_primary_key_of_nothing_but_the_key(session: Session):
    """Where there is nothing to set SQLAlchemy executes nothing, and nothing is told."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(update(Order), [{"id": 1}, {"id": 2, "total": 7}], execution_options=ROWS)
    assert told(session, heard) == updates(2)


def test_update_by_primary_key_with_other_names(session: Session):
    """What is no column attribute is left out by SQLAlchemy, and so it is here."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(update(Order), [{"id": 1, "total": 7, "comment": "x"}], execution_options=ROWS)
    assert told(session, heard) == updates(1)
    assert heard.of("post_save")[0]["update_fields"] == {"total"}


def test_update_by_primary_key_without_the_key(session: Session):
    """Refused by SQLAlchemy in its own words; nothing is told."""
    fill(session)
    heard = Heard().connect(Order)
    with pytest.raises(InvalidRequestError, match="No primary key value supplied"):
        session.execute(update(Order), [{"total": 7}], execution_options=ROWS)
    assert told(session, heard) == []


def test_update_by_primary_key_with_a_condition(session: Session):
    """Rows that do not meet it are neither changed nor told of."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.total > 1),
        [{"id": 1, "status": "a"}, {"id": 2, "status": "b"}, {"id": 99, "status": "c"}],
        execution_options={**ROWS, "synchronize_session": None},
    )
    assert told(session, heard) == updates(2)


@pytest.mark.parametrize("strategy", ["orm", "core_only"])
def test_a_list_of_parameters_that_is_not_by_primary_key_is_refused(
    session: Session, strategy: str
):
    """SQLAlchemy would execute it once for each, with rows that nobody has looked up."""
    fill(session)
    heard = Heard().connect(Order)
    statement = update(Order).where(Order.number == bindparam("nr")).values(total=bindparam("new"))
    options: Any = {"dml_strategy": strategy, "synchronize_session": False}
    parameters = [{"nr": 10, "new": 7}, {"nr": 20, "new": 8}]
    with pytest.raises(BulkOptionError, match="list of parameters"):
        session.execute(statement, parameters, execution_options={**options, **ROWS})
    assert witnessed(session) == heard.rows("pre") == []
    session.execute(statement, parameters, execution_options=options)
    assert witnessed(session) == updates(1, 2)
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 2"]


def test_update_by_primary_key_with_a_parameter_in_its_condition_is_refused(session: Session):
    """Each row would have a condition of its own."""
    fill(session)
    heard = Heard().connect(Order)
    statement = update(Order).where(Order.total >= bindparam("least"))
    with pytest.raises(BulkOptionError, match=r"bindparam\(\)"):
        session.execute(
            statement,
            [{"id": 1, "status": "a", "least": 1}, {"id": 2, "status": "b", "least": 3}],
            execution_options={**ROWS, "synchronize_session": None},
        )
    assert witnessed(session) == heard.rows("pre") == []


def test_a_pre_receiver_assigns_to_a_column_of_a_composite(session: Session):
    """Which was given as a whole."""
    heard = Heard().connect(Desk)

    def move(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_save:
            assert kwargs["instance"].y == 3
            kwargs["instance"].y = 9

    heard.meddle = move
    session.execute(insert(Desk), [{"id": 1, "place": Point(1, 3)}], execution_options=ROWS)
    assert told(session, heard) == [("insert", "1")]
    assert rows(session, Desk.__table__.c.x, Desk.__table__.c.y) == [(1, 9)]


@pytest.mark.parametrize("how", ["values", "attribute", "list"])
@pytest.mark.parametrize("operation", ["insert", "update"])
def test_a_composite_is_told_of_by_its_columns(session: Session, operation: str, how: str):
    """However it is given; in pre_save too."""
    if operation == "update":
        session.add(Desk(id=1, place=Point(1, 2)))
        session.commit()
        witnessed(session)
    statement: Any = insert(Desk) if operation == "insert" else update(Desk)
    parameters = None
    if how == "list":
        parameters = [{"id": 1, "place": Point(1, 3)}]
    else:
        place = "place" if how == "values" else Desk.place
        key = {"id": 1} if operation == "insert" else {}
        statement = statement.values({place: Point(1, 3), **key})
    heard = Heard().connect(Desk)
    session.execute(statement, parameters, execution_options=ROWS)
    assert told(session, heard) == [(operation, "1")]
    before, after = (heard.of(name)[0]["changes"] for name in ("pre_save", "post_save"))
    expected = Change(UNSET if operation == "insert" else 2, 3)
    assert before["y"] == expected
    assert after["y"] == expected
    assert session.get(Desk, 1).place == Point(1, 3)


@pytest.mark.parametrize("many", [False, True], ids=["one", "list"])
def test_values_by_the_names_of_columns(session: Session, many: bool):
    """As SQLAlchemy takes them; a column that belongs to no attribute is written unheard."""
    heard = Heard().connect(Desk)
    given: Any = {"id": 1, "name": "a", "legacy": "x", "x": 1, "y": 2}
    statement = insert(Desk).values([given] if many else given)
    session.execute(statement, execution_options=ROWS)
    assert told(session, heard) == [("insert", "1")]
    assert heard.of("pre_save")[0]["changes"]["label"] == Change(UNSET, "a")
    heard.clear()
    session.execute(
        update(Desk).values(name="b", legacy="y"),
        execution_options={**ROWS, "synchronize_session": False},
    )
    assert told(session, heard) == updates(1)
    assert heard.of("post_save")[0]["changes"] == {"label": Change("a", "b")}
    assert session.scalars(select(Desk.__table__.c.legacy)).all() == ["y"]


# -- delete --------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "unloaded"])
def test_delete(session: Session, synchronize: Any, loaded: bool):
    """Each deleted row has its pre_delete and post_delete, and can be read."""
    fill(session)
    if loaded:
        for order in session.scalars(select(Order)):
            session.expire(order, ["status"])
    heard = Heard().connect(Order)
    result = session.execute(
        delete(Order).where(Order.id > 3),
        execution_options={**ROWS, "synchronize_session": synchronize},
    )
    assert result.rowcount == 2
    assert told(session, heard) == [("delete", "4"), ("delete", "5")]
    for call in heard.of("post_delete"):
        assert call["seen"]["status"] == "open"
        assert call["origin"] is None
        assert call["using"] is session.bind
    assert heard.statements == ["pre_bulk delete Order", "post_bulk delete Order 2"]
    assert rows(session, Order.id) == [1, 2, 3]


def test_delete_with_a_condition_on_another_table(session: Session):
    """Of another table, by a subquery."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        delete(Order).where(
            Order.customer_id.in_(select(Customer.id).where(Customer.name == "bob"))
        ),
        execution_options=ROWS,
    )
    assert told(session, heard) == [("delete", "1"), ("delete", "3"), ("delete", "5")]


def test_delete_with_another_table_beside_it(session: Session):
    """``DELETE … USING``: joined with it, a row is told of once."""
    if session.get_bind().dialect.name == "sqlite":
        pytest.skip("SQLite has no USING")
    fill(session)
    session.add(Customer(id=3, name="bob"))
    session.flush()
    witnessed(session)
    heard = Heard().connect(Order)
    session.execute(
        delete(Order).where(Order.customer_id <= Customer.id, Customer.name == "bob"),
        execution_options={**ROWS, "synchronize_session": "fetch"},
    )
    assert told(session, heard) == [("delete", str(key)) for key in range(1, 6)]


def test_delete_with_returning(session: Session):
    """The caller gets the rows."""
    fill(session)
    heard = Heard().connect(Order)
    found = session.execute(
        delete(Order).where(Order.id < 3).returning(Order.id), execution_options=ROWS
    )
    assert sorted(found.scalars()) == [1, 2]
    assert told(session, heard) == [("delete", "1"), ("delete", "2")]


# -- insert --------------------------------------------------------------------------------------


def test_insert_with_a_list(session: Session):
    """Each row has its pre_save, with the values given, and its post_save, with all."""
    heard = Heard().connect(Order)
    session.execute(
        insert(Order), [{"id": 1, "status": "a"}, {"id": 2, "total": 5}], execution_options=ROWS
    )
    assert told(session, heard) == [("insert", "1"), ("insert", "2")]
    before, after = heard.of("pre_save"), heard.of("post_save")
    assert [call["changes"] for call in before] == [
        {"id": Change(UNSET, 1), "status": Change(UNSET, "a")},
        {"id": Change(UNSET, 2), "total": Change(UNSET, 5)},
    ]
    assert after[0]["changes"]["status"] == Change(UNSET, "a")
    assert after[0]["changes"]["total"] == Change(UNSET, None)
    assert {call["update_fields"] for call in (*before, *after)} == {None}
    assert after[0]["instance"] is session.get(Order, 1)
    assert heard.statements == ["pre_bulk insert Order", "post_bulk insert Order 2"]


def test_insert_with_generated_keys(session: Session):
    """Keys that the database generates are there in post_save."""
    heard = Heard().connect(Order)
    session.execute(insert(Order), [{"status": "a"}, {"status": "b"}], execution_options=ROWS)
    assert heard.rows("post") == witnessed(session) == [("insert", "1"), ("insert", "2")]
    assert [call["seen"].get("id") for call in heard.of("pre_save")] == [None, None]


@pytest.mark.parametrize(
    "statement",
    [
        insert(Order).values(id=1, status="a"),
        insert(Order).values([{"id": 1, "status": "a"}]),
        insert(Order).values({Order.id: 1, Order.status: "a"}),
        insert(Order).values(id=1, status=func.lower("A")),
    ],
    ids=["values", "list", "attributes", "expression"],
)
def test_insert_with_values(session: Session, statement: Any):
    """However the values are given."""
    heard = Heard().connect(Order)
    result = session.execute(statement, execution_options=ROWS)
    assert result.rowcount == 1
    assert told(session, heard) == [("insert", "1")]
    assert heard.of("post_save")[0]["changes"]["status"] == Change(UNSET, "a")


def test_insert_with_returning(session: Session):
    """The caller gets what they asked for, as often as rows."""
    heard = Heard().connect(Order)
    result = session.execute(
        insert(Order).returning(Order.status, Order),
        [{"id": 1, "status": "a"}, {"id": 2, "status": "b"}],
        execution_options=ROWS,
    )
    found = result.all()
    assert [row.status for row in found] == ["a", "b"]
    assert [row.Order for row in found] == [session.get(Order, 1), session.get(Order, 2)]
    assert told(session, heard) == [("insert", "1"), ("insert", "2")]
    scalars = session.scalars(
        insert(Order).values(id=3).returning(Order), execution_options=ROWS
    ).all()
    assert scalars == [session.get(Order, 3)]


def test_insert_from_select(session: Session):
    """What rows it will insert is not known before; after it they are told of."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        insert(Order).from_select(["id", "state"], select(Order.id + 10, Order.status)),
        execution_options=ROWS,
    )
    assert heard.rows("pre") == []
    assert heard.rows("post") == witnessed(session)
    assert len(heard.rows("post")) == 5


def upsert(session: Session, cls: Any = Order) -> Any:
    """The insert() of the dialect."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    return dialect.insert(cls)


def test_upsert_that_updates(session: Session):
    """Rows that are in the way are updated and say so, the others are created."""
    fill(session)
    held = session.get(Order, 2)
    heard = Heard().connect(Order)
    statement = upsert(session)
    statement = statement.on_conflict_do_update(
        index_elements=["number"], set_={"state": statement.excluded.state}
    )
    session.execute(
        statement,
        [{"id": 8, "number": 20, "status": "x"}, {"id": 9, "number": 90, "status": "y"}],
        execution_options=ROWS,
    )
    assert told(session, heard) == [("insert", "9"), ("update", "2")]
    (updated,) = [call for call in heard.of("post_save") if not call["created"]]
    assert updated["instance"] is held
    assert updated["changes"] == {"status": Change("open", "x")}
    assert updated["update_fields"] == {"status"}
    assert updated["seen"]["status"] == "x"
    assert heard.statements[1] == "post_bulk insert Order 2"


def test_upsert_that_does_nothing(session: Session):
    """Rows that are in the way are left alone, and not told of."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        upsert(session).on_conflict_do_nothing(index_elements=["number"]),
        [{"id": 8, "number": 20}, {"id": 9, "number": 90}],
        execution_options=ROWS,
    )
    assert told(session, heard) == [("insert", "9")]
    assert heard.statements[1] == "post_bulk insert Order 1"


def test_upsert_with_values_and_returning(session: Session):
    """One row, given in values()."""
    fill(session)
    heard = Heard().connect(Order)
    statement = upsert(session).values(number=20, status="x")
    statement = statement.on_conflict_do_update(
        index_elements=[Order.number], set_={"state": "y"}
    ).returning(Order.id)
    assert session.execute(statement, execution_options=ROWS).scalar_one() == 2
    assert told(session, heard) == updates(2)


def test_upsert_without_a_target(session: Session):
    """PostgreSQL demands one for an update; where it is optional, the error says to give it."""
    fill(session)
    heard = Heard().connect(Order)
    if session.get_bind().dialect.name == "sqlite":
        statement = upsert(session).values(number=20).on_conflict_do_update(set_={"state": "y"})
        with pytest.raises(BulkOptionError, match="index_elements"):
            session.execute(statement, execution_options=ROWS)
        assert witnessed(session) == []
        heard.clear()
    session.execute(
        upsert(session).on_conflict_do_nothing(),
        [{"id": 8, "number": 20}, {"id": 9, "number": 90}],
        execution_options=ROWS,
    )
    assert heard.rows("post") == witnessed(session) == [("insert", "9")]


def test_insert_of_a_row_that_the_session_still_holds(session: Session):
    """Deleted behind its back; the values told of are those of the new row."""
    fill(session)
    held = session.get(Order, 1)
    session.connection().execute(delete(Order.__table__).where(Order.__table__.c.id == 1))
    witnessed(session)
    heard = Heard().connect(Order)
    session.execute(insert(Order), [{"id": 1, "status": "new"}], execution_options=ROWS)
    assert told(session, heard) == [("insert", "1")]
    assert heard.of("post_save")[0]["changes"]["status"] == Change(UNSET, "new")
    assert (held.status, held.total) == ("new", None)


# -- inheritance ---------------------------------------------------------------------------------


def staff(session: Session) -> None:
    """One of each."""
    session.add_all(
        [
            Employee(id=1, name="e"),
            Manager(id=2, name="m", budget=1),
            Clerk(id=3, name="c"),
            Manager(id=4, name="n", budget=2),
        ]
    )
    session.commit()
    witnessed(session)
    session.commit()


def test_update_of_the_base_of_a_hierarchy(session: Session):
    """Each instance is told of as what it is."""
    staff(session)
    heard = Heard().connect()
    session.execute(update(Employee).values(name="x"), execution_options=ROWS)
    assert told(session, heard) == updates(1, 2, 3, 4)
    assert [call["sender"] for call in heard.of("post_save")] == [
        Employee,
        Manager,
        Clerk,
        Manager,
    ]
    assert {type(call["instance"]) is call["sender"] for call in heard.of("post_save")} == {True}


def test_update_of_a_joined_subclass(session: Session):
    """Of the table that it writes."""
    staff(session)
    heard = Heard().connect(Manager)
    session.execute(update(Manager).where(Manager.id == 4).values(budget=9), execution_options=ROWS)
    assert told(session, heard) == updates(4)
    assert heard.of("post_save")[0]["changes"] == {"budget": Change(2, 9)}


def test_update_of_a_single_table_subclass(session: Session):
    """Rows of other classes in the same table are not touched."""
    staff(session)
    heard = Heard().connect(Employee, propagate=True)
    session.execute(update(Clerk).values(name="x"), execution_options=ROWS)
    assert told(session, heard) == updates(3)


def test_update_by_primary_key_of_a_joined_subclass(session: Session):
    """It writes both tables: one event."""
    staff(session)
    heard = Heard().connect(Manager)
    session.execute(update(Manager), [{"id": 2, "name": "x", "budget": 9}], execution_options=ROWS)
    assert told(session, heard, "managers") == updates(2)
    assert heard.of("post_save")[0]["changes"] == {
        "name": Change("m", "x"),
        "budget": Change(1, 9),
    }


def test_insert_of_a_joined_subclass(session: Session):
    """It writes both tables: one event."""
    heard = Heard().connect(Manager)
    session.execute(
        insert(Manager),
        [{"id": 1, "name": "a", "budget": 1}, {"id": 2, "name": "b", "budget": 2}],
        execution_options=ROWS,
    )
    assert told(session, heard, "managers") == [("insert", "1"), ("insert", "2")]
    assert [call["instance"].budget for call in heard.of("post_save")] == [1, 2]


def test_insert_of_a_joined_subclass_whose_key_has_another_name(session: Session):
    """Three tables, one event; RETURNING Director.id is more than SQLAlchemy knows to do."""
    heard = Heard().connect(Director)
    own = {"name": "d", "budget": 1, "title": "t"}
    session.execute(insert(Director), [{"id": 1, **own}, {"id": 2, **own}], execution_options=ROWS)
    assert told(session, heard, "directors") == [("insert", "1"), ("insert", "2")]
    assert [call["instance"].budget for call in heard.of("post_save")] == [1, 1]
    session.add(Manager(id=3, name="m", budget=3))
    session.commit()
    witnessed(session)
    heard.clear()
    # With values() it writes the last table only, of an instance that is there; SQLAlchemy's way.
    session.connection().execute(
        update(Employee.__table__).where(Employee.__table__.c.id == 3).values(kind="director")
    )
    session.expunge_all()
    session.execute(insert(Director).values(id=3, title="t"), execution_options=ROWS)
    assert told(session, heard, "directors") == [("insert", "3")]


def test_delete_of_the_base_of_a_hierarchy(session: Session):
    """The rows of the joined table go by ON DELETE CASCADE; one event for each instance."""
    staff(session)
    heard = Heard().connect()
    session.execute(delete(Employee).where(Employee.id < 3), execution_options=ROWS)
    assert told(session, heard, "employees") == [("delete", "1"), ("delete", "2")]
    assert [call["sender"] for call in heard.of("post_delete")] == [Employee, Manager]


# -- in between ----------------------------------------------------------------------------------


def test_rows_inserted_in_between_by_another_connection(shop: Engine):
    """A row that would match but came after the rows were looked up stays as it is."""
    installation = sqla_signals.install(bulk="raise")
    inserted = threading.Event()

    def insert_another() -> None:
        with shop.connect() as connection:
            connection.execute(insert(Order.__table__).values(id=77, number=77, state="open"))
            connection.commit()
        inserted.set()

    with Session(shop) as session:
        fill(session)
        heard = Heard().connect(Order)

        def in_between(sender: Any, signal: Any, **kwargs: Any) -> None:
            if signal is pre_save and not inserted.is_set():
                thread = threading.Thread(target=insert_another)
                thread.start()
                thread.join()

        if shop.dialect.name == "postgresql":
            heard.meddle = in_between  # SQLite has locked the whole database by then
        session.execute(
            update(Order).where(Order.status == "open").values(status="x"), execution_options=ROWS
        )
        seen = [one for one in witnessed(session) if one[0] == "update"]
        assert heard.rows("pre") == heard.rows("post") == seen == updates(1, 2, 3, 4, 5)
        session.commit()
        if shop.dialect.name == "postgresql":
            assert session.get(Order, 77).status == "open"
    installation.remove()


@pytest.mark.parametrize("operation", ["update", "delete"])
@pytest.mark.parametrize("returning", [False, True], ids=["plain", "returning"])
def test_rows_that_match_no_longer_when_the_statement_is_executed(
    shop: Engine, operation: str, returning: bool
):
    """The rows are locked, but not those of another table in the condition."""
    if shop.dialect.name == "sqlite":
        pytest.skip("SQLite has locked the whole database by then")
    sqla_signals.install(bulk="raise")
    customers: Any = Customer.__table__
    renamed = threading.Event()

    def rename() -> None:
        with shop.begin() as connection:
            connection.execute(update(customers).where(customers.c.id == 1).values(name="zoe"))
        renamed.set()

    def before(conn: Any, cursor: Any, statement: str, *more: Any) -> None:
        is_it = statement.startswith(("UPDATE orders", "DELETE FROM orders"))
        if is_it and not renamed.is_set():
            thread = threading.Thread(target=rename)
            thread.start()
            thread.join()

    with Session(shop) as session:
        fill(session)
        heard = Heard().connect(Order)
        of_ada = select(Customer.id).where(Customer.name == "ada")
        condition = Order.customer_id.in_(of_ada) | (Order.id == 5)
        statement: Any = (
            update(Order).values(status="x") if operation == "update" else delete(Order)
        )
        statement = statement.where(condition)
        event.listen(shop, "before_cursor_execute", before)
        if returning:
            result = session.execute(statement.returning(Order.id), execution_options=ROWS)
            assert result.scalars().all() == [5]
        else:
            assert session.execute(statement, execution_options=ROWS).rowcount == 1
        assert renamed.is_set()
        assert heard.rows("post") == witnessed(session, "orders") == [(operation, "5")]
        assert heard.rows("pre") == [(operation, key) for key in "245"]
        assert heard.statements[1] == f"post_bulk {operation} Order 1"


@pytest.mark.parametrize("returning", [False, True], ids=["plain", "returning"])
@pytest.mark.parametrize("operation", ["update", "delete"])
def test_a_condition_that_changes_its_mind(session: Session, operation: str, returning: bool):
    """The database tells which rows it has changed in the end, and these are told of."""
    fill(session)
    if session.get_bind().dialect.name != "sqlite":
        pytest.skip("the function is SQLite's")
    # When the rows are looked up, and when the statement is executed.
    answers = iter([1, 1, 1, 0, 1, 0, 1, 1, 0])
    driver: Any = session.connection().connection.driver_connection
    driver.create_function("is_lucky", 0, lambda: next(answers))
    heard = Heard()
    post_save.connect(heard, Order)
    sqla_signals.post_delete.connect(heard, Order)
    statement: Any = update(Order).values(status="x") if operation == "update" else delete(Order)
    statement = statement.where(func.is_lucky() == 1)
    if returning:
        found = session.execute(statement.returning(Order.id), execution_options=ROWS)
        assert found.scalars().all() == [2, 3]
    else:
        assert session.execute(statement, execution_options=ROWS).rowcount == 2
    assert heard.rows("post") == witnessed(session) == [(operation, "2"), (operation, "3")]


def test_a_condition_that_changes_its_mind_where_the_database_does_not_tell(
    shop: Engine, session: Session
):
    """As without RETURNING: an error, and all is rolled back."""
    if shop.dialect.name != "sqlite":
        pytest.skip("the function is SQLite's")

    class OwnBase(DeclarativeBase):
        pass

    class Note(OwnBase):
        __tablename__ = "notes"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]
        __table_args__ = {"implicit_returning": False}

    OwnBase.metadata.create_all(shop)
    session.add_all([Note(id=key) for key in range(5)])
    session.commit()
    answers = iter([1] * 5)
    driver: Any = session.connection().connection.driver_connection
    driver.create_function("is_lucky", 0, lambda: next(answers, 0))
    heard = Heard()
    post_save.connect(heard, Note)
    with pytest.raises(StaleDataError, match=r"5 row.*changed 0"):
        session.execute(
            update(Note).where(func.is_lucky() == 1).values(name="x"), execution_options=ROWS
        )
    assert heard.calls == []
    with pytest.raises(PendingRollbackError):
        session.commit()
    session.rollback()
    assert rows(session, Note.name) == [None] * 5


@pytest.mark.parametrize("operation", ["update", "list", "insert", "delete"])
def test_a_listener_that_hides_rows_from_queries(session: Session, operation: str):
    """A statement changes hidden rows too, as without signals, and so they are told of."""
    fill(session)

    @event.listens_for(session, "do_orm_execute")
    def hide(state: Any) -> None:
        if state.is_select:
            state.statement = state.statement.options(
                with_loader_criteria(Order, Order.status == "shown")
            )

    heard = Heard().connect(Order)
    statement, parameters = {
        "update": (update(Order).values(total=9).where(Order.id == 1), None),
        "list": (update(Order), [{"id": 1, "total": 9}]),
        "insert": (insert(Order), [{"id": 7, "status": "hidden"}]),
        "delete": (delete(Order).where(Order.id == 1), None),
    }[operation]
    session.execute(statement, parameters, execution_options=ROWS)
    kinds = {"insert": "insert", "delete": "delete"}
    expected = [(kinds.get(operation, "update"), "7" if operation == "insert" else "1")]
    assert told(session, heard) == expected
    assert session.scalars(select(Order)).all() == []


def test_sqlite_is_locked_before_the_rows_are_looked_up(session: Session, statements: list[str]):
    """By an UPDATE of no row, so that nobody can write in between."""
    if session.get_bind().dialect.name != "sqlite":
        pytest.skip("others lock the rows")
    fill(session)
    Heard().connect(Order)
    del statements[:]
    session.execute(update(Order).values(status="x"), execution_options=ROWS)
    first = statements[0]
    assert first.startswith("UPDATE orders SET id=orders.id")
    assert first.endswith("WHERE 0 = 1")


def test_the_rows_are_locked(session: Session, statements: list[str]):
    """Only those of the table that is written."""
    if session.get_bind().dialect.name == "sqlite":
        pytest.skip("SQLite knows no row locks")
    staff(session)
    Heard().connect(Manager)
    del statements[:]
    session.execute(update(Manager).values(budget=0), execution_options=ROWS)
    assert statements[0].endswith("FOR UPDATE OF managers")


def test_pending_changes_are_flushed_first(session: Session):
    """With signals of their own, as by any query."""
    fill(session)
    session.get(Order, 1).total = 100
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.total == 100).values(status="x"), execution_options=ROWS
    )
    seen = witnessed(session)
    assert heard.rows("pre") == heard.rows("post") == seen == [*updates(1), *updates(1)]
    changes = [call["changes"] for call in heard.of("post_save")]
    assert changes == [{"total": Change(1, 100)}, {"status": Change("open", "x")}]


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=["pre", "post"])
@pytest.mark.parametrize("operation", ["update", "delete", "upsert"])
def test_a_flush_receiver_may_execute_a_statement(session: Session, signal: Any, operation: str):
    """Its rows are told of in the middle of the flush, which goes on."""
    fill(session)
    heard = Heard().connect(Order)
    new = upsert(session).values(id=2, total=7)
    statement: Any = {
        "update": update(Order).where(Order.id == 2).values(total=7),
        "delete": delete(Order).where(Order.id == 2),
        "upsert": new.on_conflict_do_update(index_elements=["id"], set_={"total": 7}),
    }[operation]

    def execute(sender: Any, session: Session, **kwargs: Any) -> None:
        session.execute(statement, execution_options=ROWS)

    signal.connect(execute, Customer)
    session.add(Customer(id=3))
    session.flush()
    expected = [("delete", "2")] if operation == "delete" else updates(2)
    assert told(session, heard, "orders") == expected
    assert 3 in rows(session, Customer.id)


def test_a_pre_receiver_changes_which_rows_match(session: Session):
    """Told of after are the rows that the statement has really changed."""
    fill(session)
    heard = Heard().connect(Order)

    def meddle(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_save and kwargs["instance"].id == 2:
            kwargs["instance"].total = 0

    heard.meddle = meddle
    session.execute(
        update(Order).where(Order.total.between(1, 3)).values(status="x"),
        execution_options={**ROWS, "synchronize_session": False},
    )
    # The receiver's own change of order 2 was flushed, with its own signals.
    assert heard.rows("post") == witnessed(session) == updates(1, 2, 3)
    assert [(call["instance"].id, set(call["changes"])) for call in heard.of("post_save")] == [
        (2, {"total"}),
        (1, {"status"}),
        (3, {"status"}),
    ]
    assert rows(session, Order.status) == ["open"] * 3 + ["x"] * 2


def test_a_pre_receiver_changes_which_rows_are_to_be_deleted(session: Session):
    """The one that it has saved in time has no post_delete."""
    fill(session)
    heard = Heard().connect(Order)

    def meddle(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_delete and kwargs["instance"].id == 2:
            kwargs["instance"].total = 0

    heard.meddle = meddle
    session.execute(delete(Order).where(Order.total.between(1, 3)), execution_options=ROWS)
    deletes = [("delete", "1"), ("delete", "3")]
    assert heard.rows("post") == witnessed(session) == [*deletes, *updates(2)]
    assert rows(session, Order.id) == [2, 4, 5]


def test_raising_in_pre_save_vetoes_the_statement(session: Session):
    """Nothing was executed, and the session goes on."""
    fill(session)
    heard = Heard().connect(Order)

    def refuse(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_save and kwargs["instance"].id == 2:
            raise ValueError("no")

    heard.meddle = refuse
    with pytest.raises(ValueError, match="no"):
        session.execute(update(Order).values(status="x"), execution_options=ROWS)
    assert witnessed(session) == heard.rows("post") == []
    assert heard.statements == ["pre_bulk update Order"]
    session.execute(update(Order).values(status="x"), execution_options={"signals": "skip"})
    assert witnessed(session) == updates(1, 2, 3, 4, 5)


def test_raising_in_post_save_rolls_back(session: Session):
    """What the statement has written cannot be committed by mistake."""
    fill(session)
    heard = Heard().connect(Order)

    def refuse(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is post_save:
            raise ValueError("no")

    heard.meddle = refuse
    with pytest.raises(ValueError, match="no"):
        session.execute(update(Order).values(status="x"), execution_options=ROWS)
    with pytest.raises(PendingRollbackError):
        session.commit()
    session.rollback()
    assert rows(session, Order.status) == ["open"] * 5


def test_a_statement_that_fails_tells_nothing_after_it(session: Session):
    """A pre_ signal and an exception."""
    fill(session)
    heard = Heard().connect(Order)
    with pytest.raises(SQLAlchemyError):
        session.execute(update(Order).where(Order.id < 3).values(number=30), execution_options=ROWS)
    session.rollback()
    assert heard.rows("pre") == updates(1, 2)
    assert heard.rows("post") == witnessed(session) == []
    assert heard.statements == ["pre_bulk update Order"]


@pytest.mark.parametrize("how", ["list", "dict", "values"])
def test_a_pre_receiver_assigns_to_a_row_to_be_inserted(session: Session, how: str):
    """What it assigns is inserted."""
    heard = Heard().connect(Order)

    def number(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_save:
            kwargs["instance"].number = kwargs["instance"].id * 100

    heard.meddle = number
    if how == "list":
        session.execute(insert(Order), [{"id": 1}, {"id": 2}], execution_options=ROWS)
    elif how == "dict":
        session.execute(insert(Order), {"id": 1}, execution_options=ROWS)
    else:
        session.execute(insert(Order).values(id=1), execution_options=ROWS)
    told(session, heard)
    expected = [100, 200] if how == "list" else [100]
    assert rows(session, Order.number) == expected
    assert [call["seen"]["number"] for call in heard.of("post_save")] == expected


def test_a_pre_receiver_cannot_assign_to_a_list_of_values(session: Session):
    """The error says how the rows have to be given."""
    heard = Heard().connect(Order)

    def number(sender: Any, **kwargs: Any) -> None:
        if kwargs["signal"] is pre_save:
            kwargs["instance"].number = 1

    heard.meddle = number
    with pytest.raises(BulkOptionError, match="parameters"):
        session.execute(insert(Order).values([{"id": 1}, {"id": 2}]), execution_options=ROWS)
    assert witnessed(session) == []


# -- afterwards ----------------------------------------------------------------------------------


def test_commit_receivers_of_rows(session: Session):
    """They hear of the net effect, whether it came by a flush or by a statement."""
    fill(session)
    session.add(Order(id=6, number=60, status="new"))
    session.flush()
    heard = Heard()
    post_save.connect(heard, Order, on="commit", weak=False)
    sqla_signals.post_delete.connect(heard, Order, on="commit", weak=False)
    session.get(Order, 1).status = "a"
    session.execute(
        update(Order).where(Order.id.in_([1, 2])).values(status="b"), execution_options=ROWS
    )
    session.execute(insert(Order), [{"id": 7, "status": "x"}], execution_options=ROWS)
    session.execute(update(Order).where(Order.id == 7).values(status="y"), execution_options=ROWS)
    session.execute(delete(Order).where(Order.id == 3), execution_options=ROWS)
    with session.begin_nested() as savepoint:
        session.execute(
            update(Order).where(Order.id == 5).values(status="z"), execution_options=ROWS
        )
        savepoint.rollback()
    assert heard.calls == []
    session.commit()
    found = {}
    for call in heard.calls:
        assert call["session"] is not session
        found[call["seen"]["id"]] = (
            "deleted" if "origin" in call else (call["created"], call["seen"]["status"])
        )
    assert found == {1: (False, "b"), 2: (False, "b"), 7: (True, "y"), 3: "deleted"}
    assert heard.calls[0]["changes"] == {"status": Change("open", "b")}


def test_commit_receivers_of_a_row_that_several_statements_set(session: Session):
    """What one of them sets to the value that is there is known all the same."""
    fill(session)
    session.add_all([Stamped(id=1, name="a"), Stamped(id=2, name="a")])
    session.commit()
    heard = Heard()
    post_save.connect(heard, [Order, Stamped], on="commit")
    for name in "bc":  # "writes" is set to 7 by both
        session.execute(update(Stamped).values(name=name), execution_options=ROWS)
    session.execute(update(Order).where(Order.id == 1).values(total=1), execution_options=ROWS)
    session.get(Order, 1).total = 2
    session.add(Order(id=6, number=60, total=6))
    session.flush()
    session.execute(update(Order).where(Order.id == 6).values(total=6), execution_options=ROWS)
    session.commit()
    assert [(call["seen"]["id"], call["created"]) for call in heard.calls] == [
        (1, False), (2, False), (1, False), (6, True),
    ]  # fmt: skip
    stamped = {"name": Change("a", "c"), "writes": Change(0, 7)}
    assert [call["changes"] for call in heard.calls[:3]] == [
        stamped, stamped, {"total": Change(1, 2)},
    ]  # fmt: skip
    assert heard.calls[0]["update_fields"] == {"name", "writes"}
    assert heard.calls[3]["changes"]["total"] == Change(UNSET, 6)


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
@pytest.mark.parametrize("operation", ["update", "list", "insert", "upsert"])
def test_a_savepoint_that_is_rolled_back_takes_along_what_instances_were_told(
    session: Session, operation: str, synchronize: Any
):
    """Brought up to date inside of it, they are as the database is after it."""
    fill(session)
    held = session.scalars(select(Order)).all()
    parameters, statement = None, update(Order).values(status="x")
    if operation == "list":
        parameters, statement = [{"id": 1, "status": "x"}], update(Order)
        synchronize = "auto"
    elif operation == "insert":
        parameters, statement = [{"id": 9, "status": "x"}], insert(Order)
    elif operation == "upsert":
        statement = upsert(session).values(id=1, status="x")
        statement = statement.on_conflict_do_update(index_elements=["id"], set_={"state": "x"})
    heard = Heard().connect(Order)
    savepoint = session.begin_nested()
    session.execute(
        statement, parameters, execution_options={**ROWS, "synchronize_session": synchronize}
    )
    told(session, heard)
    announced = [call["instance"] for call in heard.of("post_save")]
    assert {one.status for one in announced} == {"x"}
    savepoint.rollback()
    assert [order.status for order in held] == ["open"] * 5
    if operation == "insert":
        with pytest.raises(ObjectDeletedError):
            assert announced[0].status


def test_rollback_receivers_of_rows(session: Session):
    """They hear of what was undone."""
    fill(session)
    heard = Heard()
    post_save.connect(heard, Order, on="rollback", weak=False)
    session.execute(update(Order).where(Order.id == 1).values(status="b"), execution_options=ROWS)
    session.rollback()
    assert [call["changes"] for call in heard.calls] == [{"status": Change("open", "b")}]
    assert rows(session, Order.status) == ["open"] * 5


@asynchronous
async def test_rows_of_an_async_session(shop: Engine, async_engine: AsyncEngine):
    """Async receivers are awaited and can read the instances, whatever is synchronized."""
    with Session(shop) as setup:
        fill(setup)
    installation = sqla_signals.install(bulk="raise")
    found = []

    async def saved(sender: Any, instance: Order, signal: Any, session: Any, **kwargs: Any) -> None:
        assert isinstance(session, AsyncSession)
        number = (await session.execute(text("SELECT count(*) FROM orders"))).scalar_one()
        found.append((signal.name, instance.id, instance.status, instance.total, number))

    pre_save.connect(saved, Order)
    post_save.connect(saved, Order)
    async with AsyncSession(async_engine) as session:
        for synchronize in SYNCHRONIZE:
            del found[:]
            await session.execute(
                update(Order).where(Order.id == 1).values(status="x", total=Order.total + 1),
                execution_options={**ROWS, "synchronize_session": synchronize},
            )
            assert found == [("pre_save", 1, "open", 1, 5), ("post_save", 1, "x", 2, 5)]
            await session.rollback()
    installation.remove()


@asynchronous
async def test_each_statement_of_an_async_session(shop: Engine, async_engine: AsyncEngine):
    """Executed or streamed, with and without RETURNING; also where little of it is fetched."""
    with Session(shop) as setup:
        fill(setup)
    sqla_signals.install(bulk="raise")
    heard = Heard().connect(Order)
    async with AsyncSession(async_engine) as session:

        async def told_async() -> list[tuple[str, str]]:
            found = await session.run_sync(lambda sync: told(sync, heard))
            heard.clear()
            return found

        new = [{"id": 7, "number": 70}, {"id": 8, "number": 80}]
        await session.execute(insert(Order), new, execution_options=ROWS)
        assert await told_async() == [("insert", "7"), ("insert", "8")]
        statement: Any = upsert(await session.run_sync(lambda sync: sync))
        statement = statement.on_conflict_do_update(index_elements=["number"], set_={"state": "x"})
        stream = await session.stream_scalars(
            statement.returning(Order.id), [{"number": 70}], execution_options=ROWS
        )
        assert await stream.all() == [7]
        assert await told_async() == updates(7)
        stream = await session.stream(
            update(Order).where(Order.id > 6).values(total=1).returning(Order),
            execution_options=ROWS,
        )
        assert (await stream.fetchone()) is not None
        await stream.close()
        assert await told_async() == updates(7, 8)
        result = await session.execute(delete(Order).where(Order.id > 6), execution_options=ROWS)
        assert result.rowcount == 2
        assert await told_async() == [("delete", "7"), ("delete", "8")]
        await session.commit()
    assert rows(shop, Order.id) == [1, 2, 3, 4, 5]

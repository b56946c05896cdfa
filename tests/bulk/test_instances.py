"""What instances hold after a statement with ``{"signals": "rows"}``: what the database holds."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import JSON, Computed, Integer, delete, insert, inspect, update
from sqlalchemy.ext.mutable import Mutable, MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, column_property, mapped_column

from sqla_signals import Change
from tests.contract.observing import rows

from .shop import Desk, Employee, Heard, Manager, Order, Point, witnessed
from .test_rows import ROWS, SYNCHRONIZE, fill, staff, told, updates, upsert


class Base(DeclarativeBase):
    """The declarative base of classes whose instances are more than their columns."""


class Tags(Mutable, list[str]):
    """A list that notices when something is added."""

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return value if isinstance(value, cls) or value is None else cls(value)

    def append(self, tag: str) -> None:
        super().append(tag)
        self.changed()


class Page(Base):
    """With values that may be changed in place."""

    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[Any] = mapped_column(MutableDict.as_mutable(JSON))
    tags: Mapped[Any] = mapped_column(Tags.as_mutable(JSON))


class Sum(Base):
    """With a column that the database computes, and an attribute that a query does."""

    __tablename__ = "sums"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int | None] = mapped_column()
    twice: Mapped[int | None] = mapped_column(Integer, Computed("number * 2", persisted=True))
    thrice: Mapped[int | None] = column_property(number * 3)


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
def test_values_that_may_be_changed_in_place(session: Session, synchronize: Any):
    """They are of the mutable type again, and what is changed in them afterwards is saved."""
    Base.metadata.create_all(session.connection())
    session.add(Page(id=1, data={"a": 1}, tags=["x"]))
    session.commit()
    page = session.get(Page, 1)
    heard = Heard().connect(Page)
    session.execute(
        update(Page).values(data={"b": 2}, tags=["y"]),
        execution_options={**ROWS, "synchronize_session": synchronize},
    )
    assert heard.of("post_save")[0]["changes"] == {
        "data": Change({"a": 1}, {"b": 2}),
        "tags": Change(["x"], ["y"]),
    }
    page.data["c"] = 3
    page.tags.append("z")
    session.commit()
    assert rows(session, Page.data, Page.tags) == [({"b": 2, "c": 3}, ["y", "z"])]


def test_a_mutable_value_that_is_inserted_stays_the_callers(session: Session):
    """It is linked to no instance."""
    Base.metadata.create_all(session.connection())
    heard = Heard().connect(Page)
    tags = Tags(["x"])
    session.execute(insert(Page), [{"id": 1, "data": {}, "tags": tags}], execution_options=ROWS)
    assert heard.of("pre_save")[0]["seen"]["tags"] is tags
    page = session.get(Page, 1)
    assert page.tags == tags
    assert page.tags is not tags
    assert dict(tags._parents) == {}


@pytest.mark.parametrize("operation", ["update", "by key", "upsert"])
def test_what_is_computed(session: Session, operation: str):
    """By the database, which is a change of the row, and by the query that loads it."""
    Base.metadata.create_all(session.connection())
    session.add(Sum(id=1, number=1))
    session.commit()
    held = session.get(Sum, 1)
    assert (held.twice, held.thrice) == (2, 3)
    heard = Heard().connect(Sum)
    new = upsert(session, Sum).values(id=1, number=5)
    statement, parameters = {
        "update": (update(Sum).values(number=5), None),
        "by key": (update(Sum), [{"id": 1, "number": 5}]),
        "upsert": (new.on_conflict_do_update(index_elements=["id"], set_={"number": 5}), None),
    }[operation]
    session.execute(statement, parameters, execution_options=ROWS)
    (call,) = heard.of("post_save")
    assert call["changes"] == {"number": Change(1, 5), "twice": Change(2, 10)}
    assert call["update_fields"] == {"number", "twice"}
    assert call["seen"] == {"id": 1, "number": 5, "twice": 10, "thrice": 15} | {
        "_sa_instance_state": inspect(held)
    }
    assert rows(session, Sum.number, Sum.twice, Sum.thrice) == [(5, 10, 15)]


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
def test_a_composite_that_is_loaded(session: Session, synchronize: Any):
    """It follows its columns."""
    session.add(Desk(id=1, place=Point(1, 2)))
    session.commit()
    desk = session.get(Desk, 1)
    assert desk.place == Point(1, 2)
    witnessed(session)
    heard = Heard().connect(Desk)
    session.execute(
        update(Desk).values(x=7), execution_options={**ROWS, "synchronize_session": synchronize}
    )
    assert told(session, heard) == updates(1)
    assert desk.place == Point(7, 2)


def test_columns_in_the_tables_of_subclasses_are_loaded(session: Session, statements: list[str]):
    """Receivers can read them, also of a row that is gone."""
    staff(session)
    heard = Heard().connect(Employee, propagate=True)
    read = []

    def meddle(sender: Any, **kwargs: Any) -> None:
        if sender is Manager:
            before = len(statements)
            read.append((kwargs["signal"].name, kwargs["instance"].budget))
            assert len(statements) == before

    heard.meddle = meddle
    session.execute(
        update(Employee).where(Employee.id < 3).values(name="x"), execution_options=ROWS
    )
    session.execute(delete(Employee).where(Employee.id < 3), execution_options=ROWS)
    assert heard.rows("post") == [("delete", "1"), ("delete", "2"), *updates(1, 2)]
    names = ["pre_save", "post_save", "pre_delete", "post_delete"]
    assert read == [(name, 1) for name in names]


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
@pytest.mark.parametrize("operation", ["update", "by key"])
def test_pending_changes_that_the_statement_overtakes(
    session: Session, operation: str, synchronize: Any
):
    """They are given up where the session is synchronized, as without signals, and else kept."""
    if operation == "by key" and synchronize == "fetch":
        pytest.skip("SQLAlchemy cannot")
    fill(session)
    session.autoflush = False
    held = session.get(Order, 1)
    held.total, held.status = 77, "mine"
    heard = Heard().connect(Order)
    statement, parameters = update(Order).where(Order.id == 1).values(total=5), None
    if operation == "by key":
        statement, parameters = update(Order), [{"id": 1, "total": 5}]
    session.execute(
        statement, parameters, execution_options={**ROWS, "synchronize_session": synchronize}
    )
    assert told(session, heard) == updates(1)
    assert heard.of("post_save")[0]["changes"] == {"total": Change(1, 5)}
    assert held.status == "mine"
    assert held.total == (5 if synchronize else 77)
    session.commit()
    assert rows(session, Order.id, Order.total, Order.status)[0] == (1, held.total, "mine")


@pytest.mark.parametrize("synchronize", SYNCHRONIZE)
def test_instances_of_deleted_rows_leave_the_session(session: Session, synchronize: Any):
    """Unless it is not to be synchronized; a rollback brings them back."""
    fill(session)
    held = session.get(Order, 1)
    heard = Heard().connect(Order)
    savepoint = session.begin_nested()
    session.execute(
        delete(Order).where(Order.id == 1),
        execution_options={**ROWS, "synchronize_session": synchronize},
    )
    assert told(session, heard) == [("delete", "1")]
    assert inspect(held).deleted is bool(synchronize)
    assert (held in session) is not bool(synchronize)
    savepoint.rollback()
    assert held in session
    assert held.status == "open"

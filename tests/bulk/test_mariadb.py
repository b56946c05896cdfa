"""``{"signals": "rows"}`` on MariaDB, which returns no rows from an UPDATE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, String, create_engine, delete, func, insert, select, update
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_signals import BulkOptionError, Change
from tests.contract.observing import rows
from tests.durable.conftest import clear_mariadb, mariadb_url

from .shop import Heard
from .test_rows import ROWS

__all__ = ["mariadb_url"]

pytestmark = pytest.mark.mariadb


class Base(DeclarativeBase):
    """The declarative base."""


class Item(Base):
    """With a key of two columns."""

    __tablename__ = "items"
    shelf: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    box: Mapped[str] = mapped_column(String(20), primary_key=True)
    number: Mapped[int | None]


class Shelf(Base):
    """Another table, for conditions."""

    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(20))


@pytest.fixture
def session(mariadb_url: str, installed: Any) -> Iterator[Session]:
    """A session on a database with ten items on two shelves."""
    engine: Engine = create_engine(mariadb_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.connection().execute(insert(Shelf.__table__), [{"id": 1}, {"id": 2}])
        session.connection().execute(insert(Item.__table__), [key(one) for one in range(10)])
        session.commit()
        yield session
    engine.dispose()
    clear_mariadb(mariadb_url)


def key(number: int) -> dict[str, Any]:
    """The primary key of an item."""
    return {"shelf": number % 2, "box": str(number)}


@pytest.mark.parametrize("what", ["insert", "update", "by key", "delete"])
def test_any_number_of_rows(session: Session, what: str):
    """The driver writes the keys into the statement."""
    keys = [key(one) for one in range(10, 30_000)]
    if what != "insert":
        session.connection().execute(insert(Item.__table__), keys)
    heard = Heard().connect(Item)
    many = [{**one, "number": 7} for one in keys]
    statement, parameters = {
        "insert": (insert(Item), many),
        "update": (update(Item).where(func.length(Item.box) > 1).values(number=7), None),
        "by key": (update(Item), many),
        "delete": (delete(Item).where(func.length(Item.box) > 1), None),
    }[what]
    session.execute(statement, parameters, execution_options=ROWS)
    kind = {"insert": "insert", "delete": "delete"}.get(what, "update")
    expected = sorted((kind, f"{one['shelf']} {one['box']}") for one in keys)
    assert heard.rows("post") == heard.rows("pre") == expected
    changed = select(func.count()).select_from(Item).where(Item.number == 7)
    assert session.scalar(changed) == (0 if what == "delete" else len(keys))
    assert len(rows(session, Item.box)) == 10 + (0 if what == "delete" else len(keys))


@pytest.mark.parametrize("operation", ["update", "delete"])
def test_a_condition_on_another_table(session: Session, operation: str):
    """A statement on two tables."""
    heard = Heard().connect(Item)
    statement: Any = update(Item).values(number=7) if operation == "update" else delete(Item)
    session.execute(
        statement.where(Item.shelf == Shelf.id),
        execution_options={**ROWS, "synchronize_session": False},
    )
    expected = [(operation, f"1 {one}") for one in (1, 3, 5, 7, 9)]
    assert heard.rows("post") == heard.rows("pre") == expected


def test_a_row_that_has_the_value_already(session: Session):
    """It was matched, and so it was saved; SQLAlchemy counts it too."""
    heard = Heard().connect(Item)
    statement = update(Item).where(Item.box == "3").values(number=None)
    assert session.execute(statement, execution_options=ROWS).rowcount == 1
    assert heard.rows("post") == [("update", "1 3")]
    assert heard.of("post_save")[0]["changes"] == {}
    session.execute(statement.values(number=4), execution_options=ROWS)
    assert heard.of("post_save")[1]["changes"] == {"number": Change(None, 4)}


@pytest.mark.parametrize("what", ["update limit", "delete limit", "two tables", "upsert"])
def test_what_the_database_does_not_tell_is_refused(session: Session, what: str):
    """Before anything is executed or announced."""
    heard = Heard().connect(Item)
    beside = update(Item).where(Item.shelf == Shelf.id)
    statement: Any = {
        "update limit": update(Item).values(number=7).with_dialect_options(mariadb_limit=3),
        "delete limit": delete(Item).with_dialect_options(mariadb_limit=3),
        "two tables": beside.values({Item.number: 7, Shelf.name: "x"}),
        "upsert": mysql.insert(Item).values(**key(3)).on_duplicate_key_update(number=7),
    }[what]
    with pytest.raises(BulkOptionError, match=r"where\(\)|post_bulk"):
        session.execute(statement, execution_options={**ROWS, "synchronize_session": False})
    assert heard.calls == []
    assert rows(session, Item.number) == [None] * 10

"""Orders of customers, and employees in joined tables; triggers write down each row written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    inspect,
    text,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    composite,
    mapped_column,
)

from sqla_signals import (
    post_bulk,
    post_delete,
    post_save,
    pre_bulk,
    pre_delete,
    pre_save,
)

from ..conftest import before_sqlalchemy


class Base(DeclarativeBase):
    """The declarative base."""


class Customer(Base):
    """Whom orders are filtered by."""

    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Order(Base):
    """With a number that is unique, and a column whose name is not that of its attribute."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int | None] = mapped_column(unique=True)
    status: Mapped[str | None] = mapped_column("state", String(20))
    total: Mapped[int | None]
    customer_id: Mapped[int | None] = mapped_column(ForeignKey("customers.id"))


class Stamped(Base):
    """With a Python-side ``onupdate``."""

    __tablename__ = "stamped"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    writes: Mapped[int] = mapped_column(Integer, default=0, onupdate=7)


class Seat(Base):
    """With a key of two columns."""

    __tablename__ = "seats"
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    taken: Mapped[str | None]


class Employee(Base):
    """The base of a joined hierarchy."""

    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}


class Manager(Employee):
    """In a table of its own."""

    __tablename__ = "managers"
    id: Mapped[int] = mapped_column(
        ForeignKey("employees.id", ondelete="CASCADE"), primary_key=True
    )
    budget: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Clerk(Employee):
    """In the same table."""

    __mapper_args__ = {"polymorphic_identity": "clerk"}


class Director(Manager):
    """In one more table, whose key has another name."""

    __tablename__ = "directors"
    id: Mapped[int] = mapped_column(
        "director_id", ForeignKey("managers.id", ondelete="CASCADE"), primary_key=True
    )
    title: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "director"}


@dataclass
class Point:
    """A place on a plan."""

    x: int
    y: int


class Desk(Base):
    """With two columns that make up one attribute, and one that belongs to none."""

    __table__ = Table(
        "desks",
        Base.metadata,
        Column("id", Integer, primary_key=True),
        Column("x", Integer),
        Column("y", Integer),
        Column("name", String),
        Column("legacy", String),
    )
    id: Mapped[int]
    place: Mapped[Point] = composite(__table__.c.x, __table__.c.y)
    label: Mapped[str | None] = column_property(__table__.c.name)
    __mapper_args__: Any = {"exclude_properties": ["legacy"]}


KEYS = {"seats": ("row", "number"), "directors": ("director_id",), "spots": ("x", "y")}


def create_triggers(connection: Connection, *metadata: MetaData) -> None:
    """Let the database write down each row written: what, table, key."""
    sqlite = connection.dialect.name == "sqlite"
    place = "INTEGER PRIMARY KEY" if sqlite else "SERIAL PRIMARY KEY"
    connection.exec_driver_sql(
        f"CREATE TABLE witness (place {place}, what TEXT, tbl TEXT, key TEXT)"
    )
    for table in (table for one in metadata for table in one.tables):
        for what, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
            name = f"witness_{table}_{what.lower()}"
            key = " || ' ' || ".join(
                f"COALESCE(CAST({row}.{column} AS TEXT), 'None')"
                for column in KEYS.get(table, ("id",))
            )
            insert = (
                f"INSERT INTO witness (what, tbl, key) VALUES ('{what.lower()}', '{table}', {key});"
            )
            if sqlite:
                connection.exec_driver_sql(
                    f"CREATE TRIGGER {name} AFTER {what} ON {table} FOR EACH ROW BEGIN {insert} END"
                )
            else:
                connection.exec_driver_sql(
                    f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ "
                    f"BEGIN {insert} RETURN NULL; END $$"
                )
                connection.exec_driver_sql(
                    f"CREATE TRIGGER {name} AFTER {what} ON {table} "
                    f"FOR EACH ROW EXECUTE FUNCTION {name}()"
                )


def inserted(session: Session, rows: int) -> int:
    """The ``rowcount`` of an INSERT of so many rows: before 2.0.28, psycopg's is lost."""
    lost = session.get_bind().dialect.name == "postgresql" and before_sqlalchemy("2.0.28")
    return -1 if lost else rows


def witnessed(session: Session, *tables: str) -> list[tuple[str, str]]:
    """What the triggers have written down since the last time: what and key, sorted."""
    connection = session.connection()
    rows = connection.execute(text("SELECT what, tbl, key FROM witness ORDER BY place")).all()
    connection.execute(text("DELETE FROM witness"))
    return sorted((what, key) for what, table, key in rows if not tables or table in tables)


@dataclass
class Heard:
    """A receiver of the signals of rows and of statements."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    meddle: Callable[..., None] | None = None

    def __hash__(self) -> int:
        return id(self)

    def connect(self, sender: Any = None, bulk: bool = True, **options: Any) -> Heard:
        """Connect it to all of them."""
        signals = [pre_save, post_save, pre_delete, post_delete]
        for signal in [*signals, pre_bulk, post_bulk] if bulk else signals:
            signal.connect(self, sender, weak=False, **options)
        return self

    def __call__(self, sender: Any, **arguments: Any) -> None:
        if "changes" in arguments:
            arguments["changes"] = dict(arguments["changes"])
        if "instance" in arguments:
            # What is in memory, without loading anything.
            arguments["seen"] = dict(inspect(arguments["instance"]).dict)
        self.calls.append({"sender": sender, **arguments})
        if self.meddle is not None:
            self.meddle(sender, **arguments)

    def of(self, name: str) -> list[dict[str, Any]]:
        """The calls for one signal."""
        return [call for call in self.calls if call["signal"].name == name]

    def rows(self, when: str) -> list[tuple[str, str]]:
        """The rows told of, as the triggers write them, sorted."""
        found = []
        for call in self.calls:
            name = call["signal"].name
            if name.startswith(when) and "instance" in call:
                what = (
                    "delete"
                    if name.endswith("delete")
                    else "insert"
                    if call["created"]
                    else "update"
                )
                mapper = inspect(type(call["instance"]))
                key = [
                    call["seen"].get(mapper.get_property_by_column(column).key)
                    for column in mapper.primary_key
                ]
                found.append((what, " ".join(map(str, key))))
        return sorted(found)

    @property
    def statements(self) -> list[str]:
        """One line for each statement told of."""
        return [
            f"{call['signal'].name} {call['operation']} {call['sender'].__name__}"
            + (f" {call['rowcount']}" if "rowcount" in call else "")
            for call in self.calls
            if "operation" in call
        ]

    def clear(self) -> None:
        """Forget what was told."""
        self.calls.clear()

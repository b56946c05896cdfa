"""Users in groups, with a collection of each kind; triggers on the association table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Connection, Engine, ForeignKey, Integer, Table, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Session,
    attribute_keyed_dict,
    relationship,
)

from sqla_signals import m2m_changed

LOADED = ("list", "set", "dict", "one-sided")
KINDS = (*LOADED, "write_only", "dynamic")


@dataclass
class Clubs:
    """The classes for one kind of collection."""

    kind: str
    base: type[DeclarativeBase]
    table: Table
    User: Any
    Group: Any

    def create(self, engine: Engine) -> None:
        """Create the tables and the triggers."""
        self.base.metadata.create_all(engine)
        with engine.begin() as connection:
            create_triggers(connection, self.table)

    def add(self, collection: Any, one: Any) -> None:
        """Add to a collection of this kind."""
        if isinstance(collection, dict):
            collection[one.name] = one
        elif self.kind in ("set", "write_only", "dynamic"):
            collection.add(one)
        else:
            collection.append(one)

    def remove(self, collection: Any, one: Any) -> None:
        """Remove from a collection of this kind."""
        if isinstance(collection, dict):
            del collection[one.name]
        else:
            collection.remove(one)

    def collection(self, *members: Any) -> Any:
        """What can be assigned to the attribute."""
        if self.kind == "dict":
            return {one.name: one for one in members}
        return set(members) if self.kind == "set" else list(members)


def make_clubs(kind: str) -> Clubs:
    """Map the classes anew."""

    class Base(DeclarativeBase):
        pass

    table = Table(
        "memberships",
        Base.metadata,
        Column("user_id", ForeignKey("users.id"), primary_key=True),
        Column("group_id", ForeignKey("groups.id"), primary_key=True),
    )
    options: dict[str, Any] = {"secondary": table}
    ends = {"groups": "Group.id", "users": "User.id"}
    order = {key: {"order_by": end} if kind != "write_only" else {} for key, end in ends.items()}
    if kind == "set":
        options["collection_class"] = set
    elif kind == "dict":
        options["collection_class"] = attribute_keyed_dict("name")
    elif kind in ("write_only", "dynamic"):
        options["lazy"] = kind
    if kind == "write_only":
        options["passive_deletes"] = True

    class User(Base):
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)

        @property
        def name(self) -> str:
            return f"user {self.id}"

        if kind == "one-sided":
            groups = relationship("Group", **options, **order["groups"])
        else:
            groups = relationship("Group", back_populates="users", **options, **order["groups"])

    class Group(Base):
        __tablename__ = "groups"
        id = Column(Integer, primary_key=True)

        @property
        def name(self) -> str:
            return f"group {self.id}"

        if kind != "one-sided":
            users = relationship("User", back_populates="groups", **options, **order["users"])

    Base.registry.configure()
    return Clubs(kind, Base, table, User, Group)


def create_triggers(connection: Connection, table: Table) -> None:
    """Let the database write down every row of the table that is added or removed."""
    connection.exec_driver_sql(
        "CREATE TABLE witness (place INTEGER PRIMARY KEY, what TEXT, a INTEGER, b INTEGER)"
        if connection.dialect.name == "sqlite"
        else "CREATE TABLE witness (place SERIAL PRIMARY KEY, what TEXT, a INTEGER, b INTEGER)"
    )
    a, b = (column.name for column in table.c)
    for what, event, row in (("add", "INSERT", "NEW"), ("remove", "DELETE", "OLD")):
        insert = f"INSERT INTO witness (what, a, b) VALUES ('{what}', {row}.{a}, {row}.{b});"
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(
                f"CREATE TRIGGER witness_{what} AFTER {event} ON {table.name} "
                f"FOR EACH ROW BEGIN {insert} END"
            )
        else:
            connection.exec_driver_sql(
                f"CREATE FUNCTION witness_{what}() RETURNS trigger LANGUAGE plpgsql AS $$ "
                f"BEGIN {insert} RETURN NULL; END $$"
            )
            connection.exec_driver_sql(
                f"CREATE TRIGGER witness_{what} AFTER {event} ON {table.name} "
                f"FOR EACH ROW EXECUTE FUNCTION witness_{what}()"
            )


def witnessed(session: Session) -> set[tuple[str, int, int]]:
    """What the triggers have written down since the last time."""
    connection = session.connection()
    rows = connection.execute(text("SELECT what, a, b FROM witness ORDER BY place")).all()
    connection.execute(text("DELETE FROM witness"))
    found = [tuple(row) for row in rows]
    assert len(found) == len(set(found))
    return set(found)


@dataclass
class Heard:
    """A receiver of ``m2m_changed`` that keeps rows as the triggers write them."""

    sender: Any
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        m2m_changed.connect(self, self.sender, weak=False)

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, sender: Any, **arguments: Any) -> None:
        self.calls.append({"sender": sender, **arguments})

    def rows(self, when: str) -> set[tuple[str, int, int]]:
        """What was told of, as rows; each once."""
        found = [
            (
                call["action"].removeprefix(when + "_"),
                *(
                    (call["instance"].id, key)
                    if call["relationship"].key in ("groups", "children")
                    else (key, call["instance"].id)
                ),
            )
            for call in self.calls
            if call["action"].startswith(when)
            for key in call["pk_set"]
        ]
        assert len(found) == len(set(found)), found
        return set(found)

    @property
    def lines(self) -> list[str]:
        """One line for each call."""
        return [
            f"{call['action']} {call['relationship']} of {call['instance'].id}: "
            f"{sorted(call['pk_set'])}"
            for call in self.calls
        ]

    def clear(self) -> None:
        """Forget what was told."""
        self.calls.clear()

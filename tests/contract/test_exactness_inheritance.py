"""One event per instance, however many tables it has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sqla_signals import UNSET, Change

from .observing import Log, both, listen, rows


class Base(DeclarativeBase):
    """The base of the hierarchies below."""


class Person(Base):
    """The root of a joined hierarchy."""

    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "person",
        "version_id_col": version,
    }


class Employee(Person):
    """With a table of its own."""

    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
    salary: Mapped[int | None]
    touched: Mapped[int | None] = mapped_column(onupdate=lambda: 1)
    __mapper_args__ = {"polymorphic_identity": "employee"}


class Manager(Employee):
    """With a third table."""

    __tablename__ = "managers"
    id: Mapped[int] = mapped_column(ForeignKey("employees.id"), primary_key=True)
    title: Mapped[str | None]
    desks: Mapped[list[Desk]] = relationship(cascade="all, delete-orphan")
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Intern(Employee):
    """Without a table of its own."""

    __mapper_args__ = {"polymorphic_identity": "intern"}


class Desk(Base):
    """Belongs to a manager."""

    __tablename__ = "desks"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    manager_id: Mapped[int | None] = mapped_column(ForeignKey("managers.id"))


class Shape(Base):
    """A concrete hierarchy: unrelated tables."""

    __tablename__ = "shapes"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "shape"}


class Circle(Shape):
    """All columns in a table of its own."""

    __tablename__ = "circles"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    radius: Mapped[int | None]
    __mapper_args__ = {"concrete": True, "polymorphic_identity": "circle"}


@pytest.fixture
def session(engine: Engine, installed) -> Iterator[Session]:
    """A session on the tables of the hierarchies."""
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def test_an_instance_of_three_tables_sends_one_pair_for_each_of_its_events(
    session: Session, log: Log
):
    """Created, saved and deleted as a whole."""
    manager = Manager(name="a", salary=1, title="t")
    session.add(manager)
    session.flush()
    assert log.lines == both("save created Manager(a)")
    changes = log.one("post_save").changes
    assert set(changes) == {"id", "kind", "name", "version", "salary", "touched", "title"}
    assert changes["title"] == Change(UNSET, "t")
    assert changes["kind"] == Change(UNSET, "manager")
    log.clear()
    manager.name, manager.salary, manager.title = "b", 2, "u"
    session.flush()
    assert log.lines == both("save updated Manager(b)")
    assert log.one("post_save")["update_fields"] == {
        "name",
        "salary",
        "title",
        "version",
        "touched",
    }
    assert rows(session, Person.name) == ["b"]
    assert rows(session, Manager.__table__.c.title) == ["u"]
    log.clear()
    session.delete(manager)
    session.flush()
    assert log.lines == both("delete Manager(b)")
    assert rows(session, Person.id) == rows(session, Manager.__table__.c.id) == []


@pytest.mark.parametrize(
    ("attribute", "value", "along"),
    [
        ("name", "b", {"version"}),
        ("salary", 2, {"version", "touched"}),
        ("title", "u", {"version"}),
    ],
)
def test_a_change_in_one_of_the_tables_is_an_update(
    session: Session, log: Log, attribute: str, value: object, along: set[str]
):
    """Wherever the column is; what is written along depends on the table."""
    manager = Manager(name="a", salary=1, title="t")
    session.add(manager)
    session.commit()
    session.refresh(manager)
    old = getattr(manager, attribute)
    log.clear()
    setattr(manager, attribute, value)
    session.flush()
    sent = log.one("post_save", manager)
    assert sent["update_fields"] == {attribute, *along}
    assert sent.changes[attribute] == Change(old, value)
    log.clear()
    setattr(manager, attribute, value)
    session.flush()
    assert log.lines == []


def test_single_table_subclasses_have_their_own_sender(session: Session, log: Log):
    """One event each, with the exact class."""
    session.add_all([Intern(name="i"), Employee(name="e"), Person(name="p")])
    session.flush()
    assert sorted(log.post) == [
        "post_save created Employee(e)",
        "post_save created Intern(i)",
        "post_save created Person(p)",
    ]
    assert rows(session, Person.kind) == ["employee", "intern", "person"]


def test_a_polymorphic_query_gives_instances_that_send_as_their_own_class(
    session: Session, log: Log
):
    """Loaded through the base, with the columns of the subclass not loaded yet."""
    session.add(Manager(name="a", salary=1, title="t"))
    session.commit()
    session.expunge_all()
    log.clear()
    person = session.query(Person).one()
    person.title = "u"
    session.flush()
    assert log.lines == both("save updated Manager(a)")
    assert log.one("post_save").changes["title"] == Change(UNSET, "u")
    session.delete(person)
    session.flush()
    assert log.lines[2:] == both("delete Manager(a)")
    assert rows(session, Person.id) == []


def test_a_row_switch_to_another_class_is_a_delete_and_a_created_save(session: Session, log: Log):
    """The key of a deleted intern is given to an employee, in one flush."""
    intern = Intern(name="i", salary=1)
    session.add(intern)
    session.flush()
    log.clear()
    session.delete(intern)
    employee = Employee(id=intern.id, name="e", salary=2, version=1)
    session.add(employee)
    session.flush()
    assert sorted(log.pre) == ["pre_delete Intern(i)", "pre_save created Employee(e)"]
    assert sorted(log.post) == ["post_delete Intern(i)", "post_save created Employee(e)"]
    assert rows(session, Person.name, Person.kind) == [("e", "employee")]


def test_a_row_switch_to_another_class_is_told_to_receivers_of_the_old_class_alone(
    session: Session,
):
    """Nobody listens for the new class."""
    log = listen(sender=Intern)
    intern = Intern(name="i")
    session.add(intern)
    session.flush()
    log.clear()
    session.delete(intern)
    session.add(Employee(id=intern.id, name="e", version=1))
    session.flush()
    assert log.lines == both("delete Intern(i)")
    assert rows(session, Person.name, Person.kind) == [("e", "employee")]


def test_children_of_a_joined_subclass_go_with_it(session: Session, log: Log):
    """A cascade below three tables."""
    manager = Manager(name="a", desks=[Desk(name="d")])
    session.add(manager)
    session.flush()
    log.clear()
    session.delete(manager)
    session.flush()
    assert sorted(log.post) == ["post_delete Desk(d)", "post_delete Manager(a)"]
    assert rows(session, Desk.id) == []


def test_concrete_classes_send_as_themselves(session: Session, log: Log):
    """Each has one table."""
    circle = Circle(name="c", radius=1)
    session.add_all([circle, Shape(name="s")])
    session.flush()
    assert sorted(log.post) == ["post_save created Circle(c)", "post_save created Shape(s)"]
    log.clear()
    circle.radius = 2
    session.flush()
    assert log.lines == both("save updated Circle(c)")
    assert rows(session, Circle.__table__.c.radius) == [2]

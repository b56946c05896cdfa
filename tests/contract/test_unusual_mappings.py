"""Whatever SQLAlchemy can flush is flushed as without signals, and what it refuses stays refused.

Each shape is a function that maps classes on a new base and gives the steps of a program. It runs
without signals first; with receivers of everything it must do the same, to the text of an error.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    String,
    Table,
    case,
    delete,
    insert,
    join,
    select,
)
from sqlalchemy.exc import SAWarning
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
)

import sqla_signals
from sqla_signals import m2m_changed, post_bulk, post_delete, post_save, trace
from sqla_signals.receivers.installations import installations

from ..conftest import before_sqlalchemy
from .observing import Log, listen

Step = Callable[[Session], Any]
Program = list[tuple[Step, list[str] | None]]
"""What is done, step by step, and the ``post_*`` signals of each step; ``None`` if it fails."""


class Named:
    """A key and a name."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


@pytest.fixture
def base() -> Iterator[type[DeclarativeBase]]:
    """A new declarative base, whose classes are gone when the test is over."""

    class Base(DeclarativeBase):
        pass

    yield Base
    Base.registry.dispose(cascade=True)


def run(engine: Engine, base: type[DeclarativeBase], program: Program, log: Log) -> list[Any]:
    """The rows and the error after each step; what is logged is checked."""
    outcomes: list[Any] = []
    base.metadata.create_all(engine)
    with Session(engine) as session:
        for step, expected in program:
            error = None
            log.clear()
            try:
                step(session)
                session.commit()
            except Exception as raised:
                session.rollback()
                error = type(raised), str(raised)
            assert (error is None) == (expected is not None), error
            if installations and expected is not None:
                assert sorted(log.post) == sorted(expected)
            found = {
                table.name: sorted(map(repr, session.execute(select(table))))
                for table in base.metadata.sorted_tables
            }
            outcomes.append((error, found))
    base.metadata.drop_all(engine)
    return outcomes


def everything(sender: Any, **kwargs: Any) -> None:
    """A receiver of anything."""


SHAPES: list[Callable[[Any], Program]] = []


def shape(function: Callable[[Any], Program]) -> Callable[[Any], Program]:
    """Let a shape be tested."""
    SHAPES.append(function)
    return function


# -- relationships through a table -----------------------------------------------------------------


def teams(
    base: Any, through: Callable[..., Any], id_of_team: str = "id", uselist: bool = True
) -> Program:
    """Players who reach the badges of their team, through something that is never written."""

    class Team(Named, base):
        __tablename__ = "teams"

    class Badge(Named, base):
        __tablename__ = "badges"
        team_id: Mapped[int | None] = mapped_column(ForeignKey("teams.id"))

    class Player(Named, base):
        __tablename__ = "players"
        team_id: Mapped[int | None] = mapped_column(ForeignKey("teams.id"))

    secondary = through(Team.__table__, Badge.__table__)
    key = secondary.c[id_of_team]
    Player.badges = relationship(
        Badge,
        secondary=secondary,
        primaryjoin=Player.team_id == key,
        secondaryjoin=Badge.team_id == key,
        uselist=uselist,
    )

    def create(session: Session) -> None:
        session.add_all([Team(id=1, name="a"), Team(id=2, name="b")])
        session.add_all([Badge(id=1, name="c", team_id=1), Player(id=1, name="d", team_id=1)])

    def read_and_rename(session: Session) -> None:
        badges = session.get(Player, 1).badges
        assert (badges[0] if uselist else badges).id == 1
        session.get(Player, 1).name = "p"
        session.get(Team, 1).name = "t"

    def move(session: Session) -> None:
        session.get(Player, 1).team_id = 2

    def assign(session: Session) -> None:
        player, badge = session.get(Player, 1), session.get(Badge, 1)
        player.badges = [badge] if uselist else badge

    def remove(session: Session) -> None:
        session.delete(session.get(Player, 1))
        session.delete(session.get(Team, 2))

    created = ["Team(a)", "Team(b)", "Badge(c)", "Player(d)"]
    return [
        (create, [f"post_save created {one}" for one in created]),
        (read_and_rename, ["post_save updated Team(t)", "post_save updated Player(p)"]),
        (move, ["post_save updated Player(p)"]),
        (assign, None),
        (remove, ["post_delete Player(p)", "post_delete Team(b)"]),
    ]


@shape
def through_a_mapped_table(base: Any) -> Program:
    return teams(base, lambda team, badge: team)


@shape
def one_through_a_mapped_table(base: Any) -> Program:
    return teams(base, lambda team, badge: team, uselist=False)


@shape
def through_an_alias(base: Any) -> Program:
    return teams(base, lambda team, badge: team.alias())


@shape
def through_a_query(base: Any) -> Program:
    return teams(base, lambda team, badge: select(team).subquery())


@shape
def through_a_join(base: Any) -> Program:
    return teams(base, join, "teams_id")


# -- polymorphic_on --------------------------------------------------------------------------------


def animals(animal: Any, cat: Any) -> Program:
    """A hierarchy of two classes, whatever tells them apart."""

    def create(session: Session) -> None:
        session.add_all([animal(id=1, name="a"), cat(id=2, name="b")])

    def update(session: Session) -> None:
        assert {type(one) for one in session.scalars(select(animal))} == {animal, cat}
        for one in session.scalars(select(animal)):
            one.name = f"{one.name}{one.name}"

    def remove(session: Session) -> None:
        one = session.get(animal, 2)
        assert type(one) is cat
        assert one.name == "bb"
        session.delete(one)

    return [
        (create, ["post_save created Animal(a)", "post_save created Cat(b)"]),
        (update, ["post_save updated Animal(aa)", "post_save updated Cat(bb)"]),
        (remove, ["post_delete Cat(bb)"]),
    ]


@shape
def polymorphic_on_a_column_that_is_no_attribute(base: Any) -> Program:
    """Of another table, which is joined to load the right classes and not written."""
    table = Table(
        "animals", base.metadata, Column("id", Integer, primary_key=True), Column("name", String)
    )
    kinds = Table(
        "kinds", base.metadata, Column("id", Integer, primary_key=True), Column("kind", String)
    )
    joined = select(table, kinds.c.kind).outerjoin(kinds, kinds.c.id == table.c.id).subquery()

    class Animal(base):
        __table__ = table
        __mapper_args__ = {
            "with_polymorphic": ("*", joined),
            "polymorphic_on": joined.c.kind,
            "polymorphic_identity": "animal",
        }

    class Cat(Animal):
        __mapper_args__ = {"polymorphic_identity": "cat"}

    def tell_apart(session: Session) -> None:
        session.execute(insert(kinds), [{"id": 1, "kind": "animal"}, {"id": 2, "kind": "cat"}])

    create, *rest = animals(Animal, Cat)
    return [create, (tell_apart, []), *rest]


@shape
def polymorphic_on_an_expression(base: Any) -> Program:
    class Animal(Named, base):
        __tablename__ = "animals"
        kind: Mapped[str | None] = mapped_column()
        __mapper_args__ = {
            "polymorphic_on": case((kind == "cat", "cat"), else_="animal"),
            "polymorphic_identity": "animal",
        }

    class Cat(Animal):
        __mapper_args__ = {"polymorphic_identity": "cat"}

        def __init__(self, **values: Any) -> None:
            super().__init__(kind="cat", **values)

    return animals(Animal, Cat)


@shape
def concrete_classes_of_an_abstract_base(base: Any) -> Program:
    if before_sqlalchemy("2.1"):
        pytest.skip("once such a registry is disposed of, SQLAlchemy configures no mapper any more")

    class AnyAnimal(AbstractConcreteBase, base):
        pass

    class Animal(AnyAnimal):
        __tablename__ = "animals"
        id = Column(Integer, primary_key=True)
        name = Column(String)
        __mapper_args__ = {"concrete": True, "polymorphic_identity": "animal"}

    class Cat(AnyAnimal):
        __tablename__ = "cats"
        id = Column(Integer, primary_key=True)
        name = Column(String)
        __mapper_args__ = {"concrete": True, "polymorphic_identity": "cat"}

    def create(session: Session) -> None:
        session.add_all([Animal(id=1, name="a"), Cat(id=1, name="b")])

    def update(session: Session) -> None:
        for one in session.scalars(select(AnyAnimal)):
            one.name = "c"

    return [
        (create, ["post_save created Animal(a)", "post_save created Cat(b)"]),
        (update, ["post_save updated Animal(c)", "post_save updated Cat(c)"]),
    ]


# -- instances of the wrong class ------------------------------------------------------------------


@shape
def instances_of_the_wrong_class(base: Any) -> Program:
    links = Table(
        "links",
        base.metadata,
        Column("parent_id", ForeignKey("parents.id"), primary_key=True),
        Column("friend_id", ForeignKey("friends.id"), primary_key=True),
    )

    class Other(Named, base):
        __tablename__ = "others"

    class Friend(Named, base):
        __tablename__ = "friends"

    class Child(Named, base):
        __tablename__ = "children"
        parent_id: Mapped[int | None] = mapped_column(ForeignKey("parents.id"))

    class Pet(Named, base):
        __tablename__ = "pets"
        owner_id: Mapped[int | None] = mapped_column(ForeignKey("parents.id"))

    class Parent(Named, base):
        __tablename__ = "parents"
        favorite_id: Mapped[int | None] = mapped_column(ForeignKey("friends.id"))
        children: Mapped[list[Any]] = relationship(Child, cascade="all, delete-orphan")
        pets: Mapped[list[Any]] = relationship(Pet, passive_updates=False)
        favorite: Mapped[Any] = relationship(Friend)
        friends: Mapped[list[Any]] = relationship(Friend, secondary=links)

    Pet.owner = relationship(Parent, overlaps="pets")

    def create(session: Session) -> None:
        session.add_all([Parent(id=1, name="p"), Pet(id=1, name="q"), Other(id=1, name="o")])

    def new(session: Session) -> Any:
        return Other()

    def known(session: Session) -> Any:
        return session.get(Other, 1)

    def assign(cls: Any, name: str, make: Step) -> Step:
        def step(session: Session) -> None:
            instance, wrong = session.get(cls, 1), make(session)
            instance.name = "not written"
            setattr(instance, name, [wrong] if name in ("children", "pets", "friends") else wrong)
            session.flush()

        return step

    created = ["Parent(p)", "Pet(q)", "Other(o)"]
    return [
        (create, [f"post_save created {one}" for one in created]),
        *(
            (assign(cls, name, make), None)
            for cls, names in (
                (Parent, ("children", "pets", "friends", "favorite")),
                (Pet, ["owner"]),
            )
            for name in names
            for make in (new, known)
        ),
    ]


@shape
def a_row_without_its_part_in_one_of_two_tables(base: Any) -> Program:
    class Person(Named, base):
        __tablename__ = "people"
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

    class Boss(Person):
        __tablename__ = "bosses"
        id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
        budget: Mapped[int | None]
        __mapper_args__ = {"polymorphic_identity": "boss"}

    def create(session: Session) -> None:
        session.add(Boss(id=1, name="a", budget=1))

    def take_part_away(session: Session) -> None:
        session.connection().execute(delete(Boss.__table__))

    def remove(session: Session) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # of the DELETE that matches no row
            session.delete(session.get(Person, 1))
            session.flush()

    return [
        (create, ["post_save created Boss(a)"]),
        (take_part_away, []),
        (remove, ["post_delete Boss(a)"]),
    ]


# -- the test --------------------------------------------------------------------------------------


@pytest.mark.parametrize("define", [pytest.param(one, id=one.__name__) for one in SHAPES])
def test_a_flush_does_what_it_does_without_signals(
    engine: Engine, base: Any, caplog: pytest.LogCaptureFixture, define: Callable[[Any], Program]
):
    """Rows and errors are the same, and every row that was written has sent its signal."""
    caplog.set_level(logging.DEBUG, "sqla_signals")
    program = define(base)
    plain = run(engine, base, program, Log())
    installation = sqla_signals.install()
    log = listen(sender=base)
    for signal in (post_save, post_delete, post_bulk):
        signal.connect(everything, weak=False, sender=base, on="commit")
    m2m_changed.connect(everything, weak=False)
    assert run(engine, base, program, log) == plain
    with trace():
        assert run(engine, base, program, log) == plain
    assert "everything" in str(sqla_signals.explain(base))
    assert caplog.messages == []
    installation.remove()

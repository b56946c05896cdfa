"""The behaviours of Django's ``tests/m2m_signals``.

Two differences run through all of them. A row is told of from the side that the receiver was
connected to, and not from the side that it was changed from, which a backref does not keep. And
only rows that the flush really adds or removes are told of, so there is no ``clear`` action.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Column, Engine, ForeignKey, Table, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import sqla_signals
from sqla_signals import m2m_changed, receiver

from ..contract.observing import rows


class Base(DeclarativeBase):
    """The declarative base."""


def association(name: str, left: str, right: str) -> Table:
    """A table with nothing but the two keys."""
    return Table(
        name,
        Base.metadata,
        Column("left_id", ForeignKey(left), primary_key=True),
        Column("right_id", ForeignKey(right), primary_key=True),
    )


standard = association("standard", "cars.id", "parts.id")
extras = association("extras", "cars.id", "parts.id")
admirations = association("admirations", "people.id", "people.id")
friendships = association("friendships", "people.id", "people.id")


class Part(Base):
    __tablename__ = "parts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    cars: Mapped[list[Car]] = relationship(secondary=standard, back_populates="default_parts")
    cars_optional: Mapped[list[Car]] = relationship(
        secondary=extras, back_populates="optional_parts"
    )


class Car(Base):
    __tablename__ = "cars"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    default_parts: Mapped[list[Part]] = relationship(secondary=standard, back_populates="cars")
    optional_parts: Mapped[list[Part]] = relationship(
        secondary=extras, back_populates="cars_optional"
    )
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "car"}


class SportsCar(Car):
    __tablename__ = "sports_cars"
    id: Mapped[int] = mapped_column(ForeignKey("cars.id"), primary_key=True)
    price: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "sports car"}


class Person(Base):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    fans: Mapped[list[Person]] = relationship(
        secondary=admirations,
        primaryjoin=lambda: Person.id == admirations.c.left_id,
        secondaryjoin=lambda: Person.id == admirations.c.right_id,
        back_populates="idols",
    )
    idols: Mapped[list[Person]] = relationship(
        secondary=admirations,
        primaryjoin=lambda: Person.id == admirations.c.right_id,
        secondaryjoin=lambda: Person.id == admirations.c.left_id,
        back_populates="fans",
    )
    friends: Mapped[list[Person]] = relationship(
        secondary=friendships,
        primaryjoin=lambda: Person.id == friendships.c.left_id,
        secondaryjoin=lambda: Person.id == friendships.c.right_id,
    )


NAMES = {
    Car: ("VW", "BMW", "Toyota"),
    Part: ("Wheelset", "Doors", "Engine", "Airbag", "Sunroof"),
    Person: ("Alice", "Bob", "Chuck", "Daisy"),
}


@pytest.fixture
def session(engine: Engine, installed) -> Iterator[Session]:
    """A session on three cars, their possible parts, and four people."""
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        for cls, names in NAMES.items():
            session.add_all(cls(name=name) for name in names)
        session.commit()
        yield session


@pytest.fixture
def world(session: Session) -> Any:
    """The instances by name."""
    return SimpleNamespace(
        **{one.name.lower(): one for cls in NAMES for one in session.scalars(select(cls))}
    )


Message = tuple[str, str, str, str, list[str]]


def messages(*senders: Any) -> list[Message]:
    """What receivers of these senders hear: instance, action, relationship, model, and names."""
    heard: list[Message] = []

    @receiver(m2m_changed, sender=list(senders))
    def hear(sender, instance, action, relationship, model, pk_set, session, **kwargs):
        assert isinstance(sender, Table)
        query = select(model.name).where(model.id.in_(pk_set)).order_by(model.name)
        names = list(session.connection().scalars(query))
        heard.append((instance.name, action, relationship.key, model.__name__, names))

    return heard


def told(what: str, *line: Any) -> list[Message]:
    """The line before, and the line after."""
    name, *rest = line
    return [(name, f"{when}_{what}", *rest) for when in ("pre", "post")]


def pairs(session: Session, table: Table) -> set[tuple[int, int]]:
    """The rows of an association table."""
    return set(rows(session, table.c.left_id, table.c.right_id))


def keys(instances: Iterable[Any], others: Iterable[Any]) -> set[tuple[int, int]]:
    """The rows that should be there."""
    others = list(others)
    return {(one.id, other.id) for one in instances for other in others}


def test_only_what_is_really_written_is_in_the_pk_set(session: Session, world: Any):
    """``test_pk_set_on_repeated_add_remove``: nothing is written, nothing is sent.

    To append or remove a second time is another matter: SQLAlchemy tries to do that with the rows.
    """
    heard = messages(Car.default_parts)
    parts = world.vw.default_parts
    parts.append(world.wheelset)
    session.flush()
    assert heard == told("add", "VW", "default_parts", "Part", ["Wheelset"])
    parts[:] = [world.wheelset]
    session.flush()
    assert len(heard) == 2
    parts.remove(world.wheelset)
    session.flush()
    assert heard[2:] == told("remove", "VW", "default_parts", "Part", ["Wheelset"])
    parts[:] = []
    session.flush()
    assert len(heard) == 4
    assert pairs(session, standard) == set()


def test_adding_from_either_side(session: Session, world: Any):
    """``test_m2m_relations_add_remove_clear``: before and after, with what was added."""
    world.vw.default_parts.append(world.sunroof)
    session.flush()
    heard, reverse = messages(Car.default_parts), messages(Part.cars)
    world.vw.default_parts += [world.wheelset, world.doors, world.engine]
    session.flush()
    assert heard == told("add", "VW", "default_parts", "Part", ["Doors", "Engine", "Wheelset"])
    reverse.clear()
    world.doors.cars += [world.bmw, world.toyota]
    session.flush()
    assert reverse == told("add", "Doors", "cars", "Car", ["BMW", "Toyota"])
    assert pairs(session, standard) == (
        keys([world.vw], [world.sunroof, world.wheelset, world.doors, world.engine])
        | keys([world.bmw, world.toyota], [world.doors])
    )


def test_removing(session: Session, world: Any):
    """``test_m2m_relations_signals_remove_relation`` differs: what was not there is not told of."""
    world.vw.default_parts = [world.engine, world.doors]
    session.flush()
    heard = messages(Car.default_parts)
    world.vw.default_parts = [
        part for part in world.vw.default_parts if part not in (world.engine, world.airbag)
    ]
    session.flush()
    assert heard == told("remove", "VW", "default_parts", "Part", ["Engine"])
    assert pairs(session, standard) == keys([world.vw], [world.doors])


def test_a_second_relationship_to_the_same_model_is_a_sender_of_its_own(
    session: Session, world: Any
):
    """``test_m2m_relations_signals_give_the_self_vw_some_optional_parts``."""
    heard = messages(Car.optional_parts)
    reverse = messages(Part.cars_optional)
    other = messages(Car.default_parts)
    world.vw.optional_parts = [world.airbag, world.sunroof]
    session.flush()
    assert heard == told("add", "VW", "optional_parts", "Part", ["Airbag", "Sunroof"])
    reverse.clear()
    world.airbag.cars_optional = [world.vw, world.bmw, world.toyota]
    session.flush()
    assert reverse == told("add", "Airbag", "cars_optional", "Car", ["BMW", "Toyota"])
    assert other == []
    assert pairs(session, extras) == (
        keys([world.vw], [world.sunroof])
        | keys([world.vw, world.bmw, world.toyota], [world.airbag])
    )


def test_removing_from_the_other_side(session: Session, world: Any):
    """``test_m2m_relations_signals_reverse_relation_with_custom_related_name``."""
    world.vw.optional_parts = [world.airbag]
    session.flush()
    heard, reverse = messages(Car.optional_parts), messages(Part.cars_optional)
    world.airbag.cars_optional.remove(world.vw)
    session.flush()
    assert reverse == told("remove", "Airbag", "cars_optional", "Car", ["VW"])
    assert heard == told("remove", "VW", "optional_parts", "Part", ["Airbag"])
    assert pairs(session, extras) == set()


@pytest.mark.parametrize(
    "empty",
    [lambda parts: parts.clear(), lambda parts: parts.__setitem__(slice(None), [])],
    ids=["clear", "slice"],
)
def test_clearing_is_removing_each_row(empty: Any, session: Session, world: Any):
    """``test_m2m_relations_signals_clear_all_parts_of_the_self_vw`` differs: with its keys."""
    world.vw.default_parts = [world.engine, world.doors]
    session.flush()
    heard = messages(Car.default_parts)
    empty(world.vw.default_parts)
    session.flush()
    assert heard == told("remove", "VW", "default_parts", "Part", ["Doors", "Engine"])
    assert pairs(session, standard) == set()


@pytest.mark.parametrize(
    ("part", "attribute", "key"),
    [("doors", Part.cars, "cars"), ("airbag", Part.cars_optional, "cars_optional")],
)
def test_clearing_from_the_other_side(
    part: str, attribute: Any, key: str, session: Session, world: Any
):
    """``test_m2m_relations_signals_all_the_doors_off_of_cars``.

    And ``test_m2m_relations_signals_reverse_relation``.
    """
    one = getattr(world, part)
    setattr(one, key, [world.vw, world.bmw])
    session.flush()
    heard = messages(attribute)
    getattr(one, key).clear()
    session.flush()
    assert heard == told("remove", one.name, key, "Car", ["BMW", "VW"])


def test_clearing_what_is_empty_sends_nothing(session: Session, world: Any):
    """Django sends ``pre_clear`` and ``post_clear``; no row is removed."""
    heard = messages(Car.default_parts)
    world.vw.default_parts.clear()
    session.flush()
    assert heard == []


def test_new_members_and_assignment(session: Session, world: Any):
    """``test_m2m_relations_signals_alternative_ways``. A new key is not known to ``pre_add``."""
    heard = messages(Car.default_parts)
    world.vw.default_parts.append(Part(name="Windows"))
    session.flush()
    (before, after) = heard
    assert before[:4] == ("VW", "pre_add", "default_parts", "Part")
    assert after == ("VW", "post_add", "default_parts", "Part", ["Windows"])
    heard.clear()
    world.vw.default_parts = [world.wheelset, world.doors, world.engine]
    session.flush()
    added = ("VW", "default_parts", "Part", ["Doors", "Engine", "Wheelset"])
    removed = ("VW", "default_parts", "Part", ["Windows"])
    # Everything before the first statement, everything else after the last one.
    assert heard == [
        told("remove", *removed)[0],
        told("add", *added)[0],
        told("remove", *removed)[1],
        told("add", *added)[1],
    ]
    assert pairs(session, standard) == keys([world.vw], [world.wheelset, world.doors, world.engine])


def test_assigning_removes_only_what_is_necessary(session: Session, world: Any):
    """``test_m2m_relations_signals_clearing_removing``: there is no ``clear=True``."""
    world.vw.default_parts = [world.wheelset, world.doors, world.engine]
    session.flush()
    heard = messages(Car.default_parts)
    world.vw.default_parts.clear()
    world.vw.default_parts = [world.wheelset, world.doors]
    session.flush()
    assert heard == told("remove", "VW", "default_parts", "Part", ["Engine"])
    assert pairs(session, standard) == keys([world.vw], [world.wheelset, world.doors])


def test_a_fixture_that_sets_a_collection_says_so(session: Session, world: Any):
    """``test_m2m_relations_set_base_raw``, of 6.1: ``raw`` comes along.

    ``test_m2m_relations_set_base_raw_clear`` differs: what stays is not told of.
    """
    world.chuck.idols = [world.daisy, world.bob]
    session.flush()
    heard = messages(Person.idols)
    raws: list[bool] = []
    m2m_changed.connect(lambda sender, raw, **kwargs: raws.append(raw), Person.idols, weak=False)
    with sqla_signals.raw(session):
        world.chuck.idols = [world.alice, world.bob]
        session.flush()
    assert heard == [
        ("Chuck", "pre_remove", "idols", "Person", ["Daisy"]),
        ("Chuck", "pre_add", "idols", "Person", ["Alice"]),
        ("Chuck", "post_remove", "idols", "Person", ["Daisy"]),
        ("Chuck", "post_add", "idols", "Person", ["Alice"]),
    ]
    assert raws == [True] * 4
    world.chuck.idols.append(world.daisy)
    session.flush()
    assert raws == [True] * 4 + [False] * 2


def test_a_subclass_has_the_relationships_of_its_base(session: Session, world: Any):
    """``test_m2m_relations_signals_when_inheritance``."""
    heard, reverse = messages(Car.default_parts), messages(Part.cars)
    bugatti = SportsCar(name="Bugatti", price=1000000)
    session.add(bugatti)
    session.flush()
    bugatti.default_parts = [world.doors]
    session.flush()
    assert heard == told("add", "Bugatti", "default_parts", "Part", ["Doors"])
    reverse.clear()
    world.engine.cars.append(bugatti)
    session.flush()
    assert reverse == told("add", "Engine", "cars", "Car", ["Bugatti"])
    assert pairs(session, standard) == keys([bugatti], [world.doors, world.engine])


def test_friends_of_the_same_class(session: Session, world: Any):
    """``test_m2m_relations_with_self_add_friends`` differs: no relationship is symmetrical."""
    heard = messages(Person.friends, Person.fans)
    world.alice.friends = [world.bob, world.chuck]
    session.flush()
    assert heard == told("add", "Alice", "friends", "Person", ["Bob", "Chuck"])
    assert world.bob.friends == []
    assert pairs(session, friendships) == keys([world.alice], [world.bob, world.chuck])


def test_fans_and_idols_are_the_two_sides_of_one_table(session: Session, world: Any):
    """``test_m2m_relations_with_self_add_fan``, ``test_m2m_relations_with_self_add_idols``."""
    of_fans, of_idols = messages(Person.fans), messages(Person.idols)
    world.alice.fans = [world.daisy]
    session.flush()
    assert of_fans == told("add", "Alice", "fans", "Person", ["Daisy"])
    assert of_idols == told("add", "Daisy", "idols", "Person", ["Alice"])
    of_idols.clear()
    world.chuck.idols = [world.alice, world.bob]
    session.flush()
    assert of_idols == told("add", "Chuck", "idols", "Person", ["Alice", "Bob"])
    assert pairs(session, admirations) == (
        keys([world.alice], [world.daisy]) | keys([world.alice, world.bob], [world.chuck])
    )


def test_with_the_table_as_its_sender_each_row_is_told_from_one_side(session: Session, world: Any):
    """Django's ``sender`` is the ``through`` model: ours the table, and the first column's side."""
    heard = messages(standard)
    world.vw.default_parts = [world.doors]
    world.doors.cars.append(world.bmw)
    session.flush()
    assert sorted(heard) == sorted(
        told("add", "VW", "default_parts", "Part", ["Doors"])
        + told("add", "BMW", "default_parts", "Part", ["Doors"])
    )

"""Instances, keys, and which row is whose."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, ForeignKeyConstraint, inspect, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    make_transient,
    make_transient_to_detached,
    mapped_column,
    relationship,
)
from sqlalchemy.orm.exc import UnmappedInstanceError

from sqla_signals import UNSET, Change, post_delete, post_save, pre_save, receiver

from .models import Author, Book, Tag
from .observing import Log, both, rows


class OwnBase(DeclarativeBase):
    """The base of the special shapes below."""


class Country(OwnBase):
    """A natural key; its cities follow by ON UPDATE CASCADE."""

    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    cities: Mapped[list[City]] = relationship(passive_updates=True, order_by="City.id")


class City(OwnBase):
    """The database carries the key of its country over."""

    __tablename__ = "cities"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    code: Mapped[str | None] = mapped_column(ForeignKey("countries.code", onupdate="CASCADE"))


class Region(OwnBase):
    """A natural key; the unit of work updates its towns."""

    __tablename__ = "regions"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    towns: Mapped[list[Town]] = relationship(passive_updates=False, order_by="Town.id")


class Town(OwnBase):
    """The unit of work carries the key of its region over."""

    __tablename__ = "towns"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    code: Mapped[str | None] = mapped_column(
        ForeignKey("regions.code", deferrable=True, initially="DEFERRED")
    )


class Seat(OwnBase):
    """A composite key."""

    __tablename__ = "seats"
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    bookings: Mapped[list[Booking]] = relationship(cascade="all, delete-orphan")


class Booking(OwnBase):
    """A composite key that is a composite foreign key and more."""

    __tablename__ = "bookings"
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    __table_args__ = (ForeignKeyConstraint(["row", "number"], ["seats.row", "seats.number"]),)


class Point(MappedAsDataclass, OwnBase):
    """Instances with equal values are equal, and none can be hashed."""

    __tablename__ = "points"
    id: Mapped[int] = mapped_column(primary_key=True, init=False, compare=False)
    name: Mapped[str | None] = mapped_column(default=None)


@pytest.fixture
def special(engine: Engine, installed) -> Iterator[Session]:
    """A session on the tables of the special shapes."""
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def sent_for(log: Log) -> list[tuple[str, Any]]:
    """Each line with its instance."""
    return [(sent.line, sent.instance) for sent in log.sent]


# -- row switches --------------------------------------------------------------------------------


def test_a_row_switch_is_a_delete_of_the_old_instance_and_a_created_save_of_the_new(
    special: Session, log: Log, statements: list[str]
):
    """SQLAlchemy makes one UPDATE of it."""
    old = Country(code="c", name="old")
    special.add(old)
    special.commit()
    special.refresh(old)
    log.clear()
    statements.clear()
    special.delete(old)
    new = Country(code="c", name="new")
    special.add(new)
    special.flush()
    written = [sql.split()[0] for sql in statements if not sql.startswith("SELECT")]
    assert written == ["UPDATE"]
    assert sorted(sent_for(log), key=lambda pair: pair[0]) == [
        ("post_delete Country(old)", old),
        ("post_save created Country(new)", new),
        ("pre_delete Country(old)", old),
        ("pre_save created Country(new)", new),
    ]
    assert log.post == ["post_delete Country(old)", "post_save created Country(new)"]
    sent = log.one("post_save")
    assert sent["update_fields"] is None
    assert sent.changes["name"] == Change(UNSET, "new")
    assert log.one("post_delete")["origin"] is None
    assert rows(special, Country.code, Country.name) == [("c", "new")]
    assert (inspect(old).deleted, inspect(new).persistent) == (True, True)


def test_a_row_switch_that_writes_no_column_is_a_delete_and_a_created_save_all_the_same(
    special: Session, log: Log
):
    """To the session, one instance is gone and another one is there."""
    old = Country(code="c")
    special.add(old)
    special.flush()
    log.clear()
    special.delete(old)
    new = Country(code="c")
    special.add(new)
    special.flush()
    assert sorted(log.lines) == [
        "post_delete Country(?)",
        "post_save created Country(?)",
        "pre_delete Country(?)",
        "pre_save created Country(?)",
    ]
    assert rows(special, Country.code) == ["c"]


def test_a_key_deleted_in_one_flush_and_added_in_the_next_is_no_row_switch(
    special: Session, log: Log
):
    """A DELETE and an INSERT, each with its pair."""
    old = Country(code="c", name="old")
    special.add(old)
    special.flush()
    log.clear()
    special.delete(old)
    special.flush()
    special.add(Country(code="c", name="new"))
    special.flush()
    assert log.lines == both("delete Country(old)") + both("save created Country(new)")
    assert rows(special, Country.name) == ["new"]


# -- primary keys --------------------------------------------------------------------------------


def test_a_changed_primary_key_is_one_update(special: Session, log: Log):
    """With ``passive_updates=True`` the database takes care of the children, without signals."""
    country = Country(code="a", name="n", cities=[City(name="x"), City(name="y")])
    special.add(country)
    special.commit()
    special.refresh(country)
    log.clear()
    country.code = "b"
    special.flush()
    assert log.lines == both("save updated Country(n)")
    assert log.one("post_save").changes == {"code": Change("a", "b")}
    assert log.one("post_save")["update_fields"] == {"code"}
    assert rows(special, City.code) == ["b", "b"]


def test_with_passive_updates_off_the_children_of_a_changed_key_are_saved_too(
    special: Session, log: Log
):
    """The unit of work writes an UPDATE for each of them."""
    region = Region(code="a", name="n", towns=[Town(name="x"), Town(name="y")])
    special.add(region)
    special.commit()
    special.refresh(region)
    [special.refresh(town) for town in region.towns]
    log.clear()
    region.code = "b"
    special.flush()
    assert log.pre == [
        "pre_save updated Region(n)",
        "pre_save updated Town(x)",
        "pre_save updated Town(y)",
    ]
    assert sorted(log.post) == [
        "post_save updated Region(n)",
        "post_save updated Town(x)",
        "post_save updated Town(y)",
    ]
    assert log.one("post_save", region.towns[0]).changes == {"code": Change("a", "b")}
    assert rows(special, Town.code) == ["b", "b"]
    special.commit()


def test_a_key_changed_and_changed_back_is_nothing(special: Session, log: Log):
    """A reverted assignment, like any other."""
    country = Country(code="a", name="n")
    special.add(country)
    special.commit()
    special.refresh(country)
    log.clear()
    country.code = "b"
    country.code = "a"
    special.flush()
    assert log.lines == []


def test_composite_keys_make_no_difference(special: Session, log: Log):
    """Insert with children, change a key part, delete."""
    seat = Seat(row=1, number=2, name="s", bookings=[Booking(day=3, name="b")])
    special.add(seat)
    special.flush()
    assert sorted(log.post) == ["post_save created Booking(b)", "post_save created Seat(s)"]
    booking = seat.bookings[0]
    assert log.one("post_save", booking).changes == {
        "row": Change(UNSET, 1),
        "number": Change(UNSET, 2),
        "day": Change(UNSET, 3),
        "name": Change(UNSET, "b"),
    }
    log.clear()
    booking.day = 4
    special.flush()
    assert log.lines == both("save updated Booking(b)")
    assert log.one("post_save").changes == {"day": Change(3, 4)}
    log.clear()
    seat.bookings.remove(booking)
    special.flush()
    assert log.lines == both("delete Booking(b)")
    special.delete(seat)
    special.flush()
    assert rows(special, Seat.row) == rows(special, Booking.row) == []


# -- equal, unhashable and forgotten instances ---------------------------------------------------


def test_equal_and_unhashable_instances_are_told_apart(special: Session, log: Log):
    """Dataclasses with ``__eq__`` and without ``__hash__``."""
    one, two = Point("p"), Point("p")
    assert one == two
    assert Point.__hash__ is None
    special.add_all([one, two])
    special.flush()
    assert log.lines == both("save created Point(p)", "save created Point(p)")
    assert all(
        sent.instance is each for sent, each in zip(log.sent, [one, two, one, two], strict=True)
    )
    log.clear()
    one.name = "q"
    two.name = "q"
    special.flush()
    assert log.lines == both("save updated Point(q)", "save updated Point(q)")
    log.clear()
    special.delete(two)
    special.flush()
    assert log.lines == both("delete Point(q)")
    assert log.sent[0].instance is two
    assert rows(special, Point.name) == ["q"]


def test_instances_that_nobody_else_holds_get_their_signals(special: Session, log: Log):
    """Added and forgotten; the receiver sees each of them whole."""
    names = []

    @receiver(post_save, sender=Country)
    def fn(sender, instance, **kwargs):
        names.append(instance.name)

    for n in range(20):
        special.add(Country(code=f"{n:02}", name=f"{n}"))
    gc.collect()
    special.flush()
    assert names == [f"{n}" for n in range(20)]
    log.clear()
    names.clear()
    gc.collect()
    for country in special.scalars(select(Country)):
        country.name += "!"
        del country
    gc.collect()
    special.flush()
    assert sorted(names) == sorted(f"{n}!" for n in range(20))


def test_nothing_is_held_after_the_flush(special: Session):
    """An instance that nobody else holds becomes garbage when its signals were sent."""
    references = []

    @receiver([pre_save, post_save, post_delete], sender=Country)
    def fn(sender, instance, changes=None, **kwargs):
        references.append(weakref.ref(instance))
        dict(changes or {})

    special.add(Country(code="a", name="n"))
    special.flush()
    special.get(Country, "a").name = "m"
    special.flush()
    special.delete(special.get(Country, "a"))
    special.flush()
    special.expire_all()
    special.commit()
    gc.collect()
    assert len(references) == 5
    assert [reference() for reference in references] == [None] * 5


# -- partial flushes -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*`objects` parameter")
def test_a_partial_flush_sends_for_the_given_instances_alone(session: Session, log: Log):
    """The rest waits for its own flush."""
    author, other, book, tag = Author(name="a"), Author(name="o"), Book(name="b"), Tag(name="t")
    session.add_all([author, other, tag])
    session.flush()
    log.clear()
    author.name, other.name = "c", "p"
    session.add(book)
    session.delete(tag)
    session.flush([author, book])
    assert sorted(log.lines) == sorted(both("save updated Author(c)", "save created Book(b)"))
    assert rows(session, Author.name) == ["c", "o"]
    log.clear()
    session.flush()
    assert sorted(log.lines) == sorted(both("save updated Author(p)", "delete Tag(t)"))
    assert rows(session, Author.name) == ["c", "p"]
    assert rows(session, Tag.id) == []


@pytest.mark.filterwarnings("ignore:.*`objects` parameter")
def test_what_a_receiver_adds_to_a_partial_flush_is_announced_by_the_flush_that_writes_it(
    session: Session, log: Log
):
    """SQLAlchemy leaves it pending, so that flush is the next one."""

    @receiver(pre_save, sender=Author)
    def fn(sender, session, **kwargs):
        session.add(Tag(name="t"))

    author = Author(name="a")
    session.add(author)
    session.flush([author])
    assert log.lines == both("save created Author(a)")
    log.clear()
    session.flush()
    assert log.lines == both("save created Tag(t)")
    assert rows(session, Tag.name) == ["t"]


class NotMapped:
    """Of no use to a session."""


@pytest.mark.filterwarnings("ignore:.*`objects` parameter")
@pytest.mark.parametrize("wrong", [NotMapped(), NotMapped, Author, "text", None, 1])
def test_a_partial_flush_of_what_is_no_instance_is_sqlalchemys_own_error(
    session: Session, log: Log, wrong: Any
):
    """Nothing is written, so nothing is sent."""
    author = Author(name="a")
    session.add(author)
    with pytest.raises(UnmappedInstanceError) as caught:
        session.flush([author, wrong])
    assert not hasattr(caught.value, "__notes__")
    assert log.lines == []
    session.flush([author])
    assert log.lines == both("save created Author(a)")
    assert rows(session, Author.name) == ["a"]


@pytest.mark.filterwarnings("ignore:.*`objects` parameter")
def test_a_partial_flush_of_what_can_be_iterated_over_once_writes_what_it_always_writes(
    session: Session, log: Log
):
    """``pre_save`` comes right before the statement, because only the flush may look."""
    author, tag = Author(name="a"), Tag(name="t")
    session.add_all([author, tag])
    session.flush(one for one in [author])
    assert log.lines == both("save created Author(a)")
    assert rows(session, Author.name) == ["a"]
    assert rows(session, Tag.name) == []


# -- other ways into and out of a session --------------------------------------------------------


def test_merge_of_a_new_key_is_created_and_of_a_known_one_an_update(session: Session, log: Log):
    """The signals are for the instance in the session; equal values are nothing."""
    merged = session.merge(Author(id=7, name="a", age=1))
    session.flush()
    assert sent_for(log) == [
        ("pre_save created Author(a)", merged),
        ("post_save created Author(a)", merged),
    ]
    session.commit()
    log.clear()
    session.merge(Author(id=7, name="a", age=1))
    session.flush()
    assert log.lines == []
    again = session.merge(Author(id=7, name="b", age=1))
    assert again is merged
    session.flush()
    assert log.lines == both("save updated Author(b)")
    assert log.one("post_save").changes == {"name": Change("a", "b")}
    assert rows(session, Author.id, Author.name) == [(7, "b")]


def test_merge_of_a_collection_saves_and_orphans_its_members(session: Session, log: Log):
    """What is not in the given collection any more is taken out."""
    one, two = Book(name="one"), Book(name="two")
    author = Author(name="a", books=[one, two])
    session.add(author)
    session.commit()
    given = Author(id=author.id, name="a", books=[Book(id=one.id, name="uno", author_id=author.id)])
    two.name
    log.clear()
    with session.no_autoflush:
        session.merge(given)
    session.flush()
    assert sorted(log.post) == ["post_save updated Book(two)", "post_save updated Book(uno)"]
    assert sorted(rows(session, Book.name, Book.author_id), key=str) == [
        ("two", None),
        ("uno", author.id),
    ]


def test_make_transient_makes_a_copy_that_is_created(session: Session, log: Log):
    """The row stays; the instance becomes another row."""
    author = Author(name="a")
    session.add(author)
    session.commit()
    session.refresh(author)
    log.clear()
    make_transient(author)
    author.id = None
    session.add(author)
    session.flush()
    assert log.lines == both("save created Author(a)")
    assert rows(session, Author.name) == ["a", "a"]


def test_make_transient_to_detached_can_update_a_row_that_was_never_loaded(
    session: Session, log: Log
):
    """The old value is unset."""
    session.connection().execute(Author.__table__.insert().values(id=5, name="a"))
    author = Author(id=5)
    make_transient_to_detached(author)
    session.add(author)
    author.name = "b"
    session.flush()
    assert log.lines == both("save updated Author(b)")
    assert log.one("post_save").changes == {"name": Change(UNSET, "b")}
    assert rows(session, Author.id, Author.name) == [(5, "b")]


def test_a_detached_instance_that_is_added_and_deleted_sends_a_delete(library, log: Log):
    """It came from another session."""
    with Session(library) as session:
        author = Author(name="a")
        session.add(author)
        session.commit()
        session.refresh(author)
    log.clear()
    with Session(library) as session:
        session.delete(author)
        session.commit()
    assert log.lines == both("delete Author(a)")
    assert rows(library, Author.id) == []


def test_a_delete_inside_a_savepoint_that_is_rolled_back_can_be_repeated(session, log: Log):
    """Flush signals are sent when the flush is, whatever becomes of the transaction."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    session.refresh(author)
    log.clear()
    for _ in range(2):
        savepoint = session.begin_nested()
        session.delete(author)
        session.flush()
        savepoint.rollback()
        session.refresh(author)
    assert log.lines == both("delete Author(a)") * 2
    assert rows(session, Author.name) == ["a"]


def test_bulk_methods_and_statements_send_nothing_of_the_flush(session: Session, log: Log):
    """They do not use the unit of work."""
    session.execute(Author.__table__.insert().values(name="core"))
    session.bulk_save_objects([Author(name="bulk")])
    session.flush()
    assert log.lines == []
    assert rows(session, Author.name) == ["bulk", "core"]


def test_a_failing_flush_sends_again_when_it_is_repeated(session: Session, library, log: Log):
    """State of the first flush does not leak into the second."""
    session.add(Author(id=1, name="a"))
    session.commit()
    duplicate = Author(id=1, name="b")
    with session.no_autoflush:
        session.expunge_all()
    session.add(duplicate)
    log.clear()
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    assert log.lines == ["pre_save created Author(b)"]
    log.clear()
    duplicate.id = 2
    session.add(duplicate)
    session.commit()
    assert log.lines == both("save created Author(b)")
    assert rows(library, Author.name) == ["a", "b"]

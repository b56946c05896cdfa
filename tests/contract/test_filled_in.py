"""What an UPDATE fills in besides: versions, ``onupdate`` columns, what the database computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Computed,
    Engine,
    FetchedValue,
    ForeignKey,
    Integer,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sqla_signals import UNSET, Change, post_save, pre_save
from sqla_signals.receivers.receiver import Phase

from .observing import Log, listen, rows


class Base(DeclarativeBase):
    """The base of what follows."""


class Asset(Base):
    """A version and a stamp in the table of the base class."""

    __tablename__ = "assets"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    version: Mapped[int] = mapped_column()
    stamp: Mapped[int | None] = mapped_column(default=0, onupdate=99)
    counted: Mapped[int | None] = mapped_column(onupdate=literal(1) + 1)
    __mapper_args__ = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "asset",
        "version_id_col": version,
    }


class Car(Asset):
    """Another stamp in its own."""

    __tablename__ = "cars"
    id: Mapped[int] = mapped_column(ForeignKey("assets.id"), primary_key=True)
    wheels: Mapped[int | None]
    driven: Mapped[int | None] = mapped_column(onupdate=98)
    __mapper_args__ = {"polymorphic_identity": "car"}


class Truck(Car):
    """A third table."""

    __tablename__ = "trucks"
    id: Mapped[int] = mapped_column(ForeignKey("cars.id"), primary_key=True)
    load: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "truck"}


class Draft(Base):
    """Some rows are older than the version column."""

    __tablename__ = "drafts"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int | None] = mapped_column()
    stamp: Mapped[int | None] = mapped_column(onupdate=99)
    __mapper_args__ = {"version_id_col": version}


class Letter(Draft):
    """In two tables."""

    __tablename__ = "letters"
    id: Mapped[int] = mapped_column(ForeignKey("drafts.id"), primary_key=True)
    text: Mapped[str | None]
    sent: Mapped[int | None] = mapped_column(onupdate=98)


class Program(Base):
    """The version is assigned by the program, if at all."""

    __tablename__ = "programs"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[int] = mapped_column()
    stamp: Mapped[int | None] = mapped_column(onupdate=99)
    __mapper_args__ = {"version_id_col": token, "version_id_generator": False}


class Plugin(Program):
    """In two tables."""

    __tablename__ = "plugins"
    id: Mapped[int] = mapped_column(ForeignKey("programs.id"), primary_key=True)
    name: Mapped[str | None]


class Filled:
    """All that can be filled in."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    quantity: Mapped[int]
    price: Mapped[int]
    total: Mapped[int] = mapped_column(Computed("quantity * price", persisted=True))
    stamp: Mapped[int | None] = mapped_column(onupdate=99)
    counted: Mapped[int | None] = mapped_column(onupdate=literal(1) + 1)


class Line(Filled, Base):
    """Fetches it right away."""

    __tablename__ = "lines"
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version, "eager_defaults": True}


class LazyLine(Filled, Base):
    """Does not."""

    __tablename__ = "lazy_lines"
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


class Node(Base):
    """Whether it is a root is computed from a key that the flush assigns."""

    __tablename__ = "nodes"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    up_id: Mapped[int | None] = mapped_column(ForeignKey("nodes.id"))
    is_root: Mapped[bool] = mapped_column(Computed("up_id IS NULL", persisted=True))
    stamp: Mapped[int | None] = mapped_column(server_onupdate=FetchedValue())
    up: Mapped[Node | None] = relationship(foreign_keys=up_id, remote_side=id)
    favorite_id: Mapped[int | None] = mapped_column(ForeignKey("nodes.id"))
    favorite: Mapped[Node | None] = relationship(
        foreign_keys=favorite_id, remote_side=id, post_update=True
    )
    touched: Mapped[int | None] = mapped_column(onupdate=97)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


class PostgreSQLBase(DeclarativeBase):
    """The base of what only PostgreSQL has."""


class Row(PostgreSQLBase):
    """PostgreSQL counts its versions."""

    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    xmin = mapped_column(Integer, system=True, server_default=FetchedValue())
    __mapper_args__ = {"version_id_col": xmin, "version_id_generator": False}


@pytest.fixture
def session(engine: Engine, installed) -> Iterator[Session]:
    """A session on the tables above."""
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def stored(session: Session, instance: Any) -> Any:
    """The instance, committed and loaded."""
    session.add(instance)
    session.commit()
    session.refresh(instance)
    return instance


# -- update_fields and changes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "along"),
    [
        ("name", {"version", "stamp", "counted"}),
        ("wheels", {"version", "stamp", "counted", "driven"}),
        ("load", {"version", "stamp", "counted"}),
    ],
)
def test_the_update_that_counts_the_version_writes_the_stamps_of_its_table_too(
    session: Session, log: Log, attribute: str, along: set[str]
):
    """Whatever table of the hierarchy the change is in."""
    truck = stored(session, Truck(name="1", wheels=4, load=5))
    log.clear()
    setattr(truck, attribute, 9)
    session.flush()
    assert log.one("post_save")["update_fields"] == {attribute, *along}
    table = Asset.__table__.c
    assert rows(session, table.version, table.stamp, table.counted) == [(2, 99, 2)]
    driven = 98 if "driven" in along else None
    assert rows(session, Car.__table__.c.driven) == [driven]


def test_so_does_the_update_that_repeats_a_version_of_the_program(session: Session, log: Log):
    """A row whose version nobody has counted gets an UPDATE all the same."""
    plugin = stored(session, Plugin(token=1, name="a"))
    log.clear()
    plugin.name = "b"
    session.flush()
    assert log.one("post_save")["update_fields"] == {"name", "stamp", "token"}
    assert dict(log.one("post_save")["changes"]) == {"name": Change("a", "b")}
    table = Program.__table__.c
    assert rows(session, table.token, table.stamp) == [(1, 99)]


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("on", ["flush", "commit"])
def test_a_row_without_a_version_is_given_none(session: Session, on: Phase, loaded: bool):
    """SQLAlchemy leaves the table of the version alone then, and so the stamps in it."""
    told: list[Any] = []
    post_save.connect(
        lambda sender, changes, update_fields, **kwargs: told.append((update_fields, changes)),
        Letter,
        on=on,
        weak=False,
    )
    counted: list[Any] = []
    post_save.connect(
        lambda sender, **kwargs: counted.append(sender),
        Letter,
        on=on,
        fields={"version", "stamp"},
        weak=False,
    )
    connection = session.connection()
    connection.execute(
        insert(Draft.__table__), [{"id": 1, "version": None}, {"id": 2, "version": 1}]
    )
    connection.execute(insert(Letter.__table__), [{"id": 1, "text": "a"}, {"id": 2, "text": "a"}])
    session.commit()
    old, new = session.scalars(select(Letter).order_by(Letter.id)).all()
    if not loaded:
        session.expire_all()
    old.text = new.text = "b"
    session.commit()
    assert [fields for fields, _ in told] == [
        {"text", "sent"},
        {"text", "sent", "version", "stamp"},
    ]
    assert counted == [Letter]
    table = Draft.__table__.c
    assert rows(session, table.id, table.version, table.stamp) == [(1, None, None), (2, 2, 99)]
    assert rows(session, Letter.__table__.c.sent) == [98, 98]


@pytest.mark.parametrize("read", [True, False])
def test_a_stamp_that_a_later_update_sets_is_not_told_with_an_earlier_value(
    session: Session, read: bool
):
    """After the commit: what was assigned by hand was overwritten in the same transaction."""
    seen: list[Any] = []
    post_save.connect(
        lambda sender, changes, update_fields, **kwargs: seen.append(
            (changes.get("stamp"), "stamp" in update_fields)
        ),
        weak=False,
        sender=Car,
        on="commit",
    )
    car = Car(wheels=4)
    session.add(car)
    session.commit()
    seen.clear()
    if read:
        assert car.stamp == 0
    car.stamp, car.wheels = 5, 2
    session.flush()
    car.wheels = 1
    session.commit()
    assert rows(session, Asset.__table__.c.stamp) == [99]
    assert seen == [(Change(0 if read else UNSET, UNSET), True)]


# -- fields ----------------------------------------------------------------------------------------


def hear(cls: Any, field: str, on: Phase = "flush") -> list[Any]:
    """What a receiver with ``fields`` is told of updates: the change of that field."""
    seen: list[Any] = []

    def told(sender, created, changes, update_fields, **kwargs):
        if not created:
            seen.append(changes.get(field))
            assert update_fields >= changes.keys()

    post_save.connect(told, weak=False, sender=cls, fields={field}, on=on)
    return seen


LAZILY = {"total": None, "stamp": Change(None, 99), "counted": None, "version": Change(1, 2)}
EAGERLY = {**LAZILY, "total": Change(2, 10), "counted": Change(None, 2)}
each_field = pytest.mark.parametrize("field", LAZILY)
each_phase = pytest.mark.parametrize("on", ["flush", "commit", "rollback"])


@each_phase
@each_field
@pytest.mark.parametrize("cls", [Line, LazyLine])
def test_fields_of_what_an_update_fills_in_are_heard(
    installed, engine: Engine, cls: Any, field: str, on: Phase
):
    """With the values, as far as they were fetched."""
    Base.metadata.create_all(engine)
    seen = hear(cls, field, on)
    with Session(engine) as session:
        line = stored(session, cls(quantity=1, price=2))
        line.quantity = 5
        if on == "rollback":
            session.flush()
            session.rollback()
        else:
            session.commit()
    assert seen == [(EAGERLY if cls is Line else LAZILY)[field]]
    expected = (2, None, None, 1) if on == "rollback" else (10, 99, 2, 2)
    assert rows(engine, cls.total, cls.stamp, cls.counted, cls.version) == [expected]


@each_field
def test_pre_save_is_sent_for_what_the_update_is_going_to_fill_in(session: Session, field: str):
    """Its value is not known by then."""
    line = stored(session, LazyLine(quantity=1, price=2))
    log = Log()
    pre_save.connect(log, weak=False, sender=LazyLine, fields={field})
    line.quantity = 5
    session.flush()
    assert log.lines == ["pre_save updated LazyLine(None)"]
    assert log.one("pre_save").changes == {"quantity": Change(1, 5)}
    assert rows(session, LazyLine.total) == [10]


@each_phase
@pytest.mark.parametrize("cls", [Line, LazyLine])
def test_a_computed_column_is_not_heard_of_if_what_it_is_computed_from_stays(
    session: Session, cls: Any, on: Phase
):
    """Another attribute is no matter of it."""
    line = stored(session, cls(quantity=1, price=2))
    seen = hear(cls, "total", on)
    line.name = "b"
    session.flush()
    getattr(session, "rollback" if on == "rollback" else "commit")()
    assert seen == []
    assert rows(session, cls.total) == [2]


@pytest.mark.parametrize("on", ["flush", "commit"])
def test_a_value_that_turns_out_to_be_the_same_is_no_change(session: Session, on: Phase):
    """Where it was fetched, or is known anyway."""
    line = stored(session, Line(quantity=1, price=2))
    line.quantity = 5
    session.commit()
    session.refresh(line)
    seen = {field: hear(Line, field, on) for field in LAZILY}
    line.quantity, line.price = 2, 5
    session.commit()
    assert seen == {"total": [], "stamp": [], "counted": [], "version": [Change(2, 3)]}
    assert rows(session, Line.total, Line.stamp, Line.version) == [(10, 99, 3)]


@pytest.mark.parametrize("cls", [Line, LazyLine])
def test_what_was_reverted_in_the_transaction_is_no_change_of_a_computed_column(
    session: Session, cls: Any
):
    """The version has been counted, whatever became of the rest."""
    line = stored(session, cls(quantity=1, price=2))
    total, version = hear(cls, "total", "commit"), hear(cls, "version", "commit")
    line.quantity = 5
    session.flush()
    line.quantity, line.name = 1, "b"
    session.commit()
    assert total == []
    assert version == [Change(1, 3)]
    assert rows(session, cls.total, cls.version) == [(2, 3)]


def test_what_one_receiver_asks_for_makes_no_event_of_none_for_others(session: Session):
    """A no-op stays a no-op."""
    line = stored(session, Line(quantity=1, price=2))
    hear(Line, "total", "flush")
    hear(Line, "version", "commit")
    log = listen(sender=Line)
    line.quantity = 1
    session.commit()
    assert log.lines == []
    assert rows(session, Line.version) == [1]


def test_a_key_that_the_flush_assigns_is_what_a_column_may_be_computed_from(session: Session):
    """In ``pre_save`` and ``post_save``."""
    top, node = stored(session, Node(name="top")), stored(session, Node(name="n"))
    log = listen(sender=Node, fields={"is_root"})
    node.up = top
    session.flush()
    assert log.lines == ["pre_save updated Node(n)", "post_save updated Node(n)"]
    log.clear()
    node.name = "o"
    session.flush()
    assert log.lines == []
    assert rows(session, Node.name, Node.is_root) == [("o", False), ("top", True)]


def test_what_a_trigger_fills_in_may_change_with_every_update_of_its_row(session: Session):
    """``server_onupdate`` says no more than that."""
    node = stored(session, Node(name="n"))
    log = listen(sender=Node, fields={"stamp"})
    node.name = "o"
    session.commit()
    assert log.lines == ["pre_save updated Node(o)", "post_save updated Node(o)"]
    assert rows(session, Node.name) == ["o"]


@pytest.mark.parametrize("field", ["touched", "version"])
def test_an_extra_update_for_post_update_fills_in_as_well(session: Session, field: str):
    """By itself, or after the UPDATE of other attributes: told once, with the last value."""
    node, other = stored(session, Node(name="n")), stored(session, Node(name="o"))
    seen = hear(Node, field, "flush")
    node.favorite = other
    session.flush()
    assert [change.new for change in seen] == [{"touched": 97, "version": 2}[field]]
    session.refresh(node)
    session.refresh(other)
    seen.clear()
    node.name, node.favorite = "p", node
    session.flush()
    (version,) = rows(session, Node.version)[1:]
    expected = [Change(2, version)] if field == "version" else []
    assert seen == expected


def test_a_version_that_the_database_counts_is_heard_of(engine: Engine, installed):
    """PostgreSQL's ``xmin`` is another one after every UPDATE."""
    if engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has it")
    PostgreSQLBase.metadata.create_all(engine)
    with Session(engine) as session:
        row = stored(session, Row(name="a"))
        before = row.xmin
        seen = hear(Row, "xmin")
        row.name = "b"
        session.flush()
        assert seen == [Change(before, row.xmin)]
        assert rows(session, Row.name) == ["b"]


def test_flush_and_statement_tell_the_same_receivers(session: Session):
    """``{"signals": "rows"}`` reads the rows before and after; versions it leaves alone."""
    line = stored(session, Line(quantity=1, price=2))
    seen = {field: hear(Line, field, "flush") for field in ("total", "stamp", "counted")}
    line.quantity = 5
    session.flush()
    by_flush = {field: list(changes) for field, changes in seen.items()}
    session.rollback()
    for changes in seen.values():
        changes.clear()
    session.execute(update(Line).values(quantity=5), execution_options={"signals": "rows"})
    assert seen == by_flush
    assert rows(session, Line.total) == [10]

"""Which UPDATEs there are, and what they wrote."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import (
    JSON,
    Computed,
    Engine,
    FetchedValue,
    Integer,
    String,
    event,
    func,
    inspect,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    deferred,
    mapped_column,
    validates,
)
from sqlalchemy.orm.attributes import flag_modified, set_committed_value
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.types import TypeDecorator

from sqla_signals import UNSET, Change, pre_save, receiver

from .models import Author, Book, Tag
from .observing import Log, both, rows

only_postgresql = pytest.mark.parametrize(
    "engine", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


class OwnBase(DeclarativeBase):
    """The base of the special shapes below."""


class Rounded(TypeDecorator[float]):
    """A type with an equality of its own."""

    impl = Integer
    cache_ok = True

    def compare_values(self, x, y):
        """Compare as the database would store them."""
        return round(x) == round(y)


class Thing(OwnBase):
    """Every kind of column."""

    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    n: Mapped[int | None]
    size: Mapped[float | None] = mapped_column(Rounded)
    options: Mapped[dict | None] = mapped_column(MutableDict.as_mutable(JSON))
    plain: Mapped[dict | None] = mapped_column(JSON)
    note: Mapped[str | None] = deferred(mapped_column(String))
    watched: Mapped[str | None] = mapped_column(active_history=True)
    default: Mapped[str] = mapped_column(default="python")
    served: Mapped[str] = mapped_column(server_default="server")
    upper = column_property(func.upper(text("'x'")))

    @validates("watched")
    def _strip(self, key, value):
        return value.strip()


class Stamped(OwnBase):
    """Columns that every UPDATE writes along, in Python and in SQL."""

    __tablename__ = "stamped"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    touched: Mapped[int | None] = mapped_column(onupdate=lambda: 7)
    counted: Mapped[int | None] = mapped_column(onupdate=literal(1) + 1)
    doubled: Mapped[int | None] = mapped_column(Computed("touched * 2", persisted=True))


class Eager(OwnBase):
    """Fetches what the database computed right away."""

    __tablename__ = "eager"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    served: Mapped[str] = mapped_column(server_default="server")
    counted: Mapped[int | None] = mapped_column(onupdate=literal(1) + 1)
    __mapper_args__ = {"eager_defaults": True}


class Lazy(OwnBase):
    """Never fetches what the database computed before somebody asks."""

    __tablename__ = "lazy"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    served: Mapped[str] = mapped_column(server_default="server")
    counted: Mapped[int | None] = mapped_column(onupdate=literal(1) + 1)
    __mapper_args__ = {"eager_defaults": False}


class Versioned(OwnBase):
    """SQLAlchemy counts the versions."""

    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


class Tokened(OwnBase):
    """The version is assigned by the program."""

    __tablename__ = "tokened"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    token: Mapped[str] = mapped_column()
    __mapper_args__ = {"version_id_col": token, "version_id_generator": False}


class PostgreSQLBase(DeclarativeBase):
    """The base of what only PostgreSQL has."""


class ServerVersioned(PostgreSQLBase):
    """The database counts the versions."""

    __tablename__ = "server_versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    version = mapped_column("xmin", Integer, system=True, server_default=FetchedValue())
    numbers: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    __mapper_args__ = {"version_id_col": version, "version_id_generator": False}


@pytest.fixture
def things(engine: Engine, installed) -> Iterator[Session]:
    """A session on the tables of the special shapes."""
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def stored(session: Session, log: Log, instance):
    """Commit ``instance``, load it again, and forget what was sent."""
    session.add(instance)
    session.commit()
    session.refresh(instance)
    log.clear()
    return instance


def changed(log: Log) -> tuple[dict, frozenset[str]]:
    """``changes`` and ``update_fields`` of the only UPDATE."""
    sent = log.one("post_save")
    assert sent["created"] is False
    assert len(log.pre) == 1
    return dict(sent.changes or {}), sent["update_fields"]


# -- nothing written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assign",
    [
        lambda thing: setattr(thing, "name", "a"),
        lambda thing: (setattr(thing, "name", "b"), setattr(thing, "name", "a")),
        lambda thing: setattr(thing, "options", {"x": 1}),
        lambda thing: setattr(thing, "plain", {"y": [1]}),
        lambda thing: setattr(thing, "watched", "w "),
        lambda thing: setattr(thing, "size", 1.2),
        lambda thing: setattr(thing, "note", None),
    ],
    ids=[
        "same value",
        "reverted",
        "equal dict",
        "equal JSON",
        "validated to the same",
        "equal to the type",
        "deferred set to NULL that is NULL",
    ],
)
def test_an_assignment_that_changes_nothing_sends_nothing(
    things: Session, log: Log, statements: list[str], assign
):
    """No UPDATE, no signal."""
    thing = Thing(name="a", options={"x": 1}, plain={"y": [1]}, watched="w", size=1)
    stored(things, log, thing)
    thing.note
    statements.clear()
    assign(thing)
    things.flush()
    assert [sql for sql in statements if not sql.startswith("SELECT")] == []
    assert log.lines == []


def test_a_change_to_a_collection_only_sends_nothing_for_its_owner(session: Session, log: Log):
    """One-to-many: the children are written; many-to-many: only the secondary table."""
    author, book, tag = Author(name="a"), Book(name="b"), Tag(name="t")
    session.add_all([author, book, tag])
    session.commit()
    book.name, tag.name
    log.clear()
    author.books.append(book)
    session.flush()
    assert log.lines == both("save updated Book(b)")
    log.clear()
    book.tags.append(tag)
    session.flush()
    book.tags.remove(tag)
    session.flush()
    assert log.lines == []
    assert rows(session, Book.author_id) == [author.id]


def test_a_flush_with_nothing_to_do_sends_nothing(session: Session, log: Log):
    """Neither an empty session, nor a clean one, nor a second flush."""
    session.flush()
    session.add(Author(name="a"))
    session.commit()
    log.clear()
    session.flush()
    session.scalars(select(Author)).one()
    session.commit()
    session.commit()
    assert log.lines == []


def test_a_value_set_without_history_sends_nothing(things: Session, log: Log):
    """``set_committed_value`` is for what is in the database already."""
    thing = stored(things, log, Thing(name="a"))
    set_committed_value(thing, "name", "b")
    things.flush()
    assert log.lines == []
    assert rows(things, Thing.name) == ["a"]


def test_an_assignment_to_a_transient_or_detached_instance_sends_nothing(things, log: Log):
    """It is in no session; adding it again makes it count."""
    thing = stored(things, log, Thing(name="a"))
    things.expunge(thing)
    thing.name = "b"
    Thing(name="transient")
    things.flush()
    assert log.lines == []
    things.add(thing)
    things.flush()
    assert log.lines == both("save updated Thing(b)")
    assert rows(things, Thing.name) == ["b"]


def test_an_expired_change_sends_nothing(things: Session, log: Log):
    """``expire`` and ``refresh`` give it up."""
    thing = stored(things, log, Thing(name="a"))
    thing.name = "b"
    things.expire(thing)
    things.flush()
    assert log.lines == []
    assert rows(things, Thing.name) == ["a"]


# -- written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assign", "key", "old", "new"),
    [
        (lambda thing: setattr(thing, "name", None), "name", "a", None),
        (lambda thing: thing.options.update(x=2), "options", {"x": 1}, {"x": 2}),
        (lambda thing: thing.options.update(x=1), "options", {"x": 1}, {"x": 1}),
        (lambda thing: setattr(thing, "plain", {"z": 1}), "plain", {"y": [1]}, {"z": 1}),
        (lambda thing: setattr(thing, "watched", " v"), "watched", "w", "v"),
        (lambda thing: setattr(thing, "size", 3), "size", 1, 3),
        (lambda thing: setattr(thing, "default", "other"), "default", "python", "other"),
        (lambda thing: setattr(thing, "served", "other"), "served", "server", "other"),
    ],
    ids=[
        "to NULL",
        "mutable",
        "mutable to the same",
        "JSON",
        "validated",
        "own equality",
        "default",
        "server default",
    ],
)
def test_an_update_sends_what_it_changed(things, log: Log, assign, key: str, old, new):
    """One attribute, with its old and its new value."""
    thing = Thing(name="a", options={"x": 1}, plain={"y": [1]}, watched="w", size=1)
    stored(things, log, thing)
    assign(thing)
    things.flush()
    changes, fields = changed(log)
    assert fields == {key}
    assert changes.keys() == {key}
    assert changes[key].new == new
    if key != "options":  # changed in place: the old value is the same object
        assert changes[key].old == old
    assert rows(things, getattr(Thing, key)) == [new]


def test_flag_modified_is_an_update(things: Session, log: Log):
    """SQLAlchemy writes the column whatever it holds."""
    thing = stored(things, log, Thing(plain={"y": [1]}))
    thing.plain["y"].append(2)
    flag_modified(thing, "plain")
    things.flush()
    changes, fields = changed(log)
    assert fields == {"plain"}
    assert changes["plain"].new == {"y": [1, 2]}
    assert rows(things, Thing.plain) == [{"y": [1, 2]}]


def test_the_old_value_of_a_deferred_or_expired_attribute_is_unset(things: Session, log: Log):
    """SQLAlchemy does not load it for an assignment, and neither do we."""
    thing = stored(things, log, Thing(name="a"))
    things.expire(thing, ["name"])
    thing.note, thing.name = "n", "b"
    things.flush()
    changes, fields = changed(log)
    assert fields == {"note", "name"}
    assert changes == {"note": Change(UNSET, "n"), "name": Change(UNSET, "b")}


def test_the_old_value_of_an_attribute_with_active_history_is_always_known(things, log: Log):
    """SQLAlchemy loads it when it is assigned."""
    thing = stored(things, log, Thing(name="a", watched="w"))
    things.expire(thing)
    thing.watched = "v"
    things.flush()
    assert changed(log) == ({"watched": Change("w", "v")}, {"watched"})


def test_an_expired_attribute_set_to_what_the_row_has_is_an_update(things: Session, log: Log):
    """SQLAlchemy does not load the old value, so it writes."""
    thing = stored(things, log, Thing(name="a"))
    things.expire(thing)
    thing.name = "a"
    things.flush()
    assert changed(log) == ({"name": Change(UNSET, "a")}, {"name"})


def test_an_sql_expression_is_an_update_whose_new_value_is_unset_unless_fetched(
    things: Session, log: Log
):
    """The database computes it; reading it loads it."""
    thing = stored(things, log, Thing(name="a", n=1))
    thing.n = Thing.n + 1
    things.flush()
    changes, fields = changed(log)
    assert fields == {"n"}
    assert changes["n"].old == 1
    assert changes["n"].new in (UNSET, 2)
    assert thing.n == 2
    assert rows(things, Thing.n) == [2]


def test_an_sql_expression_that_yields_the_old_value_is_an_update(things: Session, log: Log):
    """The UPDATE is written all the same."""
    thing = stored(things, log, Thing(n=1))
    thing.n = Thing.n + 0
    things.flush()
    assert changed(log)[1] == {"n"}


def test_an_sql_expression_in_an_insert_is_a_created_save(things: Session, log: Log):
    """The new value is unset unless it was fetched."""
    thing = Thing(name="a", n=select(literal(3)).scalar_subquery())
    things.add(thing)
    things.flush()
    sent = log.one("post_save")
    assert sent["created"]
    assert sent.changes["n"].old is UNSET
    assert sent.changes["n"].new in (UNSET, 3)
    assert rows(things, Thing.n) == [3]


def test_a_new_row_shows_the_defaults_of_python(things: Session, log: Log):
    """In ``post_save``; what the server sets is unset unless fetched."""
    things.add(Thing(name="a"))
    things.flush()
    assert "default" not in log.one("pre_save").changes
    changes = log.one("post_save").changes
    assert changes["default"] == Change(UNSET, "python")
    assert changes["served"].new in (UNSET, "server")
    assert rows(things, Thing.default, Thing.served) == [("python", "server")]


# -- written along -------------------------------------------------------------------------------


def test_update_fields_has_the_onupdate_columns_that_the_update_wrote(things: Session, log: Log):
    """And not those when nothing was updated, or where the user assigned them."""
    thing = stored(things, log, Stamped(name="a", touched=1, counted=1))
    thing.name = "a"
    things.flush()
    assert log.lines == []
    thing.name = "b"
    things.flush()
    changes, fields = changed(log)
    assert fields >= {"name", "touched", "counted"}
    assert fields <= {"name", "touched", "counted", "doubled"}
    assert changes["name"] == Change("a", "b")
    assert log.one("pre_save")["update_fields"] == {"name"}
    assert rows(things, Stamped.touched, Stamped.counted) == [(7, 2)]


def test_a_value_assigned_to_an_onupdate_column_is_what_changes_shows(things: Session, log: Log):
    """The default is not used then."""
    thing = stored(things, log, Stamped(name="a", touched=1))
    thing.touched = 5
    things.flush()
    changes, fields = changed(log)
    assert changes["touched"] == Change(1, 5)
    assert "touched" in fields
    assert rows(things, Stamped.touched) == [5]


@pytest.mark.parametrize("cls", [Eager, Lazy])
def test_what_the_database_computed_is_shown_if_it_was_fetched_and_unset_if_not(
    things: Session, log: Log, cls
):
    """``eager_defaults``; we never load anything for it."""
    thing = cls(name="a")
    things.add(thing)
    things.flush()
    fetched = "served" in inspect(thing).dict
    assert fetched is (cls is Eager)
    assert log.one("post_save").changes["served"].new == ("server" if fetched else UNSET)
    things.commit()
    thing.name
    log.clear()
    thing.name = "b"
    things.flush()
    changes, fields = changed(log)
    assert fields == {"name", "counted"}
    assert changes["name"] == Change("a", "b")
    if "counted" in changes:
        assert changes["counted"].new == (2 if cls is Eager else UNSET)
    assert rows(things, cls.served, cls.counted) == [("server", 2)]


# -- versions ------------------------------------------------------------------------------------


def test_a_client_side_version_is_in_update_fields(things: Session, log: Log):
    """And a no-op counts no version and sends no signal."""
    thing = stored(things, log, Versioned(name="a"))
    thing.name = "a"
    things.flush()
    assert log.lines == []
    thing.name = "b"
    things.flush()
    changes, fields = changed(log)
    assert fields == {"name", "version"}
    assert changes["name"] == Change("a", "b")
    assert changes.get("version", Change(1, 2)) == Change(1, 2)
    assert log.one("pre_save")["update_fields"] == {"name"}
    assert rows(things, Versioned.name, Versioned.version) == [("b", 2)]


def test_an_update_with_a_stale_version_sends_no_post_save(things, log: Log):
    """The flush fails."""
    thing = stored(things, log, Versioned(name="a"))
    things.connection().execute(update(Versioned.__table__).values(version=9))
    thing.name = "b"
    with pytest.raises(StaleDataError):
        things.flush()
    assert log.lines == ["pre_save updated Versioned(b)"]


def test_a_version_assigned_by_the_program_is_a_change_like_any_other(things: Session, log: Log):
    """``version_id_generator=False``."""
    first, second = uuid.uuid4().hex, uuid.uuid4().hex
    thing = stored(things, log, Tokened(name="a", token=first))
    thing.name = "b"
    thing.token = second
    things.flush()
    changes, fields = changed(log)
    assert fields == {"name", "token"}
    assert changes == {"name": Change("a", "b"), "token": Change(first, second)}
    assert rows(things, Tokened.token) == [second]


@only_postgresql
def test_a_version_counted_by_the_database_sends_one_signal_for_each_update(
    engine: Engine, installed, log: Log
):
    """PostgreSQL's ``xmin``."""
    PostgreSQLBase.metadata.create_all(engine)
    with Session(engine) as session:
        thing = stored(session, log, ServerVersioned(name="a"))
        thing.name = "a"
        session.flush()
        assert log.lines == []
        thing.name = "b"
        session.flush()
        changes, fields = changed(log)
        assert changes["name"] == Change("a", "b")
        assert {"name"} <= fields <= {"name", "version"}
        session.commit()
    assert rows(engine, ServerVersioned.name) == ["b"]


@only_postgresql
def test_arrays_are_compared_as_values(engine: Engine, installed, log: Log):
    """Equal lists are no change."""
    PostgreSQLBase.metadata.create_all(engine)
    with Session(engine) as session:
        thing = stored(session, log, ServerVersioned(numbers=[1, 2]))
        thing.numbers = [1, 2]
        session.flush()
        assert log.lines == []
        thing.numbers = [1, 3]
        session.flush()
        assert changed(log)[0]["numbers"] == Change([1, 2], [1, 3])
        session.commit()
    assert rows(engine, ServerVersioned.numbers) == [[1, 3]]


# -- several at once -----------------------------------------------------------------------------


def test_many_rows_in_one_flush_send_one_pair_each(things: Session, log: Log, statements):
    """Though the INSERTs and UPDATEs are batched."""
    batch = [Thing(name=f"{n}") for n in range(50)]
    things.add_all(batch)
    things.flush()
    assert log.lines == both(*[f"save created Thing({n})" for n in range(50)])
    log.clear()
    for thing in batch[::2]:
        thing.n = 1
    things.flush()
    assert log.lines == both(*[f"save updated Thing({n})" for n in range(0, 50, 2)])
    assert len(rows(things, Thing.id)) == 50


def test_changes_of_a_column_under_another_name_use_the_name_of_the_attribute(
    engine, installed, log
):
    """Keys are attributes, not columns."""

    class RenamedBase(DeclarativeBase):
        pass

    class Renamed(RenamedBase):
        __tablename__ = "renamed"
        key: Mapped[int] = mapped_column("id", primary_key=True)
        name: Mapped[str | None] = mapped_column("name_column")

    RenamedBase.metadata.create_all(engine)
    with Session(engine) as session:
        thing = Renamed(name="a")
        session.add(thing)
        session.flush()
        assert set(log.one("post_save").changes) == {"key", "name"}
        log.clear()
        thing.name = "b"
        session.flush()
        assert changed(log) == ({"name": Change("a", "b")}, {"name"})
        assert rows(session, Renamed.name) == ["b"]


def test_a_pre_save_receiver_that_makes_a_change_out_of_none_is_written(things, log: Log):
    """A receiver of another instance assigns to one that was a no-op."""
    first, second = Thing(name="first"), Thing(name="second")
    things.add_all([first, second])
    things.commit()
    things.refresh(first), things.refresh(second)
    log.clear()

    @receiver(pre_save, sender=Thing)
    def fn(sender, instance, **kwargs):
        second.n = 4

    first.n = 1
    second.name = "second"
    things.flush()
    assert log.pre == ["pre_save updated Thing(first)", "pre_save updated Thing(second)"]
    assert log.post == ["post_save updated Thing(first)", "post_save updated Thing(second)"]
    assert rows(things, Thing.n) == [1, 4]


def test_events_that_a_user_registered_see_what_they_always_saw(things: Session, log: Log):
    """Our looking does not load, expire or change anything."""
    seen = []

    @event.listens_for(Thing, "before_update")
    def before(mapper, connection, target):
        seen.append(("before", inspect(target).attrs.name.history.deleted, "n" in target.__dict__))

    @event.listens_for(Thing, "after_update")
    def after(mapper, connection, target):
        seen.append(("after", inspect(target).attrs.name.history.deleted, "n" in target.__dict__))

    thing = stored(things, log, Thing(name="a", n=1))
    things.expire(thing, ["n"])
    thing.name = "b"
    things.flush()
    event.remove(Thing, "before_update", before)
    event.remove(Thing, "after_update", after)
    assert seen == [("before", ["a"], False), ("after", ["a"], False)]
    assert "n" not in thing.__dict__
    assert log.lines == both("save updated Thing(b)")

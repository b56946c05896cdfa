"""The options of a connection."""

from __future__ import annotations

from abc import ABC
from typing import Any

import pytest
from blinker import ANY
from sqlalchemy import Column, Engine, ForeignKey, Integer, String, Table, insert, update
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    composite,
    configure_mappers,
    mapped_column,
    registry,
    relationship,
    synonym,
)

from sqla_signals import (
    ReceiverOptionError,
    Signal,
    SignalsError,
    mute,
    post_bulk,
    post_delete,
    post_init,
    post_migrate,
    post_save,
    pre_delete,
    pre_save,
    receiver,
    receiver_failed,
)
from sqla_signals.receivers import dispatch

from .models import Author, Base, Book, Named, Tag
from .observing import FLUSH_SIGNALS, Log, both, listen, rows

# -- sender: mapped classes, lists, any ----------------------------------------------------------


class OwnBase(DeclarativeBase):
    """The base of the special shapes below."""


class Vehicle(OwnBase):
    """The base of a single-table hierarchy."""

    __tablename__ = "vehicles"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}


class Car(Vehicle):
    """In the middle."""

    __mapper_args__ = {"polymorphic_identity": "car"}


class Taxi(Car):
    """At the end."""

    __mapper_args__ = {"polymorphic_identity": "taxi"}


class Abstract(OwnBase):
    """An abstract base: not mapped itself."""

    __abstract__ = True
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Concrete(Abstract):
    """The model below the abstract base."""

    __tablename__ = "concretes"


@pytest.fixture
def vehicles(engine, installed):
    """A session on the tables of the special shapes."""
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def all_vehicles(session: Session) -> None:
    """Flush one of each, in order."""
    for cls in (Vehicle, Car, Taxi):
        session.add(cls(name=cls.__name__))
        session.flush()


def test_a_mapped_class_as_sender_means_exactly_that_class(vehicles: Session):
    """Neither its mapped subclasses nor its base, as in Django and in SQLAlchemy's own events."""
    log = listen(sender=Car)
    all_vehicles(vehicles)
    assert log.post == ["post_save created Car(Car)"]
    assert rows(vehicles, Vehicle.kind) == ["car", "taxi", "vehicle"]


def test_propagate_means_the_mapped_subclasses_too(vehicles: Session):
    """And the sender is the exact class all the same."""
    log = listen(sender=Car, propagate=True)
    all_vehicles(vehicles)
    assert log.post == ["post_save created Car(Car)", "post_save created Taxi(Taxi)"]


def test_propagate_works_with_a_name(vehicles: Session):
    """``"Car"`` stands for the class it names."""
    log = listen(sender="Car", propagate=True)
    all_vehicles(vehicles)
    assert log.post == ["post_save created Car(Car)", "post_save created Taxi(Taxi)"]


def test_a_list_of_senders_means_each_of_them(vehicles: Session):
    """A tuple or a set will do."""
    for senders in ([Vehicle, "Taxi"], (Vehicle, "Taxi"), {Vehicle, "Taxi"}):
        log = listen(sender=senders)
        all_vehicles(vehicles)
        assert log.post == ["post_save created Vehicle(Vehicle)", "post_save created Taxi(Taxi)"]


@pytest.mark.parametrize("sender", [None, ANY, [None], [ANY, Author]])
def test_no_sender_means_all(session: Session, sender: object):
    """``None``, ``blinker.ANY`` and leaving it out are the same."""
    log = listen(sender=sender)
    session.add_all([Author(name="a"), Book(name="b")])
    session.flush()
    assert log.post == ["post_save created Author(a)", "post_save created Book(b)"]


def test_an_unmapped_base_as_sender_means_every_model_that_inherits_it(session: Session):
    """The declarative base stands for the whole schema, and not for other schemas."""
    log = listen(sender=Base)
    other = listen(sender=OwnBase)
    session.add_all([Author(name="a"), Tag(name="t")])
    session.flush()
    assert log.post == ["post_save created Author(a)", "post_save created Tag(t)"]
    assert other.lines == []


def test_a_mixin_as_sender_means_every_model_that_inherits_it(session: Session):
    """``Tag`` does not have the mixin."""
    log = listen(sender=Named)
    session.add_all([Author(name="a"), Tag(name="t"), Book(name="b")])
    session.flush()
    assert log.post == ["post_save created Author(a)", "post_save created Book(b)"]


def test_an_abstract_model_as_sender_means_every_model_that_inherits_it(vehicles: Session):
    """``__abstract__`` classes are not mapped."""
    log = listen(sender=Abstract)
    vehicles.add_all([Concrete(name="c"), Vehicle(name="v")])
    vehicles.flush()
    assert log.post == ["post_save created Concrete(c)"]


def test_an_unmapped_base_reaches_subclasses_at_any_depth(vehicles: Session):
    """No ``propagate`` is needed."""
    log = listen(sender=OwnBase)
    all_vehicles(vehicles)
    assert [sent.sender for sent in log.sent if sent.signal == "post_save"] == [Vehicle, Car, Taxi]


@pytest.mark.parametrize("sender", ["registered", "hooked", "object"])
def test_an_unmapped_sender_means_subclasses_that_are_not_below_it_too(
    session: Session, sender: str
):
    """What ``issubclass()`` says counts, also for models that were listened to before."""

    class Registered(ABC):  # noqa: B024
        pass

    class Hooked(ABC):  # noqa: B024
        @classmethod
        def __subclasshook__(cls, other: type) -> bool:
            return other is Author

    Registered.register(Author)
    one = Author(name="a")
    session.add(one)
    session.flush()
    log = listen(sender={"registered": Registered, "hooked": Hooked, "object": object}[sender])
    one.name = "b"
    session.flush()
    session.delete(one)
    session.flush()
    assert log.lines == [
        "pre_save updated Author(b)",
        "post_save updated Author(b)",
        "pre_delete Author(b)",
        "post_delete Author(b)",
    ]
    assert rows(session, Author.name) == []


def test_a_class_that_is_mapped_later_means_exactly_that_class(engine, installed):
    """Connected before an imperative mapping, it is the class and not a base."""

    class Plain:
        pass

    class Below(Plain):
        pass

    log = listen(sender=Plain)
    mappers = registry()
    table = Table(
        "plain",
        mappers.metadata,
        Column("id", Integer, primary_key=True),
        Column("name", String),
        Column("kind", String),
    )
    mappers.map_imperatively(
        Plain, table, polymorphic_on=table.c.kind, polymorphic_identity="plain"
    )
    mappers.map_imperatively(Below, inherits=Plain, polymorphic_identity="below")
    mappers.metadata.create_all(engine)
    with Session(engine) as session:
        plain, below = Plain(), Below()
        plain.name, below.name = "p", "b"
        session.add_all([plain, below])
        session.flush()
        assert rows(session, table.c.name) == ["b", "p"]
    assert log.post == ["post_save created Plain(p)"]


@pytest.mark.parametrize("sender", [3, Author(name="a"), Author.__table__, Author.name])
def test_what_can_never_be_a_sender_of_a_model_signal_is_refused(sender: object):
    """The error says what a sender is."""
    with pytest.raises(ReceiverOptionError, match="mapped class") as caught:
        post_save.connect(lambda sender, **kwargs: None, sender=sender, weak=False)
    assert isinstance(caught.value, SignalsError)
    assert isinstance(caught.value, ValueError)
    assert not post_save.receivers


@pytest.mark.parametrize("signal", [post_save, post_bulk, post_init], ids=lambda one: one.name)
def test_a_string_that_no_class_can_be_named_is_refused(signal: Any):
    """For a signal of statements as for one of rows or of instances."""
    with pytest.raises(ReceiverOptionError, match="'the order' is not the name of a class"):
        signal.connect(lambda sender, **kwargs: None, sender="the order", weak=False)
    assert not signal.receivers


def test_one_bad_sender_in_a_list_connects_nothing():
    """A connection is made for all senders or for none."""
    with pytest.raises(ReceiverOptionError):
        post_save.connect(lambda sender, **kwargs: None, sender=[Author, 3], weak=False)
    assert not post_save.receivers


def test_an_empty_list_of_senders_is_refused():
    """It would never match, and is not meant as "all"."""
    with pytest.raises(ReceiverOptionError, match="never match"):
        receiver(post_save, sender=[])(lambda sender, **kwargs: None)


def test_a_name_that_is_no_text_is_refused():
    """It would stand in messages and logs."""
    with pytest.raises(ReceiverOptionError, match="name=5"):
        receiver(post_save, sender=Author, name=5)(lambda sender, **kwargs: None)
    assert not post_save.receivers


# -- sender: names -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Author", f"{__package__}.models.Author"])
def test_a_name_as_sender_means_the_class_of_that_name(session: Session, name: str):
    """The bare name, or the full one."""
    log = listen(sender=name)
    session.add_all([Author(name="a"), Book(name="b")])
    session.flush()
    assert log.post == ["post_save created Author(a)"]


@pytest.mark.parametrize("name", ["author", "models.Author", "elsewhere.Author", "Autho"])
def test_another_name_does_not_match(session: Session, name: str):
    """Neither a part of the full name nor another case."""
    log = listen(sender=name)
    session.add(Author(name="a"))
    session.flush()
    assert log.lines == []


def test_a_name_is_resolved_when_the_class_is_mapped(engine, installed):
    """The receiver may be connected, and signals sent, before the class exists."""
    log = listen(sender="Later")
    full = listen(sender=f"{__name__}.Later")

    class LaterBase(DeclarativeBase):
        pass

    class Earlier(LaterBase):
        __tablename__ = "earlier"
        id: Mapped[int] = mapped_column(primary_key=True)

    LaterBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Earlier())
        session.commit()
        assert log.lines == []

        class Later(LaterBase):
            __tablename__ = "later"
            __module__ = __name__
            __qualname__ = "Later"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str | None]

        LaterBase.metadata.create_all(engine)
        session.add(Later(name="a"))
        session.commit()
    assert log.post == full.post == ["post_save created Later(a)"]


def test_a_name_that_two_models_of_one_registry_have_is_an_error_when_they_are_mapped():
    """As with SQLAlchemy's own strings in ``relationship()``; the error gives the full names."""
    receiver(post_save, sender="Twin")(lambda sender, **kwargs: None)

    class TwinBase(DeclarativeBase):
        pass

    def make(module: str) -> type:
        return type(
            "Twin",
            (TwinBase,),
            {
                "__tablename__": f"twin_{module}",
                "__module__": module,
                "__qualname__": "Twin",
                "id": mapped_column(Integer, primary_key=True),
            },
        )

    # The registry of a declarative base holds classes weakly.
    twins = make("one"), make("two")
    with pytest.raises(ReceiverOptionError, match=r"one\.Twin, two\.Twin"):
        configure_mappers()
    post_save._clear_state()
    assert twins


# -- propagate, on -------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [pre_save, pre_delete], ids=lambda signal: signal.name)
@pytest.mark.parametrize("on", ["commit", "rollback"])
def test_pre_signals_take_only_on_flush(signal: Signal, on: str):
    """Before the flush there is nothing to commit; the error names the signal and the choice."""
    with pytest.raises(ReceiverOptionError, match=f"{signal.name}.*'{on}'.*'flush'"):
        receiver(signal, on=on)(lambda sender, **kwargs: None)
    assert not signal.receivers


@pytest.mark.parametrize("signal", FLUSH_SIGNALS, ids=lambda signal: signal.name)
def test_an_unknown_phase_is_refused(signal: Signal):
    """With the phases that there are."""
    with pytest.raises(ReceiverOptionError, match=r"'after_commit'.*'flush'"):
        receiver(signal, on="after_commit")(lambda sender, **kwargs: None)


def test_on_flush_is_the_default_and_means_in_the_transaction(session: Session):
    """The receiver sees the row, which no other connection does."""
    seen = []

    @receiver(post_save, sender=Author)
    def fn(sender, session, **kwargs):
        assert session.in_transaction()
        seen.append(rows(session, Author.name))

    session.add(Author(name="a"))
    session.flush()
    assert seen == [["a"]]
    session.rollback()
    assert rows(session, Author.name) == []


def test_a_name_that_no_mapped_class_has_at_the_first_flush_is_logged_once(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """With the place of the receiver, and the nearest name that there is."""
    log = Log()

    def fn(sender, **kwargs):
        log(sender, **kwargs)

    post_save.connect(fn, sender="Athor")
    post_save.connect(log, sender="Author", fields={"name"})
    for _ in range(2):
        session.add(Author(name="a"))
        session.flush()
        post_delete.connect(log, sender=Author)  # which makes the next flush look again
    (message,) = [record.getMessage() for record in caplog.records]
    assert "post_save: receiver" in message
    assert f"fn ({__file__}:" in message
    assert message.endswith("no mapped class is called 'Athor'. Did you mean 'Author'?")
    assert log.lines == ["post_save created Author(a)"] * 2


def test_a_name_that_a_class_gets_before_the_first_flush_is_not_logged(
    engine: Engine, installed, caplog: pytest.LogCaptureFixture
):
    """Receivers may be connected before the models are imported."""
    log = Log()
    post_save.connect(log, sender="Latecomer")

    class LateBase(DeclarativeBase):
        pass

    class Latecomer(LateBase):
        __tablename__ = "latecomers"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]

    LateBase.metadata.create_all(engine)
    with Session(engine) as own:
        own.add(Latecomer(name="a"))
        own.commit()
        assert rows(own, Latecomer.name) == ["a"]
    assert log.lines == ["post_save created Latecomer(a)"]
    assert not caplog.records


@pytest.mark.parametrize("by_name", [True, False])
def test_a_mute_that_silences_nobody_is_logged_once(
    session: Session,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    by_name: bool,
):
    """With the nearest name; a receiver of any signal is somebody."""
    monkeypatch.setattr(dispatch, "_warned", set())
    own = Signal("own")

    def mistaken(sender, **kwargs): ...

    def heard(sender, **kwargs): ...

    own.connect(heard, name="shop.reindex")
    for _ in range(2):
        with mute(receiver="shop.reindx" if by_name else mistaken):
            session.add(Author(name="a"))
            session.flush()
        with mute(receiver="shop.reindex" if by_name else heard):
            pass
    logged = [record.getMessage() for record in caplog.records]
    (message,) = [one for one in logged if "mute(receiver=...) silences nothing" in one]
    assert ("Did you mean 'shop.reindex'?" in message) is by_name
    assert ("shop.reindx" if by_name else f"mistaken ({__file__}:") in message
    assert rows(session, Author.name) == ["a", "a"]


# -- created -------------------------------------------------------------------------------------


@pytest.mark.parametrize("created", [True, False])
@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda one: one.name)
def test_created_means_only_new_rows_or_only_updates(session, author, signal, created: bool):
    """In a flush that writes both."""
    log = Log()
    signal.connect(log, sender=Author, created=created)
    author.age = 2
    session.add(Author(name="new"))
    session.flush()
    assert log.lines == [
        f"{signal.name} created Author(new)" if created else f"{signal.name} updated Author(a)"
    ]
    assert rows(session, Author.name, Author.age) == [("a", 2), ("new", None)]


@pytest.mark.parametrize("created", [True, False])
def test_created_is_held_against_the_net_effect_after_a_commit(session, created: bool):
    """A row that was created and updated is new; a savepoint that was rolled back did nothing."""
    log = Log()
    post_save.connect(log, sender=Author, created=created, on="commit")
    author = Author(name="a")
    session.add(author)
    session.flush()
    author.age = 1
    with session.begin_nested() as savepoint:
        session.add(Author(name="undone"))
        session.flush()
        savepoint.rollback()
    session.commit()
    assert log.lines == (["post_save created Author(a)"] if created else [])
    author.age = 2
    session.commit()
    assert log.lines == [
        "post_save created Author(a)" if created else "post_save updated Author(a)"
    ]
    assert rows(session, Author.name, Author.age) == [("a", 2)]


@pytest.mark.parametrize("created", [True, False])
def test_created_is_held_against_what_was_undone(session, author, created: bool):
    """For receivers of rollbacks too."""
    log = Log()
    post_save.connect(log, sender=Author, created=created, on="rollback")
    author.age = 2
    session.add(Author(name="new"))
    session.flush()
    session.rollback()
    assert log.lines == [
        "post_save created Author(new)" if created else "post_save updated Author(a)"
    ]
    assert rows(session, Author.name, Author.age) == [("a", 1)]


def test_created_and_fields_must_both_hold(session, author):
    """A new row has no update, so created=False leaves it out, whatever its fields are."""
    log = Log()
    post_save.connect(log, sender=Author, created=False, fields={"age"})
    session.add(Author(name="new", age=1))
    author.name = "b"
    session.flush()
    assert log.lines == []
    author.age = 2
    session.flush()
    assert log.lines == ["post_save updated Author(b)"]


def test_a_function_connected_with_different_conditions_gets_what_any_of_them_lets_through(
    session, author
):
    """And is called once for a row, where it was connected first."""
    log = Log()
    post_save.connect(log, sender=Author, created=True)
    post_save.connect(log, sender=Author, created=False, fields={"age"})
    session.add(Author(name="new"))
    author.name = "b"
    session.flush()
    assert log.lines == ["post_save created Author(new)"]
    author.age = 2
    session.flush()
    assert log.lines == ["post_save created Author(new)", "post_save updated Author(b)"]
    post_save.connect(log, sender=Author)
    author.name = "c"
    session.flush()
    assert log.lines[2:] == ["post_save updated Author(c)"]


@pytest.mark.parametrize("created", [True, False])
def test_created_chooses_among_saves_and_lets_deletions_of_the_same_receiver_pass(
    session, author, created: bool
):
    """As fields= does."""
    log = Log()
    receiver([post_save, post_delete], sender=Author, created=created)(log)
    session.delete(author)
    session.flush()
    assert log.lines == ["post_delete Author(a)"]


@pytest.mark.parametrize(
    "signal", [pre_delete, post_delete, receiver_failed, Signal("own")], ids=lambda one: one.name
)
def test_created_is_refused_where_no_row_is_saved(signal: Signal):
    """It would choose among nothing."""

    def hear(sender, **kwargs):
        pass

    with pytest.raises(ReceiverOptionError, match=r"hear .*created= chooses between new rows"):
        signal.connect(hear, created=True)
    with pytest.raises(ReceiverOptionError, match=r"hear .*created= chooses between new rows"):
        receiver(signal, created=True)(hear)
    assert not signal.receivers


def test_created_is_true_or_false():
    """Anything else is a mistake."""
    with pytest.raises(ReceiverOptionError, match="created='yes' is not True, False or None"):
        receiver(post_save, sender=Author, created="yes")(lambda sender, **kwargs: None)


# -- fields --------------------------------------------------------------------------------------


@pytest.fixture
def author(session: Session) -> Author:
    """An author in the database, loaded."""
    author = Author(name="a", age=1)
    session.add(author)
    session.commit()
    author.name
    return author


@pytest.mark.parametrize("fields", [{"age"}, ["age"], ("age",), "age", {Author.age}])
def test_fields_means_only_when_one_of_these_changed(session, author, fields: object):
    """Given as names or as mapped attributes; another change is not sent to this receiver."""
    log = listen(sender=Author, fields=fields)
    author.name = "b"
    session.flush()
    assert log.lines == []
    author.age = 2
    session.flush()
    assert log.lines == ["pre_save updated Author(b)", "post_save updated Author(b)"]
    assert rows(session, Author.name, Author.age) == [("b", 2)]


def test_fields_lets_through_one_of_several(session, author):
    """Any of them will do."""
    log = listen(sender=Author, fields={"age", "name"})
    author.name = "b"
    session.flush()
    author.age = 2
    session.flush()
    assert log.post == ["post_save updated Author(b)"] * 2


def test_fields_lets_a_new_row_through(session):
    """Also when none of the attributes was set."""
    log = listen(sender=Author, fields={"age"})
    session.add(Author(name="a"))
    session.flush()
    assert log.lines == ["pre_save created Author(a)", "post_save created Author(a)"]


def test_fields_does_not_hold_back_a_deletion(session, author):
    """All attributes of a deleted row are gone; one receiver may serve saves and deletions."""
    log = listen(sender=Author, fields={"age"})
    session.delete(author)
    session.flush()
    assert log.lines == ["pre_delete Author(a)", "post_delete Author(a)"]


def test_fields_takes_no_notice_of_an_attribute_set_to_its_old_value(session, author):
    """Changed means a new value."""
    log = listen(sender=Author, fields={"age"})
    author.age = 1
    author.name = "b"
    session.flush()
    assert log.lines == []
    assert rows(session, Author.name) == ["b"]


def test_fields_sees_what_an_earlier_pre_save_receiver_has_set(session, author):
    """``pre_*`` show what is assigned so far."""

    @receiver(pre_save, sender=Author)
    def older(sender, instance, **kwargs):
        instance.age = 2

    log = listen(sender=Author, fields={"age"})
    author.name = "b"
    session.flush()
    assert log.lines == ["pre_save updated Author(b)", "post_save updated Author(b)"]
    assert rows(session, Author.name, Author.age) == [("b", 2)]


@pytest.mark.parametrize("fields", [{"author"}, {Book.author}, {"author_id"}])
def test_fields_takes_a_relationship_for_its_foreign_key(session, author, fields: object):
    """Whether the relationship was assigned or the key."""
    book, new = Book(name="b"), Author(name="new")
    session.add(book)
    session.flush()
    log = listen(sender=Book, fields=fields)
    book.author = author
    session.flush()
    book.author_id = None
    session.flush()
    # Its key is not known before the flush.
    session.expire(book, ["author"])
    book.author = new
    session.flush()
    book.name = "c"
    session.flush()
    assert log.pre == ["pre_save updated Book(b)"] * 3
    assert log.post == ["post_save updated Book(b)"] * 3
    assert rows(session, Book.name, Book.author_id) == [("c", new.id)]


class Point:
    """The value of a composite."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y

    def __composite_values__(self) -> tuple[int, int]:
        return self.x, self.y


class Place(OwnBase):
    """Columns behind other names."""

    __tablename__ = "places"
    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str | None] = mapped_column("label_column")
    x: Mapped[int | None]
    y: Mapped[int | None]
    point = composite(Point, "x", "y")
    title = synonym("label")
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("vehicles.id"))
    owner: Mapped[Vehicle | None] = relationship()


@pytest.mark.parametrize(
    ("field", "assigned", "value"),
    [
        ("label", "label", "b"),
        ("title", "label", "b"),
        ("title", "title", "b"),
        ("point", "point", Point(1, 3)),
        ("y", "point", Point(1, 3)),
        ("point", "y", 3),
    ],
)
def test_fields_takes_a_synonym_or_composite_for_its_columns(
    vehicles: Session, field: str, assigned: str, value: object
):
    """Any attribute that is stored in columns can be named."""
    place = Place(label="a", point=Point(1, 2))
    vehicles.add(place)
    vehicles.flush()
    seen = []
    post_save.connect(
        lambda sender, update_fields, **kwargs: seen.append(update_fields),
        sender=Place,
        fields={field},
        weak=False,
    )
    place.owner = Vehicle()
    vehicles.flush()
    assert seen == []
    setattr(place, assigned, value)
    vehicles.flush()
    assert len(seen) == 1


@pytest.mark.parametrize("field", ["agee", "books", "label_column", "metadata"])
def test_fields_with_an_unknown_attribute_is_an_error_at_once_for_a_mapped_class(field: str):
    """The error names the receiver, the class and the attributes there are."""
    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError, match=f"Author.*'{field}'.*age") as caught:
        post_save.connect(fn, sender=[Author, Book], fields={field})
    assert "fn" in str(caught.value)
    assert not post_save.receivers


@pytest.mark.parametrize("by", ["class", "name", "name_to_propagate"])
def test_fields_with_an_unknown_attribute_is_an_error_when_the_class_is_mapped(by: str, installed):
    """If the class was not mapped when the receiver was connected."""

    class LaterBase(DeclarativeBase):
        pass

    if by != "class":
        connect = receiver(
            post_save,
            sender=f"Misspelt_{by}",
            fields={"statos"},
            propagate=by == "name_to_propagate",
        )
        connect(lambda sender, **kwargs: None)

    columns = {"id": mapped_column(Integer, primary_key=True), "status": mapped_column(String)}
    # A name for each parameter: the class of the one before may not be garbage yet.
    Misspelt = type(f"Misspelt_{by}", (LaterBase,), {"__tablename__": "misspelt", **columns})
    with pytest.raises(ReceiverOptionError, match=r"Misspelt.*'statos'.*status"):
        if by == "class":
            receiver(post_save, sender=Misspelt, fields={"statos"})(lambda sender, **kwargs: None)
        configure_mappers()
    post_save._clear_state()
    configure_mappers()


class Dated:
    """A mixin, above and below a mapped class."""

    due: Mapped[int | None] = mapped_column(use_existing_column=True)


class FieldsBase(DeclarativeBase):
    """The declarative base of classes with and without what receivers ask for."""


class Bill(Dated, FieldsBase):
    """Has what is asked for."""

    __tablename__ = "bills"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Party(FieldsBase):
    """Lacks it, while a subclass has it."""

    __tablename__ = "parties"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "party"}


class Debtor(Dated, Party):
    """In the same table."""

    __mapper_args__ = {"polymorphic_identity": "debtor"}


WIDE_SENDERS = [None, ANY, FieldsBase, Dated, [Dated, FieldsBase], [None]]


@pytest.mark.parametrize("sender", WIDE_SENDERS, ids=str)
@pytest.mark.parametrize("when", ["before they are configured", "afterwards"])
def test_fields_pass_over_a_class_that_lacks_them(
    engine: Engine, installed, sender: Any, when: str
):
    """Whoever asks for no class by name hears of those that have the attribute, and of no other."""
    if when == "afterwards":
        configure_mappers()
    log = listen(sender=sender, fields={"due", "nobody has this"})
    FieldsBase.metadata.create_all(engine)
    with Session(engine) as session:
        bill, party, debtor = Bill(name="a"), Party(name="b"), Debtor(name="c")
        session.add_all([bill, party, debtor])
        session.flush()
        created = [*both("save created Bill(a)"), *both("save created Debtor(c)")]
        assert sorted(log.lines) == sorted(created)
        log.clear()
        bill.name, party.name, debtor.name = "d", "e", "f"
        session.flush()
        assert log.lines == []
        bill.due = debtor.due = 1
        party.name = "g"
        session.flush()
        updated = [*both("save updated Bill(d)"), *both("save updated Debtor(f)")]
        assert sorted(log.lines) == sorted(updated)
        log.clear()
        for one in (bill, party, debtor):
            session.delete(one)
        session.flush()
        assert sorted(log.lines) == sorted([*both("delete Bill(d)"), *both("delete Debtor(f)")])
        assert rows(session, Bill.id) == rows(session, Party.id) == []


@pytest.mark.parametrize("on", ["commit", "rollback"])
def test_fields_pass_over_a_class_that_lacks_them_at_the_end_too(
    engine: Engine, installed, on: Any
):
    """Each phase has the same rule, and a statement about many rows too."""
    told: list[Any] = []
    for signal in (post_save, post_delete):
        signal.connect(
            lambda sender, instance, **_: told.append(sender), weak=False, on=on, fields={"due"}
        )
    FieldsBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Bill(), Party(), Debtor()])
        session.flush()
        session.execute(insert(Party), [{"name": "x"}], execution_options={"signals": "rows"})
        session.execute(update(Party).values(name="y"), execution_options={"signals": "rows"})
        session.execute(update(Bill).values(due=1), execution_options={"signals": "rows"})
        session.commit() if on == "commit" else session.rollback()
    assert sorted(told, key=str) == [Bill, Debtor]
    assert len(rows(engine, Party.id)) == (3 if on == "commit" else 0)


@pytest.mark.parametrize("sender", [Party, "Party", [Party, Bill], [None, Party]], ids=str)
def test_fields_of_a_subclass_are_unknown_to_the_class_that_is_named(sender: Any):
    """With ``propagate`` too: name the subclass."""
    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError, match=r"Party.*'due'.*name"):
        post_save.connect(fn, sender=sender, propagate=True, fields={"due"})
    assert not post_save.receivers


@pytest.mark.parametrize("fields", [set(), [], {3}, {None}])
def test_fields_that_are_not_attribute_names_are_refused(fields: object):
    """An empty list would never match, and is not meant as "all"."""
    with pytest.raises(ReceiverOptionError, match="attribute names"):
        receiver(post_save, sender=Author, fields=fields)(lambda sender, **kwargs: None)


@pytest.mark.parametrize(
    "signal", [Signal("own"), receiver_failed, post_migrate], ids=lambda s: s.name
)
def test_fields_are_refused_where_no_row_is_changed(signal: Signal):
    """They would let everything through, which nobody means."""

    def hear(sender, **kwargs):
        pass

    with pytest.raises(ReceiverOptionError, match=r"hear .*fields= selects changes of rows"):
        signal.connect(hear, fields={"status"})
    assert not signal.receivers


def test_a_receiver_connected_twice_with_other_fields_gets_what_either_lets_through(
    session, author
):
    """And is called once when both do."""
    seen = []

    def fn(sender, update_fields, **kwargs):
        seen.append(update_fields)

    post_save.connect(fn, sender=Author, fields={"name"})
    post_save.connect(fn, sender=Author, fields={"age"})
    author.name = "b"
    session.flush()
    author.age = 2
    session.flush()
    author.name, author.age = "c", 3
    session.flush()
    assert seen == [{"name"}, {"age"}, {"name", "age"}]


# -- name, dispatch_uid --------------------------------------------------------------------------


def module_level(sender, **kwargs):
    """Fail, so that the name shows."""
    raise ZeroDivisionError


def test_the_name_is_module_and_qualified_name_by_default(session):
    """It stands in the note of an exception, with file and line."""
    post_save.connect(module_level, sender=Author)
    session.add(Author())
    with pytest.raises(ZeroDivisionError) as caught:
        session.flush()
    (note,) = caught.value.__notes__
    assert f"{__name__}.module_level ({__file__}:" in note


def test_a_name_of_ones_own_is_used_in_messages(session):
    """A stable name survives the renaming of the function."""
    post_save.connect(module_level, sender=Author, name="mailer.welcome")
    session.add(Author())
    with pytest.raises(ZeroDivisionError) as caught:
        session.flush()
    (note,) = caught.value.__notes__
    assert "mailer.welcome (" in note
    assert "module_level" not in note


def test_the_second_connection_with_the_same_uid_and_sender_is_ignored(session):
    """As in Django: a module imported twice connects once, though its functions are others."""
    seen = []
    for number in (1, 2):
        post_save.connect(
            lambda sender, number=number, **kwargs: seen.append(number),
            sender=Author,
            weak=False,
            dispatch_uid="welcome",
        )
    session.add(Author())
    session.flush()
    assert seen == [1]


def test_the_same_uid_with_another_sender_or_signal_is_another_connection(session):
    """The uid is looked up together with the sender, in one signal."""
    seen = []
    for signal, sender in ((post_save, Author), (post_save, Book), (pre_save, Author)):
        signal.connect(
            lambda sender, signal, **kwargs: seen.append((signal.name, sender)),
            sender=sender,
            weak=False,
            dispatch_uid="welcome",
        )
    session.add(Author())
    session.add(Book())
    session.flush()
    assert seen == [("pre_save", Author), ("post_save", Author), ("post_save", Book)]


def test_one_function_with_two_uids_is_called_once(session):
    """One receiver is called once per event however many of its connections match."""
    seen = []

    def fn(sender, **kwargs):
        seen.append(sender)

    post_save.connect(fn, sender=Author, dispatch_uid=1)
    post_save.connect(fn, sender=Author, dispatch_uid=2)
    session.add(Author())
    session.flush()
    assert seen == [Author]


def test_disconnect_by_uid_needs_no_function(session):
    """Returns whether something was removed; other uids stay."""
    seen = []
    for uid in ("one", "two"):
        post_save.connect(
            lambda sender, uid=uid, **kwargs: seen.append(uid),
            sender=Author,
            weak=False,
            dispatch_uid=uid,
        )
    assert not post_save.disconnect(sender=Book, dispatch_uid="one")
    assert post_save.disconnect(sender=Author, dispatch_uid="one")
    assert not post_save.disconnect(dispatch_uid="one")
    session.add(Author())
    session.flush()
    assert seen == ["two"]


def test_disconnect_of_nothing_in_particular_is_refused():
    """A function or a uid must be named."""
    with pytest.raises(ReceiverOptionError, match="dispatch_uid"):
        post_delete.disconnect()

"""The life of classes and instances in Python."""

from __future__ import annotations

import gc
import pickle
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, event, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Mapper,
    Session,
    configure_mappers,
    joinedload,
    mapped_column,
    object_session,
    relationship,
    selectinload,
    sessionmaker,
)

import sqla_signals
from sqla_signals import (
    AsyncReceiverError,
    ReceiverOptionError,
    ReceiverTypeError,
    SignalsNotInstalledWarning,
    class_prepared,
    mute,
    post_bulk,
    post_init,
    post_save,
    pre_bulk,
    pre_init,
    receiver,
)
from sqla_signals.receivers.installations import installations

from .models import Author, Base, Book, Named, Tag
from .observing import asynchronous, rows


class Life:
    """A receiver of ``pre_init`` and ``post_init`` that writes down every call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, sender: type, **arguments: Any) -> None:
        self.calls.append({"sender": sender, **arguments})

    @property
    def lines(self) -> list[str]:
        return [self._line(**call) for call in self.calls]

    def _line(self, sender: type, signal: Any, **arguments: Any) -> str:
        how = " loaded" if arguments.get("loaded") else ""
        return f"{signal.name}{how} {sender.__name__}"


def live(**options: Any) -> Life:
    """Connect a log to both signals."""
    life = Life()
    for signal in (pre_init, post_init):
        signal.connect(life, weak=False, **options)
    return life


@pytest.fixture(autouse=True)
def configured() -> None:
    """Nothing that other tests have mapped is still to be announced."""
    configure_mappers()


CONSTRUCTED = ["pre_init Author", "post_init Author"]


@pytest.fixture
def authors(library: Engine) -> Engine:
    """A library with three authors."""
    with Session(library) as session:
        session.add_all([Author(name=name, age=30) for name in "abc"])
        session.commit()
    return library


# -- constructing ----------------------------------------------------------------------------------


def test_constructing_sends_pre_init_before_and_post_init_after_the_constructor(installed):
    """``pre_init`` has the arguments; ``post_init`` has the instance, with its attributes."""
    life = live()
    seen: list[Any] = []

    @receiver(post_init)
    def read(sender, instance, loaded, **kwargs):
        seen.append((instance.name, loaded))

    author = Author(name="a")
    assert life.lines == CONSTRUCTED
    before, after = life.calls
    assert (before["args"], before["kwargs"]) == ((), {"name": "a"})
    assert before.keys() == {"sender", "args", "kwargs", "signal"}
    assert after["instance"] is author
    assert after["loaded"] is False
    assert after.keys() == {"sender", "instance", "loaded", "signal"}
    assert seen == [("a", False)]


def test_what_a_pre_init_receiver_changes_in_kwargs_counts(session: Session):
    """As in Django, and in SQLAlchemy's own ``init`` event; the row has it."""

    @receiver(pre_init, sender=Author)
    def name_it(sender, kwargs, **more):
        kwargs.setdefault("name", "anonymous")
        kwargs["age"] = 1

    session.add(Author(age=50))
    session.commit()
    assert rows(session.get_bind(), Author.name, Author.age) == [("anonymous", 1)]


def test_an_exception_in_pre_init_prevents_the_construction(installed):
    """It reaches the caller unchanged, with a note of where it was raised."""
    error = ValueError("no")
    life = live()

    @receiver(pre_init, sender=Author)
    def refuse(sender, **kwargs):
        raise error

    with pytest.raises(ValueError, match="no") as caught:
        Author(name="a")
    assert caught.value is error
    (note,) = error.__notes__
    assert "refuse" in note
    assert __file__ in note
    assert "pre_init" in note
    assert "Author" in note
    assert life.lines == ["pre_init Author"]


def test_an_exception_in_post_init_reaches_the_caller_of_the_constructor(installed):
    """With the same note; the receivers behind it are not called."""

    @receiver(post_init, sender=Author)
    def refuse(sender, **kwargs):
        raise ValueError("no")

    life = live()
    with pytest.raises(ValueError, match="no") as caught:
        Author(name="a")
    assert "post_init" in caught.value.__notes__[0]
    assert life.lines == ["pre_init Author"]


def test_a_constructor_that_fails_sends_no_post_init(installed):
    """And its exception is that of SQLAlchemy."""
    life = live()
    with pytest.raises(TypeError, match="unheard_of"):
        Author(unheard_of=1)
    assert life.lines == ["pre_init Author"]


def test_constructors_of_every_kind_send_each_signal_once(installed):
    """Positional arguments, dataclasses, and a subclass that calls ``super().__init__()``."""

    class OwnBase(DeclarativeBase):
        pass

    class Person(OwnBase):
        __tablename__ = "people"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        def __init__(self, name, *, self_made=True, sender=None) -> None:
            self.name = name

    class Employee(Person):
        def __init__(self, *names: str, **more: Any) -> None:
            super().__init__(" ".join(names), **more)

    class DataBase(MappedAsDataclass, DeclarativeBase):
        pass

    class Point(DataBase):
        __tablename__ = "points"
        x: Mapped[int] = mapped_column(primary_key=True)
        y: Mapped[int]

    life = live()
    assert Person("a", sender=1).name == "a"
    assert Employee("b", "c", self_made=False).name == "b c"
    assert Point(1, 2).y == 2
    assert life.lines == [
        *("pre_init Person", "post_init Person"),
        *("pre_init Employee", "post_init Employee"),
        *("pre_init Point", "post_init Point"),
    ]
    given = [(call["args"], call["kwargs"]) for call in life.calls if "args" in call]
    assert given == [
        (("a",), {"self_made": True, "sender": 1}),
        (("b", "c"), {"self_made": False}),
        ((1, 2), {}),
    ]


def test_an_sqlmodel_model_sends_them(installed):
    """It has a constructor of its own making."""
    sqlmodel = pytest.importorskip("sqlmodel")

    class LifeOfHero(sqlmodel.SQLModel, table=True):
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        name: str

    life = live(sender=LifeOfHero)
    assert LifeOfHero(name="a").name == "a"
    assert life.lines == ["pre_init LifeOfHero", "post_init LifeOfHero"]


# -- loading ---------------------------------------------------------------------------------------


def test_loading_rows_sends_post_init_with_loaded_and_no_pre_init(authors: Engine, installed):
    """Once for each row, with its columns there; SQLAlchemy does not call ``__init__``."""
    life = live(sender=Author)
    names = []

    @receiver(post_init, sender=Author)
    def read(sender, instance, loaded, **kwargs):
        names.append((instance.name, loaded))

    with Session(authors) as session:
        found = session.scalars(select(Author).order_by(Author.id)).all()
    assert life.lines == ["post_init loaded Author"] * 3
    assert [call["instance"] for call in life.calls] == list(found)
    assert names == [("a", True), ("b", True), ("c", True)]


@pytest.mark.parametrize(
    "refresh",
    [
        lambda session, author: session.refresh(author),
        lambda session, author: (session.expire(author), author.name),
        lambda session, author: (session.rollback(), author.name),
        lambda session, author: session.get(Author, author.id, populate_existing=True),
        lambda session, author: session.scalars(select(Author)).all(),
        lambda session, author: session.get(Author, author.id),
        lambda session, author: session.merge(author),
    ],
    ids=["refresh", "expire", "rollback", "populate_existing", "query again", "get", "merge"],
)
def test_refreshing_an_instance_sends_nothing(
    refresh: Callable[[Session, Author], Any], session: Session
):
    """It was complete before; only what is new in the session is announced."""
    session.add(Author(name="a"))
    session.commit()
    author = session.scalars(select(Author)).one()
    life = live()
    refresh(session, author)
    assert life.lines == []
    assert author.name == "a"


def test_what_is_constructed_is_not_announced_again_when_it_was_flushed(session: Session):
    """Not by the flush, and not by what it fetches after the commit."""
    life = live(sender=Author)
    author = Author(name="a")
    session.add(author)
    session.commit()
    assert author.id == 1
    assert life.lines == CONSTRUCTED


def test_every_way_of_loading_sends_it(authors: Engine, installed):
    """Lazily, eagerly, by key, and the rows that an INSERT returns."""
    with Session(authors) as session:
        session.add(Book(name="x", author_id=1))
        session.commit()
    ways: list[Callable[[Session], Any]] = [
        lambda session: session.get(Book, 1).author.name,
        lambda session: session.scalars(select(Book).options(joinedload(Book.author))).all(),
        lambda session: session.scalars(select(Book).options(selectinload(Book.author))).all(),
    ]
    for way in ways:
        life = live()
        with Session(authors) as session:
            way(session)
        assert Counter(life.lines) == {"post_init loaded Book": 1, "post_init loaded Author": 1}
        for signal in (pre_init, post_init):
            signal.disconnect(life)
    life = live()
    with Session(authors) as session:
        session.scalars(insert(Author).returning(Author), [{"name": "d"}, {"name": "e"}]).all()
        session.commit()
    assert life.lines == ["post_init loaded Author"] * 2
    assert rows(authors, Author.name) == ["a", "b", "c", "d", "e"]


def test_a_receiver_may_load_more_of_an_instance_while_it_is_being_loaded(
    authors: Engine, installed
):
    """What the same query goes on to load is not lost by that."""
    with Session(authors) as session:
        session.add(Book(name="x", author_id=1, tags=[Tag(name="t"), Tag(name="u")]))
        session.commit()
    seen = []

    @receiver(post_init, sender=Book)
    def load_more(sender, instance, **kwargs):
        object_session(instance).refresh(instance, ["name"])
        seen.append((instance.name, instance.author.name))

    with Session(authors) as session:
        book = session.scalars(select(Book).options(joinedload(Book.tags))).unique().one()
        assert [tag.name for tag in book.tags] == ["t", "u"]
    assert seen == [("x", "a")]


def test_an_exception_in_post_init_fails_the_query_and_the_session_stays_usable(
    authors: Engine, installed
):
    """With the note of where it was raised."""

    @receiver(post_init, sender=Author)
    def refuse(sender, instance, **kwargs):
        if instance.name == "b":
            raise ValueError("no")

    with Session(authors) as session:
        with pytest.raises(ValueError, match="no") as caught:
            session.scalars(select(Author).order_by(Author.id)).all()
        assert "refuse" in caught.value.__notes__[0]
        assert session.scalars(select(Author.name).order_by(Author.id)).all() == ["a", "b", "c"]


def test_merging_tells_whether_the_copy_stands_for_a_row(authors: Engine, installed):
    """As SQLAlchemy's ``load`` event does: a new instance in the session, made without a call."""
    with Session(authors) as session:
        author = session.get(Author, 1)
    new = Author(name="new")
    life = live()
    with Session(authors) as session:
        session.merge(author, load=False)
        assert life.lines == ["post_init loaded Author"]
        life.calls.clear()
        session.merge(new)
        assert life.lines == ["post_init Author"]


def test_an_unpickled_instance_is_not_announced(authors: Engine, installed):
    """SQLAlchemy has the ``unpickle`` event for that."""
    with Session(authors) as session:
        pickled = pickle.dumps(session.get(Author, 1))
    life = live()
    assert pickle.loads(pickled).name == "a"
    assert life.lines == []


@pytest.mark.parametrize("on", ["commit", "rollback"])
def test_the_instance_of_a_commit_receiver_went_through_post_init(session: Session, on: str):
    """What ``post_init`` sets up is there on every instance that a receiver sees."""
    seen = []

    @receiver(post_init, sender=Author)
    def set_up(sender, instance, loaded, **kwargs):
        instance.made = "loaded" if loaded else "constructed"

    @receiver(post_save, sender=Author, on=on)
    def saved(sender, instance, **kwargs):
        seen.append((instance.name, instance.made))

    author = Author(name="a")
    session.add(author)
    session.flush()
    if on == "commit":
        session.commit()
    else:
        session.rollback()
    assert author.made == "constructed"
    assert seen == [("a", "loaded")]
    assert rows(session.get_bind(), Author.name) == (["a"] if on == "commit" else [])


@asynchronous
async def test_loading_through_an_async_session_sends_it(
    async_library: AsyncEngine, library: Engine, installed
):
    """To plain functions; a receiver may even load lazily there."""
    with Session(library) as session:
        session.add(Author(name="a", books=[Book(name="x")]))
        session.commit()
    seen = []

    @receiver(post_init, sender=Author)
    def read(sender, instance, loaded, **kwargs):
        seen.append((loaded, [book.name for book in instance.books]))

    async with AsyncSession(async_library) as session:
        assert (await session.scalars(select(Author))).one().name == "a"
    assert seen == [(True, ["x"])]


# -- receivers and senders -------------------------------------------------------------------------


class Novelist(Author):
    """Single-table inheritance, without a discriminator."""


def test_senders_are_classes_lists_strings_bases_and_mixins_as_for_other_signals(installed):
    """The exact class, unless ``propagate`` is given."""
    logs = {
        "class": live(sender=Author),
        "list": live(sender=[Author, "Tag"]),
        "string": live(sender="Author"),
        "dotted": live(sender=f"{Author.__module__}.Author"),
        "base": live(sender=Base),
        "mixin": live(sender=Named),
        "propagate": live(sender=Author, propagate=True),
        "any": live(),
    }
    for make in (Author, Novelist, Tag):
        make()
    heard = {
        name: [call["sender"].__name__ for call in log.calls if call["signal"] is post_init]
        for name, log in logs.items()
    }
    assert heard == {
        "class": ["Author"],
        "list": ["Author", "Tag"],
        "string": ["Author"],
        "dotted": ["Author"],
        "base": ["Author", "Novelist", "Tag"],
        "mixin": ["Author", "Novelist"],
        "propagate": ["Author", "Novelist"],
        "any": ["Author", "Novelist", "Tag"],
    }


def test_receivers_are_called_in_the_order_of_connection_each_once(authors: Engine, installed):
    """However many of the senders match."""
    called = []

    def make(name: str) -> Callable[..., None]:
        return lambda sender, **kwargs: called.append(name)

    for name, sender in (("1", Author), ("2", None), ("3", [Author, "Author", Base])):
        post_init.connect(make(name), sender=sender, weak=False)
    Author()
    assert called == ["1", "2", "3"]
    called.clear()
    with Session(authors) as session:
        session.get(Author, 1)
    assert called == ["1", "2", "3"]


def test_mute_silences_them(authors: Engine, installed):
    """All of them, those of a signal, or those of a class."""
    life = live()
    with mute():
        Author()
    with mute(post_init), Session(authors) as session:
        session.get(Author, 1)
        Author()
    with mute(sender=Author):
        Author()
        Tag()
    assert life.lines == ["pre_init Author", "pre_init Tag", "post_init Tag"]


def test_a_disconnected_receiver_leaves_the_class_as_it_was(authors: Engine, installed):
    """And one that is connected after the first instance was made is called as well."""
    init, load = Author.__mapper__.class_manager.original_init, load_listeners(Author)
    Author()
    life = live(sender=Author)
    assert load_listeners(Author) > load
    Author()
    assert life.lines == CONSTRUCTED
    for signal in (pre_init, post_init):
        assert signal.disconnect(life)
    assert Author.__mapper__.class_manager.original_init is init
    assert load_listeners(Author) == load
    with pre_init.connected_to(life, sender=Author):
        assert load_listeners(Author) == load
        Author()
    Author()
    assert life.lines == [*CONSTRUCTED, "pre_init Author"]
    assert Author.__mapper__.class_manager.original_init is init


def load_listeners(cls: Any) -> int:
    return len(list(cls.__mapper__.class_manager.dispatch.load))


def test_a_receiver_may_disconnect_itself_and_connect_others(authors: Engine, installed):
    """The signal being sent goes to the receivers there were when it began."""
    called = []

    def second(sender, **kwargs):
        called.append("second")

    def first(sender, **kwargs):
        called.append("first")
        post_init.disconnect(first)
        post_init.connect(second)

    post_init.connect(first, sender=Author)
    with Session(authors) as session:
        session.scalars(select(Author)).all()
    assert called == ["first", "second", "second"]


def test_async_receivers_are_refused_when_connected():
    """A constructor cannot wait; the message says so."""
    for signal in (pre_init, post_init, class_prepared):
        with pytest.raises(ReceiverTypeError, match=rf"{signal.name}.*wait_long.*plain function"):

            @receiver(signal, sender=Author)
            async def wait_long(sender, **kwargs): ...

        assert not signal.receivers


def test_a_receiver_that_turns_out_to_be_async_is_an_error(installed):
    """A plain function that returns a coroutine: it would never be awaited."""

    async def later() -> None: ...

    @receiver(post_init, sender=Author)
    def hidden(sender, **kwargs):
        return later()

    with pytest.raises(AsyncReceiverError, match="hidden"):
        Author()


@pytest.mark.parametrize("options", [{"on": "commit"}, {"on": "rollback"}, {"fields": {"name"}}])
def test_options_that_concern_rows_are_refused(options: dict[str, Any]):
    """There is no row here, and no transaction."""
    for signal in (pre_init, post_init, class_prepared):
        with pytest.raises(ReceiverOptionError, match=signal.name):
            signal.connect(lambda sender, **kwargs: None, weak=False, **options)
        assert not signal.receivers


# -- installing ------------------------------------------------------------------------------------


def test_remove_leaves_nothing_behind(authors: Engine):
    """No signal any more, no listener, and the constructor that was there before."""
    Author()
    init = Author.__mapper__.class_manager.original_init
    installation = sqla_signals.install()
    life = live()
    Author()
    installation.remove()
    assert Author.__mapper__.class_manager.original_init is init
    assert load_listeners(Author) == 0
    Author()
    with Session(authors) as session:
        session.get(Author, 1)
    assert life.lines == CONSTRUCTED


def test_a_removal_inside_a_flush_counts_at_once(session: Session):
    """Although the listeners can only be taken off later."""
    life = live(sender=Author)

    @receiver(post_save, sender=Author)
    def stop(sender, **kwargs):
        for installation in list(installations):
            installation.remove()
        Author()

    session.add(Author(name="a"))
    session.flush()
    assert life.lines == CONSTRUCTED


def test_overlapping_installs_send_once(authors: Engine):
    """All sessions, and one of them."""
    with Session(authors) as session:
        installations = [sqla_signals.install(), sqla_signals.install(session)]
        life = live()
        session.get(Author, 1)
        Author()
        assert life.lines == ["post_init loaded Author", *CONSTRUCTED]
        installations[0].remove()
        life.calls.clear()
        session.get(Author, 2)
        Author()
        assert life.lines == ["post_init loaded Author", *CONSTRUCTED]


def test_loading_is_announced_for_the_sessions_that_are_listened_to(authors: Engine):
    """Constructing belongs to no session, and is announced while anything is installed."""
    Listened, other = sessionmaker(authors), sessionmaker(authors)
    sqla_signals.install(Listened)
    life = live()
    with other() as session:
        session.get(Author, 1)
    assert life.lines == []
    with Listened() as session:
        session.get(Author, 1)
    Author()
    assert life.lines == ["post_init loaded Author", *CONSTRUCTED]


def test_receivers_without_an_install_give_the_warning_at_the_next_flush(library: Engine):
    """Like those of the other signals."""
    life = live(sender=Author)
    author = Author(name="a")
    with Session(library) as session:
        session.add(author)
        with pytest.warns(SignalsNotInstalledWarning, match=r"sqla_signals\.install\(\)"):
            session.commit()
    assert life.lines == []


# -- what it costs ---------------------------------------------------------------------------------


def calls(work: Callable[[], Any]) -> Counter[str]:
    """The functions that work calls, of Python and of C."""
    found: Counter[str] = Counter()

    def profile(frame, kind: str, argument: Any) -> None:
        if kind == "call":
            found[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1
        elif kind == "c_call":
            found[argument.__qualname__] += 1

    work()  # whatever is cached, is
    gc.collect()
    gc.disable()  # what it finds is not in the count
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def test_constructing_and_loading_cost_nothing_where_nobody_listens(library: Engine):
    """1,000 instances: not one call more than without the package, and none after a disconnect."""
    with Session(library) as session:
        session.add_all([Author(name="a") for _ in range(1000)])
        session.commit()

    def work() -> None:
        for _ in range(1000):
            Author(name="a")
        with Session(library) as session:
            assert len(session.scalars(select(Author)).all()) == 1000

    without = calls(work)
    installation = sqla_signals.install()
    life = live(sender=Book)
    life_after = live(sender=Author)
    for signal in (pre_init, post_init):
        signal.disconnect(life_after)
    Book()
    listening_to_another_class = calls(work)
    installation.remove()
    assert life.lines == ["pre_init Book", "post_init Book"]
    # The session's own events are listened to: only what comes from the 1,000 counts.
    ours = sqla_signals.__path__[0]
    more = listening_to_another_class - without
    assert {name: n for name, n in more.items() if n >= 100} == {}
    assert not any("instances" in name for name in more if name.startswith(ours))


def test_nobody_pays_for_a_receiver_of_another_class_to_the_call(library: Engine):
    """Without a session in between, the count is the same to the last call."""

    def work() -> None:
        for _ in range(1000):
            Author(name="a")

    without = calls(work)
    sqla_signals.install()
    live(sender=Book)
    assert calls(work) == without


# -- class_prepared --------------------------------------------------------------------------------


@pytest.fixture
def prepared(installed) -> list[str]:
    """The names of the classes that were announced."""
    names: list[str] = []

    @receiver(class_prepared)
    def announce(sender, signal, **kwargs):
        assert signal is class_prepared
        assert not kwargs
        names.append(sender.__name__)

    return names


def make_models() -> tuple[Any, Any]:
    """Two classes with a backref between them, not configured yet.

    Keep what it returns: a class that is collected before is not configured.
    """

    class OwnBase(DeclarativeBase):
        pass

    class Ship(OwnBase):
        __tablename__ = "ships"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Sailor(OwnBase):
        __tablename__ = "sailors"
        id: Mapped[int] = mapped_column(primary_key=True)
        ship_id: Mapped[int] = mapped_column(ForeignKey("ships.id"))
        ship: Mapped[Ship] = relationship(backref="crew")

    return Ship, Sailor


def test_class_prepared_is_sent_once_for_each_class_in_the_order_of_mapping(prepared: list[str]):
    """When mappers are configured; not again when others are."""
    _models = [make_models()]
    assert prepared == []
    configure_mappers()
    assert prepared == ["Ship", "Sailor"]
    _models.append(make_models())
    configure_mappers()
    assert prepared == ["Ship", "Sailor"] * 2


def test_the_first_instance_comes_after_class_prepared(prepared: list[str]):
    """Which configures the mappers; a receiver of ``post_init`` by name hears of that instance."""
    life = live(sender="Sailor")
    _, sailor = make_models()
    sailor()
    assert prepared == ["Ship", "Sailor"]
    assert life.lines == ["pre_init Sailor", "post_init Sailor"]


def test_relationships_and_backrefs_are_there_when_a_class_is_prepared(installed):
    """Also those that another class brings."""
    found = []

    @receiver(class_prepared, sender="Ship")
    def inspect_it(sender, **kwargs):
        found.append(sorted(sender.__mapper__.relationships.keys()))

    _models = make_models()
    configure_mappers()
    assert found == [["crew"]]


def test_class_prepared_takes_the_senders_of_other_signals_and_mute(prepared: list[str]):
    """A base that is not mapped itself stands for its models."""
    heard: list[str] = []
    ship, _ = make_models()
    base = ship.__mro__[1]
    for sender in (ship, "Sailor", base):
        class_prepared.connect(
            lambda cls, sender=sender, **kwargs: heard.append(f"{sender}: {cls.__name__}"),
            sender=sender,
            weak=False,
        )
    with mute(receiver=f"{__name__}.prepared.<locals>.announce"):
        configure_mappers()
    assert heard == [f"{ship}: Ship", f"{base}: Ship", "Sailor: Sailor", f"{base}: Sailor"]
    assert prepared == []


def test_a_late_receiver_is_not_told_of_the_past(installed):
    """As in Django: connect before the classes are used."""
    _models = make_models()
    configure_mappers()
    heard = []
    class_prepared.connect(lambda sender, **kwargs: heard.append(sender), weak=False)
    configure_mappers()
    assert heard == []


def test_an_exception_in_class_prepared_reaches_whoever_configured(prepared: list[str]):
    """The mappers are fine, and the classes that were not announced come the next time."""

    @receiver(class_prepared, sender="Ship")
    def refuse(sender, **kwargs):
        raise ValueError("no")

    _, sailor = make_models()
    with pytest.raises(ValueError, match="no") as caught:
        configure_mappers()
    assert "class_prepared" in caught.value.__notes__[0]
    assert prepared == ["Ship"]
    assert sailor(id=1).id == 1
    class_prepared.disconnect(refuse)
    _models = make_models()
    configure_mappers()
    assert prepared == ["Ship", "Sailor", "Ship", "Sailor"]


def test_a_receiver_of_class_prepared_may_remove_the_installation(installed):
    """The classes behind are not announced any more, and the mappers are configured."""
    heard = []

    @receiver(class_prepared)
    def stop(sender, **kwargs):
        heard.append(sender.__name__)
        installed.remove()

    ship, _ = make_models()
    configure_mappers()
    assert heard == ["Ship"]
    assert ship.__mapper__.configured
    _models = make_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SignalsNotInstalledWarning)
        configure_mappers()
    assert heard == ["Ship"]


@pytest.fixture
def install_when_configured() -> Iterator[None]:
    """An application that installs when its mappers are configured."""

    def install() -> None:
        if not installations:
            sqla_signals.install()

    event.listen(Mapper, "after_configured", install)
    yield
    event.remove(Mapper, "after_configured", install)


def test_installing_in_a_listener_for_after_configured_is_possible(install_when_configured):
    """What is mapped later is announced."""
    _models = make_models()
    configure_mappers()
    heard = []
    class_prepared.connect(lambda sender, **kwargs: heard.append(sender.__name__), weak=False)
    _models = make_models()
    configure_mappers()
    assert heard == ["Ship", "Sailor"]


def test_class_prepared_without_an_install_gives_the_warning():
    """When the mappers are configured."""
    heard = []
    class_prepared.connect(lambda sender, **kwargs: heard.append(sender), weak=False)
    _models = make_models()
    with pytest.warns(SignalsNotInstalledWarning, match=r"sqla_signals\.install\(\)"):
        configure_mappers()
    assert heard == []


def test_a_class_that_was_listened_to_can_be_forgotten(installed):
    """Nothing that is kept for its receivers keeps it alive."""
    life = live()
    class_prepared.connect(lambda sender, **kwargs: None, weak=False)

    def make() -> weakref.ref[type]:
        ship, _ = make_models()
        ship()
        return weakref.ref(ship)

    forgotten = make()
    life.calls.clear()
    gc.collect()
    assert forgotten() is None


def test_a_flush_costs_no_more_for_receivers_that_have_no_part_in_it(library: Engine):
    """post_init, class_prepared and bulk receivers, of any class: not one call more."""
    with Session(library) as session:

        def work() -> None:
            session.add(Author(name="a"))
            session.flush()
            session.rollback()

        sqla_signals.install()
        without = calls(work)
        live(sender=Book)
        for signal in (class_prepared, pre_bulk, post_bulk):
            signal.connect(nothing)
        assert calls(work) == without
        post_save.connect(nothing, sender=Book)
        assert calls(work) != without


def nothing(sender: Any, **kwargs: Any) -> None: ...

"""What a review found wrong: each test failed once."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from sqlalchemy import (
    Engine,
    ForeignKey,
    Integer,
    StaticPool,
    String,
    TypeDecorator,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    Session,
    column_property,
    configure_mappers,
    declarative_base,
    foreign,
    mapped_column,
    reconstructor,
    relationship,
    remote,
    synonym,
)

from sqla_signals import (
    UNSET,
    Change,
    InstallError,
    ReceiverOptionError,
    ReceiverTypeError,
    Signal,
    SignalsError,
    install,
    mute,
    on_commit,
    on_rollback,
    post_delete,
    post_save,
    pre_delete,
    pre_save,
    raw,
    receiver,
    receiver_failed,
)

from ..conftest import create_sqlite_engine
from .models import Author, Book, Page, Tag
from .observing import Log, asynchronous, both, listen, rows

ROUNDS = 12
"""How many models to map: some get the address of another one by then."""

# -- special shapes --------------------------------------------------------------------------------


class OwnBase(DeclarativeBase):
    """The base of the special shapes."""


class Named:
    """A key and a name."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Tenanted(Named, OwnBase):
    """Its row goes to the database of its tenant."""

    __tablename__ = "tenanted"
    tenant: Mapped[str | None]


class Listened(Named, OwnBase):
    """Its ``load`` listener expects the context of a query, which there is not always."""

    __tablename__ = "listened"


@event.listens_for(Listened, "load")
def _on_load(target, context) -> None:
    context.session


class Stamped(Named, OwnBase):
    """Its reconstructor reads what the database computes."""

    __tablename__ = "stamped"
    stamp: Mapped[str | None] = mapped_column(onupdate=func.upper("now"))

    @reconstructor
    def on_load(self) -> None:
        self.summary = f"{self.name} {self.stamp}"


class Handle:
    """A value that cannot be copied."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __deepcopy__(self, memo: object) -> Handle:
        raise TypeError("a handle cannot be copied")


class HandleType(TypeDecorator[Handle]):
    """Stores a handle as its text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return value and value.text

    def process_result_value(self, value, dialect):
        return value and Handle(value)


@dataclass
class Money:
    """A value object that can be changed in place, unknown to ``sqlalchemy.ext.mutable``."""

    cents: int


class MoneyType(TypeDecorator[Money]):
    """Stores money as a number."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return value and value.cents

    def process_result_value(self, value, dialect):
        return value and Money(value)


class Purse(Named, OwnBase):
    """Has values that are neither plain nor containers."""

    __tablename__ = "purses"
    handle: Mapped[Handle | None] = mapped_column(HandleType)
    money: Mapped[Money | None] = mapped_column(MoneyType)


class Country(Named, OwnBase):
    """Referenced by its code, not by its key."""

    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(unique=True)
    cities: Mapped[list[City]] = relationship(passive_updates=False, order_by="City.id")


class City(Named, OwnBase):
    """The unit of work writes the new code into it, after the one of the country."""

    __tablename__ = "cities"
    country_code: Mapped[str | None] = mapped_column(
        ForeignKey("countries.code", deferrable=True, initially="DEFERRED")
    )


class Node(Named, OwnBase):
    """A tree."""

    __tablename__ = "nodes"
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("nodes.id"))
    children: Mapped[list[Node]] = relationship(cascade="all, delete-orphan")


class Item(Named, OwnBase):
    """On a shelf."""

    __tablename__ = "items"
    shelf_id: Mapped[int | None]


class Shelf(Named, OwnBase):
    """Counts its items with a query."""

    __tablename__ = "shelves"


Shelf.size = column_property(  # type: ignore[attr-defined]
    select(func.count(Item.id)).where(Item.shelf_id == Shelf.id).scalar_subquery()
)


class Animal(Named, OwnBase):
    """The base of a joined inheritance."""

    __tablename__ = "animals"
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    """Has a table of its own besides."""

    __tablename__ = "dogs"
    id: Mapped[int] = mapped_column(ForeignKey("animals.id"), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Visit(Named, OwnBase):
    """Belongs to an animal, of which the database knows nothing."""

    __tablename__ = "visits"
    animal_id: Mapped[int | None]
    animal: Mapped[Animal | None] = relationship(
        primaryjoin=lambda: foreign(Visit.animal_id) == remote(Animal.id)
    )


@pytest.fixture
def shapes(engine: Engine) -> Engine:
    """The engine, with the tables of the special shapes in it."""
    OwnBase.metadata.create_all(engine)
    return engine


@pytest.fixture
def own(shapes: Engine, installed) -> Iterator[Session]:
    """A session on the special shapes, with signals installed."""
    with Session(shapes) as session:
        yield session


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """Two databases with the special shapes."""
    engines = (create_sqlite_engine(tmp_path / "1.db"), create_sqlite_engine(tmp_path / "2.db"))
    for engine in engines:
        OwnBase.metadata.create_all(engine)
    yield engines
    for engine in engines:
        engine.dispose()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library has logged as an error."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "sqla_signals" and record.levelno >= logging.ERROR
    ]


def place(fn: Callable[..., Any]) -> str:
    """Name, file and line of a function, as messages have them."""
    return f"{fn.__qualname__} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno})"


# -- options that promise what is not kept ---------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "options"),
    [
        (pre_save, {"name": "books.fn"}),
        (post_save, {"sender": Author}),
        (post_save, {"sender": Author, "name": "books.fn"}),
        (post_delete, {"on": "rollback", "name": "books.fn"}),
        (Signal("own"), {"name": "books.fn"}),
    ],
    ids=["pre_save", "no name", "no outbox", "rollback", "own"],
)
def test_durable_is_refused_when_connecting(signal: Signal, options: dict[str, Any]):
    """It was accepted, and did nothing."""
    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError, match="durable") as caught:
        signal.connect(fn, durable=True, **options)
    assert signal.name in str(caught.value)
    assert f"({fn.__code__.co_filename}:" in str(caught.value)
    with pytest.raises(ReceiverOptionError, match="durable"):
        receiver(signal, durable=True, **options)(fn)
    assert not signal.receivers


@pytest.mark.parametrize(
    "what", [[pre_save], Author, "pre_save", 5], ids=["list", "model", "name", "number"]
)
def test_mute_refuses_what_is_no_signal(session: Session, log: Log, what: Any):
    """It was accepted, and silenced nothing."""
    with pytest.raises(ReceiverOptionError, match="mute"):
        with mute(what):
            pytest.fail("went on unmuted")
    session.add(Author(name="a"))
    session.commit()
    assert log.lines == both("save created Author(a)")
    assert rows(session, Author.name) == ["a"]


@pytest.mark.parametrize(
    "what",
    ["post_save", Author, None, 5, [post_save, "post_delete"], [Author]],
    ids=["name", "model", "None", "number", "signal and name", "list of models"],
)
def test_receiver_refuses_what_is_no_signal(what: Any):
    """Before it decorates anything, and whichever of several it is."""
    with pytest.raises(ReceiverTypeError, match=r"receiver\(\)"):
        receiver(what)
    assert not post_save.receivers


@pytest.mark.parametrize(
    "options",
    [
        {"on": "comit"},
        {"sender": 5},
        {"sender": [Author, 5]},
        {"sender": []},
        {"fields": [5]},
        {"fields": []},
        {"sender": Author, "fields": {"nope"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda one: one.name)
def test_a_wrong_option_is_told_with_the_signal_and_the_place_of_the_receiver(
    signal: Signal, options: dict[str, Any]
):
    """With file and line, so that it is found among a hundred others."""
    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError) as caught:
        signal.connect(fn, **options)
    assert signal.name in str(caught.value)
    assert place(fn) in str(caught.value)
    assert not signal.receivers


def test_a_wrong_field_is_told_with_the_signal_also_when_the_class_is_mapped_later(installed):
    """There is no traceback then that leads to the receiver."""

    @receiver(post_save, sender="MappedLater", fields={"nope"})
    def fn(sender, **kwargs): ...

    base = declarative_base()

    class MappedLater(Named, base):  # type: ignore[misc, valid-type]
        __tablename__ = "mapped_later"

    try:
        with pytest.raises(ReceiverOptionError, match="nope") as caught:
            configure_mappers()
    finally:
        post_save.disconnect(fn)
        base.registry.dispose()
    assert post_save.name in str(caught.value)
    assert place(fn) in str(caught.value)


@pytest.mark.parametrize("register", [on_commit, on_rollback])
def test_callbacks_of_a_session_that_nobody_listens_to_are_refused(library: Engine, register):
    """They would never be called: nothing is installed, or not for this session."""

    class OtherSession(Session): ...

    called: list[bool] = []
    with Session(library) as session:
        for _ in ("not installed", "for another class"):
            with pytest.raises(SignalsError, match=r"install\(\)"):
                register(session, lambda: called.append(True))
            install(OtherSession)
        session.add(Author(name="a"))
        session.commit()
    assert called == []
    assert rows(library, Author.name) == ["a"]


@pytest.mark.parametrize("register", [on_commit, on_rollback])
@pytest.mark.parametrize("what", [None, 5])
def test_callbacks_of_what_is_no_session_are_refused(installed, register, what: Any):
    """With an exception of ours."""
    with pytest.raises(SignalsError):
        register(what, print)


# -- receivers that would not run ------------------------------------------------------------------


def generator(sender, **kwargs):
    yield


async def async_generator(sender, **kwargs):
    yield


class GeneratorCall:
    def __call__(self, sender, **kwargs):
        yield


@pytest.mark.parametrize(
    "fn",
    [generator, async_generator, functools.partial(generator, extra=1), GeneratorCall()],
    ids=["generator", "async generator", "partial", "__call__"],
)
@pytest.mark.parametrize("signal", [pre_save, post_delete, Signal("own")], ids=lambda s: s.name)
def test_a_generator_is_refused_when_connecting(signal: Signal, fn: Any):
    """Calling it would run nothing of its body."""
    with pytest.raises(ReceiverTypeError, match="generator") as caught:
        signal.connect(fn, weak=False)
    assert signal.name in str(caught.value)
    assert f"{__file__}:" in str(caught.value)
    assert not signal.receivers


@asynchronous
async def test_send_async_awaits_what_a_decorated_async_receiver_returns():
    """``functools.wraps`` does not make the wrapper a coroutine function."""

    def decorated(fn: Any) -> Any:
        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        return wrapper

    @decorated
    async def fn(sender, **kwargs):
        return sender, kwargs

    signal, mock = Signal("own"), AsyncMock(return_value="mocked")
    signal.connect(fn)
    signal.connect(mock)
    assert await signal.send_async("me", a=1) == [(fn, ("me", {"a": 1})), (mock, "mocked")]
    mock.assert_awaited_once_with("me", a=1)


def test_a_name_of_two_models_is_refused_also_when_connected_after_they_are_configured():
    """As it was when connected before."""
    base = declarative_base()
    twins = []  # the registry does not hold them
    for module in ("one", "two"):
        key = mapped_column(Integer, primary_key=True)
        body = {"__tablename__": module, "__module__": module, "id": key}
        twins.append(type("Twin", (base,), body))
    configure_mappers()

    def fn(sender, **kwargs): ...

    with pytest.raises(ReceiverOptionError, match=r"one\.Twin.*two\.Twin") as caught:
        post_save.connect(fn, sender="Twin")
    assert post_save.name in str(caught.value)
    assert place(fn) in str(caught.value)
    assert not post_save.receivers
    install()
    post_save.connect(fn, sender="one.Twin")
    base.registry.dispose()


# -- raw -------------------------------------------------------------------------------------------


@asynchronous
async def test_raw_of_a_plain_session_in_an_async_with_is_refused_at_once(
    library: Engine, log: Log
):
    """Not at the end of the block, where the flush would be awaited; it is not raw after that."""
    with Session(library) as session:
        with pytest.raises(InstallError, match="'with'"):
            async with raw(session):
                pytest.fail("went into the block")
        session.add(Author(name="a"))
        session.commit()
    assert [one["raw"] for one in log.sent] == [False, False]
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_raw_of_an_async_session_in_a_plain_with_is_refused_at_once(
    async_library: AsyncEngine, library: Engine, log: Log
):
    """As an exception of ours; also of an ``async_scoped_session``."""
    scoped = async_scoped_session(async_sessionmaker(async_library), scopefunc=lambda: None)
    for session in (AsyncSession(async_library), scoped):
        with pytest.raises(InstallError, match="async with"):
            with raw(session):
                pytest.fail("went into the block")
        session.add(Author(name="a"))
        await session.commit()
        await session.close()
    await scoped.remove()
    assert [one["raw"] for one in log.sent] == [False] * 4
    assert rows(library, Author.name) == ["a", "a"]


@asynchronous
async def test_an_async_scoped_session_can_be_raw(
    async_library: AsyncEngine, library: Engine, log: Log
):
    """The block is for the session behind it."""
    scoped = async_scoped_session(async_sessionmaker(async_library), scopefunc=lambda: None)
    async with raw(scoped):
        scoped.add(Author(name="a"))
    scoped.add(Author(name="b"))
    await scoped.commit()
    await scoped.remove()
    assert [one["raw"] for one in log.sent] == [True, True, False, False]
    assert rows(library, Author.name) == ["a", "b"]


@pytest.mark.parametrize("what", [5, None, Session, "session"], ids=repr)
def test_raw_of_what_is_no_session_is_refused_at_once(what: Any):
    """Before any block."""
    with pytest.raises(InstallError, match="raw"):
        raw(what)


# -- several databases -----------------------------------------------------------------------------


def test_a_pre_save_receiver_may_choose_the_shard(two: tuple[Engine, Engine], installed):
    """Asking for ``using`` does not settle it before the receivers had their say."""
    shards = dict(zip(("eu", "us"), two, strict=True))

    def choose(mapper, instance, clause=None):
        return instance.tenant or "us"

    def everywhere(*args, **kwargs):
        return list(shards)

    looked, used = [], []

    @receiver(pre_save, sender=Tenanted)
    def looks(sender, using, **kwargs):
        looked.append(using)

    @receiver(pre_save, sender=Tenanted)
    def assigns(sender, instance, **kwargs):
        instance.tenant = "eu"

    @receiver(post_save, sender=Tenanted)
    def saved(sender, instance, using, **kwargs):
        used.append((instance.name, using))

    @receiver(post_save, sender=Tenanted, on="commit")
    def committed(sender, instance, using, **kwargs):
        used.append((instance.name, using))

    with ShardedSession(
        shards=shards,
        shard_chooser=choose,
        identity_chooser=everywhere,
        execute_chooser=everywhere,
    ) as session:
        session.add(Tenanted(name="a"))
        session.commit()
    assert len(looked) == 1
    assert rows(shards["eu"], Tenanted.name, Tenanted.tenant) == [("a", "eu")]
    assert rows(shards["us"], Tenanted.id) == []
    assert used == [("a", shards["eu"])] * 2


def test_a_shard_chooser_is_asked_as_the_flush_asks_it(two: tuple[Engine, Engine], installed):
    """One that takes only the two arguments of the unit of work will do."""
    shards = dict(zip(("us", "eu"), two, strict=True))

    def choose(mapper, instance):
        return instance.tenant

    def everywhere(*args, **kwargs):
        return list(shards)

    used = note_using(Tenanted)
    with ShardedSession(
        shards=shards,
        shard_chooser=choose,
        identity_chooser=everywhere,
        execute_chooser=everywhere,
    ) as session:
        tenanted = Tenanted(name="a", tenant="eu")
        session.add(tenanted)
        session.commit()
        tenanted.name = "b"
        session.flush()
        session.delete(tenanted)
        session.flush()
        session.add(Tenanted(name="c", tenant="us"))
        session.rollback()
    assert rows(shards["eu"], Tenanted.name) == ["a"]
    assert rows(shards["us"], Tenanted.name) == []
    assert used == [
        (what, shards["eu"])
        for what in (
            "pre_save flush",
            "post_save flush",
            "post_save commit",
            "pre_save flush",
            "post_save flush",
            "pre_delete flush",
            "post_delete flush",
            "post_delete rollback",
        )
    ]


def note_using(sender: Any) -> list[tuple[str, Engine]]:
    """Connect receivers of every phase that write down ``using``."""
    used: list[tuple[str, Engine]] = []
    for signal in (pre_save, post_save, pre_delete, post_delete):
        for phase in ("flush", "commit", "rollback"):
            if phase == "flush" or signal in (post_save, post_delete):

                def fn(sender, using, signal, phase=phase, **kwargs):
                    used.append((f"{signal.name} {phase}", using))

                signal.connect(fn, sender=sender, weak=False, on=phase)
    return used


def test_using_is_the_bind_of_the_base_in_a_joined_inheritance(
    two: tuple[Engine, Engine], installed
):
    """That is where a flush writes all tables, whatever is bound to the subclass."""
    first, second = two
    used = note_using(Dog)
    with Session(binds={Animal: first, Dog: second}) as session:
        dog = Dog(name="a")
        session.add(dog)
        session.commit()
        session.add(Dog(name="undone"))
        session.flush()
        session.rollback()
    with first.connect() as connection:
        assert connection.scalars(select(Dog.__table__.c.id)).all() == [1]
    assert rows(first, Animal.name) == ["a"]
    assert rows(second, Animal.name) == []
    assert used == [
        (what, first)
        for what in (
            "pre_save flush",
            "post_save flush",
            "post_save commit",
            "pre_save flush",
            "post_save flush",
            "post_save rollback",
        )
    ]


def test_using_is_where_the_row_was_written_for_commit_and_rollback_receivers_as_well(
    two: tuple[Engine, Engine], installed
):
    """With the documented recipe for replicas, they were told the replica."""
    primary, replica = two

    class RoutingSession(Session):
        def get_bind(self, mapper=None, clause=None, **kwargs):
            return primary if self._flushing else replica

    used = note_using(Tenanted)
    with RoutingSession() as session:
        thing = Tenanted(name="a")
        session.add(thing)
        session.flush()
        session.delete(thing)
        session.add(Tenanted(name="b"))
        session.commit()
        session.add(Tenanted(name="c"))
        session.flush()
        session.rollback()
    assert {using for _, using in used} == {primary}
    assert [what for what, _ in used if what.endswith(("commit", "rollback"))] == [
        "post_save commit",
        "post_save rollback",
    ]
    assert rows(primary, Tenanted.name) == ["b"]
    assert rows(replica, Tenanted.name) == []


# -- copies of instances ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["transaction", "savepoint"])
@pytest.mark.parametrize("model", [Listened, Stamped])
def test_a_load_listener_that_raises_does_not_break_rollback(
    own: Session, library: Engine, caplog: pytest.LogCaptureFixture, model: Any, how: str
):
    """The failure is that of the receiver: logged and signalled; all others are called."""
    told: list[str] = []
    failed: list[tuple[Any, Any]] = []

    @receiver(receiver_failed)
    def on_failure(sender, receiver, **kwargs):
        failed.append((sender, receiver))

    @receiver(post_save, sender=model, on="rollback")
    def needs_instance(sender, **kwargs):
        told.append("there is no instance to give")

    @receiver(post_save, sender=Author, on="rollback")
    def works(sender, instance, **kwargs):
        told.append(instance.name)

    def work() -> None:
        own.add(model(name="m"))
        own.flush()
        own.add(Author(name="a"))
        own.flush()
        on_rollback(own, lambda: told.append("callback"))

    if how == "transaction":
        work()
        own.rollback()
    else:
        with pytest.raises(ZeroDivisionError), own.begin_nested():
            work()
            raise ZeroDivisionError
    assert told == ["a", "callback"]
    assert failed == [(model, needs_instance)]
    (error,) = errors(caplog)
    assert place(needs_instance) in error
    own.add(Author(name="b"))
    own.commit()
    assert rows(library, Author.name) == ["b"]
    assert rows(library, model.name) == []


def test_a_load_listener_that_raises_does_not_break_commit(
    own: Session, library: Engine, caplog: pytest.LogCaptureFixture
):
    """The failure is that of the receiver: logged and signalled; all others are called."""
    told: list[str] = []
    failed: list[tuple[Any, Any]] = []

    @receiver(receiver_failed)
    def on_failure(sender, receiver, **kwargs):
        failed.append((sender, receiver))

    @receiver(post_save, sender=Listened, on="commit")
    def needs_instance(sender, **kwargs):
        told.append("there is no instance to give")

    @receiver(post_save, sender=Author, on="commit")
    def works(sender, instance, **kwargs):
        told.append(instance.name)

    own.add(Listened(name="m"))
    own.flush()
    own.add(Author(name="a"))
    own.commit()
    assert told == ["a"]
    assert failed == [(Listened, needs_instance)]
    (error,) = errors(caplog)
    assert place(needs_instance) in error
    assert rows(library, Author.name) == ["a"]
    assert rows(library, Listened.name) == ["m"]


def test_a_reconstructor_may_read_an_expired_attribute_before_a_commit_receiver(
    own: Session, caplog: pytest.LogCaptureFixture
):
    """The instance is in the session of the receiver by then, so it is loaded."""
    read = []

    @receiver(post_save, sender=Stamped, on="commit")
    def fn(sender, instance, **kwargs):
        read.append(instance.summary)

    thing = Stamped(name="a")
    own.add(thing)
    own.commit()
    thing.name = "b"
    own.commit()
    assert read == ["a None", "b NOW"]
    assert errors(caplog) == []
    assert rows(own, Stamped.name, Stamped.stamp) == [("b", "NOW")]


def test_a_value_that_cannot_be_copied_does_not_break_commit(
    own: Session, shapes: Engine, caplog: pytest.LogCaptureFixture
):
    """The row stands already; a commit receiver that reads the value has it loaded."""
    read: list[Any] = []

    @receiver(post_save, sender=Purse, on="commit")
    def fn(sender, instance, **kwargs):
        read.append((instance.name, instance.handle.text, instance.handle))

    @receiver(post_save, sender=Purse, on="rollback")
    def undone(sender, instance, **kwargs):
        read.append(instance.name)

    handle = Handle("h")
    own.add(Purse(name="a", handle=handle))
    own.commit()
    ((name, text, loaded),) = read
    assert (name, text) == ("a", "h")
    assert loaded is handle
    own.add(Purse(name="b", handle=handle))
    own.flush()
    own.rollback()
    assert read[1:] == ["b"]
    assert errors(caplog) == []
    assert rows(shapes, Purse.name) == ["a"]


def test_a_value_object_is_not_shared_between_commit_receivers(shapes: Engine, installed):
    """Nor with the program: each has its own copy, of a dataclass as of a list."""
    read = []

    def fn(sender, instance, **kwargs):
        read.append(instance.money.cents)
        instance.money.cents = 99

    def another(sender, instance, **kwargs):
        fn(sender, instance)

    post_save.connect(fn, sender=Purse, on="commit")
    post_save.connect(another, sender=Purse, on="commit")
    with Session(shapes, expire_on_commit=False) as session:
        purse = Purse(money=Money(1))
        session.add(purse)
        session.commit()
        assert read == [1, 1]
        assert purse.money == Money(1)
    assert rows(shapes, Purse.money) == [Money(1)]


# -- sessions and threads --------------------------------------------------------------------------


def test_connecting_does_not_break_another_thread_that_runs_through_the_listeners(
    engine: Engine, installed
):
    """The first receiver of a model adds listeners to its mapper while they are being called."""

    class ThreadBase(DeclarativeBase): ...

    class Job(Named, ThreadBase):
        __tablename__ = "jobs"

    inside, go_on = threading.Event(), threading.Event()
    called: list[str] = []

    @event.listens_for(Job, "after_insert")
    def waits(mapper, connection, target) -> None:
        if target.name == "slow":
            inside.set()
            assert go_on.wait(60)

    @event.listens_for(Job, "after_insert")
    def last(mapper, connection, target) -> None:
        called.append(target.name)

    def save(where: Engine, name: str) -> None:
        with Session(where) as session:
            session.add(Job(name=name))
            session.commit()

    # The two must not wait for each other in the database.
    other = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    for one in (engine, other):
        ThreadBase.metadata.create_all(one)
    listen(sender="Unrelated")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(save, engine, "slow")
        try:
            assert inside.wait(60)
            log = listen(sender=Job)
            save(other, "quick")
        finally:
            go_on.set()
        slow.result(60)
    assert called == ["quick", "slow"]
    assert [line for line in log.lines if "quick" in line] == both("save created Job(quick)")
    assert rows(engine, Job.name) == ["slow"]
    assert rows(other, Job.name) == ["quick"]
    other.dispose()


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
@pytest.mark.parametrize("register", [on_commit, on_rollback])
def test_a_forgotten_session_is_garbage_whatever_its_callbacks_refer_to(
    library: Engine, installed, register, begun: bool
):
    """What is to be called at the end of its transaction is kept by that transaction alone."""

    def forget() -> weakref.ref[Session]:
        session = Session(library)
        if begun:
            session.add(Author(name="lost"))
            session.flush()
        register(session, lambda: session.commit())
        return weakref.ref(session)

    reference = forget()
    gc.collect()
    assert reference() is None
    assert rows(library, Author.name) == []


# -- what a flush writes ---------------------------------------------------------------------------


def test_who_references_a_column_that_is_no_key_is_announced_before_the_first_statement(
    own: Session, shapes: Engine, statements: list[str]
):
    """Also when the collection is not loaded; a veto comes in time, and costs nothing."""
    country = Country(code="x", name="x", cities=[City(name="a"), City(name="b")])
    own.add(country)
    own.commit()
    own.add(Country(code="earlier", name="earlier"))
    own.flush()
    country.code
    assert "cities" not in country.__dict__
    statements.clear()
    written: list[list[str]] = []

    @receiver(pre_save, sender=City)
    def veto(sender, **kwargs):
        written.append([one for one in statements if not one.startswith("SELECT")])
        raise ZeroDivisionError

    country.code = "y"
    with pytest.raises(ZeroDivisionError):
        own.flush()
    assert written == [[]]
    pre_save.disconnect(veto)
    # Nothing was begun, so nothing is undone: earlier work and the pending change are still there.
    assert own.is_active
    assert country.code == "y"
    assert rows(own, Country.code) == ["earlier", "x"]
    log = listen()
    own.commit()
    assert log.lines == both(
        "save updated Country(x)", "save updated City(a)", "save updated City(b)"
    )
    written_codes = [
        dict(sent.changes or {})
        for sent in log.sent
        if sent.sender is City and sent.signal == "post_save"
    ]
    assert written_codes == [{"country_code": ("x", "y")}] * 2
    assert rows(shapes, City.name, City.country_code) == [("a", "y"), ("b", "y")]
    assert rows(shapes, Country.code) == ["earlier", "y"]


def count_cascades(own: Session, monkeypatch: pytest.MonkeyPatch, length: int, how: str) -> int:
    """How many instances cascades reach while a chain of that length is being deleted."""
    reached = 0
    original = Mapper.cascade_iterator

    def counting(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal reached
        for found in original(self, *args, **kwargs):
            reached += 1
            yield found

    own.execute(
        insert(Node),
        [{"id": number, "parent_id": number - 1 or None} for number in range(1, length + 1)],
        execution_options={"signals": "skip"},
    )
    top = own.get(Node, 1)
    if how == "deleted":
        own.delete(top)
    else:
        top.children.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Mapper, "cascade_iterator", counting)
        own.flush()
    own.execute(delete(Node), execution_options={"signals": "skip"})
    own.commit()
    return reached


@pytest.mark.parametrize("how", ["deleted", "orphaned"])
def test_the_cost_of_deleting_a_deep_tree_grows_with_its_size_only(
    own: Session, log: Log, monkeypatch: pytest.MonkeyPatch, how: str
):
    """Where a cascade comes from is not asked again for each that it reaches."""
    short = count_cascades(own, monkeypatch, 50, how)
    log.clear()
    long = count_cascades(own, monkeypatch, 100, how)
    head = 1 if how == "deleted" else 2
    for signal in ("pre_delete", "post_delete"):
        sent = {one.instance.id: one["origin"] for one in log.sent if one.signal == signal}
        assert sorted(sent) == list(range(head, 101))
        assert sent.pop(head) is None
        assert {origin.id for origin in sent.values()} == {head}
    assert 0 < short < long
    assert long / short < 2.5
    assert rows(own, Node.id) == []


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda one: one.name)
@pytest.mark.parametrize("bulk", ["bulk_insert_mappings", "bulk_save_objects"])
def test_a_query_after_a_bulk_method_in_receivers_does_not_flush(
    session: Session, library: Engine, signal: Signal, bulk: str
):
    """The bulk methods let the session forget that it is flushing."""
    found = []

    @receiver(signal, sender=Author)
    def writes(sender, session, **kwargs):
        if bulk == "bulk_insert_mappings":
            session.bulk_insert_mappings(Tag, [{"name": "t"}])
        else:
            session.bulk_save_objects([Tag(name="t")])

    @receiver(signal, sender=Author)
    def reads(sender, session, **kwargs):
        found.append(session.scalars(select(Tag.name)).all())

    log = listen(sender=[Author, Book])
    session.add_all([Author(name="a"), Author(name="b"), Book(name="c")])
    session.commit()
    assert found == [["t"], ["t", "t"]]
    assert sorted(log.lines) == sorted(
        both("save created Author(a)", "save created Author(b)", "save created Book(c)")
    )
    assert rows(library, Author.name) == ["a", "b"]
    assert rows(library, Tag.name) == ["t", "t"]


def test_an_expired_column_property_is_not_loaded_for_a_deletion(
    own: Session, shapes: Engine, log: Log, statements: list[str]
):
    """It is no column of the row; the session expires it with each flush."""
    shelf = Shelf(name="a")
    own.add(shelf)
    own.flush()
    assert "size" not in shelf.__dict__
    statements.clear()
    own.delete(shelf)
    own.flush()
    assert [one.split()[0] for one in statements] == ["DELETE"]
    own.commit()
    assert log.lines[2:] == ["pre_delete Shelf(a)", "post_delete Shelf(a)"]
    assert rows(shapes, Shelf.__table__.c.id) == []


# -- fields= ---------------------------------------------------------------------------------------


def test_fields_are_those_of_the_class_not_of_one_that_was_there_before(engine: Engine, installed):
    """A class that is mapped anew may get the address of one that was garbage collected."""
    log = listen(sender="Anew", fields={"watched"})
    for number in range(ROUNDS):
        base = declarative_base()
        column = mapped_column("watched", String)
        if number % 2:
            attributes = {"watched": column}
        else:
            attributes = {"hidden": column, "watched": synonym("hidden")}
        key = mapped_column(Integer, primary_key=True)
        model: Any = type("Anew", (base,), {"__tablename__": "anew", "id": key, **attributes})
        base.metadata.create_all(engine)
        log.clear()
        with Session(engine) as session:
            one = model(watched="a")
            session.add(one)
            session.commit()
            one.watched = "b"
            session.commit()
        kinds = [sent["created"] for sent in log.sent if sent.signal == "post_save"]
        assert kinds == [True, False], f"round {number}"
        assert len(rows(engine, model.id)) == number + 1
        gone = weakref.ref(model)
        log.clear()
        engine.clear_compiled_cache()
        base.registry.dispose()
        del base, column, attributes, key, model, session, one
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("field", ["animal", "animal_id", Visit.animal, Visit.animal_id], ids=str)
def test_fields_may_name_a_many_to_one_relationship_without_a_foreign_key_constraint(
    own: Session, shapes: Engine, field: Any
):
    """Its column is the one that the relationship calls foreign."""
    configure_mappers()
    visit, animal = Visit(name="a"), Animal(name="b")
    own.add_all([visit, animal])
    own.commit()
    log = listen(sender=Visit, fields={field})
    visit.name = "c"
    own.flush()
    assert log.lines == []
    visit.animal = animal
    own.flush()
    assert log.lines == both("save updated Visit(c)")
    assert dict(log.one("post_save").changes or {}) == {"animal_id": (None, animal.id)}
    visit.animal_id = None
    own.commit()
    assert log.post == ["post_save updated Visit(c)"] * 2
    assert rows(shapes, Visit.name, Visit.animal_id) == [("c", None)]


def test_origin_is_known_where_its_own_class_has_no_receivers(session: Session):
    """It was ``None`` in ``post_delete``, and right in ``pre_delete``."""
    origins = []
    for signal in (pre_delete, post_delete):
        signal.connect(lambda sender, origin, **kwargs: origins.append(origin), Page, weak=False)
    book = Book(name="a", pages=[Page(), Page()])
    session.add(book)
    session.commit()
    session.delete(book)
    session.commit()
    assert origins == [book, book, book, book]
    assert rows(session, Page.id) == []


def test_a_flush_that_sqlalchemy_cannot_do_ends_as_without_signals(engine: Engine):
    """It failed before it had begun, and the rollback that belongs to it came from the caller."""

    class Local(DeclarativeBase):
        pass

    class Folder(Local):
        __tablename__ = "folders"
        id: Mapped[int] = mapped_column(primary_key=True)
        files: Mapped[list[File]] = relationship(cascade="all", back_populates="folder")

    class File(Local):
        __tablename__ = "files"
        id: Mapped[int] = mapped_column(primary_key=True)
        folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id"))
        folder: Mapped[Folder | None] = relationship(back_populates="files")

    def delete_twice() -> list[tuple[str, str]]:
        errors = []
        with Session(engine) as session:
            folder = Folder(files=[File()])
            session.add(folder)
            session.flush()
            session.delete(folder.files[0])
            session.flush()
            session.delete(folder)  # its cascade marks the file again, which has no row
            for step in (lambda: session.refresh(folder), session.rollback):
                try:
                    step()
                except Exception as error:
                    errors.append((type(error).__name__, type(error.__context__).__name__))
            assert list(session.scalars(select(Folder.id))) == []
        return errors

    Local.metadata.create_all(engine)
    try:
        without = delete_twice()
        installation = install()
        try:
            pre_save.connect(lambda sender, **kwargs: None, weak=False)
            assert delete_twice() == without
            assert without == [("InvalidRequestError", "ObjectDeletedError")]
        finally:
            installation.remove()
    finally:
        Local.metadata.drop_all(engine)


def test_a_relationship_added_after_the_first_flush_is_foreseen(engine: Engine, installed):
    """The class was remembered as one whose rows are written for their own sake alone."""

    class Late(DeclarativeBase):
        pass

    class Parent(Named, Late):
        __tablename__ = "late_parent"

    class Child(Named, Late):
        __tablename__ = "late_child"
        parent_id: Mapped[int | None] = mapped_column(ForeignKey("late_parent.id"))

    Late.metadata.create_all(engine)
    log = listen()
    order: list[str] = []
    with Session(engine) as session:
        child = Child(name="a")
        session.add_all([child, Parent(name="b")])
        session.commit()
        Parent.children = relationship(Child)
        session.refresh(child)
        log.clear()

        @event.listens_for(engine, "before_cursor_execute")
        def _on_execute(connection, cursor, statement, *rest) -> None:
            order.append(f"{statement.split()[0]} after {len(log.sent)}")

        session.add(Parent(name="c", children=[child]))
        session.flush()
        assert order == ["INSERT after 2", "UPDATE after 2"]
        assert log.pre == ["pre_save created Parent(c)", "pre_save updated Child(a)"]
        assert sorted(log.post) == ["post_save created Parent(c)", "post_save updated Child(a)"]
        session.commit()
        assert rows(engine, Child.parent_id) == [2]


def test_a_column_added_after_the_first_flush_is_a_column(engine: Engine, installed):
    """What was written to it was no change, so nothing was sent."""

    class Late(DeclarativeBase):
        pass

    class Thing(Named, Late):
        __tablename__ = "late_thing"

    log = listen()
    thing = Thing(name="a")
    Late.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(thing)
        session.commit()
        Thing.color = mapped_column(String)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE late_thing ADD COLUMN color VARCHAR(9)")
    with Session(engine) as session:
        thing = session.get(Thing, 1)
        thing.color = "red"
        log.clear()
        session.commit()
        assert log.lines == both("save updated Thing(a)")
        assert log.one("post_save").changes == {"color": Change(None, "red")}
        assert rows(engine, Thing.color) == ["red"]


def test_the_old_value_is_known_where_a_later_hook_assigns_an_sql_expression(
    shapes: Engine, installed
):
    """Of a class without relationships, our hook did not move behind the other one any more."""
    log = listen()
    with Session(shapes) as session:
        one = Tenanted(name="a", tenant="old")
        session.add(one)
        session.commit()
        one.name = "b"
        session.commit()

        def count(mapper, connection, target):
            target.tenant = func.upper(target.name)

        event.listen(Tenanted, "before_update", count)
        try:
            session.refresh(one)
            log.clear()
            one.name = "c"
            session.flush()
        finally:
            event.remove(Tenanted, "before_update", count)
        assert log.one("post_save").changes == {
            "name": Change("b", "c"),
            "tenant": Change("old", UNSET),
        }
        session.commit()
        assert rows(shapes, Tenanted.tenant) == ["C"]

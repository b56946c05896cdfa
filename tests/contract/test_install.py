"""Which sessions are listened to, and for how long."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import InstallError, SignalsError, post_save, pre_save, receiver

from .models import Author
from .observing import Log, asynchronous, both, listen, rows

MAPPER_EVENTS = (
    "before_insert",
    "before_update",
    "before_delete",
    "after_insert",
    "after_update",
    "after_delete",
    "mapper_configured",
)
SESSION_EVENTS = (
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "after_begin",
    "before_commit",
    "after_commit",
    "after_transaction_end",
    "do_orm_execute",
)
CREATED = both("save created Author(a)")


@pytest.fixture
def install() -> Iterator[Callable[..., sqla_signals.Installation]]:
    """`sqla_signals.install`, undone when the test is over."""
    installations = []

    def install(*args: Any) -> sqla_signals.Installation:
        installations.append(sqla_signals.install(*args))
        return installations[-1]

    yield install
    for installation in installations:
        installation.remove()


@pytest.fixture
def log() -> Log:
    """Everything that is sent, without an installation."""
    return listen(sender=Author)


def add_author(session: Session, name: str = "a") -> None:
    """Commit an author."""
    with session:
        session.add(Author(name=name))
        session.commit()


def run_python(code: str, *arguments: str) -> None:
    """Run a program in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_registers_nothing():
    """No SQLAlchemy event has a listener that it did not have before the import."""
    run_python(
        "import sqlalchemy.orm\n"
        "from sqlalchemy.event import registry\n"
        "before = set(registry._key_to_collection)\n"
        "import sqla_signals\n"
        "assert set(registry._key_to_collection) == before\n"
    )


def test_the_core_needs_neither_greenlet_nor_an_extra():
    """With SQLAlchemy and blinker alone, a plain session sends signals."""
    run_python(
        "import sys\n"
        "extras = ['greenlet', 'alembic', 'celery', 'opentelemetry', 'flask_sqlalchemy']\n"
        "sys.modules.update(dict.fromkeys(extras))\n"
        "import sqla_signals\n"
        "from sqlalchemy import create_engine\n"
        "from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column\n"
        "class Base(DeclarativeBase): pass\n"
        "class A(Base):\n"
        "    __tablename__ = 'a'\n"
        "    id: Mapped[int] = mapped_column(primary_key=True)\n"
        "sqla_signals.install()\n"
        "seen = []\n"
        "@sqla_signals.receiver(sqla_signals.post_save, sender=A)\n"
        "def saved(sender, instance, **kwargs): seen.append(instance)\n"
        "engine = create_engine('sqlite://')\n"
        "Base.metadata.create_all(engine)\n"
        "with Session(engine) as session:\n"
        "    session.add(A())\n"
        "    session.flush()\n"
        "assert len(seen) == 1\n"
    )


def test_without_an_install_nothing_is_sent(library: Engine, log: Log):
    """Connecting receivers is not enough; the session works as if we were not there."""
    with pytest.warns(sqla_signals.SignalsNotInstalledWarning):
        add_author(Session(library))
    assert log.lines == []
    assert rows(library, Author.name) == ["a"]


def test_install_is_for_every_session_in_the_process(library: Engine, install, log: Log):
    """Plain sessions, those of a sessionmaker and of a subclass."""

    class OwnSession(Session):
        pass

    install()
    for make in (Session, sessionmaker(), OwnSession, scoped_session(sessionmaker())):
        log.clear()
        add_author(make(bind=library))
        assert log.lines == CREATED
    assert rows(library, Author.name) == ["a"] * 4


def test_install_is_for_sessions_that_exist_already(library: Engine, install, log: Log):
    """A session, a sessionmaker and an open transaction from before the install."""
    session = Session(library)
    session.add(Author(name="a"))
    install()
    session.commit()
    assert log.lines == CREATED


@asynchronous
async def test_install_is_for_every_async_session(
    async_library: AsyncEngine, library, install, log
):
    """An ``AsyncSession`` works with a ``Session`` inside, whose signals are sent."""
    install()
    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        await session.commit()
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a"]


class OwnSession(Session):
    """A user's session class."""


@pytest.mark.parametrize(
    ("make_target", "make_session"),
    [
        pytest.param(lambda: sessionmaker(), lambda maker: maker, id="sessionmaker"),
        pytest.param(
            lambda: sessionmaker(class_=OwnSession),
            lambda maker: maker,
            id="sessionmaker of a class",
        ),
        pytest.param(lambda: scoped_session(sessionmaker()), lambda s: s, id="scoped_session"),
        pytest.param(lambda: OwnSession, lambda cls: cls, id="Session subclass"),
        pytest.param(
            lambda: OwnSession,
            lambda cls: sessionmaker(class_=cls),
            id="sessionmaker of the subclass",
        ),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_install_on_what_makes_sessions_is_for_its_sessions_alone(
    make_target, make_session, when: str, library: Engine, install, log: Log
):
    """The target's sessions send, made before the install or after; other sessions do not."""
    target = make_target()
    early = make_session(target)(bind=library) if when == "before" else None
    install(target)
    add_author(Session(library), "other")
    add_author(sessionmaker(library)(), "other")
    assert log.lines == []
    add_author(early or make_session(target)(bind=library))
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a", "other", "other"]


def test_install_on_a_session_is_for_that_session_alone(library: Engine, install, log: Log):
    """A ``Session`` instance is a target too."""
    with Session(library) as session, Session(library) as other:
        install(session)
        other.add(Author(name="other"))
        other.commit()
        assert log.lines == []
        session.add(Author(name="a"))
        session.commit()
    assert log.lines == CREATED


class OwnAsyncSession(AsyncSession):
    """A user's async session class, without a sync class of its own."""


class SyncPart(Session):
    """The sync class of the next one."""


class OwnAsyncSessionWithSyncPart(AsyncSession):
    """A user's async session class that names its sync class, as events on it need."""

    sync_session_class = SyncPart


@pytest.mark.parametrize(
    ("make_target", "make_session"),
    [
        pytest.param(lambda: async_sessionmaker(), lambda maker: maker, id="async_sessionmaker"),
        pytest.param(
            lambda: async_sessionmaker(class_=OwnAsyncSession),
            lambda maker: maker,
            id="async_sessionmaker of a class",
        ),
        pytest.param(
            lambda: async_sessionmaker(sync_session_class=SyncPart),
            lambda maker: maker,
            id="async_sessionmaker with a sync class",
        ),
        pytest.param(
            lambda: async_scoped_session(async_sessionmaker(), scopefunc=lambda: 1),
            lambda scoped: scoped,
            id="async_scoped_session",
        ),
        pytest.param(lambda: OwnAsyncSession, lambda cls: cls, id="AsyncSession subclass"),
        pytest.param(
            lambda: OwnAsyncSessionWithSyncPart, lambda cls: cls, id="subclass with a sync class"
        ),
    ],
)
@asynchronous
async def test_install_on_what_makes_async_sessions_is_for_its_sessions_alone(
    make_target, make_session, async_library: AsyncEngine, library, install, log: Log
):
    """Neither plain sessions nor other async ones are listened to."""
    target = make_target()
    install(target)
    add_author(Session(library), "other")
    for other in (AsyncSession(async_library), async_sessionmaker(async_library)()):
        async with other:
            other.add(Author(name="other"))
            await other.commit()
    assert log.lines == []
    session = make_session(target)(bind=async_library)
    session.add(Author(name="a"))
    await session.commit()
    await session.close()
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a", "other", "other", "other"]


@pytest.mark.parametrize("cls", [OwnAsyncSession, OwnAsyncSessionWithSyncPart, AsyncSession])
@asynchronous
async def test_install_on_an_async_class_is_for_its_sessions_from_before_too(
    cls, async_library: AsyncEngine, library, install, log: Log
):
    """Those of an ``async_sessionmaker`` cannot be told by then: install first."""
    async with cls(async_library) as session:
        install(cls)
        session.add(Author(name="a"))
        await session.commit()
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_install_on_asyncsession_leaves_plain_sessions_alone(
    async_library: AsyncEngine, library, install, log: Log
):
    """``install(AsyncSession)`` is for every async session and for no other."""
    install(AsyncSession)
    add_author(Session(library), "other")
    assert log.lines == []
    async with AsyncSession(async_library) as session:
        session.add(Author(name="a"))
        await session.commit()
    assert log.lines == CREATED


@asynchronous
async def test_install_on_an_async_session_is_for_that_session_alone(
    async_library: AsyncEngine, install, log: Log
):
    """An ``AsyncSession`` instance is a target too."""
    async with AsyncSession(async_library) as session, AsyncSession(async_library) as other:
        install(session)
        other.add(Author(name="other"))
        await other.commit()
        assert log.lines == []
        session.add(Author(name="a"))
        await session.commit()
    assert log.lines == CREATED


def test_install_on_a_flask_sqlalchemy_db_is_for_its_sessions(engine: Engine, install, log: Log):
    """Inside an application context, ``db.session`` sends; other sessions do not."""
    flask = pytest.importorskip("flask")
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    db = flask_sqlalchemy.SQLAlchemy(app)

    class Visit(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String)

    installation = install(db)
    visits = listen(sender=Visit)
    Visit.metadata.create_all(engine)
    with app.app_context():
        visit = Visit(name="a")
        db.session.add(visit)
        db.session.commit()
        assert visits.lines == both("save created Visit(a)")
        assert visits.sent[0]["session"] is db.session()
        assert visits.sent[0]["using"] is db.engine
        with Session(engine) as other:
            other.add(Visit(name="other"))
            other.commit()
        assert visits.lines == both("save created Visit(a)")
        assert rows(engine, Visit.__table__.c.name) == ["a", "other"]
        installation.remove()
        db.session.add(Visit(name="b"))
        db.session.commit()
        assert visits.lines == both("save created Visit(a)")
        db.engine.dispose()


@pytest.mark.parametrize("target", [object(), "Session", Author, scoped_session(lambda: Session())])
def test_install_on_what_makes_no_sessions_says_what_does(target: object):
    """The error names what was given and what could be given."""
    with pytest.raises(InstallError, match="sessionmaker") as caught:
        sqla_signals.install(target)
    assert repr(target) in str(caught.value)
    assert isinstance(caught.value, SignalsError)
    assert isinstance(caught.value, TypeError)


def test_after_remove_nothing_is_sent(library: Engine, install, log: Log):
    """Sessions that exist stop sending as well."""
    session = Session(library)
    installation = install()
    session.add(Author(name="a"))
    session.flush()
    installation.remove()
    session.add(Author(name="b"))
    session.commit()
    session.close()
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a", "b"]


def test_remove_may_be_called_twice(install, library: Engine, log: Log):
    """Also when the same was installed again in between."""
    first = install()
    first.remove()
    second = install()
    first.remove()
    add_author(Session(library))
    assert log.lines == CREATED
    second.remove()
    second.remove()


def listeners(*sessions: Session) -> dict[str, int]:
    """How many listeners these sessions, new ones and mappers have."""
    found = {name: len(list(getattr(Author.__mapper__.dispatch, name))) for name in MAPPER_EVENTS}
    for number, session in enumerate((Session(), OwnSession(), sessionmaker()(), *sessions)):
        for name in SESSION_EVENTS:
            found[f"{number}.{name}"] = len(list(getattr(session.dispatch, name)))
    return found


@pytest.fixture
def known(library: Engine) -> Iterator[list[Session]]:
    """Sessions from before; two have listeners of their own."""
    sessions = [Session(library) for _ in range(3)]

    def listener(*_: Any) -> None: ...

    for name in ("before_flush", "do_orm_execute"):
        event.listen(sessions[1], name, listener)
    event.listen(sessions[2], "after_commit", listener)
    event.remove(sessions[2], "after_commit", listener)
    yield sessions
    for session in sessions:
        session.close()


def test_remove_leaves_no_listener_behind(library: Engine, install, known: list[Session]):
    """Sessions and mappers have the listeners they had before the install."""
    before = listeners(*known)
    installations = [install(), install(sessionmaker()), install(OwnSession), install(known[1])]
    log = listen(sender=Author)
    add_author(Session(library))
    assert log.lines == CREATED
    assert listeners(*known) != before
    for installation in installations:
        installation.remove()
    assert listeners(*known) == before


def veto(signal: Any) -> None:
    """Connect a receiver that raises."""

    def fails(sender, **kwargs):
        raise ZeroDivisionError

    signal.connect(fails, sender=Author, weak=False)


def fail_in_a_listener(session: Session) -> None:
    """Let the flush fail after ours has looked at it."""

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    event.listen(session, "before_flush", fails)


WAYS_TO_FAIL = {
    "pre_save": lambda session: veto(pre_save),
    "post_save": lambda session: veto(post_save),
    "another listener": fail_in_a_listener,
    "the database": lambda session: session.add(Author(id=1, name="b")),
}


@pytest.mark.parametrize("target", ["every session", "one session"])
@pytest.mark.parametrize("way", WAYS_TO_FAIL)
@pytest.mark.parametrize("ended", [True, False])
def test_so_it_is_while_somebody_keeps_the_exception_of_a_failed_flush(
    install, known: list[Session], target: str, way: str, ended: bool
):
    """Whether or not the session was rolled back."""
    session = known[0]
    with session:
        session.add(Author(id=1, name="a"))
        session.commit()
    before = listeners(*known)
    installation = install(*([] if target == "every session" else [session]))
    listen(sender=Author)
    session.add(Author(id=2, name="a"))
    WAYS_TO_FAIL[way](session)
    with pytest.raises((ZeroDivisionError, IntegrityError)) as kept:
        session.flush()
    if ended:
        session.rollback()
    installation.remove()
    after = listeners(*known)
    if way == "another listener":
        after["3.before_flush"] -= 1
    assert after == before
    assert kept.value is not None
    session.rollback()
    assert rows(session, Author.name) == ["a"]


def test_remove_by_a_receiver_leaves_no_listener_behind(
    library: Engine, install, known: list[Session]
):
    """The flush that is under way ends as it began, and then they are gone."""
    before = listeners(*known)
    installations = [install(), install(known[0]), install(OwnSession)]
    log = listen(sender=Author)

    @receiver(pre_save, sender=Author)
    def stop(sender, **kwargs):
        for installation in installations:
            installation.remove()

    with known[0] as session:
        session.add(Author(name="a"))
        session.flush()
        assert listeners(*known) == before
        session.add(Author(name="b"))
        session.commit()
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a", "b"]


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=lambda signal: signal.name)
def test_so_it_is_if_the_receiver_raises(
    library: Engine, install, known: list[Session], signal: Any
):
    """While the exception is held."""
    before = listeners(*known)
    installation = install()

    @receiver(signal, sender=Author)
    def stop(sender, **kwargs):
        installation.remove()
        raise ZeroDivisionError

    with known[0] as session:
        session.add(Author(name="a"))
        with pytest.raises(ZeroDivisionError) as kept:
            session.flush()
        assert listeners(*known) == before
        assert kept.value is not None
        session.rollback()
        session.add(Author(name="b"))
        session.commit()
    assert rows(library, Author.name) == ["b"]


def test_remove_in_another_thread_lets_a_flush_that_is_under_way_end_as_it_began(
    library: Engine, install, known: list[Session]
):
    """Other flushes send nothing from then on."""
    before = listeners(*known)
    installation, log = install(), listen(sender=Author)
    is_flushing, is_removed = threading.Event(), threading.Event()

    @receiver(pre_save, sender=Author)
    def wait(sender, **kwargs):
        is_flushing.set()
        assert is_removed.wait(20)

    def flush() -> None:
        with known[0] as session:
            session.add(Author(name="a"))
            session.commit()

    thread = threading.Thread(target=flush)
    thread.start()
    assert is_flushing.wait(20)
    installation.remove()
    with Session(library) as session:
        session.add(Author(name="b"))
        session.flush()
    is_removed.set()
    thread.join()
    assert log.lines == CREATED
    assert listeners(*known) == before
    assert rows(library, Author.name) == ["a"]


FORGETTING = """
import sys
from sqlalchemy import Column, Integer, create_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.events import (
    InstanceEvents, InstrumentationEvents, MapperEvents, SessionEvents
)
import sqla_signals
from sqla_signals import class_prepared, post_save, pre_bulk, pre_save
from tests.contract.models import Author, Base
from tests.contract.observing import both, listen, rows
from tests.contract.test_install import listeners

def forget():
    "What the fixture RemoveORMEventsGlobally of SQLAlchemy's own tests does."
    for events in (MapperEvents, InstanceEvents, SessionEvents, InstrumentationEvents):
        events._clear()

def fails(sender, **kwargs):
    raise ZeroDivisionError

engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
maker = sessionmaker(engine)
session = maker() if sys.argv[1] == "a sessionmaker" else Session(engine)
target = {"every session": [], "one session": [session], "a sessionmaker": [maker]}[sys.argv[1]]
before = listeners(session)
first, second = sqla_signals.install(*target), sqla_signals.install(*target)
pre_bulk.connect(lambda *_, **__: None, weak=False)
if sys.argv[2] == "failed":
    post_save.connect(fails)
    session.add(Author(name="a"))
    try:
        session.flush()
    except ZeroDivisionError as error:
        kept = error
    post_save.disconnect(fails)
first.remove()
forget()
second.remove()
session.close()
assert listeners(session) == before

installations = []
for _ in range(2):
    installations.append(sqla_signals.install())
    log = listen(sender=Author)
    with Session(engine) as session:
        session.add(Author(name="a"))
        session.commit()
    assert log.lines == both("save created Author(a)"), log.lines
    for signal in (pre_save, post_save):
        signal.disconnect(log, sender=Author)
    forget()
installations.append(sqla_signals.install())
prepared = []
class_prepared.connect(lambda sender, **kwargs: prepared.append(sender.__name__), weak=False)

class Late(Base):
    __tablename__ = "late"
    id = Column(Integer, primary_key=True)

Base.registry.configure()
assert prepared == ["Late"], prepared
for installation in installations:
    installation.remove()
assert listeners(session) == before
assert rows(engine, Author.name) == ["a", "a"]
"""


@pytest.mark.parametrize("target", ["every session", "one session", "a sessionmaker"])
@pytest.mark.parametrize("flush", ["failed", "none"])
def test_neither_install_nor_remove_minds_that_sqlalchemy_has_forgotten_all_listeners(
    target: str, flush: str
):
    """In any order; what is installed after that works."""
    run_python(FORGETTING, target, flush)


@pytest.mark.parametrize("event_name", SESSION_EVENTS)
def test_install_and_remove_may_be_called_while_sqlalchemy_calls_its_listeners(
    library: Engine, install, event_name: str
):
    """By one of the application's own, between others."""
    installations = [install()]
    listen(sender=Author)
    called = []

    def meddle(*_: Any) -> None:
        if len(called) < 4:
            called.append(event_name)
            installations.append(install())
            installations.pop(0).remove()

    def is_called(*_: Any) -> None:
        called.append("behind")

    event.listen(Session, event_name, meddle)
    event.listen(Session, event_name, is_called)
    try:
        with Session(library) as session:
            session.add(Author(name="a"))
            session.commit()
            session.execute(select(Author.name))
    finally:
        event.remove(Session, event_name, meddle)
        event.remove(Session, event_name, is_called)
    assert called[:2] == [event_name, "behind"]
    assert rows(library, Author.name) == ["a"]


def test_remove_undoes_what_its_own_install_did_and_no_more(library: Engine, install, log: Log):
    """Another installation on the same sessions goes on."""
    first, second = install(), install()
    first.remove()
    add_author(Session(library))
    assert log.lines == CREATED
    second.remove()
    log.clear()
    add_author(Session(library))
    assert log.lines == []


def test_overlapping_installs_never_send_a_signal_twice(library: Engine, install, log: Log):
    """All sessions, then one sessionmaker, then one of its sessions; removed one by one."""
    maker = sessionmaker(library)
    session = maker()
    installations = [install(), install(maker), install(session)]
    for installation in installations:
        log.clear()
        session.add(Author(name="a"))
        session.commit()
        assert log.lines == CREATED
        installation.remove()
    log.clear()
    session.add(Author(name="a"))
    session.commit()
    session.close()
    assert log.lines == []
    assert rows(library, Author.name) == ["a"] * 4


def test_overlapping_installs_in_any_order(library: Engine, install, log: Log):
    """The narrow one first, the same one twice."""
    maker = sessionmaker(library)
    session = maker()
    for target in ([session], [maker], [maker], [], []):
        install(*target)
    session.add(Author(name="a"))
    session.commit()
    session.close()
    assert log.lines == CREATED


def test_a_receiver_connected_after_the_install_is_called(library: Engine, install):
    """Also after its model was flushed without one."""
    install()
    with Session(library) as session:
        session.add(Author(name="a"))
        session.commit()
        log = listen(sender=Author)
        session.add(Author(name="a"))
        session.commit()
    assert log.lines == CREATED


def test_a_receiver_disconnected_for_good_is_not_called(library: Engine, install, log: Log):
    """With no receiver left, flushes go on without us."""
    install()
    add_author(Session(library))
    for signal in (pre_save, post_save):
        signal.disconnect(log)
    add_author(Session(library))
    assert log.lines == CREATED
    assert rows(library, Author.name) == ["a", "a"]

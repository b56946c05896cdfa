"""Beside the user's own listeners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import JSON, Engine, FetchedValue, Integer, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import FlushError

from sqla_signals import UNSET, Change, post_save, pre_delete, pre_save

from .models import Author, Book, Note, Page, Tag
from .observing import Log, both, listen, rows


@pytest.fixture
def hook() -> Iterator[Any]:
    """Register mapper listeners that are removed at the end."""
    registered = []

    def register(target, name, fn, **options):
        event.listen(target, name, fn, **options)
        registered.append((target, name, fn))

    yield register
    for target, name, fn in registered:
        event.remove(target, name, fn)


@pytest.mark.parametrize("when", ["before ours", "after ours"])
def test_a_before_update_hook_that_turns_a_no_op_into_an_update_is_announced_and_sent(
    session: Session, hook, when: str
):
    """Whether the hook was registered before or after our own listeners."""

    def touch(mapper, connection, target):
        target.age = (target.age or 0) + 1

    if when == "before ours":
        hook(Author, "before_update", touch, insert=True)
    log = listen()
    author, book = Author(name="a", age=1), Book(name="b")
    session.add_all([author, book])
    session.flush()
    author.name = "b"
    session.flush()
    author.name = "a"
    session.commit()
    if when == "after ours":
        hook(Author, "before_update", touch)
    session.refresh(author), session.refresh(book)
    (age,) = rows(session, Author.age)
    log.clear()
    # Only the collection changes; the hook is called for that and assigns.
    author.books.append(book)
    session.flush()
    assert sorted(log.lines) == sorted(both("save updated Author(a)", "save updated Book(b)"))
    assert log.one("post_save", author).changes == {"age": Change(age, age + 1)}
    assert rows(session, Author.age) == [age + 1]


@pytest.mark.parametrize("when", ["before ours", "after ours"])
def test_a_before_update_hook_that_assigns_an_sql_expression_is_sent(
    session: Session, hook, when: str
):
    """Added to a change of the user's, or alone."""

    def count(mapper, connection, target):
        target.age = Author.age + 1

    if when == "before ours":
        hook(Author, "before_update", count, insert=True)
    log = listen()
    author, book = Author(name="a", age=1), Book(name="b")
    session.add_all([author, book])
    session.commit()
    if when == "after ours":
        hook(Author, "before_update", count)
    session.refresh(author), session.refresh(book)
    log.clear()
    author.name = "c"
    session.flush()
    sent = log.one("post_save")
    assert sent["update_fields"] == {"name", "age"}
    assert sent.changes["name"] == Change("a", "c")
    assert sent.changes["age"].new in (UNSET, 2)
    assert rows(session, Author.age) == [2]
    session.refresh(author)
    log.clear()
    author.books.append(book)
    session.flush()
    sent = log.one("post_save", author)
    assert sent["update_fields"] == {"age"}
    assert len([line for line in log.pre if "Author" in line]) == 1
    assert rows(session, Author.age) == [3]


def test_a_before_update_hook_that_takes_the_change_back_leaves_no_post_save(
    session: Session, log: Log, hook
):
    """It was announced; then there was no UPDATE."""
    author = Author(name="a")
    session.add(author)
    session.commit()
    session.refresh(author)
    hook(Author, "before_update", lambda mapper, connection, target: setattr(target, "name", "a"))
    log.clear()
    author.name = "b"
    session.flush()
    assert log.lines == ["pre_save updated Author(b)"]
    assert rows(session, Author.name) == ["a"]


@pytest.mark.parametrize("by_refresh", [False, True], ids=["assigned", "refreshed"])
@pytest.mark.parametrize("is_json", [False, True], ids=["plain", "JSON"])
def test_what_a_before_update_hook_behind_ours_takes_back_was_not_written(
    engine: Engine, installed, hook, is_json: bool, by_refresh: bool
):
    """Nobody listens to ``pre_save``, so the hook does come behind ours."""

    class FreshBase(DeclarativeBase):
        pass

    class Fresh(FreshBase):
        __tablename__ = "fresh"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        value: Mapped[Any] = mapped_column(JSON if is_json else Integer)

    told: list[tuple[dict[str, Change], frozenset[str]]] = []

    def saved(sender, created, changes, update_fields, **kwargs):
        if not created:
            told.append((dict(changes), update_fields))

    def take_back(mapper, connection, target):
        if by_refresh:
            session.refresh(target, ["value"])
        else:
            target.value = old

    old, new = ([1], [1, 2]) if is_json else (1, 2)
    FreshBase.metadata.create_all(engine)
    try:
        with Session(engine, expire_on_commit=False) as session:
            post_save.connect(saved, sender=Fresh)
            fresh = Fresh(name="a", value=old)
            session.add(fresh)
            session.commit()
            hook(Fresh, "before_update", take_back)
            fresh.value = new
            session.commit()
            assert told == []
            fresh.name, fresh.value = "b", new
            session.commit()
            assert told == [({"name": Change("a", "b")}, {"name"})]
            assert session.execute(select(Fresh.name, Fresh.value)).all() == [("b", old)]
    finally:
        FreshBase.metadata.drop_all(engine)


def test_a_key_that_a_before_update_hook_behind_ours_assigns_is_that_of_the_same_row(
    engine: Engine, installed, hook
):
    """The transaction's net effect on it is one."""

    class FreshBase(DeclarativeBase):
        pass

    class Fresh(FreshBase):
        __tablename__ = "fresh"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    told: list[tuple[int, bool]] = []

    def saved(sender, instance, created, **kwargs):
        told.append((instance.id, created))

    FreshBase.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            post_save.connect(saved, sender=Fresh, on="commit")
            fresh = Fresh(id=1, name="a")
            session.add(fresh)
            session.flush()
            hook(Fresh, "before_update", lambda mapper, _, target: setattr(target, "id", 2))
            fresh.name = "b"
            session.commit()
            assert told == [(2, True)]
            assert session.execute(select(Fresh.id, Fresh.name)).all() == [(2, "b")]
    finally:
        FreshBase.metadata.drop_all(engine)


def test_a_changed_key_is_that_of_the_same_row_where_sqlalchemy_reads_it_again(
    engine: Engine, installed
):
    """The instance has its new identity before SQLAlchemy tells of the UPDATE."""

    class EagerBase(DeclarativeBase):
        pass

    class Eager(EagerBase):
        __tablename__ = "eager"
        __table_args__ = {"implicit_returning": False}
        __mapper_args__ = {"eager_defaults": True}
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        seen: Mapped[str] = mapped_column(server_default="a", server_onupdate=FetchedValue())

    told: list[tuple[int, bool]] = []

    def saved(sender, instance, created, **kwargs):
        told.append((instance.id, created))

    EagerBase.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            post_save.connect(saved, sender=Eager, on="commit")
            eager = Eager(id=1, name="a")
            session.add(eager)
            session.flush()
            eager.id, eager.name = 2, "b"
            session.commit()
            assert told == [(2, True)]
            assert session.execute(select(Eager.id, Eager.name)).all() == [(2, "b")]
    finally:
        EagerBase.metadata.drop_all(engine)


def test_who_is_connected_by_a_pre_delete_receiver_hears_of_what_could_not_be_foreseen(
    session: Session, hook
):
    """Nobody listened to ``pre_save`` when the flush began."""
    told: list[str] = []

    def saving(sender, instance, **kwargs):
        told.append(f"{instance.name} {instance.age}")

    def connecting(sender, **kwargs):
        pre_save.connect(saving, sender=Author)

    def touch(mapper, connection, target):
        target.age = 5

    author, book, tag = Author(name="a"), Book(name="b"), Tag(name="t")
    session.add_all([author, book, tag])
    session.commit()
    session.refresh(author), session.refresh(book)
    pre_delete.connect(connecting, sender=Tag)
    hook(Author, "before_update", touch, insert=True)
    # Of the author only the collection changes; the hook is called for that and assigns.
    author.books.append(book)
    session.delete(tag)
    session.commit()
    assert told == ["a 5"]
    assert rows(session, Author.age) == [5]


def test_a_before_insert_hook_that_assigns_is_shown_in_post_save(session: Session, log: Log, hook):
    """The values are those of the row."""
    hook(Author, "before_insert", lambda mapper, connection, target: setattr(target, "age", 5))
    session.add(Author(name="a"))
    session.flush()
    assert "age" not in log.one("pre_save").changes
    assert log.one("post_save").changes["age"] == Change(UNSET, 5)
    assert rows(session, Author.age) == [5]


@pytest.mark.filterwarnings("ignore:Attribute history events accumulated")
@pytest.mark.parametrize("name", ["after_insert", "after_update"])
@pytest.mark.parametrize("when", ["before ours", "after ours"])
def test_what_an_after_hook_assigns_was_not_written(
    engine: Engine, installed, hook, name: str, when: str
):
    """SQLAlchemy drops such assignments; ``changes`` shows the row."""

    class FreshBase(DeclarativeBase):
        pass

    # A class of this test: nobody else has made the library listen to its mapper before.
    class Fresh(FreshBase):
        __tablename__ = "fresh"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]
        age: Mapped[int | None]

    def assign(mapper, connection, target):
        target.age = 99

    FreshBase.metadata.create_all(engine)
    with Session(engine) as session:
        if when == "after ours":
            listen(sender=Fresh)
            session.add(Fresh(name="listened to by now", age=1))
            session.flush()
        fresh = Fresh(name="a", age=1)
        if name == "after_update":
            session.add(fresh)
            session.flush()
            fresh.name = "b"
        hook(Fresh, name, assign)
        log = listen(sender=Fresh)
        session.add(fresh)
        session.flush()
        changes = log.one("post_save").changes
        assert changes.get("age", Change(UNSET, 1)).new == 1
        assert set(rows(session, Fresh.age)) == {1}


def test_a_hook_that_executes_sql_of_its_own_sends_nothing_for_it(session: Session, log: Log, hook):
    """Statements on the connection are not the unit of work's."""

    def audit(mapper, connection, target):
        connection.execute(Tag.__table__.insert().values(name="audit"))

    hook(Author, "after_insert", audit)
    session.add(Author(name="a"))
    session.flush()
    assert log.lines == both("save created Author(a)")
    assert rows(session, Tag.name) == ["audit"]


def test_after_flush_and_after_flush_postexec_of_the_user_work_as_before(
    session: Session, log: Log
):
    """What they add goes out with the next flush, with signals."""
    seen = []

    @event.listens_for(session, "after_flush")
    def after(session, context):
        seen.append(list(session.new))

    @event.listens_for(session, "after_flush_postexec", once=True)
    def postexec(session, context):
        session.add(Tag(name="t"))

    author = Author(name="a")
    session.add(author)
    session.commit()
    assert seen[0] == [author]
    assert log.lines == both("save created Author(a)") + both("save created Tag(t)")


def test_what_a_before_flush_listener_behind_ours_mends_is_announced_late_and_logged(
    session: Session, log: Log, caplog: pytest.LogCaptureFixture
):
    """Until then SQLAlchemy itself cannot find out what the flush is going to write."""
    page, note = Page(name="p"), Note(name="n")
    session.add_all([page, note])
    session.flush()
    log.clear()
    # The first one is of another class, which is an error in the flush.
    page.notes = [Tag(name="wrong"), note]

    def mend(session: Session, context: Any, instances: Any) -> None:
        page.notes.pop(0)

    event.listen(session, "before_flush", mend)
    session.flush()
    assert log.lines == ["pre_save created Tag(wrong)", *both("save updated Note(n)")]
    assert rows(session, Note.page_id) == [page.id]
    assert rows(session, Tag.id) == []
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "could not be foreseen" in record.getMessage()
    assert "KeyError" in record.getMessage()


def test_what_nobody_mends_is_sqlalchemys_own_error_and_not_logged(
    session: Session, log: Log, caplog: pytest.LogCaptureFixture
):
    """A child of another class: as without signals, the flush fails and is rolled back."""
    page = Page(name="p")
    session.add(page)
    page.notes = [Tag(name="wrong")]
    with pytest.raises(FlushError, match="Attempting to flush an item of type"):
        session.flush()
    session.rollback()
    assert log.post == []
    assert rows(session, Page.id) == []
    assert not caplog.records

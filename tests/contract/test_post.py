"""``post_save`` and ``post_delete``, at the end of a flush."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, create_engine, event, inspect, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session
from sqlalchemy.orm.exc import FlushError

from sqla_signals import (
    UNSET,
    Change,
    post_delete,
    post_save,
    pre_save,
    receiver,
)

from .models import Author, Base, Book, Note, Page, Tag
from .observing import Log, both, listen, rows

# -- when ----------------------------------------------------------------------------------------


def test_post_signals_are_sent_after_the_bookkeeping_and_before_flush_returns(session: Session):
    """New instances are persistent and clean, deleted ones are deleted, and keys are there."""
    seen = []

    @receiver(post_save, sender=Author)
    def saved(sender, instance, session, **kwargs):
        state = inspect(instance)
        seen.append((state.persistent, state.modified, instance.id is not None, state.key))
        assert instance not in session.new
        assert not session.dirty

    @receiver(post_delete, sender=Author)
    def deleted(sender, instance, session, **kwargs):
        state = inspect(instance)
        seen.append((state.deleted, instance in session.deleted, instance.name))

    author = Author(name="a")
    session.add(author)
    session.flush()
    assert seen == [(True, False, True, inspect(author).key)]
    session.delete(author)
    session.flush()
    assert seen[1:] == [(True, False, "a")]


def test_post_signals_are_sent_after_the_last_statement(session: Session, statements: list[str]):
    """Whatever comes later in the flush has been written as well."""
    seen = []

    @receiver(post_save)
    def fn(sender, **kwargs):
        seen.append(len(statements))

    session.add(Page(name="p", book=Book(name="b", author=Author(name="a"))))
    statements.clear()
    session.flush()
    assert len(statements) == 3
    assert seen == [3, 3, 3]


def test_queries_see_the_new_rows_as_the_same_objects(session: Session):
    """The identity map has them."""
    seen = []

    @receiver(post_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        seen.append(session.scalars(select(Author)).all() == [instance])
        seen.append(session.get(Author, instance.id) is instance)
        seen.append(session.scalars(select(Book)).one().author is instance)

    session.add(Book(name="b", author=Author(name="a")))
    session.flush()
    assert seen == [True, True, True]


def test_queries_do_not_see_deleted_rows(session: Session):
    """They are gone, for this transaction."""
    seen = []

    @receiver(post_delete, sender=Author)
    def fn(sender, instance, session, **kwargs):
        seen.append(session.scalars(select(Author)).all())
        assert object_session(instance) is session

    author = Author(name="a")
    session.add(author)
    session.flush()
    session.delete(author)
    session.flush()
    assert seen == [[]]


# -- what they carry -----------------------------------------------------------------------------


def test_post_save_of_a_new_row_carries_every_column_as_it_was_written(session: Session, log: Log):
    """Old values there are none; a column without a value was written as NULL."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    sent = log.one("post_save")
    assert sent["created"] is True
    assert sent["update_fields"] is None
    assert sent.changes == {
        "id": Change(UNSET, author.id),
        "name": Change(UNSET, "a"),
        "age": Change(UNSET, None),
    }


def test_post_save_of_an_update_carries_what_the_update_wrote(session: Session, log: Log):
    """The old values are those of the row."""
    author = Author(name="a", age=1)
    session.add(author)
    session.commit()
    author.name
    author.name = "b"
    author.name = "c"
    session.flush()
    sent = log.sent[-1]
    assert sent.line == "post_save updated Author(c)"
    assert sent["created"] is False
    assert sent["update_fields"] == frozenset({"name"})
    assert sent.changes == {"name": Change("a", "c")}
    assert sent["changes"]["name"].old == "a"
    assert sent["changes"]["name"].new == "c"


def test_changes_is_a_mapping_that_stays_as_it_was_sent(session: Session, log: Log):
    """Kept and read later, it is not touched by what has happened since."""
    author = Author(name="a", age=1)
    session.add(author)
    session.flush()
    author.name = "b"
    session.flush()
    sent = log.sent[-1]["changes"]
    author.name = "c"
    session.flush()
    session.rollback()
    assert dict(sent) == {"name": Change("a", "b")}
    assert ("name" in sent, "age" in sent, len(sent), sent.get("age")) == (True, False, 1, None)
    assert "'b'" in repr(sent)
    with pytest.raises(TypeError):
        sent["name"] = Change("a", "z")
    with pytest.raises(KeyError):
        sent["age"]


def test_changes_read_for_the_first_time_after_another_receiver_changed_the_instance(
    session: Session,
):
    """They tell what was written, not what is assigned by now."""
    seen = []

    @receiver(post_save, sender=Author)
    def meddles(sender, instance, **kwargs):
        instance.age += 1

    @receiver(post_save, sender=Author)
    def reads(sender, changes, **kwargs):
        seen.append(dict(changes))

    session.add(Author(name="a", age=1))
    session.flush()
    session.flush()
    session.rollback()
    assert seen[0]["age"] == Change(UNSET, 1)
    assert seen[1] == {"age": Change(1, 2)}


# -- what a receiver may do ----------------------------------------------------------------------


def test_changes_made_by_a_receiver_go_out_with_the_next_flush(session: Session, log: Log):
    """They are kept, and not written by the flush that is ending."""

    @receiver(post_save, sender=Author)
    def fn(sender, instance, created, **kwargs):
        if created:
            instance.age = 2

    author = Author(name="a", age=1)
    session.add(author)
    session.flush()
    assert author in session.dirty
    assert rows(session, Author.age) == [1]
    log.clear()
    session.flush()
    assert log.lines == both("save updated Author(a)")
    assert log.one("post_save").changes == {"age": Change(1, 2)}
    assert rows(session, Author.age) == [2]


def test_additions_and_deletions_made_by_a_receiver_go_out_with_the_next_flush(
    session: Session, log: Log
):
    """Also through a collection of the instance."""
    tag = Tag(name="t")
    session.add(tag)
    session.flush()

    @receiver(post_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        instance.books.append(Book(name="b"))
        session.delete(tag)

    author = Author(name="a")
    session.add(author)
    log.clear()
    session.flush()
    assert log.lines == both("save created Author(a)")
    assert rows(session, Book.name) == []
    assert rows(session, Tag.name) == ["t"]
    session.flush()
    assert log.lines[2:] == [
        "pre_save created Book(b)",
        "pre_delete Tag(t)",
        "post_save created Book(b)",
        "post_delete Tag(t)",
    ]
    assert rows(session, Book.author_id) == [author.id]
    assert rows(session, Tag.name) == []


def test_commit_flushes_until_clean(session: Session, library: Engine, log: Log):
    """A chain of three flushes, each caused by the ``post_save`` of the one before."""

    @receiver(post_save, sender=Author)
    def book(sender, instance, session, **kwargs):
        session.add(Book(name="b", author=instance))

    @receiver(post_save, sender=Book)
    def page(sender, instance, session, **kwargs):
        session.add(Page(name="p", book=instance))

    session.add(Author(name="a"))
    session.commit()
    assert log.lines == [
        *both("save created Author(a)"),
        *both("save created Book(b)"),
        *both("save created Page(p)"),
    ]
    assert rows(library, Page.name) == ["p"]


def test_what_a_post_receiver_leaves_behind_is_flushed_by_the_next_query(session: Session):
    """By autoflush, as anything else that is pending."""

    @receiver(post_save, sender=Author)
    def fn(sender, session, **kwargs):
        session.add(Tag(name="t"))

    session.add(Author(name="a"))
    session.flush()
    assert [tag.name for tag in session.scalars(select(Tag))] == ["t"]


def test_post_receivers_that_never_let_the_session_become_clean_are_an_error(session: Session):
    """SQLAlchemy's own: ``commit()`` gives up after a hundred flushes."""

    @receiver(post_save, sender=Author)
    def adds_another(sender, session, **kwargs):
        session.add(Author(name="a"))

    session.add(Author(name="a"))
    with pytest.raises(FlushError, match="Over 100 subsequent flushes"):
        session.commit()
    session.rollback()
    assert rows(session, Author.id) == []


def test_a_post_receiver_may_expunge_the_instance(session: Session, log: Log):
    """The others still get their signal."""

    @receiver(post_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        session.expunge(instance)

    late = listen(sender=Author)
    session.add_all([Author(name="a"), Author(name="b")])
    session.flush()
    assert late.post == ["post_save created Author(a)", "post_save created Author(b)"]
    assert rows(session, Author.name) == ["a", "b"]


# -- raising -------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", ["flush", "commit"])
def test_raising_rolls_the_transaction_back(session: Session, library: Engine, finish: str):
    """The exception is unchanged; nothing of the transaction stays, and the session is usable."""
    error = ZeroDivisionError("full")

    @receiver(post_save, sender=Author)
    def fn(sender, **kwargs):
        raise error

    session.add(Book(name="earlier in the transaction"))
    session.flush()
    author = Author(name="a")
    session.add(author)
    with pytest.raises(ZeroDivisionError) as caught:
        getattr(session, finish)()
    assert caught.value is error
    session.rollback()
    assert inspect(author).transient
    assert rows(library, Author.name) == rows(library, Book.name) == []
    post_save.disconnect(fn)
    session.add(author)
    session.commit()
    assert rows(library, Author.name) == ["a"]


def test_raising_in_a_savepoint_rolls_that_savepoint_back(session: Session, library: Engine):
    """As an error of the database does; the outer transaction goes on."""

    @receiver(post_save, sender=Author)
    def fn(sender, **kwargs):
        raise ZeroDivisionError

    session.add(Book(name="outer"))
    with pytest.raises(ZeroDivisionError), session.begin_nested():
        session.add(Author(name="a"))
        session.flush()
    session.commit()
    assert rows(library, Book.name) == ["outer"]
    assert rows(library, Author.name) == []


def test_raising_in_post_delete_keeps_the_row(session: Session, library: Engine):
    """After the rollback it is there, and so is the instance."""
    author = Author(name="a")
    session.add(author)
    session.commit()

    @receiver(post_delete, sender=Author)
    def fn(sender, **kwargs):
        raise ZeroDivisionError

    session.delete(author)
    with pytest.raises(ZeroDivisionError):
        session.commit()
    session.rollback()
    assert author in session
    assert author.name == "a"
    assert rows(library, Author.name) == ["a"]


def test_no_post_signal_is_sent_for_a_flush_that_fails(session: Session, log: Log):
    """The second row violates a constraint; the first was written and undone."""
    session.add(Author(id=1, name="a"))
    session.flush()
    log.clear()
    session.add(Tag(id=1, name="t"))
    session.add(Author(id=2, name="b"))
    session.connection().execute(Author.__table__.insert().values(id=2, name="in between"))
    with pytest.raises(IntegrityError):
        session.flush()
    assert sorted(log.lines) == ["pre_save created Author(b)", "pre_save created Tag(t)"]
    session.rollback()
    assert rows(session, Author.id) == rows(session, Tag.id) == []


# -- order ---------------------------------------------------------------------------------------


class OrderBase(DeclarativeBase):
    """Models for comparing the order with SQLAlchemy's own events."""


class Person(OrderBase):
    """The base of a joined hierarchy."""

    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    manager_id: Mapped[int | None] = mapped_column(ForeignKey("people.id"))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Engineer(Person):
    """A subclass with a table of its own."""

    __tablename__ = "engineers"
    id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
    skill: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "engineer"}


class Clerk(Person):
    """A subclass without a table of its own."""

    __mapper_args__ = {"polymorphic_identity": "clerk"}


EVENTS = ("after_insert", "after_update", "after_delete")


@pytest.fixture
def after_events():
    """What hand-written mapper listeners see, as ``(event, instance)``."""
    seen: list[tuple[str, Any]] = []
    listeners = []
    for base in (Base, OrderBase):
        for name in EVENTS:

            def listener(mapper, connection, target, name=name):
                # after_update is also sent where no UPDATE was: for a changed collection, say.
                session = object_session(target)
                if name != "after_update" or session.is_modified(target, include_collections=False):
                    seen.append((name, target))

            event.listen(base, name, listener, propagate=True)
            listeners.append((base, name, listener))
    yield seen
    for base, name, listener in listeners:
        event.remove(base, name, listener)


def as_events(log: Log) -> list[tuple[str, Any]]:
    """The post signals under the names of SQLAlchemy's events."""
    found = []
    for sent in log.sent:
        if sent.signal == "post_delete":
            found.append(("after_delete", sent.instance))
        elif sent.signal == "post_save":
            found.append(("after_insert" if sent["created"] else "after_update", sent.instance))
    return found


def test_the_order_of_post_signals_is_that_of_sqlalchemys_after_events(
    session: Session, log: Log, after_events: list[tuple[str, Any]]
):
    """Inserts, updates and deletes of several mappers, in one flush."""
    authors = [Author(name=f"author {n}", books=[Book(name="b")]) for n in range(3)]
    doomed = [Book(name="d", pages=[Page(name="p", notes=[Note(name="n")])]) for n in range(2)]
    session.add_all([*authors, *doomed])
    session.flush()
    assert as_events(log) == after_events
    log.clear()
    after_events.clear()
    authors[2].name = "x"
    authors[0].name = "y"
    session.add_all([Author(name="new"), Tag(name="t")])
    authors[1].books.append(Book(name="new"))
    authors[0].books[0].pages.append(Page(name="new"))
    for book in doomed:
        session.delete(book)
    session.flush()
    assert as_events(log) == after_events
    assert len(after_events) == 2 + 4 + 1 + 6 - 1
    assert len(rows(session, Author.id)) == 4
    assert len(rows(session, Book.id)) == 4


def test_the_order_within_an_inheritance_hierarchy_is_that_of_the_after_events(
    session: Session, log: Log, after_events: list[tuple[str, Any]], engine: Engine
):
    """Joined and single-table subclasses, mixed."""
    OrderBase.metadata.create_all(engine)
    people = [cls(name=f"{n}") for n in range(3) for cls in (Engineer, Person, Clerk)]
    session.add_all(people)
    session.flush()
    assert as_events(log) == after_events
    assert len(after_events) == 9
    log.clear()
    after_events.clear()
    for person in reversed(people[:5]):
        person.name += "!"
    for person in people[6:]:
        session.delete(person)
    session.add_all([Clerk(name="c"), Engineer(name="e"), Person(name="p")])
    session.flush()
    assert as_events(log) == after_events
    assert len(after_events) == 5 + 3 + 3


def test_the_pre_and_post_signals_of_one_flush_do_not_mix(session: Session, log: Log):
    """All of the one kind before all of the other."""
    session.add_all([Author(name="a"), Author(name="b"), Tag(name="t")])
    session.flush()
    assert [line.split("_")[0] for line in log.lines] == ["pre"] * 3 + ["post"] * 3


# -- the other arguments -------------------------------------------------------------------------


def test_every_signal_carries_exactly_the_documented_arguments(session: Session, log: Log):
    """No more, so that nobody comes to rely on it; no less."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    session.delete(author)
    session.flush()
    save = {
        "instance", "created", "changes", "update_fields", "raw", "using", "session", "signal",
    }  # fmt: skip
    delete = {"instance", "origin", "using", "session", "signal"}
    assert [set(sent.arguments) for sent in log.sent] == [save, save, delete, delete]
    assert [sent["signal"].name for sent in log.sent] == [sent.signal for sent in log.sent]
    for sent in log.sent:
        assert sent.sender is Author
        assert sent["instance"] is author
        assert sent["session"] is session
    assert rows(session, Author.id) == []


def test_using_is_the_engine_of_the_session(session: Session, library: Engine, log: Log):
    """The one that the row goes to."""
    session.add(Author(name="a"))
    session.flush()
    assert [sent["using"] for sent in log.sent] == [library, library]


def test_using_is_the_connection_that_the_session_is_bound_to(library: Engine, log: Log):
    """As in test suites that roll back an outer transaction."""
    with library.connect() as connection, Session(connection) as session:
        author = Author(name="a")
        session.add(author)
        session.flush()
        session.delete(author)
        session.flush()
    assert {sent["using"] for sent in log.sent} == {connection}
    assert len(log.sent) == 4


def test_using_is_the_bind_of_the_model(library: Engine, log: Log, tmp_path: Path):
    """Two databases in one session: each row names its own."""
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(other)
    with Session(binds={Author: library, Tag: other}) as session:
        session.add_all([Author(name="a"), Tag(name="t")])
        session.commit()
    assert {(sent.sender, sent["using"]) for sent in log.sent} == {(Author, library), (Tag, other)}
    assert rows(library, Author.name) == ["a"]
    assert rows(other, Tag.name) == ["t"]
    other.dispose()


def test_using_follows_a_get_bind_of_ones_own(library: Engine, log: Log):
    """A session class that routes writes."""

    class Routed(Session):
        def get_bind(self, mapper=None, **kwargs):
            return library

    with Routed() as session:
        session.add(Author(name="a"))
        session.commit()
    assert [sent["using"] for sent in log.sent] == [library, library]


def test_receivers_of_two_sessions_are_told_apart(library: Engine, log: Log):
    """Interleaved flushes of two sessions in one thread."""
    with Session(library) as one, Session(library) as two:
        one.add(Author(name="one"))
        two.add(Author(name="two"))
        one.commit()
        two.commit()
        assert [(sent["session"], sent.name) for sent in log.sent] == [
            (one, "one"),
            (one, "one"),
            (two, "two"),
            (two, "two"),
        ]
    assert rows(library, Author.name) == ["one", "two"]


def test_a_pre_receiver_may_use_another_session_to_the_full(library: Engine, installed):
    """Flush, commit and close it; its signals are its own, and the outer flush goes on."""
    log = Log()

    @receiver(pre_save, sender=Author)
    def audit(sender, instance, session, **kwargs):
        with Session(library) as own:
            own.add(Tag(name=f"audit of {instance.name}"))
            own.commit()

    listen(log)
    with Session(library) as session:
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
    assert log.lines == [
        *both("save created Tag(audit of a)"),
        "pre_save created Author(a)",
        *both("save created Tag(audit of b)"),
        "pre_save created Author(b)",
        "post_save created Author(a)",
        "post_save created Author(b)",
    ]
    assert rows(library, Tag.name) == ["audit of a", "audit of b"]
    assert rows(library, Author.name) == ["a", "b"]


@pytest.mark.parametrize("savepoint", [False, True])
def test_nobody_is_blamed_for_a_commit_that_a_listener_never_lets_settle(
    session: Session, savepoint: bool
):
    """The error is SQLAlchemy's own, as without signals; the session is usable again."""

    def always_changes_something(session: Session, context: Any) -> None:
        book = session.get(Book, 1)
        book.name = f"{book.name}b"

    @receiver(post_save, sender=Author)
    @receiver(post_save, sender=Book)
    def has_nothing_to_do_with_it(sender, **kwargs): ...

    session.add(Book(id=1, name="b"))
    session.commit()
    event.listen(session, "after_flush_postexec", always_changes_something)
    session.add(Author(name="a"))
    with pytest.raises(FlushError, match="Over 100 subsequent flushes") as caught:
        (session.begin_nested() if savepoint else session).commit()
    assert not hasattr(caught.value, "__notes__")
    session.rollback()
    event.remove(session, "after_flush_postexec", always_changes_something)
    assert rows(session, Author.name) == []
    session.add(Author(name="c"))
    session.commit()
    assert rows(session, Author.name) == ["c"]
    assert rows(session, Book.name) == ["b"]


def test_a_post_receiver_that_works_for_long_is_no_cycle(session: Session, log: Log):
    """Ninety flushes of one commit, and a hundred and fifty of one transaction, settle."""

    @receiver(post_save, sender=Author)
    def counts_down(sender, instance, session, **kwargs):
        if instance.age:
            instance.age -= 1

    author = Author(name="a", age=0)
    session.add(author)
    for age in range(1, 151):
        session.flush()
        author.age = age
        author.name = f"{age}"
    author.age = 89
    session.commit()
    assert rows(session, Author.age) == [0]


def test_a_post_receiver_may_use_another_session_to_the_full(
    library: Engine, installed, tmp_path: Path
):
    """On another database here, because a file of SQLite has one writer at a time."""
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(other)
    log = listen()

    @receiver(post_save, sender=Author)
    def audit(sender, instance, **kwargs):
        with Session(other) as own:
            own.add(Tag(name="audit"))
            own.commit()

    with Session(library) as session:
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
    assert log.post == [
        "post_save created Author(a)",
        "post_save created Tag(audit)",
        "post_save created Author(b)",
        "post_save created Tag(audit)",
    ]
    assert rows(other, Tag.name) == ["audit", "audit"]
    other.dispose()

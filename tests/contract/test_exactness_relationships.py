"""What one row's change does to others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, ForeignKey, event
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    make_transient,
    mapped_column,
    relationship,
)

from sqla_signals import UNSET, Change, post_save, pre_delete, receiver

from .models import Author, Book, Note, Page, Tag
from .observing import Log, rows


class OwnBase(DeclarativeBase):
    """The base of the special shapes below."""


class Named:
    """A key and a name."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Folder(Named, OwnBase):
    """Leaves deletions to the database, in three ways."""

    __tablename__ = "folders"
    files: Mapped[list[File]] = relationship(cascade="all, delete-orphan", passive_deletes=True)
    labels: Mapped[list[Label]] = relationship(passive_deletes=True)
    links: Mapped[list[Link]] = relationship(passive_deletes="all")


class File(Named, OwnBase):
    """Goes with its folder."""

    __tablename__ = "files"
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id", ondelete="CASCADE"))


class Label(Named, OwnBase):
    """Stays, without its folder."""

    __tablename__ = "labels"
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id", ondelete="SET NULL"))


class Link(Named, OwnBase):
    """The unit of work does not look at it."""

    __tablename__ = "links"
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id", ondelete="CASCADE"))


class Widget(Named, OwnBase):
    """Points to one of its own entries, with ``post_update``."""

    __tablename__ = "widgets"
    favorite_id: Mapped[int | None] = mapped_column(
        ForeignKey("entries.id", use_alter=True, name="fk_favorite")
    )
    entries: Mapped[list[Entry]] = relationship(
        primaryjoin="Widget.id == Entry.widget_id", order_by="Entry.id"
    )
    favorite: Mapped[Entry | None] = relationship(
        primaryjoin="Widget.favorite_id == Entry.id", post_update=True
    )


class Entry(Named, OwnBase):
    """Belongs to a widget."""

    __tablename__ = "entries"
    widget_id: Mapped[int | None] = mapped_column(ForeignKey("widgets.id"))


class Node(Named, OwnBase):
    """A tree, deleted from the root."""

    __tablename__ = "nodes"
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("nodes.id"))
    children: Mapped[list[Node]] = relationship(
        cascade="all", back_populates="parent", order_by="Node.id"
    )
    parent: Mapped[Node | None] = relationship(back_populates="children", remote_side="Node.id")


class Person(Named, OwnBase):
    """Owns at most one passport."""

    __tablename__ = "persons"
    passport_id: Mapped[int | None] = mapped_column(ForeignKey("passports.id"))
    passport: Mapped[Passport | None] = relationship(
        cascade="all, delete-orphan", single_parent=True
    )


class Passport(Named, OwnBase):
    """On the one side of a many-to-one with delete-orphan."""

    __tablename__ = "passports"


@pytest.fixture
def special(engine: Engine, installed) -> Iterator[Session]:
    """A session on the tables of the special shapes."""
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def flushed(session: Session, log: Log) -> list[str]:
    """Flush, and return the post signals, sorted; each had exactly one pre signal."""
    log.clear()
    session.flush()
    assert sorted(line[4:] for line in log.pre) == sorted(line[5:] for line in log.post)
    return sorted(log.post)


def load(session: Session, *instances) -> None:
    """Load all columns, so that the names show, and no relationship."""
    for instance in instances:
        session.refresh(instance)


# -- foreign keys that the flush sets ------------------------------------------------------------


def test_a_child_whose_foreign_key_the_flush_sets_is_saved(session: Session, log: Log):
    """Assigned from either side, to a new parent or to an old one."""
    author, one, two = Author(name="a"), Book(name="one"), Book(name="two")
    session.add_all([author, one, two])
    session.commit()
    load(session, author, one, two)
    author.books.append(one)
    two.author = Author(name="new")
    assert flushed(session, log) == [
        "post_save created Author(new)",
        "post_save updated Book(one)",
        "post_save updated Book(two)",
    ]
    assert log.one("post_save", one).changes == {"author_id": Change(None, author.id)}
    assert log.one("post_save", two).changes == {"author_id": Change(None, two.author.id)}
    assert log.one("post_save", two)["update_fields"] == {"author_id"}
    assert sorted(rows(session, Book.author_id)) == [author.id, two.author.id]


def test_the_children_of_a_deleted_parent_whose_foreign_key_the_flush_nulls_are_saved(
    session: Session, log: Log
):
    """One UPDATE and one pair of signals for each."""
    author = Author(name="a", books=[Book(name="one"), Book(name="two")])
    session.add(author)
    session.commit()
    key = author.id
    load(session, *author.books)
    one = author.books[0]
    session.delete(author)
    assert flushed(session, log) == [
        "post_delete Author(a)",
        "post_save updated Book(one)",
        "post_save updated Book(two)",
    ]
    assert log.one("post_save", one).changes == {"author_id": Change(key, None)}
    assert rows(session, Book.author_id) == [None, None]


def test_children_that_were_never_loaded_are_saved_as_well(session: Session, log: Log):
    """The unit of work loads them to null their keys."""
    session.add(Author(name="a", books=[Book(name="one"), Book(name="two")]))
    session.commit()
    session.expunge_all()
    session.delete(session.get(Author, 1))
    assert flushed(session, log) == [
        "post_delete Author(a)",
        "post_save updated Book(one)",
        "post_save updated Book(two)",
    ]
    assert rows(session, Book.author_id) == [None, None]


def test_a_child_taken_out_of_a_collection_is_saved(session: Session, log: Log):
    """And one that is put back in time is not."""
    author = Author(name="a", books=[Book(name="one"), Book(name="two")])
    session.add(author)
    session.commit()
    one, two = author.books
    load(session, one, two)
    author.books.remove(one)
    author.books.remove(two)
    author.books.append(two)
    assert flushed(session, log) == ["post_save updated Book(one)"]
    assert rows(session, Book.name, Book.author_id) == [("one", None), ("two", author.id)]


def test_a_child_moved_between_parents_is_saved_once(session: Session, log: Log):
    """The old and the new parent are not written."""
    one, two = Author(name="one"), Author(name="two")
    book = Book(name="b", author=one)
    session.add_all([one, two, book])
    session.commit()
    load(session, one, two, book)
    two.books.append(book)
    assert flushed(session, log) == ["post_save updated Book(b)"]
    assert log.one("post_save").changes == {"author_id": Change(one.id, two.id)}
    assert rows(session, Book.author_id) == [two.id]


def test_a_many_to_many_row_has_no_signal_of_its_own_here(session: Session, log: Log):
    """Neither when it is added with new instances nor when it goes with a deleted one."""
    book, tag = Book(name="b"), Tag(name="t")
    book.tags.append(tag)
    session.add(book)
    assert flushed(session, log) == ["post_save created Book(b)", "post_save created Tag(t)"]
    session.delete(tag)
    assert flushed(session, log) == ["post_delete Tag(t)"]
    assert rows(session, Tag.id) == []


# -- cascades, orphans ---------------------------------------------------------------------------


def make_book(session: Session) -> tuple[Book, Page, Page, Note, Note]:
    """A book of two pages, the first with two notes, in the database and loaded."""
    notes = [Note(name="n1"), Note(name="n2")]
    pages = [Page(name="p1", notes=notes), Page(name="p2")]
    book = Book(name="b", pages=pages)
    session.add(book)
    session.commit()
    load(session, book, *pages, *notes)
    return book, *pages, *notes


def test_a_cascaded_delete_sends_a_pair_for_each_row_with_its_origin(session: Session, log: Log):
    """The origin is the instance that was deleted, also for its grandchildren."""
    book, *others = make_book(session)
    session.delete(book)
    assert flushed(session, log) == [
        "post_delete Book(b)",
        "post_delete Note(n1)",
        "post_delete Note(n2)",
        "post_delete Page(p1)",
        "post_delete Page(p2)",
    ]
    for signal in ("pre_delete", "post_delete"):
        assert log.one(signal, book)["origin"] is None
        for other in others:
            assert log.one(signal, other)["origin"] is book
    assert rows(session, Book.id) == rows(session, Page.id) == rows(session, Note.id) == []


def test_two_direct_deletes_have_no_origin_even_if_one_would_have_taken_the_other_along(
    session: Session, log: Log
):
    """The one that ``session.delete`` was called for first."""
    book, page, *_ = make_book(session)
    with session.no_autoflush:
        session.delete(page)
        session.delete(book)
    assert len(flushed(session, log)) == 5
    assert log.one("post_delete", book)["origin"] is None
    assert log.one("post_delete", page)["origin"] is None
    assert log.one("pre_delete", page)["origin"] is None


def test_an_orphan_is_deleted_with_everything_below_it(session: Session, log: Log):
    """Nobody called ``session.delete``; what is below has the orphan as its origin."""
    book, page, _, *notes = make_book(session)
    book.pages.remove(page)
    assert flushed(session, log) == [
        "post_delete Note(n1)",
        "post_delete Note(n2)",
        "post_delete Page(p1)",
    ]
    for signal in ("pre_delete", "post_delete"):
        assert log.one(signal, page)["origin"] is None
        for note in notes:
            assert log.one(signal, note)["origin"] is page
    assert rows(session, Page.name) == ["p2"]
    assert rows(session, Note.id) == []


def test_an_orphan_that_finds_another_parent_is_saved(session: Session, log: Log):
    """It is moved, not deleted."""
    book, page, *_ = make_book(session)
    other = Book(name="other")
    session.add(other)
    session.flush()
    with session.no_autoflush:
        book.pages.remove(page)
        other.pages.append(page)
    assert flushed(session, log) == ["post_save updated Page(p1)"]
    assert rows(session, Page.name, Page.book_id) == [("p1", other.id), ("p2", book.id)]


def test_a_new_orphan_is_not_written(session: Session, log: Log):
    """Put into a collection and taken out again before the flush."""
    book, *_ = make_book(session)
    page = Page(name="never")
    book.pages.append(page)
    book.pages.remove(page)
    assert flushed(session, log) == []
    assert len(rows(session, Page.id)) == 2


def test_replacing_a_single_parents_child_deletes_the_old_one(special: Session, log: Log):
    """A many-to-one with delete-orphan."""
    person = Person(name="p", passport=Passport(name="old"))
    special.add(person)
    special.commit()
    load(special, person, person.passport)
    person.passport = Passport(name="new")
    assert flushed(special, log) == [
        "post_delete Passport(old)",
        "post_save created Passport(new)",
        "post_save updated Person(p)",
    ]
    assert rows(special, Passport.name) == ["new"]
    special.delete(person)
    assert flushed(special, log) == ["post_delete Passport(new)", "post_delete Person(p)"]
    assert log.one("post_delete", person.passport)["origin"] is person


def test_the_child_that_a_copy_of_a_single_parent_gives_up_is_announced_first(
    special: Session, log: Log
):
    """The instance that is inserted as a copy was the only parent of what it referred to."""
    person = Person(name="p", passport=Passport(name="old"))
    special.add(person)
    special.commit()
    load(special, person, person.passport)
    person.passport = Passport(name="new")
    make_transient(person)
    person.id = None  # type: ignore[assignment]
    special.add(person)
    special.connection().execute(Person.__table__.update().values(passport_id=None))

    def veto(sender, **kwargs):
        raise ZeroDivisionError

    with pre_delete.connected_to(veto), pytest.raises(ZeroDivisionError):
        special.flush()
    assert rows(special, Passport.name) == ["old"]
    assert person in special
    assert flushed(special, log) == [
        "post_delete Passport(old)",
        "post_save created Passport(new)",
        "post_save created Person(p)",
    ]
    assert rows(special, Passport.name) == ["new"]


def test_a_tree_is_deleted_row_by_row(special: Session, log: Log):
    """Self-referential: each node has the root as its origin."""
    leaf = Node(name="leaf")
    root = Node(name="root", children=[Node(name="branch", children=[leaf])])
    special.add(root)
    assert flushed(special, log) == [
        f"post_save created Node({name})" for name in ("branch", "leaf", "root")
    ]
    special.delete(root)
    assert flushed(special, log) == [f"post_delete Node({n})" for n in ("branch", "leaf", "root")]
    assert log.one("post_delete", leaf)["origin"] is root
    assert rows(special, Node.id) == []


def test_an_instance_added_and_deleted_before_the_flush_is_not_written(session: Session, log: Log):
    """Expunged, as SQLAlchemy has it; once it was flushed it is a delete."""
    author = Author(name="a")
    session.add(author)
    session.expunge(author)
    assert flushed(session, log) == []
    session.add(author)
    assert flushed(session, log) == ["post_save created Author(a)"]
    session.delete(author)
    assert flushed(session, log) == ["post_delete Author(a)"]
    assert rows(session, Author.id) == []


# -- passive_deletes -----------------------------------------------------------------------------


def test_with_passive_deletes_children_that_are_loaded_are_written_by_the_unit_of_work(
    special: Session, log: Log
):
    """Deleted or saved, each with its signals; ``"all"`` leaves even those to the database."""
    folder = Folder(
        name="f", files=[File(name="file")], labels=[Label(name="label")], links=[Link(name="link")]
    )
    special.add(folder)
    special.flush()
    file = folder.files[0]
    special.delete(folder)
    assert flushed(special, log) == [
        "post_delete File(file)",
        "post_delete Folder(f)",
        "post_save updated Label(label)",
    ]
    assert log.one("post_delete", file)["origin"] is folder
    assert rows(special, File.id) == rows(special, Link.id) == []
    assert rows(special, Label.folder_id) == [None]


def test_what_the_database_cascades_by_itself_sends_nothing(special: Session, log: Log):
    """With ``passive_deletes``, nobody loads the children, and neither do we."""
    special.add(
        Folder(name="f", files=[File(name="file")], labels=[Label(name="x")], links=[Link()])
    )
    special.commit()
    special.expunge_all()
    special.delete(special.get(Folder, 1))
    assert flushed(special, log) == ["post_delete Folder(f)"]
    assert rows(special, File.id) == rows(special, Link.id) == []
    assert rows(special, Label.folder_id) == [None]


# -- post_update ---------------------------------------------------------------------------------


def test_post_update_of_a_new_row_is_part_of_its_creation(special: Session, log: Log):
    """INSERT and UPDATE of one row in one flush: created, with the last values."""
    entry = Entry(name="e")
    widget = Widget(name="w", entries=[entry], favorite=entry)
    special.add(widget)
    assert flushed(special, log) == ["post_save created Entry(e)", "post_save created Widget(w)"]
    assert log.one("post_save", widget).changes["favorite_id"] == Change(UNSET, entry.id)
    assert rows(special, Widget.favorite_id) == [entry.id]


def test_post_update_of_an_existing_row_is_an_update(special: Session, log: Log):
    """Alone, or together with another change of the same row: once."""
    one, two = Entry(name="one"), Entry(name="two")
    widget = Widget(name="w", entries=[one, two], favorite=one)
    special.add(widget)
    special.commit()
    load(special, widget, one, two)
    widget.favorite
    widget.favorite = two
    assert flushed(special, log) == ["post_save updated Widget(w)"]
    assert log.one("post_save").changes == {"favorite_id": Change(one.id, two.id)}
    widget.favorite = one
    widget.name = "x"
    assert flushed(special, log) == ["post_save updated Widget(x)"]
    assert log.one("post_save").changes == {
        "favorite_id": Change(two.id, one.id),
        "name": Change("w", "x"),
    }
    assert rows(special, Widget.name, Widget.favorite_id) == [("x", one.id)]


def test_post_update_before_a_delete_is_part_of_the_deletion(special: Session, log: Log):
    """The key is nulled so that the rows can go; each of them is deleted, once."""
    entry = Entry(name="e")
    widget = Widget(name="w", entries=[entry], favorite=entry)
    special.add(widget)
    special.flush()
    special.delete(widget)
    special.delete(entry)
    assert flushed(special, log) == ["post_delete Entry(e)", "post_delete Widget(w)"]
    assert rows(special, Widget.id) == rows(special, Entry.id) == []


def test_post_update_because_the_target_goes_is_an_update(special: Session, log: Log):
    """The widget stays and loses its favorite."""
    entry = Entry(name="e")
    widget = Widget(name="w", favorite=entry)
    special.add(widget)
    special.commit()
    load(special, widget, entry)
    widget.favorite = None
    special.delete(entry)
    assert flushed(special, log) == ["post_delete Entry(e)", "post_save updated Widget(w)"]
    assert rows(special, Widget.favorite_id) == [None]
    assert rows(special, Entry.id) == []


# -- what a receiver does to all this ------------------------------------------------------------


def test_a_receiver_that_takes_an_orphan_back_saves_it(session: Session, log: Log):
    """The dry run is made again after each round of receivers."""
    book, page, *_ = make_book(session)

    @receiver(pre_delete, sender=Page)
    def fn(sender, instance, **kwargs):
        book.pages.append(instance)

    book.pages.remove(page)
    log.clear()
    session.flush()
    assert "pre_delete Page(p1)" in log.pre
    assert log.post == []
    assert rows(session, Page.name) == ["p1", "p2"]
    assert rows(session, Note.name) == ["n1", "n2"]


def test_the_history_that_other_listeners_see_is_untouched(session: Session, log: Log):
    """A foreign key is not assigned before SQLAlchemy assigns it."""
    seen = []
    book = Book(name="b", author=Author(name="a"))
    session.add(book)

    @event.listens_for(session, "before_flush")
    def fn(session, context, objects):
        seen.append(book.author_id)

    session.flush()
    assert seen == [None]
    assert book.author_id == book.author.id
    (created,) = (sent for sent in log.sent if sent.line == "post_save created Book(b)")
    assert created.changes["author_id"] == Change(UNSET, book.author_id)


def test_fields_of_a_nulled_foreign_key_reach_their_receiver(session: Session):
    """``fields={"author"}`` when the author is deleted."""
    seen = []

    @receiver(post_save, sender=Book, fields={"author"})
    def fn(sender, instance, changes, **kwargs):
        seen.append(dict(changes))

    author = Author(name="a", books=[Book(name="b")])
    session.add(author)
    session.commit()
    key = author.id
    load(session, *author.books)
    seen.clear()
    session.delete(author)
    session.flush()
    assert seen == [{"author_id": Change(key, None)}]
    assert rows(session, Book.author_id) == [None]

"""A small library of books: what most tests share. Special shapes live with their tests."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """The declarative base; not mapped, so as a sender it stands for every model below."""


class Named:
    """A mixin; not mapped, so as a sender it stands for every model that inherits it."""

    name: Mapped[str | None]


book_tags = Table(
    "book_tags",
    Base.metadata,
    Column("book_id", ForeignKey("books.id"), primary_key=True),
    Column("tag_id", ForeignKey("tags.id"), primary_key=True),
)


class Author(Named, Base):
    """Has books, which stay without an author when it goes."""

    __tablename__ = "authors"
    id: Mapped[int] = mapped_column(primary_key=True)
    age: Mapped[int | None]
    books: Mapped[list[Book]] = relationship(back_populates="author", order_by="Book.id")


class Book(Named, Base):
    """Owns its pages, which own their notes."""

    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int | None] = mapped_column(ForeignKey("authors.id"))
    author: Mapped[Author | None] = relationship(back_populates="books")
    pages: Mapped[list[Page]] = relationship(
        back_populates="book", cascade="all, delete-orphan", order_by="Page.id"
    )
    tags: Mapped[list[Tag]] = relationship(secondary=book_tags, back_populates="books")


class Page(Named, Base):
    """Part of one book."""

    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    book_id: Mapped[int | None] = mapped_column(ForeignKey("books.id"))
    book: Mapped[Book | None] = relationship(back_populates="pages")
    notes: Mapped[list[Note]] = relationship(cascade="all, delete-orphan", order_by="Note.id")


class Note(Named, Base):
    """Part of one page."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    page_id: Mapped[int | None] = mapped_column(ForeignKey("pages.id"))


class Tag(Base):
    """Many-to-many with books; does not inherit ``Named``."""

    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    books: Mapped[list[Book]] = relationship(secondary=book_tags, back_populates="tags")

"""Shapes that only delivery cares about: documents, versions, natural keys, late constraints."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Record(AsyncAttrs, DeclarativeBase):
    """The declarative base; its instances have ``awaitable_attrs``."""


class Document(Record):
    """Values that can be changed in place, and one that is loaded when asked for."""

    __tablename__ = "documents"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    plain: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    tracked: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSON))
    body: Mapped[str | None] = mapped_column(deferred=True)


class Versioned(Record):
    """Counts its own versions, and each UPDATE writes a second column along."""

    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    version: Mapped[int] = mapped_column()
    touched: Mapped[int | None] = mapped_column(onupdate=7)
    __mapper_args__ = {"version_id_col": version}


class Coin(Record):
    """Known by a key that means something, and may change."""

    __tablename__ = "coins"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Shelf(Record):
    """Has boxes, loaded when asked for."""

    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    boxes: Mapped[list[Box]] = relationship(back_populates="shelf", order_by="Box.id")


class Box(Record):
    """Stands on a shelf that has to be there by the time of the COMMIT, and not before."""

    __tablename__ = "boxes"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    shelf_id: Mapped[int | None] = mapped_column(
        ForeignKey("shelves.id", deferrable=True, initially="DEFERRED")
    )
    shelf: Mapped[Shelf | None] = relationship(back_populates="boxes")
